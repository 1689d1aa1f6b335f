"""What a training had reached at some epochs on its way, judged after it has ended; none of them is selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from dlfer.data.bundle import DataBundle, Split
from dlfer.experiment.extras import predict_split_views
from dlfer.metrics.predictions import Predictions, read_predictions, write_predictions
from dlfer.metrics.scores import compute_scores
from dlfer.model.network_classifier import NetworkClassifier
from dlfer.runs.openings import log_opening
from dlfer.runs.run import Run
from dlfer.train.checkpoint import restore_checkpoint
from dlfer.train.stage import MILESTONES

Judged = Callable[[str, Split], Predictions]
"""(part, its images) -> what the classifier of a milestone answers, by the view that is the headline."""

FOLDER = Path("predictions") / "milestones"
KEYS = ("n", "labels", "accuracy", "macro_f1", "per_class", "confusion", "emotion_detection_rate")


def list_network_milestones(
    classifier: NetworkClassifier, stage_folder: Path, *, view: str, batch_size: int
) -> dict[int, Judged]:
    """Return epoch -> what predicts with the weights of that epoch, of the epochs that a stage has reached.

    Args:
        classifier: the trained one; it has its own weights again after each prediction.
        stage_folder: of the stage, which holds milestones/<epoch>.npz.
        view: "single" or a name of views.
        batch_size: images at a time.
    """

    def judge_by(path: Path) -> Judged:
        def judge(part: str, split: Split) -> Predictions:
            weights = classifier.network.weights
            kept = [keras.ops.convert_to_numpy(variable.value) for variable in weights]
            restore_checkpoint(path, weights)
            try:
                answers = predict_split_views(classifier, split, view, batch_size=batch_size)
            finally:
                for variable, values in zip(weights, kept, strict=True):
                    variable.assign(values)
            return Predictions(split.ids, classifier.labels, split.targets, answers)

        return judge

    paths = sorted((stage_folder / MILESTONES).glob("*.npz"), key=lambda path: int(path.stem))
    return {int(path.stem): judge_by(path) for path in paths}


def judge_milestones(run: Run, bundle: DataBundle, milestones: Mapping[int, Judged]) -> list[dict[str, Any]]:
    """Judge each milestone on validation and on test, and keep its predictions in the run.

    What a process that was stopped has judged already is not judged again.

    Returns:
        [{"epoch", "validation": scores, "test": scores or None}], the keys KEYS of `compute_scores`.
    """
    rows = []
    for epoch, judge in milestones.items():
        row: dict[str, Any] = {"epoch": epoch, "validation": None, "test": None}
        for part in ("validation", "test"):
            split = getattr(bundle, part)
            if not isinstance(split, Split):
                continue
            path = run.path / FOLDER / str(epoch) / f"{part}.npz"
            if not path.exists():
                if part == "test":
                    log_opening(run, split.name, len(split), milestone=epoch)
                write_predictions(judge(part, split), path)
            scores = compute_scores(read_predictions(path))
            row[part] = {key: scores[key] for key in KEYS}
        rows.append(row)
    return rows
