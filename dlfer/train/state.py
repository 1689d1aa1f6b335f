"""What a stage is given, where it stands, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from dlfer.config.schema import StageConfig
from dlfer.train.control import StopControl
from dlfer.train.device import Device
from dlfer.train.watch import TrainingListener


@dataclass(frozen=True)
class StageJob:
    """What one stage needs besides the network and the data.

    Attributes:
        name: "pretrain" or "finetune".
        config: its section of the experiment.
        folder: where checkpoints and history go.
        seed: of order, augmentation and dropout.
        device: what it computes on.
        checkpoint_minutes: between checkpoints inside an epoch.
        control: asked after each step whether to stop.
        listener: told about the progress.
        max_steps: at most so many steps an epoch, for --smoke; None takes all.
    """

    name: str
    config: StageConfig
    folder: Path
    seed: int
    device: Device
    checkpoint_minutes: float
    control: StopControl
    listener: TrainingListener
    max_steps: int | None = None


@dataclass
class StageState:
    """Where a stage stands; what a checkpoint holds besides the variables.

    Attributes:
        phase: "head" or "all", the one that the optimiser's variables belong to.
        epoch, step: the next step to do.
        sums: steps done of this epoch, and the sums of loss and accuracy over them.
        best, best_epoch: best value of the monitored metric and its epoch.
        reference: the value at the last improvement, which differs from the best by min_delta at most.
        waited: epochs since that improvement, or since the phase began, for early stopping.
        plateau_waited: likewise, or since the rate last fell.
        seconds: of training and validation so far, over all processes.
        images: seen in training so far.
        history: one row an epoch.
        stopped_early: whether early stopping ended the stage.
    """

    phase: str = ""
    epoch: int = 0
    step: int = 0
    sums: dict = field(default_factory=lambda: {"steps": 0, "loss": 0.0, "accuracy": 0.0})
    best: float | None = None
    best_epoch: int | None = None
    reference: float | None = None
    waited: int = 0
    plateau_waited: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    images: int = 0
    history: list = field(default_factory=list)
    stopped_early: bool = False

    def as_dict(self) -> dict:
        """Return the fields as JSON-ready values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class StageResult:
    """How a stage ended; the network holds the kept weights.

    Attributes:
        history: one dict an epoch, keys HISTORY_COLUMNS.
        kept_epoch: from 0.
        best: the monitored validation figure of that epoch.
        seconds, images: of training, validation included in the seconds.
        stopped_early: whether early stopping ended it.
    """

    history: list[dict]
    kept_epoch: int
    best: float
    seconds: float
    images: int
    stopped_early: bool
