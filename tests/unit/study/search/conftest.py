"""A small experiment with a space, and a way to run an engine without training."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from dlfer.config.load import load_experiment
from dlfer.study.search.engine import EngineSettings, TrialRecord, open_engine

FAKE_CHILD = Path(__file__).with_name("fake_child.py")

SPACE = {
    "finetune.optimizer.learning_rate": {"log": [1e-4, 1e-2]},
    "finetune.optimizer.momentum": {"between": [0.8, 0.9], "when": {"finetune.optimizer.name": ["sgd"]}},
    "finetune.optimizer.name": {"choice": ["adam", "sgd"]},
    "finetune.early_stopping": {"choice": [None, {"patience": 3}]},
    "finetune.batch_size": {"between": [8, 32], "step": 8},
}


@pytest.fixture
def make_config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("experiment: {name: a}\nfinetune: {data: {source: synthetic_faces}, epochs: 9}\n")

    def make(engine="random", space=SPACE, **given):
        return load_experiment(path, {"search": {"engine": engine, "space": space, **given}})

    return make


@pytest.fixture
def score():
    """The score that `play` gives."""
    return compute_score


@pytest.fixture
def play():
    """Let an engine search without training."""
    return play_engine


def compute_score(overrides):
    """Return a score with its top of 1 at a learning rate of 1e-3."""
    return 1 - abs(math.log10(overrides["finetune.optimizer.learning_rate"]) + 3)


def play_engine(folder, config, *, trials=None, reopen=False, failing=(), limit=200):
    """Let an engine search by `compute_score`; return its proposals and the engine as it is in the end."""
    settings = EngineSettings(config, 9, trials)
    engine, proposals = open_engine(folder, settings), []
    while len(proposals) < limit:
        if reopen and proposals:
            engine = open_engine(folder, settings)
        answer = engine.ask(f"w.{len(proposals)}")
        if answer.exhausted:
            break
        proposal = answer.proposal
        proposals.append(proposal)
        status = "failed" if len(proposals) in failing else "finished" if proposal.epochs is None else "rung"
        value = None if status == "failed" else compute_score(proposal.overrides)
        engine.tell(TrialRecord(proposal.trial, proposal.overrides, status, score=value, rung=proposal.epochs))
    return proposals, engine


@pytest.fixture
def fake_child(monkeypatch):
    """Trials run by tests/unit/study/search/fake_child.py instead of a training."""
    monkeypatch.setattr("dlfer.study.search.trials.COMMAND", (sys.executable, str(FAKE_CHILD)))
