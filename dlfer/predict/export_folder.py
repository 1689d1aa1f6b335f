"""The folder of an exported model: its contract in export.json, and the check that no file of it was changed.

<out>/<format>/
    export.json     format, file, labels, input, output, sha256 of the other files, agreement with the artifact
    labels.json     the labels alone, in the order of the outputs
    MODEL_CARD.md   what the model is for, what it is not for, how good it is, and what the export costs
    example.py      ten lines that need only the format's runtime
    example.png     a drawn face, for the example
    model.*         the model, preprocessing inside
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlfer.errors import ModelError, UserError
from dlfer.runs.export_record import ExportRecord
from dlfer.runs.files import check_inside, check_manifest, hash_file, read_json

EXPORT_FILE = ExportRecord.FILE
VERSION = 1
LARGEST_IMAGE = 4096
_CONTRACT = "expected labels and an input of a shape [null, H, W, 1 or 3]; export the model again."
FORMATS = ("savedmodel", "litert", "litert-int8", "onnx")


def parse_formats(text: str) -> tuple[str, ...]:
    """Return the formats of "savedmodel,onnx".

    Raises:
        UserError: one is not known.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UserError(
            f"--to {text}: found {', '.join(unknown) or 'no format'}, expected some of {', '.join(FORMATS)} "
            "with commas between them."
        )
    return names


def read_export(folder: Path | str) -> ExportRecord:
    """Return export.json of an exported model, after every file that it names was found unchanged.

    Args:
        folder: of one format, e.g. exports/lite2/onnx.

    Raises:
        ModelError: no export, one of another version, a file that is absent or was changed, or a path that
            leaves the folder.

    Example:
        >>> read_export("exports/lite2/onnx").input.shape
        [None, None, None, 1]
    """
    folder = Path(folder)
    path = folder / EXPORT_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: expected the description of an exported model: {error}. Make one: dlfer export MODEL --to onnx."
        ) from error
    if not isinstance(values, dict) or values.get("version") != VERSION or values.get("format") not in FORMATS:
        raise ModelError(
            f"{path}: expected version {VERSION} and a format of {', '.join(FORMATS)}; it was made by another version "
            "of dlfer. Export the model again."
        )
    check_manifest(
        folder,
        values.get("sha256"),
        file=path,
        needed=_name_files(folder, values.get("file"), path),
        mend="Copy the export again, or export the model again",
    )
    try:
        record = ExportRecord.parse(values, path)
    except ModelError as error:
        raise ModelError(f"{error} {_CONTRACT}") from error
    shape = record.input.shape
    if (
        len(shape) != 4
        or shape[-1] not in (1, 3)
        or not all(side is None or 0 < side <= LARGEST_IMAGE for side in shape[1:3])
    ):
        raise ModelError(f"{path}: {_CONTRACT}")
    return record


def compute_checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 (hex) of each file under `folder`, by its path relative to it with slashes."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _name_files(folder: Path, file: Any, path: Path) -> list[str]:
    """Return the names of the model's files: of a SavedModel all that are in its folder are read."""
    check_inside(folder, file, file=path)
    if not (folder / file).is_dir():
        return [file]
    return [found.relative_to(folder).as_posix() for found in (folder / file).rglob("*") if not found.is_dir()]
