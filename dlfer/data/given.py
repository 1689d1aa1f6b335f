"""Recognition of the data given on the command line: a folder, a csv, a zip, an .npz or an experiment file."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from dlfer.config.load import load_experiment, resolve_path
from dlfer.config.names import expand_home
from dlfer.config.sections import DataConfig
from dlfer.data.fer2013_csv import USAGES, describe_unread_csvs, find_csvs, is_divided, iterate_pictures
from dlfer.data.files import PICTURE_SUFFIXES, find_kind, is_ignored
from dlfer.errors import DataError, DlferError, MissingDataError, UserError, shorten
from dlfer.runs.text import find_delimiter, open_text

EXPECTED = (
    "expected a folder (class folders, or train/validation/test with them), a csv in the layout of FER2013, a zip with either, "
    "an .npz of arrays (images, targets), or an experiment file (YAML)"
)
SPLITS = ("test", "validation", "train")
OFFICIAL = dict(zip(SPLITS, reversed(USAGES), strict=True))
"""Split -> its official name in FER2013."""

Kind = Literal["experiment", "csv", "arrays", "folder"]

_UNPACK = ", after unpacking the archive"
_YAML_KEY = re.compile(r"\s*(?:#.*)?$|(?:---|[A-Za-z_][\w-]*\s*:(?:\s|$))")


@dataclass(frozen=True)
class GivenData:
    """Data whose kind was recognised, with the data section that loads it.

    Attributes:
        path: the path as given.
        kind: the kind of data; for a zip, that of its contents.
        config: the data section that loads it; for an experiment file, its `finetune.data`.
        image_size: the image size of an experiment file; None for other kinds.
        csv: the csv; None for other kinds, and for a folder whose train.csv and test.csv are two splits.
        notes: sentences about files beside the csv that are not read.
    """

    path: Path
    kind: Kind
    config: DataConfig
    image_size: int | None = None
    csv: Path | None = None
    notes: tuple[str, ...] = ()

    def list_read(self) -> list[Path]:
        """Return the files and folders that are read."""
        named = (self.config.path, self.config.votes)
        return [self.path, *(resolve_path(path) for path in named if path is not None)]

    def describe(self) -> str:
        """Return the path and its kind in words."""
        what = {
            "experiment": "an experiment file",
            "csv": "a csv in the layout of FER2013",
            "arrays": "arrays (.npz)",
            "folder": "a folder of images",
        }[self.kind]
        return f"{self.path}: {what}"


def recognise(path: Path | str) -> Kind | Literal["pictures"]:
    """Return the kind of data, judged by its contents first; "pictures" is a zip of class folders.

    Raises:
        MissingDataError: the path does not exist.
        DataError: it is something else, or both a csv and pictures; the message says what was found and what to do.
    """
    path = expand_home(path)
    if path.is_dir():
        if (path / "run.json").is_file() or (path / "artifact.json").is_file():
            raise DataError(f"{path}: found the folder of a run or a model, {EXPECTED}.")
        return "csv" if _find_csv(path, path) else "folder"
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such file or folder; {EXPECTED}.")
    if find_kind(path) in ("picture", "video", "heif"):
        raise DataError(
            f"{path}: found a single picture or video, {EXPECTED}. To predict its label: dlfer predict {shlex.quote(str(path))}"
        )
    with path.open("rb") as stream:
        start = stream.read(4)
    if start in (b"PK\3\4", b"PK\5\6"):
        return _recognise_zip(path)
    if path.suffix.casefold() == ".npz":
        return "arrays"  # a damaged .npz (not a zip), whose reader reports the damage
    if start == b"\x93NUM":
        raise DataError(
            f"{path}: found one array (.npy), {EXPECTED}; save both by numpy.savez(FILE, images=..., targets=...)."
        )
    return _recognise_text(path)


@contextlib.contextmanager
def open_data(path: Path | str) -> Iterator[GivenData]:
    """Recognise data and yield the section that loads it; a zip of images is unpacked while the context is open.

    Raises:
        DataError: as `recognise`, or a zip cannot be unpacked.
        ConfigError: the experiment file is invalid.
    """
    path = expand_home(path)
    kind = recognise(path)
    if kind == "pictures":
        with _unpack(path) as folder:
            _find_csv(_skip_wrappers(folder), path)
            try:
                yield GivenData(path, "folder", DataConfig(source="folder", path=str(folder)))
            except DlferError as error:
                raise type(error)(str(error).replace(str(folder), str(path))) from error
    elif kind == "experiment":
        stage = load_experiment(path).finetune
        yield GivenData(path, kind, stage.data, stage.image_size)
    elif kind == "csv":
        csv, notes = path, ()
        if path.is_dir():
            csv, notes = find_csvs(path)[0], describe_unread_csvs(path, "place of the folder")
            if is_divided(csv):
                yield GivenData(path, kind, DataConfig(source="fer2013", path=str(path)))
                return
        yield GivenData(path, kind, DataConfig(source="fer2013", path=str(csv)), csv=csv, notes=notes)
    else:
        yield GivenData(path, kind, DataConfig(source=kind, path=str(path)))


def parse_split(text: str | None, allowed: tuple[str, ...] = SPLITS) -> str | None:
    """Return the split that the value of --split names, also by FER2013's official name; None for None.

    Raises:
        UserError: the value names no split in `allowed`.
    """
    if text is None:
        return None
    names = {**{name: name for name in SPLITS}, **{name.casefold(): split for split, name in OFFICIAL.items()}}
    split = names.get(text.casefold())
    if split not in allowed:
        official = ", ".join(OFFICIAL[name] for name in allowed)
        raise UserError(f"--split {text}: expected {' or '.join(allowed)} (of FER2013 also {official}).")
    return split


def _find_csv(folder: Path, given: Path) -> Path | None:
    """Return the FER2013 csv in a folder, None without one; `given` is the path that error messages name.

    Raises:
        DataError: folders beside the csv hold pictures, so that it is unclear which of them is the data.
    """
    csv = next(iter(find_csvs(folder)), None)
    picture = None if csv is None else next(iterate_pictures(folder), None)
    if csv is not None and picture is not None:
        raise DataError(
            f"{given}: found {csv.relative_to(folder)} in the layout of FER2013 and pictures in folders beside it "
            f"({picture.relative_to(folder)}), expected one of them. Name the csv itself to read it{_UNPACK * (given != folder)}; "
            "to read the pictures, move the csv elsewhere."
        )
    return csv


def _skip_wrappers(folder: Path) -> Path:
    """Skip folders of an unpacked zip whose only entry is a folder; return the first other one."""
    names = [child for child in folder.iterdir() if not is_ignored(child.name)]
    return _skip_wrappers(names[0]) if len(names) == 1 and names[0].is_dir() else folder


def _recognise_zip(path: Path) -> Literal["arrays", "csv", "pictures"]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{path}: a zip archive that is cut short or damaged ({shorten(error, path)}); fetch it again."
        ) from error
    suffixes = {PurePosixPath(name).suffix.casefold() for name in names}
    if suffixes == {".npy"}:
        return "arrays"
    if suffixes.intersection(PICTURE_SUFFIXES):
        return "pictures"
    if ".csv" in suffixes:
        return "csv"
    listed = ", ".join(names[:3]) or "nothing"
    raise DataError(f"{path}: a zip archive with {listed}{' ...' if len(names) > 3 else ''}; {EXPECTED}.")


def _recognise_text(path: Path) -> Literal["csv", "experiment"]:
    """Return the kind of a text file: csv by a pixels column, experiment by `key:` lines, otherwise by the suffix."""
    with open_text(path, errors="replace") as stream:
        lines = stream.read(4000).splitlines() or [""]
    first = next((line for line in lines if line.strip()), "")
    header = [name.strip().strip('"').strip().casefold() for name in first.split(find_delimiter(first))]
    is_csv, is_yaml = "pixels" in header, path.suffix.casefold() in (".yaml", ".yml")
    if is_csv or (path.suffix.casefold() in (".csv", ".tsv", ".gz") and not is_yaml):
        return "csv"
    if is_yaml or (any(line.strip() for line in lines) and all(_YAML_KEY.match(line) for line in lines[:3])):
        return "experiment"
    raise DataError(f"{path} line 1: found {lines[0][:60]!r}, {EXPECTED}.")


@contextlib.contextmanager
def _unpack(path: Path) -> Iterator[Path]:
    """Unpack a zip into a temporary folder and yield the folder; nothing is written outside of it."""
    with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                size, free = sum(info.file_size for info in archive.infolist()), shutil.disk_usage(folder).free
                if size > free // 2:
                    raise DataError(
                        f"{path}: takes {size / 1e9:.1f} GB unpacked, found {free / 1e9:.1f} GB free in {tempfile.gettempdir()}; "
                        "unpack it elsewhere and name the folder, or set TMPDIR."
                    )
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise DataError(
                f"{path}: cannot be unpacked ({shorten(error, path)}); unpack it and name the folder."
            ) from error
        yield Path(folder)
