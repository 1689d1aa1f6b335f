"""The arms of a search (one, or with --ablation one with EF-FER1 and one without), and their trials as tasks.

Each proposal of an engine becomes a run, whose epochs give the score. Equal settings use the same run: a longer rung of
Hyperband, an interrupted trial, and a trial of a lost machine continue in the existing run directory.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.variations import list_ancestors, sort_keys
from dlfer.errors import ConfigError, DlferError, shorten
from dlfer.experiment.session import create_member_run, make_smoke_config
from dlfer.report.page import format_overrides
from dlfer.report.search import SINGLE_ARM
from dlfer.runs.files import read_rows
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import MemberRow, is_run
from dlfer.runs.run import Run, format_duration
from dlfer.runs.run_records import read_metrics
from dlfer.runs.text import count_noun
from dlfer.study.ablation import WITH, WITHOUT
from dlfer.study.child import WorkerSlot
from dlfer.study.runner import Ending, Source, StudyConsole, Task
from dlfer.study.search.engine import (
    Engine,
    EngineSettings,
    KerasTunerEngine,
    Proposal,
    compute_scores_so_far,
    find_best,
)

SMOKE_TRIALS = 2


@dataclass(frozen=True)
class Arm:
    """One arm of a search, with an engine of its own.

    Attributes:
        name: name for display.
        base: keys that all trials of the arm set.
        config: experiment with these keys set and the search space of the arm.
    """

    name: str
    base: Mapping[str, Any]
    config: ExperimentConfig

    @property
    def slug(self) -> str:
        """The name of the arm as used in file names: lower-case letters, digits and hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())

    @property
    def best_file(self) -> str:
        """The file name of its best experiment: best.yaml, or best-<slug>.yaml if there are two arms."""
        return "best.yaml" if self.name == SINGLE_ARM else f"best-{self.slug}.yaml"

    def open_engine(self, folder: Path, *, trials: int | None, smoke: bool, storage: str | None = None) -> Engine:
        """Open the engine of the arm with its earlier state from `folder`/engine/<slug>, or from the storage.

        Raises:
            ConfigError: the engine cannot search this space, or cannot use a shared storage.
        """
        search = self.config.search
        if search.engine == "hyperband" and any(key.endswith(".epochs") for key in search.space):
            raise ConfigError(
                "search.space: hyperband chooses the epochs of EF-FER2 itself; take the key that ends in .epochs out."
            )
        if storage is not None and search.engine != "optuna":
            raise ConfigError(
                f"search.engine: found {search.engine} with --storage, expected optuna, the one engine that several machines "
                "can share. Add --set search.engine=optuna, or leave --storage out and search on one machine."
            )
        epochs = (make_smoke_config(self.config)[0] if smoke else self.config).finetune.epochs
        wanted = trials if trials is not None else search.trials
        if smoke and trials is None:
            wanted = min(wanted or SMOKE_TRIALS, SMOKE_TRIALS)
        name = (
            self.config.experiment.name
            + (f"-{self.slug}" if self.name != SINGLE_ARM else "")
            + ("-smoke" if smoke else "")
        )
        study = "search" if storage is None else name
        settings = EngineSettings(self.name, self.config, epochs, wanted, folder / "engine" / self.slug, storage, study)
        if search.engine == "optuna":
            from dlfer.study.search.optuna import OptunaEngine

            return OptunaEngine(settings)
        return KerasTunerEngine(settings)


def list_arms(config: ExperimentConfig, *, ablation: bool) -> list[Arm]:
    """Return the arms of a search.

    Raises:
        ConfigError: there is nothing to search, no EF-FER1 to leave out, or the model is an ensemble.
    """
    search = config.search
    if search is None:
        raise ConfigError(
            f"experiment {config.experiment.name}: has no section search. Add one with the keys to tune, e.g.\n"
            "search:\n  space:\n    finetune.optimizer.learning_rate: {log: [1e-5, 1e-2]}"
        )
    if config.model.family == "ensemble":
        raise ConfigError(
            "model.family: found ensemble, whose members are trained by experiments of their own; search over each member's "
            "experiment, and combine the best by an ensemble afterwards."
        )
    if not ablation:
        check_absent_stage(config)
        return [Arm(SINGLE_ARM, {}, config)]
    if config.pretrain is None:
        raise ConfigError("--ablation: pretrain is null, so there is no EF-FER1 to leave out; leave --ablation out.")
    space = {key: spec for key, spec in search.space.items() if not _is_of_pretrain(search.space, key)}
    if not space:
        raise ConfigError(
            "--ablation: every key of search.space is of EF-FER1, so the arm without it has nothing to tune; "
            "add keys of finetune or model."
        )
    of_with, of_without = config.ablation.with_keys, {"pretrain": None, **config.ablation.without}
    without = with_overrides(config, {**of_without, "search.space": space})
    return [Arm(WITH, of_with, with_overrides(config, of_with)), Arm(WITHOUT, of_without, without)]


def check_absent_stage(config: ExperimentConfig) -> None:
    """Refuse keys of EF-FER1 in the search space of an experiment without EF-FER1.

    Raises:
        ConfigError: there are such keys; the message lists them.
    """
    wrong = [key for key in config.search.space if key.startswith("pretrain.")]
    if config.pretrain is None and wrong:
        raise ConfigError(f"search.space: pretrain is null, so {', '.join(wrong)} cannot be tuned; take them out.")


def _is_of_pretrain(space: Mapping[str, Any], key: str) -> bool:
    return any(name.startswith("pretrain") for name in (key, *list_ancestors(space, key)))


ENDED = ("finished", "rung", "pruned", "failed")


@dataclass
class _Trial:
    """A trial in progress.

    Attributes:
        proposal: proposal of the engine.
        row: row of members.csv so far.
        config: experiment that is run.
        history: rows of EF-FER2's history so far.
    """

    proposal: Proposal
    row: MemberRow
    config: ExperimentConfig
    history: list[dict[str, float]]


class TrialSource(Source):
    """A source of the trials of an arm for the runner, which reports their scores to the engine.

    Failures are not reported to the engine until a trial with another outcome shows that the experiment itself works:
    if the experiment is at fault, no failure counts, and the trials are tried again on resume.

    `folder` is the folder of the search, beside which the runs are created; `on_change` is called after each change.
    """

    def __init__(
        self,
        engine: Engine,
        arm: Arm,
        folder: Path,
        *,
        options: RunOptions,
        console: StudyConsole,
        on_change: Callable[[], None],
    ) -> None:
        self.engine, self.arm, self.folder, self.options = engine, arm, folder, options
        self.console, self.on_change = console, on_change
        self.objective = arm.config.search.objective
        self.active: dict[Task, _Trial] = {}
        self.held: list[MemberRow] = []
        self.works, self.exhausted, self.asked = False, False, 0

    def take(self, slot: WorkerSlot) -> Task | None:
        """Return a task for the next trial; a trial with incompatible settings fails without a process."""
        while True:
            worker = f"{socket.gethostname()}-{os.getpid()}{f'-{slot.name}' if slot.name else ''}"
            # Use a new name for each request, because an oracle gives a name that has a trial the same one again.
            answer = self.engine.ask(f"{worker}.{self.asked}")
            self.asked += 1
            if answer.proposal is None and self.held and not self.active:
                self._report_held_failures()
                continue
            self.exhausted = answer.exhausted
            if answer.proposal is None:
                return None
            task = self._begin(answer.proposal, worker)
            if task is not None:
                return task

    def is_exhausted(self) -> bool:
        """Return whether the engine has no trials left."""
        return self.exhausted

    def tick(self) -> list[Task]:
        """Let the engine send heartbeats; return the tasks whose trials another machine has taken over."""
        taken = self.engine.tick()
        unwanted = [task for task, trial in self.active.items() if trial.proposal.trial in taken]
        for task in unwanted:
            del self.active[task]
            self.console.say(f"{task.title}: this machine was silent for too long, and another has the trial now")
        return unwanted

    def end(self, task: Task, ending: Ending) -> None:
        """Report the score of a trial, or its failure, to the engine; release a trial that was stopped."""
        trial = self.active.pop(task, None)
        if trial is None:
            return
        if ending.status == "stopped":
            # An unreachable storage may be the reason for the stop; the other trials still have to be stopped.
            try:
                self.engine.give_back(trial.proposal.trial)
                self._say_interrupted(task, trial)
                self.on_change()
            except DlferError as error:
                self.console.say(f"{task.title}: {error}")
            return
        self._tell(self._make_row(task, trial, ending))

    def _begin(self, proposal: Proposal, worker: str) -> Task | None:
        row = MemberRow(
            arm=self.arm.name,
            trial=proposal.trial,
            seed=self.arm.config.experiment.seed,
            status="running",
            rung=proposal.epochs,
            worker=worker,
            settings=proposal.settings,
        )
        try:
            config = with_overrides(self.arm.config, sort_keys({**self.arm.base, **proposal.settings}))
        except ConfigError as error:
            self._tell(row.change(status="failed", error=str(error), kind="ConfigError", is_users=True, seconds=0.0))
            return None
        run = find_trial_run(self.engine.list_records(), proposal.settings, self.folder)
        if run is None:
            found = (record.find_folder(self.folder) for record in self.engine.list_records())
            siblings = [folder for folder in found if is_run(folder)]
            options, place = replace(self.options, judge_test=False), self.folder.parent.parent
            run = create_member_run(config, options, place, siblings=siblings, study=self.folder)
        digest = (run.record.config_digest or "")[:8]
        trial = _Trial(proposal, row.change(path=str(run.path.resolve()), digest=digest), run.config(), [])
        self.engine.begin(trial.row)
        task = Task(
            f"{self._describe_position(proposal.trial)}: {format_overrides(proposal.settings)}",
            run,
            lambda: self._replay_epochs(trial),
            lambda row: self._hear_epoch(trial, row),
        )
        self.active[task] = trial
        self.on_change()
        return task

    def _replay_epochs(self, trial: _Trial) -> Ending | None:
        """Report the epochs that were trained before; return an ending if nothing is left to do."""
        run = Run(Path(trial.row.path))
        trial.history = read_history_rows(run.path)
        for epochs, score in enumerate(self._list_scores(trial), start=1):
            if not self._goes_on(trial, epochs, score):
                return Ending("cut")
        return Ending("finished") if trial.history and run.status == "finished" else None

    def _hear_epoch(self, trial: _Trial, row: Mapping[str, Any]) -> bool:
        trial.history = [done for done in trial.history if done["epoch"] < row["epoch"]]
        trial.history.append({key: value for key, value in row.items() if key != "phase"})
        return self._goes_on(trial, len(trial.history), self._list_scores(trial)[-1])

    def _goes_on(self, trial: _Trial, epochs: int, score: float) -> bool:
        # After the last epoch there is nothing to cut short, and the run has to be completed.
        return self.engine.report(trial.proposal, epochs, score) or epochs >= trial.config.finetune.epochs

    def _list_scores(self, trial: _Trial) -> list[float]:
        return compute_scores_so_far(trial.history, self.objective, trial.config.finetune)

    def _make_row(self, task: Task, trial: _Trial, ending: Ending) -> MemberRow:
        ended = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        trial.history = read_history_rows(task.run.path)
        row = trial.row.change(epochs=len(trial.history), seconds=round(ending.seconds, 1), ended=ended)
        if ending.status == "failed":
            return row.change(status="failed", error=ending.error, kind=ending.kind, is_users=ending.is_users)
        status = "finished" if ending.status == "finished" else "pruned" if trial.proposal.epochs is None else "rung"
        row = row.change(status=status, score=self._list_scores(trial)[-1])
        metrics = read_metrics(task.run.path)
        name = "log_loss" if self.objective == "loss" else self.objective
        estimate = metrics.validation.get(name) if metrics is not None and metrics.validation is not None else None
        return row if estimate is None else row.change(low=estimate.low, high=estimate.high)

    def _tell(self, row: MemberRow) -> None:
        is_first_of_its_kind = self.held and row.kind != self.held[0].kind
        if row.status == "failed" and not self.works and not is_first_of_its_kind:
            self.held.append(row)
        else:
            self.works = True
            self._report_held_failures()
            self.engine.tell(row)
        self._say_ended(row)
        self.on_change()

    def _report_held_failures(self) -> None:
        while self.held:
            self.engine.tell(self.held.pop(0))

    def _describe_position(self, trial: str) -> str:
        records = [record.trial for record in self.engine.list_records()]
        total = self.engine.count_trials()
        number = records.index(trial) + 1 if trial in records else len(records)
        return f"trial {number}{f' of {total}' if total else ''}"

    def _say_ended(self, row: MemberRow) -> None:
        records = self.engine.list_records()
        best = find_best(records, self.objective)
        if row.status == "failed":
            what = f"failed: {shorten(row.error.partition(chr(10))[0])}"
        else:
            ends = {
                "rung": f" after the {row.epochs} epochs of its rung",
                "pruned": f" when pruned after {count_noun(row.epochs, 'epoch')}",
            }
            what = f"{self.objective} {row.score:.4f}{ends.get(row.status, '')}"
            what += "  <- best so far" if best is not None and best.trial == row.trial else ""
        left = describe_left(records, total=self.engine.count_trials(), total_epochs=self.engine.count_epochs())
        title = f"{self._describe_position(row.trial)}: {format_overrides(row.settings)}"
        self.console.say(f"{title}: {what}{f' ({left})' if left else ''}")

    def _say_interrupted(self, task: Task, trial: _Trial) -> None:
        trial.history = read_history_rows(task.run.path)
        scores = self._list_scores(trial)
        so_far = (
            f"{self.objective} {scores[-1]:.4f} after {count_noun(len(scores), 'epoch')}"
            if scores
            else "before its first epoch"
        )
        position, keys = self._describe_position(trial.proposal.trial), format_overrides(trial.proposal.settings)
        self.console.say(f"{position} interrupted at {so_far}: {keys}")


def find_trial_run(records: Sequence[MemberRow], settings: Mapping[str, Any], folder: Path) -> Run | None:
    """Return the run of a trial with these settings, if one has begun and its folder is accessible, else None."""
    for record in records:
        if record.settings == settings:
            found = record.find_folder(folder)
            if is_run(found):
                return Run(found)
    return None


def read_history_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a run's fine-tuning history as numbers; [] if there is no history."""
    rows = read_rows(path / "finetune" / "history.csv")
    return [{key: float(value) for key, value in row.items() if key != "phase"} for row in rows]


def describe_left(records: Sequence[MemberRow], *, total: int | None, total_epochs: int | None) -> str:
    """Return the time left in words, estimated from the trials that have ended; "" if it is unknown.

    The estimate counts epochs if trials differ in them, as in Hyperband, else trials. The number of workers is taken as
    that of the running trials, plus the one whose trial has just ended.

    `total` is the final number of trials, and `total_epochs` the sum of their epochs if trials differ in them.
    """
    ended = [record for record in records if record.seconds and record.status in ENDED]
    num_workers = 1 + sum(record.status == "running" for record in records)
    if total_epochs is None:
        done, counted, wanted = sum(record.status in ENDED for record in records), len(ended), total or 0
    else:
        done = counted = _count_epochs(ended)
        wanted = total_epochs
    if not counted or wanted <= done:
        return ""
    seconds = sum(record.seconds for record in ended) / counted * (wanted - done) / num_workers
    return f"about {format_duration(seconds)} left"


def _count_epochs(records: Sequence[MemberRow]) -> int:
    """Return the number of trained epochs; a longer rung of a trial includes the epochs of a shorter one."""
    most: dict[str, int] = {}
    for record in records:
        key = record.path or record.trial or ""
        most[key] = max(most.get(key, 0), record.epochs or 0)
    return sum(most.values())
