"""What the doctor says of a machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dlfer.cli import doctor
from dlfer.runs.machine import CgroupLimits


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "missing"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "missing")]
)
def test_python(version, status):
    assert doctor.examine_python(version).status == status


def test_packages_absent_other_and_as_pinned(monkeypatch):
    installed = {"numpy": "2.0", "tensorflow-cpu": "2.21.0"}
    monkeypatch.setattr(doctor, "_get_version", installed.get)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    findings = list(doctor.examine_packages({"numpy": "1.0", "keras": "3.15.1", "tensorflow": "2.21.0"}))
    assert [(finding.status, finding.text) for finding in findings] == [
        ("missing", "not installed: keras"),
        ("note", "other versions: numpy 2.0 (pinned 1.0)"),
    ]
    assert [f.text for f in doctor.examine_packages({"numpy": "2.0", "tensorflow": "2.21.0"})] == ["2 as pinned"]
    del installed["tensorflow-cpu"]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert [f.status for f in doctor.examine_packages({"tensorflow": "2.21.0"})] == ["ok"]


def test_pins_follow_markers(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text(
        "# a list\ntensorflow==2.21.0\nnumpy==2.4.6\nxgboost==3.2; python_version < '3'\nrich>=1  # any\n-r other.txt\n"
    )
    monkeypatch.setattr("dlfer.runs.run.find_checkout", lambda: tmp_path)
    assert doctor.list_pins() == {"numpy": "2.4.6", "rich": "", "tensorflow": "2.21.0"}


def test_disk_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**9}))
    assert doctor.examine_disk(tmp_path).status == "note"
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    assert doctor.examine_disk(tmp_path).status == "missing"
    for size, status in ((2e9, "note"), (16e9, "ok"), (None, "note")):
        monkeypatch.setattr(doctor, "get_memory_bytes", lambda size=size: size)
        assert doctor.examine_memory().status == status


def test_the_pins_of_an_installed_dlfer_are_those_of_its_metadata(monkeypatch):
    lines = ["numpy==2.4.6", "tensorflow-cpu==2.21.0", "openvino==1 ; extra == 'openvino'"]
    monkeypatch.setattr("dlfer.runs.run.find_checkout", lambda: None)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    assert doctor.list_pins() == {"numpy": "2.4.6", "tensorflow": "2.21.0"}


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "status", "text"),
    [
        (0, "No broken requirements found.\n", "", "ok", "no broken"),
        (1, "a 1 requires b, which is not installed.\n", "", "note", "a 1 requires b, which is not installed."),
        (1, "".join(f"a{number} requires b.\n" for number in range(9)), "", "note", "a2 requires b.; and 6 more"),
        (1, "", "/bin/python: No module named pip", "note", "pip is not installed"),
        (2, "", "Traceback\nValueError: metadata", "note", "ValueError: metadata"),
    ],
)
def test_pip_check(monkeypatch, code, stdout, stderr, status, text):
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
    finding = doctor.check_dependencies()
    assert (finding.status, text in finding.text) == (status, True)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (CgroupLimits(None, None, None), "this system has no control groups"),
        (CgroupLimits(2, None, None), "no memory limit, no CPU limit (cgroup v2)"),
        (CgroupLimits(1, 3 * 10**9, 1.5), "3.0 GB of memory, 1.5 CPUs (cgroup v1)"),
    ],
)
def test_container(monkeypatch, limits, text):
    monkeypatch.setattr(doctor, "read_cgroup_limits", lambda: limits)
    assert doctor.examine_container().text == text


def test_memory_of_this_machine_is_plausible():
    assert 2**26 < doctor.get_memory_bytes() < 2**50


def test_data(tmp_path, monkeypatch):
    monkeypatch.setenv("DLFER_DATA", str(tmp_path / "data"))
    assert doctor.examine_data().status == "note"
    (tmp_path / "data" / "fer2013").mkdir(parents=True)
    assert doctor.examine_data().text.endswith("data: fer2013")


def answer(monkeypatch, stdout="", stderr="", code=0):
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: True)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    return list(doctor.examine_backend())


def test_backend_answers(monkeypatch):
    values = {"backend": "tensorflow", "version": "2.21.0", "keras": "3.15.1", "gpus": ["H200"]}
    assert [(f.status, f.text) for f in answer(monkeypatch, "talk\n" + json.dumps(values))] == [
        ("ok", "tensorflow 2.21.0, keras 3.15.1"),
        ("ok", "H200"),
    ]
    gpu = answer(monkeypatch, json.dumps({**values, "gpus": []}))[1]
    assert gpu.status == "note"
    assert "tensorflow[and-cuda]" in gpu.mend


def test_backend_that_does_not_load(monkeypatch):
    (finding,) = answer(monkeypatch, stderr="Traceback\nModuleNotFoundError: No module named 'keras'", code=1)
    assert finding.status == "missing"
    assert finding.text.endswith("No module named 'keras'")
    assert "-> pip install tensorflow-cpu" in str(finding)
    assert answer(monkeypatch, stdout="no json")[0].status == "missing"
    monkeypatch.setenv("KERAS_BACKEND", "theano")
    assert "KERAS_BACKEND is 'theano'" in next(doctor.examine_backend()).text


def test_no_driver_no_complaint():
    assert doctor.examine_gpus([], has_driver=False, backend="jax").mend == ""


def test_the_backend_comes_from_the_environment_then_the_file(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert doctor.get_backend() == "tensorflow"
    Path(tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert doctor.get_backend() == "jax"
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert doctor.get_backend() == "torch"
