"""How a trained classifier is judged: predictions on each part, twins counted, figures with intervals."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint
from dlfer.data.split import draw_subset
from dlfer.data.twins import find_copies, find_twins
from dlfer.errors import ModelError
from dlfer.evaluate.predictions import Known, Predictions, write_predictions
from dlfer.evaluate.scores import compute_metrics_file
from dlfer.model.classifier import Classifier, read_artifact_record
from dlfer.model.predict import predict_split
from dlfer.runs.run import LOG_FILE, Run


def describe_data(bundle: DataBundle) -> dict:
    """Return data.json of a run: labels, splits with their counts and fingerprints, and what was done to them."""
    splits = {name: getattr(bundle, name) for name in ("train", "validation", "test")}
    return {
        "source": bundle.source,
        "labels": list(bundle.labels),
        "protocol": bundle.protocol,
        "selected_on": bundle.selected_on,
        "splits": {name: _describe_split(split, bundle.labels) for name, split in splits.items() if split is not None},
        "twins": bundle.twins,
        "notes": list(bundle.notes),
    }


def predict_parts(
    config: ExperimentConfig, classifier: Classifier, bundle: DataBundle, folder: Path, *, known: Known | None = None
) -> dict[str, Predictions]:
    """Predict validation, test and a draw of train, and write each into `folder`; return them by name.

    What is `known` already, from the members of an ensemble, is not predicted again.
    """
    parts = {"validation": bundle.validation, "test": bundle.test}
    num_train = config.evaluate.num_train
    if num_train != 0 and isinstance(bundle.train, Split):
        is_small = num_train is None or num_train >= len(bundle.train)
        parts["train"] = bundle.train if is_small else draw_subset(bundle.train, num_train, seed=0)
    batch_size = config.evaluate.batch_size
    predict = partial(classifier.predict, batch_size=batch_size)
    predictions = {}
    for name, split in parts.items():
        if split is None:
            continue
        answers = None if known is None or name == "train" else known(name, "single")
        if answers is None:
            probabilities, targets, ids = predict_split(predict, split, batch_size=batch_size)
            answers = Predictions(ids, classifier.labels, targets, probabilities)
        predictions[name] = answers
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(predictions[name], folder / f"{name}.npz")
    return predictions


def compute_run_metrics(
    config: ExperimentConfig,
    bundle: DataBundle,
    predictions: dict[str, Predictions],
    *,
    smoke: bool = False,
    test_opened: int = 0,
) -> dict:
    """Return metrics.json of a run; test images with a twin in train are counted and left out once."""
    twins = without = None
    if bundle.test is not None and isinstance(bundle.train, Split):
        twins, without = count_twins(bundle.test, bundle.train, same_source=True)
    return compute_metrics_file(
        predictions,
        protocol=bundle.protocol,
        banner=compute_banner(bundle, twins, smoke=smoke),
        selected_on=bundle.selected_on,
        twins=twins,
        without_twins_ids=without,
        target_accuracy=config.evaluate.target_accuracy,
        test_opened=test_opened,
    )


def count_twins(split: Split, train: Split, *, same_source: bool) -> tuple[dict, list[str]]:
    """Return how many images have a twin in train, and the ids of those without.

    Args:
        split: the images to judge on.
        train: those that the network was trained on.
        same_source: the ids of both name the same images, so that those made from one image count as exact.

    Returns:
        {"exact", "near_or_mirrored"} (exact ones included), ids.
    """
    exact, near = find_twins(split.images, train.images)
    if same_source:
        from_source = find_copies(split.ids, train.ids)
        exact, near = exact | from_source, near | from_source
    return {"exact": int(exact.sum()), "near_or_mirrored": int(near.sum())}, split.ids[~near].tolist()


def compute_banner(bundle: DataBundle, twins: dict | None, *, smoke: bool = False) -> str | None:
    """Return the warning that every output of a run carries, or None."""
    if smoke:
        return "Smoke run: two batches of at most eight images a stage. The figures mean nothing."
    if bundle.protocol != "paper" or bundle.test is None or twins is None:
        return None
    return (
        f"Published protocol, not a clean test: {twins['near_or_mirrored']:,} of {len(bundle.test):,} test images have a "
        f"twin in training ({twins['exact']:,} exact copies or copies of one source). "
        "Compare with the rows without a twin, or with protocol official."
    )


def log_opening(run: Run, split: Split, *, milestone: int | None = None) -> int:
    """Record that a part was opened to judge the run's model, and return how often a test part was by now.

    The run's metrics.json, if it is there, says the number from then on.

    Args:
        milestone: the epoch whose weights are judged, where it is not the model that the run ends with.
    """
    sha256 = read_artifact_record(run.path / "model")["sha256"]
    which = {"model": next(iter(sha256.values()))} if milestone is None else {"milestone": milestone}
    run.log("test_opened", split=split.name, n=len(split), **which)
    opened = count_openings(run)
    with contextlib.suppress(ModelError):
        run.write_json("metrics.json", {**run.read_json("metrics.json"), "test_opened": opened})
    return opened


def count_openings(run: Run) -> int:
    """Return how often the run's model was judged on images other than those it was trained and selected on."""
    splits = run.read_json("data.json")["splits"]
    seen = {splits[part]["name"] for part in ("train", "validation") if part in splits}
    events = []
    for line in (run.path / LOG_FILE).read_text(encoding="utf-8").splitlines():
        # A process that was killed while it wrote may have left half a line.
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return sum(event["event"] == "test_opened" and event["split"] not in seen for event in events)


def _describe_split(split, labels: tuple[str, ...]) -> dict:
    described = {"name": split.name, "n": len(split)}
    if isinstance(split, Split):
        counts = np.bincount(split.targets, minlength=len(labels))
        described |= {
            "shape": list(split.images.shape[1:]),
            "per_class": dict(zip(labels, counts.tolist(), strict=True)),
            "fingerprint": compute_fingerprint(split),
        }
    return described


def sort_errors(predictions: Predictions, limit: int) -> np.ndarray:
    """Return int [<=limit], rows of wrong predictions, the most confident first."""
    wrong = np.flatnonzero(predictions.predicted != predictions.targets)
    confidence = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:limit]
