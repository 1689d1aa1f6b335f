"""Everything that a stage needs to go on where it stopped, in one file that is replaced whole.

Keras' BackupAndRestore loses the dropout seeds (they are in neither .weights.h5 nor .keras) and starts
the shuffle anew. Here every variable of network and optimiser is kept, dropout seeds included, and the
order of images is a function of seed, epoch and step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from dlfer.errors import ModelError


def write_checkpoint(path: Path, variables: Sequence[keras.Variable], state: dict) -> None:
    """Write the values of `variables`, in order, and the JSON-ready `state`; atomic."""
    arrays = {f"{index:05d}": _to_numpy(variable) for index, variable in enumerate(variables)}
    record = {"paths": [variable.path for variable in variables], "state": state}
    temporary = path.with_name(f"new.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        np.savez(file, record=np.frombuffer(json.dumps(record).encode(), np.uint8), **arrays)
    temporary.replace(path)


def read_state(path: Path) -> dict:
    """Return the `state` of a checkpoint, without touching a variable."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(file["record"].tobytes())["state"]


def restore_checkpoint(path: Path, variables: Sequence[keras.Variable]) -> dict:
    """Set `variables` to what `write_checkpoint` wrote and return its `state`.

    Raises:
        ModelError: the checkpoint is of other variables; none has been changed then.
    """
    with np.load(path, allow_pickle=False) as file:
        record = json.loads(file["record"].tobytes())
        paths = [variable.path for variable in variables]
        if _without_numbers(record["paths"]) != _without_numbers(paths):
            raise ModelError(
                f"{path}: holds {len(record['paths'])} variables, the network to train has {len(paths)} "
                "of other names. The experiment or dlfer changed since; start a new run."
            )
        arrays = [file[f"{index:05d}"] for index in range(len(variables))]
        for variable, values in zip(variables, arrays, strict=True):
            if tuple(variable.shape) != values.shape:
                raise ModelError(f"{path}: {variable.path} has shape {values.shape}, expected {tuple(variable.shape)}.")
        for variable, values in zip(variables, arrays, strict=True):
            variable.assign(values)
        return record["state"]


def _without_numbers(paths: Sequence[str]) -> list[str]:
    """Drop the counters that Keras appends to the names of a process' second optimiser, seed generator ..."""
    return [re.sub(r"_\d+(?=/|$)", "", path) for path in paths]


def _to_numpy(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable.value))
