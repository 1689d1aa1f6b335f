"""Metrics of the weights after some epochs of a training, computed after it has ended; none of them is selected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras

from dlfer.data.bundle import DataBundle, Split
from dlfer.experiment.ensemble_answers import MILESTONES_FOLDER, Answers
from dlfer.experiment.extras import predict_split_views
from dlfer.metrics.predictions import Predictions, read_predictions, write_predictions
from dlfer.metrics.scores import compute_scores
from dlfer.model.classifier import Classifier
from dlfer.runs.metrics_record import MilestoneMetrics, SplitMetrics
from dlfer.runs.run import Run
from dlfer.runs.run_records import log_opening
from dlfer.train.checkpoint import restore_checkpoint
from dlfer.train.stage import MILESTONES

KEYS = ("n", "labels", "accuracy", "macro_f1", "per_class", "confusion", "emotion_detection_rate")


def list_milestone_files(stage_folder: Path) -> dict[int, Path]:
    """Return epoch -> file with its weights, of the epochs that a stage has reached.

    Args:
        stage_folder: of the stage, which holds milestones/<epoch>.npz.
    """
    paths = sorted((stage_folder / MILESTONES).glob("*.npz"), key=lambda path: int(path.stem))
    return {int(path.stem): path for path in paths}


def judge_milestones(
    run: Run,
    bundle: DataBundle,
    classifier: Classifier,
    milestones: Mapping[int, Path],
    *,
    view: str,
    batch_size: int,
) -> list[MilestoneMetrics]:
    """Judge the network with the weights of each milestone on validation and on test; keep the predictions in the run.

    What a process that was stopped has judged already is not judged again.

    Args:
        classifier: of one network; it has its own weights again afterwards.
        milestones: epoch -> file with the weights.
        view: "single" or a name of views.
        batch_size: images at a time.
    """

    def predict(epoch: int, split: Split) -> Predictions:
        weights = classifier.network.weights
        kept = [keras.ops.convert_to_numpy(variable.value) for variable in weights]
        restore_checkpoint(milestones[epoch], weights)
        try:
            probabilities = predict_split_views(classifier, split, view, batch_size=batch_size)
        finally:
            for variable, values in zip(weights, kept, strict=True):
                variable.assign(values)
        return Predictions(split.ids, classifier.labels, split.targets, probabilities)

    rows = []
    for epoch in milestones:
        found = {}
        for name, split in _list_splits(bundle):
            path = _get_path(run, epoch, name)
            if not path.exists():
                _log_test(run, name, split, epoch)
                write_predictions(predict(epoch, split), path)
            found[name] = _summarise(read_predictions(path))
        rows.append(MilestoneMetrics(epoch=epoch, **found))
    return rows


def judge_ensemble_milestones(
    run: Run, answers: Answers, epochs: list[int], *, how: str, view: str
) -> list[MilestoneMetrics]:
    """Judge likewise what combines the members as they were after each epoch, from their kept predictions.

    Args:
        epochs: after which all members were judged.
        how: the way to combine them.
        view: as of the members.
    """
    rows = []
    for epoch in epochs:
        found = {}
        for name, split in _list_splits(answers.bundle):
            path = _get_path(run, epoch, name)
            if not path.exists():
                _log_test(run, name, split, epoch)
                write_predictions(answers.combine(name, view, how, epoch=epoch), path)
            found[name] = _summarise(read_predictions(path))
        rows.append(MilestoneMetrics(epoch=epoch, **found))
    return rows


def _list_splits(bundle: DataBundle) -> list[tuple[str, Split]]:
    splits = [("validation", bundle.validation), ("test", bundle.test)]
    return [(name, split) for name, split in splits if isinstance(split, Split)]


def _get_path(run: Run, epoch: int, name: str) -> Path:
    return run.path / MILESTONES_FOLDER / str(epoch) / f"{name}.npz"


def _log_test(run: Run, name: str, split: Split, epoch: int) -> None:
    if name == "test":
        log_opening(run, split.name, len(split), milestone=epoch)


def _summarise(predictions: Predictions) -> SplitMetrics:
    scores = compute_scores(predictions)
    return SplitMetrics(**{key: getattr(scores, key) for key in KEYS})
