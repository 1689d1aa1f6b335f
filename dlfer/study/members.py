"""The members of a comparison: each is an arm with a seed, and an ordinary run; members.csv lists them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ModelError
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.runs.evaluations import require_metrics
from dlfer.runs.files import write_atomically
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.records import Cost
from dlfer.runs.run import RUN_FILE, Run

MEMBERS_FILE = "members.csv"
PARTS = ("train", "validation", "test")
COLUMNS = (
    "arm",
    "seed",
    "digest",
    "path",
    "status",
    "train_accuracy",
    "validation_accuracy",
    "test_accuracy",
    "macro_f1",
    "seconds",
    "pretrain_seconds",
    "error",
)


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


def write_members(run: Run, members: Sequence[Member]) -> None:
    """Write members.csv of a comparison."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_make_row(member) for member in members)
    write_atomically(run.path / MEMBERS_FILE, text.getvalue())


def read_members(run: Run, plan: Plan) -> list[Member]:
    """Return the planned members with what members.csv says of them; one whose folder is gone is begun anew.

    Raises:
        ModelError: the file names a member that is not in the plan.
    """
    path, members = run.path / MEMBERS_FILE, plan.make_members()
    if not path.exists():
        return members
    planned = {(member.arm, str(member.seed)): member for member in members}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            member = planned.get((row["arm"], row["seed"]))
            if member is None:
                raise ModelError(
                    f"{path}: found the member {row['arm']}, seed {row['seed']}, which config.yaml beside it does not "
                    "plan; one of the two files was changed. Start a new comparison."
                )
            place = _find_folder(run, row["path"])
            if place:
                member.path, member.status, member.error = place, row["status"], row.get("error") or ""
    return members


def _find_folder(run: Run, path: str) -> str:
    """Return where a member stands now: as recorded, or beside the comparison if the folder was moved; else ""."""
    beside = run.path.parent / Path(path).name
    return next((str(place) for place in (Path(path), beside) if path and (place / RUN_FILE).exists()), "")


def _make_row(member: Member) -> dict[str, Any]:
    row = {name: getattr(member, name) for name in ("arm", "seed", "path", "status", "error")}
    if member.path:
        row["digest"] = (member.run.record.config_digest or "")[:8]
    if member.status != "finished":
        return row
    metrics, cost = member.metrics, member.cost
    row |= {f"{part}_accuracy": metrics.get(part).accuracy.value for part in PARTS if metrics.get(part)}
    return row | {
        "macro_f1": metrics.judged.macro_f1.value,
        "seconds": cost.finetune_seconds,
        "pretrain_seconds": cost.pretrain_seconds,
    }
