"""The members of a comparison: each is an arm with a seed, and an ordinary run; members.csv lists them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ModelError
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.runs.member_rows import MEMBERS_FILE, MemberRow, is_run, read_member_rows
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.records import Cost
from dlfer.runs.run import RUN_FILE, Run, create_run
from dlfer.runs.run_records import require_metrics

SPLITS = ("train", "validation", "test")


@dataclass
class Member:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of EF-FER2.
        overrides: the keys that the arm sets.
        path: of its run directory, once it has begun.
        status: "pending", "running", "finished", "stopped" or "failed".
        error: the first line of what went wrong.
    """

    arm: str
    seed: int
    overrides: dict[str, Any]
    path: str = ""
    status: str = "pending"
    error: str = ""

    @property
    def title(self) -> str:
        """Arm and seed, for a person."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def run(self) -> Run:
        """The run, once it has begun."""
        return Run(Path(self.path))

    def make_config(self, config: ExperimentConfig) -> ExperimentConfig:
        """Return the comparison's experiment with the keys of this member set."""
        return with_overrides(config, {**self.overrides, "experiment.seed": self.seed})

    def fail(self, error: BaseException | str) -> None:
        """Note what went wrong."""
        self.status, self.error = "failed", (str(error).splitlines() or [type(error).__name__])[0]

    @cached_property
    def metrics(self) -> Metrics:
        """The metrics of the finished run."""
        return require_metrics(self.path)

    @cached_property
    def cost(self) -> Cost:
        """What the finished run took."""
        return self.run.record.cost or Cost()

    def read_part(self, part: str) -> Predictions | None:
        """Return the predictions of a part; None where there are none."""
        path = Path(self.path) / "predictions" / f"{part}.npz"
        return read_predictions(path) if path.exists() else None

    def as_row(self) -> MemberRow:
        """Return the member's line of members.csv, with the metrics of a finished one."""
        row = MemberRow(
            arm=self.arm,
            seed=self.seed,
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
    """What a comparison runs: every arm with every seed.

    Attributes:
        kind: "ablation" or "sweep".
        arms: name -> the keys that it sets.
        seeds: of EF-FER2.
        reference: the arm that the others are compared with; None: the best on validation.
    """

    kind: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    reference: str | None = None

    @property
    def verb(self) -> str:
        """The command that runs it."""
        return {"ablation": "ablate"}.get(self.kind, self.kind)

    def make_members(self) -> list[Member]:
        """Return the members, seed by seed: all arms are known by one seed before the next begins."""
        return [Member(arm, seed, dict(overrides)) for seed in self.seeds for arm, overrides in self.arms.items()]


def group_finished(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Return arm -> its finished members, without the arms that have none."""
    finished: dict[str, list[Member]] = {}
    for member in members:
        if member.status == "finished":
            finished.setdefault(member.arm, []).append(member)
    return finished


def read_members(run: Run, plan: Plan) -> list[Member]:
    """Return the planned members with what members.csv says of them; one whose folder is gone is begun anew.

    Raises:
        ModelError: the file names a member that is not in the plan.
    """
    members = plan.make_members()
    planned = {(member.arm, member.seed): member for member in members}
    for row in read_member_rows(run.path):
        member = planned.get((row.arm, row.seed))
        if member is None:
            raise ModelError(
                f"{run.path / MEMBERS_FILE}: found the member {row.arm}, seed {row.seed}, which config.yaml beside it does "
                "not plan; one of the two files was changed. Start a new comparison."
            )
        folder = row.find_folder(run.path)
        if is_run(folder):
            member.path, member.status, member.error = str(folder), row.status, row.error
    return members


def open_shared_run(
    folder: Path, name: str, config: ExperimentConfig, *, argv: Sequence[str], kind: str, facts: Mapping[str, Any]
) -> Run:
    """Make or open the run directory that several processes share, `folder`/<experiment>/`name`.

    Whoever comes first makes it, as a whole: under another name, and renamed. So nobody ever sees half of it, and all
    processes, on whatever machine, agree on one directory.

    Args:
        folder: the folder of runs, which all of them see.
        name: the same in all processes.
        config: of the experiment.
        argv: the command that asked for it.
        kind: as of `create_run`.
        facts: further fields of run.json.
    """
    path = folder / config.experiment.name / name
    if (path / RUN_FILE).exists():
        return Run(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        made = create_run(draft, config, argv=list(argv), kind=kind)
        made.update(**facts)
        # Renaming to a directory that exists and has files in it fails: then another process was first.
        with contextlib.suppress(OSError):
            os.rename(made.path, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not (path / RUN_FILE).exists():
        raise ModelError(f"{path}: cannot be made; is the folder writable? Choose another folder of runs by --out.")
    return Run(path)
