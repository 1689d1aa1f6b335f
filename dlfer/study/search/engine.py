"""The interface of search engines, and the engine with KerasTuner's oracles: random, Bayesian, Hyperband and grid.

An engine gets the space as ordered dimensions. This module also scores trials and checks that experiments are the same.

An oracle proposes trials and receives their scores. KerasTuner's own tuner is not used, because it would run trials in
this process and swallow their errors. This module works around these problems of KerasTuner 1.4.8:

- files are overwritten in place: here they are written under a temporary name and renamed;
- a trial that ended stays stored as ongoing until the next trial begins, and would be run again;
- the grid loses its position when it is reopened;
- seed 0 is treated as no seed; three failures in a row end the search;
- a failed trial takes the place of a promotion from its Hyperband bracket: here it counts as the worst.
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
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
from dlfer.runs.files import write_atomically
from dlfer.runs.member_rows import MemberRow

_GRID_POINTS = 10
_DIGITS = 6


@dataclass(frozen=True)
class Dimension:
    """One key of the search space.

    Attributes:
        key: dotted key.
        kind: "log", "between" or "choice".
        is_int: whether its values are integers.
        low, high, step: range of the kinds log and between; step None: continuous.
        choices: values of the kind choice.
        when: key -> values for which this dimension is searched; all conditions must hold.
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
        """Return a number as a trial sets it: an integer, or rounded to six significant digits within the range."""
        if self.is_int:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        """Return the key and its range in words, such as "rate: 0.0001 to 0.005, log"."""
        if self.kind == "choice":
            text = f"{self.key}: {', '.join(format_value(choice) for choice in self.choices)}"
        else:
            text = f"{self.key}: {self.low:g} to {self.high:g}" + (", log" if self.kind == "log" else "")
            text += f", step {self.step:g}" if self.step is not None else ""
        conditions = [f"{key} is {' or '.join(map(format_value, values))}" for key, values in self.when.items()]
        return text + (f" (where {' and '.join(conditions)})" if conditions else "")

    def list_points(self) -> list[Any]:
        """Return the values for a grid search: the choices, the steps, or ten points from `low` to `high`."""
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
    """Return the dimensions in the order of the file, but each key after those that its condition depends on."""
    ordered: list[str] = []
    for key in search.space:
        for name in [*reversed(list_ancestors(search.space, key)), key]:
            if name not in ordered:
                ordered.append(name)
    return [_read_dimension(key, search.space[key], search.space) for key in ordered]


def is_active(dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
    """Return whether a dimension is searched in a trial that has set the keys in `chosen` so far."""
    return all(parent in chosen and chosen[parent] in values for parent, values in dimension.when.items())


def _read_dimension(key: str, spec: Mapping[str, Any], space: Mapping[str, Any]) -> Dimension:
    # Use the choices themselves: a condition may say 0 for the choice 0.0, and engines compare JSON texts.
    when = {
        parent: [choice for choice in space[parent]["choice"] if choice in values]
        for parent, values in spec.get("when", {}).items()
    }
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
        trial: id of the trial in the engine.
        settings: keys that the trial sets.
        epochs: number of epochs after which to stop (a rung of Hyperband); None: all of the experiment.
    """

    trial: str
    settings: dict[str, Any]
    epochs: int | None = None


@dataclass
class Answer:
    """The answer of an engine to a request for a trial.

    Attributes:
        proposal: proposed trial; None: there is none now.
        exhausted: whether there will be none later either.
    """

    proposal: Proposal | None = None
    exhausted: bool = False


class Engine(abc.ABC):
    """An engine that proposes trials and learns from their scores; it stores both, so that it can be reopened."""

    @abc.abstractmethod
    def ask(self, worker: str) -> Answer:
        """Return a trial to be run by `worker`; interrupted trials come first."""

    @abc.abstractmethod
    def begin(self, row: MemberRow) -> None:
        """Record the run directory of a trial that starts or continues."""

    @abc.abstractmethod
    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Receive the score after an epoch; return whether the trial continues."""

    @abc.abstractmethod
    def tell(self, row: MemberRow) -> None:
        """Receive the result of a trial that has ended."""

    @abc.abstractmethod
    def list_records(self) -> list[MemberRow]:
        """Return all trials in the order in which they were proposed."""

    @abc.abstractmethod
    def count_trials(self) -> int | None:
        """Return the maximum number of trials, or None if it is unknown."""

    def give_back(self, trial: str) -> None:  # noqa: B027
        """Take back a trial that was stopped at a checkpoint; propose it again, also after the engine is reopened."""

    def tick(self) -> set[str]:
        """Do periodic work, several times a second; return the trials that other processes took over from this one."""
        return set()

    def count_epochs(self) -> int | None:
        """Return the total number of epochs of all trials if trials have different numbers, else None."""
        return None


@dataclass(frozen=True)
class EngineSettings:
    """The settings from which an engine is created.

    Attributes:
        arm: name of the arm that it searches.
        config: experiment of the arm, with its `search` section.
        epochs: number of epochs of a complete trial.
        trials: maximum number of trials; None: the default of the engine.
        folder: folder for the engine's files.
        storage: URL of a database, or journal file, that several machines share; None: only this process searches.
        study: name of the study in the storage.
    """

    arm: str
    config: ExperimentConfig
    epochs: int
    trials: int | None
    folder: Path
    storage: str | None = None
    study: str = "search"


def get_direction(figure: str) -> str:
    """Return "min" for the loss, "max" for the other validation metrics."""
    return "min" if figure == "loss" else "max"


def compute_scores_so_far(history: Sequence[Mapping[str, float]], figure: str, stage: StageConfig) -> list[float]:
    """Return, for each epoch, the metric of the model that would be kept if training ended there.

    Args:
        history: rows of history.csv.
        figure: validation metric: "accuracy", "macro_f1" or "loss".
        stage: settings of the stage, which keeps the last epoch, or the best by its own monitored metric.
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
    """Return the trial with the best score among the completed ones, or among all if none is; None without scores."""
    scored = [record for record in records if record.score is not None]
    whole = [record for record in scored if record.status == "finished"]
    sign = -1 if get_direction(figure) == "min" else 1
    return max(whole or scored, key=lambda record: sign * record.score, default=None)


def check_same_experiment(where: str, began: ExperimentConfig, given: ExperimentConfig, *, advice: str) -> None:
    """Raise an error if an experiment is not the one that a search began with; the number of trials may differ.

    Raises:
        ConfigError: the experiments differ; the message lists every such key.
    """
    differences = list_differences(began, given)
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise ConfigError(
            f"{where} is not the experiment and space that this search began with:\n{lines}\n"
            f"Scores of different experiments cannot be ranked together. {advice}"
        )


_PROJECT = "oracle"
_RUNG = "tuner/epochs"
_NEVER = 10**9


class KerasTunerEngine(Engine):
    """An engine that uses an oracle of KerasTuner; it resumes from the files in `settings.folder`/oracle, if any."""

    def __init__(self, settings: EngineSettings) -> None:
        search = settings.config.search
        self.settings, self.search = settings, search
        self.dimensions = list_dimensions(search)
        self.oracle = _build_oracle(settings, self.dimensions)
        self.oracle._set_project_dir(str(settings.folder), _PROJECT)
        self.oracle.verbose = 0
        if (settings.folder / _PROJECT / "oracle.json").exists():
            self._reopen()
        if settings.trials is not None:
            self.oracle.max_trials = settings.trials

    def ask(self, worker: str) -> Answer:
        """Return the next trial; interrupted ones come first."""
        trial = self.oracle.create_trial(worker)
        if trial.status == "RUNNING":
            return Answer(self._read_proposal(trial))
        return Answer(exhausted=trial.status == "STOPPED")

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Return whether the trial continues: Hyperband ends it after the epochs of its rung."""
        del score
        return proposal.epochs is None or epochs < proposal.epochs

    def begin(self, row: MemberRow) -> None:
        """Record the run directory of a trial."""
        trial = self.oracle.trials[row.trial]
        trial.message = row.model_dump_json()
        self.oracle._save_trial(trial)

    def tell(self, row: MemberRow) -> None:
        """Report the score of a trial, or its failure, to the oracle."""
        trial = self.oracle.trials[row.trial]
        trial.message = row.model_dump_json()
        score = row.score
        if row.status == "failed":
            score = None
            if self.search.engine == "hyperband":
                score = math.inf if self.oracle.objective.direction == "min" else -math.inf
        if score is None:
            trial.status = "FAILED"
        else:
            self.oracle.update_trial(row.trial, {self.search.objective: score})
            trial.status = "COMPLETED"
        self.oracle.end_trial(trial)
        # Save again, because end_trial saves before it removes the trial from the ongoing ones.
        self.oracle.save()

    def list_records(self) -> list[MemberRow]:
        """Return all trials in the order in which they were proposed."""
        records = []
        ongoing = {trial.trial_id for trial in self.oracle.ongoing_trials.values()}
        for trial_id in self.oracle.start_order:
            trial = self.oracle.trials[trial_id]
            row = MemberRow.model_validate_json(trial.message) if trial.message else None
            if trial.status != "RUNNING" and row is not None:
                records.append(row)
                continue
            proposal = self._read_proposal(trial)
            if row is None:
                seed = self.settings.config.experiment.seed
                row = MemberRow(arm=self.settings.arm, trial=trial_id, seed=seed, settings=proposal.settings)
            status = "running" if trial_id in ongoing else "waiting"
            records.append(row.change(status=status, rung=proposal.epochs))
        return records

    def count_trials(self) -> int | None:
        """Return the number of trials if it follows from the settings, else None."""
        counts = [self.oracle.max_trials]
        if self.search.engine == "grid":
            counts.append(_count_grid(self.dimensions))
        if self.search.engine == "hyperband":
            counts.append(_count_hyperband(self.oracle))
        return min((count for count in counts if count is not None), default=None)

    def count_epochs(self) -> int | None:
        """Return the total number of epochs of all rungs of a complete Hyperband search; None otherwise."""
        if self.search.engine != "hyperband" or self.count_trials() != _count_hyperband(self.oracle):
            return None
        return _count_hyperband_epochs(self.oracle)

    def _reopen(self) -> None:
        self.oracle.reload()
        # Drop trials that have their own file but are not in that of the oracle: they never began.
        for trial_id in set(self.oracle.trials) - set(self.oracle.start_order):
            del self.oracle.trials[trial_id]
        queue = dict.fromkeys(self.oracle._retry_queue)
        self.oracle._retry_queue = [key for key in queue if self.oracle.trials[key].status == "RUNNING"]
        lost = [key for key, trial in self.oracle.trials.items() if trial.status == "RUNNING" and key not in queue]
        self.oracle._retry_queue += lost
        self.oracle.tuner_ids.clear()

    def _read_proposal(self, trial: Any) -> Proposal:
        values = trial.hyperparameters.values
        settings: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.key in values:
                settings[dimension.key] = _decode(dimension, values[dimension.key], self.search.engine)
        rung = values.get(_RUNG)
        is_whole = rung is None or rung >= self.settings.epochs
        return Proposal(trial.trial_id, settings, None if is_whole else int(rung))


def _build_oracle(settings: EngineSettings, dimensions: list[Dimension]) -> Any:
    import keras_tuner

    search = settings.config.search
    oracles = keras_tuner.oracles
    base, given = {
        "random": (oracles.RandomSearchOracle, {"max_trials": DEFAULT_TRIALS}),
        "bayesian": (oracles.BayesianOptimizationOracle, {"max_trials": DEFAULT_TRIALS}),
        "hyperband": (oracles.HyperbandOracle, {"max_epochs": settings.epochs, "factor": search.factor}),
        "grid": (oracles.GridSearchOracle, {}),
    }[search.engine]
    mixins = (_ResumableGridMixin, _AtomicFilesMixin) if search.engine == "grid" else (_AtomicFilesMixin,)
    return type(f"Durable{base.__name__}", (*mixins, base), {})(
        objective=keras_tuner.Objective(search.objective, get_direction(search.objective)),
        hyperparameters=_build_space(dimensions, search.engine),
        seed=search.seed + 1,
        allow_new_entries=False,
        max_consecutive_failed_trials=_NEVER,
        **given,
    )


class _AtomicFilesMixin:
    """A mixin for oracles that writes their files atomically, so that a killed process leaves no partial files."""

    def save(self) -> None:
        """Write oracle.json."""
        write_atomically(Path(self._get_oracle_fname()), json.dumps(self.get_state()))

    def _save_trial(self, trial: Any) -> None:
        path = Path(self._get_trial_dir(trial.trial_id)) / "trial.json"
        write_atomically(path, json.dumps(trial.get_state()))


class _ResumableGridMixin:
    """A mixin for the grid oracle that preserves its position when it is reopened."""

    def get_state(self) -> dict[str, Any]:
        """Return the state with the order of the trials and the queue of those from which the grid continues."""
        order, ids = [], self._ordered_ids
        index = 0 if ids._memory else None
        while index is not None:
            order.append(ids._memory[index])
            index = ids._next_index[index]
        return {**super().get_state(), "ordered_ids": order, "populate_next": list(self._populate_next)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        super().set_state(state)
        for position, trial_id in enumerate(state["ordered_ids"]):
            self._ordered_ids.insert(trial_id, state["ordered_ids"][position - 1] if position else None)
        self._populate_next = list(state["populate_next"])


def _build_space(dimensions: list[Dimension], engine: str) -> Any:
    """Return the space for KerasTuner; choices are JSON texts, because KerasTuner supports no null and no lists."""
    import keras_tuner

    space = keras_tuner.HyperParameters()
    for dimension in dimensions:
        with contextlib.ExitStack() as stack:
            for parent, values in dimension.when.items():
                stack.enter_context(space.conditional_scope(parent, [json.dumps(value) for value in values]))
            if dimension.kind == "choice" or engine == "grid":
                space.Choice(dimension.key, [json.dumps(value) for value in dimension.list_points()])
                continue
            add = space.Int if dimension.is_int else space.Float
            sampling = "log" if dimension.kind == "log" else "linear"
            step = {} if dimension.step is None else {"step": dimension.step}
            add(dimension.key, dimension.low, dimension.high, sampling=sampling, **step)
    return space


def _decode(dimension: Dimension, value: Any, engine: str) -> Any:
    if dimension.kind == "choice" or engine == "grid":
        return json.loads(value)
    return dimension.tidy(value)


def _count_grid(dimensions: list[Dimension]) -> int:
    """Return the number of cells of a grid; a conditional key multiplies only cells in which its conditions hold."""

    def count(rest: list[Dimension], chosen: dict[str, Any]) -> int:
        if not rest:
            return 1
        first, others = rest[0], rest[1:]
        if any(chosen.get(parent, _NEVER) not in values for parent, values in first.when.items()):
            return count(others, chosen)
        if not any(first.key in other.when for other in others):
            return len(first.list_points()) * count(others, chosen)
        return sum(count(others, {**chosen, first.key: value}) for value in first.list_points())

    return count(dimensions, {})


def _count_hyperband(oracle: Any) -> int:
    return sum(
        oracle._get_size(bracket, round_num)
        for bracket in range(oracle._get_num_brackets())
        for round_num in range(oracle._get_num_rounds(bracket))
    )


def _count_hyperband_epochs(oracle: Any) -> int:
    """Return the total number of epochs of all rungs; a longer rung continues from a shorter one."""
    total = 0
    for bracket in range(oracle._get_num_brackets()):
        done = 0
        for round_num in range(oracle._get_num_rounds(bracket)):
            epochs = oracle._get_epochs(bracket, round_num)
            total += oracle._get_size(bracket, round_num) * (epochs - done)
            done = epochs
    return total
