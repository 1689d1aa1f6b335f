"""Additional evaluations of a trained model: test-time augmentation, groups by attribute, corruptions, milestones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config import names
from dlfer.config.load import resolve_path
from dlfer.config.schema import EvaluateConfig
from dlfer.data.augment import CORRUPTIONS, STRENGTHS, corrupt_images
from dlfer.data.bundle import DataBundle, Split, StreamedSplit
from dlfer.errors import UserError
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Known, Predictions, read_predictions, write_predictions
from dlfer.metrics.scores import check_attributes, compute_group_scores, compute_scores, read_attributes
from dlfer.metrics.several import compute_difference, compute_view_scores
from dlfer.model.predict import Predictor, predict_split, predict_views
from dlfer.runs.metrics_record import (
    CorruptionLevel,
    Corruptions,
    Estimate,
    Metrics,
    MilestoneMetrics,
    SplitMetrics,
    ViewMetrics,
)
from dlfer.runs.run import Run
from dlfer.runs.run_records import ExtraMetrics, add_metrics, log_opening

_AT_ONCE = 1024
"""The number of images corrupted at a time; at 224 pixels and three channels they take 0.6 GB as float32."""


def evaluate_corruptions(
    classifier: Predictor,
    split: Split,
    *,
    seed: int = 0,
    batch_size: int = 64,
    say: Callable[[str], None] | None = None,
) -> Corruptions:
    """Return the accuracy on the clean images and under each corruption at each strength.

    This predicts the split 31 times.

    Args:
        classifier: its `labels` and `predict` are used.
        split: its targets are indices into the classifier's labels.

    Returns:
        Accuracies with Wilson's intervals, and differences corrupted - clean on the same images with Tango's intervals,
        as fractions.

    Source: after Hendrycks & Dietterich, ICLR 2019; see dlfer.data.augment.
    """

    def judge(make: Callable[[Split], np.ndarray]) -> Predictions:
        starts = range(0, len(split), _AT_ONCE)
        parts = (split.take(np.arange(start, min(start + _AT_ONCE, len(split)))) for start in starts)
        probabilities = np.concatenate([classifier.predict(make(part), batch_size=batch_size) for part in parts])
        return Predictions(split.ids, classifier.labels, split.targets, probabilities)

    clean = judge(lambda part: part.images)
    found: dict[str, list[CorruptionLevel]] = {}
    for name, spec in CORRUPTIONS.items():
        if say is not None:
            say(f"corruption {name} ({len(found) + 1} of {len(CORRUPTIONS)})")
        found[name] = []
        for strength, parameter in zip(STRENGTHS, spec.parameters, strict=True):

            def worsen(part: Split, name: str = name, strength: int = strength) -> np.ndarray:
                return corrupt_images(part.images, part.ids, corruption=name, strength=strength, seed=seed)

            worse = judge(worsen)
            found[name].append(
                CorruptionLevel(
                    strength=strength,
                    parameter=parameter,
                    accuracy=_compute_accuracy(worse),
                    difference=compute_difference(worse, clean),
                )
            )
    return Corruptions(
        clean=_compute_accuracy(clean),
        corruptions=found,
        meanings={name: spec.meaning for name, spec in CORRUPTIONS.items()},
        n=len(split),
        seed=seed,
    )


def _compute_accuracy(predictions: Predictions) -> Estimate:
    low, high = compute_wilson_interval(int(predictions.correct.sum()), len(predictions))
    return Estimate(value=float(predictions.correct.mean()), low=low, high=high)


MILESTONES_FOLDER = Path("predictions") / "milestones"
MILESTONE_KEYS = ("n", "labels", "accuracy", "macro_f1", "per_class", "confusion", "emotion_detection_rate")


@dataclass(frozen=True)
class Extras:
    """The additional evaluations to make.

    Attributes:
        corrupt: whether to evaluate on corrupted images as well, which predicts every image 31 times.
        views: test-time augmentations, "mirror" or "ten_crop".
        headline: "single", or the one of `views` whose accuracy is the headline.
        attributes: a csv of attributes per image id, or None.
        batch_size: the number of images per batch.
    """

    corrupt: bool = False
    views: tuple[str, ...] = ()
    headline: str = "single"
    attributes: Path | None = None
    batch_size: int = 64


PLAIN = Extras()
"""No additional evaluations."""


def choose_changes(extras: Extras, found: ExtraMetrics) -> dict[str, Any]:
    """Return the fields of `Metrics` to update with the results of additional evaluations."""
    changes: dict[str, Any] = {"views": found.views, "headline": extras.headline, "groups": found.groups}
    return changes | ({"corruptions": found.corruptions} if found.corruptions is not None else {})


def choose_extras(config: EvaluateConfig, bundle: DataBundle, *, smoke: bool = False) -> Extras:
    """Return the additional evaluations of an experiment, validated for the images to evaluate.

    Raises:
        UserError: as in `check_extras`.
    """
    # The few images of a smoke run may be synthetic, without attributes.
    has_attributes = config.attributes is not None and not smoke
    extras = Extras(
        views=config.views,
        headline=config.headline,
        attributes=resolve_path(config.attributes) if has_attributes else None,
        batch_size=config.batch_size,
    )
    judged = bundle.validation if bundle.test is None else bundle.test
    check_extras(extras, judged.ids if isinstance(judged, Split) else None)
    return extras


def check_extras(extras: Extras, ids: np.ndarray | None = None) -> None:
    """Raise UserError unless the evaluations are possible, so that errors are found before a training.

    Args:
        ids: str [N], the ids of the images to evaluate; None: not known yet.

    Raises:
        UserError: a view is unknown, the headline is not among the views, or the file of attributes cannot be read or
            contains none of the ids.
    """
    unknown = [view for view in extras.views if view not in names.VIEWS]
    if unknown:
        raise UserError(f"views: found {', '.join(unknown)}, expected some of {', '.join(names.VIEWS)}.")
    if extras.headline not in ("single", *extras.views):
        raise UserError(
            f"headline: found {extras.headline!r}, expected single or one of the views asked for "
            f"({', '.join(extras.views) or 'none'}); add it there."
        )
    if extras.attributes is not None:
        attributes = read_attributes(extras.attributes)
        if ids is not None:
            check_attributes(attributes, ids, file=str(extras.attributes))


def compute_extra_metrics(
    extras: Extras,
    classifier: Predictor,
    splits: Mapping[str, Split | StreamedSplit | None],
    predictions: Mapping[str, Predictions],
    *,
    folder: Path | None = None,
    say: Callable[[str], None] | None = None,
    known: Known | None = None,
) -> ExtraMetrics:
    """Return the metrics of additional evaluations.

    Args:
        splits: "validation", "test" -> images, with targets that are indices into the classifier's labels.
        predictions: the classifier's predictions on them without test-time augmentation.
        folder: the folder to write the predictions of views to, as <view>/<split>.npz; None: they are not written.
        known: predictions of views that were computed already.

    Returns:
        Views of each split; groups and corruptions of test, or of validation without test.
    """
    judged = [split for split in ("test", "validation") if splits.get(split) is not None and split in predictions]
    views: dict[str, dict[str, ViewMetrics]] = {}
    for view in extras.views:
        views[view] = {}
        for split in judged:
            plain = predictions[split]
            viewed = (known or {}).get((split, view))
            if viewed is None:
                answers = predict_split_views(classifier, splits[split], view, batch_size=extras.batch_size)
                viewed = Predictions(plain.ids, plain.labels, plain.targets, answers)
            if folder is not None:
                write_predictions(viewed, folder / view / f"{split}.npz")
            views[view][split] = compute_view_scores(viewed, plain, view=view)
    groups = corruptions = None
    if extras.attributes is not None and judged:
        attributes = read_attributes(extras.attributes)
        groups = compute_group_scores(predictions[judged[0]], attributes, file=str(extras.attributes))
        groups = groups.model_copy(update={"part": judged[0]})
    if extras.corrupt and judged and isinstance(splits[judged[0]], Split):
        corruptions = evaluate_corruptions(classifier, splits[judged[0]], batch_size=extras.batch_size, say=say)
        corruptions = corruptions.model_copy(update={"part": judged[0]})
    return ExtraMetrics(views=views, groups=groups, corruptions=corruptions)


def judge_milestones(
    run: Run, bundle: DataBundle, epochs: Iterable[int], predict: Callable[[int, str], Predictions]
) -> list[MilestoneMetrics]:
    """Evaluate the weights after some epochs of a training on validation and test, and keep the predictions in the run.

    None of these epochs is selected. Predictions that a stopped process wrote are reused.

    Args:
        run: the run that the predictions are written to.
        bundle: the run's data; streamed splits are omitted.
        epochs: the epochs to evaluate.
        predict: (epoch, "validation" or "test") -> the predictions of that split.
    """
    splits = {"validation": bundle.validation, "test": bundle.test}
    rows = []
    for epoch in epochs:
        found = {}
        for name in [name for name, split in splits.items() if isinstance(split, Split)]:
            path = run.path / MILESTONES_FOLDER / str(epoch) / f"{name}.npz"
            if not path.exists():
                if name == "test":
                    log_opening(run, splits[name].name, len(splits[name]), milestone=epoch)
                write_predictions(predict(epoch, name), path)
            scores = compute_scores(read_predictions(path))
            found[name] = SplitMetrics(**{key: getattr(scores, key) for key in MILESTONE_KEYS})
        rows.append(MilestoneMetrics(epoch=epoch, **found))
    return rows


def keep_extras(run: Run, metrics: Metrics, found: ExtraMetrics) -> bool:
    """Add additional metrics on a run's own images to the run, for its report, and return whether there were any.

    The only split in `found` is called "test"; it is stored under the name of the split that the run was evaluated on.
    """
    if not (found.views or found.groups or found.corruptions):
        return False
    name = metrics.judged_split
    views = {view: {name: splits["test"]} for view, splits in found.views.items()}
    groups = None if found.groups is None else found.groups.model_copy(update={"part": name})
    corruptions = None if found.corruptions is None else found.corruptions.model_copy(update={"part": name})
    add_metrics(run, ExtraMetrics(views=views, groups=groups, corruptions=corruptions))
    return True


def predict_split_views(
    classifier: Predictor, split: Split | StreamedSplit, view: str, *, batch_size: int
) -> np.ndarray:
    """Return probabilities averaged over a view (float32 [N, C]), in the order of the split."""
    if view == "single":
        predict = partial(classifier.predict, batch_size=batch_size)
        return predict_split(predict, split, batch_size=batch_size)[0]
    if isinstance(split, Split):
        return predict_views(classifier, split.images, view, batch_size=batch_size)
    batches = split.batches(batch_size, seed=0, epoch=0, training=False)
    return np.concatenate([predict_views(classifier, images, view, batch_size=batch_size) for images, _, _ in batches])
