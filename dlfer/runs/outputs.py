"""Where results may be written: never over an input, over another file only by --force, and known before the work begins."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dlfer.errors import ConfigError

Place = Path | str

_NAME_MAX = 255
_NUMBER = 12
"""Bytes that are kept free in a shortened name, for the number of a face or of a second file of that name."""


def check_outputs(
    outputs: Mapping[str, Place | Iterable[Place] | None], inputs: Iterable[Place | None] = (), *, force: bool = False
) -> None:
    """Raise unless every output can be written without a loss; nothing is written.

    Two paths mean one file if they lead to it through links (symbolic or hard), or differ in case alone in a folder that
    ignores it. An existing file inside an input folder (a run, a model, class folders) is an input.

    Args:
        outputs: option -> the file, or files, that it will write; None: not asked for.
        inputs: files and folders that are read; what is not there is passed over.
        force: whether existing files that are no inputs may be replaced.

    Raises:
        ConfigError: an output is an input, is another output, is there already, is no ordinary file, or its folder
            cannot be written into.
    """
    asked = [(option, Path(path)) for option, given in outputs.items() for path in _list_paths(given)]
    _check_distinct(asked)
    existing = [(option, path) for option, path in asked if os.path.lexists(path)]
    if existing:
        _check_no_input(existing, [path for path in inputs if path is not None])
    for option, path in existing:
        if path.is_dir():
            raise ConfigError(f"{option} {path}: is a folder; expected the name of a file.")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{option} {path}: is a device or a pipe, which is not replaced; expected a file's name.")
        if not force:
            raise ConfigError(
                f"{option} {path}: exists already and is not replaced; choose another path, or use --force."
            )
    for folder, (option, path) in {path.parent: (option, path) for option, path in asked}.items():
        _check_folder(folder, f"{option} {path}")
    for option, path in asked:
        if len(os.fsencode(path.name)) > get_name_limit(path.parent):
            raise ConfigError(f"{option} {path}: the name is longer than its file system allows; choose a shorter one.")


def check_writable(folder: Place, option: str) -> None:
    """Raise ConfigError unless files can be made in a folder that is there, or that can be made."""
    _check_folder(Path(folder), f"{option} {folder}")


def get_name_limit(folder: Place) -> int:
    """Return how many bytes the name of a file in a folder may have."""
    try:
        return os.pathconf(_find_present(Path(folder)), "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return _NAME_MAX


def choose_name(stem: str, suffix: str, taken: Collection[str], *, folder: Place, join: str = "-") -> str:
    """Return the name of a file without its suffix that no other has: a number follows where names meet.

    Names that differ in case or in Unicode's form alone meet, since they do on some disks. One that is too long for the folder
    ends in a digest of the whole instead.

    Args:
        stem: the name that is wished for.
        suffix: what will follow, e.g. ".jpg".
        taken: `fold_name` of the names, with their suffixes, that are given away.
        folder: where it will stand.
        join: the text before the number.
    """
    stem = stem if stem.strip(". ") else f"picture{stem.strip()}"
    room = get_name_limit(folder) - len(os.fsencode(suffix)) - _NUMBER
    if len(os.fsencode(stem)) > room:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:10]
        while len(os.fsencode(stem)) > room - len(digest) - 1:
            stem = stem[:-1]
        stem = f"{stem}-{digest}"
    chosen, number = stem, 1
    while fold_name(chosen + suffix) in taken:
        number += 1
        chosen = f"{stem}{join}{number}"
    return chosen


def fold_name(name: str) -> str:
    """Return what two names have in common that are one on a disk that ignores case or Unicode's forms."""
    return unicodedata.normalize("NFC", name).casefold()


def _check_folder(folder: Path, asked: str) -> None:
    place = _find_present(folder)
    if not place.is_dir():
        found = "a broken link" if place.is_symlink() else "a file"
        raise ConfigError(f"{asked}: expected a folder, and {place} is {found}; choose another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{asked}: nothing can be written into {place}; choose another folder.")


def _list_paths(given: Place | Iterable[Place] | None) -> Iterable[Place]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str | Path) else given


def _check_distinct(asked: list[tuple[str, Path]]) -> None:
    """Raise if two outputs are one file, or one is a folder that contains the other."""
    folders: dict[Path, Path] = {}
    seen: dict[Path, str] = {}
    for option, path in asked:
        if path.parent not in folders:
            folders[path.parent] = Path(os.path.realpath(path.parent))
        parent = folders[path.parent]
        key = Path(fold_name(str(parent / path.name))) if _ignores_case(parent) else parent / path.name
        if key in seen:
            raise ConfigError(f"{option} {path}: {seen[key]} would write the same file; give each its own.")
        seen[key] = option
    for path, option in seen.items():
        for parent in path.parents:
            if parent in seen:
                raise ConfigError(
                    f"{option} {path}: {seen[parent]} would make {parent} a file; give each its own place."
                )


def _check_no_input(existing: list[tuple[str, Path]], inputs: list[Place]) -> None:
    """Raise if an output that exists is one of the inputs, or is inside an input folder."""
    found: dict[tuple[int, int], Place] = {}
    for path in inputs:
        identity = _identify(path)
        if identity is not None:
            found.setdefault(identity, path)
    for option, path in existing:
        whole = Path(os.path.realpath(path))
        for place in (whole, *whole.parents):
            given = found.get(_identify(place))
            if given is None or (place is whole and place.is_dir()):
                continue
            what = "is the input" if place is whole else "is part of the input"
            raise ConfigError(f"{option} {path}: {what} {given} and is never replaced; choose another place.")


def _identify(path: Place) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _find_present(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there (a broken link counts as there)."""
    path = Path(os.path.abspath(path))
    while not os.path.lexists(path) and path.parent != path:
        path = path.parent
    return path


def _ignores_case(folder: Path) -> bool:
    """Tell whether names in a folder, or where it will be made, may differ in case and mean one file."""
    place = _find_present(folder)
    while place.parent != place:
        other = place.name.swapcase()
        if other != place.name:
            return _identify(place.with_name(other)) == _identify(place)
        place = place.parent
    return False
