"""Prediction by compiled functions: Keras' own answers, few programs, and the weights as they are now."""

import gc
import threading
import weakref

import keras
import numpy as np
import pytest

from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.model import predict
from dlfer.model.predict import MOST_SIZES, pad_batch, predict_probabilities
from dlfer.model.stage_network import build_transfer_network


def make_model(activation="softmax", crop=None) -> keras.Model:
    config = ModelConfig(backbone="efficientnet_nano", head=HeadConfig(activation=activation))
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1, crop=crop)
    network.head.kernel.assign(network.head.kernel * 20.0)
    return network.model


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


class Traced(keras.layers.Layer):
    """Says how bright an image is, and counts how often TensorFlow looks at how it is computed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def call(self, images):
        self.shapes.append(tuple(images.shape))
        light = keras.ops.mean(keras.ops.cast(images, "float32"), axis=(1, 2)) / 255.0
        return keras.ops.concatenate([1.0 - light, light], axis=1)


@pytest.fixture
def counted():
    """A model of brightness, and its layer; what building it traced is not counted."""
    images, layer = keras.Input((None, None, 1), dtype="uint8"), Traced()
    model = keras.Model(images, layer(images))
    layer.shapes.clear()
    return model, layer


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("crop", [None, 0.8])
def test_the_answers_are_those_of_keras(activation, crop):
    model, images = make_model(activation, crop), draw(7, 40, 36, 1)
    expected = model.predict(images, verbose=0)
    found = predict_probabilities(model, images, batch_size=4)
    assert found == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-6)
    assert found.dtype == np.float32
    assert np.ptp(found[:, 0]) > 0.01
    assert predict_probabilities(model, images[:0], batch_size=4).shape == (0, 3)


def test_a_size_is_answered_alike_whatever_came_before():
    model, images = make_model(), draw(3, 40, 36, 1)
    before = predict_probabilities(model, images, batch_size=3)
    for side in (20, 50):
        predict_probabilities(model, draw(2, side, side, 1), batch_size=2)
    assert np.array_equal(predict_probabilities(model, images, batch_size=3), before)


def test_batches_of_any_length_share_one_program(counted):
    model, layer = counted
    images = np.full((9, 6, 5, 1), 51, np.uint8)
    for batch_size in (1, 2, 4, 64):
        assert predict_probabilities(model, images, batch_size=batch_size)[:, 1] == pytest.approx(0.2)
    assert layer.shapes == [(None, 6, 5, 1)]


def test_sizes_without_end_make_few_programs(counted):
    model, layer = counted
    for side in range(2, 2 + 3 * MOST_SIZES):
        images = np.full((2, side, side + 1, 1), 51, np.uint8)
        assert predict_probabilities(model, images, batch_size=2)[:, 1] == pytest.approx(0.2)
    assert len(layer.shapes) == MOST_SIZES + 1


def test_changed_weights_change_the_answers():
    model, images = make_model(), draw(4, 32, 32, 1)
    before = predict_probabilities(model, images, batch_size=4)
    head = model.get_layer("head")
    head.bias.assign(head.bias + np.log(np.float32([1, 9, 1])))
    expected = before * [1, 9, 1] / (before @ [1, 9, 1])[:, None]
    assert predict_probabilities(model, images, batch_size=4) == pytest.approx(expected, abs=1e-5)


def test_under_xla_the_last_batches_are_filled_up(counted):
    model, _ = counted
    images = draw(11, 6, 6, 1)
    expected = images.mean(axis=(1, 2)) / 255
    model.jit_compile = True
    assert predict_probabilities(model, images, batch_size=4)[:, 1:] == pytest.approx(expected, abs=1e-6)
    functions = predict._PROGRAMS[model]._functions
    assert [jit for _, jit in functions] == [True]
    (function,) = functions.values()
    assert function.get_concrete_function().function_def.attr["_XlaMustCompile"].b
    model.jit_compile = False
    assert predict_probabilities(model, images, batch_size=4)[:, 1:] == pytest.approx(expected, abs=1e-6)
    assert [jit for _, jit in functions] == [True, False]


@pytest.mark.parametrize(("length", "most", "filled"), [(1, 64, 1), (3, 64, 4), (33, 48, 48), (48, 48, 48), (5, 5, 5)])
def test_filling_up(length, most, filled):
    images = draw(length, 2, 2, 1)
    padded = pad_batch(images, most=most)
    assert len(padded) == filled
    assert np.array_equal(padded[:length], images)
    assert (padded[length:] == images[-1]).all()


def test_threads_that_begin_together(counted):
    model, layer = counted
    answers, barrier = {}, threading.Barrier(8)

    def ask(number):
        barrier.wait()
        images = np.full((3, 6, 6, 1), 5 * number, np.uint8)
        answers[number] = [predict_probabilities(model, images, batch_size=2)[:, 1] for _ in range(10)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: float(np.ptp(np.array(found))) for number, found in answers.items()} == dict.fromkeys(range(8), 0.0)
    assert [answers[number][0][0] for number in range(8)] == pytest.approx(np.arange(8) * 5 / 255, abs=1e-6)
    assert layer.shapes == [(None, 6, 6, 1)]


def test_a_model_that_nobody_holds_is_freed():
    model = make_model()
    predict_probabilities(model, draw(2, 32, 32, 1), batch_size=2)
    held = weakref.ref(model)
    assert held() in predict._PROGRAMS
    del model
    keras.backend.clear_session()
    gc.collect()
    assert held() is None
