"""The audit of a data set as sentences, and as an HTML page with the images concerned."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlfer.report.headline import list_kinds
from dlfer.report.page import format_count, format_interval, format_percent, render_page
from dlfer.runs.audit_record import AuditRecord, ListedImage, OutlierImage, OutlierSummary, VoteSummary
from dlfer.runs.records import DuplicateCounts
from dlfer.runs.text import count_noun

MAX_SHOWN = 24
"""Maximum number of contested images, and of images that may show no face, on the page."""
_MAX_OUTLIERS = 12
_SIDE = 96


class ClassCount(NamedTuple):
    """Number of images of a class in one split, and its share in 0..1."""

    n: int
    share: float


class ClassTable(NamedTuple):
    """The table of class counts: `rows` is label -> its count in each split; `widest` is the largest share."""

    splits: list[str]
    rows: dict[str, list[ClassCount]]
    widest: float


class Leak(NamedTuple):
    """Images of split `right` that have a duplicate in split `left`; `num_images` is the size of `right`."""

    left: str
    right: str
    num_images: int
    counts: DuplicateCounts


class GroupRow(NamedTuple):
    """Numbers of duplicate groups of one kind: all, those with different labels, and those that span splits."""

    kind: str
    groups: int
    conflicting: int
    across: int


class OutlierRow(NamedTuple):
    """Outliers of one kind, the unit of their values, and the images that the page shows."""

    kind: str
    unit: str
    found: OutlierSummary
    images: list[OutlierImage]


def describe_audit(audit: AuditRecord) -> list[str]:
    """Return the findings of an audit as sentences: size, leaks, duplicates, classes, unusual images, votes."""
    lines = [_describe_size(audit), *(audit.reading.describe() if audit.reading else [])]
    if audit.is_streamed:
        return [*lines, "The images are streamed, so their contents were not audited."]
    lines += [_describe_leak(leak) for leak in _list_leaks(audit)]
    lines += _describe_duplicates(audit)
    lines += _describe_classes(audit)
    lines += _describe_unusual(audit)
    return lines + _describe_votes(audit.votes)


def write_audit_page(path: Path, audit: AuditRecord, images: Mapping[tuple[str, str], np.ndarray]) -> Path:
    """Write the audit as a self-contained page with images of the data; return its path.

    Args:
        path: the file.
        audit: from `dlfer.experiment.audit.inspect_data`.
        images: (split, id) -> uint8 [H, W, C], for the images that `list_shown` yields.
    """
    titles = {
        "Exact duplicates": audit.samples.exact,
        "Near duplicates": audit.samples.near,
        "Horizontally flipped duplicates": audit.samples.flipped,
    }
    context = {
        "name": Path(audit.source).name or audit.source,
        "audit": audit,
        "lines": describe_audit(audit),
        "classes": _count_classes(audit),
        "leaks": _list_leaks(audit),
        "groups": _list_groups(audit),
        "pairs": {title: pairs for title, pairs in titles.items() if pairs},
        "contested": _list_contested(audit),
        "no_face": _list_no_faces(audit),
        "outliers": _list_outliers(audit),
        "pictures": {place: _encode(pixels) for place, pixels in images.items()},
    }
    return render_page("audit.html.j2", Path(path), context)


def list_shown(audit: AuditRecord) -> Iterator[tuple[str, str]]:
    """Yield (split, id) of each image that the page shows."""
    groups: list[list[ListedImage]] = [*audit.samples.iterate_groups(), _list_contested(audit), _list_no_faces(audit)]
    for group in (*groups, *(row.images for row in _list_outliers(audit))):
        yield from ((image.split, image.id) for image in group)


def _describe_size(audit: AuditRecord) -> str:
    splits = ", ".join(f"{name} {format_count(split.num_images)}" for name, split in audit.splits.items())
    return f"{count_noun(audit.num_images, 'image')} ({splits}) with {count_noun(len(audit.labels), 'label')}."


def _describe_leak(leak: Leak) -> str:
    if not leak.counts.any:
        return f"No image of {leak.right} has a duplicate in {leak.left}."
    return (
        f"{format_count(leak.counts.any)} of {format_count(leak.num_images)} images of {leak.right} "
        f"({format_percent(leak.counts.any / leak.num_images)}) have a duplicate in {leak.left}{list_kinds(leak.counts)}."
    )


def _describe_duplicates(audit: AuditRecord) -> list[str]:
    if audit.duplicate_groups:
        lines = [
            f"Distinct images: {format_count(audit.distinct_images)}; of these, {format_count(audit.duplicate_groups)} "
            f"{'occurs' if audit.duplicate_groups == 1 else 'occur'} more than once, "
            f"{format_count(audit.conflicting_groups)} under different labels."
        ]
    else:
        lines = ["No image occurs more than once."]
    if audit.near_groups:
        lines.append(
            f"Chains of exact, near, flipped and augmented duplicates make {count_noun(audit.near_groups, 'group')}, "
            f"the largest of {count_noun(audit.largest_group, 'image')}; "
            f"groups with different labels in them: {format_count(audit.near_conflicting_groups)}."
        )
    return lines


def _describe_classes(audit: AuditRecord) -> list[str]:
    lines = []
    for name, split in audit.splits.items():
        classes = split.classes or {}
        present = {label: count for label, count in classes.items() if count}
        empty = [label for label in classes if label not in present]
        if empty:
            lines.append(f"{name} has no image of {', '.join(empty[:8])}{' and others' if len(empty) > 8 else ''}.")
        if len(present) > 1:
            most, least = max(present, key=present.get), min(present, key=present.get)
            ratio = present[most] / present[least]
            if ratio >= 1.5:
                lines.append(
                    f"The largest class of {name} ({most}, {format_count(present[most])}) is {ratio:.1f} times the "
                    f"smallest ({least}, {format_count(present[least])})."
                )
    return lines


def _describe_unusual(audit: AuditRecord) -> list[str]:
    lines, constant = [], audit.constant_images
    nearly = 0 if audit.near_constant_images is None else audit.near_constant_images - constant
    if constant or nearly:
        lines.append(
            f"{format_count(constant)} {'image is' if constant == 1 else 'images are'} of one colour, "
            f"{format_count(nearly)} more are nearly so (standard deviation below 5 grey levels)."
        )
    outliers = [f"{format_count(row.found.n)} in {row.kind}" for row in _list_outliers(audit)]
    if outliers:
        lines.append(f"Outliers: {', '.join(outliers)}.")
    no_face = audit.probably_no_face
    if no_face and no_face.n:
        lines.append(
            f"{count_noun(no_face.n, 'image')} {'is' if no_face.n == 1 else 'are'} unlike the other faces and may show no face: check by eye."
        )
    return lines


def _describe_votes(votes: VoteSummary | None) -> list[str]:
    if votes is None:
        return []
    if not votes.n:
        return [f"{votes.file} has no vote for any of these images: all counts are 0."]
    agreement, ceiling = votes.agreement, votes.ceiling
    return [
        f"The label has the most votes in {votes.file} for {format_percent(agreement.value)} of "
        f"{format_count(agreement.n)} images ({format_interval(agreement)}).",
        f"One annotator agrees with the plurality of the others on {format_percent(ceiling.value)} "
        f"({format_interval(ceiling)}).",
    ]


def _count_classes(audit: AuditRecord) -> ClassTable:
    """Return the class counts of all splits for which they are known."""
    splits = {name: split.classes for name, split in audit.splits.items() if split.classes is not None}
    totals = [sum(classes.values()) for classes in splits.values()]
    rows = {
        label: [
            ClassCount(classes[label], classes[label] / total if total else 0)
            for classes, total in zip(splits.values(), totals, strict=True)
        ]
        for label in (audit.labels if splits else ())
    }
    widest = max((count.share for counts in rows.values() for count in counts), default=1) or 1
    return ClassTable(list(splits), rows, widest)


def _list_leaks(audit: AuditRecord) -> list[Leak]:
    leaks = []
    for pair, counts in audit.leaks.items():
        left, _, right = pair.partition("->")
        leaks.append(Leak(left, right, audit.splits[right].num_images, counts))
    return leaks


def _list_groups(audit: AuditRecord) -> list[GroupRow]:
    across = audit.groups_across_splits
    if across is None:
        return []
    return [
        GroupRow("exact duplicates", audit.duplicate_groups, audit.conflicting_groups, across.exact),
        GroupRow("all duplicates", audit.near_groups, audit.near_conflicting_groups, across.near),
    ]


def _list_contested(audit: AuditRecord) -> list[ListedImage]:
    return [] if audit.votes is None else audit.votes.contested[:MAX_SHOWN]


def _list_no_faces(audit: AuditRecord) -> list[ListedImage]:
    return [] if audit.probably_no_face is None else audit.probably_no_face.images[:MAX_SHOWN]


def _list_outliers(audit: AuditRecord) -> list[OutlierRow]:
    """Return the kinds that have outliers, with examples other than flat images, which all look alike."""
    outliers = audit.outliers
    if outliers is None:
        return []
    flat = {(image.split, image.id) for image in audit.flat}
    kinds = (
        ("brightness", "grey levels", outliers.brightness),
        ("contrast", "grey levels", outliers.contrast),
        ("size", "pixels", outliers.size),
    )
    rows = []
    for kind, unit, found in kinds:
        if found is not None and found.n:
            shown = [image for image in found.images if (image.split, image.id) not in flat]
            rows.append(OutlierRow(kind, unit, found, shown[:_MAX_OUTLIERS]))
    return rows


def _encode(pixels: np.ndarray) -> str:
    """Return uint8 [H, W, C] as a data URI of a PNG of at most 96 pixels a side."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
