"""Effect of two settings on the speed of training on a CPU: freed memory is kept, and TensorFlow uses oneDNN.

    python benchmarks/cpu_settings.py                                         # the table of results/
    python benchmarks/cpu_settings.py resnet_nano:32:16 --steps 4 --rounds 1   # NAME:SIZE:BATCH

Freed memory: between operations, TensorFlow frees feature maps of several megabytes. glibc returns them to the system,
which must clear new pages for the next operation, with a page fault per 4 KB; `dlfer.runs.machine.keep_freed_memory`
prevents this. oneDNN: without the variable TF_ENABLE_ONEDNN_OPTS, which `import dlfer` sets, TensorFlow uses oneDNN
only on processors with AVX512-VNNI or later instructions. `train_stage` trains a stage with augmentation, metrics and
callbacks, in a process of its own; dlfer's settings, and each setting left out, take turns. The first epoch is not
counted. It needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import Timing, add_options, describe_ratio, run_process, tell_row, write_figures

CASES = ("efficientnet_lite2:64:64", "efficientnet_b3:64:64", "mobilenet:72:64", "resnet18:40:128")
AS_DLFER, RETURNS, NO_ONEDNN = "dlfer", "returns_memory", "without_onednn"
WAYS = (AS_DLFER, RETURNS, NO_ONEDNN)


def train(case: str, steps: int, *, keeps: bool) -> dict[str, float]:
    """Train two epochs in this process; return wall time, system time and page faults per step of the second."""
    import keras
    from step_overhead import LABELS, STAGE, make_bundle

    from dlfer.config.schema import ExperimentSection, StageConfig
    from dlfer.config.sections import ModelConfig
    from dlfer.model.stage_network import build_transfer_network
    from dlfer.train import stage
    from dlfer.train.cluster import choose_device
    from dlfer.train.progress import StopControl, TrainingListener
    from dlfer.train.state import StageJob

    class Watcher(TrainingListener):
        """A listener that records the time and the resource counters at the end of each step."""

        def __init__(self) -> None:
            self.seen: list[tuple[float, float, int]] = []

        def finish_step(self, step: int, loss: float, accuracy: float) -> None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            self.seen.append((time.perf_counter(), used.ru_stime, used.ru_minflt))

    if not keeps:
        stage.keep_freed_memory = contextlib.nullcontext
    name, size, batch = case.split(":")[0], *map(int, case.split(":")[1:])
    config = StageConfig.model_validate({**STAGE, "epochs": 2, "image_size": size, "batch_size": batch})
    keras.utils.set_random_seed(0)
    network = build_transfer_network(ModelConfig(backbone=name), num_labels=len(LABELS), image_size=size, channels=1)
    watcher = Watcher()
    device = choose_device(ExperimentSection(name="cpu_settings", device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        job = StageJob("finetune", config, Path(folder), 0, device, 60.0, StopControl(), watcher)
        stage.train_stage(job, network, make_bundle(steps * batch, batch))
    # The first step of an epoch is excluded, since it also waits for the input pipeline to start.
    seconds, system, faults = (np.array(watcher.seen[-1]) - np.array(watcher.seen[steps])) / (steps - 1)
    return {"seconds": seconds, "system_seconds": system, "page_faults": faults}


def measure(case: str, steps: int, rounds: int) -> dict:
    """Return the results for a case NAME:SIZE:BATCH."""
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, rows in found.items():
            command = [sys.executable, __file__, case, "--steps", steps, "--worker", way]
            onednn = str(int(way != NO_ONEDNN))
            done = run_process(command, environment={"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": onednn})
            rows.append({**json.loads(done.output.splitlines()[-1]), "peak_megabytes": done.megabytes})
    seconds = {way: Timing(np.array([row["seconds"] for row in rows])) for way, rows in found.items()}
    medians = {
        f"{name}_{way}": round(float(np.median([row[name] for row in rows])), 3)
        for name in ("seconds", "system_seconds", "page_faults", "peak_megabytes")
        for way, rows in found.items()
    }
    return {
        "case": case,
        **{way: describe_ratio(seconds[AS_DLFER], seconds[way]) for way in (RETURNS, NO_ONEDNN)},
        **medians,
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="NAME:SIZE:BATCH")
    parser.add_argument("--steps", type=int, default=12, help="of an epoch, at least 2 (default: 12)")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    add_options(parser, rounds=3)
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"--steps {given.steps}: expected at least 2, since the first of each epoch is left out.")
    if given.worker:
        print(json.dumps(train(given.cases[0], given.steps, keeps=given.worker != RETURNS)))
        return
    rows: list[dict] = []
    for case in given.cases:
        tell_row(measure(case, given.steps, given.rounds), rows)
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy")


if __name__ == "__main__":
    main()
