"""Worker slots: where members train side by side, each with a GPU or a share of the processors of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class WorkerSlot:
    """Room for one process.

    Attributes:
        name: for a person: "GPU 1", "worker 2"; "" where there is one slot only.
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


def make_slots(num_workers: int | None, gpu_ids: Sequence[str]) -> list[WorkerSlot]:
    """Return the worker slots of this machine.

    A single slot is left as it is, and may use every device. Of several, each gets one GPU, in turn; slots that share a GPU
    take its memory as they need it, and slots without a GPU share the processors.

    Args:
        num_workers: how many members train at a time; None: one for each GPU, one on a machine without.
        gpu_ids: as of `list_gpu_ids`.
    """
    count = num_workers or max(1, len(gpu_ids))
    if count == 1:
        return [WorkerSlot("", {})]
    if not gpu_ids:
        threads = str(max(1, (os.cpu_count() or 1) // count))
        names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
        shared = {name: os.environ.get(name, threads) for name in names}
        return [WorkerSlot(f"worker {number + 1}", shared) for number in range(count)]
    slots = []
    for number in range(count):
        gpu = gpu_ids[number % len(gpu_ids)]
        environment = {"CUDA_VISIBLE_DEVICES": gpu}
        if count > len(gpu_ids):
            environment |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        slots.append(WorkerSlot(f"GPU {gpu}", environment))
    return slots
