"""Places for members, and how they learn which GPUs there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dlfer.study.workers import describe_exit, list_gpu_ids, make_places, stop_children
from dlfer.train.control import StopControl


def test_one_place_may_use_every_device():
    assert [place.environment for place in make_places(None, [])] == [{}]
    assert [place.environment for place in make_places(1, ["0", "1"])] == [{}]


def test_one_worker_for_each_gpu_is_the_default():
    assert [place.environment for place in make_places(None, ["0", "3"])] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]


def test_more_workers_than_gpus_share_their_memory():
    places = make_places(3, ["0", "1"])
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "0"]
    assert all(place.environment["TF_FORCE_GPU_ALLOW_GROWTH"] == "true" for place in places)


def test_workers_without_gpus_share_the_processors(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [place.environment["OMP_NUM_THREADS"] for place in make_places(3, [])] == ["2", "2", "2"]


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


def test_a_process_that_heeds_the_wish_is_not_killed():
    code = (
        "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    stop_children([process])
    assert process.returncode == 143


def test_a_process_that_does_not_heed_it_is_killed(monkeypatch):
    monkeypatch.setattr("dlfer.study.workers.STOP_SECONDS", 0.1)
    code = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    stop_children([process])
    assert process.returncode == -9
    assert describe_exit(process.returncode) == "its process was ended by SIGKILL; was memory short?"


def test_a_child_stops_when_its_parent_is_gone():
    assert StopControl(parent=os.getppid()).get_reason() is None
    assert StopControl(parent=os.getppid() + 1).get_reason() == "the end of its parent process"
