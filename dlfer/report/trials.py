"""The trials of a search: read from its files, ranked, and how much each key tells about the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlfer.config.load import load_recorded_experiment
from dlfer.errors import ModelError
from dlfer.metrics.curves import compute_midranks
from dlfer.report.page import read_json
from dlfer.runs.member_rows import MEMBERS_FILE, MemberRow, read_member_rows
from dlfer.runs.run import CONFIG_FILE

FORMER_TRIALS_FILE = "trials.json"


ALONE = "search"
"""Name of the arm of a search that has but one."""


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
    """Return the trials as a leaderboard: run to the end first, each by score; those without one last."""
    sign = 1 if direction == "min" else -1

    def place(ranked: RankedTrial) -> tuple:
        row = ranked.row
        return (row.score is None, row.status != "finished", 0 if row.score is None else sign * row.score)

    return sorted((RankedTrial(number, row) for number, row in enumerate(rows, start=1)), key=place)


FEWEST = 4
"""With fewer scores nothing is said."""
MOST_GROUPS = 4
"""Numbers with so many values or fewer are taken as groups."""


class Importance(NamedTuple):
    """What one key alone explains of the scores.

    Attributes:
        share: of the variance, in 0..1.
        chance: what chance alone would explain on average.
        adjusted: the share without that.
        n: number of trials.
    """

    share: float
    chance: float
    adjusted: float
    n: int


def compute_importance(settings: Sequence[Mapping[str, Any]], scores: Sequence[float], key: str) -> Importance | None:
    """Return the share of the scores' variance that one key alone explains, and what chance would.

    Numbers with more than four values: the squared correlation of the scores with a parabola in the key's
    ranks. Other values: the variance between groups over all variance (eta squared). Chance alone explains
    k / (n - 1) on average, k being the number of coefficients or groups less one; the adjusted share takes
    that away. Effects of two keys together are not seen.

    Args:
        settings: the keys of each trial that has a score; those without `key` are left out: a conditional
            key is judged among the trials in which it was searched.
        scores: of the trials.
        key: dotted.

    Returns:
        None with fewer than four scores, or where the key or the score never changed.
    """
    known = [(setting[key], score) for setting, score in zip(settings, scores, strict=True) if key in setting]
    values, y = [value for value, _ in known], np.array([score for _, score in known], dtype=float)
    num_distinct = len({repr(value) for value in values})
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    if len(y) < FEWEST or num_distinct < 2 or total <= 0:
        return None
    if num_distinct > MOST_GROUPS and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
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
