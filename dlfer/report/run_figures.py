"""The figures of a run, drawn from the files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlfer.metrics.predictions import read_predictions
from dlfer.report.boosting import describe_levels, draw_levels
from dlfer.report.confidence import draw_reliability, draw_risk_coverage
from dlfer.report.curves import draw_corruptions, draw_history, draw_roc
from dlfer.report.ensemble import describe_milestone_figure, draw_milestones
from dlfer.report.figures import stamp_banner, write_figure
from dlfer.report.headline import get_judged_part
from dlfer.report.page import format_percent, is_missing, read_json, read_rows
from dlfer.report.pictures import draw_confusion
from dlfer.report.record import read_text
from dlfer.report.sections import STAGES
from dlfer.runs.evaluations import read_metrics

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
"""All figures of a run; those with images are written while it has them."""


class Drawn(NamedTuple):
    """A figure with its name, caption, and description for readers who do not see it."""

    name: str
    figure: Figure
    title: str
    description: str


def write_run_figures(run_path: Path) -> list[Path]:
    """Draw what a run's csv, JSON and prediction files allow, and return the paths.

    Confusion, ROC, reliability and risk are of the test part, or of validation where there is no test. The
    run's banner is drawn above every figure in the folder.
    """
    folder, metrics = run_path / "figures", read_metrics(run_path) or {}
    written = [
        write_figure(drawn.figure, folder / f"{drawn.name}.png", title=drawn.title, description=drawn.description)
        for drawn in (*_draw_histories(run_path), *_draw_trees(run_path), *_draw_judgement(run_path, metrics))
    ]
    stamp_banner(folder, FIGURES, metrics.get("banner"))
    return written


def read_log(run_path: Path) -> list[dict[str, Any]]:
    """Return the events of log.jsonl; a last line that was cut off by a kill is left out."""
    events = []
    for line in (read_text(run_path / "log.jsonl") or "").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _draw_histories(run_path: Path) -> Iterator[Drawn]:
    for stage, title in STAGES.items():
        rows = read_rows(run_path / stage / "history.csv")
        if not rows:
            continue
        ends = [event for event in read_log(run_path) if event.get("event") == f"{stage}_end"]
        train, validation = (_write_last(rows[-1].get(f"{part}_accuracy")) for part in ("train", "validation"))
        yield Drawn(
            f"{stage}_history",
            draw_history(rows, kept_epoch=ends[-1].get("kept_epoch") if ends else None),
            f"{title}: loss and accuracy over the epochs",
            f"Loss and accuracy of {title} over {len(rows)} epochs; at the end the accuracy is {train} in training and "
            f"{validation} on validation.",
        )


def _draw_trees(run_path: Path) -> Iterator[Drawn]:
    levels = (read_json(run_path / "boosting.json") or {}).get("levels")
    if levels:
        yield Drawn(
            "levels",
            draw_levels(levels),
            "Where the trees split: each level's share of the gain on train, beside its share of the features",
            describe_levels(levels),
        )


def _draw_judgement(run_path: Path, metrics: Mapping[str, Any]) -> Iterator[Drawn]:
    part = get_judged_part(metrics)
    scores = metrics[part] if part else {}
    if part:
        yield Drawn(
            "confusion",
            draw_confusion(np.array(scores["confusion"]), scores["labels"]),
            f"Confusion on {part}: rows are targets, columns predictions",
            _describe_confusion(scores, part),
        )
    # Predictions without figures: a run that was stopped while it was judged.
    parts = [part] if part else ["test", "validation"]
    predicted = next((name for name in parts if (run_path / "predictions" / f"{name}.npz").exists()), None)
    if predicted:
        predictions = read_predictions(run_path / "predictions" / f"{predicted}.npz")
        area = (scores.get("macro_auc") or {}).get("value")
        yield Drawn(
            "roc",
            draw_roc(predictions),
            f"ROC on {predicted}: each class against the rest",
            f"ROC curves of {len(predictions.labels)} classes on {predicted}, n = {len(predictions):,}"
            + ("." if is_missing(area) else f"; the mean area is {area:.3f}."),
        )
    if scores.get("calibration"):
        yield _draw_calibration(scores, part)
    if (scores.get("selective") or {}).get("curve"):
        yield _draw_abstention(metrics, part)
    milestones = draw_milestones(metrics)
    if milestones is not None:
        text = describe_milestone_figure(metrics)
        yield Drawn("milestones", milestones, "Confusion after some epochs: rows are targets", text)
    if metrics.get("corruptions"):
        yield _draw_robustness(metrics["corruptions"])


def _draw_calibration(scores: Mapping[str, Any], part: str) -> Drawn:
    calibration = scores["calibration"]
    eces = [
        f"{format_percent(calibration[name]['ece_equal_mass']['value'])} {words}"
        for name, words in (("raw", "as the network gives it"), ("scaled", "after the temperature"))
        if calibration.get(name)
    ]
    rows = calibration["raw"]["reliability"]
    low, high = rows[0], rows[-1]
    return Drawn(
        "reliability",
        draw_reliability(calibration),
        f"Reliability on {part}: how often the model is right, over how sure it is; {len(rows)} bins of equally many images",
        f"Reliability diagram on {part}, n = {scores['n']:,}. Expected calibration error: {', '.join(eces)}. As the "
        f"network gives it, the least sure bin has a confidence of {format_percent(low['confidence'])} and an accuracy "
        f"of {format_percent(low['accuracy'])}, the surest {format_percent(high['confidence'])} and "
        f"{format_percent(high['accuracy'])}.",
    )


def _draw_abstention(metrics: Mapping[str, Any], part: str) -> Drawn:
    selective, abstain = metrics[part]["selective"], metrics.get("abstain")
    curve = selective["curve"]
    half = min(curve, key=lambda point: abs(point["coverage"] - 0.5))
    text = (
        f"Risk-coverage curve on {part}: {format_percent(curve[0]['risk'])} of all answers are wrong, "
        f"{format_percent(half['risk'])} where the surest {format_percent(half['coverage'], 0)} are answered."
    )
    at = selective.get("at_threshold")
    if at and at["n"]:
        text += (
            f" At the threshold {at['threshold']:.2f}, {format_percent(at['coverage']['value'])} are answered and "
            f"{format_percent(1 - at['accuracy']['value'])} of these are wrong."
        )
    return Drawn(
        "risk_coverage",
        draw_risk_coverage(selective, target_accuracy=abstain["target_accuracy"] if abstain else None),
        f"Risk and coverage on {part}: what is gained by answering only where the model is sure",
        text,
    )


def _draw_robustness(corruptions: Mapping[str, Any]) -> Drawn:
    worst = [
        f"{name.replace('_', ' ')} {format_percent(levels[-1]['accuracy']['value'])}"
        for name, levels in corruptions["corruptions"].items()
    ]
    return Drawn(
        "corruptions",
        draw_corruptions(corruptions),
        f"Accuracy on corrupted images (n = {corruptions['n']:,}) with 95 % intervals",
        f"Accuracy is {format_percent(corruptions['clean']['value'])} on clean images and, at the greatest strength, "
        f"{', '.join(worst)}.",
    )


def _describe_confusion(scores: Mapping[str, Any], part: str) -> str:
    """Say the recall of each class and the commonest confusion."""
    confusion, labels = np.array(scores["confusion"]), scores["labels"]
    recalls = [f"{label} {format_percent(scores['per_class'][label]['recall'], 0)}" for label in labels[:12]]
    wrong = confusion - np.diag(np.diag(confusion))
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (
        f"Confusion matrix on {part}. Right by class: {', '.join(recalls)}. "
        f"The commonest confusion: {labels[row]} predicted as {labels[column]}, {wrong[row, column]:,} times."
    )


def _write_last(text: str | None) -> str:
    return format_percent(float(text) if text not in (None, "") else None)
