"""report.html of a search: leaderboard, parallel coordinates, what each key told, history."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlfer.config.load import load_recorded_experiment
from dlfer.errors import ModelError
from dlfer.metrics.importance import FEWEST, Importance, compute_importance
from dlfer.report.comparison import SPLITS, read_comparison, write_comparison_figures
from dlfer.report.figures import write_figure
from dlfer.report.keys import format_overrides, format_value, shorten_key
from dlfer.report.page import load_figures, read_json, render_page
from dlfer.report.record import describe_environment, describe_run, format_command, get_name, read_text
from dlfer.report.search_figures import draw_coordinates, draw_history, draw_importance
from dlfer.runs.comparison_record import ArmRow, ComparisonRecord
from dlfer.runs.member_rows import MEMBERS_FILE, MemberRow, read_member_rows
from dlfer.runs.records import RunRecord
from dlfer.runs.run import CONFIG_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMER_TRIALS_FILE = "trials.json"
ALONE = "search"
"""Name of the arm of a search that has but one."""
FIGURES = ("coordinates", "importance", "history")
STATES = {
    "finished": "finished",
    "rung": "ended with its rung",
    "pruned": "pruned",
    "failed": "failed",
    "running": "running",
    "waiting": "interrupted",
}


@dataclass(frozen=True)
class Trials:
    """The trials of a search.

    Attributes:
        objective: the validation metric that is the score.
        keys: dotted, of the space.
        arms: name -> its trials in the order in which they began.
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
    """A line of the leaderboard.

    Attributes:
        number: of the trial in the order of beginning, from 1.
        row: what members.csv says of it.
    """

    number: int
    row: MemberRow


class TrialLine(NamedTuple):
    """A line of the leaderboard as the page shows it; `link` is the address of the trial's report, or None."""

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
        ModelError: the folder is no search, or one of its files is damaged.
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
        "warnings": _collect_warnings(run),
        "figure": trials.objective,
        "arms": [_describe_arm(path, trials, name) for name in trials.arms],
        "fewest": FEWEST,
        "comparison": comparison,
        "splits": [split for split in SPLITS if comparison and any(row.get(split) for row in comparison.table)],
        "winners": [] if comparison is None else [_describe_winner(path, comparison, row) for row in comparison.table],
        "compared": load_figures(path / "figures", ("accuracies", "differences")) if comparison else {},
        "command": format_command(run),
        "environment": describe_environment(run),
        "config": read_text(path / "config.yaml"),
    }
    return render_page("search.html.j2", path / "report.html", context)


def read_trials(path: Path) -> Trials | None:
    """Return the trials of a search, also of one that an earlier version wrote; None where none has begun.

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
    arms: dict[str, list[MemberRow]] = {} if rows else {ALONE: []}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    return Trials(search.objective, list(search.space), arms)


def _upgrade_trials(path: Path, former: Mapping[str, Any]) -> Trials:
    """Return the trials of trials.json, which searches wrote before they wrote members.csv."""
    known = set(MemberRow.model_fields)
    try:
        arms = {
            arm["name"]: [
                MemberRow(
                    **{key: value for key, value in record.items() if key in known and value is not None},
                    arm=arm["name"],
                    path=str(path.parent / record["run"]) if record.get("run") else "",
                    settings=record["overrides"],
                )
                for record in arm["records"]
            ]
            for arm in former["arms"]
        }
        return Trials(former["figure"], list(former["keys"]), arms)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path / FORMER_TRIALS_FILE}: expected the trials of a search: {error}.") from None


def rank_trials(rows: Sequence[MemberRow], direction: str) -> list[RankedTrial]:
    """Return the trials as a leaderboard: run to the end first, each by score; those without one last."""
    sign = 1 if direction == "min" else -1

    def place(ranked: RankedTrial) -> tuple:
        row = ranked.row
        return (row.score is None, row.status != "finished", 0 if row.score is None else sign * row.score)

    return sorted((RankedTrial(number, row) for number, row in enumerate(rows, start=1)), key=place)


def _describe_arm(path: Path, trials: Trials, name: str) -> dict[str, Any]:
    rows, alone = trials.arms[name], name == ALONE
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
        "best_file": best_file if (path / best_file).exists() else None,
        "num_scored": len(scored),
        "num_failed": sum(row.status == "failed" for row in rows),
        "num_alike": _count_alike(ranked),
        "figures": _draw(path / "figures", "" if alone else f"{_slug(name)}-", trials, rows, importance),
        "seconds": sum(row.seconds or 0 for row in rows),
    }


class Winner(NamedTuple):
    """The winner of one arm: the keys that it sets, and (seed, address of its report or None) of each of its runs."""

    arm: str
    keys: str
    runs: list[tuple[int, str | None]]


def _describe_winner(path: Path, comparison: ComparisonRecord, row: ArmRow) -> Winner:
    overrides = (comparison.winners or {}).get(row.arm, {})
    keys = {key: value for key, value in overrides.items() if key not in ("pretrain", "experiment.seed")}
    runs = [(run.seed, _find_link(path, run.run)) for run in comparison.runs if run.arm == row.arm]
    return Winner(row.arm, format_overrides(keys), runs)


def _find_link(path: Path, run: str | None) -> str | None:
    """Return where the page of a trial's run stands, seen from that of the search; None: it has none."""
    if run is None:
        return None
    report = path.parent / run / "report.html"
    return Path(os.path.relpath(report, path)).as_posix() if report.exists() else None


def _describe_line(path: Path, ranked: RankedTrial, keys: Sequence[str]) -> TrialLine:
    row = ranked.row
    run = Path(row.path).name if row.path else None
    return TrialLine(
        number=ranked.number,
        score=row.score,
        low=row.low,
        high=row.high,
        epochs=row.epochs or 0,
        state=STATES[row.status],
        values=[format_value(row.settings[key]) if key in row.settings else "" for key in keys],
        seconds=row.seconds,
        run=run,
        link=_find_link(path, run),
        error=row.error.splitlines()[0][:300] if row.error else None,
    )


def _count_alike(ranked: Sequence[RankedTrial]) -> int:
    """Return how many finished trials besides the best have a score within the best one's interval."""
    best = ranked[0].row if ranked else None
    if best is None or best.low is None:
        return 0
    others = [one.row for one in ranked[1:]]
    return sum(
        row.status == "finished" and row.score is not None and best.low <= row.score <= best.high for row in others
    )


def _draw(
    folder: Path, prefix: str, trials: Trials, rows: Sequence[MemberRow], importance: Mapping[str, Importance | None]
) -> dict[str, dict | None]:
    """Draw what the trials of an arm allow, and return the figures ready for the page."""
    scored, keys = [row for row in rows if row.score is not None], list(importance)
    drawn: dict[str, tuple[Figure, str, str]] = {}
    name, direction = trials.objective, trials.direction
    if len(scored) > 1 and keys:
        drawn["coordinates"] = (
            draw_coordinates(scored, keys, name, direction),
            f"Each line is a trial: its keys, and on the right its validation {name}; strong lines are better, the orange one is the best",
            f"Parallel coordinates of {len(scored)} trials over {', '.join(keys)}.",
        )
    known = {key: value for key, value in importance.items() if value is not None}
    if known:
        shares = ", ".join(f"{key} {100 * value.share:.0f} %" for key, value in known.items())
        drawn["importance"] = (
            draw_importance(known),
            f"Share of the variance of {name} that each key alone explains; the tick is what chance would",
            f"Shares: {shares}.",
        )
    if scored:
        drawn["history"] = (
            draw_history(rows, name, direction),
            f"Validation {name} of each trial in the order of their beginning; the line is the best so far",
            f"{len(scored)} trials with a score, {len(rows) - len(scored)} without.",
        )
    for key, (figure, title, description) in drawn.items():
        write_figure(figure, folder / f"{prefix}{key}.png", title=title, description=description)
    loaded = load_figures(folder, [f"{prefix}{key}" for key in drawn])
    return {key: loaded.get(f"{prefix}{key}") for key in FIGURES}


def _collect_warnings(run: RunRecord) -> list[str]:
    if run.smoke:
        return ["Smoke search: two batches of at most eight images a stage. The figures mean nothing."]
    return []


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
