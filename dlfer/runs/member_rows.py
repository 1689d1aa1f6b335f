"""members.csv: one row for each member of an ablation, a sweep, a search or an ensemble; one reader, one writer.

A member is an experiment with some keys set. Those keys are columns of their own, named as in the experiment file, with
JSON values; every other column is a field of `MemberRow`. An empty cell means that a value is absent.
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
    """One member as members.csv has it.

    Attributes:
        arm: name of the arm, the cell, the ensemble's member, or the arm of a search.
        trial: a search's id of the trial; None for members that are no trials.
        seed: of EF-FER2; None where the file does not say.
        fold: of a member of a cross-validation, the fold that is its test.
        digest: the first digits of the digest of its experiment; of an ensemble's member, the sha256 of its artifact.json.
        path: of its run directory; "" before it begins.
        status: "pending", "running", "finished", "stopped" or "failed". A trial may also be "waiting" (interrupted), "rung"
            (ended with its rung of Hyperband) or "pruned". A member of an ensemble that was trained before is "given".
        train_accuracy, validation_accuracy, test_accuracy, macro_f1: of a finished member, in [0, 1].
        score, low, high: a trial's objective on validation, and its 95 % interval over the images.
        epochs: of EF-FER2 that a trial has done.
        rung: epochs after which a trial was to end; None: all of the experiment.
        seconds: of EF-FER2; of a trial, the time that its process took.
        pretrain_seconds: of EF-FER1.
        error: what went wrong.
        kind: the class of that error.
        is_users: whether the user has to correct it.
        worker: the process that ran a trial.
        ended: UTC, ISO 8601.
        note: what a reader should know, e.g. about an ensemble member's training data.
        settings: dotted key -> value, the keys that the member sets.
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
        """Arm and seed or fold, for a person."""
        return f"{self.arm}, seed {self.seed}" if self.fold is None else f"{self.arm}, fold {self.fold}"

    def change(self, **fields: Any) -> MemberRow:
        """Return a copy with some fields changed."""
        return self.model_copy(update=fields)

    def find_folder(self, study: Path) -> Path | None:
        """Return the member's directory: the recorded one, or one of its name beside its study; None where neither exists.

        Args:
            study: directory of the comparison, search or ensemble. A folder of runs may have been moved as a whole.
        """
        if not self.path:
            return None
        recorded = Path(self.path)
        moved = (recorded, study.parent / recorded.name, study.parent.parent.joinpath(*recorded.parts[-2:]))
        # A name that no file can have is not there; Path.exists raises for one that is too long.
        return next((path for path in moved if os.path.exists(path)), None)


_COLUMNS = tuple(name for name in MemberRow.model_fields if name != "settings")


def write_member_rows(folder: Path, rows: Sequence[MemberRow]) -> None:
    """Write members.csv of a study; a multi-line error keeps its first line."""
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
    """Return the members of a study, [] where none is recorded; files of earlier versions are read as well.

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
    """Return a setting; earlier versions wrote text without quotes."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _read_former_ensemble(folder: Path) -> list[MemberRow]:
    """Return the members.json that ensembles had before they wrote members.csv."""
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
    """Tell whether a folder is a run directory."""
    return folder is not None and os.path.exists(folder / RUN_FILE)
