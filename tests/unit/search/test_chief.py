"""Addresses, and what a chief's answer may not do."""

from __future__ import annotations

import socket

import pytest

from dlfer.errors import UserError
from dlfer.search.chief import is_loopback, name_for_workers
from dlfer.search.remote import _read_name


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
