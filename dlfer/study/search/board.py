"""What the workers of one arm share: the engine, its records on disk, and the look-out for a bug in the experiment."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence

from dlfer.study.search.engine import Answer, Engine, Proposal, TrialRecord
from dlfer.study.search.objective import get_direction

SAME_FAILURES = 3
"""So many first trials that all fail alike are taken for a bug in the experiment."""


class Board:
    """Hands trials out and takes their outcomes in, from several threads.

    A failure is held back from the engine until another trial tells that the experiment as such works: what
    was a bug is not counted, and is tried again on resume.

    Args:
        engine: proposes.
        figure: the validation figure that is the score.
        on_change: called after each change, with the records, inside the lock.

    Attributes:
        bug: the failure that is taken for a bug in the experiment.
    """

    def __init__(self, engine: Engine, figure: str, on_change: Callable[[list[TrialRecord]], None]) -> None:
        self.engine, self.figure, self.on_change = engine, figure, on_change
        self.lock = threading.RLock()
        self.bug: TrialRecord | None = None
        self._held: list[TrialRecord] = []
        self._works = False
        self._running: set[str] = set()

    def ask(self, worker: str) -> Answer:
        """Return a trial for `worker`, or that there is none now, or none any more."""
        with self.lock:
            if self.bug is not None:
                return Answer(exhausted=True)
            answer = self.engine.ask(worker)
            if answer.proposal is None and self._held and not self._running:
                self._let_go()
                answer = self.engine.ask(worker)
            if answer.proposal is not None:
                self._running.add(answer.proposal.trial)
                self._changed()
            return answer

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Hear the score after an epoch; return whether the trial goes on."""
        with self.lock:
            return self.engine.report(proposal, epochs, score)

    def tell(self, record: TrialRecord) -> None:
        """Hear how a trial ended."""
        with self.lock:
            self._running.discard(record.trial)
            if record.status == "failed" and not self._works:
                self._held.append(record)
                self._look_for_bug()
            else:
                self._works = True
                self._let_go()
                self.engine.tell(record)
            self._changed()

    def beat(self, trial: str) -> bool:
        """Hear that a trial goes on; here it always is its worker's own."""
        del trial
        return True

    def adopt(self, trial: str, worker: str) -> bool:
        """Give a trial that waits to be gone on with to the worker that has it; return whether it did wait."""
        with self.lock:
            adopted = self.engine.adopt(trial, worker)
            if adopted:
                self._running.add(trial)
                self._changed()
            return adopted

    def release(self, trial: str) -> None:
        """Take a trial away from a worker that is lost; it waits for another."""
        with self.lock:
            self._running.discard(trial)
            self.engine.release(trial)
            self._changed()

    def drop(self, trial: str) -> None:
        """A worker stopped, and its trial stands at a checkpoint."""
        with self.lock:
            self._running.discard(trial)

    def close(self) -> None:
        """Give the engine what was held back, unless it was a bug."""
        with self.lock:
            if self.bug is None:
                self._let_go()
            self._changed()

    def list_records(self) -> list[TrialRecord]:
        """Return all trials, those included that are held back."""
        with self.lock:
            held = {record.trial: record for record in self._held}
            return [held.get(record.trial, record) for record in self.engine.list_records()]

    def _look_for_bug(self) -> None:
        newest = self._held[-1]
        # A ConfigError may be of the trial's own values, which do not go together.
        if newest.is_users and newest.kind != "ConfigError":
            self.bug = newest
            return
        if _describe_alike(newest) != _describe_alike(self._held[0]):
            self._works = True
            self._let_go()
            return
        if len(self._held) >= min(SAME_FAILURES, self.engine.count_trials() or SAME_FAILURES):
            self.bug = newest

    def _let_go(self) -> None:
        while self._held:
            self.engine.tell(self._held.pop(0))

    def _changed(self) -> None:
        self.on_change(self.list_records())


def find_best(records: Sequence[TrialRecord], figure: str) -> TrialRecord | None:
    """Return the trial with the best score: among those that were run to the end, else among all."""
    scored = [record for record in records if record.score is not None]
    whole = [record for record in scored if record.status == "finished"]
    sign = -1 if get_direction(figure) == "min" else 1
    return max(whole or scored, key=lambda record: sign * record.score, default=None)


def _describe_alike(record: TrialRecord) -> tuple[str | None, str]:
    """Return what two failures of one cause have in common: the class, and the message without numbers."""
    first = (record.error or "").splitlines()[0] if record.error else ""
    return record.kind, re.sub(r"[0-9a-fA-F]*\d[\w.+-]*", "N", first)
