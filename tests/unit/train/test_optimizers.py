"""Optimisers against Keras' own."""

import keras
import numpy as np
import pytest

from dlfer.config import names
from dlfer.config.schema import OptimizerConfig, ScheduleConfig
from dlfer.train import optimizers
from dlfer.train.objective import build_schedule
from dlfer.train.optimizers import OPTIMIZERS, build_optimizer, describe_optimizer


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
@pytest.mark.parametrize(("clip", "ema"), [(None, None), (1.5, 0.9)])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_steps_are_those_of_keras(name, given, clip, ema, compiled):
    schedule = build_schedule(ScheduleConfig(name="cosine", warmup_epochs=1), 0.1, steps_per_epoch=3, epochs=3)
    ours = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1, **given), schedule, clip=clip, ema=ema)
    stock = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"}[name]
    more = {} if ema is None else {"use_ema": True, "ema_momentum": ema}
    reference = getattr(keras.optimizers, stock)(learning_rate=schedule, global_clipnorm=clip, **more, **given)
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


def test_global_norm_is_clipped():
    optimizer = build_optimizer(OptimizerConfig(name="sgd"), 1.0, clip=1.0, ema=None)
    weight = keras.Variable(np.zeros(2, np.float32), name="kernel")
    optimizer.build([weight])
    optimizer.apply([keras.ops.convert_to_tensor([30.0, 40.0])], [weight])
    assert np.allclose(np.asarray(weight), [-0.6, -0.8], atol=1e-6)


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
        monkeypatch.setattr(optimizers, "_UpdatesByKernel", type("Nothing", (), {}))
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
