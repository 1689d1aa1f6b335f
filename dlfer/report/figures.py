"""Figures of a run: how it trained, what it confuses, and what its images look like.

`draw_*` returns a matplotlib figure; `write_figure` saves it as a PNG that carries its own caption and
its description for readers who do not see it. Colours are those of Okabe and Ito, which colour-blind
readers tell apart. Matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.evaluate.metrics import compute_auc, compute_roc
from dlfer.evaluate.predictions import Predictions
from dlfer.runs import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito, Color Universal Design (2008); the yellow is left out, since it vanishes on white."""

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5f6b76",
    "axes.labelcolor": "#1c2430",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "text.color": "#1c2430",
    "xtick.color": "#3f4a55",
    "ytick.color": "#3f4a55",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}

DOTS_PER_INCH = 160
MOST_LABELS_WITH_TEXT = 12
"""With more labels than this, cells of a confusion matrix and curves of a ROC figure bear no text."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; use it within `figure_style()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def figure_style():
    """Return the context in which figures are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def write_figure(figure: Figure, path: Path, *, title: str, description: str) -> Path:
    """Save `figure` as PNG under a temporary name first; the same figure gives the same bytes.

    Args:
        figure: what to save.
        path: ends in .png.
        title: the caption, kept in the file.
        description: what a reader who does not see the figure needs to know, kept in the file.
    """
    buffer = io.BytesIO()
    metadata = {"Title": title, "Description": description, "Software": "dlfer"}
    with figure_style():
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata=metadata)
    write_atomically(path, buffer.getvalue())
    return path


def draw_history(rows: Sequence[Mapping[str, float | str]], *, kept_epoch: int | None = None) -> Figure:
    """Draw loss and accuracy over the epochs of one stage.

    Args:
        rows: of history.csv: epoch, phase and the train_*, validation_* figures; empty cells are left out.
        kept_epoch: the epoch whose weights the stage ended with, numbered as in `rows`.
    """
    with figure_style():
        figure = new_figure(9, 3.3)
        for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("", "%"), strict=True):
            for colour, part in zip(COLOURS, ("train", "validation"), strict=False):
                epochs, values = read_series(rows, f"{part}_{name}")
                draw_line(axes, epochs, values, colour=colour, label=part, percent=bool(unit))
            axes.set_title(name.capitalize() + (f" ({unit})" if unit else ""))
            _mark_phases(axes, rows)
            if kept_epoch is not None:
                axes.axvline(kept_epoch, color="#5f6b76", linestyle=":", linewidth=1.2, label="kept epoch")
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
    colour: str,
    label: str | None,
    percent: bool = False,
    style: str = "-",
) -> None:
    """Draw one curve over epochs, with dots while they are few enough to be seen."""
    shown = [100 * value for value in values] if percent else values
    marker = "o" if len(epochs) <= 20 else None
    axes.plot(epochs, shown, style, color=colour, label=label, marker=marker, markersize=3.5)


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
            axes.axvline(
                (float(before["epoch"]) + float(after["epoch"])) / 2, color="#b4bcc4", linewidth=1, linestyle="--"
            )


def draw_confusion(confusion: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw the confusion matrix: colour and percent are of the target's row, counts stand below.

    Args:
        confusion: int [C, C], rows are targets.
        labels: names of the C classes.
    """
    totals = confusion.sum(axis=1)
    shares = np.divide(confusion, totals[:, None], out=np.zeros(confusion.shape), where=totals[:, None] > 0)
    small = len(labels) > MOST_LABELS_WITH_TEXT
    side = 10.0 if small else 2.2 + 0.45 * max(len(labels), 4)
    size = 5 if len(labels) > 40 else 8
    with figure_style():
        figure = new_figure(side, side * 0.96)
        axes = figure.subplots()
        image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        rows = list(labels) if small else [f"{label}\nn = {n:,}" for label, n in zip(labels, totals, strict=True)]
        axes.set_xticks(range(len(labels)), labels, rotation=90 if small else 40, ha="right", fontsize=size)
        axes.set_yticks(range(len(labels)), rows, fontsize=size)
        if not small:
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
        axes.tick_params(length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("target")
        if small:
            bar = figure.colorbar(image, ax=axes, shrink=0.6, label="percent of the target's images")
            bar.outline.set_visible(False)
            return figure
        for row, column in np.ndindex(*confusion.shape):
            text = f"{100 * shares[row, column]:.0f} %\n{confusion[row, column]:,}"
            colour = "white" if shares[row, column] > 0.55 else "#1c2430"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, linespacing=1.15, color=colour)
    return figure


def draw_roc(predictions: Predictions) -> Figure:
    """Draw the ROC curve of each class against the rest, and their mean."""
    from matplotlib.ticker import PercentFormatter

    grid = np.linspace(0, 1, 501)
    means, areas = [], []
    many = len(predictions.labels) > MOST_LABELS_WITH_TEXT
    with figure_style():
        figure = new_figure(5.2, 5.0)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#b4bcc4", linestyle=":", linewidth=1)
        for c, label in enumerate(predictions.labels):
            is_target, scores = predictions.targets == c, predictions.probabilities[:, c]
            area = compute_auc(is_target, scores)
            if math.isnan(area):
                continue
            fpr, tpr, _ = compute_roc(is_target, scores)
            means.append(np.interp(grid, fpr, tpr))
            areas.append(area)
            colour = "#b4bcc4" if many else COLOURS[c % (len(COLOURS) - 1)]
            style = "-" if c < len(COLOURS) - 1 else "-."
            name = None if many else f"{label}, {area:.3f}"
            axes.plot(fpr, tpr, style, color=colour, linewidth=1.4, label=name)
        if areas:
            label = f"macro average, {np.mean(areas):.3f}"
            axes.plot(grid, np.mean(means, axis=0), "--", color="black", linewidth=2, label=label)
            axes.legend(title="area under the curve", loc="lower right", fontsize=8, title_fontsize=8)
        axes.set_xlabel("false-positive rate")
        axes.set_ylabel("true-positive rate")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.set_aspect("equal")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
    return figure


def draw_image_grid(images: np.ndarray, captions: Sequence[str], *, columns: int = 6) -> Figure:
    """Draw images in rows, each with its caption.

    Args:
        images: uint8 [N, H, W, C], C is 1 or 3.
        captions: N short texts, one or two lines.
        columns: images in a row.
    """
    num_rows = max(1, math.ceil(len(images) / columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    with figure_style():
        figure = new_figure(1.5 * columns, num_rows * (1.4 + 0.19 * lines))
        grid = figure.subplots(num_rows, columns, squeeze=False)
        for axes in grid.ravel():
            axes.set_axis_off()
        for axes, image, caption in zip(grid.ravel(), images, captions, strict=False):
            axes.imshow(image.repeat(3, axis=-1) if image.shape[-1] == 1 else image, interpolation="nearest")
            axes.set_title(caption, fontsize=8.5, fontweight="normal", loc="center", pad=3)
    return figure


def write_error_page(folder: Path, images: np.ndarray, predictions: Predictions, rows: np.ndarray) -> Path | None:
    """Write errors.png: wrong predictions with the target's and the predicted name; nothing if there are none.

    Args:
        folder: the run's figures.
        images: uint8 [M, H, W, C], the images of `rows`.
        predictions: of the part that the rows are of.
        rows: int [M], wrong predictions, the most confident first.
    """
    if len(rows) == 0:
        return None
    labels, predicted = predictions.labels, predictions.predicted
    captions = [
        f"{labels[predictions.targets[row]]}\n→ {labels[predicted[row]]} {100 * predictions.probabilities[row].max():.0f} %"
        for row in rows
    ]
    return write_figure(
        draw_image_grid(images, captions),
        Path(folder) / "errors.png",
        title="The most confident errors: target → prediction and its probability",
        description=f"{len(rows)} images that were predicted wrongly: "
        + "; ".join(caption.replace("\n", " ") for caption in captions[:8]),
    )


def write_augmented_page(folder: Path, images: np.ndarray, names: Sequence[str]) -> Path:
    """Write augmented.png: training images as the network sees them, with their labels.

    Args:
        folder: the run's figures.
        images: uint8 [N, S, S, C], after augmentation.
        names: N names of labels.
    """
    return write_figure(
        draw_image_grid(images, names, columns=8),
        Path(folder) / "augmented.png",
        title="Training images as the network sees them, after augmentation",
        description=f"{len(images)} augmented training images of the classes {', '.join(sorted(set(names)))}.",
    )
