"""The limits of control groups, versions 1 and 2, as files of /sys/fs/cgroup say them; and what glibc keeps of freed memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
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


COUNT_FAULTS = """
import contextlib, json, resource
from dlfer.runs.machine import keep_freed_memory

def count(block):
    with block:
        b"x" * 40_000_000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            b"x" * 40_000_000
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def read_resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

plain, rest = count(contextlib.nullcontext()), read_resident()
print(json.dumps({"plain": plain, "kept": count(keep_freed_memory()), "grown": read_resident() - rest}))
"""


def count_faults(**variables: str) -> dict[str, float]:
    """Return the page faults of ten blocks of 40 MB one after another, each 9,766 pages, and what stays resident after it."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


@glibc_only
def test_freed_memory_is_kept_inside_the_block_and_returned_at_its_end():
    found = count_faults()
    assert found["plain"] > 50_000
    assert found["kept"] < 5_000
    assert found["grown"] < 10


@glibc_only
def test_what_the_environment_says_of_the_allocator_stands():
    assert count_faults(MALLOC_MMAP_MAX_="65536")["kept"] > 50_000
