"""The one way in which benchmarks here take time: ways of doing the same thing, by turns, in one process.

Machines are shared and noisy: what counts is the ratio of two ways within a round, its median over the rounds and
its spread, and never a number of seconds by itself. What needs a process of its own (start-up, peak memory) is one,
by turns as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Timing:
    """What one way took, a value for each round.

    Attributes:
        seconds: float64 [rounds], of wall time.
        cpu_seconds: float64 [rounds], over all threads of this process; None where it was not taken.
    """

    seconds: np.ndarray
    cpu_seconds: np.ndarray | None = None

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds."""
        return float(np.median(self.seconds))

    @property
    def median_cpu(self) -> float:
        """The median of the rounds, in seconds of CPU time."""
        return float(np.median(self.cpu_seconds))

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
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            way()
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {name: Timing(*np.array(values).T) for name, values in seconds.items()}


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of CPU time over all its threads.
        megabytes: the most that it held resident at a time; not below what this process holds, which starts it.
        output: what it wrote to stdout.
    """

    seconds: float
    cpu_seconds: float
    megabytes: float
    output: str


def run_process(
    command: Sequence[object], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Finished:
    """Run a command to its end; on Linux, where peaks are counted in kilobytes.

    Args:
        command: program and arguments.
        environment: what is added to that of this process.
        folder: that it is started in; None: that of this process.

    Raises:
        RuntimeError: it failed; the message is the end of what it wrote to stderr.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=variables, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        # Popen has not waited itself, and would say that the process still runs.
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: ended with {process.returncode}. {errors.read()[-2000:]}")
        return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output.read())


def describe_machine(*packages: str) -> dict:
    """Return where a benchmark was taken: processor, load, versions of those `packages` that there are, commit."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "processor": _find_processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **_find_versions(packages),
        "commit": git.stdout.strip() or None,
    }


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"that are timed (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def tell_row(row: Mapping[str, object], rows: list) -> None:
    """Print a row of figures as soon as it is known, and keep it in `rows`."""
    rows.append(dict(row))
    print(json.dumps(row), flush=True)


def write_figures(path: Path | None, rows: Sequence[Mapping[str, object]], *packages: str) -> None:
    """Write the rows with the machine they were taken on, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Where files stand is nobody else's business.
        command = [Path(word).name if word.startswith("/") else word for word in sys.argv]
        figures = {"command": command, "machine": describe_machine(*packages), "rows": rows}
        path.write_text(json.dumps(figures, indent=2) + "\n")


def describe_ratio(fast: Timing, slow: Timing) -> dict[str, object]:
    """Return how many times as long `slow` took, with the quartiles over the rounds, for a row of figures."""
    ratio, low, high = fast.compute_ratio(slow)
    return {"ratio": round(ratio, 3), "quartiles": [round(low, 3), round(high, 3)]}


def _find_processor() -> str:
    """Return the processor's name, which Linux tells in a file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _find_versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        # TensorFlow has another name where it computes on GPUs.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
