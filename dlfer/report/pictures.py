"""Confusion matrices, and pages of images: errors, common confusions, and augmented training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.metrics.predictions import Predictions
from dlfer.report.figures import (
    INK,
    MAX_LABELS,
    figure_style,
    new_canvas,
    new_figure,
    place_image,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_COLUMN, _IMAGE, _GAP, _LINE = 1.5, 1.36, 0.07, 0.165
"""Layout of a page of images, in inches: column width, side of an image, gap, and height of a line of text."""


def draw_confusion(confusion: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw a confusion matrix coloured by row percentages; up to 12 labels, cells also show percent and count.

    Args:
        confusion: int [C, C], rows are targets.
        labels: names of the C classes.
    """
    small = len(labels) > MAX_LABELS
    side = 10.0 if small else 2.2 + 0.45 * max(len(labels), 4)
    size = 5 if len(labels) > 40 else 8
    with figure_style():
        figure = new_figure(side, side * 0.96)
        axes = figure.subplots()
        image, shares = show_confusion(axes, confusion)
        counts = zip(labels, confusion.sum(axis=1), strict=True)
        rows = list(labels) if small else [f"{label}\nn = {n:,}" for label, n in counts]
        axes.set_xticks(range(len(labels)), labels, rotation=90 if small else 40, ha="right", fontsize=size)
        axes.set_yticks(range(len(labels)), rows, fontsize=size)
        if not small:
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
        axes.set_xlabel("predicted")
        axes.set_ylabel("target")
        if small:
            bar = figure.colorbar(image, ax=axes, shrink=0.6, label="percent of the target's images")
            bar.outline.set_visible(False)
            return figure
        for row, column in np.ndindex(*confusion.shape):
            text = f"{100 * shares[row, column]:.0f} %\n{confusion[row, column]:,}"
            colour = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=7, linespacing=1.15, color=colour)
    return figure


def show_confusion(axes: Axes, confusion: np.ndarray) -> tuple[AxesImage, np.ndarray]:
    """Plot a row-normalised confusion matrix as colours; return the image and the shares (float64 [C, C], 0..1)."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image, shares


def draw_image_grid(images: np.ndarray, captions: Sequence[str], *, columns: int = 6) -> Figure:
    """Draw images in rows, each with its caption.

    Args:
        images: uint8 [N, H, W, C], C is 1 or 3.
        captions: N short texts, one or two lines.
        columns: images in a row.
    """
    num_rows = max(1, math.ceil(len(images) / columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    height = _IMAGE + _GAP + _LINE * lines
    with figure_style():
        figure, axes = new_canvas(_COLUMN * columns, num_rows * height + _GAP)
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            row, column = divmod(number, columns)
            _show_image(axes, image, caption, left=_COLUMN * column + _GAP, top=(row + 1) * height - _IMAGE)
    return figure


def write_error_page(folder: Path, images: np.ndarray, predictions: Predictions, rows: np.ndarray) -> Path | None:
    """Write errors.png: wrong predictions with target and predicted label; return None if there are none.

    `images` are uint8 [M, H, W, C], one for each of `rows` (int [M]): the wrong predictions, most confident first.
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


def find_confusions(predictions: Predictions, *, limit: int = 3, each: int = 6) -> list[np.ndarray]:
    """Return the rows (int [<=each]) of each of the most common (target, prediction) errors, most confident first."""
    wrong = np.flatnonzero(~predictions.correct)
    pairs = predictions.targets[wrong] * len(predictions.labels) + predictions.predicted[wrong]
    kinds, counts = np.unique(pairs, return_counts=True)
    confidences = predictions.probabilities[wrong].max(axis=1)
    found = []
    for kind in kinds[np.argsort(-counts, kind="stable")][:limit]:
        rows, sure = wrong[pairs == kind], confidences[pairs == kind]
        found.append(rows[np.argsort(-sure, kind="stable")][:each])
    return found


def write_confusion_page(folder: Path, images: np.ndarray, predictions: Predictions) -> Path | None:
    """Write confusions.png: up to six images of each of the three most common confusions; return None without errors.

    `images` are uint8 [N, H, W, C], one for each row of `predictions`; `folder` is that of the run's figures.
    """
    found = find_confusions(predictions)
    if not found:
        return None
    targets, predicted = predictions.targets, predictions.predicted
    headings, captions, texts = [], [], []
    for rows in found:
        target, answer = targets[rows[0]], predicted[rows[0]]
        count, total = int(np.sum((targets == target) & (predicted == answer))), int(np.sum(targets == target))
        headings.append(
            f"{predictions.labels[target]} → {predictions.labels[answer]}: {count:,} image{'' if count == 1 else 's'}, "
            f"{100 * count / total:.0f} % of {predictions.labels[target]}"
        )
        captions.append([f"{100 * predictions.probabilities[row].max():.0f} %" for row in rows])
        texts.append(f"{headings[-1]}; shown with the probabilities {', '.join(captions[-1])}")
    return write_figure(
        _draw_confused_images([images[rows] for rows in found], headings, captions),
        Path(folder) / "confusions.png",
        title="The most common confusions, target → prediction, with the most confident images of each",
        description=f"Images of the most common confusions. {'. '.join(texts)}.",
    )


def _draw_confused_images(
    groups: Sequence[np.ndarray], headings: Sequence[str], captions: Sequence[list[str]]
) -> Figure:
    """Draw a row of captioned images below each heading."""
    columns, height = max(len(images) for images in groups), 2.0
    with figure_style():
        figure, axes = new_canvas(max(_COLUMN * columns, 5.0), height * len(groups))
        for number, (images, heading, texts) in enumerate(zip(groups, headings, captions, strict=True)):
            axes.text(_GAP, number * height + 0.3, heading, fontsize=10.5, fontweight="bold")
            for column, (image, text) in enumerate(zip(images, texts, strict=True)):
                _show_image(axes, image, text, left=_COLUMN * column + _GAP, top=(number + 1) * height - _IMAGE - _GAP)
    return figure


def _show_image(axes: Axes, image: np.ndarray, caption: str, *, left: float, top: float) -> None:
    """Draw an image with its caption above it, at a position on the canvas in inches."""
    place_image(axes, image, left=left, top=top, side=_IMAGE)
    axes.text(left + _IMAGE / 2, top - 0.04, caption, fontsize=8.5, ha="center", va="bottom")


def write_augmented_page(folder: Path, images: np.ndarray, names: Sequence[str]) -> Path:
    """Write augmented.png: augmented training images (uint8 [N, S, S, C]) with their N labels."""
    return write_figure(
        draw_image_grid(images, names, columns=8),
        Path(folder) / "augmented.png",
        title="Training images as the network sees them, after augmentation",
        description=f"{len(images)} augmented training images of the classes {', '.join(sorted(set(names)))}.",
    )
