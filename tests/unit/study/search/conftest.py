"""A way to let an engine search without training."""

from __future__ import annotations

import math

import pytest

from dlfer.runs.member_rows import MemberRow
from dlfer.study.search.trials import Arm


@pytest.fixture
def open_engine():
    """Return a function that opens the engine of an experiment, with what it left in a folder before."""
    return open_one


def open_one(folder, config, *, trials=None, storage=None):
    """Return the engine of a search without arms."""
    return Arm("search", {}, config).open_engine(folder, trials=trials, smoke=False, storage=storage)


@pytest.fixture
def score():
    """The score that `play` gives."""
    return compute_score


@pytest.fixture
def play():
    """Let an engine search without training."""
    return play_engine


@pytest.fixture
def make_row():
    """Return a function that gives the row of a trial that ended."""
    return make_ended


def make_ended(proposal, status="finished", score=None, **given):
    return MemberRow(
        arm="search",
        trial=proposal.trial,
        settings=proposal.settings,
        status=status,
        score=score,
        rung=proposal.epochs,
        **given,
    )


def compute_score(settings):
    """Return a score with its top of 1 at a learning rate of 1e-3."""
    return 1 - abs(math.log10(settings["finetune.optimizer.learning_rate"]) + 3)


def play_engine(folder, config, *, trials=None, reopen=False, failing=(), limit=200):
    """Let an engine search by `compute_score`; return its proposals and the engine as it is in the end."""
    engine, proposals = open_one(folder, config, trials=trials), []
    while len(proposals) < limit:
        if reopen and proposals:
            engine = open_one(folder, config, trials=trials)
        answer = engine.ask(f"w.{len(proposals)}")
        if answer.exhausted:
            break
        proposal = answer.proposal
        proposals.append(proposal)
        status = "failed" if len(proposals) in failing else "finished" if proposal.epochs is None else "rung"
        value = None if status == "failed" else compute_score(proposal.settings)
        engine.tell(make_ended(proposal, status, value))
    return proposals, engine
