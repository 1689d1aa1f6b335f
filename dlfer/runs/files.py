"""File access: atomic writes, reading of untrusted files within limits, and checks of output paths.

JSON and arrays (without pickle) are read within size limits; a model's files are verified by their sha256. An output
never replaces an input, and replaces another file only with --force; both are checked before the work begins.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from dlfer.errors import ConfigError, ModelError
from dlfer.runs.text import to_utf8


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file atomically, by renaming a temporary file in the same folder.

    Raises:
        OSError: the file cannot be written; the message names it, and for a full disk the bytes needed and free.
    """
    contents = to_utf8(contents).encode() if isinstance(contents, str) else contents
    with replace_when_done(path, size=len(contents)) as temporary:
        temporary.write_bytes(contents)


@contextlib.contextmanager
def replace_when_done(
    path: Path, *, size: int | None = None, suffix: str = ".tmp", durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary path in a file's folder, which is created; at the end of the block it replaces the file.

    After an error the file is unchanged and the temporary file is deleted.

    Args:
        size: the number of bytes to write, if known, for the message about a full disk.
        suffix: suffix of the temporary name, for writers that infer the format from it.
        durable: whether contents and name are flushed to the disk, so that the file survives a power failure intact.

    Raises:
        OSError: as for `write_atomically`.
    """
    path = Path(path)
    temporary = name_temporary(path, suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise explain_write_error(error, path, size=size) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (the names of its files) to the disk, where the operating system supports it."""
    with contextlib.suppress(OSError):  # Windows cannot open folders, and some network file systems cannot flush them
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def name_temporary(path: Path, suffix: str = ".tmp") -> Path:
    """Return an unused hidden path in a file's folder; its name is short even if the file's own is long."""
    return Path(path).with_name(f".dlfer-{os.getpid()}-{secrets.token_hex(6)}{suffix}")


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than is allowed (ulimit -f)",
}


def explain_write_error(error: OSError, path: Path, *, size: int | None = None) -> OSError:
    """Return a write error that names the file and, for a full disk, the bytes needed and free, and what to do."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        needed = "" if size is None else f"{size:,} bytes are needed, "
        reason = f"{_FULL[error.errno]}: {needed}{_describe_free(Path(path))}; make room, or write to another place"
    return OSError(error.errno, reason, str(path)) if error.errno else OSError(f"{path}: {reason}")


def _describe_free(path: Path) -> str:
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free:,} bytes are free"
    return "it is not known how much is free"


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays to a compressed .npz file, atomically and without pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def link_file(source: Path, target: Path) -> None:
    """Create a hard link to a file, or a copy where links are not possible; an existing `target` is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def copy_folder(source: Path, target: Path, *, without: str = "") -> None:
    """Copy a folder recursively; the copy is writable even if the source is read-only.

    Args:
        source, target: the folder, and the path of its copy, which must not exist.
        without: a glob pattern of names to leave out.
    """
    ignore = shutil.ignore_patterns(without) if without else None
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)
    for folder, _, _ in os.walk(target):
        os.chmod(folder, os.stat(folder).st_mode | stat.S_IRWXU)


MAX_ARRAYS = 100_000
MAX_EXPANSION = 200
FEW_BYTES = 2**30
"""Arrays of more bytes in total are refused if they are over `MAX_EXPANSION` times as large as the file: a zip bomb."""

_KINDS = "biufcUS"
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    """The header of a .npy array: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype


def read_npz(
    path: Path,
    *,
    names: Iterable[str] | None = None,
    check: Callable[[Mapping[str, Header]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name.

    Args:
        names: names of the arrays to read, all of which must exist; None for all.
        check: called with the headers of all arrays before any array is loaded; it may raise an error.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not an .npz, is damaged, contains objects (pickles), or declares an array whose size differs
            from that of its data.

    Example:
        >>> read_npz("predictions/test.npz")["targets"].shape
        (3589,)
    """
    with open(path, "rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                headers = _read_headers(archive, os.fstat(stream.fileno()).st_size)
                wanted = list(headers if names is None else names)
                missing = [name for name in wanted if name not in headers]
                if missing:
                    raise ValueError(f"found the arrays {', '.join(headers)[:200]}; {', '.join(missing)[:200]} missing")
                if check is not None:
                    check(headers)
                return {name: _read_array(archive, name) for name in wanted}
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, NotImplementedError) as error:
            raise ValueError(f"no .npz of numpy, or a damaged one: {error}{_describe_start(stream)}") from error
        except (RuntimeError, OverflowError, SyntaxError, TypeError, MemoryError) as error:
            raise ValueError(f"damaged: {type(error).__name__}: {error}") from error


def describe_start(contents: bytes) -> str:
    """Return a clause for an error message with the file type that the first bytes indicate; "" if it is unknown."""
    if contents[:1] == b"\x80" and contents[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "; it begins like a pickle, which is a program and is never opened"
    if contents[:6] == b"\x93NUMPY":
        return "; it begins like a single array (.npy)"
    if contents[:4] == b"\x89HDF":
        return "; it begins like HDF5"
    if contents[:4] == b"PK\x03\x04":
        return "; it begins like a zip archive"
    return ""


def _describe_start(stream) -> str:
    stream.seek(0)
    return describe_start(stream.read(16))


def _read_headers(archive: zipfile.ZipFile, file_size: int) -> dict[str, Header]:
    members = archive.infolist()
    repeated = [name for name, count in Counter(member.filename for member in members).items() if count > 1]
    if len(members) > MAX_ARRAYS or repeated:
        raise ValueError(f"found {len(members)} arrays, {len(repeated)} of them twice; expected each once")
    # In a zip bomb, members may overlap, and each of them may span the whole file.
    if sum(member.compress_size for member in members) > file_size:
        raise ValueError("its arrays are packed into more bytes than it has")
    total = sum(member.file_size for member in members)
    if total > FEW_BYTES and total > MAX_EXPANSION * file_size:
        raise ValueError(
            f"its arrays take {total:,} bytes and the file has {file_size:,}; more than {MAX_EXPANSION} times as many "
            "are not unpacked, since such a file can fill the memory"
        )
    return {member.filename.removesuffix(".npy"): _read_header(archive, member) for member in members}


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    if not member.filename.endswith(".npy"):
        raise ValueError(f"found {member.filename[:80]!r}, expected arrays (.npy) alone")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _READ_HEADER:
            raise ValueError(f"{member.filename}: found version {version} of numpy's format, expected 1.0 or 2.0")
        shape, _, dtype = _READ_HEADER[version](stream)
        left = member.file_size - stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds objects, that is a pickle, which is a program and is never opened")
    if dtype.kind not in _KINDS:
        raise ValueError(f"{member.filename} holds {dtype}, expected numbers or text")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(
            f"{member.filename} says that it is {dtype} {shape}, {math.prod(shape) * dtype.itemsize:,} bytes, "
            f"and there are {left:,}"
        )
    return Header(shape, dtype)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


MAX_BYTES = 256 * 2**20


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return the parsed contents of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than `max_bytes` (256 MiB by default), is not JSON, or is nested too deeply.
    """
    with open(path, "rb") as file:
        contents = file.read(max_bytes + 1)
    if len(contents) > max_bytes:
        raise ValueError(f"found more than {max_bytes:,} bytes")
    return parse_json(contents)


def parse_json(contents: bytes | str) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or contains the escape of a lone surrogate.
    """
    try:
        values = json.loads(contents)
        text = contents if isinstance(contents, bytes) else contents.encode()
        if _HALF_CHARACTER.search(text):
            json.dumps(values, ensure_ascii=False).encode()  # fails for a lone surrogate, not for a pair
        return values
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds half a character, which is no text") from None


_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")
"""What a lone surrogate looks like: escaped, encoded in UTF-8, or anything in UTF-16 or UTF-32, whose text has zero bytes."""


_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(folder: Path, sha256: Any, *, file: Path, needed: Iterable[str], mend: str) -> None:
    """Raise ModelError unless a manifest lists all needed files and every file that it lists is unchanged.

    A manifest shows that files have not changed since they were written, not who wrote them.

    Args:
        folder: the folder that the names are relative to.
        sha256: name -> sha256 in hex, from the manifest.
        file: path of the manifest, for messages.
        needed: names of the files that will be read.
        mend: advice on a changed file; a sentence without its full stop.

    Raises:
        ModelError: `sha256` is not such a table, a name leads outside the folder, a file is absent or changed, or a
            needed file is not listed.
    """
    if not isinstance(sha256, dict) or not all(
        isinstance(value, str) and _SHA256.fullmatch(value) for value in sha256.values()
    ):
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


LONGEST_NAME = 200
"""Maximum characters of each part of a path in a manifest, below the 255 of common file systems."""


def check_inside(folder: Path, name: Any, *, file: Path) -> None:
    """Raise ModelError unless `name`, a path with forward slashes, is inside the folder after links are resolved."""
    is_plain = (
        isinstance(name, str)
        and "\0" not in name
        and "\\" not in name
        and not PureWindowsPath(name).drive
        and not PurePosixPath(name).is_absolute()
        and name not in ("", ".")
        and ".." not in PurePosixPath(name).parts
        and all(len(part) <= LONGEST_NAME for part in name.split("/"))
        and len(name) <= 1000
    )
    try:
        is_inside = is_plain and _is_within((folder / name).resolve(), folder.resolve())
        if is_inside:
            (folder / name).lstat()
    except FileNotFoundError:  # an absent file is reported where it is opened
        pass
    except (OSError, RuntimeError, ValueError):  # name too long, parent not a folder, loop of links, lone surrogate
        is_inside = False
    if not is_inside:
        raise ModelError(
            f"{file}: names {str(name)[:200]!r}, which is outside of its folder; expected names of files in it, "
            "and no links that lead elsewhere."
        )


def _is_within(path: Path, folder: Path) -> bool:
    """Return whether a file is in a folder; in huggingface_hub's cache it may be a blob of the same repository."""
    for parent in (folder, *folder.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            return path.is_relative_to(parent) or path.parent == repository / "blobs"
    return path.is_relative_to(folder)


def hash_file(path: Path) -> str:
    """Return the sha256 (hex) of a file of a model.

    Raises:
        ModelError: it is absent, cannot be read, or is not a regular file.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: expected a file of a model, found something else of that name.")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"{path}: expected a file of a model: {error.strerror or error}. Copy the model again, with all of its files."
        ) from error


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows atomically as a csv file with a header; a missing value or None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a run's csv file as dicts of text; [] if there is no such file.

    Raises:
        ModelError: the file cannot be read, or is not a csv in UTF-8.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ModelError(
            f"{path}: not a csv in UTF-8 ({error}). The run is damaged; run the experiment again."
        ) from error


Place = Path | str

_NAME_MAX = 255
_NUMBER = 12
"""Bytes reserved in a file name for the number of a face, or of another file with the same name."""


def check_outputs(
    outputs: Mapping[str, Place | Iterable[Place] | None], inputs: Iterable[Place | None] = (), *, force: bool = False
) -> None:
    """Raise ConfigError unless every output can be written without losing data; write nothing.

    An output is an input if both lead to one file, even through links (symbolic or hard), or if it exists in an input
    folder (a run, a model, class folders). Outputs that differ only in case are one file where the folder ignores it.

    Args:
        outputs: option -> the file or files that it writes, or None if it is not given.
        inputs: files and folders that are read; absent ones are ignored.
        force: whether existing files other than inputs may be replaced.

    Raises:
        ConfigError: an output is an input, the same as or inside another output, exists already, is not a regular file,
            has too long a name, or is in a folder that is not writable.
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
    """Raise ConfigError unless files can be created in a folder, which exists or can itself be created."""
    _check_folder(Path(folder), f"{option} {folder}")


def get_name_limit(folder: Place) -> int:
    """Return the maximum length of a file name in a folder, in bytes."""
    try:
        return os.pathconf(_find_present(Path(folder)), "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return _NAME_MAX


def choose_name(stem: str, suffix: str, taken: Collection[str], *, folder: Place, join: str = "-") -> str:
    """Return a unique file name without its suffix, with a number appended if the name is taken.

    Names that differ only in case or Unicode normalisation count as equal, as on some file systems. A name that is too
    long for the folder is cut and ends in a digest of the full name.

    Args:
        stem: the preferred name.
        suffix: the suffix that will be appended, e.g. ".jpg".
        taken: `fold_name` of the names in use, with their suffixes.
        folder: the folder in which the file will be.
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
    """Return a key that is equal for names that differ only in case or Unicode normalisation."""
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
    """Raise ConfigError if two outputs are the same file, or one is a parent folder of the other."""
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
    """Raise ConfigError if an existing output is one of the inputs, or is inside an input folder."""
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
    """Return the path, or its nearest parent that exists (a broken link counts as existing)."""
    path = Path(os.path.abspath(path))
    while not os.path.lexists(path) and path.parent != path:
        path = path.parent
    return path


def _ignores_case(folder: Path) -> bool:
    """Return whether the file system of a folder, which need not exist yet, ignores case in names."""
    place = _find_present(folder)
    while place.parent != place:
        other = place.name.swapcase()
        if other != place.name:
            return _identify(place.with_name(other)) == _identify(place)
        place = place.parent
    return False
