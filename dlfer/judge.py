"""How a trained classifier is judged: predictions on each part, twins counted, figures with intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dlfer.config.schema import DataConfig, ExperimentConfig
from dlfer.data.audit import find_twins
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.labels import map_targets
from dlfer.data.sources import load_data
from dlfer.data.split import draw_subset
from dlfer.errors import DlferError, ModelError, UserError
from dlfer.evaluate.predictions import Predictions, write_predictions
from dlfer.evaluate.scores import compute_metrics_file
from dlfer.model.artifact import TransferClassifier, load_artifact, match_channels
from dlfer.model.predict import predict_split
from dlfer.runs import open_run, write_atomically


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
    config: ExperimentConfig, classifier: TransferClassifier, bundle: DataBundle, folder: Path
) -> dict[str, Predictions]:
    """Predict validation, test and a draw of train, and write each into `folder`; return them by name."""
    parts = {"validation": bundle.validation, "test": bundle.test}
    num_train = config.evaluate.num_train
    if num_train != 0 and isinstance(bundle.train, Split):
        is_small = num_train is None or num_train >= len(bundle.train)
        parts["train"] = bundle.train if is_small else draw_subset(bundle.train, num_train, seed=0)
    predictions = {}
    for name, split in parts.items():
        if split is None:
            continue
        probabilities, targets, ids = predict_split(classifier.network, split, batch_size=config.evaluate.batch_size)
        predictions[name] = Predictions(ids, classifier.labels, targets, probabilities)
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(predictions[name], folder / f"{name}.npz")
    return predictions


def compute_run_metrics(
    config: ExperimentConfig, bundle: DataBundle, predictions: dict[str, Predictions], *, smoke: bool = False
) -> dict:
    """Return metrics.json of a run; test images with a twin in train are counted and left out once."""
    twins = without = None
    if bundle.test is not None and isinstance(bundle.train, Split):
        exact, near = find_twins(bundle.test.images, bundle.train.images)
        from_source = find_copies(bundle.test.ids, bundle.train.ids)
        exact, near = exact | from_source, near | from_source
        twins = {"exact": int(exact.sum()), "near_or_mirrored": int(near.sum())}
        without = bundle.test.ids[~near].tolist()
    return compute_metrics_file(
        predictions,
        protocol=bundle.protocol,
        banner=compute_banner(bundle, twins, smoke=smoke),
        selected_on=bundle.selected_on,
        twins=twins,
        without_twins_ids=without,
        bootstrap=config.evaluate.bootstrap,
    )


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


def find_copies(ids: np.ndarray, reference_ids: np.ndarray) -> np.ndarray:
    """Return bool [N]: whether an image's source ("<source>#<copy>") also stands in the reference."""
    sources = {str(name).partition("#")[0] for name in reference_ids}
    return np.array([str(name).partition("#")[0] in sources for name in ids], dtype=bool)


def evaluate_model(
    name: str,
    *,
    csv: Path | None = None,
    usage: str | None = None,
    data: Path | None = None,
    json_out: Path | None = None,
) -> dict:
    """Judge a trained model on data that it has not been trained on, and return a metrics file.

    Args:
        name: a run, an artifact folder, or a shipped model's name.
        csv, usage: a FER2013 csv and the Usage to judge on (default PrivateTest, else all rows without one).
        data: a class folder, or an .npz of arrays; its test part is used, else validation, else all of it.
        json_out: where to write the figures, too.

    Returns:
        The dict of metrics.json; "test" holds the figures.

    Raises:
        UserError: model or data is not found or does not fit.
    """
    if (csv is None) == (data is None):
        raise UserError("evaluate: give either --csv FILE [--usage NAME] or --data FOLDER|FILE.npz to judge on.")
    classifier = load_artifact(name)
    split, labels = _load_csv(csv, usage) if csv is not None else _load_other(data, classifier)
    split = map_targets(split, labels, classifier.labels)
    images = match_channels(split.images, classifier.channels)
    predictions = Predictions(split.ids, classifier.labels, split.targets, classifier.predict(images))
    metrics = _score_against_training(name, split, predictions)
    metrics |= {"judged_on": {"split": split.name, "file": str(csv or data)}}
    if json_out is not None:
        write_atomically(Path(json_out), json.dumps(metrics, indent=2) + "\n")
    return metrics


def _score_against_training(name: str, split: Split, predictions: Predictions) -> dict:
    """Return the metrics file; twins are counted where `name` is a run whose training data is still there."""
    run, twins, without, banner, selected_on = None, None, None, None, "not known"
    try:
        run = open_run(name)
        metrics = run.read_json("metrics.json")
        banner, selected_on = metrics["banner"], metrics["selected_on"]
        stage = run.config().finetune
        train = load_data(stage.data, image_size=stage.image_size, balance=stage.balance).train
    except (DlferError, OSError):
        train = None
    if isinstance(train, Split):
        exact, near = find_twins(split.images, train.images)
        twins = {"exact": int(exact.sum()), "near_or_mirrored": int(near.sum())}
        without = split.ids[~near].tolist()
    return compute_metrics_file(
        {"test": predictions},
        protocol="official" if run is None else run.config().finetune.data.protocol,
        banner=banner,
        selected_on=selected_on,
        twins=twins,
        without_twins_ids=without,
    )


def _load_csv(csv: Path, usage: str | None) -> tuple[Split, tuple[str, ...]]:
    from dlfer.config.names import FER2013_LABELS

    return load_fer2013_usage(Path(csv), usage), FER2013_LABELS


def _load_other(path: Path, classifier: TransferClassifier) -> tuple[Split, tuple[str, ...]]:
    """Load a class folder or an .npz; aliases of label names are matched to those of the classifier."""
    path = Path(path)
    source = "arrays" if path.suffix == ".npz" else "folder"
    config = DataConfig.model_validate({"source": source, "path": str(path)})
    bundle = load_data(config, image_size=classifier.image_size)
    for part in (bundle.test, bundle.validation, bundle.train):
        if part is not None:
            return part, bundle.labels
    raise ModelError(f"{path}: no images found.")


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
