"""Predictions on each split, duplicates of its images in the data used to make the model, and the metrics of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit, compute_fingerprint
from dlfer.data.duplicates import Duplicates, find_duplicates
from dlfer.data.split import draw_subset
from dlfer.experiment.lineage import History
from dlfer.metrics.predictions import Known, Predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.model.predict import predict_split
from dlfer.runs.metrics_record import SUBJECTS_BANNER, Metrics
from dlfer.runs.records import DataRecord, DuplicatesRecord, SplitRecord, Temperature

if TYPE_CHECKING:
    from dlfer.model.classifier import Classifier


@dataclass(frozen=True)
class EvaluationDuplicates:
    """The duplicates of the N images that a model is evaluated on; every output of a run takes its counts from here.

    Attributes:
        split: "test", or "validation" if the run has no test split and is evaluated on the split that selected it.
        ids: str [N].
        in_train: duplicates in the split that trained the model.
        in_selection: duplicates in the split that selected it; None if this is the evaluated split, or is absent.
        in_pretrain: duplicates in the images that trained EF-FER1 or the run that its weights are from (for a test
            split also those that selected it), for an ensemble those of any member. None without such images.
    """

    split: str
    ids: np.ndarray
    in_train: Duplicates
    in_selection: Duplicates | None = None
    in_pretrain: Duplicates | None = None

    @property
    def in_either(self) -> Duplicates:
        """Duplicates in training, selection or EF-FER1's data, which are excluded from metrics "without duplicates"."""
        found = self.in_train
        for others in (self.in_selection, self.in_pretrain):
            found = found if others is None else found | others
        return found

    def count_leaks(self) -> int:
        """Return the number of images with a duplicate in EF-FER1's data and none in the training split."""
        return 0 if self.in_pretrain is None else int((self.in_pretrain.any & ~self.in_train.any).sum())

    def describe_leak(self) -> str | None:
        """Return a warning about images with a duplicate in EF-FER1's data and none in training; None without any."""
        num_leaks = self.count_leaks()
        if not num_leaks:
            return None
        return (
            f"Leak: {num_leaks:,} of {len(self.ids):,} {self.split} images have a duplicate in the data of EF-FER1 and none in "
            "training, so that EF-FER1 has seen them. The accuracy may be too high. Report the one without duplicates, or remove "
            "these images from the data of EF-FER1 (pretrain.data, or that of the run in pretrain.weights)."
        )

    def list_ids_without_duplicates(self) -> list[str]:
        """Return the ids of the images without any duplicate in training, selection or EF-FER1's data."""
        return self.ids[~self.in_either.any].tolist()

    def as_record(self) -> DuplicatesRecord:
        """Return the counts in the form of data.json and metrics.json.

        `in_train.any` is the number of images that "have a duplicate in training" in the reports.
        """
        return DuplicatesRecord.build(
            {
                "split": self.split,
                "n": len(self.ids),
                "in_train": self.in_train.count(),
                "in_selection": None if self.in_selection is None else self.in_selection.count(),
                "in_pretrain": None if self.in_pretrain is None else self.in_pretrain.count(),
                "in_either": self.in_either.count(),
            }
        )


def find_run_duplicates(
    bundle: DataBundle, history: History | None = None, data: DataConfig | None = None
) -> EvaluationDuplicates | None:
    """Return the duplicates of the split that a run is evaluated on; None if its images or those of train are streamed.

    Args:
        history: the images that the run learns from besides the bundle; those of EF-FER1 are compared unless streamed.
        data: the data section of the bundle; None: unknown, so ids are not comparable with those of other data.
    """
    if bundle.test is not None:
        name, judged, selection = "test", bundle.test, bundle.validation
    else:
        name, judged, selection = "validation", bundle.validation, None
    if not isinstance(judged, Split) or not isinstance(bundle.train, Split):
        return None
    found = find_judged_duplicates(name, judged, train=bundle.train, selection=selection)
    if history is None:
        return found
    return replace(found, in_pretrain=history.find_in_pretraining(judged, data, with_selection=name == "test"))


def find_judged_duplicates(
    name: str, judged: Split, *, train: Split, selection: object = None, same_ids: bool = True
) -> EvaluationDuplicates:
    """Return which images of a split have a duplicate among those that trained or selected a model.

    Args:
        name: "test" or "validation", the role of the split in metrics.json.
        judged, train: the evaluated split, and the one that trained the model.
        selection: the split that selected it; None if this is the evaluated one or absent. It is ignored if streamed.
        same_ids: whether an id means the same image in all splits, so augmented copies are found by their ids.
    """

    def find(reference: Split) -> Duplicates:
        ids = {"ids": judged.ids, "reference_ids": reference.ids} if same_ids else {}
        return find_duplicates(judged.images, reference.images, **ids)

    in_selection = find(selection) if isinstance(selection, Split) else None
    return EvaluationDuplicates(name, judged.ids, find(train), in_selection)


def describe_data(bundle: DataBundle, duplicates: EvaluationDuplicates | None) -> DataRecord:
    """Return the contents of data.json: labels, splits with counts and fingerprints, duplicates, loading notes."""
    splits = {name: getattr(bundle, name) for name in ("train", "validation", "test")}
    return DataRecord(
        source=bundle.source,
        labels=list(bundle.labels),
        protocol=bundle.protocol,
        selected_on=bundle.selected_on,
        splits={name: _describe_split(split, bundle.labels) for name, split in splits.items() if split is not None},
        duplicates=None if duplicates is None else duplicates.as_record(),
        reading=bundle.reading.as_record(),
        notes=list(bundle.notes),
    )


def predict_splits(
    config: ExperimentConfig,
    classifier: Classifier,
    bundle: DataBundle,
    folder: Path,
    *,
    names: Sequence[str],
    known: Known | None = None,
) -> dict[str, Predictions]:
    """Predict splits, write the predictions of each into `folder`, and return them by name; absent splits are omitted.

    Args:
        names: of "train", "validation" and "test"; of train only a sample of `evaluate.num_train` images is predicted.
        known: predictions that were computed already.
    """
    batch_size = config.evaluate.batch_size
    predict = partial(classifier.predict, batch_size=batch_size)
    predictions = {}
    for name in names:
        split = _draw_train(config, bundle.train) if name == "train" else getattr(bundle, name)
        if split is None:
            continue
        found = (known or {}).get((name, "single"))
        if found is None:
            probabilities, targets, ids = predict_split(predict, split, batch_size=batch_size)
            found = Predictions(ids, classifier.labels, targets, probabilities)
        predictions[name] = found
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(found, folder / f"{name}.npz")
    return predictions


def _draw_train(config: ExperimentConfig, train: Split | StreamedSplit | None) -> Split | None:
    """Return the sample of training images to predict, or None if it is empty or the images are streamed."""
    num_train = config.evaluate.num_train
    if num_train == 0 or not isinstance(train, Split):
        return None
    return train if num_train is None or num_train >= len(train) else draw_subset(train, num_train, seed=0)


def compute_run_metrics(
    config: ExperimentConfig,
    bundle: DataBundle,
    predictions: dict[str, Predictions],
    *,
    duplicates: EvaluationDuplicates | None,
    temperature: Temperature | None = None,
    smoke: bool = False,
    test_opened: int = 0,
) -> Metrics:
    """Return the contents of a run's metrics.json; the evaluated split is also scored without `duplicates`."""
    return compute_metrics_file(
        predictions,
        Metrics(
            protocol=bundle.protocol,
            banner=compute_banner(
                bundle, duplicates, smoke=smoke, has_subjects=config.finetune.data.subjects is not None
            ),
            selected_on=bundle.selected_on,
            duplicates=None if duplicates is None else duplicates.as_record(),
            temperature=temperature,
            test_opened=test_opened,
        ),
        without_duplicates_ids=None if duplicates is None else duplicates.list_ids_without_duplicates(),
        target_accuracy=config.evaluate.target_accuracy,
    )


def compute_banner(
    bundle: DataBundle, duplicates: EvaluationDuplicates | None, *, smoke: bool = False, has_subjects: bool = False
) -> str | None:
    """Return the warning to show in every output of a run, or None."""
    if smoke:
        return "Smoke run: two batches of at most eight images per stage. The values are meaningless."
    more = SUBJECTS_BANNER if has_subjects else ""
    if bundle.protocol != "paper" or bundle.test is None or duplicates is None:
        return more or None
    found = duplicates.in_train.count()
    return (
        f"Published protocol, not a clean test: {found['any']:,} of {len(bundle.test):,} test images have a duplicate in "
        f"training ({found['exact']:,} an exact copy, {found['augmented']:,} an augmented copy of the same image). "
        f"Compare with the value without duplicates, or with protocol official. {more}"
    ).strip()


def _describe_split(split: Split | StreamedSplit, labels: tuple[str, ...]) -> SplitRecord:
    if not isinstance(split, Split):
        return SplitRecord(name=split.name, n=len(split))
    counts = np.bincount(split.targets, minlength=len(labels))
    return SplitRecord(
        name=split.name,
        n=len(split),
        shape=list(split.images.shape[1:]),
        per_class=dict(zip(labels, counts.tolist(), strict=True)),
        fingerprint=compute_fingerprint(split),
    )


def sort_errors(predictions: Predictions, limit: int) -> np.ndarray:
    """Return the rows of at most `limit` wrong predictions (int [<= limit]), the most confident first."""
    wrong = np.flatnonzero(predictions.predicted != predictions.targets)
    confidence = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:limit]
