"""What a data set hides: copies within it, copies across its parts, labels that contradict, empty images."""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from dlfer.data.bundle import DataBundle, Split

SIGNATURE_SIDE = 16
NEAR_CORRELATION = 0.98
NEAR_STD = 8.0
_BLOCK = 2048


def group_copies(images: np.ndarray) -> np.ndarray:
    """Return int64 [N], a number per image that is the same for images that are equal byte for byte.

    Args:
        images: uint8 [N, H, W, C].
    """
    return np.unique(_hash_images(images), return_inverse=True)[1].astype(np.int64)


def find_twins(images: np.ndarray, reference_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell which images have a copy among the reference images.

    Exact is equal byte for byte. Near is a correlation of at least 0.98 between the two images in
    grey, reduced to 16x16 by block means, where both have a standard deviation of at least 8 (flat
    images all look alike). Mirrored is the same after a left-right flip of one.

    Args:
        images: uint8 [N, H, W, C].
        reference_images: uint8 [M, H, W, C]. Of another size: no copy is exact, near ones are not sought.

    Returns:
        exact: bool [N].
        near_or_mirrored: bool [N], exact copies included.
    """
    exact = np.isin(_hash_images(images), _hash_images(reference_images))
    near = exact.copy()
    if images.shape[1:3] != reference_images.shape[1:3] or not len(images) or not len(reference_images):
        return exact, near
    signatures, textured = compute_signatures(images)
    references, reference_textured = compute_signatures(reference_images)
    references = references[reference_textured]
    side = SIGNATURE_SIDE
    mirrored = references.reshape(-1, side, side)[:, :, ::-1].reshape(-1, side * side)
    rows = np.flatnonzero(textured & ~near)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        highest = np.full(len(block), -1.0, np.float32)
        for pool in (references, mirrored):
            for first in range(0, len(pool), 8 * _BLOCK):
                correlations = signatures[block] @ pool[first : first + 8 * _BLOCK].T
                np.maximum(highest, correlations.max(axis=1), out=highest)
        near[block] = highest >= NEAR_CORRELATION
    return exact, near


def compute_signatures(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what near copies are found by.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        signatures: float32 [N, 256], the image in grey at 16x16, mean removed, of unit norm (zero if flat).
        textured: bool [N], whether its standard deviation is at least 8.
    """
    signatures = np.zeros((len(images), SIGNATURE_SIDE**2), np.float32)
    textured = np.zeros(len(images), bool)
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        grey = _to_grey(images[rows])
        textured[rows] = grey.std(axis=(1, 2)) >= NEAR_STD
        small = _reduce(grey).reshape(len(grey), -1)
        small -= small.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(small, axis=1, keepdims=True)
        signatures[rows] = np.divide(small, norms, out=np.zeros_like(small), where=norms > 0)
    return signatures, textured


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
    hashes = np.concatenate([_hash_images(part.images) for part in held])
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


def _hash_images(images: np.ndarray) -> np.ndarray:
    """Return bytes [N], a 128-bit digest of each image's shape and pixels."""
    shape = repr(images.shape[1:]).encode()
    digests = [hashlib.blake2b(shape + image.tobytes(), digest_size=16).digest() for image in images]
    return np.array([digest.hex() for digest in digests], dtype="S32")


def _to_grey(images: np.ndarray) -> np.ndarray:
    """Return float32 [N, H, W], the luma of ITU-R BT.601 for RGB."""
    if images.shape[-1] == 1:
        return images[..., 0].astype(np.float32)
    return images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _reduce(grey: np.ndarray) -> np.ndarray:
    """Return float32 [N, 16, 16], area means of `grey` (float32 [N, H, W])."""
    side, (count, height, width) = SIGNATURE_SIDE, grey.shape
    if height % side == 0 and width % side == 0:
        return grey.reshape(count, side, height // side, side, width // side).mean(axis=(2, 4))
    resized = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in grey]
    return np.stack(resized)


def _count_constant(images: np.ndarray) -> int:
    flat = images.reshape(len(images), -1)
    return int(np.sum(flat.min(axis=1) == flat.max(axis=1)))
