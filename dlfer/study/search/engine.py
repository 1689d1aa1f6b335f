"""What a search asks of an engine, and the engine that searches by KerasTuner's oracles: random, Bayesian, Hyperband, grid.

An engine gets the space as ordered dimensions; what scores a trial and whether two experiments are the same is told here, too.

An oracle proposes trials and hears their scores; KerasTuner's tuner around it is not used, since it would
run trials in this process and swallow their errors. What is corrected here, of version 1.4.8:

- its files are written in place: here under a temporary name and renamed;
- a trial that ended is stored as still going on until the next trial begins, and would be run again;
- the grid forgets where it stands when it is opened again;
- seed 0 is taken for no seed; three failures in a row end the search;
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
    return [_read_dimension(key, search.space[key], search.space) for key in ordered]


def is_active(dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
    """Return whether a dimension is searched in a trial whose keys so far are `chosen`."""
    return all(parent in chosen and chosen[parent] in values for parent, values in dimension.when.items())


def _read_dimension(key: str, spec: Mapping[str, Any], space: Mapping[str, Any]) -> Dimension:
    # A condition may write 0 where the choice is 0.0; the engines compare texts.
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


_PROJECT = "oracle"
_RUNG = "tuner/epochs"
_NEVER = 10**9


class KerasTunerEngine(Engine):
    """Proposes by an oracle of KerasTuner, whose files are in `settings.folder`/oracle; if they are there, it goes on."""

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
        """Return the next trial, those that were interrupted first."""
        trial = self.oracle.create_trial(worker)
        if trial.status == "RUNNING":
            return Answer(self._read_proposal(trial))
        return Answer(exhausted=trial.status == "STOPPED")

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Return whether the trial goes on: Hyperband ends it after the epochs of its rung."""
        del score
        return proposal.epochs is None or epochs < proposal.epochs

    def begin(self, row: MemberRow) -> None:
        """Remember the run directory of a trial."""
        trial = self.oracle.trials[row.trial]
        trial.message = row.model_dump_json()
        self.oracle._save_trial(trial)

    def tell(self, row: MemberRow) -> None:
        """Give the oracle the score of a trial, or that it failed."""
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
        # The oracle drops the trial from those going on after it has saved itself.
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
        """Return the number of trials there will be, where it follows from the settings."""
        counts = [self.oracle.max_trials]
        if self.search.engine == "grid":
            counts.append(_count_grid(self.dimensions))
        if self.search.engine == "hyperband":
            counts.append(_count_hyperband(self.oracle))
        return min((count for count in counts if count is not None), default=None)

    def count_epochs(self) -> int | None:
        """Return the epochs of all trials together where those have different ones: the rungs of Hyperband."""
        if self.search.engine != "hyperband" or self.count_trials() != _count_hyperband(self.oracle):
            return None
        return _count_hyperband_epochs(self.oracle)

    def _reopen(self) -> None:
        self.oracle.reload()
        # A trial whose own file was written and that the oracle had not stored yet: it never began.
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
    mixins = (_RemembersGrid, _WritesWhole) if search.engine == "grid" else (_WritesWhole,)
    return type(f"Durable{base.__name__}", (*mixins, base), {})(
        objective=keras_tuner.Objective(search.objective, get_direction(search.objective)),
        hyperparameters=_build_space(dimensions, search.engine),
        seed=search.seed + 1,
        allow_new_entries=False,
        max_consecutive_failed_trials=_NEVER,
        **given,
    )


class _WritesWhole:
    """An oracle whose files are whole whenever the process is killed."""

    def save(self) -> None:
        """Write oracle.json."""
        write_atomically(Path(self._get_oracle_fname()), json.dumps(self.get_state()))

    def _save_trial(self, trial: Any) -> None:
        path = Path(self._get_trial_dir(trial.trial_id)) / "trial.json"
        write_atomically(path, json.dumps(trial.get_state()))


class _RemembersGrid:
    """A grid oracle that knows where it stands when it is opened again."""

    def get_state(self) -> dict[str, Any]:
        """Return the state with the order of trials and the queue of those to go on from."""
        order, ids = [], self._ordered_ids
        index = 0 if ids._memory else None
        while index is not None:
            order.append(ids._memory[index])
            index = ids._next_index[index]
        return {**super().get_state(), "ordered_ids": order, "populate_next": list(self._populate_next)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Set what `get_state` returned."""
        super().set_state(state)
        for position, trial_id in enumerate(state["ordered_ids"]):
            self._ordered_ids.insert(trial_id, state["ordered_ids"][position - 1] if position else None)
        self._populate_next = list(state["populate_next"])


def _build_space(dimensions: list[Dimension], engine: str) -> Any:
    """Return KerasTuner's form of the space; choices go as JSON text, since it knows no null and no lists."""
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
    """Return the number of cells of a grid, those under conditions counted where the conditions hold."""

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
    """Return the epochs of all rungs; a longer one goes on from a shorter one."""
    total = 0
    for bracket in range(oracle._get_num_brackets()):
        done = 0
        for round_num in range(oracle._get_num_rounds(bracket)):
            epochs = oracle._get_epochs(bracket, round_num)
            total += oracle._get_size(bracket, round_num) * (epochs - done)
            done = epochs
    return total
