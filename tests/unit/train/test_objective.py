"""Losses and schedules against Keras' own."""

import keras
import numpy as np
import pytest

from dlfer.config.schema import LossConfig, ScheduleConfig
from dlfer.train.objective import FocalFromLogits, build_loss, build_schedule


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return np.eye(5, dtype=np.float32)[rng.integers(0, 5, 16)], rng.normal(0, 2, (16, 5)).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 5.0])
def test_focal_loss_equals_keras_from_probabilities(batch, smoothing, gamma):
    targets, logits = batch
    ours = build_loss(LossConfig(name="focal", gamma=gamma, label_smoothing=smoothing))(targets, logits)
    keras_loss = keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=gamma, label_smoothing=smoothing)
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


def test_step_without_a_start_is_the_staircase_of_keras():
    """Epochs 1 to 5 have the full rate, 6 to 10 a tenth, and so on; seven steps an epoch."""
    config = ScheduleConfig(name="step", factor=0.1, every_epochs=5)
    ours = build_schedule(config, 4e-3, steps_per_epoch=7, epochs=20)
    stock = keras.optimizers.schedules.ExponentialDecay(4e-3, decay_steps=5 * 7, decay_rate=0.1, staircase=True)
    steps = np.arange(7 * 20)
    assert np.asarray(ours(steps)) == pytest.approx([float(stock(step)) for step in steps], rel=1e-5)
    assert float(ours(5 * 7 - 1)) == pytest.approx(4e-3)


def test_step_counts_its_epochs_from_the_start_on():
    """The public code of the VGG19 recipe: epoch numbers from 0, factor 0.9^((epoch - 80) // 5) beyond epoch 80."""
    config = ScheduleConfig(name="step", factor=0.9, every_epochs=5, start_epoch=80)
    schedule = build_schedule(config, 0.01, steps_per_epoch=3, epochs=100)
    for epoch in range(100):
        expected = 0.01 * 0.9 ** ((epoch - 80) // 5) if epoch > 80 else 0.01
        rates = [float(schedule(3 * epoch + step)) for step in range(3)]
        assert rates == pytest.approx([expected] * 3, rel=1e-5), epoch


@pytest.mark.parametrize("warmup", [0.5, 2.0, 3.0])
def test_a_warm_up_moves_no_epoch_of_step(warmup):
    plain, warm = (
        build_schedule(
            ScheduleConfig(name="step", factor=0.5, every_epochs=2, warmup_epochs=epochs),
            1.0,
            steps_per_epoch=8,
            epochs=8,
        )
        for epochs in (0.0, warmup)
    )
    for step in range(64):
        share = min(1.0, (step + 1) / (8 * warmup))
        assert float(warm(step)) == pytest.approx(share * float(plain(step)), rel=1e-6)


def test_step_is_exact_where_float32_cannot_tell_the_last_step_of_an_epoch():
    """(e s - 1) / s is rounded up to e in float32 from about e = 100 on, with 100,000 steps an epoch."""
    config = ScheduleConfig(name="step", factor=0.5, every_epochs=100)
    schedule = build_schedule(config, 1.0, steps_per_epoch=100_000, epochs=201)
    assert [float(schedule(100_000 * 200 + shift)) for shift in (-1, 0)] == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.25, 0.5, 1.0, 2.0, 5.0, 50.0])
def test_focal_loss_and_its_gradient_are_finite(gamma, compiled):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    rows = [scale * rng.normal(size=5) for scale in (1e-3, 1.0, 10.0, 100.0, 1e4) for _ in range(20)]
    rows += [np.eye(5)[0] * 1e4, -np.eye(5)[0] * 1e4, np.zeros(5), np.full(5, 1e4), np.array([1e4, 1e4, -1e4, 0, 0])]
    logits = tf.constant(np.array(rows), tf.float32)
    for smoothing in (0.0, 0.1):
        loss = FocalFromLogits(gamma=gamma, label_smoothing=smoothing)

        def compute(targets, loss=loss):
            with tf.GradientTape() as tape:
                tape.watch(logits)
                values = loss.call(targets, logits)
            return values, tape.gradient(values, logits)

        run = tf.function(compute) if compiled else compute
        for label in range(5):
            values, gradients = run(tf.constant(np.tile(np.eye(5, dtype=np.float32)[label], (len(rows), 1))))
            assert np.isfinite(values).all()
            assert np.isfinite(gradients).all()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0, 5.0])
def test_focal_gradient_is_that_of_a_difference_quotient(gamma):
    """In float64 by hand, at moderate logits, mixed targets."""
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(0, 3, (12, 4)), rng.dirichlet(np.ones(4), 12)

    def compute_by_hand(z):
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        return -(targets * (1 - p) ** gamma * np.log(p)).sum(axis=1)

    variable = tf.Variable(logits, dtype=tf.float32)
    with tf.GradientTape() as tape:
        values = FocalFromLogits(gamma=gamma).call(tf.constant(targets, tf.float32), variable)
    found = tape.gradient(values, variable).numpy()
    assert values.numpy() == pytest.approx(compute_by_hand(logits), rel=1e-4, abs=1e-6)
    for place in range(4):
        shift = np.eye(4)[place] * 1e-5
        expected = (compute_by_hand(logits + shift) - compute_by_hand(logits - shift)) / 2e-5
        assert found[:, place] == pytest.approx(expected, rel=1e-3, abs=1e-4)


WEIGHTS = np.array([0.5, 3.0, 1.0, 0.25, 7.0], np.float32)
LOSSES = [
    {"name": "categorical_crossentropy"},
    {"name": "categorical_crossentropy", "label_smoothing": 0.2},
    {"name": "binary_crossentropy"},
    {"name": "binary_crossentropy", "label_smoothing": 0.2},
    {"name": "focal", "gamma": 1.5},
    {"name": "focal", "gamma": 1.5, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("given", LOSSES)
def test_class_weights_are_keras_sample_weights_where_targets_are_one_hot(batch, given):
    targets, logits = batch
    config = LossConfig(**given)
    found = float(build_loss(config, class_weights=WEIGHTS)(targets, logits))
    expected = float(build_loss(config)(targets, logits, sample_weight=WEIGHTS[targets.argmax(axis=1)]))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("auxiliary", [0, 2])
@pytest.mark.parametrize("given", LOSSES)
def test_each_share_of_a_mixed_target_counts_the_weight_of_its_class(batch, given, auxiliary):
    """The sum over classes of share times weight times the loss of that class alone."""
    _, logits = batch
    if auxiliary:
        logits = np.stack([logits, 2 * logits, -logits], axis=1)
    mixed = np.random.default_rng(2).dirichlet(np.full(5, 0.3), 16).astype(np.float32)
    config = LossConfig(**given)
    plain = build_loss(config, auxiliary=auxiliary)
    found = np.asarray(build_loss(config, auxiliary=auxiliary, class_weights=WEIGHTS).call(mixed, logits))
    expected = np.zeros(16)
    for label in range(5):
        alone = np.tile(np.eye(5, dtype=np.float32)[label], (16, 1))
        expected += mixed[:, label] * WEIGHTS[label] * np.asarray(plain.call(alone, logits))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_target_of_classes_that_do_not_count_costs_nothing(batch):
    tf = pytest.importorskip("tensorflow")
    logits = tf.constant(batch[1])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = build_loss(LossConfig(), class_weights=np.array([1, 1, 1, 1, 0]))
        value = loss.call(np.eye(5, dtype=np.float32)[[4] * 16], logits)
    assert np.abs(value).max() == 0
    assert np.abs(tape.gradient(value, logits)).max() == 0


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
