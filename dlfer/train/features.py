"""Features of images, computed once: `<runs folder>/.cache/features/<digest>.npy`.

While they are computed they stand in `<digest>.partial.npy`, from which a run that was interrupted, or any other,
goes on; a file lock keeps two processes from computing the same ones.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from dlfer.data.bundle import Split, compute_fingerprint
from dlfer.errors import ModelError, TrainingStopped
from dlfer.model.stage_network import TransferNetwork
from dlfer.model.transfer import compute_weights_digest
from dlfer.model.trees import LevelFeatures
from dlfer.runs.files import read_json, write_atomically
from dlfer.train.control import StopControl, hold_lock
from dlfer.train.watch import TrainingListener

SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Extraction:
    """How features are computed.

    Attributes:
        features: from images to features.
        network: the one behind them, whose weights determine them.
        batch_size: images at a time.
        cache: `<runs folder>/.cache/features`; None keeps them in memory alone.
        control: asked after each batch whether to stop.
        listener: told about the progress.
    """

    features: LevelFeatures
    network: TransferNetwork
    batch_size: int
    cache: Path | None
    control: StopControl
    listener: TrainingListener


@dataclass(frozen=True)
class Features:
    """The features of a split.

    Attributes:
        values: float16 [N, F], in the order of the split; mapped from the cache's file where there is one.
        seconds: that it took to compute them, once.
        was_cached: whether they had been computed before.
    """

    values: np.ndarray
    seconds: float
    was_cached: bool


def extract_features(extraction: Extraction, split: Split, *, part: str) -> Features:
    """Return the features of a split, from the cache if they are there.

    Args:
        extraction: how.
        split: the images.
        part: "train" or "validation", for the messages.

    Raises:
        TrainingStopped: the control asked for it; with a cache, what is done stands there.
    """
    if extraction.cache is None:
        start = time.monotonic()
        values = np.empty((len(split), extraction.features.num_features), np.float16)
        _fill(extraction, split, values, part=part)
        return Features(values, time.monotonic() - start, was_cached=False)
    folder, digest = extraction.cache, compute_features_digest(extraction, split)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{digest}.npy"
    with hold_lock(folder / f"{digest}.lock", "features", extraction.control, extraction.listener):
        was_cached = final.exists()
        if was_cached:
            extraction.listener.say(f"features of {part}: taken from the cache, {final}")
        else:
            _compute_file(extraction, split, final, part=part)
    shape = (len(split), extraction.features.num_features)
    try:
        values = np.load(final, mmap_mode="r", allow_pickle=False)
        seconds = float(read_json(final.with_suffix(".json"))["seconds"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{final}: the cached features cannot be read ({error}); delete it, and its .json.") from error
    if values.shape != shape or values.dtype != np.float16:
        raise ModelError(f"{final}: found {values.dtype} {values.shape}, expected float16 {shape}; delete it.")
    return Features(values, seconds, was_cached)


def compute_features_digest(extraction: Extraction, split: Split) -> str:
    """Return 16 hex digits of what determines the features: weights, levels, input, images and their order."""
    face_input, features = extraction.network.face_input, extraction.features
    determines = {
        "weights": compute_weights_digest(extraction.network.backbone),
        "levels": [[level.name, level.size] for level in features.levels],
        "pooling": [type(layer).__name__ for layer in features.pooling],
        "input": face_input.get_config(),
        "backend": keras.backend.backend(),
        "images": compute_fingerprint(split),
        "order": hashlib.sha256("\n".join(split.ids.tolist()).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(determines, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _compute_file(extraction: Extraction, split: Split, final: Path, *, part: str) -> None:
    """Compute the features into a file under a temporary name, from where it stands, and rename it."""
    partial, record = final.with_suffix(".partial.npy"), final.with_suffix(".json")
    shape = (len(split), extraction.features.num_features)
    done, seconds = 0, 0.0
    if partial.exists() and record.exists():
        found = json.loads(record.read_text())
        # A batch has the same images wherever it was begun.
        if found["batch_size"] == extraction.batch_size:
            done, seconds = found["done"], found["seconds"]
    mode = "r+" if done else "w+"
    values = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=None if done else shape)
    start = time.monotonic()

    def save(count: int) -> None:
        values.flush()
        spent = seconds + time.monotonic() - start
        written = {"done": count, "seconds": spent, "batch_size": extraction.batch_size}
        write_atomically(record, json.dumps(written) + "\n")

    _fill(extraction, split, values, part=part, start=done, save=save)
    save(len(split))
    partial.rename(final)


def _fill(
    extraction: Extraction,
    split: Split,
    values: np.ndarray,
    *,
    part: str,
    start: int = 0,
    save: Callable[[int], None] | None = None,
) -> None:
    """Put the features of the images from `start` on into `values`; call `save` with the number done, now and then."""
    done, saved = start, time.monotonic()
    listener = extraction.listener
    try:
        for batch in extraction.features.iterate(split.images, batch_size=extraction.batch_size, start=start):
            values[done : done + len(batch)] = batch
            done += len(batch)
            listener.finish_part(f"features of {part}", done, len(split))
            reason = extraction.control.get_reason()
            if save is not None and (reason is not None or time.monotonic() - saved >= SAVE_SECONDS):
                save(done)
                saved = time.monotonic()
            if reason is not None and done < len(split):
                raise TrainingStopped(
                    f"features of {part} stopped by {reason} after {done:,} of {len(split):,} images"
                    + (", which are kept." if save is not None else "; without a cache they begin anew."),
                    reason=reason,
                )
    finally:
        listener.close()
