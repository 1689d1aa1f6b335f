"""What a search asks of an engine: the space as ordered dimensions, what scores a trial, whether two experiments are the same."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlfer.config.keys import find_annotation, get_alternatives, split_key
from dlfer.config.schema import ExperimentConfig, SearchConfig, StageConfig
from dlfer.config.variations import list_ancestors
from dlfer.errors import ConfigError
from dlfer.report.page import format_value
from dlfer.runs.changes import list_differences
from dlfer.runs.member_rows import MemberRow

_GRID_POINTS = 10
_DIGITS = 6


@dataclass(frozen=True)
class Dimension:
    """One key of the space.

    Attributes:
        key: dotted.
        kind: "log", "between" or "choice".
        is_int: whether its values are whole numbers.
        low, high, step: of log and between; step None: continuous.
        choices: of choice.
        when: key -> values under which this one is searched; all must hold.
    """

    key: str
    kind: str
    is_int: bool = False
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, list[Any]] = field(default_factory=dict)

    def tidy(self, value: float) -> Any:
        """Return a number of the range as it is written in a trial: whole, or of six digits, within the ends."""
        if self.is_int:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        """Return the key and its range in words: "rate: 0.0001 to 0.005, log"."""
        if self.kind == "choice":
            text = f"{self.key}: {', '.join(format_value(choice) for choice in self.choices)}"
        else:
            text = f"{self.key}: {self.low:g} to {self.high:g}" + (", log" if self.kind == "log" else "")
            text += f", step {self.step:g}" if self.step is not None else ""
        conditions = [f"{key} is {' or '.join(map(format_value, values))}" for key, values in self.when.items()]
        return text + (f" (where {' and '.join(conditions)})" if conditions else "")

    def list_points(self) -> list[Any]:
        """Return the values that a grid takes: the choices, the steps, or ten points from end to end."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is not None or (self.is_int and self.kind == "between"):
            step = self.step or 1
            count = int((self.high - self.low) / step + 1e-9) + 1
            points = [self.low + index * step for index in range(count)]
        else:
            parts = [index / (_GRID_POINTS - 1) for index in range(_GRID_POINTS)]
            if self.kind == "log":
                points = [self.low * (self.high / self.low) ** part for part in parts]
            else:
                points = [self.low + (self.high - self.low) * part for part in parts]
        return list(dict.fromkeys(self.tidy(round(point) if self.is_int else point) for point in points))


def list_dimensions(search: SearchConfig) -> list[Dimension]:
    """Return the space in the file's order, but each key after those that its condition names."""
    ordered: list[str] = []
    for key in search.space:
        for name in [*reversed(list_ancestors(search.space, key)), key]:
            if name not in ordered:
                ordered.append(name)
    return [_read_dimension(key, search.space[key]) for key in ordered]


def is_active(dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
    """Return whether a dimension is searched in a trial whose keys so far are `chosen`."""
    return all(parent in chosen and chosen[parent] in values for parent, values in dimension.when.items())


def _read_dimension(key: str, spec: Mapping[str, Any]) -> Dimension:
    when = spec.get("when", {})
    if "choice" in spec:
        return Dimension(key, "choice", choices=tuple(spec["choice"]), when=when)
    kind = "log" if "log" in spec else "between"
    low, high = spec[kind]
    alternatives = get_alternatives(find_annotation(split_key(key)))
    is_int = int in alternatives and float not in alternatives
    return Dimension(key, kind, is_int, low, high, spec.get("step"), when=when)


DEFAULT_TRIALS = 10


@dataclass(frozen=True)
class Proposal:
    """A trial to be run.

    Attributes:
        trial: its id in the engine.
        settings: the keys that it sets.
        epochs: stop after so many (a rung of Hyperband); None: all of the experiment.
    """

    trial: str
    settings: dict[str, Any]
    epochs: int | None = None


@dataclass
class Answer:
    """What an engine says when asked for a trial.

    Attributes:
        proposal: None: there is none now.
        exhausted: none will come either.
    """

    proposal: Proposal | None = None
    exhausted: bool = False


class Engine(abc.ABC):
    """Proposes trials and learns from their scores; keeps both on disk, so that it can be opened again."""

    @abc.abstractmethod
    def ask(self, worker: str) -> Answer:
        """Return a trial to be run by `worker`; those that were interrupted come first."""

    @abc.abstractmethod
    def begin(self, row: MemberRow) -> None:
        """Remember the run directory of a trial that begins or goes on."""

    @abc.abstractmethod
    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Hear the score after an epoch; return whether the trial goes on."""

    @abc.abstractmethod
    def tell(self, row: MemberRow) -> None:
        """Hear how a trial ended."""

    @abc.abstractmethod
    def list_records(self) -> list[MemberRow]:
        """Return all trials in the order in which they were proposed."""

    @abc.abstractmethod
    def count_trials(self) -> int | None:
        """Return how many trials there will be at most; None where that is not known."""

    def give_back(self, trial: str) -> None:  # noqa: B027
        """Hear that a trial was stopped at a checkpoint; it is proposed again, also when the engine is opened again."""

    def tick(self) -> set[str]:
        """Called several times a second; returns the trials of this process that others have taken."""
        return set()

    def count_epochs(self) -> int | None:
        """Return the epochs of all trials together where those have different ones; None elsewhere."""
        return None


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made from.

    Attributes:
        arm: name of the arm that it searches.
        config: the experiment with its `search` section; of its arm.
        epochs: of a whole trial.
        trials: at most so many; None as the engine has it.
        folder: for the engine's files.
        storage: a URL or a journal file that several machines share; None: this process alone searches.
        study: name of the study in that storage.
    """

    arm: str
    config: ExperimentConfig
    epochs: int
    trials: int | None
    folder: Path
    storage: str | None = None
    study: str = "search"


def get_direction(figure: str) -> str:
    """Return "min" for a loss, "max" for the other metrics on validation."""
    return "min" if figure == "loss" else "max"


def compute_scores_so_far(history: Sequence[Mapping[str, float]], figure: str, stage: StageConfig) -> list[float]:
    """Return, for each epoch, the metric of the model that would be kept if training ended there.

    Args:
        history: rows of history.csv.
        figure: "accuracy", "macro_f1" or "loss", on validation.
        stage: which epoch it keeps: the last, or the best by its own monitored metric.
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


def find_best(records: Sequence[MemberRow], figure: str) -> MemberRow | None:
    """Return the trial with the best score: among those that were run to the end, else among all."""
    scored = [record for record in records if record.score is not None]
    whole = [record for record in scored if record.status == "finished"]
    sign = -1 if get_direction(figure) == "min" else 1
    return max(whole or scored, key=lambda record: sign * record.score, default=None)


def check_same_experiment(where: str, began: ExperimentConfig, given: ExperimentConfig, *, advice: str) -> None:
    """Raise where an experiment is not the one that a search began with; the number of trials may differ.

    Raises:
        ConfigError: with every key that differs.
    """
    differences = list_differences(began, given)
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise ConfigError(
            f"{where} is not the experiment and space that this search began with:\n{lines}\n"
            f"Scores of different experiments cannot be ranked together. {advice}"
        )
