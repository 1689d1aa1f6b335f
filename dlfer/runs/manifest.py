"""The sha256 of each file of a model, held against the files before any of them is parsed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dlfer.errors import ModelError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(folder: Path, sha256: Any, *, file: Path, needed: Iterable[str], mend: str) -> None:
    """Raise unless every file that is named stands in the folder unchanged, and every file that is needed is named.

    A manifest tells that files are those that were written, not who wrote them.

    Args:
        folder: what the names are relative to.
        sha256: name -> sha256 in hex, as the manifest says.
        file: the manifest, for messages.
        needed: names of the files that will be read.
        mend: what to do about a file that was changed; a sentence without its full stop.

    Raises:
        ModelError: no such table, a name that leaves the folder, an absent or changed file, or a file
            that would be read and is not named.
    """
    if not isinstance(sha256, dict) or not all(_is_digest(value) for value in sha256.values()):
        raise ModelError(f"{file}: expected under sha256 the name of each file with 64 hex digits. {mend}.")
    for name in sha256:
        check_inside(folder, name, file=file)
    unnamed = sorted(set(needed) - sha256.keys())
    if unnamed:
        raise ModelError(
            f"{file}: its sha256 does not name {', '.join(unnamed)}; what is not checked is not read. {mend}."
        )
    for name, expected in sha256.items():
        found = hash_file(folder / name)
        if found != expected:
            raise ModelError(
                f"{folder / name}: sha256 is {found[:16]}..., expected {expected[:16]}...; "
                f"the file is damaged or was changed. {mend}."
            )


def check_inside(folder: Path, name: Any, *, file: Path) -> None:
    """Raise ModelError unless `name` (with slashes) is that of something in the folder, links followed."""
    is_plain = (
        isinstance(name, str)
        and "\0" not in name
        and "\\" not in name
        and not PureWindowsPath(name).drive
        and not PurePosixPath(name).is_absolute()
        and name not in ("", ".")
        and ".." not in PurePosixPath(name).parts
    )
    try:
        is_inside = is_plain and (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a name too long for the disk, or a circle of links
        is_inside = False
    if not is_inside:
        raise ModelError(
            f"{file}: names {str(name)[:200]!r}, which is outside of its folder; expected names of files in it, "
            "and no links that lead elsewhere."
        )


def hash_file(path: Path) -> str:
    """Return the sha256 (hex) of a file of a model.

    Raises:
        ModelError: it is not there, or is no ordinary file.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: expected a file of a model, found something else of that name.")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: expected a file of a model: {error}.") from error


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
