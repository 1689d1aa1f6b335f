"""The engine that searches by KerasTuner's oracles: random, Bayesian, Hyperband, grid.

An oracle proposes trials and hears their scores; KerasTuner's tuner around it is not used, since it would
run trials in this process and swallow their errors. What is corrected here, of version 1.4.8:

- its files are written in place: here under a temporary name and renamed;
- a trial that ended is stored as still going on until the next trial begins, and would be run again;
- the grid forgets where it stands when it is opened again;
- seed 0 is taken for no seed; three failures in a row end the search;
- a failed trial takes the place of a promotion from its Hyperband bracket: here it counts as the worst.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from dlfer.runs.files import write_atomically
from dlfer.runs.member_rows import MemberRow
from dlfer.study.search.engine import (
    DEFAULT_TRIALS,
    Answer,
    Dimension,
    Engine,
    EngineSettings,
    Proposal,
    get_direction,
    list_dimensions,
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
