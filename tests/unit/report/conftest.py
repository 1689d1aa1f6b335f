"""Run directories with made-up figures, as a finished run leaves them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.metrics.scores import compute_group_scores, compute_metrics_file
from dlfer.metrics.several import compute_view_scores
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.metrics_record import Corruptions, Estimate, Metrics
from dlfer.runs.records import ArtifactRecord, DataRecord, DuplicateCounts, DuplicatesRecord, RunRecord
from dlfer.runs.run_records import TransferRecord

CONFIG = """
experiment: {name: faces}
finetune: {data: {source: fer2013, path: f.csv}}
expected: {test_accuracy: [0.1, 0.9]}
"""
LABELS = ("Angry", "Happy", "Sad")
SPLITS = {"train": "Training", "validation": "PublicTest", "test": "PrivateTest"}
DUPLICATES = {
    "test": DuplicatesRecord(
        split="test",
        n=60,
        in_train=DuplicateCounts(exact=4, augmented=0, any=6),
        in_selection=DuplicateCounts(exact=1, augmented=0, any=2),
        in_either=DuplicateCounts(exact=5, augmented=0, any=7),
    ),
    "validation": DuplicatesRecord(
        split="validation",
        n=60,
        in_train=DuplicateCounts(exact=3, augmented=0, any=5),
        in_selection=None,
        in_either=DuplicateCounts(exact=3, augmented=0, any=5),
    ),
}
RUN = {
    "status": "finished",
    "kind": "run",
    "experiment": "faces",
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


def make_run(
    path: Path,
    *,
    parts=("train", "validation", "test"),
    banner=None,
    seed=0,
    gain=1.0,
    is_selected=True,
    **changes,
) -> Path:
    """Write a finished run with EF-FER1 and every file that a report reads, but images."""
    path.mkdir(parents=True)
    predictions = {part: make_predictions(part, seed=seed, gain=gain) for part in parts}
    for part, some in predictions.items():
        write_predictions(some, path / "predictions" / f"{part}.npz")
    duplicates = DUPLICATES["test" if "test" in parts else "validation"]
    metrics = compute_metrics_file(
        predictions,
        Metrics(
            protocol="official",
            banner=banner,
            selected_on="PublicTest",
            is_selected=is_selected,
            duplicates=duplicates,
            test_opened=0,
        ),
        without_duplicates_ids=predictions[duplicates.split].ids[duplicates.in_either.any :].tolist(),
    )
    splits = {
        part: {"name": SPLITS[part], "n": 60, "per_class": dict.fromkeys(LABELS, 20)}
        for part in SPLITS
        if part in parts
    }
    records = [
        RunRecord.build(RUN | changes),
        metrics,
        DataRecord.build(
            {
                "source": "fer2013",
                "labels": LABELS,
                "protocol": "official",
                "selected_on": "PublicTest",
                "splits": splits,
                "notes": ["3 rows were skipped & counted."],
            }
        ),
        AuditRecord.build(
            {
                "num_images": 180,
                "distinct_images": 170,
                "duplicate_groups": 8,
                "conflicting_groups": 2,
                "labels": LABELS,
                "splits": {SPLITS[part]: {"num_images": 60} for part in SPLITS},
                "constant_images": 1,
                "leaks": {"Training->PrivateTest": {"exact": 4, "augmented": 0, "any": 6}},
            }
        ),
        TransferRecord(
            loaded=["stem/kernel", "stem/bias"],
            newly_initialised=["head/kernel"],
            feature_difference=2.5e-7,
            source="pretrain",
        ),
    ]
    for record in records:
        record.write(path)
    (path / "config.yaml").write_text(CONFIG)
    (path / "log.jsonl").write_text('{"event": "finetune_end", "kept_epoch": 2}\n{"event": "test_opened"}\n{"cut')
    write_history(path / "pretrain" / "history.csv")
    write_history(path / "finetune" / "history.csv")
    return path


def make_extras() -> dict:
    """Views, groups and corruptions of the test split of `make_run`, as fields of `Metrics`."""
    plain, viewed = make_predictions("test"), make_predictions("test", gain=2.0)
    values = {str(name): ("young", "old")[row % 2] for row, name in enumerate(plain.ids[:50])}
    levels = [{"strength": s, "parameter": 2 * s, "accuracy": make_estimate(0.6 - s / 10)} for s in (1, 2, 3)]
    groups = compute_group_scores(plain, {"age": values}, file="ages.csv")
    return {
        "views": {"mirror": {"test": compute_view_scores(viewed, plain, view="mirror")}},
        "headline": "mirror",
        "groups": groups.model_copy(update={"part": "test"}),
        "corruptions": Corruptions.build(
            {
                "clean": make_estimate(0.6),
                "corruptions": {"noise": levels, "low_resolution": levels[:2]},
                "meanings": {"noise": "standard deviation"},
                "n": 60,
                "seed": 0,
                "part": "test",
            }
        ),
    }


def make_estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.05, high=value + 0.05)


def write_model(run: Path, **changes) -> Path:
    """Write what a card reads of a model: its record, not its weights."""
    (run / "model").mkdir()
    values = {
        "format": 1,
        "family": "transfer",
        "labels": LABELS,
        "model": {"backbone": "efficientnet_lite2"},
        "input": {"channels": 1, "image_size": 48},
        "sha256": {},
    }
    ArtifactRecord.build(values | changes).write(run / "model")
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
