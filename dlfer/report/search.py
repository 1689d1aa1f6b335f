"""Reading and ranking of the trials of a search, and its report.html.

The page has a leaderboard, parallel coordinates, the importance of each key for the score, and the history.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlfer.config.load import load_recorded_experiment
from dlfer.errors import ModelError, shorten
from dlfer.metrics.curves import compute_midranks
from dlfer.report.comparison import SPLITS, read_comparison, write_comparison_figures
from dlfer.report.figures import COLOURS, INK, SOFT, NamedFigure, figure_style, new_figure, write_figures
from dlfer.report.page import (
    describe_environment,
    describe_run,
    format_command,
    format_overrides,
    format_value,
    get_name,
    load_figures,
    read_json,
    read_text,
    render_page,
    shorten_key,
)
from dlfer.runs.comparison_record import ArmRow, ComparisonRecord
from dlfer.runs.member_rows import MEMBERS_FILE, MemberRow, read_member_rows
from dlfer.runs.records import RunRecord
from dlfer.runs.run import CONFIG_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FIGURES = ("coordinates", "importance", "history")
_SMOKE = "Smoke search: two batches of at most eight images per stage. The values are meaningless."
STATES = {
    "finished": "finished",
    "rung": "ended with its rung",
    "pruned": "pruned",
    "failed": "failed",
    "running": "running",
    "waiting": "interrupted",
}


class TrialLine(NamedTuple):
    """A row of the leaderboard on the page; `link` is the relative address of the trial's report, or None."""

    number: int
    score: float | None
    low: float | None
    high: float | None
    epochs: int
    state: str
    values: list[str]
    seconds: float | None
    run: str | None
    link: str | None
    error: str | None


def write_search_report(path: Path) -> Path:
    """Draw the figures of a search and write its report.html; return the page's path.

    Args:
        path: a search's directory with run.json, config.yaml and members.csv; comparison.json where the winners were
            compared.

    Raises:
        ModelError: the folder is not that of a search, or one of its files is damaged.
    """
    path = Path(path)
    run, trials = RunRecord.read(path), read_trials(path)
    if run is None or trials is None:
        missing = "run.json" if run is None else MEMBERS_FILE
        raise ModelError(f"{path}: found no {missing}; expected the directory of a search that has begun.")
    comparison = read_comparison(path)
    if comparison is not None:
        write_comparison_figures(path, comparison, [])
    context = {
        "name": get_name(path, run),
        "subtitle": describe_run(path, run),
        "warnings": [*([_SMOKE] if run.smoke else []), *run.warnings, *_describe_changes(path, trials)],
        "figure": _name_objective(trials.objective),
        "arms": [_describe_arm(path, trials, name) for name in trials.arms],
        "fewest": MIN_SCORES,
        "comparison": comparison,
        "splits": [split for split in SPLITS if comparison and any(row.get(split) for row in comparison.table)],
        "winners": [] if comparison is None else [_describe_winner(path, comparison, row) for row in comparison.table],
        "compared": load_figures(path / "figures", ("accuracies", "differences")) if comparison else {},
        "command": format_command(run),
        "environment": describe_environment(run),
        "config": read_text(path / "config.yaml"),
    }
    return render_page("search.html.j2", path / "report.html", context)


def _name_objective(objective: str) -> str:
    """Return the display name of an objective, e.g. "macro F1" for macro_f1."""
    return "macro F1" if objective == "macro_f1" else objective


def _describe_changes(path: Path, trials: Trials) -> list[str]:
    """Return a sentence for each time a trial was continued with other data or software by --accept-changes."""
    sentences = []
    for row in (row for rows in trials.arms.values() for row in rows):
        folder = row.find_folder(path)
        record = None if folder is None else RunRecord.read(folder)
        for change in () if record is None else record.changes:
            listed = "; ".join(change.differences)
            sentences.append(
                f"{folder.name} went on by --accept-changes ({change.time}) with other data or software: {listed}."
            )
    return sentences


def _describe_arm(path: Path, trials: Trials, name: str) -> dict[str, Any]:
    rows, alone = trials.arms[name], name == SINGLE_ARM
    ranked = rank_trials(rows, trials.direction)
    scored = [row for row in rows if row.score is not None]
    keys = [key for key in trials.keys if any(key in row.settings for row in rows)]
    settings, scores = [row.settings for row in scored], [row.score for row in scored]
    importance = {key: compute_importance(settings, scores, key) for key in keys}
    best_file = "best.yaml" if alone else f"best-{_slug(name)}.yaml"
    lines = [_describe_line(path, one, keys) for one in ranked]
    return {
        "name": None if alone else name,
        "keys": [shorten_key(key, keys) for key in keys],
        "rows": lines,
        "best": lines[0] if lines and lines[0].score is not None else None,
        "best_file": shlex.quote(str(path / best_file)) if os.path.exists(path / best_file) else None,
        "num_scored": len(scored),
        "num_failed": sum(row.status == "failed" for row in rows),
        "num_within_interval": _count_within_interval(ranked),
        "figures": _draw(path / "figures", "" if alone else f"{_slug(name)}-", trials, rows, importance),
        "seconds": sum(row.seconds or 0 for row in rows),
    }


class Winner(NamedTuple):
    """The winner of one arm: its settings, and (seed, relative address of the report or None) of each of its runs."""

    arm: str
    keys: str
    runs: list[tuple[int, str | None]]


def _describe_winner(path: Path, comparison: ComparisonRecord, row: ArmRow) -> Winner:
    overrides = (comparison.winners or {}).get(row.arm, {})
    keys = {key: value for key, value in overrides.items() if key not in ("pretrain", "experiment.seed")}
    runs = [(run.seed, _find_link(path, run.run)) for run in comparison.runs if run.arm == row.arm]
    return Winner(row.arm, format_overrides(keys), runs)


def _find_link(path: Path, run: str | None) -> str | None:
    """Return the address of a run's report.html relative to the search's folder; None if there is no report."""
    if run is None:
        return None
    report = path.parent / run / "report.html"
    return Path(os.path.relpath(report, path)).as_posix() if os.path.exists(report) else None


def _describe_line(path: Path, ranked: RankedTrial, keys: Sequence[str]) -> TrialLine:
    row = ranked.row
    run = Path(row.path).name if row.path else None
    return TrialLine(
        number=ranked.number,
        score=row.score,
        low=row.low,
        high=row.high,
        epochs=row.epochs or 0,
        state=STATES.get(row.status, row.status),
        values=[format_value(row.settings[key]) if key in row.settings else "" for key in keys],
        seconds=row.seconds,
        run=run,
        link=_find_link(path, run),
        error=shorten(row.error.splitlines()[0]) if row.error else None,
    )


def _count_within_interval(ranked: Sequence[RankedTrial]) -> int:
    """Return the number of other finished trials with a score within the 95 % interval of the best one."""
    best = ranked[0].row if ranked else None
    if best is None or best.low is None:
        return 0
    # An engine may propose the same settings twice; both trials then have the same run, which counts once.
    others = list({one.row.path: one.row for one in ranked[1:] if one.row.path != best.path}.values())
    return sum(
        row.status == "finished" and row.score is not None and best.low <= row.score <= best.high for row in others
    )


def _draw(
    folder: Path, prefix: str, trials: Trials, rows: Sequence[MemberRow], importance: Mapping[str, Importance | None]
) -> dict[str, dict | None]:
    """Draw the figures that the trials of an arm allow; return them by the names of `FIGURES`, encoded for the page."""
    scored, keys = [row for row in rows if row.score is not None], list(importance)
    drawn: list[NamedFigure] = []
    name, direction = _name_objective(trials.objective), trials.direction
    if len(scored) > 1 and keys:
        title = (
            f"Each line is a trial: its keys, and its validation {name}; strong lines are better, the "
            "orange one is the best"
        )
        text = f"Parallel coordinates of {len(scored)} trials over {', '.join(keys)}."
        drawn.append(NamedFigure(f"{prefix}coordinates", draw_coordinates(scored, keys, name, direction), title, text))
    known = {key: value for key, value in importance.items() if value is not None}
    if known:
        shares = ", ".join(f"{key} {100 * value.share:.0f} %" for key, value in known.items())
        title = (
            f"Share of the variance of {name} that each key alone explains; the tick marks what chance would explain"
        )
        drawn.append(NamedFigure(f"{prefix}importance", draw_importance(known), title, f"Shares: {shares}."))
    if scored:
        title = f"Validation {name} of each trial in order of start; the line is the best so far"
        text = f"{len(scored)} trials with a score, {len(rows) - len(scored)} without."
        drawn.append(NamedFigure(f"{prefix}history", draw_history(rows, name, direction), title, text))
    write_figures(folder, drawn)
    loaded = load_figures(folder, [one.name for one in drawn])
    return {key: loaded.get(f"{prefix}{key}") for key in FIGURES}


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())[:80]


_MAX_CATEGORIES = 6
_KEYS_PER_ROW = 6
"""Maximum number of keys in one row of parallel coordinates."""


def draw_coordinates(trials: Sequence[MemberRow], keys: Sequence[str], name: str, direction: str) -> Figure:
    """Draw parallel coordinates: a vertical axis for each key and one for the score, and a line for each trial.

    More than six keys are split into several rows, each of which ends with the score.

    Args:
        trials: the trials with a score.
        keys: dotted keys of the search space; the line of a trial that does not set a key passes below its axis.
        name: display name of the score.
        direction: "min" or "max".
    """
    score_axis = _Axis([float(trial.score) for trial in trials], flip=direction == "min")
    score_title = f"{name}\n({'less' if direction == 'min' else 'more'} is better)"
    # The first trial of the leaderboard is drawn last.
    order = [ranked.number - 1 for ranked in reversed(rank_trials(trials, direction))]
    rows = np.array_split(np.array(keys, dtype=object), math.ceil(len(keys) / _KEYS_PER_ROW))
    with figure_style():
        figure = new_figure(max(6.0, 1.6 * (len(rows[0]) + 1)), 4.2 * len(rows))
        for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
            drawn = [_Axis([trial.settings.get(key) for trial in trials]) for key in row]
            _draw_lines(axes, [*drawn, score_axis], order)
            _draw_axes(axes, [*drawn, score_axis], [*(shorten_key(key, keys) for key in row), score_title])
    return figure


def _draw_lines(axes: Axes, upright: Sequence[_Axis], order: Sequence[int]) -> None:
    """Draw a line for each trial in `order`, from the worst (faint) to the best (orange, on top)."""
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


def _draw_axes(axes: Axes, upright: Sequence[_Axis], titles: Sequence[str]) -> None:
    """Draw the vertical axes with their ticks and titles, and hide everything else."""
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
    """Draw each key's share of the variance as a bar, with a tick at the share that chance alone would explain."""
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
    """Draw the scores of the trials in order, failed trials as crosses, and the best score so far as a line."""
    better = np.minimum if direction == "min" else np.maximum
    scored = [(number, trial) for number, trial in enumerate(trials, start=1) if trial.score is not None]
    scores = [trial.score for _, trial in scored]
    # As in the leaderboard, a trial that ended early is the best only if no other has a score.
    ranked = [(number, trial.score) for number, trial in scored if trial.status == "finished"]
    places, values = zip(*ranked or [(number, trial.score) for number, trial in scored], strict=True)
    best = places, better.accumulate(np.array(values, dtype=float))
    with figure_style():
        figure = new_figure(8, 3.4)
        axes = figure.subplots()
        axes.step(*best, where="post", color=COLOURS[1], linewidth=1.6, label="best so far")
        for whole, marker, label in ((True, "o", "run to the end"), (False, "v", "ended early")):
            some = [(number, trial.score) for number, trial in scored if (trial.status == "finished") == whole]
            if some:
                axes.plot(*zip(*some, strict=True), marker, color=COLOURS[0], markersize=6, label=label)
        failed = [number for number, trial in enumerate(trials, start=1) if trial.status == "failed"]
        if failed:
            axes.plot(
                failed,
                [max(scores) if direction == "min" else min(scores)] * len(failed),
                "x",
                color=SOFT,
                markersize=7,
                label="failed",
            )
        axes.set_xlabel("trial")
        axes.set_ylabel(f"validation {name}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper left", ncols=4)
    return figure


class _Axis:
    """A vertical axis of 0..1: many numbers are scaled (over a wide range by logarithm), other values evenly spaced.

    Attributes:
        positions: the position of each value; -0.12 for None, a key that the trial does not set.
        ticks: (position, text) pairs.
    """

    def __init__(self, values: Sequence[Any], *, flip: bool = False) -> None:
        known = [value for value in values if value is not None]
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
        distinct = {repr(value): value for value in known}
        if is_number and len(distinct) > _MAX_CATEGORIES:
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


FORMER_TRIALS_FILE = "trials.json"


SINGLE_ARM = "search"
"""Name of the arm of a search with only one arm."""


@dataclass(frozen=True)
class Trials:
    """The trials of a search.

    Attributes:
        objective: the validation metric that is the score.
        keys: dotted keys of the search space.
        arms: name -> its trials in the order of their start.
    """

    objective: str
    keys: list[str]
    arms: dict[str, list[MemberRow]]

    @property
    def direction(self) -> str:
        """ "min" for a loss, "max" for the other metrics."""
        return "min" if self.objective == "loss" else "max"


@dataclass(frozen=True)
class RankedTrial:
    """A trial on the leaderboard.

    Attributes:
        number: of the trial in the order of start, from 1.
        row: the trial's row of members.csv.
    """

    number: int
    row: MemberRow


def read_trials(path: Path) -> Trials | None:
    """Return the trials of a search, including one of an earlier version; None if the folder has no started search.

    Raises:
        ModelError: a file is damaged.
    """
    former = read_json(path / FORMER_TRIALS_FILE)
    if former is not None:
        return _upgrade_trials(path, former)
    if not (path / MEMBERS_FILE).exists() or not (path / CONFIG_FILE).is_file():
        return None
    search = load_recorded_experiment(path / CONFIG_FILE).search
    if search is None:
        return None
    rows = [row for row in read_member_rows(path) if row.trial is not None]
    arms: dict[str, list[MemberRow]] = {} if rows else {SINGLE_ARM: []}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    return Trials(search.objective, list(search.space), arms)


def _upgrade_trials(path: Path, former: Mapping[str, Any]) -> Trials:
    """Convert the contents of trials.json, the predecessor of members.csv, to trials."""
    known = set(MemberRow.model_fields)
    try:
        arms = {
            arm["name"]: [
                MemberRow(
                    **{
                        **{key: value for key, value in record.items() if key in known and value is not None},
                        "arm": arm["name"],
                        "path": str(path.parent / record["run"]) if record.get("run") else "",
                        "settings": record["overrides"],
                    }
                )
                for record in arm["records"]
            ]
            for arm in former["arms"]
        }
        return Trials(former["figure"], list(former["keys"]), arms)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path / FORMER_TRIALS_FILE}: expected the trials of a search: {error}.") from None


def rank_trials(rows: Sequence[MemberRow], direction: str) -> list[RankedTrial]:
    """Return the leaderboard: finished trials by score, then the others by score, then those without a score."""
    sign = 1 if direction == "min" else -1

    def place(ranked: RankedTrial) -> tuple:
        row = ranked.row
        return (row.score is None, row.status != "finished", 0 if row.score is None else sign * row.score)

    return sorted((RankedTrial(number, row) for number, row in enumerate(rows, start=1)), key=place)


MIN_SCORES = 4
"""Minimum number of scores for which importance is computed."""
MAX_GROUPS = 4
"""Numeric keys with at most this many distinct values are treated as categories."""


class Importance(NamedTuple):
    """How much of the scores' variance one key alone explains.

    Attributes:
        share: the explained share of the variance, in 0..1.
        chance: the expected share by chance alone.
        adjusted: the share corrected for chance: (share - chance) / (1 - chance), at least 0.
        n: number of trials.
    """

    share: float
    chance: float
    adjusted: float
    n: int


def compute_importance(settings: Sequence[Mapping[str, Any]], scores: Sequence[float], key: str) -> Importance | None:
    """Return the share of the scores' variance that one key alone explains, and the share expected by chance.

    For numbers with more than four distinct values it is the R squared of a parabola in the key's ranks, for other
    values the between-group share of the variance (eta squared). Chance alone explains k / (n - 1) on average, where
    k is the number of coefficients or groups minus one; the adjusted share corrects for that. Interactions between
    keys are not measured.

    Args:
        settings: the settings of each trial with a score. Trials without `key` are left out, so that a conditional
            key is evaluated on the trials that searched it.
        scores: of the trials.
        key: a dotted key.

    Returns:
        None with fewer than four scores, or if the key or the score is constant.
    """
    known = [(setting[key], score) for setting, score in zip(settings, scores, strict=True) if key in setting]
    values, y = [value for value, _ in known], np.array([score for _, score in known], dtype=float)
    num_distinct = len({repr(value) for value in values})
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    if len(y) < MIN_SCORES or num_distinct < 2 or total <= 0:
        return None
    if num_distinct > MAX_GROUPS and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        fitted, num_free = _fit_parabola(np.asarray(values, dtype=float), y), 2
    else:
        fitted, num_free = _fit_groups([repr(value) for value in values], y), num_distinct - 1
    share = min(1.0, max(0.0, 1 - float(((y - fitted) ** 2).sum()) / total))
    chance = min(1.0, num_free / (len(y) - 1))
    adjusted = 0.0 if chance >= 1 else max(0.0, (share - chance) / (1 - chance))
    return Importance(share, chance, adjusted, len(y))


def _fit_groups(names: Sequence[str], y: np.ndarray) -> np.ndarray:
    """Return the mean of each row's group."""
    array = np.array(names)
    fitted = np.empty_like(y)
    for name in set(names):
        fitted[array == name] = y[array == name].mean()
    return fitted


def _fit_parabola(values: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the least-squares fit by a parabola in the ranks, scaled to -1..1."""
    ranks = 2 * (compute_midranks(values) - 1) / (len(values) - 1) - 1
    design = np.stack([np.ones_like(ranks), ranks, ranks**2], axis=1)
    return design @ np.linalg.lstsq(design, y, rcond=None)[0]
