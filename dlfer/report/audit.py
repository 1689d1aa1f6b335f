"""The audit of a data set in sentences, and as a page with the images that it is about."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.report.duplicates import list_kinds
from dlfer.report.page import format_count, format_interval, format_percent, render_page

MOST_SHOWN = 24
_SIDE = 96


def describe_audit(audit: Mapping[str, Any]) -> list[str]:
    """Return what an audit found, in plain sentences with numbers, the worst first.

    Args:
        audit: as `dlfer.data.audit` writes it, or as `read_audit` reads one of an earlier version.
    """
    lines = [_describe_size(audit)]
    unreadable = audit.get("unreadable") or {"n": 0}
    if unreadable["n"]:
        what = "row or file" if unreadable["n"] == 1 else "rows or files"
        lines.append(
            f"{format_count(unreadable['n'])} {what} could not be read; the first: {unreadable['examples'][0]}"
        )
    if "distinct_images" not in audit:
        return [*lines, "The images are streamed, so they were not looked into."]
    lines += [_describe_leak(pair, leak, audit) for pair, leak in audit["leaks"].items()]
    lines += _describe_duplicates(audit)
    lines += _describe_classes(audit)
    lines += _describe_unusual(audit)
    return lines + _describe_votes(audit.get("votes"))


def write_audit_page(path: Path, audit: Mapping[str, Any], images: Mapping[tuple[str, str], np.ndarray]) -> Path:
    """Write the audit as one self-contained page, with images of the data in it; return its path.

    Args:
        path: the file.
        audit: as `dlfer.experiment.audit.inspect_data` returns it.
        images: uint8 [H, W, C] by (split, id), of those that `list_shown` names.
    """
    pictures = {place: _encode(pixels) for place, pixels in images.items()}
    votes = audit.get("votes")
    context = {
        "name": Path(audit["source"]).name or audit["source"],
        "audit": audit,
        "lines": describe_audit(audit),
        "classes": _list_classes(audit),
        "leaks": _list_leaks(audit),
        "groups": _list_groups(audit),
        "pairs": [group for group in _list_pairs(audit) if group["pairs"]],
        "conflicting": (audit.get("samples") or {}).get("conflicting", []),
        "votes": votes,
        "contested": votes["contested"][:MOST_SHOWN] if votes else [],
        "no_face": ((audit.get("probably_no_face") or {}).get("images") or [])[:MOST_SHOWN],
        "outliers": _list_outliers(audit),
        "pictures": pictures,
    }
    return render_page("audit.html.j2", Path(path), context)


def list_shown(audit: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (split, id) of each image that the page shows."""
    for groups in (audit.get("samples") or {}).values():
        for group in groups:
            yield from ((image["split"], image["id"]) for image in group)
    for key in ("votes", "probably_no_face"):
        found = audit.get(key) or {}
        for image in (found.get("contested") or found.get("images") or [])[:MOST_SHOWN]:
            yield image["split"], image["id"]
    for kind in _list_outliers(audit):
        yield from ((image["split"], image["id"]) for image in kind["images"])


def _describe_size(audit: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {format_count(part['num_images'])}" for name, part in audit["splits"].items())
    images = "1 image" if audit["num_images"] == 1 else f"{format_count(audit['num_images'])} images"
    labels = "1 label" if len(audit["labels"]) == 1 else f"{len(audit['labels'])} labels"
    return f"{images} ({parts}) with {labels}."


def _describe_leak(pair: str, leak: Mapping[str, int], audit: Mapping[str, Any]) -> str:
    left, _, right = pair.partition("->")
    if not leak["any"]:
        return f"No image of {right} has a duplicate in {left}."
    total = audit["splits"][right]["num_images"]
    return (
        f"{format_count(leak['any'])} of {format_count(total)} images of {right} ({format_percent(leak['any'] / total)}) "
        f"have a duplicate in {left}{list_kinds(leak)}."
    )


def _describe_duplicates(audit: Mapping[str, Any]) -> list[str]:
    if audit["duplicate_groups"]:
        lines = [
            f"{format_count(audit['distinct_images'])} images are distinct; {format_count(audit['duplicate_groups'])} "
            f"of them occur more than once, {format_count(audit['conflicting_groups'])} under different labels."
        ]
    else:
        lines = ["No image occurs more than once."]
    if audit.get("near_groups"):
        lines.append(
            f"Chains of exact, near, flipped and augmented duplicates make {format_count(audit['near_groups'])} groups, "
            f"the largest of {format_count(audit['largest_group'])} images; "
            f"{format_count(audit['near_conflicting_groups'])} of the groups have different labels in them."
        )
    return lines


def _describe_classes(audit: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, part in audit["splits"].items():
        classes = part.get("classes") or {}
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


def _describe_unusual(audit: Mapping[str, Any]) -> list[str]:
    lines, constant = [], audit["constant_images"]
    nearly = audit.get("near_constant_images", constant) - constant
    if constant or nearly:
        lines.append(
            f"{format_count(constant)} {'image is' if constant == 1 else 'images are'} of one colour, "
            f"{format_count(nearly)} more nearly so (standard deviation below 5 grey levels)."
        )
    outliers = audit.get("outliers") or {}
    found = [
        f"{format_count(outliers[kind]['n'])} in {kind}"
        for kind in ("brightness", "contrast", "size")
        if outliers.get(kind) and outliers[kind]["n"]
    ]
    if found:
        lines.append(f"Outliers: {', '.join(found)}.")
    no_face = audit.get("probably_no_face")
    if no_face and no_face["n"]:
        what = "1 image is" if no_face["n"] == 1 else f"{format_count(no_face['n'])} images are"
        lines.append(f"{what} unlike the other faces, so perhaps no face at all: look through them.")
    return lines


def _describe_votes(votes: Mapping[str, Any] | None) -> list[str]:
    if not votes or not votes["n"]:
        return []
    agreement, ceiling = votes["agreement"], votes["ceiling"]
    return [
        f"The label is what most of the votes in {votes['file']} say for {format_percent(agreement['value'])} of "
        f"{format_count(agreement['n'])} images ({format_interval(agreement)}).",
        f"One annotator agrees with the plurality of the others on {format_percent(ceiling['value'])} "
        f"({format_interval(ceiling)}): that is the ceiling that one annotator reaches.",
    ]


def _list_classes(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of class counts: a row per label, a column per part, with shares for the bars."""
    parts = {name: part["classes"] for name, part in audit["splits"].items() if "classes" in part}
    rows = []
    for label in audit["labels"] if parts else ():
        counts = [classes[label] for classes in parts.values()]
        totals = [sum(classes.values()) for classes in parts.values()]
        cells = [{"n": n, "share": n / total if total else 0} for n, total in zip(counts, totals, strict=True)]
        rows.append({"label": label, "cells": cells})
    widest = max((cell["share"] for row in rows for cell in row["cells"]), default=1) or 1
    return {"parts": list(parts), "rows": rows, "widest": widest}


def _list_leaks(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for pair, leak in (audit.get("leaks") or {}).items():
        left, _, right = pair.partition("->")
        rows.append({"left": left, "right": right, "n": audit["splits"][right]["num_images"], **leak})
    return rows


def _list_groups(audit: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    """Return (kind, groups, with different labels, across splits) of exact duplicates and of all duplicates."""
    if "near_groups" not in audit:
        return []
    across = audit["groups_across_splits"]
    return [
        ("exact duplicates", audit["duplicate_groups"], audit["conflicting_groups"], across["exact"]),
        ("all duplicates", audit["near_groups"], audit["near_conflicting_groups"], across["near"]),
    ]


def _list_pairs(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    samples = audit.get("samples") or {}
    titles = {"exact": "Exact duplicates", "near": "Near duplicates", "flipped": "Horizontally flipped duplicates"}
    return [{"title": title, "pairs": samples.get(kind) or []} for kind, title in titles.items()]


def _list_outliers(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = audit.get("outliers") or {}
    units = {"brightness": "grey levels", "contrast": "grey levels", "size": "pixels"}
    flat = {(image["split"], image["id"]) for image in audit.get("flat") or []}  # a row of black squares shows nothing
    return [
        {
            "kind": kind,
            "unit": unit,
            **found[kind],
            "images": [image for image in found[kind]["images"] if (image["split"], image["id"]) not in flat][:12],
        }
        for kind, unit in units.items()
        if found.get(kind) and found[kind]["n"]
    ]


def _encode(pixels: np.ndarray) -> str:
    """Return uint8 [H, W, C] as a data URI of a PNG of at most 96 pixels a side."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
