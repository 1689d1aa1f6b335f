"""The search engine with Optuna: TPE, a pruner, and a persistent storage that several machines may share.

The storage is all that these machines have in common: each asks it for trials and sends heartbeats for those that it
runs. A trial whose heartbeats cease is marked as failed and proposed once more, from its checkpoint. Databases have
Optuna's own heartbeat for that. A journal file has none in Optuna 5.0, so each trial has a counter as an attribute and
counts as lost if other machines see it unchanged for too long. Clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from dlfer.config.load import dump_experiment, parse_recorded_experiment
from dlfer.errors import ConfigError, DlferError, EnvironmentProblem
from dlfer.runs.member_rows import MemberRow
from dlfer.study.search.engine import (
    DEFAULT_TRIALS,
    Answer,
    Dimension,
    Engine,
    EngineSettings,
    Proposal,
    check_same_experiment,
    get_direction,
    is_active,
    list_dimensions,
)

_RECORD, _SETTINGS, _HEARTBEAT, _REPLACED = "dlfer:record", "dlfer:settings", "dlfer:heartbeat", "dlfer:replaced"
_EXPERIMENT = "dlfer:experiment"
BEATS = 5
"""Number of heartbeats that are sent within search.lost_after_seconds."""
RETRIES = 1
"""Number of times that a lost trial is proposed again."""
_SEED_STEP = 7919
_ATTEMPTS = 4

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Heartbeats, retries and journals have been marked as experimental since Optuna 2.9.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
# Heartbeats are sent from the loop of the runner instead of Study.optimize.
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


class OptunaEngine(Engine):
    """An engine that uses Optuna's TPE sampler; the study is in `settings.storage`, else in the search's own journal.

    Raises:
        ConfigError: the study in the storage began with another experiment.
        EnvironmentProblem: the storage cannot be opened.
    """

    def __init__(self, settings: EngineSettings) -> None:
        search = settings.config.search
        self.settings, self.dimensions = settings, list_dimensions(search)
        self.is_shared = settings.storage is not None
        self.lost_after = search.lost_after_seconds
        self.retry = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
        with self._explain_storage_errors(EnvironmentProblem):
            self.storage = self._open_storage()
            direction = {"min": "minimize", "max": "maximize"}[get_direction(search.objective)]
            pruners = {"none": optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner}
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=settings.study,
                direction=direction,
                pruner=pruners[search.pruner](),
                load_if_exists=True,
            )
            self.study_id = self.storage.get_study_id_from_name(settings.study)
            self._check_experiment()
        self.ongoing: dict[str, Trial] = {}
        self.pruned: set[str] = set()
        self.seen: dict[int, tuple[Any, float]] = {}
        self.beaten, self.idle_since, self.count = 0.0, None, 0
        if not self.is_shared:
            for trial in self._list_trials(TrialState.RUNNING):
                self._propose_again(trial)

    def ask(self, worker: str) -> Answer:
        """Return the next trial; interrupted ones come first.

        While trials run elsewhere, the engine is exhausted only after `search.lost_after_seconds`, as one may be lost.
        """
        with self._explain_storage_errors():
            is_waiting = bool(self._list_trials(TrialState.WAITING))
            if not is_waiting and len(self._list_counted()) >= self.count_trials():
                elsewhere = [t for t in self._list_trials(TrialState.RUNNING) if str(t.number) not in self.ongoing]
                self.idle_since = self.idle_since or time.monotonic()
                return Answer(exhausted=not elsewhere or time.monotonic() - self.idle_since > self.lost_after)
            self.idle_since = None
            trial = self.study.ask()
            # Two machines may ask for the last trial at the same time.
            before = [other for other in self._list_counted() if other.number < trial.number]
            if not trial.params and len(before) >= self.count_trials():
                trial.set_user_attr(_REPLACED, True)
                self.study.tell(trial, state=TrialState.FAIL)
                return Answer()
            # Seed by the number of the trial, so that the process and earlier openings of the study make no difference.
            seed = self.settings.config.search.seed + _SEED_STEP * trial.number
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            settings = self._choose(trial)
            trial.set_user_attr(_SETTINGS, json.dumps(settings))
            self.ongoing[str(trial.number)] = trial
            self._send_heartbeat(trial.number)
            return Answer(Proposal(str(trial.number), settings))

    def begin(self, row: MemberRow) -> None:
        """Record the run directory of a trial."""
        with self._explain_storage_errors():
            self.ongoing[row.trial].set_user_attr(_RECORD, row.model_dump_json())

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Report the score after an epoch to the study; return False if the pruner ends the trial."""
        with self._explain_storage_errors():
            trial = self.ongoing[proposal.trial]
            found = self._get(trial.number)
            if found.state.is_finished():
                return True  # another process has taken it over; tick() returns it
            if epochs not in found.intermediate_values:
                trial.report(score, step=epochs)
            if epochs < self.settings.epochs and trial.should_prune():
                self.pruned.add(proposal.trial)
                return False
            return True

    def tell(self, row: MemberRow) -> None:
        """Report a trial's score, pruning or failure to the study, unless another process has taken the trial over."""
        with self._explain_storage_errors():
            trial = self.ongoing.pop(row.trial)
            if self._get(trial.number).state.is_finished():
                return
            trial.set_user_attr(_RECORD, row.model_dump_json())
            states = {"failed": TrialState.FAIL, "pruned": TrialState.PRUNED}
            if row.status in states:
                self.study.tell(trial, state=states[row.status])
            else:
                self.study.tell(trial, row.score)

    def give_back(self, trial: str) -> None:
        """Release a trial, so that another process, or this search when it is resumed, continues it."""
        with self._explain_storage_errors():
            given = self.ongoing.pop(trial, None)
            if given is not None and not self._get(given.number).state.is_finished():
                self._propose_again(self._get(given.number))

    def tick(self) -> set[str]:
        """Send heartbeats, fail lost trials of other processes, and return the trials that were taken from this one."""
        now = time.monotonic()
        if not self.is_shared or now - self.beaten < self.lost_after / BEATS:
            return set()
        self.beaten = now
        with self._explain_storage_errors():
            taken = {key for key, trial in self.ongoing.items() if self._get(trial.number).state.is_finished()}
            for key in taken:
                del self.ongoing[key]
            for trial in self.ongoing.values():
                self._send_heartbeat(trial.number)
            if isinstance(self.storage, RDBStorage):
                optuna.storages.fail_stale_trials(self.study)
            else:
                self._fail_silent_trials(now)
        return taken

    def list_records(self) -> list[MemberRow]:
        """Return all trials in the order of their numbers, without those that were replaced by others."""
        with self._explain_storage_errors():
            return [self._read_record(trial) for trial in self._list_counted()]

    def count_trials(self) -> int:
        """Return the number of trials of all machines together."""
        return self.settings.trials or DEFAULT_TRIALS

    def _open_storage(self) -> JournalStorage | RDBStorage:
        place = self.settings.storage
        if place is not None and "://" in place:
            return self._open_database(place)
        if place is None:
            self.settings.folder.mkdir(parents=True, exist_ok=True)
            place = str(self.settings.folder / "journal.log")
        _check_journal(Path(place))
        return JournalStorage(JournalFileBackend(place, lock_obj=JournalFileOpenLock(place)))

    def _open_database(self, url: str) -> RDBStorage:
        from sqlalchemy.exc import IntegrityError, ProgrammingError

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return RDBStorage(
                    url,
                    heartbeat_interval=max(1, round(self.lost_after / BEATS)),
                    grace_period=max(2, round(self.lost_after)),
                    heartbeat_stale_trial_callback=self.retry,
                    engine_kwargs={} if url.startswith("sqlite") else {"pool_pre_ping": True},
                )
            except (IntegrityError, ProgrammingError):
                # If several machines create the tables of a new database at the same time, all but the first fail.
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(1)

    def _check_experiment(self) -> None:
        began = self.study.user_attrs.get(_EXPERIMENT)
        if began is None:
            self.study.set_user_attr(_EXPERIMENT, dump_experiment(self.settings.config))
        elif self.is_shared:
            name = self.settings.study
            check_same_experiment(
                f"--storage, study {name}: this experiment",
                parse_recorded_experiment(began, f"study {name}"),
                self.settings.config,
                advice="Set the keys back, or give the experiment another name: --set experiment.name=NAME.",
            )

    @contextlib.contextmanager
    def _explain_storage_errors(self, kind: type[DlferError] = DlferError) -> Iterator[None]:
        """Convert errors of the storage in the context to a DlferError of the given kind with an explanation."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, ImportError, TimeoutError) as error:
            first = (str(error).splitlines() or [""])[0]
            driver = " For PostgreSQL: pip install 'psycopg[binary]'." if isinstance(error, ImportError) else ""
            raise kind(
                f"search: the storage cannot be used: {type(error).__name__}: {first}.{driver} When it can: the same command."
            ) from error

    def _list_trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _list_counted(self) -> list[FrozenTrial]:
        """Return the trials, except those that were replaced by others."""
        trials = self._list_trials()
        replaced = {number for trial in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)}
        return [trial for trial in trials if trial.number not in replaced and _REPLACED not in trial.user_attrs]

    def _get(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self._get_id(number))

    def _get_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)

    def _send_heartbeat(self, number: int) -> None:
        if isinstance(self.storage, RDBStorage):
            self.storage.record_heartbeat(self._get_id(number))
        elif self.is_shared:
            self.count += 1
            self.storage.set_trial_user_attr(self._get_id(number), _HEARTBEAT, self.count)

    def _fail_silent_trials(self, now: float) -> None:
        """Fail trials whose counter has not changed for `search.lost_after_seconds`, and propose them again."""
        for trial in self._list_trials(TrialState.RUNNING):
            value = trial.user_attrs.get(_HEARTBEAT)
            known, since = self.seen.get(trial.number, (None, now))
            self.seen[trial.number] = (value, since if value == known else now)
            if str(trial.number) in self.ongoing or now - self.seen[trial.number][1] <= self.lost_after:
                continue
            # Another process may have failed the trial already.
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
                self.study.tell(trial.number, state=TrialState.FAIL)
                self.retry(self.study, self._get(trial.number))

    def _propose_again(self, trial: FrozenTrial) -> None:
        """Queue a copy of an interrupted trial under a new number, and mark the original as replaced."""
        self.storage.set_trial_user_attr(self._get_id(trial.number), _REPLACED, True)
        self.study.tell(trial.number, state=TrialState.FAIL)
        attributes = {key: value for key, value in trial.user_attrs.items() if key != _REPLACED}
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=attributes,
                system_attrs=trial.system_attrs,
            )
        )

    def _read_record(self, trial: FrozenTrial) -> MemberRow:
        settings = json.loads(trial.user_attrs.get(_SETTINGS, "{}"))
        row = MemberRow(arm=self.settings.arm, settings=settings, seed=self.settings.config.experiment.seed)
        if _RECORD in trial.user_attrs:
            row = MemberRow.model_validate_json(trial.user_attrs[_RECORD])
        if not trial.state.is_finished():
            status = "running" if trial.state == TrialState.RUNNING else "waiting"
            row = row.change(status=status)
        elif row.status in ("pending", "running", "waiting"):
            row = row.change(status="failed", error="The processes that ran it were lost, twice.", kind="Lost")
        return row.change(trial=str(trial.number))

    def _choose(self, trial: Trial) -> dict[str, Any]:
        """Return a value chosen by the study for each active key; a trial that began before gets the same values."""
        chosen: dict[str, Any] = {}
        for dimension in self.dimensions:
            if is_active(dimension, chosen):
                chosen[dimension.key] = _suggest(trial, dimension)
        return chosen


def _check_journal(path: Path) -> None:
    """Raise ConfigError if a file exists that is not a journal, so that nothing is written into it."""
    try:
        with path.open("rb") as file:
            first = file.readline(2**20)
        is_journal = not first or "op_code" in json.loads(first)
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        is_journal = False
    if not is_journal:
        raise ConfigError(
            f"--storage {path}: is no journal of a search, so nothing is written into it; name another file, or a new one."
        )


def _suggest(trial: Trial, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        texts = [json.dumps(value) for value in dimension.choices]
        return json.loads(trial.suggest_categorical(dimension.key, texts))
    is_log = dimension.kind == "log"
    if dimension.is_int:
        step = 1 if dimension.step is None else int(dimension.step)
        return trial.suggest_int(dimension.key, int(dimension.low), int(dimension.high), step=step, log=is_log)
    given = {} if dimension.step is None else {"step": dimension.step}
    return dimension.tidy(trial.suggest_float(dimension.key, dimension.low, dimension.high, log=is_log, **given))
