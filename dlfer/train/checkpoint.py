"""Everything that a stage needs to go on where it stopped, in one file that is replaced whole.

Keras' BackupAndRestore loses the dropout seeds (they are in neither .weights.h5 nor .keras) and starts
the shuffle anew. Here every variable of network and optimiser is kept, dropout seeds included, and the
order of images is a function of seed, epoch and step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from dlfer.errors import ModelError
from dlfer.runs.files import Header, parse_json, read_npz


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


def _read_record(path: Path) -> dict:
    contents = _read_arrays(path, ["record"])["record"].tobytes()
    try:
        record = parse_json(contents)
    except ValueError as error:
        raise ModelError(f"{path}: the checkpoint cannot be read ({error}); start a new run.") from error
    if not isinstance(record, dict) or not isinstance(record.get("paths"), list) or "state" not in record:
        raise ModelError(f"{path}: is no checkpoint of dlfer; start a new run.")
    return record


def _read_arrays(
    path: Path, names: Sequence[str], check: Callable[[Mapping[str, Header]], None] | None = None
) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, names=names, check=check)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the checkpoint cannot be read ({error}); start a new run.") from error


def _without_numbers(paths: Sequence[str]) -> list[str]:
    """Drop the counters that Keras appends to the names of a process' second optimiser, seed generator ..."""
    return [re.sub(r"_\d+(?=/|$)", "", path) for path in paths]


def _to_numpy(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable.value))
