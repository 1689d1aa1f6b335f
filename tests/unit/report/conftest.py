"""Run directories with made-up figures, as a finished run leaves them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dlfer.metrics.attributes import compute_group_scores
from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.metrics.views import compute_view_scores

LABELS = ("Angry", "Happy", "Sad")
SPLITS = {"train": "Training", "validation": "PublicTest", "test": "PrivateTest"}
DUPLICATES = {
    "test": {
        "split": "test",
        "n": 60,
        "in_train": {"exact": 4, "augmented": 0, "any": 6},
        "in_selection": {"exact": 1, "augmented": 0, "any": 2},
        "in_either": {"exact": 5, "augmented": 0, "any": 7},
    },
    "validation": {
        "split": "validation",
        "n": 60,
        "in_train": {"exact": 3, "augmented": 0, "any": 5},
        "in_selection": None,
        "in_either": {"exact": 3, "augmented": 0, "any": 5},
    },
}
RUN = {
    "status": "finished",
    "kind": "run",
    "argv": ["run", "experiments/my file.yaml", "--set", "model.dropout=0.1"],
    "started": "2026-01-02T03:04:05Z",
    "finished": "2026-01-02T04:05:06Z",
    "error": None,
    "device": {"kind": "cpu", "name": "CPU:0", "jit": False, "backend": "tensorflow"},
    "seed": 7,
    "config_digest": "abc123",
    "git": {"commit": "0123abcd", "dirty": True},
    "dlfer": "0.1.0",
    "python": "3.11.9",
    "platform": "Linux",
    "packages": {"keras": "3.15.0"},
    "warnings": [],
    "cost": {
        "finetune_seconds": 100.0,
        "finetune_images": 5000,
        "finetune_image_size": 48,
        "pretrain_seconds": 200.0,
        "pretrain_images": 40000,
        "pretrain_image_size": 64,
        "pretrain_was_cached": True,
    },
}


def make_predictions(part: str, n: int = 60, *, gain: float = 1.0, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    targets = np.arange(n) % 3
    logits = generator.normal(size=(n, 3))
    logits[np.arange(n), targets] += gain
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions([f"{SPLITS[part]}/{i}" for i in range(n)], LABELS, targets, probabilities)


def write_history(path: Path, epochs: int = 3) -> None:
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "phase", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"])
        for epoch in range(1, epochs + 1):
            writer.writerow([epoch, "all", 2 / epoch, 0.2 * epoch, 2.2 / epoch, 0.15 * epoch])


def make_run(path: Path, *, parts=("train", "validation", "test"), banner=None, seed=0, gain=1.0, **changes) -> Path:
    """Write a finished run with EF-FER1 and every file that a report reads, but images."""
    path.mkdir(parents=True)
    predictions = {part: make_predictions(part, seed=seed, gain=gain) for part in parts}
    for part, some in predictions.items():
        write_predictions(some, path / "predictions" / f"{part}.npz")
    duplicates = DUPLICATES["test" if "test" in parts else "validation"]
    metrics = compute_metrics_file(
        predictions,
        protocol="official",
        banner=banner,
        selected_on="PublicTest",
        duplicates=duplicates,
        without_duplicates_ids=predictions[duplicates["split"]].ids[duplicates["in_either"]["any"] :].tolist(),
    )
    splits = {
        part: {"name": SPLITS[part], "n": 60, "per_class": dict.fromkeys(LABELS, 20)}
        for part in SPLITS
        if part in parts
    }
    data = {"source": "fer2013", "labels": LABELS, "protocol": "official", "selected_on": "PublicTest"}
    audit = {"num_images": 180, "distinct_images": 170, "duplicate_groups": 8, "conflicting_groups": 2}
    audit |= {"labels": LABELS, "splits": {SPLITS[part]: {"num_images": 60} for part in SPLITS}}
    files = {
        "run.json": RUN | changes,
        "metrics.json": metrics,
        "data.json": data | {"splits": splits, "notes": ["3 rows were skipped & counted."]},
        "audit.json": audit
        | {"constant_images": 1, "leaks": {"Training->PrivateTest": {"exact": 4, "augmented": 0, "any": 6}}},
        "transfer.json": {
            "carried": ["stem/kernel", "stem/bias"],
            "fresh": ["head/kernel"],
            "missing": [],
            "unexpected": [],
            "feature_difference": 2.5e-7,
            "source": "pretrain",
        },
    }
    for name, values in files.items():
        (path / name).write_text(json.dumps(values))
    (path / "config.yaml").write_text("experiment:\n  name: faces\nexpected:\n  test_accuracy: [0.1, 0.9]\n")
    (path / "log.jsonl").write_text('{"event": "finetune_end", "kept_epoch": 2}\n{"event": "test_opened"}\n{"cut')
    write_history(path / "pretrain" / "history.csv")
    write_history(path / "finetune" / "history.csv")
    return path


def make_extras() -> dict:
    """Views, groups and corruptions of the test part of `make_run`, as metrics.json holds them."""
    plain, viewed = make_predictions("test"), make_predictions("test", gain=2.0)
    values = {str(name): ("young", "old")[row % 2] for row, name in enumerate(plain.ids[:50])}
    levels = [{"strength": s, "parameter": 2 * s, "accuracy": make_figure(0.6 - s / 10)} for s in (1, 2, 3)]
    return {
        "views": {"mirror": {"test": compute_view_scores(viewed, plain, view="mirror")}},
        "headline": "mirror",
        "groups": compute_group_scores(plain, {"age": values}, file="ages.csv") | {"part": "test"},
        "corruptions": {
            "clean": make_figure(0.6),
            "corruptions": {"noise": levels, "low_resolution": levels[:2]},
            "meanings": {"noise": "standard deviation"},
            "n": 60,
            "seed": 0,
            "part": "test",
        },
    }


def make_figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def write_model(run: Path, **changes) -> Path:
    """Write what a card reads of a model: its record, not its weights."""
    (run / "model").mkdir()
    record = {"format": 1, "family": "transfer", "labels": LABELS, "input": {"channels": 1, "image_size": 48}}
    (run / "model" / "artifact.json").write_text(json.dumps(record | changes))
    return run


@pytest.fixture
def model_writer():
    return write_model


@pytest.fixture
def extras():
    return make_extras()


@pytest.fixture
def run_maker():
    return make_run


@pytest.fixture
def predictions_maker():
    return make_predictions
