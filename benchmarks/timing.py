"""Timing for all benchmarks: variants of the same task are measured in turns, in one process.

Machines are shared and noisy, so the result is the ratio of two variants within a round, with its median and quartiles
over the rounds, and not a number of seconds. Start-up and peak memory are measured in separate processes, also in
turns.
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
    """The times of one variant in each round.

    Attributes:
        seconds: wall time, float64 [rounds].
        cpu_seconds: CPU time over all threads of this process, float64 [rounds]; None if it was not measured.
    """

    seconds: np.ndarray
    cpu_seconds: np.ndarray | None = None

    @property
    def median(self) -> float:
        """The median wall time in seconds."""
        return float(np.median(self.seconds))

    @property
    def median_cpu(self) -> float:
        """The median CPU time in seconds."""
        return float(np.median(self.cpu_seconds))

    def compute_ratio(self, other: Timing) -> tuple[float, float, float]:
        """Return the ratio of the time of `other` to this one over the rounds: median, lower and upper quartile."""
        low, middle, high = np.quantile(other.seconds / self.seconds, [0.25, 0.5, 0.75])
        return float(middle), float(low), float(high)


def time_by_turns(ways: Mapping[str, Callable[[], object]], *, rounds: int = 7, warm_up: int = 1) -> dict[str, Timing]:
    """Call the variants in turns, A B A B ..., and time every call.

    Args:
        ways: the variants by name; each must complete its work before it returns.
        rounds: number of timed rounds.
        warm_up: number of preceding rounds that are not timed.
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
    """The result of a process that has ended.

    Attributes:
        seconds: wall time from its start to its end.
        cpu_seconds: CPU time over all its threads.
        megabytes: its peak resident memory; never less than the memory of this process, from which it was started.
        output: its stdout.
    """

    seconds: float
    cpu_seconds: float
    megabytes: float
    output: str


def run_process(
    command: Sequence[object], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Finished:
    """Run a command, and return its output and its cost; needs Linux, where the peak memory is given in kilobytes.

    Args:
        command: program and arguments.
        environment: variables that are added to the environment of this process.
        folder: working directory; None: that of this process.

    Raises:
        RuntimeError: the command failed; the message has the end of its stderr.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=variables, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        # Without this, Popen would assume that the process still runs, since os.wait4 was called directly.
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: ended with {process.returncode}. {errors.read()[-2000:]}")
        return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output.read())


def describe_machine(*packages: str) -> dict:
    """Return a description of this machine: processor, load, versions of the installed `packages`, and the commit."""
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
    """Add the options that most benchmarks have: --rounds and --json."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"that are timed (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def tell_row(row: Mapping[str, object], rows: list) -> None:
    """Print a row of results, and append it to `rows`."""
    rows.append(dict(row))
    print(json.dumps(row), flush=True)


def write_figures(path: Path | None, rows: Sequence[Mapping[str, object]], *packages: str) -> None:
    """Write the rows with a description of the machine to a JSON file, unless the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Results are published, so the paths of local files are removed.
        command = [Path(word).name if word.startswith("/") else word for word in sys.argv]
        figures = {"command": command, "machine": describe_machine(*packages), "rows": rows}
        path.write_text(json.dumps(figures, indent=2) + "\n")


def describe_ratio(fast: Timing, slow: Timing) -> dict[str, object]:
    """Return the ratio of the time of `slow` to that of `fast`, with quartiles over rounds, for a row of results."""
    ratio, low, high = fast.compute_ratio(slow)
    return {"ratio": round(ratio, 3), "quartiles": [round(low, 3), round(high, 3)]}


def _find_processor() -> str:
    """Return the name of the processor, on Linux from /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _find_versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        # Not all packages are installed: TensorFlow's name, for example, depends on GPU support.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
