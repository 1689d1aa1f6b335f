"""Sections of a report on how far a model can be trusted, beside its table of metrics.

They cover calibration, abstention, test-time augmentation, groups, corrupted images, milestones, and ensemble members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlfer.report.figures import COLOURS, INK, MAX_LABELS, SOFT, NamedFigure, figure_style, new_figure
from dlfer.report.headline import COMBINATIONS, VIEWS, name_other_split
from dlfer.report.page import format_count, format_percent, format_uncertainty
from dlfer.report.pictures import show_confusion
from dlfer.runs.metrics_record import (
    Abstention,
    AtThreshold,
    CalibrationMetrics,
    CorruptionLevel,
    Estimate,
    FinalLabel,
    GroupMetrics,
    Metrics,
    SplitMetrics,
    SplitSummary,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_COLUMNS = 3
_CALIBRATION: tuple[tuple[str, str, Callable[[CalibrationMetrics], Estimate | None]], ...] = (
    ("ECE, 15 bins of equally many images", "percent", lambda metrics: metrics.ece_equal_mass),
    ("ECE, 15 bins of equal width", "percent", lambda metrics: metrics.ece_equal_width),
    ("classwise ECE", "percent", lambda metrics: metrics.classwise_ece),
    ("Brier score", "fraction", lambda metrics: metrics.brier),
    ("log-loss", "fraction", lambda metrics: metrics.log_loss),
)


class CalibrationRow(NamedTuple):
    """A calibration metric before and after temperature scaling."""

    name: str
    scale: str
    raw: Estimate | None
    scaled: Estimate | None


class CalibrationSection(NamedTuple):
    """The calibration section; `has_scaled` is whether there are metrics after temperature scaling."""

    rows: list[CalibrationRow]
    has_scaled: bool
    notes: list[str]


def describe_calibration(metrics: Metrics) -> CalibrationSection | None:
    """Return the calibration metrics before and after temperature scaling, with notes; None if there are none."""
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
            "ECE cannot be negative, so even a perfectly calibrated model would show about "
            f"{format_percent(raw.ece_if_calibrated)} on {format_count(judged.n)} images."
        )
    return CalibrationSection(rows, scaled is not None, notes + _describe_temperature(metrics))


def _describe_temperature(metrics: Metrics) -> list[str]:
    fitted = metrics.temperature
    if fitted is None:
        return ["No temperature was fitted, because there were no validation predictions."]
    value = fitted.value
    if fitted.n is None and fitted.note:
        return [f"The temperature is {value:.3f}; {fitted.note}."]
    verdict = "overconfident" if value > 1 else "underconfident" if value < 1 else "neither over- nor underconfident"
    where = f"{fitted.fitted_on}, n = {format_count(fitted.n)}"
    lines = [f"The temperature {value:.3f} was fitted on validation ({where}); the model is {verdict} there."]
    if fitted.note:
        lines.append(f"Do not rely on it: {fitted.note}.")
    if _is_of_validation(metrics):
        lines.append("The same images are evaluated here, so the values with temperature are optimistic.")
    return lines


def _is_of_validation(metrics: Metrics) -> bool:
    """Return whether the evaluated images are those that temperature and threshold were fitted on."""
    used_for = metrics.judged_on and metrics.judged_on.used_for
    return metrics.judged_split == "validation" or used_for in ("selection", "calibration")


def describe_abstention(metrics: Metrics) -> list[str]:
    """Return sentences on coverage and accuracy at the abstention threshold; empty if abstention was not evaluated."""
    if metrics.judged is None or metrics.judged.selective is None:
        return []
    selective = metrics.judged.selective
    lines, abstain, at = [], metrics.abstain, selective.at_threshold
    if abstain is None and metrics.validation is None:
        lines.append("No threshold was chosen, because there were no validation predictions.")
    elif abstain is None or at is None:
        lines.append("No threshold was chosen: no subset of the validation images reaches the target accuracy.")
    elif not at.n:
        lines.append(f"No image here has a confidence of {abstain.threshold:.2f} or more.")
    else:
        lines += _describe_threshold(abstain, at, is_optimistic=_is_of_validation(metrics))
    area = selective.aurc
    lines.append(
        f"Area under the risk-coverage curve: {area.value:.3f} ({format_uncertainty(area, 'fraction')}; lower is better)."
    )
    return lines


def _describe_threshold(abstain: Abstention, at: AtThreshold, *, is_optimistic: bool) -> list[str]:
    same = " The same images are evaluated here, so the value is optimistic." if is_optimistic else ""
    if abstain.temperature is None:
        kind = "uncalibrated confidence"
        same += " It does not apply to the calibrated confidences of dlfer predict and dlfer serve."
    else:
        kind = f"confidence, calibrated by the temperature {abstain.temperature:.3g},"
    return [
        f"Where the model answers only if its {kind} is at least {abstain.threshold:.3f}, it answers "
        f"{format_percent(at.coverage.value)} of the images ({format_count(at.n)}), and "
        f"{format_percent(at.accuracy.value)} of these answers are right ({format_uncertainty(at.accuracy)}).",
        f"The threshold is the lowest one with which {format_percent(abstain.target_accuracy, 0)} are right on "
        f"validation ({abstain.chosen_on}, n = {format_count(abstain.n)}).{same}",
    ]


class ViewRow(NamedTuple):
    """The metrics of a split with one view; `sentence` compares them with those of single images."""

    split: str
    view: str
    metrics: SplitSummary
    is_headline: bool
    sentence: str


def list_views(metrics: Metrics) -> list[ViewRow]:
    """Return a row for each split and view of test-time augmentation, after a row for the split's single images."""
    rows = []
    for split in ("test", "validation"):
        judged = {view: splits[split] for view, splits in metrics.views.items() if split in splits}
        single = metrics.get(split)
        if not judged or single is None:
            continue
        # Metrics on other data are stored under "test", whatever the model used that data for.
        is_used = metrics.judged_on is not None and metrics.judged_on.used_for is not None
        title = name_other_split(metrics.judged_on) if is_used and split == metrics.judged_split else split
        rows.append(ViewRow(title, VIEWS["single"], single, False, ""))
        for view, found in judged.items():
            is_headline = view == metrics.headline and split == metrics.judged_split
            rows.append(ViewRow(title, VIEWS.get(view, view), found, is_headline, found.paired.sentence))
    return rows


class GroupTable(NamedTuple):
    """The groups of one attribute with their metrics; `labels` are the columns of the recalls."""

    name: str
    groups: dict[str, GroupMetrics]
    labels: list[str]
    notes: list[str]


def describe_groups(metrics: Metrics) -> list[GroupTable]:
    """Return a table for each attribute, with the accuracy and class recalls of its groups, and the largest gaps."""
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
            notes.append("Groups marked with an asterisk have too few images and are left out of the gaps.")
        if attribute.num_missing:
            notes.append(f"{format_count(attribute.num_missing)} images have no value for it.")
        tables.append(GroupTable(name, groups, labels[:MAX_LABELS], notes))
    return tables


def _format_gap(gap: Estimate) -> str:
    return f"{100 * gap.value:.1f} percentage points ({format_uncertainty(gap)})"


def describe_missing_groups(source: str | None) -> str:
    """Return the text that a report shows if no attributes of people were given."""
    if source == "fer2013":
        return (
            "No attributes such as age, sex or skin tone exist for FER2013, so nothing is known about differences "
            "between groups of people."
        )
    return (
        "No attributes such as age, sex or skin tone were given, so nothing is known about differences between "
        "groups of people. A csv of attributes is given by evaluate.attributes, or by --attributes of dlfer evaluate."
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
    """Return the accuracy on corrupted images, a row for each corruption; None if it was not evaluated."""
    found = metrics.corruptions
    if found is None:
        return None
    rows = []
    for name, levels in found.corruptions.items():
        by_strength = {level.strength: level for level in levels}
        cells = [by_strength.get(strength) for strength in found.strengths]
        rows.append(CorruptionRow(name.replace("_", " "), found.meanings.get(name, ""), cells))
    return CorruptionTable(found.clean, found.n, found.strengths, rows)


class MilestoneRow(NamedTuple):
    """The metrics of the evaluated split after `epoch` epochs, with the recall of each class."""

    epoch: int
    metrics: SplitMetrics
    recalls: list[Estimate]


class MilestoneTable(NamedTuple):
    """The metrics at some epochs, one row each; `labels` is empty if there are too many for columns."""

    split: str
    labels: list[str]
    rows: list[MilestoneRow]
    notes: list[str]


def describe_milestones(metrics: Metrics) -> MilestoneTable | None:
    """Return the metrics at the milestones; None if no milestone was evaluated."""
    rows, split = _choose_rows(metrics), _name_split(metrics)
    if not rows:
        return None
    labels = rows[0].metrics.labels
    view = VIEWS.get(metrics.headline, metrics.headline)
    notes = [
        f"The model at the end of each of these epochs, evaluated on {split} (n = "
        f"{format_count(rows[0].metrics.n)}) by {view}. These values select nothing: the final model of the run is "
        f"{'selected on validation' if metrics.is_selected else 'that of the last epoch'}.",
        "Emotion detection rate: the share of the classes that are predicted as themselves more often than as any other.",
    ]
    return MilestoneTable(split, labels if len(labels) <= MAX_LABELS else [], rows, notes)


class EnsembleRow(NamedTuple):
    """A member or a combination with its accuracy at each milestone and with the kept weights."""

    name: str
    remark: str
    is_used: bool
    cells: list[Estimate | None]


class EnsembleTable(NamedTuple):
    """Members and combinations of an ensemble, with a column for each milestone and one for the kept weights."""

    split: str
    columns: list[str]
    rows: list[EnsembleRow]
    notes: list[str]


def describe_ensemble(metrics: Metrics) -> EnsembleTable | None:
    """Return the accuracies of an ensemble's members and combinations; None if there is no ensemble."""
    ensemble = metrics.ensemble
    if ensemble is None:
        return None
    is_test = metrics.members[0].test is not None
    split = "test" if is_test else "validation"

    def get_accuracy(row) -> Estimate | None:
        summary: SplitSummary | None = row.test if is_test else row.validation
        return None if summary is None else summary.accuracy

    stages = [*ensemble.milestones, metrics]
    rows = [
        EnsembleRow(member.name, member.note, False, [get_accuracy(stage.members[number]) for stage in stages])
        for number, member in enumerate(metrics.members)
    ]
    for number, combination in enumerate(metrics.combinations):
        name = f"ensemble: {COMBINATIONS.get(combination.name, combination.name)}"
        remark = "this run's model" if combination.is_used else ""
        cells = [get_accuracy(stage.combinations[number]) for stage in stages]
        rows.append(EnsembleRow(name, remark, combination.is_used, cells))
    is_best = metrics.is_selected and not any(member.note for member in metrics.members)
    kept = "best epoch on validation" if is_best else "model, with the weights that it kept"
    judged = metrics.members[0].test if is_test else metrics.members[0].validation
    view = VIEWS.get(ensemble.view, ensemble.view)
    notes = [
        f"Accuracy on {split}, n = {format_count(judged and judged.n)}, by {view}. “As kept” is each member's {kept}."
    ]
    if ensemble.paired is not None:
        notes.append(
            f"Compared with the member that is best on validation, on the same images: {ensemble.paired.sentence}"
        )
    notes.append(
        "The trained combination is a logistic regression on the logarithms of the members' probabilities, fitted on "
        "validation only. Its value on validation is out of fold: each fifth is predicted by a fit on the other four."
    )
    return EnsembleTable(split, [f"epoch {stage.epoch}" for stage in ensemble.milestones] + ["as kept"], rows, notes)


class FinalRow(NamedTuple):
    """A label, and the label that each member and the ensemble predict most often for it; None if not recorded."""

    label: str
    cells: list[FinalLabel | None]


class FinalTable(NamedTuple):
    """The final labels and emotion detection rates, with a column for each member and one for the ensemble."""

    columns: list[str]
    rows: list[FinalRow]
    rates: list[str]
    notes: list[str]


def describe_final_labels(metrics: Metrics) -> FinalTable | None:
    """Return the most frequent prediction for each label, by member and ensemble; None if it was not recorded."""
    if metrics.ensemble is None or not metrics.ensemble.final_labels:
        return None
    found = metrics.ensemble.final_labels
    labels = list(dict.fromkeys(label for one in found for label in one.labels))
    rows = [FinalRow(label, [one.labels.get(label) for one in found]) for label in labels]
    rates = [
        f"{sum(final.label == label for label, final in one.labels.items())} of {len(one.labels)}" for one in found
    ]
    notes = [
        "The final emotion of a label is the label that is predicted most often for its images. The emotion "
        "detection rate counts the labels whose final emotion is the label itself, however often it is predicted."
    ]
    return FinalTable([one.name for one in found], rows, rates, notes)


def draw_members(metrics: Metrics) -> NamedFigure | None:
    """Draw the accuracy of the members' average against their number; None with fewer than two, or if not recorded."""
    growth = [] if metrics.ensemble is None else metrics.ensemble.growth
    if len(growth) < 2:
        return None
    split = "validation" if growth[0].test is None else "test"
    found = [(one.validation if one.test is None else one.test).accuracy for one in growth]
    with figure_style():
        figure = new_figure(3.4 + 0.6 * min(len(growth), 8), 3.2)
        axes = figure.subplots()
        counts, values = range(1, len(growth) + 1), [100 * one.value for one in found]
        low = [100 * (one.value if one.low is None else one.low) for one in found]
        high = [100 * (one.value if one.high is None else one.high) for one in found]
        axes.fill_between(counts, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.plot(counts, values, marker="o", color=COLOURS[0])
        shown = [f"{one.added}" if number == 0 else f"+ {one.added}" for number, one in enumerate(growth)]
        axes.set_xticks(
            counts, shown, rotation=30 if len(growth) > 3 else 0, ha="right" if len(growth) > 3 else "center"
        )
        axes.set_ylabel("accuracy (%)")
        axes.margins(x=0.12)
    texts = "; ".join(f"{one.added} {format_percent(value.value)}" for one, value in zip(growth, found, strict=True))
    title = f"Accuracy on {split} of the average of the members, from the best on validation to all members; band: 95 % interval"
    return NamedFigure("members", figure, title, f"{title}. Added one after another: {texts}.")


def draw_milestones(metrics: Metrics) -> Figure | None:
    """Draw the confusion matrices of the milestones side by side; None without milestones."""
    rows = _choose_rows(metrics)
    if not rows:
        return None
    labels = rows[0].metrics.labels
    lines = -(-len(rows) // _COLUMNS)
    columns = min(len(rows), _COLUMNS)
    has_text = len(labels) <= MAX_LABELS
    with figure_style():
        figure = new_figure(1.0 + 3.6 * columns, 0.4 + 3.7 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(rows) :]:
            axes.axis("off")
        for number, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
            _, shares = show_confusion(axes, np.array(row.metrics.confusion))
            axes.set_title(f"epoch {row.epoch}: {format_percent(row.metrics.accuracy.value)}", color=INK)
            is_left = number % _COLUMNS == 0
            axes.set_yticks(range(len(labels)), labels if is_left and has_text else [], fontsize=8)
            axes.set_xticks(range(len(labels)), labels if has_text else [], fontsize=8, rotation=40, ha="right")
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
            for i, j in np.ndindex(*shares.shape) if has_text else ():
                colour = "white" if shares[i, j] > 0.55 else INK
                axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
        figure.supxlabel("predicted; numbers are percent of the target's images", fontsize=8, color=SOFT)
    return figure


def describe_milestone_figure(metrics: Metrics) -> str:
    """Return the alternative text of `draw_milestones`."""
    rows = _choose_rows(metrics)
    texts = [f"epoch {row.epoch} {format_percent(row.metrics.accuracy.value)}" for row in rows]
    return f"Confusion matrices on {_name_split(metrics)} after {', '.join(texts)} accuracy."


def _name_split(metrics: Metrics) -> str:
    """Return the split that the milestones are evaluated on."""
    return "test" if metrics.milestones and metrics.milestones[0].test is not None else "validation"


def _choose_rows(metrics: Metrics) -> list[MilestoneRow]:
    """Return the milestones with their metrics on the evaluated split; others are left out."""
    rows, is_test = [], _name_split(metrics) == "test"
    for milestone in metrics.milestones:
        judged = milestone.test if is_test else milestone.validation
        if judged is not None:
            recalls = [row.get("recall") for row in judged.per_class.values()]
            rows.append(MilestoneRow(milestone.epoch, judged, recalls))
    return rows
