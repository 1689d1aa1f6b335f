"""The inputs, progress and result of a stage, its history, early stopping, and checkpoints, each in a single file.

Early stopping and the schedule plateau count epochs in the same way, like Keras' EarlyStopping and ReduceLROnPlateau:
an epoch is an improvement if it beats the value at the last improvement, not the best value, by more than min_delta.
Thus small gains count once their sum exceeds min_delta. Patience p runs out at the end of the p-th consecutive epoch
without an improvement.

A checkpoint is replaced atomically. Keras' BackupAndRestore loses the dropout seeds (they are in neither .weights.h5
nor .keras) and restarts the shuffle. Here every variable of network and optimiser is saved, including dropout seeds,
and the order of images is a function of seed, epoch and step.
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
    """The inputs of a stage other than the network and the data.

    Attributes:
        name: "pretrain" or "finetune".
        config: the stage's section of the experiment.
        folder: folder for checkpoints and history.
        seed: determines the order of images, augmentation and dropout.
        device: device on which it computes.
        checkpoint_minutes: minutes between checkpoints within an epoch.
        control: stop requests, checked after each step.
        listener: receives the progress for display.
        max_steps: largest number of steps per epoch, for --smoke; None sets no limit.
        run_listeners: the user's listeners, called for steps and epochs.
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
        """Report the end of an epoch to all listeners; `row` is its row of the history."""
        self.listener.finish_epoch(self.name, dict(row), is_best=is_best)
        values = {name: float(value) for name, value in row.items() if name not in ("epoch", "phase")}
        self.run_listeners.epoch(self.name, row["epoch"], values)

    def report_step(self, epoch: int, step: int, steps: int, *, loss: float, accuracy: float) -> None:
        """Report to all listeners that `step` of `steps` of an epoch (from 1) are done, with running means."""
        self.listener.finish_step(step, loss, accuracy)
        self.run_listeners.step(self.name, epoch, step, steps, {"loss": loss, "accuracy": accuracy})


@dataclass
class StageState:
    """The progress of a stage, which a checkpoint holds in addition to the variables.

    Attributes:
        phase: "head" or "all", the phase of the optimiser's variables; "trees" for boosted trees.
        epoch, step: position of the next step, both from 0.
        sums: number of finished steps of this epoch, and the sums of loss and accuracy over them.
        best, best_epoch: best value of the monitored metric, and its epoch from 0.
        reference: the value at the last improvement, which differs from the best by min_delta at most.
        waited: epochs since that improvement, or since the phase began, for early stopping.
        plateau_waited: epochs since that improvement, the start of the phase, or the last reduction of the rate.
        seconds: of training and validation so far, including those before the training was resumed.
        epoch_seconds: seconds of the current epoch so far; those of networks do not include validation.
        images: number of images processed in training so far.
        history: one row per epoch.
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
        """Append the row of a finished epoch to the history, and return it.

        Args:
            train: the training loss and accuracy; other keys are ignored.
            validation: the validation metrics from `compute_epoch_metrics`.
            rate: the learning rate.
            images: number of images processed in the epoch.
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
    """The result of a stage, whose network holds the kept weights.

    Attributes:
        history: one dict per epoch, with the keys COLUMNS.
        kept_epoch: epoch of the kept weights, from 0.
        best: best value of the monitored validation metric, which with `keep: last` may be that of another epoch.
        seconds, images: seconds of training and validation, and number of images processed in training.
        stopped_early: whether early stopping ended the stage.
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
    """A TensorBoard log of a stage, written without TensorFlow; does nothing if tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer = None

    def write(self, row: dict) -> None:
        """Log every float of a row of the history, with its epoch as the step."""
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self.writer is None:
            from tensorboard.summary import Writer

            self.writer = Writer(str(self.folder))
        for key, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(key.replace("_", "/", 1), value, int(row["epoch"]))
        self.writer.flush()


def compute_epoch_metrics(loss: float, confusion: np.ndarray) -> dict[str, float]:
    """Return the loss, and the accuracy and macro F1 of a confusion matrix int [C, C], by name."""
    return {
        "loss": float(loss),
        "accuracy": float(compute_accuracy(confusion)),
        "macro_f1": float(compute_macro_f1(confusion)),
    }


def count_epoch(state: StageState, value: float, config: StageConfig) -> bool:
    """Update the state with the monitored value of an epoch; return whether the epoch is the best so far.

    Args:
        state: its best, best_epoch, reference and waited are updated.
        value: the monitored metric of the epoch `state.epoch`; NaN is never an improvement over a number.
        config: its monitor and early_stopping.min_delta are used.
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
    """Update the plateau counter after `count_epoch`; return whether the learning rate must be lowered now."""
    state.plateau_waited = 0 if state.waited == 0 else state.plateau_waited + 1
    if state.plateau_waited < patience:
        return False
    state.plateau_waited = 0
    return True


def beats(value: float, reference: float | None, monitor: str, *, min_delta: float = 0.0) -> bool:
    """Return whether `value` beats `reference` by more than `min_delta`: lower for the monitor "loss", else higher."""
    if reference is None or math.isnan(reference):
        return True
    return value + min_delta < reference if monitor == "loss" else value - min_delta > reference


def find_reference(values: Sequence[float], config: StageConfig) -> float | None:
    """Return the value at the last improvement among the monitored values of all epochs so far; None without epochs."""
    reference = None
    for value in values:
        if beats(value, reference, config.monitor, min_delta=get_min_delta(config)):
            reference = value
    return reference


def get_min_delta(config: StageConfig) -> float:
    """Return early_stopping.min_delta, which an improvement must exceed; 0 without early stopping."""
    return config.early_stopping.min_delta if config.early_stopping else 0.0


def write_checkpoint(path: Path, variables: Sequence[keras.Variable], state: dict) -> None:
    """Write the values of `variables`, in order, and the JSON-serialisable `state` to a checkpoint.

    After an error, such as a full disk, the previous checkpoint is kept.

    Raises:
        OSError: the file cannot be written, see `replace_when_done`.
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
    """Return the `state` of a checkpoint.

    Raises:
        ModelError: the checkpoint is damaged.
    """
    return _read_record(path)["state"]


def restore_checkpoint(path: Path, variables: Sequence[keras.Variable]) -> dict:
    """Set `variables` to their values in a checkpoint of `write_checkpoint`, and return its `state`.

    Raises:
        ModelError: the checkpoint is damaged or has other variables; in this case no variable has been changed.
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


def require_resume_file(lost: Path, traces: Sequence[Path]) -> None:
    """Raise ModelError if `lost`, needed to resume, is missing while a file of `traces` shows that training began."""
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
    """Remove the counters that Keras appends to repeated names in a process, such as that of a second optimiser."""
    return [re.sub(r"_\d+(?=/|$)", "", path) for path in paths]
