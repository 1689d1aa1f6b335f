"""The engine that searches by Optuna (an extra): TPE, a pruner, and a journal that outlives every process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlfer.errors import EnvironmentProblem
from dlfer.study.search.dimensions import Dimension, is_active, list_dimensions
from dlfer.study.search.engine import DEFAULT_TRIALS, Answer, EngineSettings, Proposal, TrialRecord
from dlfer.study.search.objective import get_direction

_RECORD, _OVERRIDES, _WORKER = "dlfer:record", "dlfer:overrides", "dlfer:worker"


class OptunaEngine:
    """Proposes by Optuna's TPE sampler; the study stands in `folder`/journal.log.

    Args:
        folder: of this engine; if it was there before, the search goes on.
        settings: experiment, epochs and number of trials.

    Raises:
        EnvironmentProblem: Optuna is not installed.
    """

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        optuna = _import_optuna()
        search = settings.config.search
        self.optuna, self.settings = optuna, settings
        self.dimensions = list_dimensions(search)
        Path(folder).mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(Path(folder) / "journal.log"))
        storage = optuna.storages.JournalStorage(backend)
        direction = {"min": "minimize", "max": "maximize"}[get_direction(search.objective)]
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": optuna.pruners.MedianPruner,
        }
        self.study = optuna.create_study(
            storage=storage,
            study_name="search",
            direction=direction,
            pruner=pruners[search.pruner](),
            load_if_exists=True,
        )
        # A sampler that is opened again begins its random numbers anew: with the same seed it would
        # propose its first trials once more.
        done = len(self.study.trials)
        self.study.sampler = optuna.samplers.TPESampler(seed=search.seed + 7919 * done, constant_liar=True)
        self.waiting = [trial.number for trial in self.study.trials if not trial.state.is_finished()]
        self.ongoing: dict[str, Any] = {}
        self.pruned: set[str] = set()

    def ask(self, worker: str) -> Answer:
        """Return the next trial, those that were interrupted first."""
        if self.waiting:
            number = self.waiting.pop(0)
            trial = self.optuna.trial.Trial(self.study, self.study.trials[number]._trial_id)
        elif len(self.study.trials) < self.count_trials():
            trial = self.study.ask()
        else:
            return Answer(exhausted=True)
        overrides = self._choose(trial)
        trial.set_user_attr(_OVERRIDES, json.dumps(overrides))
        trial.set_user_attr(_WORKER, worker)
        self.ongoing[str(trial.number)] = trial
        return Answer(Proposal(str(trial.number), overrides))

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Hear the score after an epoch; return False where the pruner ends the trial."""
        trial = self.ongoing[proposal.trial]
        known = self.study.trials[trial.number].intermediate_values
        if epochs not in known:
            trial.report(score, step=epochs)
        if epochs < self.settings.epochs and trial.should_prune():
            self.pruned.add(proposal.trial)
            return False
        return True

    def tell(self, record: TrialRecord) -> None:
        """Give the study the score of a trial, or that it was pruned or failed."""
        trial = self.ongoing.pop(record.trial)
        trial.set_user_attr(_RECORD, json.dumps(record.as_dict()))
        states = self.optuna.trial.TrialState
        if record.status == "failed":
            self.study.tell(trial, state=states.FAIL)
        elif record.status == "pruned":
            self.study.tell(trial, state=states.PRUNED)
        else:
            self.study.tell(trial, record.score)

    def list_records(self) -> list[TrialRecord]:
        """Return all trials in the order in which they were proposed."""
        records = []
        for trial in self.study.trials:
            if trial.state.is_finished() and _RECORD in trial.user_attrs:
                records.append(TrialRecord(**json.loads(trial.user_attrs[_RECORD])))
                continue
            status = "running" if str(trial.number) in self.ongoing else "waiting"
            overrides = json.loads(trial.user_attrs.get(_OVERRIDES, "{}"))
            records.append(TrialRecord(str(trial.number), overrides, status))
        return records

    def count_trials(self) -> int:
        """Return the number of trials there will be."""
        return self.settings.trials or DEFAULT_TRIALS

    def count_epochs(self) -> None:
        """Return None: every trial has the experiment's epochs, unless it is pruned."""

    def _choose(self, trial: Any) -> dict[str, Any]:
        """Let the study choose a value for every key that is active; of a trial that began, the same again."""
        chosen: dict[str, Any] = {}
        for dimension in self.dimensions:
            if is_active(dimension, chosen):
                chosen[dimension.key] = _suggest(trial, dimension)
        return chosen


def _suggest(trial: Any, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        texts = [json.dumps(value) for value in dimension.choices]
        return json.loads(trial.suggest_categorical(dimension.key, texts))
    is_log = dimension.kind == "log"
    if dimension.is_int:
        step = 1 if dimension.step is None else int(dimension.step)
        return trial.suggest_int(dimension.key, int(dimension.low), int(dimension.high), step=step, log=is_log)
    given = {} if dimension.step is None else {"step": dimension.step}
    return dimension.tidy(trial.suggest_float(dimension.key, dimension.low, dimension.high, log=is_log, **given))


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentProblem(
            f"search.engine: optuna is an extra that is not installed here ({error}). In a clone: "
            "make extra-optuna; or choose random, bayesian, hyperband or grid."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
