"""One worker, with a board and an objective that does not run anything."""

from __future__ import annotations

import pytest

from dlfer.errors import TrainingStopped
from dlfer.study.search.engine import Answer, Proposal
from dlfer.study.search.objective import TrialFailed
from dlfer.study.search.worker import Worker
from dlfer.train.control import StopControl


class Source:
    def __init__(self, *proposals, own=True):
        self.proposals, self.asked, self.told, self.dropped, self.own = list(proposals), [], [], [], own

    def ask(self, worker):
        self.asked.append(worker)
        return Answer(self.proposals.pop(0)) if self.proposals else Answer(exhausted=True)

    def report(self, proposal, epochs, score):
        return proposal.epochs is None or epochs < proposal.epochs

    def tell(self, record):
        self.told.append(record)

    def beat(self, trial):
        return self.own

    def drop(self, trial):
        self.dropped.append(trial)


class Runner:
    """Runs three epochs of nothing; `error` is what it raises in the second."""

    def __init__(self, error=None):
        self.error, self.control, self.seen, self.status = error, StopControl(), [], "finished"
        self.on_tick = self.on_event = lambda *_: None

    def __call__(self, overrides, report):
        self.seen.append(overrides)
        for epochs in (1, 2, 3):
            self.on_tick()
            if not report(epochs, epochs / 10):
                self.status = "stopped"
                return epochs / 10
            if self.error is not None and epochs == 2:
                raise self.error
        return 0.3

    def describe(self, overrides):
        return {"run": "r", "status": self.status, "epochs": 3}


def test_trials_are_run_one_after_another_each_under_a_name_of_its_own():
    source, runner = Source(Proposal("0", {"a": 1}), Proposal("1", {"a": 2})), Runner()
    Worker("w", source, runner, base={"pretrain": None}).work()
    assert runner.seen == [{"pretrain": None, "a": 1}, {"pretrain": None, "a": 2}]
    assert source.asked == ["w.0", "w.1", "w.2"]
    assert [(r.trial, r.overrides, r.status, r.score, r.run) for r in source.told] == [
        ("0", {"a": 1}, "finished", 0.3, "r"),
        ("1", {"a": 2}, "finished", 0.3, "r"),
    ]


def test_a_rung_ends_after_its_epochs():
    source = Source(Proposal("0", {}, epochs=2))
    Worker("w", source, Runner()).work()
    assert [(r.status, r.score, r.rung) for r in source.told] == [("rung", 0.2, 2)]


def test_a_failure_is_told_with_its_kind_and_the_next_trial_follows():
    source = Source(Proposal("0", {}), Proposal("1", {}))
    Worker("w", source, Runner(TrialFailed("the loss became nan", kind="NonFiniteError"))).work()
    assert [(r.status, r.score, r.error, r.kind) for r in source.told] == [
        ("failed", None, "the loss became nan", "NonFiniteError")
    ] * 2


def test_a_stop_gives_the_trial_back():
    source = Source(Proposal("0", {}), Proposal("1", {}))
    Worker("w", source, Runner(TrainingStopped("stopped", reason="Ctrl-C"))).work()
    assert (source.told, source.dropped, source.asked) == ([], ["0"], ["w.0"])


def test_a_trial_that_is_anothers_now_is_left_alone():
    source = Source(Proposal("0", {}), own=False)
    Worker("w", source, Runner()).work()
    assert (source.told, source.dropped) == ([], ["0"])


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        Worker("w", Source(Proposal("0", {})), Runner(ZeroDivisionError())).work()


def test_a_person_is_told_of_a_trial_whose_process_was_killed():
    said = []

    class Killed(Runner):
        def __call__(self, overrides, report):
            self.on_event("restarted", {"why": "The trial's process ended with -9"})
            return super().__call__(overrides, report)

    Worker("w", Source(Proposal("0", {"model.dropout": 0.2})), Killed(), say=said.append).work()
    assert said == ["dropout 0.2: The trial's process ended with -9; the trial goes on from its last checkpoint."]
