"""From a split to the batches of one epoch: order, balance, drawn augmentation, targets.

Everything here is a function of (seed, epoch, step), so an epoch can be entered in the middle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from dlfer.config.schema import StageConfig
from dlfer.data.augment import draw_augmentation, mix_targets
from dlfer.data.balance import balance_indices, compute_class_weights
from dlfer.data.bundle import WHOLE, Share, Split, StreamedSplit
from dlfer.data.images import compute_side
from dlfer.errors import ConfigError

Batch = tuple[dict[str, np.ndarray], np.ndarray]

# Streams of randomness of one stage; each has its own so that one cannot disturb another.
_ORDER, _AUGMENT = 1, 2


def count_steps(split: Split | StreamedSplit, config: StageConfig, share: Share = WHOLE) -> int:
    """Return the training steps of one epoch, the same on every host.

    An incomplete last batch is left out, unless it is the only one. Of streamed images each host reads a part of
    its own, so that its incomplete last batch is left out, too.
    """
    if _is_streamed(split):
        return max(1, len(split) // share.count // max(1, config.batch_size // share.count))
    return max(1, len(_epoch_indices(split, config, seed=0, epoch=0)) // config.batch_size)


def take_share(split: Split | StreamedSplit, share: Share) -> Split | StreamedSplit:
    """Return the images of a split that one host has; `split` itself if there is no other host."""
    if share.count == 1:
        return split
    if _is_streamed(split):
        return split.shard(share.index, share.count)
    return split.take(np.arange(share.index, len(split), share.count))


def divide_rows(num_rows: int, num_parts: int) -> list[np.ndarray]:
    """Divide the rows of a batch into parts that hold each row together with its partner in mixup and cutmix.

    Row i is mixed with row num_rows - 1 - i, the batch read backwards. A part takes some rows from the front and
    their partners from the back, so that partners are each other's also where the part is read backwards.

    Returns:
        int [n] each, increasing; the numbers of rows differ by two at most, and none is 0 from two rows a part on.
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
        split: training images.
        config: batch size, balance, augmentation, crop and image size of the stage.
        num_labels: C.
        seed, epoch: fix order and augmentation.
        start_step: batches to leave out at the beginning.
        share: of several hosts, which one's rows to yield; B is smaller then.

    Yields:
        (inputs, targets): inputs is {"image": uint8 [B, H, W, channels]} with the arrays of
        `draw_augmentation`; targets float32 [B, C], rows sum to one.
    """
    is_streamed = _is_streamed(split)
    _check_balance(split, config)
    # A streamed host draws for its own images alone; the first host's numbers are those of a single one.
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
    batches = take_share(split, share).batches(size, seed=seed, epoch=epoch, start_step=start_step, training=True)
    # Where the images do not divide, some hosts hold one more; none may do a step more than the others.
    for images, targets, _ in itertools.islice(batches, count_steps(split, config, share) - start_step):
        yield images, targets, None


def _epoch_indices(split: Split, config: StageConfig, *, seed: int, epoch: int) -> np.ndarray:
    # That reading of the paper balances before it splits; the copies stand in the split already.
    how = "none" if config.data.split == "after_balance" else config.balance
    return balance_indices(split.targets, how, seed=seed, epoch=epoch)


def find_class_weights(split: Split | StreamedSplit, config: StageConfig, num_labels: int) -> np.ndarray | None:
    """Return what each class counts in the loss under `balance: class_weight`, float32 [C]; None otherwise.

    Mixup and cutmix do not change the expected total of a class, since each image gives to its partner what it
    gets from it in the mean; soft targets do.
    """
    _check_balance(split, config)
    if config.balance != "class_weight":
        return None
    if split.soft_targets is None:
        return compute_class_weights(np.bincount(split.targets, minlength=num_labels))
    return compute_class_weights(split.soft_targets.sum(axis=0, dtype=np.float64))


def _check_balance(split: Split | StreamedSplit, config: StageConfig) -> None:
    if _is_streamed(split) and config.balance != "none":
        raise ConfigError(
            f"balance: found {config.balance} for the streamed data {split.name!r}, expected none; "
            "balancing needs the targets of all images in memory."
        )


def _is_streamed(split: Split | StreamedSplit) -> bool:
    return not isinstance(split, Split)
