"""What a data set hides: copies within it, copies across its parts, labels that contradict, empty images."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from dlfer.data.bundle import DataBundle, Split
from dlfer.data.twins import find_twins, group_copies, hash_images

__all__ = ["audit_bundle", "find_twins", "group_copies"]


def audit_bundle(bundle: DataBundle) -> dict[str, Any]:
    """Return what the data holds and what its parts share, ready for audit.json.

    Streamed parts are counted and not looked into.

    Returns:
        num_images, labels, splits {name: {num_images, classes {label: count}}}, distinct_images,
        duplicate_groups (images that occur more than once), conflicting_groups (those with
        different labels), constant_images (all pixels equal), and leaks {"Training->PublicTest":
        {exact, near_or_mirrored}}, the images of the right part that have a copy in the left.
    """
    parts = [part for part in (bundle.train, bundle.validation, bundle.test) if part is not None]
    held = [part for part in parts if isinstance(part, Split)]
    audit: dict[str, Any] = {
        "num_images": sum(len(part) for part in parts),
        "labels": list(bundle.labels),
        "splits": {part.name: {"num_images": len(part)} for part in parts},
    }
    if not held:
        return audit
    for part in held:
        counts = np.bincount(part.targets, minlength=len(bundle.labels)).tolist()
        audit["splits"][part.name]["classes"] = dict(zip(bundle.labels, counts, strict=True))
    hashes = np.concatenate([hash_images(part.images) for part in held])
    targets = np.concatenate([part.targets for part in held])
    _, groups, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([groups, targets], axis=1), axis=0)
    audit["distinct_images"] = len(sizes)
    audit["duplicate_groups"] = int(np.sum(sizes > 1))
    audit["conflicting_groups"] = int(np.sum(np.bincount(pairs[:, 0]) > 1))
    audit["constant_images"] = sum(_count_constant(part.images) for part in held)
    audit["leaks"] = {}
    for left, right in combinations(held, 2):
        exact, near = find_twins(right.images, left.images)
        leak = {"exact": int(exact.sum()), "near_or_mirrored": int(near.sum())}
        audit["leaks"][f"{left.name}->{right.name}"] = leak
    return audit


def _count_constant(images: np.ndarray) -> int:
    flat = images.reshape(len(images), -1)
    return int(np.sum(flat.min(axis=1) == flat.max(axis=1)))
