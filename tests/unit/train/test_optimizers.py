"""Optimisers against Keras' own."""

import keras
import numpy as np
import pytest

from dlfer.config import names
from dlfer.config.schema import OptimizerConfig, ScheduleConfig
from dlfer.train.objective import build_schedule
from dlfer.train.optimizers import OPTIMIZERS, build_optimizer


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
