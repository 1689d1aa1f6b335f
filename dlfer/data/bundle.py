"""The two things that every data source gives: a `Split` of images, and a `DataBundle` of splits."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dlfer.data.images import MIN_SIDE
from dlfer.errors import DataError
from dlfer.runs.files import read_npz, write_atomically
from dlfer.runs.records import LeftOut, ReadingRecord
from dlfer.runs.text import to_utf8


@dataclass(frozen=True)
class Split:
    """Images of one split of the data, held in memory in their native size.

    Attributes:
        name: the source's own name of the split, e.g. "Training", "PublicTest", "train".
        images: uint8 [N, H, W, C], C is 1 (grey) or 3 (RGB), values 0..255.
        targets: int64 [N], indices into the bundle's labels.
        ids: str [N], unique and stable under a change of order: "Training/17", "angry/im0.png".
            An augmented copy is "<source id>#<number>", so that it is known as a duplicate of its source. What of a
            file's name is not UTF-8 becomes \\xNN here, since no record could hold it.
        soft_targets: float32 [N, C], rows sum to one: what is trained towards instead of the targets, by which an
            image is still counted, drawn and judged; None: the targets alone.
    """

    name: str
    images: np.ndarray
    targets: np.ndarray
    ids: np.ndarray
    soft_targets: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _make_utf8(np.asarray(self.ids)))
        check_split(self)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray, name: str | None = None) -> Split:
        """Return the rows at `indices` (int [M]) as a split of its own."""
        soft = None if self.soft_targets is None else self.soft_targets[indices]
        return Split(name or self.name, self.images[indices], self.targets[indices], self.ids[indices], soft)


@dataclass(frozen=True)
class Share:
    """Which of `count` equal shares of something a host has; each row belongs to one of them.

    Attributes:
        index: from 0.
        count: number of hosts.
    """

    index: int = 0
    count: int = 1

    def count_images(self, total: int) -> int:
        """Return how many of `total` images the share holds; the first shares hold those that are left over."""
        return (total - self.index + self.count - 1) // self.count

    def find_start(self, total: int) -> int:
        """Return how many images the shares before hold."""
        return sum(Share(index, self.count).count_images(total) for index in range(self.index))


WHOLE = Share()


class StreamedSplit(Protocol):
    """Images of one split of the data that is too large for memory, read batch by batch.

    Its order is a function of (seed, epoch) alone, so that an interrupted epoch can go on in the
    middle and see the very same batches.
    """

    name: str
    num_images: int
    image_size: int

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start_step: int = 0, training: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (images uint8 [B, S, S, 3], targets int64 [B], ids str [B]).

        In training the order is shuffled, each image is cropped as the source was told to (`data.crop`), and an
        incomplete last batch is dropped, unless it is the only one; else the order is the data set's own, the crop
        that of validation, and nothing is dropped.

        Args:
            batch_size: B.
            seed, epoch: fix the order and the crops.
            start_step: batches to leave out at the beginning.
            training: as above.
        """
        ...

    def shard(self, index: int, count: int) -> StreamedSplit:
        """Return share `index` of `count`: together they hold each image once, in numbers that differ by one."""
        ...

    def count_classes(self) -> np.ndarray:
        """Return int64 [C], the number of images of each label; the first call may read all records once."""
        ...

    def balance(self, how: str) -> StreamedSplit:
        """Return the split whose epochs in training repeat images, or leave some out, as `balance: how` says.

        Raises:
            ConfigError: a stream cannot be balanced so.
        """
        ...


@dataclass(frozen=True)
class Reading:
    """What a source met with when it read its files, for the audit.

    Attributes:
        unreadable: what was wrong with each row or file that was left out.
        num_rows: rows of the csv, those left out included; None where it was no single csv.
        sizes: (width, height) of each file by its id, where they differ.
        what: what is counted, "files" or "rows".
        seen: their number, those left out included; None of a source that counts nothing.
        left_out: those that became no image of a split, by reason.
    """

    unreadable: tuple[str, ...] = ()
    num_rows: int | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    what: str = "files"
    seen: int | None = None
    left_out: tuple[LeftOut, ...] = ()

    def leave_out(self, reason: str, names: Collection[str]) -> Reading:
        """Return the reading with images, by their ids, that were seen and are left out for one more reason."""
        if not len(names):
            return self
        found = LeftOut(reason=reason, n=len(names), first=[str(name) for name in list(names)[:5]])
        return dataclasses.replace(self, left_out=(*self.left_out, found))

    def as_record(self) -> ReadingRecord | None:
        """Return the counts as data.json and audit.json hold them; None where the source counts nothing."""
        if self.seen is None:
            return None
        used = self.seen - sum(reason.n for reason in self.left_out)
        return ReadingRecord(what=self.what, seen=self.seen, used=used, left_out=list(self.left_out))

    def __post_init__(self) -> None:
        object.__setattr__(self, "unreadable", tuple(map(to_utf8, self.unreadable)))
        object.__setattr__(self, "sizes", {to_utf8(name): size for name, size in self.sizes.items()})


@dataclass(frozen=True)
class DataBundle:
    """What an experiment trains, selects and judges on.

    Attributes:
        source: the registered name of the source.
        labels: names of the classes, in the order of the targets.
        train, validation, test: the splits; `test` is None where the data has none.
        protocol: "official", "resplit", "cross_validation" or "paper".
        selected_on: the validation split in words, e.g. "PublicTest": what an epoch is selected on, where one is.
        notes: sentences that every output of the run repeats (what was skipped, replaced, resized).
        reading: what the source met with when it read its files.
        test_groups: int64 [n], the same number for images of test that are duplicates or show one subject; None where the
            protocol is not cross_validation.
    """

    source: str
    labels: tuple[str, ...]
    train: Split | StreamedSplit
    validation: Split | StreamedSplit
    test: Split | None
    protocol: str = "official"
    selected_on: str = "validation"
    notes: tuple[str, ...] = ()
    reading: Reading = Reading()
    test_groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(to_utf8, self.labels)))
        object.__setattr__(self, "notes", tuple(map(to_utf8, self.notes)))

    @property
    def splits(self) -> dict[str, Split | StreamedSplit]:
        """Of train, validation and test those that there are, in this order."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    @property
    def channels(self) -> int:
        """Of the images that the network gets: 1 (grey) or 3 (RGB); streamed ones have 3."""
        return self.train.images.shape[-1] if isinstance(self.train, Split) else 3


def _make_utf8(ids: np.ndarray) -> np.ndarray:
    """Return ids (str [N]) that UTF-8 can hold; the same array where they are so already."""
    if ids.dtype.kind != "U" or not ids.dtype.itemsize:
        return ids
    codes = np.ascontiguousarray(ids, ids.dtype.newbyteorder("=")).view(np.uint32)
    if not ((codes >= 0xD800) & (codes <= 0xDFFF)).any():
        return ids
    return np.array([to_utf8(name) for name in ids.tolist()])


def check_split(split: Split) -> None:
    """Raise DataError unless the arrays of `split` fit together as its docstring says."""
    images, targets, ids = split.images, split.targets, split.ids
    where = f"split {split.name!r}"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{where}: found images of dtype {images.dtype} and shape {images.shape}, expected uint8 [N, H, W, 1 or 3]."
        )
    if not len(images) == len(targets) == len(ids):
        raise DataError(
            f"{where}: found {len(images)} images, {len(targets)} targets and {len(ids)} ids; expected the same number."
        )
    if split.soft_targets is not None and len(split.soft_targets) != len(targets):
        raise DataError(f"{where}: found {len(split.soft_targets)} soft targets for {len(targets)} images.")
    if len(targets) and int(np.min(targets)) < 0:
        raise DataError(f"{where}: found a negative target, expected indices of labels from 0.")
    if len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise DataError(f"{where}: the id {str(values[counts > 1][0])!r} occurs more than once; ids must be unique.")


def make_split(
    images: Any, labels: Any, *, names: Sequence[str] | None = None, ids: Any = None
) -> tuple[Split, tuple[str, ...]]:
    """Return images in memory as a split, and the labels that its targets are indices of.

    Args:
        images: uint8 [N, H, W] or [N, H, W, 1 or 3], N at least 1.
        labels: N names, or N whole numbers.
        names: what whole numbers are indices of; None: each number is a label of its own, with itself as its name.
        ids: N different names of the images; None: "0", "1" and so on.

    Raises:
        DataError: they are not of that form, or their lengths differ.
    """
    pixels = _to_array("images", images)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        hint = (
            " Multiply values of 0 to 1 by 255, and convert them by .astype(np.uint8)."
            if pixels.dtype.kind == "f"
            else ""
        )
        raise DataError(
            f"images: found {pixels.dtype} {list(pixels.shape)}, expected uint8 [N, H, W] or [N, H, W, 1 or 3] with values "
            f"0 to 255.{hint}"
        )
    given = np.atleast_1d(_to_array("labels", labels))
    if not len(pixels) == len(given) or not len(given):
        raise DataError(f"found {len(pixels)} images and {len(given)} labels, expected the same number, at least one.")
    is_text = given.dtype.kind == "U" or (given.dtype.kind == "O" and all(isinstance(label, str) for label in given))
    if given.ndim != 1 or not (is_text or given.dtype.kind in "iu"):
        raise DataError(f"labels: found {given.dtype} {list(given.shape)}, expected [N] names or whole numbers.")
    if names is not None and not is_text:
        if given.min() < 0 or given.max() >= len(names):
            raise DataError(
                f"labels: found {given.min()} to {given.max()}, expected indices 0 to {len(names) - 1} of {', '.join(names)}."
            )
        found, targets = np.array(names), given
    else:
        found, targets = np.unique(given.astype(str) if is_text else given, return_inverse=True)
    ids = np.arange(len(given)).astype(str) if ids is None else _to_array("ids", ids).astype(str)
    split = Split("images", pixels[..., None] if pixels.ndim == 3 else pixels, targets.astype(np.int64), ids)
    if min(pixels.shape[1:3]) < MIN_SIDE:
        raise DataError(
            f"images: found {pixels.dtype} {list(pixels.shape)}, expected at least {MIN_SIDE} pixels on each side (H and W)."
        )
    return split, tuple(str(name) for name in found)


def _to_array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name}: cannot become one array ({error}); are the images of different sizes?") from error


def compute_fingerprint(split: Split) -> str:
    """Return the sha256 (hex) of a split's ids, targets and pixels, independent of the order of rows."""
    order = np.argsort(split.ids, kind="stable")
    digest = hashlib.sha256(repr((split.images.shape[1:], len(split))).encode())
    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        digest.update("\n".join(split.ids[rows].tolist()).encode())
        digest.update(np.ascontiguousarray(split.targets[rows], dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(split.images[rows]).tobytes())
    return digest.hexdigest()


def name_cache(kind: str, digest: str) -> Path | None:
    """Return the file in which arrays made of data are kept: in $DLFER_CACHE, or ~/.cache/dlfer; None where there is no home folder.

    It holds images: treat it like the data.
    """
    try:
        folder = Path(os.environ.get("DLFER_CACHE") or "~/.cache/dlfer").expanduser()
    except RuntimeError:
        return None
    return folder / f"{kind}-{digest[:16]}.npz"


def read_cache(path: Path | None, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Return what `write_cache` wrote, or None where there is nothing or it is damaged."""
    if path is None:
        return None
    try:
        return read_npz(path, names=names)
    except (OSError, ValueError):  # absent or damaged: written again
        return None


def write_cache(path: Path | None, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Keep arrays for the next time; return what hinders it, with the place, if anything does."""
    if path is None:
        return "there is no home folder; set DLFER_CACHE to a folder"
    contents = io.BytesIO()
    np.savez(contents, **arrays)
    try:
        write_atomically(path, contents.getvalue())
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return None
