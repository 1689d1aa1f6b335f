"""The lock files: every package pinned with hashes, in agreement with the lists that they are made from."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("lock", ROOT / "deploy" / "lock.py")
lock = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lock)
INPUTS = lock.list_inputs()


def read_versions(text: str) -> set[tuple[str, str]]:
    """Return (package, version) of pinned requirements, names as PyPI normalises them, markers and extras left out."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", text, flags=re.MULTILINE)
    return {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found}


def test_each_list_has_a_lock_file_and_no_other_is_there():
    assert {path.stem for path in (ROOT / "locks").iterdir()} == set(INPUTS)
    assert {"cpu", "gpu", "dev", "predict", "jax", "litert", "tools"} <= set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_every_package_is_pinned_with_a_hash(name):
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+(\[[^]]*\])?==\S+( ; [^\n]+)? \\\n    --hash=sha256:[0-9a-f]{64}", entry), (
            entry[:80]
        )
    # No index, host or folder of whoever made it.
    assert not re.search(r"://|--index|--find-links|-e |file:|@ ", text)


@pytest.mark.parametrize("name", INPUTS)
def test_it_has_what_its_list_pins(name):
    locked = read_versions((ROOT / "locks" / f"{name}.txt").read_text())
    assert read_versions(INPUTS[name]) <= locked


@pytest.mark.parametrize("name", INPUTS)
def test_lock_files_agree_with_each_other(name):
    """Several are installed into one environment."""
    pins: dict[str, set[str]] = {}
    for package, version in read_versions((ROOT / "locks" / "dev.txt").read_text()):
        pins.setdefault(package, set()).add(version)
    for package, version in read_versions((ROOT / "locks" / f"{name}.txt").read_text()):
        assert version in pins.get(package, {version}), package


def test_no_lock_file_installs_two_builds_of_tensorflow():
    for name in INPUTS:
        pins = lock.read_pins(ROOT / "locks" / f"{name}.txt")
        builds = [pin for pin in pins if re.match(r"tensorflow(-cpu)?==", pin)]
        assert len(builds) <= 1 or {pin.partition(" ; ")[2] for pin in builds} == {
            "sys_platform == 'darwin'",
            "sys_platform != 'darwin'",
        }
