"""Queries of the machine and of a container's limits, and settings of the memory allocator, without TensorFlow."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T", int, float)

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class CgroupLimits:
    """The limits of the control groups that this process is in.

    Attributes:
        version: 1 or 2; None if the system has no control groups.
        memory_bytes: the smallest memory limit; None if there is none.
        cpus: the smallest quota of processor time, in processors, e.g. 1.5; None if there is none.
    """

    version: int | None
    memory_bytes: int | None
    cpus: float | None


def read_cgroup_limits(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> CgroupLimits:
    """Return the limits of this process's control groups and of all groups above them.

    Args:
        root: where the control groups are mounted.
        own: the file that names the groups of this process.
    """
    if (root / "cgroup.controllers").is_file():
        groups = list(_list_groups(root, own, ""))
        memory = [_read_number(group / "memory.max") for group in groups]
        cpus = [_read_quota_v2(group / "cpu.max") for group in groups]
        return CgroupLimits(2, _find_smallest(memory), _find_smallest(cpus))
    memory = [_read_number(group / "memory.limit_in_bytes") for group in _list_groups(root / "memory", own, "memory")]
    # Version 1 writes "no limit" as the largest number of bytes in whole pages that a 64-bit counter can hold.
    memory = [size for size in memory if size is not None and size < 2**60]
    cpus = [_read_quota_v1(group) for group in _list_groups(root / "cpu", own, "cpu")]
    version = 1 if (root / "memory").is_dir() or (root / "cpu").is_dir() else None
    return CgroupLimits(version, _find_smallest(memory), _find_smallest(cpus))


def _list_groups(mount: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the mount point and the path of each group from there to this process's own; not all need be visible."""
    yield mount
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = mount
            for step in Path(path.lstrip("/")).parts:
                group = group / step
                yield group


def _read_quota_v2(file: Path) -> float | None:
    """Return the number of processors that cpu.max allows: its quota (or "max") over its period, in microseconds."""
    return _read(file, lambda text: int(text.split()[0]) / int(text.split()[1]))


def _read_quota_v1(group: Path) -> float | None:
    quota, period = _read_number(group / "cpu.cfs_quota_us"), _read_number(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _read_number(file: Path) -> int | None:
    return _read(file, int)


def _read(file: Path, parse: Callable[[str], _T]) -> _T | None:
    """Return the parsed contents of a file; None if it is absent or contains "max"."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return None


def _find_smallest(values: Iterable[_T | None]) -> _T | None:
    return min((value for value in values if value is not None), default=None)


def get_memory_bytes() -> int | None:
    """Return the smaller of the machine's memory and the limit of the control groups, in bytes; None if unknown."""
    found = [read_cgroup_limits().memory_bytes]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return _find_smallest(found)


def describe_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a description of the processor, the number of cores that this process may use, and the load average."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine() or "an unknown processor"
    cores = count_cores()
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name[:200]}, {cores} core{'s' * (cores > 1)}{load}"


def count_cores() -> int:
    """Return the number of processors that this process may use, by its affinity and its control groups' quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_cgroup_limits().cpus
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Make glibc keep memory that is freed inside the block, and return it to the system at the end of the block.

    By default, glibc returns the memory of feature maps as soon as it is freed, and the kernel has to clear new pages
    for the next operation: up to a third of a training step on a CPU (benchmarks/cpu_settings.py). Nothing changes with
    another C library, or if MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_ or GLIBC_TUNABLES is set in the environment.
    """
    libc = None if _ALLOCATOR_VARIABLES & os.environ.keys() else _find_glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        # The values that glibc's dynamic adjustment reaches in a process that has freed large blocks.
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Make glibc return freed blocks of 1 MiB or more to the system, where it keeps those of images by default."""
    libc = _find_glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
        libc.mallopt(_M_ARENA_MAX, 2)


def _find_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, with its allocator functions; None for another library or system."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
"""Parameter numbers of mallopt, from malloc.h."""

_ALLOCATOR_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}
