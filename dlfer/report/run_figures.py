"""The figures of a run, drawn from the files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlfer.metrics.predictions import read_predictions
from dlfer.report.boosting import describe_levels, draw_levels
from dlfer.report.curves import draw_corruptions, draw_history, draw_reliability, draw_risk_coverage, draw_roc
from dlfer.report.ensemble import describe_milestone_figure, draw_milestones
from dlfer.report.figures import stamp_banner, write_figure
from dlfer.report.page import format_percent
from dlfer.report.pictures import draw_confusion
from dlfer.report.sections import STAGES
from dlfer.runs.evaluations import read_metrics
from dlfer.runs.metrics_record import Abstention, Calibration, Corruptions, Metrics, Selective, SplitMetrics
from dlfer.runs.training_records import BoostingRecord, read_events, read_history
from dlfer.runs.wording import is_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (
    "pretrain_history",
    "finetune_history",
    "levels",
    "milestones",
    "confusion",
    "roc",
    "reliability",
    "risk_coverage",
    "confusions",
    "corruptions",
    "errors",
    "augmented",
    "preprocessing",
    "occlusion",
)
"""All figures of a run; those that show images are written while the run has the images in memory."""


class Drawn(NamedTuple):
    """A figure with its name, caption, and description for readers who do not see it."""

    name: str
    figure: Figure
    title: str
    description: str


def write_run_figures(run_path: Path) -> list[Path]:
    """Draw what a run's csv, JSON and prediction files allow, and return the paths.

    Confusion, ROC, reliability and risk are of the test split, or of validation where there is no test. The
    run's banner is drawn above every figure in the folder.
    """
    folder, metrics = run_path / "figures", read_metrics(run_path) or Metrics()
    written = [
        write_figure(drawn.figure, folder / f"{drawn.name}.png", title=drawn.title, description=drawn.description)
        for drawn in (*_draw_histories(run_path), *_draw_trees(run_path), *_draw_judgement(run_path, metrics))
    ]
    stamp_banner(folder, FIGURES, metrics.banner)
    return written


def _draw_histories(run_path: Path) -> Iterator[Drawn]:
    events = read_events(run_path)
    for stage, title in STAGES.items():
        history = read_history(run_path / stage / "history.csv")
        if not history:
            continue
        ends = [event for event in events if event.event == f"{stage}_end"]
        last = history[-1]
        yield Drawn(
            f"{stage}_history",
            draw_history(history, kept_epoch=ends[-1].kept_epoch if ends else None),
            f"{title}: loss and accuracy over the epochs",
            f"Loss and accuracy of {title} over {len(history)} epochs; at the end the accuracy is "
            f"{format_percent(last.train_accuracy)} in training and {format_percent(last.validation_accuracy)} on "
            "validation.",
        )


def _draw_trees(run_path: Path) -> Iterator[Drawn]:
    record = BoostingRecord.read(run_path)
    if record is not None and record.levels:
        yield Drawn(
            "levels",
            draw_levels(record.levels),
            "Where the trees split: each level's share of the gain on train, beside its share of the features",
            describe_levels(record.levels),
        )


def _draw_judgement(run_path: Path, metrics: Metrics) -> Iterator[Drawn]:
    judged, split = metrics.judged, metrics.judged_split
    if judged is not None and judged.confusion:
        yield Drawn(
            "confusion",
            draw_confusion(np.array(judged.confusion), judged.labels),
            f"Confusion on {split}: rows are targets, columns predictions",
            _describe_confusion(judged, split),
        )
    yield from _draw_roc(run_path, metrics)
    if judged is not None and judged.calibration is not None:
        yield _draw_calibration(judged.calibration, judged.n, split)
    if judged is not None and judged.selective is not None and judged.selective.curve:
        yield _draw_abstention(judged.selective, metrics.abstain, split)
    milestones = draw_milestones(metrics)
    if milestones is not None:
        text = describe_milestone_figure(metrics)
        yield Drawn("milestones", milestones, "Confusion after some epochs: rows are targets", text)
    if metrics.corruptions is not None:
        yield _draw_robustness(metrics.corruptions)


def _draw_roc(run_path: Path, metrics: Metrics) -> Iterator[Drawn]:
    # A run that was stopped while it was judged has predictions and no metrics.
    splits = ["test", "validation"] if metrics.judged is None else [metrics.judged_split]
    paths = {split: run_path / "predictions" / f"{split}.npz" for split in splits}
    split = next((split for split, path in paths.items() if path.exists()), None)
    if split is None:
        return
    predictions = read_predictions(paths[split])
    area = None if metrics.judged is None or metrics.judged.macro_auc is None else metrics.judged.macro_auc.value
    yield Drawn(
        "roc",
        draw_roc(predictions),
        f"ROC on {split}: each class against the rest",
        f"ROC curves of {len(predictions.labels)} classes on {split}, n = {len(predictions):,}"
        + ("." if is_missing(area) else f"; the mean area is {area:.3f}."),
    )


def _draw_calibration(calibration: Calibration, n: int, split: str) -> Drawn:
    raw, scaled = calibration.raw, calibration.scaled
    errors = [f"{format_percent(raw.ece_equal_mass.value)} as the network gives it"]
    if scaled is not None:
        errors.append(f"{format_percent(scaled.ece_equal_mass.value)} after the temperature")
    rows = raw.reliability
    low, high = rows[0], rows[-1]
    return Drawn(
        "reliability",
        draw_reliability(calibration),
        f"Reliability on {split}: how often the model is right, over how sure it is; {len(rows)} bins of equally many "
        "images",
        f"Reliability diagram on {split}, n = {n:,}. Expected calibration error: {', '.join(errors)}. As the "
        f"network gives it, the least sure bin has a confidence of {format_percent(low.confidence)} and an accuracy "
        f"of {format_percent(low.accuracy)}, the surest {format_percent(high.confidence)} and "
        f"{format_percent(high.accuracy)}.",
    )


def _draw_abstention(selective: Selective, abstain: Abstention | None, split: str) -> Drawn:
    curve, at = selective.curve, selective.at_threshold
    half = min(curve, key=lambda point: abs(point.coverage - 0.5))
    text = (
        f"Risk-coverage curve on {split}: {format_percent(curve[0].risk)} of all answers are wrong, "
        f"{format_percent(half.risk)} where the surest {format_percent(half.coverage, 0)} are answered."
    )
    if at is not None and at.n:
        text += (
            f" At the threshold {at.threshold:.2f}, {format_percent(at.coverage.value)} are answered and "
            f"{format_percent(1 - at.accuracy.value)} of these are wrong."
        )
    return Drawn(
        "risk_coverage",
        draw_risk_coverage(selective, target_accuracy=None if abstain is None else abstain.target_accuracy),
        f"Risk and coverage on {split}: what is gained by answering only where the model is sure",
        text,
    )


def _draw_robustness(found: Corruptions) -> Drawn:
    worst = [
        f"{name.replace('_', ' ')} {format_percent(levels[-1].accuracy.value)}"
        for name, levels in found.corruptions.items()
    ]
    return Drawn(
        "corruptions",
        draw_corruptions(found),
        f"Accuracy on corrupted images (n = {found.n:,}) with 95 % intervals",
        f"Accuracy is {format_percent(found.clean.value)} on clean images and, at the greatest strength, "
        f"{', '.join(worst)}.",
    )


def _describe_confusion(judged: SplitMetrics, split: str) -> str:
    """Return the recall of each class and the most frequent confusion in words."""
    confusion, labels = np.array(judged.confusion), judged.labels
    recalls = [f"{label} {format_percent(judged.per_class[label].recall, 0)}" for label in labels[:12]]
    wrong = confusion - np.diag(np.diag(confusion))
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (
        f"Confusion matrix on {split}. Right by class: {', '.join(recalls)}. "
        f"The commonest confusion: {labels[row]} predicted as {labels[column]}, {wrong[row, column]:,} times."
    )
