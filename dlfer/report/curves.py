"""Curves over epochs, ROC curves, and accuracy over the strength of corruptions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlfer.metrics.classification import compute_auc, compute_roc
from dlfer.metrics.predictions import Predictions
from dlfer.report.figures import COLOURS, LINES, MARKERS, MOST_LABELS_WITH_TEXT, PALE, SOFT, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_history(rows: Sequence[Mapping[str, float | str]], *, kept_epoch: int | None = None) -> Figure:
    """Draw loss and accuracy over the epochs of one stage.

    Args:
        rows: of history.csv: epoch, phase and the train_*, validation_* figures; empty cells are left out.
        kept_epoch: the epoch whose weights the stage ended with, numbered as in `rows`.
    """
    with figure_style():
        figure = new_figure(9, 3.3)
        for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("", "%"), strict=True):
            for number, part in enumerate(("train", "validation")):
                epochs, values = read_series(rows, f"{part}_{name}")
                draw_line(axes, epochs, values, number=number, label=part, percent=bool(unit), style=LINES[number])
            axes.set_title(name.capitalize() + (f" ({unit})" if unit else ""))
            _mark_phases(axes, rows)
            if kept_epoch is not None:
                axes.axvline(kept_epoch, color=SOFT, linestyle=":", linewidth=1.2, label="kept epoch")
            finish_epoch_axis(axes)
            axes.legend(loc="best")
    return figure


def read_series(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and values of one column of a history, without empty or non-finite cells."""
    pairs = [(float(row["epoch"]), float(row[key])) for row in rows if row.get(key) not in (None, "")]
    pairs = [(epoch, value) for epoch, value in pairs if math.isfinite(value)]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


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
    """Draw one curve over epochs in the colour of `number`, with its markers while they are few enough to be seen."""
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
    """Label the epoch axis; its ticks are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_xlim(left=max(axes.get_xlim()[0], 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _mark_phases(axes: Axes, rows: Sequence[Mapping]) -> None:
    """Draw a thin line where one phase (head alone, all layers) gives way to the next."""
    for before, after in pairwise(rows):
        if before.get("phase") != after.get("phase"):
            axes.axvline((float(before["epoch"]) + float(after["epoch"])) / 2, color=PALE, linewidth=1, linestyle="--")


class ClassRoc(NamedTuple):
    """The ROC curve of one class against the rest: the class's number, both rates (float64 [M]), and the area."""

    number: int
    fpr: np.ndarray
    tpr: np.ndarray
    area: float


class MacroRoc(NamedTuple):
    """The mean over classes of their ROC curves, at 501 false-positive rates, and of their areas."""

    fpr: np.ndarray
    tpr: np.ndarray
    area: float


def compute_class_rocs(predictions: Predictions) -> tuple[list[ClassRoc], MacroRoc | None]:
    """Return the ROC curve of each class that some rows have and some have not, and their mean; None without any."""
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
    """Draw the curve of each class in its colour and line, so many points wide; of many classes all are pale."""
    many = len(labels) > MOST_LABELS_WITH_TEXT
    for c, fpr, tpr, area in curves:
        colour = PALE if many else COLOURS[c % len(COLOURS)]
        style = "-" if many else LINES[c % len(LINES)]
        name = None if many else f"{labels[c]}, {area:.3f}"
        axes.plot(fpr, tpr, linestyle=style, color=colour, linewidth=width, label=name)


def frame_roc(axes: Axes) -> None:
    """Set the axes of a ROC figure, and draw the diagonal of pure chance."""
    from matplotlib.ticker import PercentFormatter

    axes.plot([0, 1], [0, 1], color=PALE, linestyle=":", linewidth=1)
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.set_aspect("equal")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)


def draw_corruptions(corruptions: Mapping[str, Any]) -> Figure:
    """Draw the accuracy on corrupted images over the strength, from the clean images on, with intervals.

    Args:
        corruptions: of metrics.json: "clean", and "corruptions" {name: [{"strength", "accuracy"}]}.
    """
    with figure_style():
        figure = new_figure(7.5, 4.0)
        axes = figure.subplots()
        for number, (name, levels) in enumerate(corruptions["corruptions"].items()):
            figures = [corruptions["clean"], *(level["accuracy"] for level in levels)]
            values, lows, highs = (100 * np.array([f[key] for f in figures]) for key in ("value", "low", "high"))
            # Points of one strength stand side by side, so that their intervals can be told apart.
            places = np.array([0, *(level["strength"] for level in levels)]) + 0.05 * (number - 2.5)
            axes.errorbar(
                places,
                values,
                yerr=[values - lows, highs - values],
                color=COLOURS[number % len(COLOURS)],
                linestyle=LINES[number % len(LINES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                elinewidth=1,
                label=name.replace("_", " "),
            )
        strengths = sorted({level["strength"] for levels in corruptions["corruptions"].values() for level in levels})
        axes.set_xticks([0, *strengths], ["clean", *map(str, strengths)])
        axes.set_xlabel("strength of the corruption")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", handlelength=3.2)
    return figure
