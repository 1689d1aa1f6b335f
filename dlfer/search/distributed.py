"""A search over several machines: one chief that proposes, workers that run trials, KerasTuner's gRPC between.

The service and its messages are KerasTuner's; what goes through them differs in four points, since its own
server waits for a worker that was killed without end, drops why a trial failed, and rounds numbers to
float32: a proposal and a record travel as JSON text, a worker is heard from every few seconds, and one that
is silent for `search.lost_after_seconds` loses its trial to another.

There is no password and no encryption: who reaches the port may read the experiment and send scores.
"""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer.config.load import dump_experiment, load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, DlferError, TrainingStopped, UserError
from dlfer.runs import CONFIG_FILE, Run, RunOptions, default_runs_folder, write_atomically
from dlfer.search.board import Board
from dlfer.search.engine import Answer, Proposal, TrialRecord
from dlfer.search.files import list_differences
from dlfer.search.live import SearchView
from dlfer.train.control import StopControl

if TYPE_CHECKING:
    from dlfer.search.arms import Arm
    from dlfer.search.run import Search, SearchOptions

_CARRIED = "dlfer"
"""The key of KerasTuner's messages under which JSON text travels."""
_PATIENCE_SECONDS = 600.0
"""A worker waits so long for a chief that does not answer: it may be started again."""
_BEATS = 5
"""A worker is heard from so many times within search.lost_after_seconds."""


def serve(search: Search, arm: Arm, board: Board) -> None:
    """Hand out the trials of an arm until all have ended, or the search is to stop.

    Raises:
        TrainingStopped: the search was asked to stop; the workers' trials stop at their checkpoints.
        ConfigError: the address cannot be listened at.
    """
    import grpc
    from keras_tuner.src import protos

    if search.config.search.engine == "optuna":
        raise ConfigError("search.engine: optuna keeps its trials in a file; --role chief needs one of KerasTuner's.")
    address = search.search_options.chief
    if not is_loopback(address):
        search.view.say(
            f"Warning: {address} can be reached from other machines, and gRPC has no password here. Whoever reaches "
            "it can read the experiment and send scores; let a firewall or a private network keep strangers away."
        )
    desk = Desk(search, arm, board)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    protos.get_service_grpc().add_OracleServicer_to_server(desk.make_servicer(), server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(f"--chief {address}: cannot listen there; is the port taken, or the address another's?")
    server.start()
    search.view.say(
        f"{arm.name}: listening at {address}. On each machine: dlfer search --role worker --chief {address}"
    )
    try:
        desk.wait()
    finally:
        server.stop(grace=1.0).wait()


@dataclass
class _Lease:
    """A trial that a worker has, and when it was heard from last (time.monotonic())."""

    worker: str
    heard: float


class Desk:
    """What the chief knows of its workers.

    Args:
        search: under way.
        arm: that is served.
        board: hands out the trials.
    """

    def __init__(self, search: Search, arm: Arm, board: Board) -> None:
        self.search, self.arm, self.board = search, arm, board
        self.lost_after = search.config.search.lost_after_seconds
        self.lock = threading.RLock()
        self.leases: dict[str, _Lease] = {}
        self.open_asks: dict[str, Proposal] = {}
        self.exhausted = False
        self.waiting_workers: dict[str, float] = {}

    def describe(self) -> str:
        """Return, as JSON, all that a worker needs to know of the search."""
        options = self.search.options
        return json.dumps(
            {
                "name": self.search.run.path.name,
                "experiment": dump_experiment(self.search.config),
                "base": dict(self.arm.base),
                "smoke": options.smoke,
                "use_cache": options.use_cache,
                "argv": list(options.argv),
            }
        )

    def ask(self, worker: str) -> Answer:
        """Answer a worker; one that asks again, since the answer was lost, gets the same trial."""
        with self.lock:
            base = worker.rpartition(".")[0]
            self.waiting_workers[base] = time.monotonic()
            if self.search.control.get_reason() is not None:
                self.waiting_workers.pop(base, None)
                return Answer(exhausted=True)
            if worker in self.open_asks:
                return Answer(self.open_asks[worker])
            answer = self.board.ask(worker)
            if answer.proposal is not None:
                self.open_asks[worker] = answer.proposal
                self.leases[answer.proposal.trial] = _Lease(worker, time.monotonic())
            elif answer.exhausted:
                self.exhausted = True
                self.waiting_workers.pop(base, None)
            return answer

    def hear(self, trial: str, worker: str) -> bool:
        """Note that a worker is alive; return whether the trial still is its own."""
        with self.lock:
            lease = self.leases.get(trial)
            if lease is None and self.board.adopt(trial, worker):
                # This chief was started again, and the worker went on meanwhile.
                lease = self.leases[trial] = _Lease(worker, 0.0)
            if lease is None or lease.worker != worker:
                return False
            lease.heard = time.monotonic()
            self.waiting_workers[worker.rpartition(".")[0]] = lease.heard
            return True

    def tell(self, record: TrialRecord) -> None:
        """Take in how a trial ended; that of a worker which had been given up is left aside."""
        with self.lock:
            if not self.hear(record.trial, record.worker or ""):
                return
            del self.leases[record.trial]
            self.open_asks.pop(record.worker, None)
            self.board.tell(record)

    def drop(self, trial: str, worker: str) -> None:
        """A worker was stopped and gives its trial back."""
        with self.lock:
            if self.hear(trial, worker):
                self._release(trial)
            self.waiting_workers.pop(worker.rpartition(".")[0], None)

    def wait(self) -> None:
        """Return when all trials have ended and the workers know it; give up workers that are silent."""
        while True:
            time.sleep(min(0.5, self.lost_after / _BEATS))
            with self.lock:
                self._release_silent()
                known = [at for at in self.waiting_workers.values() if time.monotonic() - at < self.lost_after]
                is_over = (self.exhausted and not self.leases) or self.board.bug is not None
                reason = self.search.control.get_reason()
                if is_over and not known:
                    return
                if reason is not None and not (known and self.leases):
                    raise TrainingStopped(f"The chief was stopped by {reason}.", reason=reason)

    def make_servicer(self) -> Any:
        """Return KerasTuner's servicer with this desk behind it."""
        from keras_tuner.src import protos
        from keras_tuner.src.distribute.oracle_chief import OracleServicer

        desk, messages = self, protos.get_service()

        class Servicer(OracleServicer):
            """Translates KerasTuner's messages into calls of the desk."""

            def GetSpace(self, request: Any, context: Any) -> Any:
                return messages.GetSpaceResponse(hyperparameters=_carry(desk.describe()).to_proto())

            def CreateTrial(self, request: Any, context: Any) -> Any:
                answer = desk.ask(request.tuner_id)
                return messages.CreateTrialResponse(trial=_write_answer(answer))

            def GetTrial(self, request: Any, context: Any) -> Any:
                trial, _, worker = request.trial_id.partition("@")
                is_own = desk.hear(trial, worker) and desk.search.control.get_reason() is None
                return messages.GetTrialResponse(trial=_make_trial(trial, "RUNNING" if is_own else "STOPPED"))

            def EndTrial(self, request: Any, context: Any) -> Any:
                fields = json.loads(_uncarry(request.trial.hyperparameters))
                if fields.pop("dropped", False):
                    desk.drop(fields["trial"], fields["worker"])
                else:
                    desk.tell(TrialRecord(**fields))
                return messages.EndTrialResponse()

        return Servicer(None)

    def _release(self, trial: str) -> None:
        lease = self.leases.pop(trial)
        self.open_asks.pop(lease.worker, None)
        self.board.release(trial)

    def _release_silent(self) -> None:
        for trial, lease in list(self.leases.items()):
            if time.monotonic() - lease.heard > self.lost_after:
                self.search.view.say(f"trial {trial}: its worker {lease.worker} is silent; the trial goes to another.")
                self._release(trial)


class RemoteSource:
    """The chief as a worker sees it.

    Args:
        address: HOST:PORT.
        control: asked, while the chief does not answer, whether to stop.
    """

    def __init__(self, address: str, control: StopControl) -> None:
        import grpc
        from keras_tuner.src import protos

        self.address, self.control = address, control
        self.grpc, self.messages = grpc, protos.get_service()
        self.stub = protos.get_service_grpc().OracleStub(grpc.insecure_channel(address))
        self.beat_seconds = 1.0
        self.names: dict[str, str] = {}
        self.beaten: dict[str, float] = {}

    def describe(self) -> dict[str, Any]:
        """Return what the chief says of the search."""
        response = self._call(self.stub.GetSpace, self.messages.GetSpaceRequest())
        return json.loads(_uncarry(response.hyperparameters))

    def ask(self, worker: str) -> Answer:
        """Return a trial from the chief."""
        response = self._call(self.stub.CreateTrial, self.messages.CreateTrialRequest(tuner_id=worker))
        answer = _read_answer(response.trial)
        if answer.proposal is not None:
            self.names[answer.proposal.trial] = worker
        return answer

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Return whether the trial goes on: the proposal says after how many epochs it ends."""
        del score
        return proposal.epochs is None or epochs < proposal.epochs

    def tell(self, record: TrialRecord) -> None:
        """Send how a trial ended."""
        self.names.pop(record.trial, None)
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
        return response.trial.status != _make_trial(trial, "STOPPED").status

    def _end(self, trial: str, fields: dict[str, Any], *, patience: float = _PATIENCE_SECONDS) -> None:
        message = _make_trial(trial, "COMPLETED", json.dumps(fields))
        try:
            self._call(self.stub.EndTrial, self.messages.EndTrialRequest(trial=message), patience=patience)
        except DlferError:
            if not fields.get("dropped"):
                raise

    def _call(self, method: Any, request: Any, *, patience: float = _PATIENCE_SECONDS) -> Any:
        """Call the chief; wait for one that does not answer, since it may be started again."""
        since = time.monotonic()
        while True:
            try:
                return method(request, wait_for_ready=True, timeout=min(5.0, patience))
            except self.grpc.RpcError as error:
                waited = time.monotonic() - since
                if waited > patience:
                    raise DlferError(
                        f"{self.address}: the chief has not answered for {waited:.0f} s ({error.code().name}). "
                        "Start it again (dlfer search --role chief --resume RUN), then this worker."
                    ) from None
            reason = self.control.get_reason()
            if reason is not None and patience >= _PATIENCE_SECONDS:
                raise TrainingStopped(f"Stopped by {reason} while waiting for the chief.", reason=reason)


def run_remote_worker(file: Path | str | None, options: RunOptions, search_options: SearchOptions) -> None:
    """Run trials for a chief until it has none left.

    Args:
        file: the experiment file; where given, it must be the chief's experiment.

    Raises:
        ConfigError: it is not; with the differences.
        DlferError: the chief does not answer.
    """
    from dlfer.search.arms import Arm
    from dlfer.search.run import Search, make_workers, run_workers

    control = StopControl(options.max_hours)
    source = RemoteSource(search_options.chief, control)
    about = source.describe()
    folder = (options.out or default_runs_folder()) / _read_name(about) / about["name"]
    config = _obtain_config(about, folder, file, options)
    source.beat_seconds = config.search.lost_after_seconds / _BEATS
    view = SearchView(config.search.objective)
    own = RunOptions(
        out=folder.parent.parent,
        smoke=about["smoke"],
        use_cache=about["use_cache"] and options.use_cache,
        require_gpu=options.require_gpu,
        argv=tuple(about["argv"]),
    )
    search = Search(Run(folder), config, own, search_options, control, view, {})
    workers = make_workers(search, Arm("search", about["base"], config), source)
    view.say(f"worker of {about['name']} at {search_options.chief}, {len(workers)} trials at a time, runs in {folder}")
    with control.watch_signals():
        run_workers(workers)
    reason = control.get_reason()
    if reason is not None:
        raise TrainingStopped(f"The worker was stopped by {reason}.", reason=reason)
    view.say("The chief has no more trials.")


def is_loopback(address: str) -> bool:
    """Return whether HOST:PORT is reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_name(about: dict[str, Any]) -> str:
    """Return the experiment's name and see that neither it nor the search's can lead out of the folder of runs."""
    import re

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
    config = load_experiment(path, check_search=False)
    if file is not None:
        differences = list_differences(config, load_experiment(file, options.overrides))
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise ConfigError(f"{file}: is not the experiment and space of the chief:\n{lines}\nLeave the file out.")
    return config


def _carry(text: str) -> Any:
    import keras_tuner

    hyperparameters = keras_tuner.HyperParameters()
    hyperparameters.values[_CARRIED] = text
    return hyperparameters


def _uncarry(message: Any) -> str:
    return message.values.values[_CARRIED].string_value


def _make_trial(trial: str, status: str, text: str = "") -> Any:
    from keras_tuner.src.engine.trial import Trial

    return Trial(_carry(text), trial_id=trial, status=status).to_proto()


def _write_answer(answer: Answer) -> Any:
    if answer.proposal is None:
        return _make_trial("-", "STOPPED" if answer.exhausted else "IDLE")
    return _make_trial(answer.proposal.trial, "RUNNING", json.dumps(asdict(answer.proposal)))


def _read_answer(message: Any) -> Answer:
    from keras_tuner.src.engine.trial import TrialStatus

    status = TrialStatus.from_proto(message.status)
    if status == "RUNNING":
        return Answer(Proposal(**json.loads(_uncarry(message.hyperparameters))))
    return Answer(exhausted=status == "STOPPED")
