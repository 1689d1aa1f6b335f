"""Trials as processes: each is an ordinary run of the experiment, begun or gone on with in a process of its own.

So its memory is freed, a crash takes nothing else along, and a GPU can be pinned to it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, ModelError, TrainingStopped
from dlfer.report.page import read_rows
from dlfer.runs.files import write_atomically
from dlfer.runs.run import CONFIG_FILE, Run
from dlfer.study.search.child import ON, STOP
from dlfer.study.search.objective import Report, TrialFailed, compute_scores_so_far, compute_trial_digest
from dlfer.train.control import StopControl

COMMAND = (sys.executable, "-m", "dlfer.study.search.child")
POLL_SECONDS = 0.5
STOP_SECONDS = 120.0
"""A trial that was asked to stop and does not come to a checkpoint in so long is killed; its last one stands."""
RESTARTS = 1
"""How often a trial whose process was killed from outside is gone on with before it counts as failed."""


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a search have in common.

    Attributes:
        folder: of the search; its trials are put beside it.
        config: the experiment.
        figure: the validation figure that is the score.
        smoke, require_gpu, use_cache: as of `dlfer run`.
        argv: the search's command.
        judge_test: False for trials; the winners of --ablation are judged.
    """

    folder: Path
    config: ExperimentConfig
    figure: str
    smoke: bool = False
    require_gpu: bool = False
    use_cache: bool = True
    judge_test: bool = False
    argv: tuple[str, ...] = ()


@dataclass
class TrialRunner:
    """The objective of a search: overrides -> the validation figure of a run with them.

    Attributes:
        settings: of all trials.
        control: asked whether the search is to stop.
        environment: variables of the trial's process, e.g. CUDA_VISIBLE_DEVICES.
        on_tick: called about twice a second while a trial runs.
        on_event: told what a trial's process says: (event, its fields).
    """

    settings: TrialSettings
    control: StopControl
    environment: Mapping[str, str] = field(default_factory=dict)
    on_tick: Callable[[], None] = lambda: None
    on_event: Callable[[str, dict[str, Any]], None] = lambda event, fields: None

    def __call__(self, overrides: Mapping[str, object], report: Report) -> float:
        """Return the score of a run with `overrides`; see `Objective`."""
        try:
            config = with_overrides(self.settings.config, overrides)
        except ConfigError as error:
            raise TrialFailed(str(error), kind="ConfigError", is_users=True) from None
        with self._hold(overrides):
            return self._run(config, overrides, report)

    def find_run(self, overrides: Mapping[str, object]) -> Run | None:
        """Return the run of a trial that has begun."""
        record = self._get_record(overrides)
        try:
            path = self.settings.folder.parent / json.loads(record.read_text())["run"]
        except FileNotFoundError:
            return None
        return Run(path) if (path / "run.json").exists() else None

    def describe(self, overrides: Mapping[str, object]) -> dict[str, Any]:
        """Return what is known of a trial's run: name, status, epochs done, and the interval of a finished score."""
        run = self.find_run(overrides)
        if run is None:
            return {}
        facts = {"run": run.path.name, "status": run.status, "epochs": len(read_history_rows(run.path))}
        with contextlib.suppress(ModelError, KeyError, TypeError):
            name = "log_loss" if self.settings.figure == "loss" else self.settings.figure
            figure = run.read_metrics()["validation"][name]
            facts |= {"low": figure["low"], "high": figure["high"]}
        return facts

    def _run(self, config: ExperimentConfig, overrides: Mapping[str, object], report: Report) -> float:
        def goes_on(epochs: int, score: float) -> bool:
            # After the last epoch there is nothing to stop; the run is to be finished.
            return report(epochs, score) or epochs >= config.finetune.epochs

        for restart in itertools.count():
            run = self.find_run(overrides)
            self._wait_until_free(run)
            told = self._tell_past(run, config, goes_on)
            if told is not None:
                return told
            try:
                return self._go_on(run, config, overrides, goes_on)
            except _ProcessKilled as killed:
                if restart == RESTARTS:
                    raise TrialFailed(f"{killed}, {RESTARTS + 1} times. Was memory short?", kind="Killed") from None
                self.on_event("restarted", {"why": str(killed)})

    def _tell_past(self, run: Run | None, config: ExperimentConfig, report: Report) -> float | None:
        """Report the epochs that were done before; return the score if there is nothing to go on with."""
        if run is None:
            return None
        scores = compute_scores_so_far(read_history_rows(run.path), self.settings.figure, config.finetune)
        for epochs, score in enumerate(scores, start=1):
            if not report(epochs, score):
                return score
        is_done = run.status == "finished" and (run.read_json("run.json")["judge_test"] or not self.settings.judge_test)
        return scores[-1] if is_done and scores else None

    def _go_on(
        self, run: Run | None, config: ExperimentConfig, overrides: Mapping[str, object], report: Report
    ) -> float:
        """Start the trial's process and listen to it until it ends."""
        rows = {int(row["epoch"]): row for row in (read_history_rows(run.path) if run else [])}
        with self._start(run, overrides) as child:
            for event, fields in child.listen(self._tick):
                self.on_event(event, fields)
                if event == "epoch" and fields["stage"] == "finetune":
                    rows[fields["row"]["epoch"]] = fields["row"]
                    history = [rows[epoch] for epoch in sorted(rows)]
                    score = compute_scores_so_far(history, self.settings.figure, config.finetune)[-1]
                    child.answer(ON if report(len(history), score) else STOP)
                elif event in ("finished", "stopped"):
                    break
                elif event == "failed":
                    raise TrialFailed(fields["error"], kind=fields["kind"], is_users=fields["is_users"])
            else:
                raise _ProcessKilled(
                    f"The trial's process ended with {child.wait()} and without a word (see {child.log})"
                )
        reason = self.control.get_reason()
        if event == "stopped" and reason is not None:
            raise TrainingStopped(f"A trial was stopped by {reason}; it stands at a checkpoint.", reason=reason)
        run = self.find_run(overrides)
        return compute_scores_so_far(read_history_rows(run.path), self.settings.figure, config.finetune)[-1]

    @contextlib.contextmanager
    def _start(self, run: Run | None, overrides: Mapping[str, object]) -> Iterator[Child]:
        settings, record = self.settings, self._get_record(overrides)
        job = {
            "config": str((settings.folder / CONFIG_FILE).resolve()),
            "overrides": dict(overrides),
            "run": None if run is None else str(run.path),
            "record": str(record),
            "resume_hint": f"dlfer search --resume {settings.folder}",
            "options": {
                "out": str(settings.folder.parent.parent),
                "smoke": settings.smoke,
                "require_gpu": settings.require_gpu,
                "use_cache": settings.use_cache,
                "judge_test": settings.judge_test,
                "argv": list(settings.argv),
            },
        }
        file = record.with_suffix(".job")
        write_atomically(file, json.dumps(job, indent=2) + "\n")
        child = Child(file, record.with_suffix(".log"), self.environment)
        try:
            yield child
        finally:
            child.close()

    def _tick(self, child: Child) -> None:
        self.on_tick()
        if self.control.get_reason() is not None:
            child.ask_to_stop()

    def _wait_until_free(self, run: Run | None) -> None:
        """Wait for a process that still works on the run: that of a search which was killed ends by itself."""
        while run is not None and run.is_held():
            self._sleep_or_stop()

    @contextlib.contextmanager
    def _hold(self, overrides: Mapping[str, object]) -> Iterator[None]:
        """Keep two workers from running the same trial at the same time."""
        record = self._get_record(overrides)
        record.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(record.with_suffix(".lock"))
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                self._sleep_or_stop()
        try:
            yield
        finally:
            lock.release()

    def _sleep_or_stop(self) -> None:
        self.on_tick()
        reason = self.control.get_reason()
        if reason is not None:
            raise TrainingStopped(f"Stopped by {reason} while another process works on the trial.", reason=reason)
        time.sleep(POLL_SECONDS)

    def _get_record(self, overrides: Mapping[str, object]) -> Path:
        return self.settings.folder / "trials" / f"{compute_trial_digest(overrides)}.json"


class Child:
    """The process of a trial as the search sees it.

    Args:
        job: file that tells it what to do.
        log: file of what it and its libraries say.
        environment: variables to set.
    """

    def __init__(self, job: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("ab") as talk:
            self.process = subprocess.Popen(
                [*COMMAND, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=talk,
                text=True,
                # Ctrl-C reaches the search alone, which then asks its trials to stop.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.stopping_since: float | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def listen(self, tick: Callable[[Child], None]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what the process says until it closes its pipe; `tick` is called now and then."""
        while True:
            tick(self)
            self._kill_if_late()
            try:
                line = self.lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if line is None:
                return
            fields = json.loads(line)
            yield fields.pop("event"), fields

    def answer(self, word: str) -> None:
        """Say whether to go on."""
        if self.stopping_since is None:
            with contextlib.suppress(BrokenPipeError):
                print(word, file=self.process.stdin, flush=True)

    def ask_to_stop(self) -> None:
        """Close its stdin, which it takes as the wish to stop at a checkpoint."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def wait(self) -> int:
        """Return how the process ended; a negative number is the signal that killed it."""
        return self.process.wait()

    def close(self) -> None:
        """Let the process come to its end, and make it if it does not."""
        self.ask_to_stop()
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _kill_if_late(self) -> None:
        if self.stopping_since is not None and time.monotonic() - self.stopping_since > STOP_SECONDS:
            self.process.kill()


class _ProcessKilled(Exception):
    """The process of a trial ended without saying how."""


def read_history_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a run's fine-tuning history as numbers, [] where there is none."""
    rows = read_rows(path / "finetune" / "history.csv")
    return [{key: float(value) for key, value in row.items() if key != "phase"} for row in rows]
