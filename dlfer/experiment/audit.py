"""Implementation of `dlfer audit`: load the data with its source's own splits, audit it, and write files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlfer.config.load import resolve_path
from dlfer.config.names import FER2013_LABELS
from dlfer.data.audit import audit_splits, list_places, number_groups
from dlfer.data.bundle import DataBundle, Reading, Split, StreamedSplit, make_split
from dlfer.data.fer2013 import load_fer2013_splits
from dlfer.data.fer2013_csv import describe_unread_columns
from dlfer.data.given import OFFICIAL, GivenData, open_data
from dlfer.data.sources import check_shapes, find_refusal, load_source_splits
from dlfer.data.split import TEST_FRACTION, VALIDATION_FRACTION, draw_held_out
from dlfer.data.survey import Survey, survey_images
from dlfer.errors import DataError, DlferError, UserError
from dlfer.report.audit import list_shown, write_audit_page
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.files import check_outputs, write_atomically
from dlfer.runs.text import count_noun, to_cell

_IMAGE_SIZE = 256
"""Image size in pixels to which a folder's images of different sizes are reduced, unless an experiment sets another."""
_ROLES = {**{name: split for split, name in OFFICIAL.items()}, "all": "train"}
"""The name of a split in a csv -> train, validation or test."""


@dataclass(frozen=True)
class Inspected:
    """Data with the splits of its source, before anything is sampled or split.

    Attributes:
        name: the file or folder.
        splits: the splits under the source's own names.
        labels: names of the targets.
        reading: counts of files or rows read, and those that could not be read.
        notes: changes made to the images when they were loaded.
        votes: the experiment's file of votes.
        aliases: the experiment's `data.labels.aliases`.
        seed: for drawing a new split.
    """

    name: str
    splits: tuple[Split | StreamedSplit, ...]
    labels: tuple[str, ...]
    reading: Reading
    notes: tuple[str, ...] = ()
    votes: Path | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def held(self) -> list[Split]:
        """The splits with images in memory."""
        return [split for split in self.splits if isinstance(split, Split) and len(split)]


@dataclass(frozen=True)
class AuditFiles:
    """The files that an audit writes (None: not this one), and whether existing files are overwritten."""

    json: Path | None = None
    html: Path | None = None
    groups: Path | None = None
    split: Path | None = None
    force: bool = False


def inspect_data(
    path: Path | str,
    *,
    votes: Path | None = None,
    files: AuditFiles | None = None,
    show: Callable[[AuditRecord], None] = lambda audit: None,
    say: Callable[[str], None] = lambda text: None,
) -> AuditRecord:
    """Audit data and write the requested files.

    Images or rows that cannot be read are counted and listed, and do not abort the audit.

    Args:
        path: a folder (class folders, or train, validation and test with class folders); a csv in the layout of
            FER2013, with or without a column Usage, each Usage a split; a zip with either; an .npz of arrays; or an
            experiment file, whose `finetune.data` is audited.
        votes: a file of FER+ votes, instead of the experiment's `finetune.data.votes`.
        files: the files to write: json the audit; html a page; groups a csv id,split,label,group; split a csv id,split
            that divides all images into train, validation and test, with each group in only one of them.
        show: called with the audit before any file is written.

    Raises:
        UserError: the data does not exist or has another layout.
        ConfigError: a file to write is also an input, or already exists; see `check_outputs`.
        DlferError: some of the files could not be written; the others are.
    """
    files = files or AuditFiles()
    wanted = {"--json": files.json, "--html": files.html, "--write-groups": files.groups, "--write-split": files.split}
    with open_data(path) as given:
        check_outputs(wanted, [votes, *given.list_read()], force=files.force)
        data = load_inspected(given)
    held = data.held
    if not held and (files.groups or files.split):
        raise UserError(f"dlfer audit: {data.name} is streamed, so its images are not audited and no groups are known.")
    survey = survey_images(held) if held else None
    found = audit_splits(
        data.splits,
        data.labels,
        reading=data.reading,
        votes=votes or data.votes,
        aliases=data.aliases,
        survey=survey,
    )
    notes = [*data.notes, *(_describe_streamed(split) for split in data.splits if not isinstance(split, Split))]
    audit = found.model_copy(update={"source": data.name, "notes": notes})
    show(audit)
    writers: tuple[tuple[Path | None, Callable[[Path], object]], ...] = (
        (files.json, lambda path: write_atomically(path, audit.dump())),
        (files.html, lambda path: write_audit_page(path, audit, _pick_images(audit, held))),
        (files.groups, lambda path: write_atomically(path, format_groups(data, survey))),
        (files.split, lambda path: write_atomically(path, format_split(data, survey))),
    )
    _write_all([(path, write) for path, write in writers if path is not None], say)
    return audit


def audit_arrays(
    images: np.ndarray, labels: Sequence, *, splits: Sequence[str] | None = None, ids: Sequence[str] | None = None
) -> AuditRecord:
    """Audit images in memory. The arguments are those of `dlfer.audit`.

    Raises:
        DataError: an array has an invalid form, or the lengths differ.
    """
    whole, names = make_split(images, labels, ids=ids)
    if splits is None:
        return audit_splits([whole], names)
    places = np.asarray(splits).astype(str)
    if places.shape != (len(whole),):
        raise DataError(
            f"splits: found the shape {list(places.shape)}, expected one name for each of {len(whole)} images."
        )
    divided = [whole.take(np.flatnonzero(places == name), name) for name in dict.fromkeys(places.tolist())]
    return audit_splits(divided, names)


def _write_all(writers: list[tuple[Path, Callable[[Path], object]]], say: Callable[[str], None]) -> None:
    """Write each file, and raise DlferError at the end if some could not be written."""
    problems = []
    for path, write in writers:
        try:
            write(path)
            say(f"written: {path}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    if problems:
        raise DlferError("not written: " + "; ".join(problems) + ".")


def load_inspected(given: GivenData) -> Inspected:
    """Load recognised data without the images or rows that cannot be read.

    Raises:
        UserError: as in `inspect_data`.
    """
    if given.csv is not None:
        splits, reading = load_fer2013_splits(given.csv)
        notes = (*describe_unread_columns(given.csv), *given.notes)
        return Inspected(str(given.path), tuple(splits), FER2013_LABELS, reading, notes)
    config = given.config
    # Streamed images are not read here, so unreadable ones cannot be skipped.
    update = {} if config.source == "tfds" else {"skip_unreadable": True}
    bundle = load_source_splits(config.model_copy(update=update), image_size=given.image_size or _IMAGE_SIZE)
    if config.size is None and config.faces is None:  # either would give all images one size
        check_shapes(bundle, given.path)
    splits = tuple(split for split in (bundle.train, bundle.validation, bundle.test) if split is not None)
    votes = None if config.votes is None else resolve_path(config.votes)
    return Inspected(
        str(given.path),
        splits,
        bundle.labels,
        bundle.reading,
        bundle.notes,
        votes,
        config.labels.aliases,
        config.seed,
    )


def check_inspected(data: Inspected, *, trains: bool = True) -> str:
    """Return a one-line summary of the data, after checking that a training could use all of it.

    Args:
        trains: whether the data can be trained on; otherwise train may lack classes.

    Raises:
        DataError: an image or a row cannot be read, there are fewer than two labels, or train lacks a class or images.
    """
    unreadable, seen = data.reading.unreadable, data.reading.seen
    if unreadable:
        raise DataError(
            f"{data.name}: {len(unreadable):,} of {seen:,} {data.reading.what} cannot be read; the first: {unreadable[0]}"
        )
    counts = sum((np.bincount(split.targets, minlength=len(data.labels)) for split in data.held), 0)
    if data.held and np.count_nonzero(counts) < 2:
        only = ", ".join(np.array(data.labels)[np.flatnonzero(counts)].tolist())
        where = ", each class in a folder of its own" if data.reading.what == "files" else ""
        raise DataError(
            f"{data.name}: found one label only ({only}), expected two or more. Add images of another class{where}."
        )
    splits = ", ".join(f"{split.name} {count_noun(len(split), 'image')}" for split in data.splits)
    by_role = {_ROLES.get(split.name, split.name): split for split in data.held}
    if trains and "train" in by_role:
        found = (by_role.get(key) for key in ("train", "validation", "test"))
        problem = find_refusal(DataBundle("", data.labels, *found, reading=data.reading))
        if problem is not None:
            raise DataError(f"{data.name}: dlfer run will refuse this data: {problem}")
    if not data.held:
        return f"{splits}, streamed"
    return f"{splits}; {', '.join(f'{name} {n:,}' for name, n in zip(data.labels, counts.tolist(), strict=True))}"


def _describe_streamed(split: StreamedSplit) -> str:
    return (
        f"{split.name}: {len(split):,} images are streamed. Their labels were counted; duplicates, leaks and outliers among them "
        "were not looked for."
    )


def format_groups(data: Inspected, survey: Survey) -> str:
    """Return a csv id,split,label,group, where a group is the images connected by chains of duplicates."""
    where = list_places(data.held, data.labels)
    groups = number_groups(survey, where).tolist()
    rows = [(place.id, place.split, place.label, group) for place, group in zip(where, groups, strict=True)]
    return _format_csv(("id", "split", "label", "group"), rows)


def format_split(data: Inspected, survey: Survey) -> str:
    """Return a csv id,split that divides all images 80/20 and again 80/20, stratified, without dividing any group.

    If any id occurs in several splits, all ids are prefixed by their splits, e.g. "train/0.png".
    """
    where = list_places(data.held, data.labels)
    ids = np.array([place.id for place in where])
    if len(np.unique(ids)) < len(ids):
        ids = np.array([f"{place.split}/{place.id}" for place in where])
    targets = np.concatenate([split.targets for split in data.held])
    # With given groups the split depends only on ids and targets; image shapes may differ between splits.
    pool = Split("all", np.zeros((len(ids), 1, 1, 1), np.uint8), targets, ids)
    judged = draw_held_out(pool, TEST_FRACTION, seed=data.seed, purpose="test", groups=survey.groups)
    rest = np.flatnonzero(~judged)
    selected = draw_held_out(
        pool.take(rest), VALIDATION_FRACTION, seed=data.seed, purpose="validation", groups=survey.groups[rest]
    )
    names = np.where(judged, "test", "train").astype("<U10")
    names[rest[selected]] = "validation"
    return _format_csv(("id", "split"), zip(ids.tolist(), names.tolist(), strict=True))


def _format_csv(header: tuple[str, ...], rows: Iterable[tuple]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([to_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _pick_images(audit: AuditRecord, splits: list[Split]) -> dict[tuple[str, str], np.ndarray]:
    """Return (split, id) -> image, for the images that the page shows."""
    wanted = set(list_shown(audit))
    return {
        (split.name, str(name)): split.images[row]
        for split in splits
        for row, name in enumerate(split.ids)
        if (split.name, str(name)) in wanted
    }
