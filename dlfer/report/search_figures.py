"""The figures of a search: parallel coordinates, importance of the keys, history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.metrics.importance import Importance
from dlfer.report.figures import COLOURS, figure_style, new_figure
from dlfer.report.keys import format_value, shorten_key
from dlfer.runs.member_rows import MemberRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT = "#1c2430", "#5f6b76"
_FEW = 6
_ABREAST = 6
"""So many keys stand side by side."""


def draw_coordinates(trials: Sequence[MemberRow], keys: Sequence[str], name: str, direction: str) -> Figure:
    """Draw an upright axis for each key and one for the score, and a line for each trial.

    Of more keys than fit side by side (six) there are several rows, each with the score at its end.

    Args:
        trials: those with a score.
        keys: dotted, of the space; a trial in which one is not searched passes below its axis.
        name: of the score.
        direction: "min" or "max".
    """
    score_axis = _Axis([float(trial.score) for trial in trials], flip=direction == "min")
    score_title = f"{name}\n({'less' if direction == 'min' else 'more'} is better)"
    # The best is drawn last, and of equals the first counts as the best.
    scores = np.array([trial.score for trial in trials], dtype=float)
    order = np.argsort(-scores if direction == "max" else scores, kind="stable")[::-1]
    rows = np.array_split(np.array(keys, dtype=object), math.ceil(len(keys) / _ABREAST))
    with figure_style():
        figure = new_figure(max(6.0, 1.6 * (len(rows[0]) + 1)), 4.2 * len(rows))
        for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
            drawn = [_Axis([trial.settings.get(key) for trial in trials]) for key in row]
            _draw_lines(axes, [*drawn, score_axis], order)
            _dress(axes, [*drawn, score_axis], [*(shorten_key(key, keys) for key in row), score_title])
    return figure


def _draw_lines(axes: Axes, upright: Sequence[_Axis], order: Sequence[int]) -> None:
    """Draw a line for each trial, the worst first and faint, the best last and orange."""
    from matplotlib import colormaps

    for rank, index in enumerate(order):
        part = rank / max(1, len(order) - 1)
        is_best = rank == len(order) - 1
        axes.plot(
            range(len(upright)),
            [axis.positions[index] for axis in upright],
            color=COLOURS[1] if is_best else colormaps["Blues"](0.25 + 0.7 * part),
            linewidth=2.6 if is_best else 0.8 + 0.9 * part,
            zorder=2 + part,
        )


def _dress(axes: Axes, upright: Sequence[_Axis], titles: Sequence[str]) -> None:
    """Draw the upright axes with their values and titles, and nothing else."""
    for place, axis in enumerate(upright):
        axes.plot([place, place], [0, 1], color=INK, linewidth=1, zorder=4)
        for position, text in axis.ticks:
            axes.annotate(
                text,
                (place, position),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                zorder=5,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
            )
    axes.set_xticks(range(len(titles)), titles)
    axes.set_xlim(-0.15, len(titles) - 1 + 0.45)
    axes.set_ylim(-0.16, 1.06)
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(axis="x", length=0)


def draw_importance(importance: Mapping[str, Importance]) -> Figure:
    """Draw the share of each key as a bar, with a tick at what chance alone would explain."""
    keys = sorted(importance, key=lambda key: importance[key].share)
    with figure_style():
        figure = new_figure(6.5, 1.2 + 0.42 * len(keys))
        axes = figure.subplots()
        for place, key in enumerate(keys):
            share, chance = 100 * importance[key].share, 100 * importance[key].chance
            axes.barh(place, share, 0.6, color=COLOURS[0] if share > chance else "#b9c3cc")
            axes.plot([chance, chance], [place - 0.36, place + 0.36], color=INK, linewidth=2)
            axes.text(max(share, chance) + 1.5, place, f"{share:.0f}", va="center", fontsize=9)
        axes.set_yticks(range(len(keys)), [shorten_key(key, keys) for key in keys])
        axes.set_xlim(0, 108)
        axes.set_xlabel("share of the variance (%)")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def draw_history(trials: Sequence[MemberRow], name: str, direction: str) -> Figure:
    """Draw the score of each trial in order, those that failed as crosses, and the best so far as a line."""
    better = np.minimum if direction == "min" else np.maximum
    scored = [(number, trial) for number, trial in enumerate(trials, start=1) if trial.score is not None]
    places = [number for number, _ in scored]
    scores = np.array([trial.score for _, trial in scored], dtype=float)
    with figure_style():
        figure = new_figure(8, 3.4)
        axes = figure.subplots()
        axes.step(places, better.accumulate(scores), where="post", color=COLOURS[1], linewidth=1.6, label="best so far")
        for whole, marker, label in ((True, "o", "run to the end"), (False, "v", "ended early")):
            some = [(number, trial.score) for number, trial in scored if (trial.status == "finished") == whole]
            if some:
                axes.plot(*zip(*some, strict=True), marker, color=COLOURS[0], markersize=6, label=label)
        failed = [number for number, trial in enumerate(trials, start=1) if trial.status == "failed"]
        if failed:
            axes.plot(failed, [scores.min()] * len(failed), "x", color=SOFT, markersize=7, label="failed")
        axes.set_xlabel("trial")
        axes.set_ylabel(f"validation {name}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper left", ncols=4)
    return figure


class _Axis:
    """Places values on 0..1; numbers over a wide range by their logarithm, few or other values side by side.

    Attributes:
        positions: of each value; -0.12 for None, which stands for not searched.
        ticks: (position, text).
    """

    def __init__(self, values: Sequence[Any], *, flip: bool = False) -> None:
        known = [value for value in values if value is not None]
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
        distinct = {repr(value): value for value in known}
        if is_number and len(distinct) > _FEW:
            low, high = min(known), max(known)
            is_log = low > 0 and high / low >= 20
            scale = math.log if is_log else float
            span = scale(high) - scale(low) or 1.0
            middle = math.sqrt(low * high) if is_log else (low + high) / 2
            place = {repr(value): (scale(value) - scale(low)) / span for value in known}
            ticks = [(0.0, low), (0.5, middle), (1.0, high)]
        else:
            ordered = sorted(distinct.values()) if is_number else list(distinct.values())
            places = [0.5] if len(ordered) == 1 else [n / (len(ordered) - 1) for n in range(len(ordered))]
            place = {repr(value): at for at, value in zip(places, ordered, strict=True)}
            ticks = list(zip(places, ordered, strict=True))
        self.positions = [-0.12 if value is None else abs(flip - place[repr(value)]) for value in values]
        self.ticks = [(abs(flip - at), format_value(value)) for at, value in ticks]
        if None in values:
            self.ticks.append((-0.12, "–"))
