"""The batches of one training epoch: class balance, order, augmentation parameters, targets.

All results depend only on (seed, epoch, step), so an epoch can be resumed in the middle.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dlfer.config.names import BALANCES
from dlfer.config.schema import StageConfig
from dlfer.data.augment import draw_augmentation, mix_targets
from dlfer.data.bundle import WHOLE, Share, Split, StreamedSplit
from dlfer.data.images import compute_side
from dlfer.errors import ProtocolError

if TYPE_CHECKING:
    import tensorflow as tf

ROTATION_DEGREES = 10.0
ZOOM = 0.2
SHIFT = 0.1
MIRROR = 0.5
"""Augmentation of the DLFER paper; points outside of the image take the nearest edge pixel."""

_NUM_PARAMETERS = 5


def balance_indices(targets: np.ndarray, how: str, *, seed: int, epoch: int) -> np.ndarray:
    """Return the rows (int64 [M], not shuffled) of a training split that are used in one epoch.

    Args:
        targets: int [N].
        how: none, class_weight: every row once. augment: rows are repeated until each class is as large
            as the largest, every row at least once; the rows repeated once more vary by epoch.
            undersample: as many rows of each class as the smallest has, the same in every epoch.
            sampler: N rows drawn with replacement in each epoch, with equal probability for each class.
        seed: determines the draw together with `epoch`.
        epoch: number of the epoch, from 0.

    Raises:
        ProtocolError: `how` is not a known balance.
    """
    if how not in BALANCES:
        raise ProtocolError(f"balance: found {how!r}, expected one of {', '.join(BALANCES)}.")
    if how in ("none", "class_weight") or not len(targets):
        return np.arange(len(targets))
    rng = np.random.default_rng((seed, 0 if how == "undersample" else epoch))
    rows = [np.flatnonzero(targets == label) for label in np.unique(targets)]
    sizes = [len(members) for members in rows]
    if how == "undersample":
        return np.sort(np.concatenate([rng.choice(members, min(sizes), replace=False) for members in rows]))
    if how == "augment":  # whole rounds, then a draw without repetition
        parts = []
        for members in rows:
            rounds, rest = divmod(max(sizes), len(members))
            parts += [np.tile(members, rounds), rng.choice(members, rest, replace=False)]
        return np.concatenate(parts)
    drawn = rng.integers(len(rows), size=len(targets))
    counts = np.bincount(drawn, minlength=len(rows))
    return np.concatenate([rng.choice(members, count) for members, count in zip(rows, counts, strict=True)])


def compute_class_weights(totals: np.ndarray) -> np.ndarray:
    """Return float32 [C], class weights inversely proportional to the classes' totals.

    The weights are N / (classes present * total), like scikit-learn's "balanced", so that their mean over all images
    is 1; a class without images has weight 0.

    Args:
        totals: [C], the number of images of each class, or the sum of its soft targets; their sum is N.
    """
    totals = np.asarray(totals, np.float64)
    present = totals > 0
    weights = np.zeros(len(totals))
    weights[present] = totals.sum() / (present.sum() * totals[present])
    return weights.astype(np.float32)


def draw_smallest(split: Split, *, seed: int) -> Split:
    """Draw as many images of each class as the smallest class has; the draw depends only on the seed and the ids."""
    counts = np.bincount(split.targets)
    ranks = np.array([_draw_uniforms(str(name), seed, purpose="smallest")[0] for name in split.ids])
    order = np.lexsort((split.ids, ranks))
    size = counts[counts > 0].min()
    rows = np.concatenate([order[split.targets[order] == label][:size] for label in np.flatnonzero(counts)])
    return split.take(np.sort(rows))


def add_copies(split: Split, *, seed: int) -> Split:
    """Return `split` with augmented copies added until each class is as large as the largest.

    A copy has the id "<source id>#<number>", with numbers from 1, and a random warp with the augmentation
    of the DLFER paper. The warp depends only on the seed and the copy's id; the choice of images that are
    copied once more than others depends only on the seed and the ids.
    """
    counts = np.bincount(split.targets)
    ranks = np.array([_draw_uniforms(str(name), seed, purpose="copies")[0] for name in split.ids])
    sources, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for label in np.flatnonzero(counts):
        members = np.flatnonzero(split.targets == label)
        members = members[np.lexsort((split.ids[members], ranks[members]))]
        extra = np.arange(counts.max() - len(members))
        sources.append(members[extra % len(members)])
        numbers.append(extra // len(members) + 1)
    rows, numbers = np.concatenate(sources), np.concatenate(numbers)
    ids = np.array([f"{split.ids[row]}#{number}" for row, number in zip(rows, numbers, strict=True)], dtype=str)
    parameters = np.array([_draw_uniforms(name, seed, purpose="warp") for name in ids]).reshape(-1, _NUM_PARAMETERS)
    copies = np.empty((len(rows), *split.images.shape[1:]), np.uint8)
    for start in range(0, len(rows), 256):
        block = slice(start, start + 256)
        copies[block] = compute_warp(split.images[rows[block]], parameters[block])
    return Split(
        split.name,
        np.concatenate([split.images, copies]),
        np.concatenate([split.targets, split.targets[rows]]),
        np.concatenate([split.ids, ids]),
    )


def compute_warp(images: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Rotate, zoom, shift and possibly flip each image, with bilinear interpolation; return uint8 of the same shape.

    Args:
        images: uint8 [N, H, W, C].
        uniforms: float [N, 5] in [0, 1): rotation, zoom, mirror, shift down, shift right. 0.5 is the
            middle of each range, so a row of 0.5 leaves its image unchanged.
    """
    count, height, width, _ = images.shape
    angle = np.deg2rad(ROTATION_DEGREES) * (2 * uniforms[:, 0] - 1)
    scale = 1 / (1 + ZOOM * (2 * uniforms[:, 1] - 1))
    flip = np.where(uniforms[:, 2] < MIRROR, -1.0, 1.0)
    down, right = (SHIFT * side * (2 * uniforms[:, 3 + i] - 1) for i, side in enumerate((height, width)))
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    grid_y, grid_x = np.mgrid[:height, :width].reshape(2, 1, -1).astype(np.float32)
    y, x = grid_y - centre_y - down[:, None], grid_x - centre_x - right[:, None]
    cos, sin = (scale * np.cos(angle))[:, None], (scale * np.sin(angle))[:, None]
    source_y = np.clip(cos * y - sin * x + centre_y, 0, height - 1).astype(np.float32)
    source_x = np.clip(flip[:, None] * (sin * y + cos * x) + centre_x, 0, width - 1).astype(np.float32)
    top, left = source_y.astype(np.int32), source_x.astype(np.int32)
    bottom, beside = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    weight_y, weight_x = (source_y - top)[..., None], (source_x - left)[..., None]
    flat = images.reshape(count, height * width, -1)
    image = np.arange(count)[:, None]
    upper = flat[image, top * width + left] * (1 - weight_x) + flat[image, top * width + beside] * weight_x
    lower = flat[image, bottom * width + left] * (1 - weight_x) + flat[image, bottom * width + beside] * weight_x
    return np.rint(upper * (1 - weight_y) + lower * weight_y).astype(np.uint8).reshape(images.shape)


def _draw_uniforms(name: str, seed: int, *, purpose: str) -> np.ndarray:
    """Return five pseudorandom numbers, float64 [5] in [0, 1), that depend only on the arguments, on every platform."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{name}".encode(), digest_size=8 * _NUM_PARAMETERS).digest()
    return (np.frombuffer(digest, "<u8") >> np.uint64(11)) / 2.0**53


Batch = tuple[dict[str, np.ndarray], np.ndarray]

# Separate random streams of a stage, so that a change in the use of one does not affect the other.
_ORDER, _AUGMENT = 1, 2


def disable_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the data set without tf.data's autotuning of parallelism and buffers, so that its iteration ends at once.

    The thread of the autotuning sleeps for twice as long each time (10 ms, 20 ms, ... up to 60 seconds), and in TensorFlow 2.21
    whoever ends the iteration waits until it wakes: an iteration takes 5.1, 10.2, 20.5, 41.0, 81.9, 141.9, 201.9, ... seconds,
    whichever comes next.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def count_steps(split: Split | StreamedSplit, config: StageConfig, share: Share = WHOLE) -> int:
    """Return the number of training steps of one epoch, which is the same on every host.

    An incomplete last batch is left out unless it is the only one. Of streamed images each host reads its own share
    and leaves out the incomplete last batch of that share.
    """
    if _is_streamed(split):
        return max(1, len(split.balance(config.balance)) // share.count // max(1, config.batch_size // share.count))
    return max(1, len(_epoch_indices(split, config, seed=0, epoch=0)) // config.batch_size)


def count_batch_images(split: Split | StreamedSplit, config: StageConfig) -> int:
    """Return the number of images in one training step, over all hosts and devices."""
    rows = split.balance(config.balance) if _is_streamed(split) else _epoch_indices(split, config, seed=0, epoch=0)
    return min(config.batch_size, len(rows))


def take_share(split: Split | StreamedSplit, share: Share) -> Split | StreamedSplit:
    """Return one host's share of the images of a split; `split` itself if there is only one host."""
    if share.count == 1:
        return split
    if _is_streamed(split):
        return split.shard(share.index, share.count)
    return split.take(np.arange(share.index, len(split), share.count))


def divide_rows(num_rows: int, num_parts: int) -> list[np.ndarray]:
    """Divide the rows of a batch into parts that keep each row together with its partner in mixup and cutmix.

    Row i is mixed with row num_rows - 1 - i, that is, with the reversed batch. A part contains rows from the front and
    their partners from the back, so that reversing the part pairs the same rows.

    Returns:
        The increasing row numbers, int [n], of each part. Sizes differ by at most two, and no part is empty if there
        are at least two rows per part.
    """
    fronts = np.array_split(np.arange((num_rows + 1) // 2), num_parts)
    return [np.union1d(front, num_rows - 1 - front) for front in fronts]


def iterate_epoch(
    split: Split | StreamedSplit,
    config: StageConfig,
    *,
    num_labels: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    share: Share = WHOLE,
) -> Iterator[Batch]:
    """Yield the batches of one epoch, from `start_step` on.

    Args:
        config: batch size, balance, augmentation, crop and image size of the stage.
        seed, epoch: determine the order and the augmentation.
        start_step: number of batches to skip at the beginning.
        share: the host whose rows are yielded; with several hosts B is smaller than the batch size.

    Yields:
        (inputs, targets): inputs is {"image": uint8 [B, H, W, channels]} together with the arrays of
        `draw_augmentation`; targets is float32 [B, C], rows sum to one.
    """
    is_streamed = _is_streamed(split)
    # With streaming each host draws only for its own images; the first host draws as if it were the only one.
    own = [share.index] if is_streamed and share.index else []
    if is_streamed:
        batches = _stream(split, config, seed, epoch, start_step=start_step, share=share)
    else:
        batches = _slice(split, config, seed=seed, epoch=epoch, start_step=start_step)
    for step, (images, targets, soft) in enumerate(batches, start=start_step):
        rng = np.random.default_rng([seed, _AUGMENT, epoch, step, *own])
        drawn = draw_augmentation(
            config.augment,
            len(images),
            image_size=config.image_size,
            rng=rng,
            crop=config.crop,
            native=compute_side(*images.shape[1:3], config.data.aspect),
        )
        wanted = np.eye(num_labels, dtype=np.float32)[targets] if soft is None else soft
        mixed = mix_targets(wanted, drawn, image_size=config.image_size)
        batch = {"image": images, **drawn}, mixed
        yield batch if is_streamed or share.count == 1 else _take_share(batch, share)


def _take_share(batch: Batch, share: Share) -> Batch:
    inputs, targets = batch
    rows = divide_rows(len(targets), share.count)[share.index]
    return {name: values[rows] for name, values in inputs.items()}, targets[rows]


def _slice(split: Split, config: StageConfig, *, seed: int, epoch: int, start_step: int):
    indices = _epoch_indices(split, config, seed=seed, epoch=epoch)
    order = np.random.default_rng([seed, _ORDER, epoch]).permutation(indices)
    size = min(config.batch_size, len(order))
    for step in range(start_step, max(1, len(order) // size)):
        rows = order[step * size : (step + 1) * size]
        yield split.images[rows], split.targets[rows], None if split.soft_targets is None else split.soft_targets[rows]


def _stream(split: StreamedSplit, config: StageConfig, seed: int, epoch: int, *, start_step: int, share: Share):
    size = max(1, config.batch_size // share.count)
    batches = take_share(split.balance(config.balance), share).batches(
        size, seed=seed, epoch=epoch, start_step=start_step, training=True
    )
    # Some hosts may have one image more than others, but all hosts must take the same number of steps.
    for images, targets, _ in itertools.islice(batches, count_steps(split, config, share) - start_step):
        yield images, targets, None


def _epoch_indices(split: Split, config: StageConfig, *, seed: int, epoch: int) -> np.ndarray:
    # after_balance balances before it divides the data, so the split contains the copies already.
    how = "none" if config.data.split == "after_balance" else config.balance
    return balance_indices(split.targets, how, seed=seed, epoch=epoch)


def find_class_weights(split: Split | StreamedSplit, config: StageConfig, num_labels: int) -> np.ndarray | None:
    """Return the class weights of the loss for `balance: class_weight`, float32 [C]; None for other balances.

    Soft targets change the totals of the classes, whereas mixup and cutmix do not change their expectation, since
    partners exchange equal shares on average.
    """
    if config.balance != "class_weight":
        return None
    if _is_streamed(split):
        return compute_class_weights(split.count_classes())
    if split.soft_targets is None:
        return compute_class_weights(np.bincount(split.targets, minlength=num_labels))
    return compute_class_weights(split.soft_targets.sum(axis=0, dtype=np.float64))


def _is_streamed(split: Split | StreamedSplit) -> bool:
    return not isinstance(split, Split)
