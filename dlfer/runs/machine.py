"""What the machine has that a process can see without a framework."""

from __future__ import annotations

import os
from pathlib import Path


def get_memory_bytes() -> int | None:
    """Return the smaller of the machine's memory and the limit of the control group, in bytes; None: not known."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found) if found else None
