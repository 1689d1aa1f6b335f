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

import hashlib
import json
from pathlib import Path
from typing import Any

from dlfer.errors import ModelError, UserError

EXPORT_FILE = "export.json"
VERSION = 1
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


def read_export(folder: Path | str) -> dict[str, Any]:
    """Return export.json of an exported model, after every file that it names was found unchanged.

    Args:
        folder: of one format, e.g. exports/lite2/onnx.

    Raises:
        ModelError: no export, one of another version, a file that is absent or was changed, or a path that
            leaves the folder.

    Example:
        >>> read_export("exports/lite2/onnx")["input"]["shape"]
        [None, None, None, 1]
    """
    folder = Path(folder)
    path = folder / EXPORT_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: expected the description of an exported model: {error}. Make one: dlfer export MODEL --to onnx."
        ) from error
    if not isinstance(record, dict) or record.get("version") != VERSION or record.get("format") not in FORMATS:
        raise ModelError(
            f"{path}: expected version {VERSION} and a format of {', '.join(FORMATS)}; it was made by another version "
            "of dlfer. Export the model again."
        )
    for name, expected in _get_checksums(record, path).items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ModelError(f"{path}: names {name!r}, which is outside of its folder.")
        found = _hash(file)
        if found != expected:
            raise ModelError(
                f"{file}: sha256 is {found[:16]}..., expected {expected[:16]}...; the file is damaged or was changed. "
                "Copy the export again, or export the model anew."
            )
    return record


def compute_checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 (hex) of each file under `folder`, by its path relative to it with slashes."""
    return {path.relative_to(folder).as_posix(): _hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _get_checksums(record: dict[str, Any], path: Path) -> dict[str, str]:
    """Return the checksums of an export, the model's among them: what is not checked is not loaded."""
    checksums, file = record.get("sha256"), record.get("file")
    if not isinstance(checksums, dict) or not isinstance(file, str):
        raise ModelError(f'{path}: expected "file" and "sha256"; export the model again.')
    if file not in checksums and not any(name.startswith(f"{file}/") for name in checksums):
        raise ModelError(f"{path}: its sha256 does not name the model {file!r}; export the model again.")
    return checksums


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: expected a file of an exported model: {error}.") from error
