"""The one way in which benchmarks here take time: ways of doing the same thing, by turns, in one process.

Machines are shared and noisy: what counts is the ratio of two ways within a round, its median over the rounds and
its spread, and never a number of seconds by itself.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds that one way took, a value for each round.

    Attributes:
        seconds: float64 [rounds].
    """

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds."""
        return float(np.median(self.seconds))

    def compute_ratio(self, other: Timing) -> tuple[float, float, float]:
        """Return how many times as long `other` took, round by round: median, lower and upper quartile."""
        low, middle, high = np.quantile(other.seconds / self.seconds, [0.25, 0.5, 0.75])
        return float(middle), float(low), float(high)


def time_by_turns(ways: Mapping[str, Callable[[], object]], *, rounds: int = 7, warm_up: int = 1) -> dict[str, Timing]:
    """Call each way in turn, A B A B ..., and time every call.

    Args:
        ways: what is compared, by name; each does its work before it returns.
        rounds: that are timed.
        warm_up: rounds before them that are not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(np.array(values)) for name, values in seconds.items()}


def describe_machine(*packages: str) -> dict:
    """Return where a benchmark was taken: cores, load, versions of `packages`, commit."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "commit": git.stdout.strip() or None,
    }
