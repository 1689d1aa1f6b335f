"""The containers that every data source returns: a `Split` of images, and a `DataBundle` of splits; and their cache."""

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

from dlfer.config.names import expand_home
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
        ids: str [N], unique and independent of the order: "Training/17", "angry/im0.png". An augmented copy has the id
            "<source id>#<number>", which marks it as a duplicate of its source. Bytes of a file name that are not UTF-8
            are written as \\xNN, since records cannot hold them.
        soft_targets: float32 [N, C], rows sum to one: the training targets in place of `targets`, which are still used
            to count, draw and evaluate images; None: `targets` only.
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
        """Return a split of the rows at `indices` (int [M])."""
        soft = None if self.soft_targets is None else self.soft_targets[indices]
        return Split(name or self.name, self.images[indices], self.targets[indices], self.ids[indices], soft)


@dataclass(frozen=True)
class Share:
    """The share of the data that one of several hosts processes; every row belongs to exactly one share.

    Attributes:
        index: number of the host, from 0.
        count: number of hosts.
    """

    index: int = 0
    count: int = 1

    def count_images(self, total: int) -> int:
        """Return the share's number of images of `total`; the first shares hold one more if it does not divide."""
        return (total - self.index + self.count - 1) // self.count

    def find_start(self, total: int) -> int:
        """Return the number of images in the shares before this one."""
        return sum(Share(index, self.count).count_images(total) for index in range(self.index))


WHOLE = Share()


class StreamedSplit(Protocol):
    """A split of the data that is too large for memory and is read batch by batch.

    Its order depends only on (seed, epoch), so that an interrupted epoch can be resumed with the same batches.
    """

    name: str
    num_images: int
    image_size: int

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start_step: int = 0, training: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (images uint8 [B, S, S, 3], targets int64 [B], ids str [B]).

        In training the order is shuffled, each image is cropped as configured (`data.crop`), and an incomplete last
        batch is dropped unless it is the only one; otherwise the order is that of the data set, the crop is that of
        validation, and no image is dropped.

        Args:
            batch_size: B.
            seed, epoch: determine the order and the crops.
            start_step: number of batches to skip at the beginning.
            training: whether to read for training, see above.
        """
        ...

    def shard(self, index: int, count: int) -> StreamedSplit:
        """Return share `index` of `count`; the shares are disjoint, complete, and differ in size by at most one."""
        ...

    def count_classes(self) -> np.ndarray:
        """Return int64 [C], the number of images of each label; the first call may read all records once."""
        ...

    def balance(self, how: str) -> StreamedSplit:
        """Return a split whose training epochs repeat or leave out images as `balance: how` demands.

        Raises:
            ConfigError: a stream cannot be balanced in this way.
        """
        ...


@dataclass(frozen=True)
class Reading:
    """The record of how a source read its files, for the audit.

    Attributes:
        unreadable: an error message for each unreadable row or file.
        num_rows: rows of the csv, including those left out; None if the source is not a single csv.
        sizes: (width, height) of each file by its id; empty if all sizes are equal.
        what: the unit of the counts: "files", "rows" or "images".
        seen: the number of these units, including those left out; None if the source does not count.
        left_out: the units that are not in any split, by reason.
    """

    unreadable: tuple[str, ...] = ()
    num_rows: int | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    what: str = "files"
    seen: int | None = None
    left_out: tuple[LeftOut, ...] = ()

    def leave_out(self, reason: str, names: Collection[str]) -> Reading:
        """Return a copy that counts the images with the ids `names` as left out for another reason."""
        if not len(names):
            return self
        found = LeftOut(reason=reason, n=len(names), first=[str(name) for name in list(names)[:5]])
        return dataclasses.replace(self, left_out=(*self.left_out, found))

    def as_record(self) -> ReadingRecord | None:
        """Return the counts in the form of data.json and audit.json; None if the source does not count."""
        if self.seen is None:
            return None
        used = self.seen - sum(reason.n for reason in self.left_out)
        return ReadingRecord(what=self.what, seen=self.seen, used=used, left_out=list(self.left_out))

    def __post_init__(self) -> None:
        object.__setattr__(self, "unreadable", tuple(map(to_utf8, self.unreadable)))
        object.__setattr__(self, "sizes", {to_utf8(name): size for name, size in self.sizes.items()})


@dataclass(frozen=True)
class DataBundle:
    """The splits on which an experiment trains, selects and evaluates, with their labels.

    Attributes:
        source: the registered name of the source.
        labels: names of the classes, in the order of the targets.
        train, validation, test: the splits; `test` is None if the data has none.
        protocol: "official", "resplit", "cross_validation" or "paper".
        selected_on: a description of the validation split, on which an epoch may be selected, e.g. "PublicTest".
        notes: sentences that every output of the run repeats (what was skipped, replaced, resized).
        reading: the record of how the source read its files.
        test_groups: int64 [n], group numbers of the test images: equal for duplicates and images of one subject; None
            unless the protocol is cross_validation.
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
        """The existing splits among train, validation and test, in this order."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    @property
    def channels(self) -> int:
        """Number of channels of the network's input: 1 (grey) or 3 (RGB); streamed images have 3."""
        return self.train.images.shape[-1] if isinstance(self.train, Split) else 3


def _make_utf8(ids: np.ndarray) -> np.ndarray:
    """Return ids (str [N]) with surrogates replaced so that UTF-8 can encode them; the same array if there are none."""
    if ids.dtype.kind != "U" or not ids.dtype.itemsize:
        return ids
    codes = np.ascontiguousarray(ids, ids.dtype.newbyteorder("=")).view(np.uint32)
    if not ((codes >= 0xD800) & (codes <= 0xDFFF)).any():
        return ids
    return np.array([to_utf8(name) for name in ids.tolist()])


def check_split(split: Split) -> None:
    """Raise DataError unless the arrays of `split` have the dtypes, shapes and lengths that `Split` documents."""
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
    """Return a split of images in memory, and the labels that its targets index.

    Args:
        images: uint8 [N, H, W] or [N, H, W, 1 or 3], N at least 1.
        labels: N names, or N whole numbers.
        names: the names that whole numbers index; None: each distinct number is a label and its own name.
        ids: N distinct ids of the images; None: "0", "1" and so on.

    Raises:
        DataError: the arguments are not of that form, or their lengths differ.
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
    """Return the sha256 (hex) of a split's ids, targets and pixels, independent of the order of its rows."""
    order = np.argsort(split.ids, kind="stable")
    digest = hashlib.sha256(repr((split.images.shape[1:], len(split))).encode())
    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        digest.update("\n".join(split.ids[rows].tolist()).encode())
        digest.update(np.ascontiguousarray(split.targets[rows], dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(split.images[rows]).tobytes())
    return digest.hexdigest()


def get_cache_path(kind: str, digest: str) -> Path | None:
    """Return the path of a cache file in $DLFER_CACHE or ~/.cache/dlfer; None if there is no home folder.

    The cache holds images and needs the same protection as the data.
    """
    try:
        folder = expand_home(os.environ.get("DLFER_CACHE") or "~/.cache/dlfer")
    except RuntimeError:
        return None
    return folder / f"{kind}-{digest[:16]}.npz"


def read_cache(path: Path | None, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Return the arrays that `write_cache` stored; None if the file is missing or damaged."""
    if path is None:
        return None
    try:
        return read_npz(path, names=names)
    except (OSError, ValueError):  # missing or damaged: the caller writes it again
        return None


def write_cache(path: Path | None, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Store arrays in a cache file; return the reason if that fails, else None."""
    if path is None:
        return "there is no home folder; set DLFER_CACHE to a folder"
    contents = io.BytesIO()
    np.savez(contents, **arrays)
    try:
        write_atomically(path, contents.getvalue())
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return None
