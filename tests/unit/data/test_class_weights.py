"""`balance: class_weight`: every class has the same total in the loss, also where targets are mixed or soft."""

import dataclasses

import numpy as np
import pytest

from dlfer.config.schema import StageConfig
from dlfer.data.bundle import Split
from dlfer.data.pipeline import find_class_weights, iterate_epoch

FER2013_TRAINING = (3995, 436, 4097, 7215, 4830, 3171, 4965)


@pytest.fixture(scope="module")
def split() -> Split:
    """As many images of each class as FER2013's Training has, of one pixel."""
    targets = np.repeat(np.arange(7), FER2013_TRAINING)
    ids = np.array([f"Training/{row}" for row in range(len(targets))])
    return Split("train", np.zeros((len(targets), 1, 1, 1), np.uint8), targets, ids)


def make_config(**augment) -> StageConfig:
    return StageConfig.model_validate(
        {
            "data": {"source": "synthetic_faces"},
            "batch_size": 1024,
            "image_size": 48,
            "balance": "class_weight",
            "augment": augment,
        }
    )


def sum_weights(split: Split, config: StageConfig, epochs: int) -> np.ndarray:
    """Return the total weight of each class, over its mean, in so many epochs of batches."""
    weights = find_class_weights(split, config, 7)
    totals = np.zeros(7)
    for epoch in range(epochs):
        for _, targets in iterate_epoch(split, config, num_labels=7, seed=0, epoch=epoch):
            totals += (weights * targets.astype(np.float64)).sum(axis=0)
    return totals / totals.mean()


# An epoch's draw of mixing weights moves the total of Disgust, of 436 images, by some 3 %: many epochs are the mean.
@pytest.mark.parametrize(
    ("augment", "epochs"), [({}, 2), ({"mixup": 0.2}, 120), ({"cutmix": 1.0}, 60), ({"mixup": 0.4, "cutmix": 1.0}, 120)]
)
def test_classes_of_fer2013_have_the_same_total_within_one_percent(split, augment, epochs):
    assert np.abs(sum_weights(split, make_config(**augment), epochs) - 1).max() < 0.01


def test_soft_targets_have_the_same_total_too(split):
    """Shares of votes: an image of one class has shares of others, which count by the weights of those."""
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.full(7, 0.3), len(split)).astype(np.float32)
    soft = 0.5 * soft + 0.5 * np.eye(7, dtype=np.float32)[split.targets]
    voted = dataclasses.replace(split, soft_targets=soft)
    assert np.abs(sum_weights(voted, make_config(), 2) - 1).max() < 0.01
    weights = find_class_weights(voted, make_config(), 7)
    assert weights * soft.sum(axis=0, dtype=np.float64) == pytest.approx([len(split) / 7] * 7, rel=1e-5)


def test_one_hot_soft_targets_weigh_as_the_labels_do(split):
    hard = dataclasses.replace(split, soft_targets=np.eye(7, dtype=np.float32)[split.targets])
    config = make_config()
    assert find_class_weights(hard, config, 7) == pytest.approx(find_class_weights(split, config, 7))


def test_other_balances_have_no_weights(split):
    assert find_class_weights(split, make_config().model_copy(update={"balance": "sampler"}), 7) is None
