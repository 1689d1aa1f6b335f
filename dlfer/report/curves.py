"""Curves of a run: training history, ROC, reliability, risk-coverage, and accuracy by corruption strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlfer.metrics.curves import compute_auc, compute_roc
from dlfer.metrics.predictions import Predictions
from dlfer.report.figures import (
    COLOURS,
    INK,
    LINES,
    MARKERS,
    MAX_LABELS,
    PALE,
    SOFT,
    figure_style,
    new_figure,
)
from dlfer.report.page import format_percent, format_uncertainty
from dlfer.runs.metrics_record import AtThreshold, Calibration, Corruptions, ReliabilityBin, Selective
from dlfer.runs.run_records import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_history(history: Sequence[Epoch], *, kept_epoch: int | None = None) -> Figure:
    """Draw the loss and accuracy curves of one stage.

    Args:
        history: of the stage; missing values are left out.
        kept_epoch: the epoch whose weights the stage ended with, numbered as in `history`.
    """
    with figure_style():
        figure = new_figure(9, 3.3)
        for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("", "%"), strict=True):
            for number, split in enumerate(("train", "validation")):
                epochs, values = read_series(history, f"{split}_{name}")
                draw_line(axes, epochs, values, number=number, label=split, percent=bool(unit), style=LINES[number])
            axes.set_title(name.capitalize() + (f" ({unit})" if unit else ""))
            _mark_phases(axes, history)
            if kept_epoch is not None:
                axes.axvline(kept_epoch, color=SOFT, linestyle=":", linewidth=1.2, label="kept epoch")
            finish_epoch_axis(axes)
            axes.legend(loc="best")
    return figure


def read_series(history: Sequence[Epoch], name: str) -> tuple[list[int], list[float]]:
    """Return the epochs for which a history has a metric, and the metric's values."""
    known = [(row.epoch, value) for row in history if (value := getattr(row, name)) is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def draw_line(
    axes: Axes,
    epochs: Sequence[float],
    values: Sequence[float],
    *,
    number: int,
    label: str | None,
    percent: bool = False,
    style: str = "-",
) -> None:
    """Draw a curve over epochs in the colour of index `number`, with markers if there are at most 20 epochs."""
    axes.plot(
        epochs,
        [100 * value for value in values] if percent else values,
        linestyle=style,
        color=COLOURS[number % len(COLOURS)],
        label=label,
        marker=MARKERS[number % len(MARKERS)] if len(epochs) <= 20 else None,
        markersize=4.5,
    )


def finish_epoch_axis(axes: Axes) -> None:
    """Label the epoch axis, and restrict its ticks to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_xlim(left=max(axes.get_xlim()[0], 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _mark_phases(axes: Axes, history: Sequence[Epoch]) -> None:
    """Draw a thin line between training phases (head alone, all layers)."""
    for before, after in pairwise(history):
        if before.phase != after.phase:
            axes.axvline((before.epoch + after.epoch) / 2, color=PALE, linewidth=1, linestyle="--")


class ClassRoc(NamedTuple):
    """The ROC curve of one class against the rest: the class's index, both rates (float64 [M]), and the area."""

    number: int
    fpr: np.ndarray
    tpr: np.ndarray
    area: float


class MacroRoc(NamedTuple):
    """The ROC curve averaged over classes at 501 false-positive rates (float64 [501]), and the mean of their areas."""

    fpr: np.ndarray
    tpr: np.ndarray
    area: float


def compute_class_rocs(predictions: Predictions) -> tuple[list[ClassRoc], MacroRoc | None]:
    """Return the ROC curve of each class with positive and negative rows, and their mean; None without any curve."""
    curves = []
    for c in range(len(predictions.labels)):
        is_target, scores = predictions.targets == c, predictions.probabilities[:, c]
        area = compute_auc(is_target, scores)
        if not math.isnan(area):
            fpr, tpr, _ = compute_roc(is_target, scores)
            curves.append(ClassRoc(c, fpr, tpr, area))
    if not curves:
        return [], None
    grid = np.linspace(0, 1, 501)
    mean = np.mean([np.interp(grid, curve.fpr, curve.tpr) for curve in curves], axis=0)
    return curves, MacroRoc(grid, mean, float(np.mean([curve.area for curve in curves])))


def draw_roc(predictions: Predictions) -> Figure:
    """Draw the ROC curve of each class against the rest, and their mean."""
    curves, macro = compute_class_rocs(predictions)
    with figure_style():
        figure = new_figure(5.2, 5.0)
        axes = figure.subplots()
        frame_roc(axes)
        draw_class_rocs(axes, curves, predictions.labels, width=1.5)
        if macro is not None:
            label = f"macro average, {macro.area:.3f}"
            axes.plot(macro.fpr, macro.tpr, color=SOFT, linewidth=3.4, alpha=0.8, label=label)
            axes.legend(title="area under the curve", loc="lower right", fontsize=8, title_fontsize=8, handlelength=3.2)
    return figure


def draw_class_rocs(axes: Axes, curves: Sequence[ClassRoc], labels: Sequence[str], *, width: float) -> None:
    """Draw the ROC curve of each class, `width` points wide; with more than 12 labels all are pale and unnamed."""
    many = len(labels) > MAX_LABELS
    for c, fpr, tpr, area in curves:
        colour = PALE if many else COLOURS[c % len(COLOURS)]
        style = "-" if many else LINES[c % len(LINES)]
        name = None if many else f"{labels[c]}, {area:.3f}"
        axes.plot(fpr, tpr, linestyle=style, color=colour, linewidth=width, label=name)


def frame_roc(axes: Axes) -> None:
    """Set up the axes of a ROC figure, and draw the chance diagonal."""
    from matplotlib.ticker import PercentFormatter

    axes.plot([0, 1], [0, 1], color=PALE, linestyle=":", linewidth=1)
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.set_aspect("equal")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)


def draw_reliability(calibration: Calibration) -> Figure:
    """Draw accuracy against confidence in bins of equally many images, before and after temperature scaling."""
    versions = [("As the network gives it", calibration.raw)]
    if calibration.scaled is not None:
        versions.append(("After the temperature", calibration.scaled))
    with figure_style():
        figure = new_figure(4.5 * len(versions), 4.5)
        panels = figure.subplots(1, len(versions), squeeze=False, sharey=True)[0]
        for number, (axes, (title, metrics)) in enumerate(zip(panels, versions, strict=True)):
            _draw_bins(axes, metrics.reliability, number)
            ece = metrics.ece_equal_mass
            axes.set_title(title)
            # The table of the page has the reason for a missing interval.
            text = f"ECE {format_percent(ece.value)}\n{format_uncertainty((ece.low, ece.high))}"
            axes.text(3, 97, text, va="top", fontsize=10)
            axes.set_xlabel("mean confidence (%)")
        panels[0].set_ylabel("accuracy (%)")
    return figure


def _draw_bins(axes: Axes, bins: Sequence[ReliabilityBin], number: int) -> None:
    """Draw each bin as a marker with the Wilson interval of its accuracy, and the line of perfect calibration."""
    confidence, accuracy, low, high = (
        100 * np.array([(row.confidence, row.accuracy, row.low, row.high) for row in bins], dtype=float).T
    )
    axes.plot([0, 100], [0, 100], color=SOFT, linestyle=":", linewidth=1.2, label="perfect calibration")
    axes.errorbar(
        confidence,
        accuracy,
        yerr=np.maximum([accuracy - low, high - accuracy], 0),
        color=COLOURS[number],
        linestyle=LINES[number],
        marker=MARKERS[number],
        markersize=5,
        linewidth=1.2,
        elinewidth=1.2,
        capsize=2.5,
        label="bins, 95 % interval",
    )
    axes.set_xlim(-1, 101)
    axes.set_ylim(-1, 101)
    axes.set_aspect("equal")
    axes.legend(loc="lower right", fontsize=8.5)


def draw_risk_coverage(selective: Selective, *, target_accuracy: float | None = None) -> Figure:
    """Draw the share of wrong answers against the share of answered images (coverage), and mark the threshold.

    Args:
        selective: of the evaluated split.
        target_accuracy: the accuracy, in 0..1, that the threshold was chosen to reach.
    """
    coverage, risk, low, high = (
        100
        * np.array([(point.coverage, point.risk, point.low, point.high) for point in selective.curve], dtype=float).T
    )
    with figure_style():
        figure = new_figure(5.6, 4.1)
        axes = figure.subplots()
        axes.plot(coverage, risk, color=COLOURS[0], label="answers by falling confidence")
        axes.fill_between(coverage, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="95 % at each coverage")
        axes.axhline(risk[0], color=PALE, linestyle=":", linewidth=1.4, label=f"all answered: {risk[0]:.1f} % wrong")
        if target_accuracy is not None:
            aim = 100 * (1 - target_accuracy)
            axes.axhline(aim, color=SOFT, linestyle="--", linewidth=1, label=f"aimed at: {aim:.0f} % wrong")
        at = selective.at_threshold
        if at is not None and None not in (at.coverage.value, at.accuracy.value, at.accuracy.low, at.accuracy.high):
            _mark_threshold(axes, at)
        axes.set_xlim(0, 101)
        axes.set_ylim(0, max(1.0, 1.3 * float(risk.max())))
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])  # the space above 100 % is for the legend
        axes.set_xlabel("images answered (%)")
        axes.set_ylabel("wrong among the answered (%)")
        axes.legend(loc="upper left", fontsize=8.5)
    return figure


def _mark_threshold(axes: Axes, at: AtThreshold) -> None:
    coverage, wrong = 100 * at.coverage.value, 100 * (1 - at.accuracy.value)
    lowest, highest = 100 * (1 - at.accuracy.high), 100 * (1 - at.accuracy.low)
    axes.errorbar(
        [coverage],
        [wrong],
        yerr=np.maximum([[wrong - lowest], [highest - wrong]], 0),
        color=COLOURS[1],
        marker=MARKERS[1],
        markersize=8,
        capsize=4,
        linestyle="none",
        label=f"confidence of {at.threshold:.2f} or more: {coverage:.0f} % answered, {wrong:.1f} % wrong",
    )
    axes.annotate(f"{at.threshold:.2f}", (coverage, wrong), (7, -14), textcoords="offset points", color=INK)


def draw_corruptions(found: Corruptions) -> Figure:
    """Draw the accuracy on corrupted images against the strength, beginning with clean images, with intervals."""
    with figure_style():
        figure = new_figure(7.5, 4.0)
        axes = figure.subplots()
        for number, (name, levels) in enumerate(found.corruptions.items()):
            estimates = [found.clean, *(level.accuracy for level in levels)]
            values, lows, highs = (
                100 * np.array(ends, dtype=float)
                for ends in zip(*((e.value, e.low, e.high) for e in estimates), strict=True)
            )
            # Markers of the same strength are drawn side by side, so that their intervals can be distinguished.
            places = np.array([0, *(level.strength for level in levels)]) + 0.05 * (number - 2.5)
            axes.errorbar(
                places,
                values,
                yerr=np.maximum([values - lows, highs - values], 0),
                color=COLOURS[number % len(COLOURS)],
                linestyle=LINES[number % len(LINES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                elinewidth=1,
                label=name.replace("_", " "),
            )
        axes.set_xticks([0, *found.strengths], ["clean", *map(str, found.strengths)])
        axes.set_xlabel("strength of the corruption")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", handlelength=3.2)
    return figure
