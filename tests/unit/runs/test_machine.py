"""The limits of control groups, versions 1 and 2, as files of /sys/fs/cgroup say them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlfer.runs import machine
from dlfer.runs.machine import CgroupLimits, read_cgroup_limits


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "fs"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Version 2: in a container the own group is the root of what is visible.
        ({"fs/memory.max": "max\n", "fs/cpu.max": "max 100000\n"}, CgroupLimits(2, None, None)),
        ({"fs/memory.max": "3000000000\n", "fs/cpu.max": "150000 100000\n"}, CgroupLimits(2, 3 * 10**9, 1.5)),
        ({"own": "0::/\n", "fs/memory.max": "1000\n"}, CgroupLimits(2, 1000, None)),
        # Outside of one, a limit of any group above counts.
        (
            {
                "own": "0::/a.slice/b\n",
                "fs/a.slice/memory.max": "1000\n",
                "fs/a.slice/b/memory.max": "2000\n",
                "fs/a.slice/b/cpu.max": "50000 100000\n",
            },
            CgroupLimits(2, 1000, 0.5),
        ),
        ({"own": "0::/gone\n", "fs/cpu.max": "nonsense\n"}, CgroupLimits(2, None, None)),
        ({"fs/cpu.max": "100 0\n", "fs/memory.max": ""}, CgroupLimits(2, None, None)),
    ],
)
def test_version_2(tmp_path, files, expected):
    root = lay(tmp_path, {"fs/cgroup.controllers": "cpu memory\n", **files})
    assert read_cgroup_limits(root, tmp_path / "own") == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"fs/memory/memory.limit_in_bytes": "9223372036854771712\n"}, CgroupLimits(1, None, None)),
        (
            {
                "fs/memory/memory.limit_in_bytes": "3000000000\n",
                "fs/cpu/cpu.cfs_quota_us": "200000\n",
                "fs/cpu/cpu.cfs_period_us": "100000\n",
            },
            CgroupLimits(1, 3 * 10**9, 2.0),
        ),
        (
            {"fs/cpu/cpu.cfs_quota_us": "-1\n", "fs/cpu/cpu.cfs_period_us": "100000\n"},
            CgroupLimits(1, None, None),
        ),
        (
            {
                "own": "9:name=systemd:/\n4:memory:/docker/c\n1:cpu,cpuacct:/docker/c\n0::/\n",
                "fs/memory/docker/c/memory.limit_in_bytes": "1000\n",
                "fs/cpu/docker/c/cpu.cfs_quota_us": "5000\n",
                "fs/cpu/docker/c/cpu.cfs_period_us": "10000\n",
            },
            CgroupLimits(1, 1000, 0.5),
        ),
    ],
)
def test_version_1(tmp_path, files, expected):
    assert read_cgroup_limits(lay(tmp_path, files), tmp_path / "own") == expected


def test_no_control_groups(tmp_path):
    assert read_cgroup_limits(tmp_path / "fs", tmp_path / "own") == CgroupLimits(None, None, None)


def test_memory_is_the_smaller_of_machine_and_limit(monkeypatch):
    monkeypatch.setattr(machine, "read_cgroup_limits", lambda: CgroupLimits(2, 1000, None))
    assert machine.get_memory_bytes() == 1000
    monkeypatch.setattr(machine, "read_cgroup_limits", lambda: CgroupLimits(2, 2**62, None))
    assert machine.get_memory_bytes() < 2**62
