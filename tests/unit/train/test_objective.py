"""Losses, schedules and optimisers against Keras' own."""

import keras
import numpy as np
import pytest

from dlfer.config import names
from dlfer.config.schema import LossConfig, OptimizerConfig, ScheduleConfig
from dlfer.train import objective
from dlfer.train.objective import (
    OPTIMIZERS,
    FocalFromLogits,
    build_loss,
    build_optimizer,
    build_schedule,
    describe_optimizer,
)


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


def test_registries_have_the_names_of_the_schema():
    assert tuple(OPTIMIZERS) == names.OPTIMIZERS


CASES = [
    ("adam", {}),
    ("adam", {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3, "weight_decay": 0.1}),
    ("adamw", {}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("rmsprop", {"momentum": 0.5}),
    ("rmsprop", {}),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("clip", "scope", "ema"), [(None, "global", None), (1.5, "global", 0.9), (1.5, "variable", None)]
)
@pytest.mark.parametrize(("name", "given"), CASES)
def test_steps_are_those_of_keras(name, given, clip, scope, ema, compiled):
    schedule = build_schedule(ScheduleConfig(name="cosine", warmup_epochs=1), 0.1, steps_per_epoch=3, epochs=3)
    config = OptimizerConfig(name=name, learning_rate=0.1, **given)
    ours = build_optimizer(config, schedule, clip=clip, ema=ema, clip_scope=scope)
    stock = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"}[name]
    more = {} if ema is None else {"use_ema": True, "ema_momentum": ema}
    more |= {{"global": "global_clipnorm", "variable": "clipnorm"}[scope]: clip}
    reference = getattr(keras.optimizers, stock)(learning_rate=schedule, **more, **given)
    reference.exclude_from_weight_decay(var_names=["bias"])
    values = [take_steps(optimizer, compiled=compiled) for optimizer in (ours, reference)]
    assert len(values[0]) == len(values[1])
    for found, expected in zip(*values, strict=True):
        # TensorFlow's kernel takes 1 - beta_2 in float32, which is 1.3e-5 of it off 0.001.
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def take_steps(optimizer: keras.optimizers.Optimizer, *, compiled: bool) -> list[np.ndarray]:
    """Return all values, the optimiser's own included, after five steps on a kernel and a bias."""
    rng = np.random.default_rng(0)
    kernel = keras.Variable(rng.normal(size=(4, 3)).astype("float32"), name="kernel")
    bias = keras.Variable(rng.normal(size=3).astype("float32"), name="bias")
    optimizer.build([kernel, bias])

    def step(gradients):
        optimizer.apply(gradients, [kernel, bias])

    if compiled and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(step)
    for _ in range(5):
        step([keras.ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32")) for v in (kernel, bias)])
    return [np.asarray(v) for v in (kernel, bias, *optimizer.variables)]


def test_weight_decay_spares_biases_and_normalisation():
    optimizer = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.5), 0.1, clip=None, ema=None)
    variables = [keras.Variable(np.ones(2, np.float32), name=name) for name in ("kernel", "bias", "gamma", "beta")]
    optimizer.build(variables)
    optimizer.apply([keras.ops.zeros(2)] * 4, variables)
    kernel, *others = (np.asarray(v) for v in variables)
    assert np.all(kernel < 1)
    assert all(np.all(values == 1) for values in others)


@pytest.mark.parametrize(
    ("scope", "expected"), [("global", [[-0.3, -0.4], [-(0.75**0.5)]]), ("variable", [[-0.6, -0.8], [-1.0]])]
)
def test_the_norm_of_all_gradients_or_of_each_is_clipped(scope, expected):
    optimizer = build_optimizer(OptimizerConfig(name="sgd"), 1.0, clip=1.0, ema=None, clip_scope=scope)
    weights = [keras.Variable(np.zeros(length, np.float32), name=name) for length, name in ((2, "kernel"), (1, "bias"))]
    optimizer.build(weights)
    gradients = [[30.0, 40.0], [50 * 3**0.5]]
    optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], weights)
    for weight, values in zip(weights, expected, strict=True):
        assert np.allclose(np.asarray(weight), values, atol=1e-6)


def test_fit_leaves_the_raw_weights_beside_their_average():
    optimizer = build_optimizer(OptimizerConfig(name="sgd"), 1.0, clip=None, ema=0.5)
    weight = keras.Variable(np.zeros(1, np.float32), name="kernel")
    optimizer.build([weight])
    optimizer.apply([keras.ops.convert_to_tensor([-1.0])], [weight])
    optimizer.finalize_variable_values([weight])
    assert np.asarray(weight) == pytest.approx(1.0)


def step_as_pytorch(weights, slots, gradients, *, rate, momentum, nesterov, decay):
    """One step of torch.optim.SGD by its documented formula: g + wd w, buffer, w - rate (g + momentum buffer)."""
    for name, gradient in gradients.items():
        g = gradient + decay.get(name, 0.0) * weights[name]
        if momentum:
            slots[name] = g if name not in slots else momentum * slots[name] + g
            g = g + momentum * slots[name] if nesterov else slots[name]
        weights[name] = weights[name] - rate * g


@pytest.mark.parametrize("way", ["kernel", "keras", "compiled"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(("momentum", "nesterov"), [(None, None), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("scope", ["kernels", "all"])
def test_l2_is_the_weight_decay_of_pytorchs_sgd(scope, momentum, nesterov, clip, way, monkeypatch):
    """Clipping acts on the gradient of the loss alone, as clip_grad_norm_ does before step()."""
    if way == "keras":
        monkeypatch.setattr(objective, "_UpdatesByKernel", type("Nothing", (), {}))
    config = OptimizerConfig(
        name="sgd", momentum=momentum, nesterov=nesterov, weight_decay=0.05, weight_decay_kind="l2",
        weight_decay_scope=scope,
    )  # fmt: skip
    optimizer = build_optimizer(config, 0.1, clip=clip, ema=None)
    rng = np.random.default_rng(0)
    expected = {name: rng.normal(size=(3, 2)) for name in ("kernel", "bias", "gamma", "beta")}
    variables = [keras.Variable(value.astype("float32"), name=name) for name, value in expected.items()]
    optimizer.build(variables)
    decay = dict.fromkeys(expected if scope == "all" else ["kernel"], 0.05)

    def apply(gradients):
        optimizer.apply(gradients, variables)

    if way == "compiled" and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        apply = tf.function(apply)
    slots: dict = {}
    for _ in range(6):
        gradients = {name: rng.normal(size=(3, 2)) for name in expected}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        share = 1.0 if clip is None else min(1.0, clip / norm)
        apply([keras.ops.convert_to_tensor(g.astype("float32")) for g in gradients.values()])
        step_as_pytorch(
            expected, slots, {name: share * g for name, g in gradients.items()},
            rate=0.1, momentum=momentum, nesterov=nesterov, decay=decay,
        )  # fmt: skip
    for variable, value in zip(variables, expected.values(), strict=True):
        assert np.asarray(variable) == pytest.approx(value, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_l2_is_a_penalty_in_the_gradient_of_the_others_too(name):
    """The same optimiser without weight decay, given the gradient with the penalty's."""
    found, plain = (
        build_optimizer(OptimizerConfig(name=name, **given), 0.1, clip=None, ema=None)
        for given in ({"weight_decay": 0.05, "weight_decay_kind": "l2"}, {})
    )
    rng = np.random.default_rng(0)
    first, second = (keras.Variable(np.full((3, 2), 2.0, "float32"), name="kernel") for _ in range(2))
    found.build([first])
    plain.build([second])
    for _ in range(5):
        gradient = rng.normal(size=(3, 2)).astype("float32")
        found.apply([keras.ops.convert_to_tensor(gradient)], [first])
        plain.apply([keras.ops.convert_to_tensor(gradient + 0.05 * np.asarray(second))], [second])
    assert np.asarray(first) == pytest.approx(np.asarray(second), rel=1e-5)


@pytest.mark.slow
def test_with_momentum_09_l2_acts_like_ten_times_the_decoupled_decay():
    """Keras takes the decay beside the momentum, PyTorch through it: after many steps of no gradient, w is the same."""
    ends = []
    for kind, decay in (("l2", 5e-4), ("decoupled", 5e-3), ("decoupled", 5e-4)):
        config = OptimizerConfig(name="sgd", momentum=0.9, weight_decay=decay, weight_decay_kind=kind)
        optimizer = build_optimizer(config, 0.01, clip=None, ema=None)
        weight = keras.Variable(np.ones(1, np.float32), name="kernel")
        optimizer.build([weight])
        for _ in range(1000):
            optimizer.apply([keras.ops.zeros(1)], [weight])
        ends.append(1 - np.asarray(weight)[0])
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
    assert ends[0] > 9 * ends[2]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"name": "adamw", "weight_decay": 0.1, "weight_decay_kind": "l2"}, "adamw.*set name: adam"),
        ({"name": "sgd", "weight_decay_kind": "l2"}, "without a weight_decay"),
    ],
)
def test_l2_that_would_not_be_applied_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        OptimizerConfig(**given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"name": "adamw"}, "adamw (weight decay 0.004, decoupled, kernels only)"),
        (
            {
                "name": "sgd",
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "weight_decay_kind": "l2",
                "weight_decay_scope": "all",
            },
            "sgd (momentum 0.9; weight decay 0.0005, L2 in the gradient, all weights)",
        ),
        ({"name": "adam"}, "adam"),
    ],
)
def test_an_optimizer_is_described_with_the_kind_of_its_decay(given, text):
    assert describe_optimizer(OptimizerConfig(**given)) == text
