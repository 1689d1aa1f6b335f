"""What a search asks of an engine, what scores a trial, and whether two experiments are the same search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dlfer.config.schema import ExperimentConfig, StageConfig
from dlfer.errors import ConfigError
from dlfer.runs.member_rows import MemberRow

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


class Engine(Protocol):
    """Proposes trials and learns from their scores; keeps both on disk, so that it can be opened again."""

    def ask(self, worker: str) -> Answer:
        """Return a trial to be run by `worker`; those that were interrupted come first."""
        ...

    def begin(self, row: MemberRow) -> None:
        """Remember the run directory of a trial that begins or goes on."""
        ...

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Hear the score after an epoch; return whether the trial goes on."""
        ...

    def tell(self, row: MemberRow) -> None:
        """Hear how a trial ended."""
        ...

    def give_back(self, trial: str) -> None:
        """Hear that a trial was stopped at a checkpoint; it is proposed again."""
        ...

    def tick(self) -> set[str]:
        """Called several times a second; returns the trials of this process that are no longer its own."""
        ...

    def list_records(self) -> list[MemberRow]:
        """Return all trials in the order in which they were proposed."""
        ...

    def count_trials(self) -> int | None:
        """Return how many trials there will be at most; None where that is not known."""
        ...

    def count_epochs(self) -> int | None:
        """Return the epochs of all trials together where those have different ones; None elsewhere."""
        ...


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

    Args:
        where: the search, in words.
        began: what it began with.
        given: what it is to go on with.
        advice: how to correct it.

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


def list_differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """Return a line for each key in which two experiments differ; the number of trials may."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if key != "search.trials" and before.get(key) != after.get(key):
            lines.append(f"{key}: {_show(before, key)} -> {_show(after, key)}")
    return lines


def _show(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"


def _flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{above}{name}"
        # A key of the space and its range are compared as one.
        if isinstance(value, Mapping) and above != "search.space.":
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat
