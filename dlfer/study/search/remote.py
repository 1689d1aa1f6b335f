"""A worker on another machine: asks the chief for trials, runs them here, sends how they ended."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer.config.load import load_experiment, load_recorded_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, DlferError, TrainingStopped, UserError
from dlfer.report.keys import format_overrides
from dlfer.report.search import ALONE
from dlfer.runs.files import write_atomically
from dlfer.runs.find import default_runs_folder
from dlfer.runs.options import RunOptions
from dlfer.runs.run import CONFIG_FILE, Run
from dlfer.study.search.arms import Arm
from dlfer.study.search.engine import Answer, Proposal, TrialRecord
from dlfer.study.search.files import list_differences
from dlfer.study.search.live import SearchView
from dlfer.study.search.wire import BEATS, make_trial, read_answer, uncarry
from dlfer.train.control import StopControl

if TYPE_CHECKING:
    from dlfer.study.search.run import SearchOptions

PATIENCE_SECONDS = 600.0
"""A worker waits so long for a chief that does not answer: it may be started again."""
CALL_SECONDS = 5.0
"""A call that is not answered in so long is made again."""


class RemoteSource:
    """The chief as a worker sees it.

    Args:
        address: HOST:PORT.
        control: asked, while the chief does not answer, whether to stop.
        say: tells a person that the chief does not answer, and that it does again.
    """

    def __init__(self, address: str, control: StopControl, say: Callable[[str], None]) -> None:
        import grpc
        from keras_tuner.src import protos

        self.address, self.control, self.say = address, control, say
        self.grpc, self.messages = grpc, protos.get_service()
        self.stub = protos.get_service_grpc().OracleStub(grpc.insecure_channel(address))
        self.beat_seconds = 1.0
        self.names: dict[str, str] = {}
        self.beaten: dict[str, float] = {}

    def describe(self) -> dict[str, Any]:
        """Return what the chief says of the search."""
        response = self._call(self.stub.GetSpace, self.messages.GetSpaceRequest())
        return json.loads(uncarry(response.hyperparameters))

    def ask(self, worker: str) -> Answer:
        """Return a trial from the chief."""
        response = self._call(self.stub.CreateTrial, self.messages.CreateTrialRequest(tuner_id=worker))
        answer = read_answer(response.trial)
        if answer.proposal is not None:
            self.names[answer.proposal.trial] = worker
            self.say(f"begins: {format_overrides(answer.proposal.overrides)}")
        return answer

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Return whether the trial goes on: the proposal says after how many epochs it ends."""
        del score
        return proposal.epochs is None or epochs < proposal.epochs

    def tell(self, record: TrialRecord) -> None:
        """Send how a trial ended."""
        self.names.pop(record.trial, None)
        how = f"score {record.score:.4f}" if record.score is not None else (record.error or "").partition("\n")[0]
        self.say(f"{record.status} after {record.epochs} epochs: {format_overrides(record.overrides)}: {how}")
        self._end(record.trial, record.as_dict())

    def drop(self, trial: str) -> None:
        """Give a trial back; where the chief does not answer, it will notice the silence."""
        worker = self.names.pop(trial, None)
        if worker is not None:
            self._end(trial, {"dropped": True, "trial": trial, "worker": worker}, patience=5.0)

    def beat(self, trial: str) -> bool:
        """Let the chief hear that a trial goes on; return whether it is still this worker's.

        Called often, sends now and then. A chief that does not answer may be started again; the trial goes
        on meanwhile.
        """
        now = time.monotonic()
        if now - self.beaten.get(trial, 0.0) < self.beat_seconds:
            return True
        self.beaten[trial] = now
        request = self.messages.GetTrialRequest(trial_id=f"{trial}@{self.names[trial]}")
        try:
            response = self.stub.GetTrial(request, timeout=self.beat_seconds + 1)
        except self.grpc.RpcError:
            return True
        return response.trial.status != make_trial(trial, "STOPPED").status

    def _end(self, trial: str, fields: dict[str, Any], *, patience: float = PATIENCE_SECONDS) -> None:
        message = make_trial(trial, "COMPLETED", json.dumps(fields))
        try:
            self._call(self.stub.EndTrial, self.messages.EndTrialRequest(trial=message), patience=patience)
        except DlferError:
            if not fields.get("dropped"):
                raise

    def _call(self, method: Any, request: Any, *, patience: float = PATIENCE_SECONDS) -> Any:
        """Call the chief; wait for one that does not answer, since it may be started again."""
        since, has_said = time.monotonic(), False
        while True:
            try:
                response = method(request, wait_for_ready=True, timeout=min(CALL_SECONDS, patience))
                if has_said:
                    self.say(f"{self.address}: the chief answers.")
                return response
            except self.grpc.RpcError as error:
                waited = time.monotonic() - since
                if waited > patience:
                    raise DlferError(
                        f"{self.address}: the chief has not answered for {waited:.0f} s ({error.code().name}). "
                        "Start it again (dlfer search --role chief --resume RUN), then this worker."
                    ) from None
            if patience > CALL_SECONDS and not has_said:
                has_said = True
                self.say(
                    f"{self.address}: no chief answers there. Is the address right, the port open, the chief started? "
                    f"Waiting for it up to {patience / 60:.0f} minutes; Ctrl-C ends the worker."
                )
            reason = self.control.get_reason()
            if reason is not None and patience >= PATIENCE_SECONDS:
                raise TrainingStopped(f"Stopped by {reason} while waiting for the chief.", reason=reason)


def run_remote_worker(file: Path | str | None, options: RunOptions, search_options: SearchOptions) -> None:
    """Run trials for a chief until it has none left.

    Args:
        file: the experiment file; where given, it must be the chief's experiment.

    Raises:
        ConfigError: it is not; with the differences.
        DlferError: the chief does not answer.
    """

    control = StopControl(options.max_hours)
    with control.watch_signals():
        while not _work_on_arm(file, options, search_options, control):
            # The other arm of --ablation begins soon.
            time.sleep(1)
        reason = control.get_reason()
    if reason is not None:
        raise TrainingStopped(f"The worker was stopped by {reason}.", reason=reason)


def _work_on_arm(
    file: Path | str | None, options: RunOptions, search_options: SearchOptions, control: StopControl
) -> bool:
    """Run trials until the chief has no more of this arm; return whether there is nothing more to do."""
    from dlfer.study.search.run import Search, make_workers, run_workers

    source = RemoteSource(search_options.chief, control, _say)
    about = source.describe()
    folder = (options.out or default_runs_folder()) / _read_name(about) / about["name"]
    config = _obtain_config(about, folder, file, options)
    source.beat_seconds = config.search.lost_after_seconds / BEATS
    view = SearchView(config.search.objective)
    own = RunOptions(
        out=folder.parent.parent,
        smoke=about["smoke"],
        use_cache=about["use_cache"] and options.use_cache,
        require_gpu=options.require_gpu,
        argv=tuple(about["argv"]),
    )
    search = Search(Run(folder), config, own, search_options, control, view, {})
    workers = make_workers(search, Arm(ALONE, about["base"], config), source)
    run_workers(workers)
    if control.get_reason() is None and about["is_last"]:
        _say("The chief has no more trials.")
    return about["is_last"] or control.get_reason() is not None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read_name(about: dict[str, Any]) -> str:
    """Return the experiment's name and see that neither it nor the search's can lead out of the folder of runs."""
    names = re.search(r"^\s+name: ([a-z0-9][a-z0-9_-]*)$", about["experiment"], re.MULTILINE)
    if names is None or not re.fullmatch(r"[A-Za-z0-9_-]+", about["name"]):
        raise UserError(f"The chief's answer is not that of a search: found the name {about['name']!r}.")
    return names[1]


def _obtain_config(
    about: dict[str, Any], folder: Path, file: Path | str | None, options: RunOptions
) -> ExperimentConfig:
    """Write the chief's experiment into the worker's copy of the search's folder, and compare it with `file`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    if not path.exists():
        write_atomically(path, about["experiment"])
    config = load_recorded_experiment(path)
    if file is not None:
        differences = list_differences(config, load_experiment(file, options.overrides))
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise ConfigError(f"{file}: is not the experiment and space of the chief:\n{lines}\nLeave the file out.")
    return config
