"""From a split to the batches of one epoch: order, balance, drawn augmentation, targets.

Everything here is a function of (seed, epoch, step), so an epoch can be entered in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dlfer.config.schema import StageConfig
from dlfer.data.augment import draw_augmentation, mix_targets
from dlfer.data.balance import balance_indices, compute_class_weights
from dlfer.data.bundle import Split, StreamedSplit
from dlfer.errors import ConfigError

Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]

# Streams of randomness of one stage; each has its own so that one cannot disturb another.
_ORDER, _AUGMENT = 1, 2


def count_steps(split: Split | StreamedSplit, config: StageConfig) -> int:
    """Return the training steps of one epoch; an incomplete last batch is left out, unless it is the only one."""
    num_images = len(split) if _is_streamed(split) else len(_epoch_indices(split, config, seed=0, epoch=0))
    return max(1, num_images // config.batch_size)


def iterate_epoch(
    split: Split | StreamedSplit,
    config: StageConfig,
    *,
    num_labels: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of one epoch, from `start_step` on.

    Args:
        split: training images.
        config: batch size, balance, augmentation and image size of the stage.
        num_labels: C.
        seed, epoch: fix order and augmentation.
        start_step: batches to leave out at the beginning.

    Yields:
        (inputs, targets, weights): inputs is {"image": uint8 [B, H, W, channels]} with the arrays of
        `draw_augmentation`; targets float32 [B, C], rows sum to one; weights float32 [B], all one
        unless `balance: class_weight`.
    """
    class_weights = _compute_weights(split, config, num_labels)
    batches = _stream(split, config, seed, epoch, start_step) if _is_streamed(split) else None
    if batches is None:
        batches = _slice(split, config, seed=seed, epoch=epoch, start_step=start_step)
    for step, (images, targets) in enumerate(batches, start=start_step):
        rng = np.random.default_rng([seed, _AUGMENT, epoch, step])
        drawn = draw_augmentation(config.augment, len(images), image_size=config.image_size, rng=rng)
        one_hot = np.eye(num_labels, dtype=np.float32)[targets]
        mixed = mix_targets(one_hot, drawn, image_size=config.image_size)
        yield {"image": images, **drawn}, mixed, class_weights[targets]


def _slice(split: Split, config: StageConfig, *, seed: int, epoch: int, start_step: int):
    indices = _epoch_indices(split, config, seed=seed, epoch=epoch)
    order = np.random.default_rng([seed, _ORDER, epoch]).permutation(indices)
    size = min(config.batch_size, len(order))
    for step in range(start_step, max(1, len(order) // size)):
        rows = order[step * size : (step + 1) * size]
        yield split.images[rows], split.targets[rows]


def _stream(split: StreamedSplit, config: StageConfig, seed: int, epoch: int, start_step: int):
    batches = split.batches(config.batch_size, seed=seed, epoch=epoch, start_step=start_step, training=True)
    for images, targets, _ in batches:
        yield images, targets


def _epoch_indices(split: Split, config: StageConfig, *, seed: int, epoch: int) -> np.ndarray:
    # That reading of the paper balances before it splits; the copies stand in the split already.
    how = "none" if config.data.split == "after_balance" else config.balance
    return balance_indices(split.targets, how, seed=seed, epoch=epoch)


def _compute_weights(split: Split | StreamedSplit, config: StageConfig, num_labels: int) -> np.ndarray:
    """Return the weight of each class, float32 [C]."""
    if _is_streamed(split):
        if config.balance != "none":
            raise ConfigError(
                f"balance: found {config.balance} for the streamed data {split.name!r}, expected none; "
                "balancing needs the targets of all images in memory."
            )
        return np.ones(num_labels, np.float32)
    if config.balance == "class_weight":
        return compute_class_weights(split.targets, num_labels)
    return np.ones(num_labels, np.float32)


def _is_streamed(split: Split | StreamedSplit) -> bool:
    return not isinstance(split, Split)
