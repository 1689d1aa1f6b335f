"""Addresses, and what a chief's answer may not do."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from dlfer.errors import UserError
from dlfer.study.search.chief import Desk, is_loopback, name_for_workers
from dlfer.study.search.engine import Answer, Proposal, TrialRecord
from dlfer.study.search.remote import _read_name


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("localhost:8765", True),
        ("[::1]:8765", True),
        ("0.0.0.0:8765", False),
        ("10.0.0.3:8765", False),
        ("gpu-host:8765", False),
    ],
)
def test_what_other_machines_reach_is_known(address, expected):
    assert is_loopback(address) is expected


def test_workers_are_told_an_address_that_they_can_reach():
    assert name_for_workers("0.0.0.0:8765") == f"{socket.gethostname()}:8765"
    assert name_for_workers("[::]:1") == f"{socket.gethostname()}:1"
    assert name_for_workers("node1:8765") == "node1:8765"


def test_names_from_the_network_cannot_lead_out_of_the_folder_of_runs():
    good = {"experiment": "experiment:\n  name: far\n", "name": "20261121T000000Z-abc-search"}
    assert _read_name(good) == "far"
    for wrong in ({**good, "name": "../../x"}, {**good, "experiment": "experiment:\n  name: ../x\n"}):
        with pytest.raises(UserError, match="not that of a search"):
            _read_name(wrong)


class OneTrial:
    """A board with a single trial, which waits again when its worker is lost."""

    def __init__(self):
        self.waiting, self.bug = [Proposal("0", {"model.dropout": 0.2})], None

    def ask(self, worker):
        return Answer(self.waiting.pop()) if self.waiting else Answer(exhausted=True)

    def release(self, trial):
        self.waiting.append(Proposal(trial, {"model.dropout": 0.2}))

    def adopt(self, trial, worker):
        return False

    def tell(self, record):
        self.told = record

    def list_records(self):
        return [TrialRecord("0", {"model.dropout": 0.2}, "running")]


def test_a_worker_without_a_trial_stays_to_take_over_that_of_one_which_is_lost():
    said = []
    search = SimpleNamespace(
        config=SimpleNamespace(search=SimpleNamespace(lost_after_seconds=60.0)),
        view=SimpleNamespace(say=said.append),
        control=SimpleNamespace(get_reason=lambda: None),
    )
    desk = Desk(search, None, OneTrial())
    assert desk.ask("one.0").proposal.trial == "0"
    assert desk.ask("two.0") == Answer()
    desk.leases["0"].heard -= 61
    desk._release_silent()
    assert said == ["dropout 0.2: the worker one.0 is silent; the trial goes to another."]
    assert desk.ask("two.0").proposal.trial == "0"
    assert desk.hear("0", "one.0") is False
    desk.tell(TrialRecord("0", {}, "finished", score=1.0, worker="two.0"))
    assert desk.ask("two.1").exhausted
