"""Reader and writer of members.csv, which has a row for each member of a study or an ensemble.

A member is an experiment with some keys set. Each of those keys is a column, named as in the experiment file, with JSON
values; every other column is a field of `MemberRow`. An empty cell means that a value is absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dlfer.errors import ModelError
from dlfer.runs.files import read_json, read_rows, write_rows
from dlfer.runs.run import RUN_FILE

MEMBERS_FILE = "members.csv"
SCHEMA = 1
_FORMER_ENSEMBLE_FILE = "members.json"


class MemberRow(BaseModel):
    """One row of members.csv.

    Attributes:
        arm: name of the arm, the cell, or the ensemble's member.
        trial: the search's id of the trial; None for members that are not trials.
        seed: seed of EF-FER2; None if the file does not record it.
        fold: for a member of a cross-validation, its test fold.
        digest: first digits of its experiment's digest; for an ensemble's member, the sha256 of its artifact.json.
        path: path of its run directory; "" before it starts.
        status: "pending", "running", "finished", "stopped" or "failed". A trial may also be "waiting" (interrupted), "rung"
            (ended with its rung of Hyperband) or "pruned". A member of an ensemble that was trained before is "given".
        train_accuracy, validation_accuracy, test_accuracy, macro_f1: of a finished member, in [0, 1].
        score, low, high: a trial's objective on validation, and its 95 % interval over the images.
        epochs: number of epochs of EF-FER2 that a trial has completed.
        rung: number of epochs at which a trial was to end; None for all epochs of the experiment.
        seconds: duration of EF-FER2; for a trial, of its process.
        pretrain_seconds: duration of EF-FER1.
        error: the error message.
        kind: the class of the error.
        is_users: whether the user has to correct the error.
        worker: the process that ran a trial.
        ended: UTC, ISO 8601.
        note: a remark for the reader, e.g. about an ensemble member's training data.
        settings: dotted key -> value, for the keys that the member sets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    trial: str | None = None
    seed: int | None = None
    fold: int | None = None
    digest: str = ""
    path: str = ""
    status: str = "pending"
    train_accuracy: float | None = None
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    macro_f1: float | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None
    epochs: int | None = None
    rung: int | None = None
    seconds: float | None = None
    pretrain_seconds: float | None = None
    error: str = ""
    kind: str = ""
    is_users: bool = False
    worker: str = ""
    ended: str = ""
    note: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """The arm and the seed or fold, for display."""
        return f"{self.arm}, seed {self.seed}" if self.fold is None else f"{self.arm}, fold {self.fold}"

    def change(self, **fields: Any) -> MemberRow:
        """Return a copy with some fields changed."""
        return self.model_copy(update=fields)

    def find_folder(self, study: Path) -> Path | None:
        """Return the member's directory: the recorded one, or else one of its name beside its study, or None.

        Args:
            study: directory of the comparison, search or ensemble. A folder of runs may have been moved as a whole.
        """
        if not self.path:
            return None
        recorded = Path(self.path)
        moved = (recorded, study.parent / recorded.name, study.parent.parent.joinpath(*recorded.parts[-2:]))
        # os.path.exists returns False for a name that is too long, for which Path.exists raises.
        return next((path for path in moved if os.path.exists(path)), None)


_COLUMNS = tuple(name for name in MemberRow.model_fields if name != "settings")


def write_member_rows(folder: Path, rows: Sequence[MemberRow]) -> None:
    """Write members.csv of a study, with only the first line of each error."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    cells = []
    for row in rows:
        values = row.model_dump(exclude={"settings"})
        values["error"] = (row.error.splitlines() or [""])[0]
        values["is_users"] = "true" if row.is_users else ""
        settings = {key: json.dumps(value) for key, value in row.settings.items()}
        cells.append({**values, **settings, "schema": SCHEMA})
    write_rows(folder / MEMBERS_FILE, [*_COLUMNS, *keys, "schema"], cells)


def read_member_rows(folder: Path) -> list[MemberRow]:
    """Return the members of a study, also from files of earlier versions; [] if none are recorded.

    Raises:
        ModelError: the file is damaged, or a later version of dlfer wrote it.
    """
    path = folder / MEMBERS_FILE
    if not path.exists():
        return _read_former_ensemble(folder)
    return [_parse(path, line, row) for line, row in enumerate(read_rows(path), start=2)]


def _parse(path: Path, line: int, cells: Mapping[str | None, Any]) -> MemberRow:
    version = cells.get("schema") or str(SCHEMA)
    if version != str(SCHEMA):
        raise ModelError(
            f"{path} line {line}: found schema {version}, expected {SCHEMA}; a later dlfer wrote this file."
        )
    values: dict[str, Any] = {key: cells[key] for key in _COLUMNS if cells.get(key)}
    values["settings"] = {
        key: _parse_value(cell)
        for key, cell in cells.items()
        if key is not None and key not in (*_COLUMNS, "schema") and cell
    }
    try:
        return MemberRow.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where, found = ".".join(map(str, first["loc"])), str(first["input"])[:60]
        raise ModelError(
            f"{path} line {line}: {where}: found {found!r}: {first['msg']}. The file was edited or is damaged; start again."
        ) from None


def _parse_value(cell: str) -> Any:
    """Return the value of a setting; earlier versions wrote text without quotes."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _read_former_ensemble(folder: Path) -> list[MemberRow]:
    """Return the members in members.json, which earlier versions wrote for ensembles."""
    path = folder / _FORMER_ENSEMBLE_FILE
    try:
        members = read_json(path)
        keys = ("path", "digest", "status", "note")
        return [MemberRow(arm=row["name"], **{key: row[key] for key in keys if row.get(key)}) for row in members]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: expected a list of members, found {error}. The run is damaged.") from None


def is_run(folder: Path | None) -> bool:
    """Return whether a folder is a run directory."""
    return folder is not None and os.path.exists(folder / RUN_FILE)
