"""The members of a comparison, each an ordinary run of one arm with one seed or fold, and those of an ensemble."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer.config.load import compute_digest, with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.variations import is_within
from dlfer.errors import ConfigError, DlferError, ModelError, UserError
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import MEMBERS_FILE, MemberRow, is_run, read_member_rows
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.records import Cost, to_json
from dlfer.runs.run import RUN_FILE, Run
from dlfer.runs.run_records import require_metrics
from dlfer.runs.text import count_noun
from dlfer.study.child import WorkerSlot, find_slots
from dlfer.study.runner import Ending, Runner, Source, StudyConsole, Task

if TYPE_CHECKING:
    from dlfer.experiment.session import Session

SPLITS = ("train", "validation", "test")


@dataclass
class Member:
    """One arm with one seed, and in a cross-validation with one fold.

    Attributes:
        arm: name of the arm.
        seed: random seed of EF-FER2.
        fold: fold that is the test split; None outside of cross-validations.
        overrides: keys that the member sets, without its seed.
        path: path of its run directory; "" until it has begun.
        status: "pending", "running", "finished", "stopped" or "failed".
        error: first line of the error message.
    """

    arm: str
    seed: int
    overrides: dict[str, Any]
    path: str = ""
    status: str = "pending"
    error: str = ""
    fold: int | None = None

    @property
    def title(self) -> str:
        """The arm and the seed or fold, for display."""
        return f"{self.arm}, seed {self.seed}" if self.fold is None else f"{self.arm}, fold {self.fold}"

    @property
    def run(self) -> Run:
        """The run of this member, which must have begun."""
        return Run(Path(self.path))

    def make_config(self, config: ExperimentConfig) -> ExperimentConfig:
        """Return the comparison's experiment with the keys and the seed of this member set."""
        return with_overrides(config, {**self.overrides, "experiment.seed": self.seed})

    def fail(self, error: BaseException | str) -> None:
        """Set the status to failed, with the first line of the error message."""
        self.status, self.error = "failed", (str(error).splitlines() or [type(error).__name__])[0]

    @cached_property
    def metrics(self) -> Metrics:
        """The metrics of the finished run."""
        return require_metrics(self.path)

    @cached_property
    def cost(self) -> Cost:
        """The cost of the finished run in seconds and images."""
        return self.run.record.cost or Cost()

    def read_split(self, split: str) -> Predictions | None:
        """Return the predictions of a split, or None if there are none."""
        path = Path(self.path) / "predictions" / f"{split}.npz"
        return read_predictions(path) if path.exists() else None

    def as_row(self) -> MemberRow:
        """Return the member's row of members.csv, with metrics if it has finished."""
        row = MemberRow(
            arm=self.arm,
            seed=self.seed,
            fold=self.fold,
            path=self.path,
            status=self.status,
            error=self.error,
            digest=(self.run.record.config_digest or "")[:8] if self.path else "",
            settings=self.overrides,
        )
        if self.status != "finished":
            return row
        found = {name: self.metrics.get(name) for name in SPLITS}
        accuracies = {f"{name}_accuracy": scores.accuracy.value for name, scores in found.items() if scores}
        seconds = {"seconds": self.cost.finetune_seconds, "pretrain_seconds": self.cost.pretrain_seconds}
        return row.change(macro_f1=self.metrics.judged.macro_f1.value, **seconds, **accuracies)


@dataclass(frozen=True)
class Plan:
    """The plan of a comparison: every arm with every seed, or on every fold.

    Attributes:
        kind: "ablation", "sweep" or "cross_validation".
        arms: name of an arm -> the keys that it sets.
        seeds: random seeds of EF-FER2.
        folds: folds of a cross-validation, with one seed each; None for other kinds.
        reference: arm that the others are compared with; None: the best on validation.
        late_keys: arm -> the keys whose values are known only after members of other arms have finished.
    """

    kind: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    reference: str | None = None
    folds: Sequence[int] | None = None
    late_keys: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        """The subcommand of dlfer that runs it."""
        return {"ablation": "ablate", "cross_validation": "crossval"}.get(self.kind, self.kind)

    def compute_digest(self, config: ExperimentConfig) -> str:
        """Return the sha256 (64 hex characters) of all that determines the members of an experiment and their order."""
        arms = [[arm, to_json(overrides)] for arm, overrides in self.arms.items()]
        folds = None if self.folds is None else list(self.folds)
        values = [compute_digest(config), self.kind, arms, list(self.seeds), folds]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def make_members(self) -> list[Member]:
        """Return the members ordered by seed or fold, so that all arms are run with one before the next."""
        if self.folds is None:
            return [Member(arm, seed, dict(overrides)) for seed in self.seeds for arm, overrides in self.arms.items()]
        return [
            Member(arm, seed, {**overrides, "finetune.data.fold": fold}, fold=fold)
            for seed, fold in zip(self.seeds, self.folds, strict=True)
            for arm, overrides in self.arms.items()
        ]


INDEX_VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
"""Environment variables in which Slurm and Kubernetes give the task index of a job array."""


def read_member_index(text: str, count: int) -> int:
    """Return the index of the member for --member: the given number, or for "auto" the task index of the job array.

    Raises:
        UserError: there is no such member, or no task index in the environment.
    """
    value = text
    if text == "auto":
        value = next((os.environ[name] for name in INDEX_VARIABLES if os.environ.get(name)), None)
        if value is None:
            raise UserError(
                f"--member auto: found neither {' nor '.join(INDEX_VARIABLES)} in the environment; give a number."
            )
    if not value.isdecimal() or int(value) >= count:
        raise UserError(
            f"--member {text}: found {value}, expected a number from 0 to {count - 1}, as --dry-run lists them, or auto."
        )
    return int(value)


def explain_members(config: ExperimentConfig, plan: Plan, options: RunOptions) -> None:
    """Print what a comparison would do: the plan of the first member, and all members with their numbers."""
    from dlfer.experiment.run import explain_experiment
    from dlfer.experiment.session import Session

    members, session = plan.make_members(), Session.start(options)
    say = session.listener.say
    say(f"the first of {len(members)} members:")
    explain_experiment(members[0].make_config(config), session)
    for number, member in enumerate(members):
        say(f"member {number}: {member.title}")
    trained = {describe_pretraining(member.make_config(config)) for member in members} - {None}
    counts = count_noun(len(plan.arms), "arm"), count_noun(len(plan.seeds), "seed" if plan.folds is None else "fold")
    say(
        f"{' x '.join(counts)} = {count_noun(len(members), 'member')}; EF-FER1 is trained for them "
        f"{count_noun(len(trained), 'time')}, and shared where it is the same."
    )


def describe_pretraining(config: ExperimentConfig) -> str | None:
    """Return the training settings of EF-FER1 as text, equal for members that share one; None if none is trained."""
    if config.pretrain is None or config.pretrain.weights is not None:
        return None
    return config.pretrain.model_dump_json() + config.model.model_dump_json()


def describe_process(config: ExperimentConfig) -> str:
    """Return the process-wide settings (device, precision, determinism) as text; it is equal for a shared process."""
    return config.experiment.model_dump_json(exclude={"name", "seed"})


def refuse_fixed_members(config: ExperimentConfig, *, num_seeds: int, drops_pretrain: bool) -> None:
    """Refuse an ensemble in which a member fixes what a study varies.

    Args:
        config: experiment of the study.
        num_seeds: number of seeds of the study.
        drops_pretrain: whether one of its arms or cells has no EF-FER1.

    Raises:
        ConfigError: a member sets its own seed or is already trained, and so would be the same for each of several
            seeds; or a member would have EF-FER1 in the arm without it.
    """
    for member in config.ensemble.members if config.ensemble is not None else ():
        keys = (
            []
            if member.set is None
            else [key for key in member.set if is_within(key, "experiment.seed") or key == "experiment"]
        )
        if num_seeds > 1 and (member.set is None or keys):
            what = f"sets {keys[0]}" if keys else f"is {member.model}, which is trained already"
            raise ConfigError(
                f"ensemble.members {member.name}: {what}, so that it would be the same with each of the {num_seeds} seeds, and the "
                "intervals over seeds too narrow. Give one seed (--seeds 0), or leave the key out of the member."
            )
        if not drops_pretrain:
            continue
        own = [key for key in member.set or () if is_within(key, "pretrain")]
        if own or member.set is None:
            what = f"sets {own[0]}" if own else f"is {member.model}"
            raise ConfigError(
                f"ensemble.members {member.name}: {what}, so that it would have EF-FER1 in the arm without it, too. Compare each "
                "member's own experiment instead."
            )


def average_seconds(members: Sequence[Member]) -> float | None:
    """Return the mean recorded fine-tuning time in seconds; None without any, e.g. for ensembles of existing models."""
    known = [seconds for member in members if (seconds := member.cost.finetune_seconds) is not None]
    return sum(known) / len(known) if known else None


def group_finished(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Return arm -> its finished members, only for arms that have any."""
    finished: dict[str, list[Member]] = {}
    for member in members:
        if member.status == "finished":
            finished.setdefault(member.arm, []).append(member)
    return finished


def read_members(run: Run, plan: Plan) -> list[Member]:
    """Return the planned members with their state from members.csv; a member whose folder is gone starts again.

    Raises:
        ModelError: the file lists a member that is not in the plan.
    """
    members = plan.make_members()
    planned = {(member.arm, member.seed, member.fold): member for member in members}
    for row in read_member_rows(run.path):
        member = planned.get((row.arm, row.seed, row.fold))
        if member is None:
            raise ModelError(
                f"{run.path / MEMBERS_FILE}: found the member {row.title}, which config.yaml beside it does "
                "not plan; one of the two files was changed. Start a new comparison."
            )
        folder = row.find_folder(run.path)
        if is_run(folder):
            member.path, member.status, member.error = str(folder), row.status, row.error
    return members


def open_shared_run(folder: Path, experiment: str, name: str, create: Callable[[Path], Run]) -> Run:
    """Create or open the run directory `folder`/`experiment`/`name`, which several processes share.

    The first process creates it under a temporary name and renames it. So no process sees an incomplete directory, and
    all processes, also on other machines, use the same one.

    `folder` is a folder of runs that all of them can access, and `create` creates a run in the folder that it is given.
    """
    path = folder / experiment / name
    if (path / RUN_FILE).exists():
        return Run(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        made = create(draft)
        # Renaming to an existing, non-empty directory fails, which means that another process was first.
        with contextlib.suppress(OSError):
            os.rename(made.path, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not (path / RUN_FILE).exists():
        raise ModelError(f"{path}: cannot be made; is the folder writable? Choose another folder of runs by --out.")
    return Run(path)


class _EnsembleSource(Source):
    """A source of the runs of an ensemble's members; after the first failure it gives no more."""

    def __init__(self, runs: Mapping[str, Run], on_change: Callable[[], None]) -> None:
        self.waiting = [Task(f"member {name}", run) for name, run in runs.items()]
        self.on_change = on_change
        self.failure: tuple[str, Ending] | None = None

    def take(self, slot: WorkerSlot) -> Task | None:
        return self.waiting.pop(0) if self.waiting else None

    def end(self, task: Task, ending: Ending) -> None:
        if ending.status == "failed":
            self.failure, self.waiting = self.failure or (task.title, ending), []
        self.on_change()


def run_ensemble_members(runs: Mapping[str, Run], session: Session, on_change: Callable[[], None]) -> None:
    """Execute the runs of an ensemble's members in separate processes, one for each GPU at a time.

    `on_change` is called whenever a member has ended.

    Raises:
        TrainingStopped: a stop was requested; the members have stopped at checkpoints.
        ResumeError: data, experiment or software has changed since a member began.
        DlferError: a member failed; a UserError if the user has to correct something.
    """
    if not runs:
        return
    slots = find_slots(None, next(iter(runs.values())).config())
    source = _EnsembleSource(runs, on_change)
    hint = session.resume_hint or ""
    options = session.options
    Runner(
        slots, session.control, StudyConsole(), hint, options.require_gpu, accept_changes=options.accept_changes
    ).run(source)
    if source.failure is not None:
        title, ending = source.failure
        raise (UserError if ending.is_users else DlferError)(f"{title} failed: {ending.kind}: {ending.error}")
