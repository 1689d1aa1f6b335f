"""A worker and a chief that does not answer."""

from __future__ import annotations

import socket
import threading

import pytest

from dlfer.errors import DlferError, TrainingStopped
from dlfer.study.search import remote
from dlfer.study.search.engine import Answer, Proposal, TrialRecord
from dlfer.study.search.wire import write_answer
from dlfer.train.control import StopControl


@pytest.fixture
def nowhere():
    """An address at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def test_a_worker_says_once_that_no_chief_answers_and_heeds_a_stop(monkeypatch, nowhere):
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.1)
    control, said = StopControl(), []
    source = remote.RemoteSource(nowhere, control, said.append)
    timer = threading.Timer(0.5, control.request, args=("Ctrl-C",))
    timer.start()
    with pytest.raises(TrainingStopped, match=r"Stopped by Ctrl-C while waiting for the chief"):
        source.describe()
    assert len(said) == 1
    assert said[0].startswith(f"{nowhere}: no chief answers there.")
    assert "10 minutes" in said[0]


def test_a_worker_gives_up_a_chief_that_stays_away(monkeypatch, nowhere):
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.1)
    source = remote.RemoteSource(nowhere, StopControl(), lambda text: None)
    with pytest.raises(DlferError, match=r"has not answered for .*--role chief --resume RUN"):
        source._call(source.stub.GetSpace, source.messages.GetSpaceRequest(), patience=0.3)


def test_a_worker_says_what_it_runs_and_how_it_ended(monkeypatch, nowhere):
    said = []
    source = remote.RemoteSource(nowhere, StopControl(), said.append)
    answer = source.messages.CreateTrialResponse(trial=write_answer(Answer(Proposal("7", {"model.dropout": 0.5}))))
    monkeypatch.setattr(source, "_call", lambda method, request, **given: answer)
    source.ask("w.0")
    source.tell(TrialRecord("7", {"model.dropout": 0.5}, "finished", score=0.25, epochs=2))
    source.ask("w.1")
    source.tell(TrialRecord("7", {"model.dropout": 0.5}, "failed", error="not finite\nat all", epochs=1))
    assert said[:2] == ["begins: dropout 0.5", "finished after 2 epochs: dropout 0.5: score 0.2500"]
    assert said[3] == "failed after 1 epochs: dropout 0.5: not finite"
