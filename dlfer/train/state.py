"""What a stage is given, its progress and how it ended; its history, and its checkpoint in one file.

Early stopping and the schedule plateau count epochs alike, as Keras' EarlyStopping and ReduceLROnPlateau do: an epoch
is an improvement if it beats the value at the last improvement, not the best value, by more than min_delta. So many
small gains in a row count once their sum exceeds min_delta. Patience p is used up at the end of the p-th epoch in a
row without an improvement.

A checkpoint is replaced whole. Keras' BackupAndRestore loses the dropout seeds (they are in neither .weights.h5 nor
.keras) and restarts the shuffle. Here every variable of network and optimiser is kept, dropout seeds included, and
the order of images is a function of seed, epoch and step.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dlfer.config.schema import StageConfig
from dlfer.errors import ModelError, shorten
from dlfer.metrics.classification import compute_accuracy, compute_macro_f1
from dlfer.runs.files import Header, parse_json, read_npz, replace_when_done
from dlfer.runs.listeners import Listeners
from dlfer.train.cluster import Device
from dlfer.train.progress import StopControl, TrainingListener


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
        run_listeners: told of steps and epochs.
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
    run_listeners: Listeners = field(default_factory=Listeners)

    def report_epoch(self, row: Mapping[str, Any], *, is_best: bool) -> None:
        """Tell all who watch that an epoch is done; `row` is its line of history."""
        self.listener.finish_epoch(self.name, dict(row), is_best=is_best)
        values = {name: float(value) for name, value in row.items() if name not in ("epoch", "phase")}
        self.run_listeners.epoch(self.name, row["epoch"], values)

    def report_step(self, epoch: int, step: int, steps: int, *, loss: float, accuracy: float) -> None:
        """Tell all who watch that `step` of `steps` of an epoch (from 1) are done; loss and accuracy are running means."""
        self.listener.finish_step(step, loss, accuracy)
        self.run_listeners.step(self.name, epoch, step, steps, {"loss": loss, "accuracy": accuracy})


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

    def add_row(self, train: Mapping[str, float], validation: Mapping[str, float], *, rate: float, images: int) -> dict:
        """Add the row of an epoch that is done to the history, and return it.

        Args:
            train: its loss and accuracy, maybe more.
            validation: as `name_figures` gives them.
            rate: the learning rate.
            images: seen in the epoch.
        """
        row = {
            "epoch": self.epoch + 1,
            "phase": self.phase,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            **{f"validation_{name}": value for name, value in validation.items()},
            "learning_rate": rate,
            "seconds": self.epoch_seconds,
            "images_per_second": images / self.epoch_seconds if self.epoch_seconds else 0.0,
        }
        self.history.append(row)
        return row


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


COLUMNS = (
    "epoch",
    "phase",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "validation_macro_f1",
    "learning_rate",
    "seconds",
    "images_per_second",
)


class ScalarLog:
    """TensorBoard's log of a stage, written without TensorFlow; silent where tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer = None

    def write(self, row: dict) -> None:
        """Log every number of one row of history under its epoch."""
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self.writer is None:
            from tensorboard.summary import Writer

            self.writer = Writer(str(self.folder))
        for key, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(key.replace("_", "/", 1), value, int(row["epoch"]))
        self.writer.flush()


def name_figures(loss: float, confusion: np.ndarray) -> dict[str, float]:
    """Return loss, accuracy and macro F1 of a confusion matrix int [C, C]."""
    return {
        "loss": float(loss),
        "accuracy": float(compute_accuracy(confusion)),
        "macro_f1": float(compute_macro_f1(confusion)),
    }


def count_epoch(state: StageState, value: float, config: StageConfig) -> bool:
    """Count an epoch whose monitored metric is `value`; return whether it is the best so far.

    Args:
        state: best, best_epoch, reference and waited are changed.
        value: of the epoch `state.epoch`; NaN is never an improvement on a number.
        config: its monitor and early_stopping.min_delta apply.
    """
    is_best = beats(value, state.best, config.monitor)
    if is_best:
        state.best, state.best_epoch = value, state.epoch
    if beats(value, state.reference, config.monitor, min_delta=get_min_delta(config)):
        state.reference, state.waited = value, 0
    else:
        state.waited += 1
    return is_best


def count_plateau(state: StageState, patience: int) -> bool:
    """Count the epoch towards the schedule plateau, after `count_epoch`; return whether the rate falls now."""
    state.plateau_waited = 0 if state.waited == 0 else state.plateau_waited + 1
    if state.plateau_waited < patience:
        return False
    state.plateau_waited = 0
    return True


def beats(value: float, reference: float | None, monitor: str, *, min_delta: float = 0.0) -> bool:
    """Return whether `value` is better than `reference` by more than `min_delta`: lower for a loss, else higher."""
    if reference is None or math.isnan(reference):
        return True
    return value + min_delta < reference if monitor == "loss" else value - min_delta > reference


def find_reference(values: Sequence[float], config: StageConfig) -> float | None:
    """Return the value at the last improvement among the monitored values of the epochs so far; None for no epochs."""
    reference = None
    for value in values:
        if beats(value, reference, config.monitor, min_delta=get_min_delta(config)):
            reference = value
    return reference


def get_min_delta(config: StageConfig) -> float:
    """Return what an improvement must exceed."""
    return config.early_stopping.min_delta if config.early_stopping else 0.0


def write_checkpoint(path: Path, variables: Sequence[keras.Variable], state: dict) -> None:
    """Write the values of `variables`, in order, and the JSON-ready `state`.

    After an error, as of a full disk, the previous checkpoint is kept.

    Raises:
        OSError: as `replace_when_done`.
    """
    arrays = {
        f"{index:05d}": np.asarray(keras.ops.convert_to_numpy(variable.value))
        for index, variable in enumerate(variables)
    }
    record = {"paths": [variable.path for variable in variables], "state": state}
    size = sum(values.nbytes for values in arrays.values())
    with replace_when_done(path, size=size) as temporary, open(temporary, "xb") as file:
        np.savez(file, record=np.frombuffer(json.dumps(record).encode(), np.uint8), **arrays)


def read_state(path: Path) -> dict:
    """Return the `state` of a checkpoint, without touching a variable.

    Raises:
        ModelError: the checkpoint is damaged.
    """
    return _read_record(path)["state"]


def restore_checkpoint(path: Path, variables: Sequence[keras.Variable]) -> dict:
    """Set `variables` to what `write_checkpoint` wrote and return its `state`.

    Raises:
        ModelError: the checkpoint is damaged, or of other variables; none has been changed then.
    """
    record, paths = _read_record(path), [variable.path for variable in variables]
    if _without_numbers(record["paths"]) != _without_numbers(paths):
        raise ModelError(
            f"{path}: holds {len(record['paths'])} variables, the network to train has {len(paths)} "
            "of other names. The experiment or dlfer changed since; start a new run."
        )
    names = [f"{index:05d}" for index in range(len(variables))]

    def check(headers: Mapping[str, Header]) -> None:
        for name, variable in zip(names, variables, strict=True):
            if headers[name].shape != tuple(variable.shape):
                raise ModelError(
                    f"{path}: {variable.path} has shape {headers[name].shape}, expected {tuple(variable.shape)}."
                )

    arrays = _read_arrays(path, names, check)
    for name, variable in zip(names, variables, strict=True):
        variable.assign(arrays[name])
    return record["state"]


def refuse_lost_file(lost: Path, traces: Sequence[Path]) -> None:
    """Raise ModelError where `lost`, which a training goes on from, is absent and one of `traces` shows that it had begun."""
    found = [path.name for path in traces if path.exists()]
    if found and not lost.exists():
        raise ModelError(
            f"{lost}: this file is missing, and the training that wrote {' and '.join(found)} beside it cannot be continued "
            f"without it. Put it back or start a new run; to train this stage from its first epoch here, delete {' and '.join(found)}."
        )


def _read_record(path: Path) -> dict:
    contents = _read_arrays(path, ["record"])["record"].tobytes()
    try:
        record = parse_json(contents)
    except ValueError as error:
        raise ModelError(f"{path}: the checkpoint cannot be read ({shorten(error, path)}); start a new run.") from error
    if not isinstance(record, dict) or not isinstance(record.get("paths"), list) or "state" not in record:
        raise ModelError(f"{path}: is no checkpoint of dlfer; start a new run.")
    return record


def _read_arrays(
    path: Path, names: Sequence[str], check: Callable[[Mapping[str, Header]], None] | None = None
) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, names=names, check=check)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the checkpoint cannot be read ({shorten(error, path)}); start a new run.") from error


def _without_numbers(paths: Sequence[str]) -> list[str]:
    """Drop the counters that Keras appends to the names of a process' second optimiser, seed generator ..."""
    return [re.sub(r"_\d+(?=/|$)", "", path) for path in paths]
