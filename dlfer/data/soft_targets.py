"""What is trained towards where several people have labelled an image: the shares of their votes."""

from __future__ import annotations

import dataclasses

import numpy as np

from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import split_ids
from dlfer.data.votes import Votes, align_votes, find_column


def add_soft_targets(bundle: DataBundle, votes: Votes, *, share: float) -> DataBundle:
    """Return the bundle with soft targets in train, and a note that says so.

    A target is the share of each label among the votes for any of the labels, mixed with the label itself. Votes for
    something else (contempt, unknown, no face) do not count; an image without any other, and an augmented copy of
    one that is not in train, keep their label. Source: Barsoum et al., ICMI 2016 (probabilistic label drawing and
    its cross-entropy form).

    Args:
        bundle: in-memory splits, as the protocol made them.
        votes: as `read_votes` returns them.
        share: of the votes in the target, in 0..1.

    Raises:
        DataError: the votes do not belong to the images, or a label has no column among them.
    """
    train = bundle.train
    columns = [find_column(votes, label) for label in bundle.labels]
    parts = [part for part in (bundle.train, bundle.validation, bundle.test) if part is not None]
    counts = _take_from_sources(align_votes(votes, parts, bundle.reading.num_rows)[0], train)[:, columns]
    total = counts.sum(axis=1)
    voted = (counts >= 0).all(axis=1) & (total > 0)
    soft = np.eye(len(bundle.labels))[train.targets]
    soft[voted] = share * counts[voted] / total[voted, None] + (1 - share) * soft[voted]
    note = (
        f"train: {int(voted.sum()):,} of {len(train):,} targets are the shares of the votes in {votes.path.name}"
        f"{'' if share == 1 else f' ({share:g} of them, the label for the rest)'}; these are labels beyond the data's own."
    )
    return dataclasses.replace(
        bundle,
        train=dataclasses.replace(train, soft_targets=soft.astype(np.float32)),
        notes=(*bundle.notes, note),
    )


def _take_from_sources(counts: np.ndarray, split: Split) -> np.ndarray:
    """Return the votes int [N, V] with those of the source in the rows of its augmented copies."""
    sources, copied = split_ids(split.ids)
    places = {name: row for row, name in enumerate(split.ids.tolist())}
    rows = np.array([places.get(name, row) for row, name in enumerate(sources.tolist())], np.int64)
    return np.where(copied[:, None], counts[rows], counts)
