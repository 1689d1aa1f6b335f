"""Milliseconds an image of a model and of its exports, one image at a time and 32 at a time.

    python benchmarks/export_speed.py MODEL EXPORTS        EXPORTS is what dlfer export wrote, e.g. exports/lite2

Each way of answering is timed in turn over several rounds, and the fastest round counts, since other programs only
ever slow it down. Wall time tells what this machine gives now; CPU time, over all threads, what an image costs, also
where other programs share the cores. Runtimes use as many threads as they choose by themselves (LiteRT: one).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlfer.apply.export_folder import EXPORT_FILE, read_export
from dlfer.apply.export_runtime import open_export
from dlfer.model.artifact import load_artifact

BATCHES = (1, 32)


def measure(answer: Callable[[np.ndarray], np.ndarray], images: np.ndarray, *, seconds: float) -> np.ndarray:
    """Return the milliseconds an image, wall and CPU: the mean over `seconds`, a first call not counted."""
    answer(images)
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < seconds or not calls:
        answer(images)
        calls += 1
    return 1000 * np.array([passed, time.process_time() - cpu]) / (calls * len(images))


def get_megabytes(folder: Path, file: str) -> float:
    """Return the size of the model file, or of all files of its folder."""
    path = folder / file
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    return sum(found.stat().st_size for found in files) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("exports", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    classifier = load_artifact(given.model)
    folders = sorted(path.parent for path in given.exports.glob(f"*/{EXPORT_FILE}"))
    records = {folder.name: read_export(folder) for folder in folders}
    sizes = [record["input"]["shape"][1:3] for record in records.values() if record["input"]["shape"][1]]
    height, width = sizes[0] if sizes else (48, 48)
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), height, width, classifier.channels), np.uint8)
    ways = {"keras, predict": classifier.predict, **{folder.name: open_export(folder) for folder in folders}}
    best = {name: {batch: np.full(2, np.inf) for batch in BATCHES} for name in ways}
    for _ in range(given.rounds):
        for name, answer in ways.items():
            for batch in BATCHES:
                spent = measure(answer, images[:batch], seconds=given.seconds)
                best[name][batch] = np.minimum(best[name][batch], spent)
    for name, of_batch in best.items():
        row = {"way": name}
        for batch, (wall, cpu) in of_batch.items():
            row |= {f"ms_at_{batch}": round(float(wall), 2), f"cpu_ms_at_{batch}": round(float(cpu), 2)}
        if name in records:
            row["megabytes"] = round(get_megabytes(given.exports / name, records[name]["file"]), 2)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
