"""What each worker's trials see of the machine."""

from __future__ import annotations

import os

from dlfer.search.worker import list_gpus, make_environments


def test_each_worker_has_a_gpu_of_its_own():
    assert make_environments(2, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_workers_that_share_a_gpu_do_not_take_all_of_its_memory():
    shared = make_environments(3, ["0", "1"])
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in shared] == ["0", "1", "0"]
    assert all(variables["TF_FORCE_GPU_ALLOW_GROWTH"] == "true" for variables in shared)


def test_without_a_gpu_the_cores_are_shared(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert make_environments(1, []) == [{}]
    assert [variables["OMP_NUM_THREADS"] for variables in make_environments(2, [])] == ["4", "4"]


def test_what_the_user_hid_stays_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert list_gpus() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list_gpus() == []
