"""How far a model can be trusted: calibration, abstaining, views, groups and corrupted images, from its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dlfer.report.headline import VIEWS
from dlfer.report.page import format_count, format_percent, format_uncertainty
from dlfer.runs.metrics_record import (
    Abstention,
    AtThreshold,
    CalibrationMetrics,
    CorruptionLevel,
    Estimate,
    GroupMetrics,
    Metrics,
    SplitSummary,
)

_MOST_LABELS = 12
_CALIBRATION: tuple[tuple[str, str, Callable[[CalibrationMetrics], Estimate | None]], ...] = (
    ("ECE, 15 bins of equally many images", "percent", lambda metrics: metrics.ece_equal_mass),
    ("ECE, 15 bins of equal width", "percent", lambda metrics: metrics.ece_equal_width),
    ("classwise ECE", "percent", lambda metrics: metrics.classwise_ece),
    ("Brier score", "fraction", lambda metrics: metrics.brier),
    ("log-loss", "fraction", lambda metrics: metrics.log_loss),
)


class CalibrationRow(NamedTuple):
    """A calibration metric before and after the temperature."""

    name: str
    scale: str
    raw: Estimate | None
    scaled: Estimate | None


class CalibrationSection(NamedTuple):
    """What is known of the calibration; `has_scaled`: a temperature was fitted."""

    rows: list[CalibrationRow]
    has_scaled: bool
    notes: list[str]


def describe_calibration(metrics: Metrics) -> CalibrationSection | None:
    """Return the calibration metrics before and after the temperature, and remarks; None where there are none."""
    judged = metrics.judged
    if judged is None or judged.calibration is None:
        return None
    raw, scaled = judged.calibration.raw, judged.calibration.scaled
    rows = [
        CalibrationRow(name, scale, get(raw), None if scaled is None else get(scaled))
        for name, scale, get in _CALIBRATION
    ]
    notes = []
    if raw.ece_if_calibrated is not None:
        notes.append(
            "ECE cannot be negative, so that even a perfectly calibrated model would show about "
            f"{format_percent(raw.ece_if_calibrated)} on {format_count(judged.n)} images."
        )
    return CalibrationSection(rows, scaled is not None, notes + _describe_temperature(metrics))


def _describe_temperature(metrics: Metrics) -> list[str]:
    fitted = metrics.temperature
    if fitted is None:
        return ["No temperature was fitted: there were no predictions on validation to fit it on."]
    value = fitted.value
    verdict = "overconfident" if value > 1 else "underconfident" if value < 1 else "neither over- nor underconfident"
    where = f"{fitted.fitted_on}, n = {format_count(fitted.n)}"
    lines = [f"The temperature {value:.3f} was fitted on validation ({where}); the model is {verdict} there."]
    if fitted.note:
        lines.append(f"It is not to be relied on: {fitted.note}.")
    if metrics.judged_split == "validation":
        lines.append("It is judged on the same images here, so the values after it are optimistic.")
    return lines


def describe_abstention(metrics: Metrics) -> list[str]:
    """Return what the abstention threshold gives, in sentences; empty where nothing is known about it."""
    if metrics.judged is None or metrics.judged.selective is None:
        return []
    selective = metrics.judged.selective
    lines, abstain, at = [], metrics.abstain, selective.at_threshold
    if abstain is None or at is None:
        lines.append("No threshold was chosen: no subset of the validation images reaches the accuracy asked for.")
    elif not at.n:
        lines.append(f"No image here has a confidence of {abstain.threshold:.2f} or more.")
    else:
        lines += _describe_threshold(abstain, at, is_optimistic=metrics.judged_split == "validation")
    area = selective.aurc
    lines.append(
        f"Area under the risk-coverage curve: {area.value:.3f} ({format_uncertainty(area, 'fraction')}; less is better)."
    )
    return lines


def _describe_threshold(abstain: Abstention, at: AtThreshold, *, is_optimistic: bool) -> list[str]:
    same = " These are the images judged here, so the value is optimistic." if is_optimistic else ""
    return [
        f"Where the model answers only if its confidence is at least {abstain.threshold:.3f}, it answers "
        f"{format_percent(at.coverage.value)} of the images ({format_count(at.n)}), and "
        f"{format_percent(at.accuracy.value)} of these answers are right ({format_uncertainty(at.accuracy)}).",
        f"The threshold is the lowest one with which {format_percent(abstain.target_accuracy, 0)} are right on "
        f"validation ({abstain.chosen_on}, n = {format_count(abstain.n)}).{same}",
    ]


class ViewRow(NamedTuple):
    """The metrics of a split by a view; `sentence` compares them with the image as it is."""

    split: str
    view: str
    metrics: SplitSummary
    is_headline: bool
    sentence: str


def list_views(metrics: Metrics) -> list[ViewRow]:
    """Return a row for each view and split that was judged by test-time augmentation, the single view before them."""
    rows = []
    for split in ("test", "validation"):
        judged = {view: splits[split] for view, splits in metrics.views.items() if split in splits}
        single = metrics.get(split)
        if not judged or single is None:
            continue
        rows.append(ViewRow(split, VIEWS["single"], single, False, ""))
        for view, found in judged.items():
            is_headline = view == metrics.headline and split == metrics.judged_split
            rows.append(ViewRow(split, VIEWS.get(view, view), found, is_headline, found.paired.sentence))
    return rows


class GroupTable(NamedTuple):
    """The groups of one attribute with their metrics; `labels` are the columns of recalls."""

    name: str
    groups: dict[str, GroupMetrics]
    labels: list[str]
    notes: list[str]


def describe_groups(metrics: Metrics) -> list[GroupTable]:
    """Return a table for each attribute: its groups with accuracy and recall by class, and the largest gaps."""
    if metrics.groups is None:
        return []
    tables = []
    for name, attribute in metrics.groups.attributes.items():
        groups, gaps = attribute.groups, attribute.gaps
        labels = list(next(iter(groups.values())).recall) if groups else []
        notes = []
        if gaps.accuracy is not None:
            notes.append(f"Largest gap in accuracy between two groups: {_format_gap(gaps.accuracy)}.")
        recalls = {label: gap for label, gap in gaps.recall.items() if gap is not None}
        if recalls:
            widest = max(recalls, key=lambda label: recalls[label].value)
            notes.append(f"Largest gap in recall: {_format_gap(recalls[widest])}, of {widest}.")
        if any(group.small for group in groups.values()):
            notes.append("Groups marked by an asterisk have too few images to be part of a gap.")
        if attribute.num_missing:
            notes.append(f"{format_count(attribute.num_missing)} images have no value of it.")
        tables.append(GroupTable(name, groups, labels[:_MOST_LABELS], notes))
    return tables


def _format_gap(gap: Estimate) -> str:
    return f"{100 * gap.value:.1f} percentage points ({format_uncertainty(gap)})"


def describe_missing_groups(source: str | None) -> str:
    """Return the sentence that a reader sees where no attributes were given."""
    if source == "fer2013":
        return (
            "No attributes such as age, sex or skin tone exist for FER2013, so no claim per group of people is made. "
            "Whether the model is as good for everyone is not known."
        )
    return (
        "No attributes such as age, sex or skin tone were given, so no claim per group of people is made. A csv of "
        "them goes with evaluate.attributes."
    )


class CorruptionRow(NamedTuple):
    """A corruption with its accuracy at each strength."""

    name: str
    meaning: str
    cells: list[CorruptionLevel | None]


class CorruptionTable(NamedTuple):
    """Accuracy on corrupted images."""

    clean: Estimate
    n: int
    strengths: list[int]
    rows: list[CorruptionRow]


def describe_corruptions(metrics: Metrics) -> CorruptionTable | None:
    """Return the accuracy on corrupted images, a row for each corruption; None where it was not asked for."""
    found = metrics.corruptions
    if found is None:
        return None
    rows = []
    for name, levels in found.corruptions.items():
        by_strength = {level.strength: level for level in levels}
        cells = [by_strength.get(strength) for strength in found.strengths]
        rows.append(CorruptionRow(name.replace("_", " "), found.meanings.get(name, ""), cells))
    return CorruptionTable(found.clean, found.n, found.strengths, rows)
