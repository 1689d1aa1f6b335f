"""Worker slots, and how they learn which GPUs there are."""

from __future__ import annotations

import os

import pytest

from dlfer.study.child import list_gpu_ids, make_slots
from dlfer.train.progress import StopControl


def test_one_slot_may_use_every_device():
    assert [slot.environment for slot in make_slots(None, [])] == [{}]
    assert [slot.environment for slot in make_slots(1, ["0", "1"])] == [{}]


def test_one_worker_for_each_gpu_is_the_default():
    assert [slot.environment for slot in make_slots(None, ["0", "3"])] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]


def test_more_workers_than_gpus_share_their_memory():
    slots = make_slots(3, ["0", "1"])
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0"]
    assert all(slot.environment["TF_FORCE_GPU_ALLOW_GROWTH"] == "true" for slot in slots)


def test_workers_without_gpus_share_the_processors(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot.environment["OMP_NUM_THREADS"] for slot in make_slots(3, [])] == ["2", "2", "2"]


@pytest.mark.parametrize(("given", "expected"), [("", []), ("-1", []), ("2, 5", ["2", "5"])])
def test_visible_devices_are_heeded(monkeypatch, given, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert list_gpu_ids() == expected


def test_gpus_are_asked_of_the_driver(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpu_ids() == ["0", "1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert list_gpu_ids() == []
    tool.unlink()
    assert list_gpu_ids() == []


def test_a_child_stops_when_its_parent_is_gone():
    assert StopControl(parent=os.getppid()).get_reason() is None
    assert StopControl(parent=os.getppid() + 1).get_reason() == "the end of its parent process"
