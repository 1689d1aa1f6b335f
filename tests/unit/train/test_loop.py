"""Averaged weights have BatchNorm statistics of their own, and a training is the same with and without them."""

import keras
import numpy as np
import pytest

from dlfer.data.pipeline import iterate_epoch
from dlfer.model.stage_network import TrainingNetwork
from dlfer.model.training_kernels import list_batch_norms
from dlfer.train.loop import FitLoop, WeightAverage
from dlfer.train.objective import build_loss, build_optimizer
from dlfer.train.plan import set_trainable
from dlfer.train.stage import train_stage
from dlfer.train.state import StageState
from tests.unit.train.test_stage import build, make_bundle, make_config, make_job, weights_of

GIVEN = {"batch_size": 16, "image_size": 32, "augment": {"mirror": 0.5, "shift": 0.1}, "ema": 0.9}


def start_loop(config):
    """Return a loop after one epoch, its optimiser and its network."""
    network, bundle = build(), make_bundle()
    loop = FitLoop(network, fill=config.augment.fill, jit=False)
    set_trainable(network.backbone, config.freeze, head_only=False)
    optimizer = loop.compile(
        lambda: build_optimizer(config.optimizer, 0.01, clip=None, ema=config.ema),
        build_loss(config.loss, auxiliary=0, class_weights=None),
    )
    loop.train(iterate(config, bundle), 4, StageState(), lambda loss, accuracy: None)
    loop.fetch()
    return loop, optimizer, network


def iterate(config, bundle, epoch=0):
    return iterate_epoch(bundle.train, config, num_labels=3, seed=5, epoch=epoch)


def test_statistics_are_the_mean_over_batches_of_what_the_averaged_weights_produce():
    config = make_config(**GIVEN)
    loop, optimizer, network = start_loop(config)
    bundle, raw = make_bundle(), weights_of(network)
    average = WeightAverage(loop, optimizer, fill=config.augment.fill)
    average.update(iterate(config, bundle), num_images=40)  # three batches of 16
    assert all(np.array_equal(a, b) for a, b in zip(raw, weights_of(network), strict=True))
    with average.applied():
        # The oracle: what enters each BatchNorm in training, from a network that ends there.
        norms = list_batch_norms(network.backbone)
        found = [(np.array(norm.moving_mean), np.array(norm.moving_variance)) for norm in norms]
        training = TrainingNetwork(network, fill=config.augment.fill)
        probe = keras.Model(network.backbone.input, [norm.input for norm in norms])
        sums = [[0.0, 0.0] for _ in norms]
        for (inputs, _), _ in zip(iterate(config, bundle), range(3), strict=False):
            images = training.face_input.prepare(inputs["image"], inputs, fill=config.augment.fill)
            for total, values in zip(sums, probe(images, training=True), strict=True):
                mean, variance = keras.ops.moments(values, axes=[0, 1, 2])
                total[0] += np.asarray(mean) / 3
                total[1] += np.asarray(variance) / 3
        for (mean, variance), (expected_mean, expected_variance) in zip(found, sums, strict=True):
            np.testing.assert_allclose(mean, expected_mean, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(variance, expected_variance, rtol=1e-3, atol=1e-4)
        assert any(not np.allclose(a, b) for a, b in zip(raw, weights_of(network), strict=True))


def test_without_batches_the_statistics_are_those_of_the_raw_weights():
    config = make_config(**GIVEN)
    loop, optimizer, network = start_loop(config)
    norm = list_batch_norms(network.backbone)[0]
    raw_mean, raw_gamma = np.array(norm.moving_mean), np.array(norm.gamma)
    average = WeightAverage(loop, optimizer, fill=config.augment.fill)
    average.update(None, num_images=0)
    with average.applied():
        assert np.array_equal(raw_mean, np.array(norm.moving_mean))
        assert not np.array_equal(raw_gamma, np.array(norm.gamma))


def test_frozen_statistics_stay():
    config = make_config(**GIVEN, freeze={"batch_norm": "frozen"})
    loop, optimizer, network = start_loop(config)
    norms = list_batch_norms(network.backbone)
    raw = [np.array(norm.moving_mean) for norm in norms]
    average = WeightAverage(loop, optimizer, fill=config.augment.fill)
    average.update(iterate(config, make_bundle()), num_images=16)
    with average.applied():
        assert all(np.array_equal(a, np.array(norm.moving_mean)) for a, norm in zip(raw, norms, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_raw_weights_of_a_training_do_not_depend_on_it(tmp_path, keep):
    """The same dropout, order and statistics in the next epoch: the checkpoints of both trainings are equal."""
    checkpoints = []
    for number, images in enumerate((None, 20)):
        config = make_config(epochs=2, keep=keep, ema_norm_images=images, **GIVEN)
        network = build()
        train_stage(make_job(config, tmp_path / str(number)), network, make_bundle())
        with np.load(tmp_path / str(number) / "checkpoint.npz") as stored:
            checkpoints.append({name: stored[name] for name in stored.files if name != "record"})
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(np.array_equal(values, checkpoints[1][name]) for name, values in checkpoints[0].items())
