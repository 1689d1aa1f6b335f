"""Losses and schedules against Keras' own."""

import keras
import numpy as np
import pytest

from dlfer.config.schema import LossConfig, ScheduleConfig
from dlfer.train.objective import build_loss, build_schedule


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return np.eye(5, dtype=np.float32)[rng.integers(0, 5, 16)], rng.normal(0, 2, (16, 5)).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_equals_keras_from_probabilities(batch, smoothing):
    targets, logits = batch
    ours = build_loss(LossConfig(name="focal", gamma=1.5, label_smoothing=smoothing))(targets, logits)
    keras_loss = keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=1.5, label_smoothing=smoothing)
    assert float(ours) == pytest.approx(float(keras_loss(targets, keras.ops.softmax(logits))), rel=1e-4)


def test_focal_with_gamma_0_is_cross_entropy(batch):
    targets, logits = batch
    focal = build_loss(LossConfig(name="focal", gamma=0.0))(targets, logits)
    plain = build_loss(LossConfig())(targets, logits)
    assert float(focal) == pytest.approx(float(plain), rel=1e-5)


def test_binary_cross_entropy_by_hand(batch):
    targets, logits = batch
    found = float(build_loss(LossConfig(name="binary_crossentropy"))(targets, logits))
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert found == pytest.approx(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(), rel=1e-5)


def test_cosine_with_warmup_equals_keras():
    ours = build_schedule(
        ScheduleConfig(name="cosine", warmup_epochs=2.0, final=0.1), 0.01, steps_per_epoch=10, epochs=12
    )
    keras_schedule = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=100, alpha=0.1, warmup_target=0.01, warmup_steps=20
    )
    for step in (20, 21, 55, 119, 120):
        assert float(ours(step)) == pytest.approx(float(keras_schedule(step)), rel=1e-5)
    # Ours warms up from the first step's share, so that no step is wasted on a rate of 0.
    assert [float(ours(step)) for step in (0, 9, 19)] == pytest.approx([0.0005, 0.005, 0.01])


def test_restarts_begin_anew_and_end_at_the_end():
    schedule = build_schedule(ScheduleConfig(name="cosine", restarts=2), 1.0, steps_per_epoch=10, epochs=9)
    rates = np.array([float(schedule(step)) for step in range(90)])
    assert [rates[0], rates[30], rates[60]] == pytest.approx([1.0, 1.0, 1.0])
    assert rates[[29, 59, 89]].max() < 0.01
    assert float(schedule(90)) == pytest.approx(0.0, abs=1e-6)


def test_step_falls_every_so_many_epochs_after_its_start():
    config = ScheduleConfig(name="step", factor=0.5, every_epochs=2, start_epoch=3)
    schedule = build_schedule(config, 1.0, steps_per_epoch=4, epochs=10)
    assert [float(schedule(4 * epoch)) for epoch in range(8)] == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125])


@pytest.mark.parametrize("name", ["categorical_crossentropy", "binary_crossentropy", "focal"])
def test_auxiliary_logits_count_three_tenths_each(name):
    from dlfer.train.objective import compute_hits

    rng = np.random.default_rng(0)
    targets, logits = np.eye(4, dtype=np.float32)[[0, 3, 1]], rng.normal(size=(3, 3, 4)).astype(np.float32)
    config = LossConfig(name=name, label_smoothing=0.1)
    plain = build_loss(config)
    expected = plain(targets, logits[:, 0]) + 0.3 * plain(targets, logits[:, 1]) + 0.3 * plain(targets, logits[:, 2])
    assert np.allclose(build_loss(config, auxiliary=2)(targets, logits), expected, rtol=1e-5)
    hits = logits[:, 0].argmax(axis=1) == targets.argmax(axis=1)
    assert np.array_equal(np.asarray(compute_hits(targets, logits)), hits.astype(float))
    assert np.array_equal(np.asarray(compute_hits(targets, logits[:, 0])), hits.astype(float))
