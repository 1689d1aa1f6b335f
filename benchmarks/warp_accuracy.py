"""Effect on accuracy of warping faces at 48 pixels and resizing them afterwards, instead of one interpolation.

    DLFER_DATA=... python benchmarks/warp_accuracy.py                  # two seeds, about 20 minutes on two idle cores
    python benchmarks/warp_accuracy.py --seeds 0 --set finetune.epochs=1 --set finetune.data.num_images.train=640

For each seed the same training (experiments/lite2.yaml, half of Training, 5 epochs) is run in both ways, evaluated on
PublicTest, and compared image by image:

    once    as in dlfer: each pixel of the network's input is sampled from the 48 x 48 face, with one interpolation
    twice   the face is warped at 48 x 48, and the result is resized: two interpolations, the second of blurred pixels

Existing runs are not repeated, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from timing import tell_row, write_figures

from dlfer.metrics.paired import compare_paired, compare_seeds, describe_difference
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.runs.find import open_run

EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "lite2.yaml"
SETTINGS = ("finetune.data.num_images.train=14354", "finetune.epochs=5", "evaluate.num_train=1000")
WAYS = ("once", "twice")


def main() -> None:
    """Train the missing runs, and compare the two ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds (default: 0 1)")
    parser.add_argument("--set", action="append", default=[], help="a key of the experiment, as for dlfer run")
    parser.add_argument("--runs", type=Path, default=Path("saved_models/runs/warp_accuracy"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        way, *command = given.train
        train_here(way, command)
        return
    pairs = [tuple(train(way, seed, given) for way in WAYS) for seed in given.seeds]
    results = {str(seed): compare_paired(*pair, names=WAYS) for seed, pair in zip(given.seeds, pairs, strict=True)}
    if len(pairs) > 1:
        results["all"] = compare_seeds(pairs, names=WAYS)
    rows: list[dict] = []
    for seed, result in results.items():
        tell_row({"seed": seed, **result.as_json(), "sentence": describe_difference(result)}, rows)
    write_figures(given.json, rows)


def train(way: str, seed: int, given: argparse.Namespace) -> Predictions:
    """Return one training's predictions on PublicTest; run or resume it in a child process if it has not finished."""
    folder = given.runs / f"{way}-{seed}"
    begun = sorted(folder.glob("lite2/*"))
    if not begun or open_run(begun[-1]).status != "finished":
        settings = [f"experiment.seed={seed}", *SETTINGS, *given.set]
        fresh = [str(EXPERIMENT), "--out", str(folder)] + [word for text in settings for word in ("--set", text)]
        words = ["--resume", str(begun[-1])] if begun else fresh
        subprocess.run([sys.executable, __file__, "--train", way, "run", *words], check=True)
        begun = sorted(folder.glob("lite2/*"))
    return read_predictions(begun[-1] / "predictions" / "validation.npz")


def train_here(way: str, command: list[str]) -> None:
    """Run a dlfer command in this process, with the warp replaced if `way` is "twice"."""
    from dlfer import cli
    from dlfer.model import face_input

    warp, traced = face_input.warp_images, []

    def warp_then_resize(images, warps, image_size: int, *, fill: str):
        traced.append(image_size)
        return face_input.resize_images(warp(images, warps, int(images.shape[1]), fill=fill), image_size)

    if way == "twice":
        face_input.warp_images = warp_then_resize
    cli.app(command, prog_name="dlfer", standalone_mode=False)
    if way == "twice" and not traced:
        raise SystemExit("The other warp was never used: the two ways are the same.")


if __name__ == "__main__":
    main()
