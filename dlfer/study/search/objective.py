"""The one seam between an engine that proposes and the trials that are run.

`objective(overrides, report) -> score`: an engine knows nothing of runs and processes, a trial nothing of
engines. The same overrides mean the same run: called again, the objective goes on with it, or answers at
once if it is done. So a search that was killed needs no memory but the engine's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dlfer.config.stage_section import StageConfig
from dlfer.errors import DlferError

Report = Callable[[int, float], bool]
"""Told after each epoch (epochs done, score so far); answers whether to go on. On resume the epochs that
were done before are told again."""


class Objective(Protocol):
    """What a search maximises, or minimises where the score is a loss."""

    def __call__(self, overrides: Mapping[str, object], report: Report) -> float:
        """Run the experiment with `overrides` set and return its validation figure.

        Raises:
            TrialFailed: the trial failed; the search goes on.
            TrainingStopped: the search was asked to stop; the trial stands at a checkpoint.
        """
        ...


class TrialFailed(DlferError):
    """A trial that gave no score.

    Attributes:
        kind: the class of what went wrong, e.g. "NonFiniteError".
        is_users: whether it is of the kind that the user must mend (a UserError).
    """

    def __init__(self, message: str, *, kind: str, is_users: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.is_users = is_users


def compute_trial_digest(overrides: Mapping[str, object]) -> str:
    """Return 12 hex digits that stand for the overrides, whatever their order."""
    text = json.dumps(dict(overrides), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def get_direction(figure: str) -> str:
    """Return "min" for a loss, "max" for the other validation figures."""
    return "min" if figure == "loss" else "max"


def compute_scores_so_far(history: Sequence[Mapping[str, float]], figure: str, stage: StageConfig) -> list[float]:
    """Return, for each epoch, the figure of the model that would be kept if training ended there.

    Args:
        history: rows of history.csv.
        figure: "accuracy", "macro_f1" or "loss", on validation.
        stage: which epoch it keeps: the last, or the best by its own monitored figure.
    """
    scores: list[float] = []
    kept = 0
    sign = -1 if stage.monitor == "loss" else 1
    for index, row in enumerate(history):
        monitored = f"validation_{stage.monitor}"
        if stage.keep == "last" or sign * (row[monitored] - history[kept][monitored]) > 0:
            kept = index
        scores.append(float(history[kept][f"validation_{figure}"]))
    return scores
