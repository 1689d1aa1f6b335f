"""Memory of a training on FER2013, from reading the csv to the last epoch: its peak, and whether it grows.

    python benchmarks/training_memory.py                     # 35,887 random rows at 224 pixels, four epochs
    python benchmarks/training_memory.py --rows 4000 --image-size 96

`dlfer run` is a separate process on a csv of random pixels; its resident memory is read from /proc twice a second, so
this needs Linux. The network is small (resnet_nano, 224 pixels), so that the memory of the data is visible, and an
epoch takes a minute. For comparison, the result has the size of the same images as float32 224 x 224 x 3, as in
published code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from startup_speed import DLFER, write_csv
from timing import add_options, tell_row, write_figures

EXPERIMENT = """
experiment: {{name: memory}}
model: {{backbone: resnet_nano}}
finetune:
  data: {{source: fer2013, path: {csv}}}
  image_size: {size}
  batch_size: 64
  epochs: {epochs}
  augment: {{rotation: 15, zoom: 0.1, shift: 0.1, mirror: 0.5}}
"""


def watch(command: list[str], *, environment: dict[str, str]) -> list[tuple[float, int, float]]:
    """Run a command; return its (seconds, completed epochs, resident megabytes), sampled twice a second.

    Raises:
        RuntimeError: the command failed; the message has the end of its output.
    """
    out = Path(command[command.index("--out") + 1])
    seen, start = [], time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **environment})
        while process.poll() is None:
            history = next(out.rglob("history.csv"), None)
            epochs = 0 if history is None else max(0, len(history.read_text().splitlines()) - 1)
            seen.append((time.perf_counter() - start, epochs, read_resident(process.pid)))
            time.sleep(0.5)
        told.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: ended with {process.returncode}. {told.read()[-2000:]}")
    return seen


def read_resident(pid: int) -> float:
    """Return the resident memory of a process in megabytes; 0 if it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except FileNotFoundError:
        return 0.0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if fields else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=35_887)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=4)
    add_options(parser, rounds=1)
    given = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_csv(folder / "fer2013.csv", given.rows)
        text = EXPERIMENT.format(csv=folder / "fer2013.csv", size=given.image_size, epochs=given.epochs)
        (folder / "memory.yaml").write_text(text)
        for number in range(given.rounds):
            out = folder / f"runs{number}"
            command = [*DLFER, "run", str(folder / "memory.yaml"), "--out", str(out), "--no-cache"]
            seen = watch(command, environment={"DLFER_CACHE": str(folder / f"cache{number}")})
            peaks = [max(mb for _, done, mb in seen if done == epoch) for epoch in range(given.epochs)]
            row = {
                "images": given.rows,
                "image_size": given.image_size,
                "megabytes_of_images": round(given.rows * 48 * 48 / 1e6),
                "megabytes_as_float32_at_size": round(given.rows * given.image_size**2 * 3 * 4 / 1e6),
                "peak_megabytes": round(max(mb for _, _, mb in seen)),
                "median_megabytes": round(float(np.median([mb for _, _, mb in seen]))),
                "peak_of_each_epoch": [round(peak) for peak in peaks],
                "seconds": round(seen[-1][0]),
            }
            tell_row(row, rows)
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy")


if __name__ == "__main__":
    main()
