"""Files in folders: traversal without loops, detection of file types by their first bytes, counts of omitted files."""

from __future__ import annotations

import functools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from dlfer.runs.records import LeftOut, ReadingRecord

# fmt: off
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp",
    ".pgm", ".ppm", ".pnm", ".pbm", ".pfm", ".pam", ".tif", ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".tga", ".icb", ".vda", ".vst", ".ico", ".icns", ".qoi", ".pcx", ".dcx", ".psd", ".sgi", ".ras", ".sun", ".dds", ".xbm", ".xpm",
    ".fits",
)
HEIF_SUFFIXES = (".heic", ".heif", ".heics", ".heifs", ".hif")
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".avi", ".divx", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".wmv", ".asf",
    ".flv", ".f4v", ".3gp", ".3gpp", ".3g2", ".mts", ".m2ts", ".m2t", ".tp", ".trp", ".tod", ".ogv", ".ogm", ".mxf", ".rm", ".rmvb", ".dv",
    ".y4m", ".mjpeg", ".mjpg", ".h264", ".h265", ".hevc", ".ivf", ".nut", ".wtv", ".fli", ".flc", ".ts",
)
"""Suffixes of videos. TypeScript files also end in .ts; `find_kind` distinguishes them by their first bytes."""

_RAW_SUFFIXES = (
    ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr",
    ".erf", ".kdc", ".mrw", ".raw",
)
_LINEAR_SUFFIXES = (".exr", ".hdr", ".rgbe")
_AUDIO_SUFFIXES = (".m4a", ".m4b", ".aac", ".mp3", ".wma", ".mka", ".weba", ".ogg", ".oga", ".opus", ".wav", ".flac")
# fmt: on

_IGNORED = frozenset(
    [
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "$recycle.bin",
        "lost+found",
        "@eadir",
        "__pycache__",
    ]
) | {"system volume information"}
_MAX_NAMED = 5

HIDDEN = "hidden files and files of the system"
NO_PICTURES = "files that are not in a supported picture format"
EMPTY = "empty files"
BROKEN = "broken links"
LOOP = "links to a folder that is already read or that contains the link"
NO_HEIF = "HEIC pictures, which need a package: pip install pillow-heif"
RAW = "raw pictures of cameras, which are not decoded: convert them to JPEG or PNG"
LINEAR = (
    "high-dynamic-range pictures (OpenEXR, Radiance), which are not decoded: map their tones and save them with 8 bits"
)
NOT_ALLOWED = "folders that may not be read"
NO_FILE = "neither files nor folders (sockets, pipes, devices)"


class Tally:
    """Counts of the files or rows that a reader saw and left out, by reason, with the first few names.

    Attributes:
        seen: number of files or rows, including those left out.
        notes: sentences about files or folders that were treated differently than their names suggest.
    """

    def __init__(self, root: Path | str = "") -> None:
        self.seen = 0
        self.notes: list[str] = []
        self._root = f"{root}/" if str(root) else ""
        self._reasons: dict[str, tuple[int, list[str]]] = {}

    def leave_out(self, reason: str, name: str | Path, n: int = 1, *, was_seen: bool = False) -> None:
        """Count `n` files as left out, and also as seen unless `was_seen`; `name` is the first file or their folder."""
        self.seen += 0 if was_seen else n
        count, names = self._reasons.get(reason, (0, []))
        shown = str(name).removeprefix(self._root)
        self._reasons[reason] = (count + n, names if len(names) >= _MAX_NAMED else [*names, shown])

    def add(self, other: Tally) -> None:
        """Add the counts and notes of another tally to this one."""
        self.seen += other.seen
        self.notes += other.notes
        for reason, (n, names) in other._reasons.items():
            count, own = self._reasons.get(reason, (0, []))
            shown = [name.removeprefix(self._root) for name in names]
            self._reasons[reason] = (count + n, [*own, *shown][:_MAX_NAMED])

    def list_left_out(self) -> tuple[LeftOut, ...]:
        """Return the reasons, the most frequent first."""
        found = sorted(self._reasons.items(), key=lambda item: (-item[1][0], item[0]))
        return tuple(LeftOut(reason=reason, n=n, first=names) for reason, (n, names) in found if n)

    def as_record(self, what: str = "files") -> ReadingRecord:
        """Return the counts as a record, in which everything that was not left out counts as used."""
        left_out = list(self.list_left_out())
        used = self.seen - sum(reason.n for reason in left_out)
        return ReadingRecord(what=what, seen=self.seen, used=max(0, used), left_out=left_out)

    def describe(self) -> list[str]:
        """Return sentences that state the counts."""
        return self.as_record().describe()


def is_ignored(name: str) -> bool:
    """Return whether a name is hidden, or one that operating systems create (.DS_Store, Thumbs.db, __MACOSX)."""
    return name.startswith(".") or name.casefold() in _IGNORED


def normalise_name(name: str) -> str:
    """Return a name in the form used for comparison: Unicode NFC, case-folded, whitespace stripped and collapsed."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).split())


def list_folders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders of a folder, including links to folders, without ignored names."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_ignored(entry.name) and os.path.isdir(entry.path))


def list_files(folder: Path, tally: Tally) -> list[str]:
    """Return the sorted names of the files directly in a folder; ignored names are counted in `tally`."""
    names = []
    for name in sorted(os.listdir(folder)):
        if is_ignored(name):
            tally.leave_out(HIDDEN, folder / name, max(1, count_files(folder / name)))
        elif not os.path.isdir(folder / name):
            names.append(name)
    return names


def walk(folder: Path, tally: Tally, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files below a folder, sorted by path; ignored names, loops and the like are counted in `tally`.

    Links to folders are followed; each folder is entered once.

    Args:
        visited: identities (see `identify`) of folders to skip; every folder that is entered is added.
    """
    visited.add(identify(folder))
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        tally.leave_out(NOT_ALLOWED, folder)
        return
    for name in names:
        path = folder / name
        try:
            kind = os.stat(path).st_mode
        except OSError:
            # A link to itself through other links, or to a missing file.
            tally.leave_out(HIDDEN if is_ignored(name) else BROKEN, path)
            continue
        if is_ignored(name):
            tally.leave_out(HIDDEN, path, max(1, count_files(path)))
        elif stat.S_ISDIR(kind) and identify(path) in visited:
            tally.leave_out(LOOP, path)
        elif stat.S_ISDIR(kind):
            yield from walk(path, tally, visited)
        elif stat.S_ISREG(kind):
            yield path
        else:
            tally.leave_out(NO_FILE, path)


def identify(path: Path) -> tuple[int, int]:
    """Return a folder's device and inode numbers, which are the same for all links to it."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def count_files(path: Path) -> int:
    """Return the number of files below a folder without following links to folders; 0 for a file."""
    return sum(len(files) for _, _, files in os.walk(path))


def list_pictures(folder: Path, tally: Tally, visited: set[tuple[int, int]]) -> list[Path]:
    """Return the paths of the images below a folder, see `walk`; other files are counted as left out."""
    pictures = []
    for path in walk(folder, tally, visited):
        reason = find_rejection_reason(path)
        if reason is None:
            tally.seen += 1
            pictures.append(path)
        else:
            tally.leave_out(reason, path)
    return pictures


def find_rejection_reason(path: Path) -> str | None:
    """Return why a file is not an image that can be read, by its suffix or else its first bytes; None if it is one."""
    suffix = path.suffix.casefold()
    if suffix in PICTURE_SUFFIXES:
        return None
    kind = find_kind(path)
    if kind == "picture":
        return None
    if kind == "heif" or suffix in HEIF_SUFFIXES:
        return None if can_read_heif() else NO_HEIF
    if kind == "video" or (suffix in VIDEO_SUFFIXES and suffix != ".ts"):  # TypeScript has this suffix, too
        return "videos"
    named = {"empty": EMPTY, "raw": RAW, "linear": LINEAR}
    return named.get(kind, f"{NO_PICTURES} ({suffix or 'without a suffix'})")


@functools.cache
def can_read_heif() -> bool:
    """Return whether pillow-heif is installed, and register it with Pillow if so."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


_PICTURE_STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|P[1-6fF]\s|P7\n|II[*+]\0|MM\0[*+]"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|\0\0[\1\2]\0[\x01-\xff]\0|qoif|....ftypavi[fs]|8BPS\0\x01|\x01\xda[\0\1][\1\2]\0[\1-\3]"
    rb"|Y\xa6j\x95|DDS \x7c\0\0\0|icns|\xb1h\xde:|DanM|LinS|/\* XPM \*/|SIMPLE  =|Image type: |BLP[12]|FTEX|\n[\0-\x05][\0\x01][\x01\x02\x04\x08]|#define \w+_width \d",
    re.DOTALL,
)
_HEIF_START = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif[12]|msf1|miaf)", re.DOTALL)
_NO_VIDEO_START = re.compile(rb"....ftyp(?:M4[ABP] |crx |jp2 |jpx )", re.DOTALL)
_VIDEO_STARTS = re.compile(
    rb"....(?:ftyp|moov|mdat|wide|pnot)|RIFF....AVI |\x1aE\xdf\xa3|FLV\x01|\x30\x26\xb2\x75\x8e\x66\xcf\x11"
    rb"|\0\0\x01[\xba\xb3]|\x06\x0e\x2b\x34\x02\x05|OggS.{24,80}?(?:theora|OVP80)|\.RMF\0|YUV4MPEG2 |DKIF\0\0|nut/multimedia"
    rb"|\xb7\xd8\x00\x20\x37\x49\xda\x11|....[\x11\x12]\xaf|\0\0\0?\x01[\x67\x27][\x42\x4d\x64]|\0\0\0\x01\x40\x01\x0c\x01"
    rb"|\x1f\x07\0[\x3f\xbf]|\x47.{187}\x47.{187}\x47|.{4}\x47.{191}\x47.{191}\x47",
    re.DOTALL,
)
_LINEAR_STARTS = re.compile(rb"\x76\x2f\x31\x01|#\?(?:RADIANCE|RGBE)\s")


def is_heif(start: bytes) -> bool:
    """Return whether the first bytes of a file are those of a HEIC picture."""
    # AVIF and HEIF may share their major brand (mif1), so the compatible brands decide.
    brands = start[8 : max(8, int.from_bytes(start[:4], "big"))]
    return _HEIF_START.match(start) is not None and b"avif" not in brands


def find_kind(path: Path) -> str | None:
    """Return "picture", "heif", "video", "raw" (camera), "linear" (high dynamic range) or "empty"; None for others.

    The first bytes decide, but the suffixes of raw and HDR images, MJPEG videos and audio files take precedence.
    """
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as stream:
            start = stream.read(600)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    if not start:
        return "empty"
    suffix = path.suffix.casefold()
    if suffix in _RAW_SUFFIXES:
        return "raw"
    if _LINEAR_STARTS.match(start) or suffix in _LINEAR_SUFFIXES:
        return "linear"
    if _HEIF_START.match(start):
        return "heif" if is_heif(start) else "picture"
    if _PICTURE_STARTS.match(start):
        return "video" if suffix in (".mjpeg", ".mjpg") else "picture"
    if _VIDEO_STARTS.match(start) and not _NO_VIDEO_START.match(start) and suffix not in _AUDIO_SUFFIXES:
        return "video"
    return None
