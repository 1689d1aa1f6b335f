"""One worker of a search: asks for a trial, runs it, tells how it ended, until there is none."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from dlfer.errors import TrainingStopped
from dlfer.report.keys import format_overrides
from dlfer.study.search.engine import Answer, Proposal, TrialRecord
from dlfer.study.search.objective import TrialFailed
from dlfer.study.search.trials import TrialRunner

IDLE_SECONDS = 0.5


class Source(Protocol):
    """Where a worker gets trials from: the board of this process, or a chief elsewhere."""

    def ask(self, worker: str) -> Answer: ...

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool: ...

    def tell(self, record: TrialRecord) -> None: ...

    def beat(self, trial: str) -> bool: ...

    def drop(self, trial: str) -> None: ...


@dataclass
class Progress:
    """Where a worker stands, for the live table.

    Attributes:
        proposal: what it runs; None: nothing.
        started: time.monotonic() of its beginning.
        stage: "EF-FER1" or "EF-FER2", once an epoch of it is done.
        epoch: done of the stage.
        score: so far.
    """

    proposal: Proposal | None = None
    started: float = 0.0
    stage: str = ""
    epoch: int = 0
    score: float | None = None


@dataclass
class Worker:
    """Runs trials one after another.

    Attributes:
        name: unique among the workers of a search.
        source: of trials.
        runner: runs one.
        base: keys that every trial of the arm sets besides.
        say: tells a person that a trial's process was killed.
        progress: where it stands.
    """

    name: str
    source: Source
    runner: TrialRunner
    base: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    progress: Progress = field(default_factory=Progress)

    def work(self) -> None:
        """Run trials until there are none, or until the search is asked to stop."""
        self.runner.on_event, self.runner.on_tick = self._note, self._beat
        done = 0
        while self.runner.control.get_reason() is None:
            # A name of its own for each trial: an oracle gives a name that has one the same one again.
            answer = self.source.ask(f"{self.name}.{done}")
            if answer.exhausted:
                return
            if answer.proposal is None:
                time.sleep(IDLE_SECONDS)
                continue
            try:
                self.source.tell(self._run(answer.proposal, f"{self.name}.{done}"))
            except TrainingStopped:
                self.source.drop(answer.proposal.trial)
                return
            except _TrialLost:
                self.source.drop(answer.proposal.trial)
            finally:
                self.progress.proposal = None
            done += 1

    def _run(self, proposal: Proposal, name: str) -> TrialRecord:
        self.progress = Progress(proposal, time.monotonic())
        overrides = {**self.base, **proposal.overrides}

        def report(epochs: int, score: float) -> bool:
            self.progress.stage, self.progress.epoch, self.progress.score = "EF-FER2", epochs, score
            return self.source.report(proposal, epochs, score)

        score, failure = None, None
        try:
            score = self.runner(overrides, report)
        except TrialFailed as error:
            failure = error
        facts = self.runner.describe(overrides)
        is_finished = facts.pop("status", None) == "finished"
        if failure is not None:
            status = "failed"
            facts |= {"error": str(failure), "kind": failure.kind, "is_users": failure.is_users}
        else:
            status = "finished" if is_finished else "pruned" if proposal.epochs is None else "rung"
        return TrialRecord(
            proposal.trial,
            proposal.overrides,
            status,
            score=score,
            rung=proposal.epochs,
            seconds=round(time.monotonic() - self.progress.started, 1),
            worker=name,
            ended=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            **facts,
        )

    def _beat(self) -> None:
        if not self.source.beat(self.progress.proposal.trial):
            raise _TrialLost(self.progress.proposal.trial)

    def _note(self, event: str, fields: dict[str, Any]) -> None:
        if event == "epoch" and fields["stage"] == "pretrain":
            self.progress.stage, self.progress.epoch = "EF-FER1", int(fields["row"]["epoch"])
        elif event == "restarted":
            keys = format_overrides(self.progress.proposal.overrides)
            self.say(f"{keys}: {fields['why']}; the trial goes on from its last checkpoint.")


class _TrialLost(Exception):
    """The trial is another worker's now, or the chief stops: it is left at its checkpoint."""


def make_worker_name() -> str:
    """Return a name that no other worker process has."""
    return f"{socket.gethostname()}-{os.getpid()}"
