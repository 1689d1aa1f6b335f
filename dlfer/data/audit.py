"""What a data set hides: duplicates within and across its splits, contradicting labels, images without content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.data.bundle import DataBundle, Reading, Split, StreamedSplit, compute_fingerprint
from dlfer.data.labels import SPELLINGS
from dlfer.data.outliers import FLAT_STD, MOST_LISTED, RULE, find_no_faces, find_outliers
from dlfer.data.survey import Survey, survey_images
from dlfer.data.votes import read_votes, score_votes
from dlfer.runs.files import write_atomically

_CACHE_VERSION = 2
_MOST_SAMPLES = 12
"""Pairs of each kind and groups that contradict, which the page shows."""


def audit_data(bundle: DataBundle, *, cache: Path | None = None, votes: str | Path | None = None) -> dict[str, Any]:
    """Return the audit of a bundle, or the one made of the very same data before.

    Args:
        bundle: as a source or a protocol gives it; streamed parts are counted and not looked into.
        cache: a folder of audits, `<fingerprint>.json`; None to make it anew.
        votes: a file of FER+ votes.

    Returns:
        As `audit_bundle`, with "fingerprint".
    """
    fingerprint = _compute_fingerprint(bundle, votes)
    path = None if cache is None else Path(cache) / f"{fingerprint}.json"
    if path is not None and (found := _read_cached(path, fingerprint)) is not None:
        return found
    audit = {**audit_bundle(bundle, votes=votes), "fingerprint": fingerprint}
    if path is not None:
        write_atomically(path, json.dumps(audit) + "\n")
    return audit


def audit_bundle(bundle: DataBundle, *, votes: str | Path | None = None) -> dict[str, Any]:
    """Return what the data holds and what its parts share, ready for audit.json.

    Streamed parts are counted and not looked into.

    Returns:
        As `audit_parts`.
    """
    parts = [part for part in (bundle.train, bundle.validation, bundle.test) if part is not None]
    return audit_parts(parts, bundle.labels, reading=bundle.reading, votes=votes)


def audit_parts(
    parts: Sequence[Split | StreamedSplit],
    labels: tuple[str, ...],
    *,
    reading: Reading | None = None,
    votes: str | Path | None = None,
    survey: Survey | None = None,
) -> dict[str, Any]:
    """Return what the parts of a data set hold and share.

    Args:
        parts: in-memory splits; streamed ones are counted and not looked into.
        labels: names of the targets.
        reading: what the source met with.
        votes: a file of FER+ votes.
        survey: of the in-memory splits, if it was made before.

    Returns:
        num_images, labels, splits {name: {num_images, classes {label: count}, imbalance}}, unreadable {n,
        examples}, and, if any part is in memory:
        distinct_images; duplicate_groups (images that occur more than once), conflicting_groups (those
        under more than one label); near_groups and near_conflicting_groups (the same of groups that chains of
        duplicates of any kind make), largest_group (images), groups_across_splits {exact, near};
        constant_images (all pixels equal), near_constant_images (standard deviation below 5, constant ones
        included), flat (which ones); leaks {"Training->PublicTest": {exact, augmented, any}}, the number of images
        of the right split that have a duplicate in the left, by kind and in all (see `Duplicates`); outliers {rule, brightness, contrast, size}; probably_no_face (None where the
        labels are no expressions, or for fewer than 500 images); votes (None without a file); samples.
    """
    reading = reading or Reading()
    held = [part for part in parts if isinstance(part, Split) and len(part)]
    audit: dict[str, Any] = {
        "num_images": sum(len(part) for part in parts),
        "labels": list(labels),
        "splits": {part.name: _describe_part(part, labels) for part in parts},
        "unreadable": {"n": len(reading.unreadable), "examples": list(reading.unreadable[:MOST_LISTED])},
    }
    if not held:
        return audit
    survey = survey_images(held) if survey is None else survey
    targets = np.concatenate([part.targets for part in held])
    where = list_places(held, labels)
    audit |= _count_groups(survey, targets)
    audit |= _describe_flat(survey, where)
    audit["leaks"] = _count_leaks(survey, held)
    audit["outliers"] = _describe_outliers(survey, where, reading.sizes)
    audit["probably_no_face"] = None
    if _are_expressions(labels):
        audit["probably_no_face"] = find_no_faces(
            survey.signatures[survey.distinct], survey.contrast[survey.distinct], survey.groups, where
        )
    audit["votes"] = None if votes is None else score_votes(read_votes(votes), held, labels, reading.num_rows)
    audit["samples"] = _draw_samples(survey, where, targets)
    return audit


def list_places(parts: Sequence[Split], labels: tuple[str, ...]) -> list[dict[str, str]]:
    """Return what names each image of the parts, one after the other: {"split", "id", "label"}."""
    return [
        {"split": part.name, "id": str(name), "label": labels[target]}
        for part in parts
        for name, target in zip(part.ids, part.targets, strict=True)
    ]


def number_groups(survey: Survey, where: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Return int64 [N], the survey's groups numbered from 0 by their first image in the order of split and id.

    The numbers do not change with the order of the rows within a part.
    """
    order = sorted(range(len(where)), key=lambda row: (survey.part_of[row], where[row]["id"]))
    names, first, dense = np.unique(survey.groups[order], return_index=True, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(first)] = np.arange(len(names))
    groups = np.empty(len(where), np.int64)
    groups[order] = rank[dense]
    return groups


def _describe_part(part: Split | StreamedSplit, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the counts of a part; imbalance is the largest class over the smallest that has images."""
    if not isinstance(part, Split):
        return {"num_images": len(part)}
    counts = np.bincount(part.targets, minlength=len(labels)).tolist()
    present = [count for count in counts if count]
    return {
        "num_images": len(part),
        "classes": dict(zip(labels, counts, strict=True)),
        "imbalance": round(max(present) / min(present), 2) if present else None,
    }


def _count_groups(survey: Survey, targets: np.ndarray) -> dict[str, Any]:
    exact = _count_kind(survey.distinct, targets, survey.part_of)
    near = _count_kind(survey.groups, targets, survey.part_of)
    return {
        "distinct_images": len(survey.brightness),
        "duplicate_groups": exact["groups"],
        "conflicting_groups": exact["conflicting"],
        "near_groups": near["groups"],
        "near_conflicting_groups": near["conflicting"],
        "largest_group": near["largest"],
        "groups_across_splits": {"exact": exact["across"], "near": near["across"]},
    }


def _count_kind(groups: np.ndarray, targets: np.ndarray, part_of: np.ndarray) -> dict[str, int]:
    """Return how many groups have several images, several labels, and stand in several parts."""
    sizes = np.unique(groups, return_counts=True)[1]
    return {
        "groups": int(np.sum(sizes > 1)),
        "conflicting": len(_find_groups_with_several(groups, targets)),
        "across": len(_find_groups_with_several(groups, part_of)),
        "largest": int(sizes.max()),
    }


def _find_groups_with_several(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return int64 [G], the groups whose members have more than one value."""
    pairs = np.unique(np.stack([groups, values], axis=1), axis=0)
    numbers, counts = np.unique(pairs[:, 0], return_counts=True)
    return numbers[counts > 1]


def _describe_flat(survey: Survey, where: list[dict[str, str]]) -> dict[str, Any]:
    constant, contrast = survey.constant[survey.distinct], survey.contrast[survey.distinct]
    flat = np.flatnonzero(contrast < FLAT_STD)
    listed = flat[np.argsort(contrast[flat], kind="stable")][:MOST_LISTED]
    return {
        "constant_images": int(constant.sum()),
        "near_constant_images": len(flat),
        "flat": [{**where[row], "std": round(float(contrast[row]), 2)} for row in listed],
    }


def _count_leaks(survey: Survey, parts: list[Split]) -> dict[str, dict[str, int]]:
    leaks = {}
    for left, right in combinations(range(len(parts)), 2):
        leaks[f"{parts[left].name}->{parts[right].name}"] = survey.find_duplicates(left, right).count()
    return leaks


def _describe_outliers(survey: Survey, where: list[dict[str, str]], sizes: Mapping[str, tuple[int, int]]) -> dict:
    found = {
        "rule": RULE,
        "brightness": find_outliers("brightness", survey.brightness[survey.distinct], where),
        "contrast": find_outliers("contrast", survey.contrast[survey.distinct], where),
        "size": None,
    }
    sized = [place for place in where if place["id"] in sizes]
    if sized:
        shorter = np.array([min(sizes[place["id"]]) for place in sized], float)
        found["size"] = find_outliers("size", shorter, sized)
    return found


def _are_expressions(labels: tuple[str, ...]) -> bool:
    known = {spelling for spellings in SPELLINGS.values() for spelling in spellings}
    return 2 * sum(label.casefold() in known for label in labels) >= max(2, len(labels))


def _draw_samples(survey: Survey, where: list[dict[str, str]], targets: np.ndarray) -> dict[str, Any]:
    """Return some pairs of each kind, of different parts where there are any, and groups of copies with different labels."""
    members: dict[int, list[int]] = {}
    by_image = np.argsort(survey.distinct, kind="stable")
    bounds = np.searchsorted(survey.distinct[by_image], np.arange(len(survey.brightness) + 1))

    def list_members(image: int) -> list[int]:
        if image not in members:
            members[image] = by_image[bounds[image] : bounds[image + 1]].tolist()
        return members[image]

    def describe(rows: Sequence[int]) -> list[dict[str, str]]:
        return [where[row] for row in rows]

    def choose(pairs: list[tuple[int, int]]) -> list[list[dict[str, str]]]:
        order = sorted(pairs, key=lambda p: (survey.part_of[p[0]] == survey.part_of[p[1]], p))
        used: set[int] = set()
        chosen = []
        for first, second in order:  # one pair of each group: ten frames of one video would show one face
            if survey.groups[first] not in used and len(chosen) < _MOST_SAMPLES:
                used.add(int(survey.groups[first]))
                chosen.append(describe((first, second)))
        return chosen

    counts = np.diff(bounds)
    copies = [
        (rows[0], rows[-1]) for rows in map(list_members, np.flatnonzero(counts > 1)) if not _is_flat(survey, rows)
    ]
    apart = {
        kind: [tuple(sorted((list_members(a)[0], list_members(b)[-1]))) for a, b in getattr(survey, kind).tolist()]
        for kind in ("near", "flipped")
    }
    contradicting = _find_groups_with_several(survey.distinct, targets)
    conflicting = sorted(rows for rows in map(list_members, contradicting) if not _is_flat(survey, rows))
    return {
        "exact": choose(copies),
        "near": choose(apart["near"]),
        "flipped": choose(apart["flipped"]),
        "conflicting": [describe(rows[:6]) for rows in conflicting[:_MOST_SAMPLES]],
    }


def _is_flat(survey: Survey, rows: Sequence[int]) -> bool:
    return bool(survey.contrast[survey.distinct[rows[0]]] < FLAT_STD)


def _compute_fingerprint(bundle: DataBundle, votes: str | Path | None) -> str:
    """Return the sha256 (hex) of all that the audit depends on."""
    digest = hashlib.sha256(repr((_CACHE_VERSION, bundle.labels, bundle.reading)).encode())
    for part in (bundle.train, bundle.validation, bundle.test):
        if part is None:
            digest.update(b"none")
            continue
        own = compute_fingerprint(part) if isinstance(part, Split) else str(len(part))
        digest.update(f"{part.name}:{own}".encode())
    if votes is not None and Path(votes).expanduser().is_file():
        digest.update(Path(votes).name.encode() + Path(votes).expanduser().read_bytes())
    return digest.hexdigest()


def _read_cached(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return an audit of the cache; None where there is none, or it is damaged."""
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: made anew
        return None
    return audit if isinstance(audit, dict) and audit.get("fingerprint") == fingerprint else None
