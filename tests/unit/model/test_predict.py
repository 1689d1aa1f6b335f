"""Prediction by compiled functions: Keras' own answers, few programs, and the weights as they are now."""

from __future__ import annotations

import gc
import threading
import weakref

import keras
import numpy as np
import pytest

from dlfer.config import names
from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.errors import ModelError
from dlfer.model import predict
from dlfer.model.predict import MAX_SIZES, VIEWS, pad_batch, predict_probabilities, predict_views
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
@pytest.mark.parametrize("crop", [0.8, pytest.param(None, marks=pytest.mark.slow)])
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
    for side in range(2, 2 + 3 * MAX_SIZES):
        images = np.full((2, side, side + 1, 1), 51, np.uint8)
        assert predict_probabilities(model, images, batch_size=2)[:, 1] == pytest.approx(0.2)
    assert len(layer.shapes) == MAX_SIZES + 1


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


@pytest.mark.slow
def test_a_model_that_nobody_holds_is_freed():
    model = make_model()
    predict_probabilities(model, draw(2, 32, 32, 1), batch_size=2)
    held = weakref.ref(model)
    assert held() in predict._PROGRAMS
    del model
    keras.backend.clear_session()
    gc.collect()
    assert held() is None


class FakeClassifier:
    """Answers by the brightness of the left half, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []
        self.batch_sizes: set[int] = set()

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
        self.shown.append(images)
        self.batch_sizes.add(batch_size)
        share = images[:, :, : images.shape[2] // 2].reshape(len(images), -1).mean(axis=1) / 255
        return np.stack([share, 1 - share], axis=1).astype(np.float32)


def draw_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_table_has_the_names_of_the_schema():
    assert tuple(VIEWS) == names.VIEWS


def test_mirror_is_the_mean_of_the_image_and_its_flip():
    images, classifier = draw_images(5, 20, 20, 1), FakeClassifier()
    found = predict_views(classifier, images, "mirror", batch_size=7)
    expected = (classifier.predict(images) + classifier.predict(images[:, :, ::-1])) / 2
    assert np.allclose(found, expected)
    assert found.dtype == np.float32
    assert np.array_equal(classifier.shown[1], np.flip(images, axis=2))
    assert 7 in classifier.batch_sizes
    assert np.allclose(predict_views(FakeClassifier(), images[:, :, ::-1], "mirror"), found)


def test_ten_crops_are_four_corners_the_centre_and_their_flips():
    images, classifier = draw_images(2, 48, 48, 1), FakeClassifier()
    found = predict_views(classifier, images, "ten_crop")
    assert [shown.shape for shown in classifier.shown] == [(2, 43, 43, 1)] * 10
    plain, flipped = classifier.shown[::2], classifier.shown[1::2]
    assert all(np.array_equal(a, np.flip(b, axis=2)) for a, b in zip(plain, flipped, strict=True))
    corners = [images[:, :43, :43], images[:, :43, 5:], images[:, 5:, :43], images[:, 5:, 5:], images[:, 2:45, 2:45]]
    assert all(np.array_equal(a, b) for a, b in zip(plain, corners, strict=True))
    assert np.allclose(found, np.mean([FakeClassifier().predict(shown) for shown in classifier.shown], axis=0))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(2, 41, 30, 1), (2, 30, 41, 3), (1, 20, 160), (1, 48, 48)])
def test_views_of_oblong_images_are_those_of_the_square_that_is_seen(view, shape):
    """Of pixels that the classifier never sees there is no view; a flip is one of the square, to the pixel."""
    images, side = draw_images(*shape), min(shape[1:3])
    top, left = (shape[1] - side) // 2, (shape[2] - side) // 2
    cropped, squares = FakeClassifier(), FakeClassifier()
    found = predict_views(cropped, images, view)
    expected = predict_views(squares, images[:, top : top + side, left : left + side], view)
    assert np.array_equal(found, expected)
    padded, whole = FakeClassifier(), FakeClassifier()
    padded.aspect = "pad"
    above, before = ((max(shape[1:3]) - length) // 2 for length in shape[1:3])
    rows = np.clip(np.arange(max(shape[1:3])) - above, 0, shape[1] - 1)
    columns = np.clip(np.arange(max(shape[1:3])) - before, 0, shape[2] - 1)
    expected = predict_views(whole, images[:, rows][:, :, columns], view)
    assert np.array_equal(predict_views(padded, images, view), expected)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 24, 3), (4, 48, 48, 1)])
def test_rows_sum_to_one_for_images_of_any_form(view, shape):
    found = predict_views(FakeClassifier(), draw_images(*shape), view)
    assert found.shape == (shape[0], 2)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-6)


def test_unknown_views_are_refused():
    with pytest.raises(ModelError, match="found 'rotate', expected one of mirror, ten_crop"):
        predict_views(FakeClassifier(), draw_images(1, 8, 8), "rotate")


@pytest.mark.parametrize("view", VIEWS)
def test_a_real_classifier_takes_its_views(view):
    import keras

    from dlfer.config.sections import ModelConfig
    from dlfer.model.classifier import TransferClassifier
    from dlfer.model.stage_network import build_transfer_network

    keras.utils.set_random_seed(0)
    config = ModelConfig(backbone="efficientnet_nano")
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    classifier = TransferClassifier(network, ("a", "b", "c"), config=config, channels=1)
    images = draw_images(3, 48, 48, 1)
    found = predict_views(classifier, images, view)
    assert found.shape == (3, 3)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5)
    flipped = predict_views(classifier, images[:, :, ::-1], view)
    assert np.allclose(flipped, found, atol=2e-3)


@pytest.mark.parametrize("size", [48, 45])
def test_a_classifier_of_parts_sees_ten_parts_of_its_own_size(size):
    """What its network is given, after its own central crop, are the ten crops themselves, to the pixel."""
    from dlfer.model.face_input import crop_centre

    images, classifier = draw_images(2, size, size, 1), FakeClassifier()
    classifier.crop = 0.8333
    predict_views(classifier, images, "ten_crop")
    seen = [np.asarray(crop_centre(shown, 0.8333)) for shown in classifier.shown]
    side = round(0.8333 * size)
    far, middle = size - side, (size - side) // 2
    places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    expected = [images[:, top : top + side, left : left + side] for top, left in places]
    assert all(shown.shape == images.shape for shown in classifier.shown)
    assert len(seen) == 10
    assert all(np.array_equal(a, b) for a, b in zip(seen[::2], expected, strict=True))
    assert all(np.array_equal(a, b[:, :, ::-1]) for a, b in zip(seen[1::2], expected, strict=True))
    assert len({shown.tobytes() for shown in classifier.shown}) == 10
