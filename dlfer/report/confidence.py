"""Figures of what a model's confidence is worth: whether it is right as often as it says, and what abstaining gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.report.figures import COLOURS, INK, LINES, MARKERS, PALE, SOFT, figure_style, new_figure
from dlfer.report.page import format_percent, format_uncertainty

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERSIONS = {"raw": "as the network gives it", "scaled": "after the temperature"}


def draw_reliability(calibration: Mapping[str, Any]) -> Figure:
    """Draw accuracy over confidence in bins of equally many images, as it is and after the temperature.

    Args:
        calibration: of a part of metrics.json, "raw" and "scaled" (or None).
    """
    shown = [name for name in VERSIONS if calibration.get(name)]
    with figure_style():
        figure = new_figure(4.5 * len(shown), 4.5)
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for number, (axes, name) in enumerate(zip(panels, shown, strict=True)):
            _draw_bins(axes, calibration[name]["reliability"], number)
            ece = calibration[name]["ece_equal_mass"]
            axes.set_title(VERSIONS[name].capitalize())
            text = (
                f"ECE {format_percent(ece['value'])}\n{format_uncertainty({key: ece[key] for key in ('low', 'high')})}"
            )
            axes.text(3, 97, text, va="top", fontsize=10)
            axes.set_xlabel("mean confidence (%)")
        panels[0].set_ylabel("accuracy (%)")
    return figure


def _draw_bins(axes: Axes, bins: list[Mapping[str, float]], number: int) -> None:
    """Draw each bin as a marker with Wilson's interval of its accuracy, beside the line of perfect calibration."""
    confidence, accuracy, low, high = (
        100 * np.array([row[key] for row in bins]) for key in ("confidence", "accuracy", "low", "high")
    )
    axes.plot([0, 100], [0, 100], color=SOFT, linestyle=":", linewidth=1.2, label="perfect calibration")
    axes.errorbar(
        confidence,
        accuracy,
        yerr=[accuracy - low, high - accuracy],
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


def draw_risk_coverage(selective: Mapping[str, Any], *, target_accuracy: float | None = None) -> Figure:
    """Draw the share of wrong answers over the share of images that are answered, and where the threshold lies.

    Args:
        selective: of a part of metrics.json, "curve" and "at_threshold" (or None).
        target_accuracy: what the threshold was chosen to reach.
    """
    coverage, risk = (100 * np.array([point[key] for point in selective["curve"]]) for key in ("coverage", "risk"))
    with figure_style():
        figure = new_figure(5.6, 4.1)
        axes = figure.subplots()
        axes.plot(coverage, risk, color=COLOURS[0], label="answers by falling confidence")
        low, high = (
            100 * np.array([point[key] for point in selective["curve"]], dtype=float) for key in ("low", "high")
        )
        axes.fill_between(coverage, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="95 % at each coverage")
        axes.axhline(risk[0], color=PALE, linestyle=":", linewidth=1.4, label=f"all answered: {risk[0]:.1f} % wrong")
        if target_accuracy is not None:
            aim = 100 * (1 - target_accuracy)
            axes.axhline(aim, color=SOFT, linestyle="--", linewidth=1, label=f"aimed at: {aim:.0f} % wrong")
        at = selective.get("at_threshold")
        if at and at["accuracy"]["value"] is not None:
            _mark_threshold(axes, at)
        axes.set_xlim(0, 101)
        axes.set_ylim(0, max(1.0, 1.3 * float(risk.max())))
        axes.set_xlabel("images answered (%)")
        axes.set_ylabel("wrong among the answered (%)")
        axes.legend(loc="upper left", fontsize=8.5)
    return figure


def _mark_threshold(axes: Axes, at: Mapping[str, Any]) -> None:
    place, wrong = 100 * at["coverage"]["value"], 100 * (1 - at["accuracy"]["value"])
    spans = [[100 * (1 - at["accuracy"][key])] for key in ("high", "low")]
    axes.errorbar(
        [place],
        [wrong],
        yerr=[[wrong - spans[0][0]], [spans[1][0] - wrong]],
        color=COLOURS[1],
        marker=MARKERS[1],
        markersize=8,
        capsize=4,
        linestyle="none",
        label=f"confidence of {at['threshold']:.2f} or more: {place:.0f} % answered, {wrong:.1f} % wrong",
    )
    axes.annotate(f"{at['threshold']:.2f}", (place, wrong), (7, -14), textcoords="offset points", color=INK)
