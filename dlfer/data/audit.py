"""Audit of a data set: duplicates within and across its splits, contradicting labels, images without content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlfer.config.names import expand_home
from dlfer.data.bundle import DataBundle, Reading, Split, StreamedSplit, compute_fingerprint
from dlfer.data.files import normalise_name
from dlfer.data.labels import CANONICAL
from dlfer.data.survey import FLAT_STD, MAX_LISTED, RULE, Survey, find_no_faces, find_outliers, survey_images
from dlfer.data.votes import merge_columns, read_votes, score_votes
from dlfer.errors import ModelError
from dlfer.runs.audit_record import (
    AuditedSplit,
    AuditRecord,
    FlatImage,
    GroupsAcrossSplits,
    ListedImage,
    OutlierSummaries,
    Place,
    Samples,
    Unreadable,
)
from dlfer.runs.files import read_json, write_atomically
from dlfer.runs.records import DuplicateCounts

_CACHE_VERSION = 2
_MAX_SAMPLES = 12
"""Largest number of pairs of each kind, and of groups with contradicting labels, shown as examples."""


def audit_data(
    bundle: DataBundle,
    *,
    cache: Path | None = None,
    votes: str | Path | None = None,
    aliases: Mapping[str, str] | None = None,
) -> AuditRecord:
    """Return the audit of a bundle with its fingerprint, from the cache if the same data was audited before.

    Args:
        bundle: the bundle of a source or a protocol; the images of streamed splits are counted but not examined.
        cache: a folder of audits, `<fingerprint>.json`; None: no cache.
        votes, aliases: as for `audit_splits`.
    """
    fingerprint = _compute_fingerprint(bundle, votes, aliases)
    path = None if cache is None else Path(cache) / f"{fingerprint}.json"
    if path is not None and (found := _read_cached(path, fingerprint)) is not None:
        return found
    audit = audit_bundle(bundle, votes=votes, aliases=aliases).model_copy(update={"fingerprint": fingerprint})
    if path is not None:
        write_atomically(path, audit.dump())
    return audit


def audit_bundle(
    bundle: DataBundle, *, votes: str | Path | None = None, aliases: Mapping[str, str] | None = None
) -> AuditRecord:
    """Return the audit of a bundle; the images of streamed splits are counted but not examined."""
    splits = list(bundle.splits.values())
    return audit_splits(splits, bundle.labels, reading=bundle.reading, votes=votes, aliases=aliases)


def audit_splits(
    splits: Sequence[Split | StreamedSplit],
    labels: tuple[str, ...],
    *,
    reading: Reading | None = None,
    votes: str | Path | None = None,
    aliases: Mapping[str, str] | None = None,
    survey: Survey | None = None,
) -> AuditRecord:
    """Return the audit of several splits: their classes, duplicates within and across splits, and unusual images.

    Args:
        splits: in-memory or streamed splits; of streamed ones only the classes are counted, in one pass.
        labels: names of the targets.
        reading: the source's record of how it read its files.
        votes: a file of votes on the images.
        aliases: the data's `labels.aliases`, which merge columns of votes.
        survey: the survey of the nonempty in-memory splits, if it exists already.
    """
    reading = reading or Reading()
    held = [split for split in splits if isinstance(split, Split) and len(split)]
    audit = AuditRecord(
        num_images=sum(len(split) for split in splits),
        labels=list(labels),
        splits={split.name: _count_classes(split, labels) for split in splits},
        unreadable=Unreadable(n=len(reading.unreadable), examples=list(reading.unreadable[:MAX_LISTED])),
        reading=reading.as_record(),
    )
    if not held:
        return audit
    survey = survey_images(held) if survey is None else survey
    vote_summary = None
    if votes is not None:
        vote_summary = score_votes(merge_columns(read_votes(votes), aliases or {}), held, labels, reading.num_rows)
    found = _describe_images(survey, held, labels, reading.sizes)
    return audit.model_copy(update={**found, "votes": vote_summary})


def _describe_images(
    survey: Survey, held: Sequence[Split], labels: tuple[str, ...], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return the fields of the audit that are computed from the survey."""
    targets = np.concatenate([split.targets for split in held])
    where = list_places(held, labels)
    exact = _count_kind(survey.distinct, targets, survey.split_of)
    near = _count_kind(survey.groups, targets, survey.split_of)
    contrast = survey.contrast[survey.distinct]
    no_faces = None
    if are_expressions(labels):
        no_faces = find_no_faces(survey.signatures[survey.distinct], contrast, survey.groups, where)
    return {
        "distinct_images": len(survey.brightness),
        "duplicate_groups": exact.groups,
        "conflicting_groups": exact.conflicting,
        "near_groups": near.groups,
        "near_conflicting_groups": near.conflicting,
        "largest_group": near.largest,
        "groups_across_splits": GroupsAcrossSplits(exact=exact.across, near=near.across),
        "constant_images": int(survey.constant[survey.distinct].sum()),
        "near_constant_images": int((contrast < FLAT_STD).sum()),
        "flat": _list_flat(contrast, where),
        "leaks": _count_leaks(survey, held),
        "outliers": _find_all_outliers(survey, where, sizes),
        "probably_no_face": no_faces,
        "samples": _draw_samples(survey, where, targets),
    }


def list_places(splits: Sequence[Split], labels: tuple[str, ...]) -> list[Place]:
    """Return split, id and label of each image in the concatenated rows of the splits."""
    return [
        Place(split.name, str(name), labels[target])
        for split in splits
        for name, target in zip(split.ids, split.targets, strict=True)
    ]


def number_groups(survey: Survey, where: Sequence[Place]) -> np.ndarray:
    """Return int64 [N], the survey's groups renumbered from 0 in the order of their first image by split and id.

    The numbers do not depend on the order of the rows within a split.
    """
    order = sorted(range(len(where)), key=lambda row: (survey.split_of[row], where[row].id))
    names, first, dense = np.unique(survey.groups[order], return_index=True, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(first)] = np.arange(len(names))
    groups = np.empty(len(where), np.int64)
    groups[order] = rank[dense]
    return groups


def _count_classes(split: Split | StreamedSplit, labels: tuple[str, ...]) -> AuditedSplit:
    if isinstance(split, Split):
        counts = np.bincount(split.targets, minlength=len(labels)).tolist()
    else:
        counts = split.count_classes().tolist()
    present = [count for count in counts if count]
    return AuditedSplit(
        num_images=len(split),
        classes=dict(zip(labels, counts, strict=True)),
        imbalance=round(max(present) / min(present), 2) if present else None,
    )


class _GroupCounts(NamedTuple):
    """Numbers of groups with several images, with several labels, and in several splits; size of the largest group."""

    groups: int
    conflicting: int
    across: int
    largest: int


def _count_kind(groups: np.ndarray, targets: np.ndarray, split_of: np.ndarray) -> _GroupCounts:
    sizes = np.unique(groups, return_counts=True)[1]
    return _GroupCounts(
        groups=int(np.sum(sizes > 1)),
        conflicting=len(_find_groups_with_several(groups, targets)),
        across=len(_find_groups_with_several(groups, split_of)),
        largest=int(sizes.max()),
    )


def _find_groups_with_several(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return int64 [G], the numbers of the groups whose members have more than one distinct value."""
    pairs = np.unique(np.stack([groups, values], axis=1), axis=0)
    numbers, counts = np.unique(pairs[:, 0], return_counts=True)
    return numbers[counts > 1]


def _list_flat(contrast: np.ndarray, where: Sequence[Place]) -> list[FlatImage]:
    flat = np.flatnonzero(contrast < FLAT_STD)
    listed = flat[np.argsort(contrast[flat], kind="stable")][:MAX_LISTED]
    return [FlatImage(**where[row]._asdict(), std=round(float(contrast[row]), 2)) for row in listed]


def _count_leaks(survey: Survey, splits: Sequence[Split]) -> dict[str, DuplicateCounts]:
    return {
        f"{splits[left].name}->{splits[right].name}": DuplicateCounts(**survey.find_duplicates(left, right).count())
        for left, right in combinations(range(len(splits)), 2)
    }


def _find_all_outliers(
    survey: Survey, where: Sequence[Place], sizes: Mapping[str, tuple[int, int]]
) -> OutlierSummaries:
    sized = [place for place in where if place.id in sizes]
    shorter = np.array([min(sizes[place.id]) for place in sized], float)
    return OutlierSummaries(
        rule=RULE,
        brightness=find_outliers("brightness", survey.brightness[survey.distinct], where),
        contrast=find_outliers("contrast", survey.contrast[survey.distinct], where),
        size=find_outliers("size", shorter, sized) if sized else None,
    )


def are_expressions(labels: tuple[str, ...]) -> bool:
    """Return whether at least two, and at least half, of the labels are expressions, so that the images show faces."""
    return 2 * sum(normalise_name(label) in CANONICAL for label in labels) >= max(2, len(labels))


def _draw_samples(survey: Survey, where: Sequence[Place], targets: np.ndarray) -> Samples:
    """Return sample pairs of each kind, preferably across splits, and groups of copies with contradicting labels."""
    members: dict[int, list[int]] = {}
    by_image = np.argsort(survey.distinct, kind="stable")
    bounds = np.searchsorted(survey.distinct[by_image], np.arange(len(survey.brightness) + 1))

    def list_members(image: int) -> list[int]:
        if image not in members:
            members[image] = by_image[bounds[image] : bounds[image + 1]].tolist()
        return members[image]

    def list_images(rows: Sequence[int]) -> list[ListedImage]:
        return [ListedImage(**where[row]._asdict()) for row in rows]

    def choose(pairs: list[tuple[int, int]]) -> list[list[ListedImage]]:
        order = sorted(pairs, key=lambda p: (survey.split_of[p[0]] == survey.split_of[p[1]], p))
        used: set[int] = set()
        chosen = []
        for first, second in order:  # one pair per group, since many pairs may be frames of one video
            if survey.groups[first] not in used and len(chosen) < _MAX_SAMPLES:
                used.add(int(survey.groups[first]))
                chosen.append(list_images((first, second)))
        return chosen

    def list_pairs(images: np.ndarray) -> list[tuple[int, int]]:
        return [tuple(sorted((list_members(a)[0], list_members(b)[-1]))) for a, b in images.tolist()]

    counts = np.diff(bounds)
    copies = [
        (rows[0], rows[-1]) for rows in map(list_members, np.flatnonzero(counts > 1)) if not _is_flat(survey, rows)
    ]
    contradicting = _find_groups_with_several(survey.distinct, targets)
    conflicting = sorted(rows for rows in map(list_members, contradicting) if not _is_flat(survey, rows))
    return Samples(
        exact=choose(copies),
        near=choose(list_pairs(survey.near)),
        flipped=choose(list_pairs(survey.flipped)),
        conflicting=[list_images(rows[:6]) for rows in conflicting[:_MAX_SAMPLES]],
    )


def _is_flat(survey: Survey, rows: Sequence[int]) -> bool:
    return bool(survey.contrast[survey.distinct[rows[0]]] < FLAT_STD)


def _compute_fingerprint(bundle: DataBundle, votes: str | Path | None, aliases: Mapping[str, str] | None) -> str:
    """Return the sha256 (hex) of everything that the audit depends on."""
    digest = hashlib.sha256(repr((_CACHE_VERSION, bundle.labels, bundle.reading)).encode())
    for split in (bundle.train, bundle.validation, bundle.test):
        if split is None:
            digest.update(b"none")
            continue
        own = compute_fingerprint(split) if isinstance(split, Split) else str(len(split))
        digest.update(f"{split.name}:{own}".encode())
    if votes is not None and expand_home(votes).is_file():
        digest.update(Path(votes).name.encode() + expand_home(votes).read_bytes())
        if aliases:
            digest.update(repr(sorted(aliases.items())).encode())
    return digest.hexdigest()


def _read_cached(path: Path, fingerprint: str) -> AuditRecord | None:
    """Return an audit from the cache; None if it is missing, damaged or of other data."""
    try:
        audit = AuditRecord.parse(read_json(path), path)
    except (OSError, ValueError, ModelError):  # missing or damaged: the caller writes it again
        return None
    return audit if audit.fingerprint == fingerprint else None
