"""Places where members can train side by side: processes, each with a GPU of its own where there are several."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STDERR = 2
STOP_SECONDS = 120.0
"""A process that was asked to stop and does not come to a checkpoint in so long is killed; its last one stands."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where one process runs.

    Attributes:
        name: for a person: "GPU 1", "worker 2"; "" where there is one place only.
        environment: variables that its process gets.
    """

    name: str
    environment: dict[str, str]


def list_gpu_ids() -> list[str]:
    """Return the ids that CUDA_VISIBLE_DEVICES takes: those it has, else those of nvidia-smi; no framework is loaded."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def make_places(num_workers: int | None, gpu_ids: Sequence[str]) -> list[Place]:
    """Return as many places as workers are wanted; None: one for each GPU, one on a machine without.

    One place alone is left as it is, and may use every device. Of several, each gets one GPU, in turn;
    places that share a GPU take its memory as they need it, and places without one share the processors.
    """
    count = num_workers or max(1, len(gpu_ids))
    if count == 1:
        return [Place("", {})]
    if not gpu_ids:
        threads = str(max(1, (os.cpu_count() or 1) // count))
        names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
        shared = {name: os.environ.get(name, threads) for name in names}
        return [Place(f"worker {number + 1}", shared) for number in range(count)]
    places = []
    for number in range(count):
        gpu = gpu_ids[number % len(gpu_ids)]
        environment = {"CUDA_VISIBLE_DEVICES": gpu}
        if count > len(gpu_ids):
            environment |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        places.append(Place(f"GPU {gpu}", environment))
    return places


def start_child(run: Path, place: Place, *, hint: str, require_gpu: bool, log: Path | None) -> subprocess.Popen:
    """Start the process that executes a run.

    Args:
        run: its directory.
        place: where it runs.
        hint: the command that goes on after a stop.
        require_gpu: refuse to run without a GPU.
        log: file that its talk is added to; None: this process' stderr.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "dlfer.study.child", str(run), "--parent", str(os.getpid()), "--hint", hint]
    talk = _STDERR if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        return subprocess.Popen(
            [*command, *(["--require-gpu"] if require_gpu else [])],
            stdin=subprocess.DEVNULL,
            # Results go to stdout, and those are the sweep's alone.
            stdout=talk,
            stderr=talk,
            # Ctrl-C reaches the sweep alone, which then asks its members to stop.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, **place.environment},
        )
    finally:
        if log is not None:
            os.close(talk)


def stop_children(processes: Sequence[subprocess.Popen]) -> None:
    """Ask processes to stop at a checkpoint, and wait until they have; a second Ctrl-C kills them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def describe_exit(code: int) -> str:
    """Say how a process ended that has not said so itself."""
    if code >= 0:
        return f"its process ended with exit code {code} and no word"
    name = signal.Signals(-code).name
    short = "; was memory short?" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{short}"
