"""Which images train, select and judge: stratified draws and splits that depend on ids, not on row order."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from dlfer.config.schema import DataConfig
from dlfer.data.bundle import DataBundle, Split


def compute_ranks(ids: np.ndarray, seed: int) -> np.ndarray:
    """Return uint64 [N], a random number per id that depends on the id and the seed alone."""
    prefix = f"{seed}:".encode()
    digests = b"".join(hashlib.blake2b(prefix + str(name).encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8")


def draw_indices(targets: np.ndarray, ids: np.ndarray, num: int | None, *, seed: int) -> np.ndarray:
    """Return the rows (int64, ascending) of a stratified draw of `num` images; None takes all.

    Each class keeps its share (largest remainders), and at least one image if `num` allows it.
    The same ids are drawn whatever the order of the rows.
    """
    if num is None or num >= len(targets):
        return np.arange(len(targets))
    classes, counts = np.unique(targets, return_counts=True)
    quotas = _share_out(counts, num)
    order = np.lexsort((ids, compute_ranks(ids, seed)))
    sorted_targets = targets[order]
    rows = [order[sorted_targets == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(rows))


def draw_subset(split: Split, num: int | None, seed: int) -> Split:
    """Return a stratified draw of `num` images of `split` (all of them if it has no more, or num is None)."""
    if num is None or num >= len(split):
        return split
    return split.take(draw_indices(split.targets, split.ids, num, seed=seed))


def _share_out(counts: np.ndarray, num: int) -> np.ndarray:
    """Return how many of `num` go to each class: in proportion to its count, at least one where possible."""
    least = (counts > 0).astype(np.int64) if num >= len(counts) else np.zeros(len(counts), np.int64)
    exact = counts * (num / counts.sum())
    quotas = np.maximum(np.floor(exact).astype(np.int64), least)
    while quotas.sum() > num:  # the classes lifted to one image are paid for by those furthest above their share
        quotas[np.argmax(np.where(quotas > least, quotas - exact, -np.inf))] -= 1
    while quotas.sum() < num:
        quotas[np.argmax(np.where(quotas < counts, exact - quotas, -np.inf))] += 1
    return quotas


def apply_protocol(bundle: DataBundle, config: DataConfig, *, balance: str) -> DataBundle:
    """Return the official parts as they are."""
    return dataclasses.replace(bundle, selected_on=bundle.validation.name)
