"""Which rows trees are grown on, and what each counts."""

import numpy as np
import pytest

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.experiment.fit_boosted import balance_train, compute_row_weights, count_rows

COUNTS = (12, 3, 7)


def make_config(**overrides) -> ExperimentConfig:
    config = ExperimentConfig.model_validate(
        {
            "experiment": {"name": "a"},
            "model": {"family": "boosted", "backbone": "efficientnet_nano"},
            "finetune": {"data": {"source": "synthetic_faces"}},
            "boosting": {},
        }
    )
    return with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})


def make_split() -> Split:
    targets = np.repeat(np.arange(3), COUNTS)
    images = np.random.default_rng(0).integers(0, 256, (len(targets), 16, 16, 1)).astype(np.uint8)
    return Split("train", images, targets, np.array([f"a/{n:03d}" for n in range(len(targets))]))


def test_row_weights_make_classes_count_alike_with_mean_one():
    targets = make_split().targets
    weights = compute_row_weights(make_config(), targets, 3)
    sums = np.bincount(targets, weights)
    assert sums == pytest.approx([sums[0]] * 3)
    assert weights.mean() == pytest.approx(1)


def test_row_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_sample_weight

    targets = make_split().targets
    assert compute_row_weights(make_config(), targets, 3) == pytest.approx(compute_sample_weight("balanced", targets))


@pytest.mark.parametrize(
    ("balance", "rows", "weighted"),
    [
        ("none", False, False),
        ("none", True, True),
        ("class_weight", False, True),
        ("sampler", False, True),
        ("augment", False, False),
    ],
)
def test_weights_are_there_when_something_asks_for_them(balance, rows, weighted):
    config = make_config(finetune__balance=balance, boosting__normalize__rows=rows)
    assert (compute_row_weights(config, make_split().targets, 3) is not None) == weighted


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        ("none", COUNTS),
        ("class_weight", COUNTS),
        ("sampler", COUNTS),
        ("undersample", (3, 3, 3)),
        ("augment", (12, 12, 12)),
    ],
)
def test_rows_are_balanced_as_the_plan_says(balance, expected):
    stage, split = make_config(finetune__balance=balance).finetune, make_split()
    images, rows = balance_train(stage, split, seed=0)
    assert np.bincount(images.targets[rows]).tolist() == list(expected)
    bundle = DataBundle("synthetic_faces", ("a", "b", "c"), split, split, None)
    assert count_rows(stage, bundle) == (len(images), len(rows))


def test_images_that_were_balanced_before_the_split_get_no_copies():
    stage = make_config(
        finetune__balance="augment", finetune__data__protocol="paper", finetune__data__split="after_balance"
    ).finetune
    split = make_split()
    images, rows = balance_train(stage, split, seed=0)
    assert images is split
    assert rows.tolist() == list(range(len(split)))
