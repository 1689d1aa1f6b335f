"""The warp and the preprocessing inside the network, against scipy and Keras."""

import keras
import numpy as np
import pytest
from scipy import ndimage

from dlfer.config.schema import AugmentConfig
from dlfer.data.augment import draw_augmentation, draw_warps
from dlfer.data.images import make_square
from dlfer.model.backbone_spec import EFFICIENTNET_INPUT, Preprocessing
from dlfer.model.face_input import FaceInput, resize_images, warp_images

IDENTITY = np.tile(np.float32([[1, 0, 0, 0, 1, 0]]), (3, 1))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3)).astype(np.uint8)


def warp_by_scipy(images: np.ndarray, warps: np.ndarray, size: int, mode: str) -> np.ndarray:
    """The same map by scipy's bilinear sampling at the same points."""
    line = (np.arange(size) + 0.5) * 2 / size - 1
    across, down = np.meshgrid(line, line)
    height, width = images.shape[1:3]
    warped = np.zeros((len(images), size, size, images.shape[-1]))
    for i, (a, b, c, d, e, f) in enumerate(warps.astype(np.float64)):
        x = (a * across + b * down + c + 1) * width / 2 - 0.5
        y = (d * across + e * down + f + 1) * height / 2 - 0.5
        for channel in range(images.shape[-1]):
            source = images[i, ..., channel].astype(np.float64)
            warped[i, ..., channel] = ndimage.map_coordinates(source, [y, x], order=1, mode=mode)
    return warped


@pytest.mark.parametrize(("fill", "mode"), [("nearest", "nearest"), ("reflect", "reflect")])
@pytest.mark.parametrize("channels", [1, 3])
def test_warp_equals_scipy(images, fill, mode, channels):
    images = images[..., :channels]
    augment = AugmentConfig(rotation=30.0, zoom=0.3, shift=0.2, mirror=0.5)
    warps = draw_warps(augment, len(images), rng=np.random.default_rng(1)).astype(np.float32)
    found = np.asarray(warp_images(images, warps, 64, fill=fill))
    assert np.abs(found - warp_by_scipy(images, warps, 64, mode)).max() < 0.01


def test_constant_fill_is_black_outside_and_the_same_inside(images):
    warps = draw_warps(AugmentConfig(shift=0.4), len(images), rng=np.random.default_rng(2)).astype(np.float32)
    black = np.asarray(warp_images(images + 1, warps, 48, fill="constant"))
    edge = np.asarray(warp_images(images + 1, warps, 48, fill="nearest"))
    is_black = (black == 0).all(axis=-1)
    assert 0.05 < is_black.mean() < 0.8
    assert np.array_equal(black[~is_black], edge[~is_black])


def test_identity_warp_equals_the_resize_of_inference(images):
    layer = FaceInput(64, EFFICIENTNET_INPUT.as_dict())
    warped = np.asarray(layer.augment(images, {"warp": IDENTITY}, fill="nearest"))
    assert np.abs(warped - np.asarray(layer.resize(images))).max() < 1e-3


def test_mirror_turns_the_image_around(images):
    warps = draw_warps(AugmentConfig(mirror=1.0), len(images), rng=np.random.default_rng(0)).astype(np.float32)
    square = images[:, :40, :40]
    assert np.abs(np.asarray(warp_images(square, warps, 40)) - square[:, :, ::-1]).max() < 1e-3


def test_rotation_keeps_circles_round():
    """A quarter turn of a square image is numpy's rot90, exactly."""
    image = np.random.default_rng(3).integers(0, 256, (1, 32, 32, 1)).astype(np.uint8)
    quarter = np.float32([[0, -1, 0, 1, 0, 0]])
    found = np.asarray(warp_images(image, quarter, 32))[0, ..., 0]
    assert np.abs(found - np.rot90(image[0, ..., 0], k=1)).max() < 1e-2 or (
        np.abs(found - np.rot90(image[0, ..., 0], k=-1)).max() < 1e-2
    )


def test_large_images_are_shrunk_without_aliasing():
    """One-pixel stripes have no detail left at a quarter of the size; sampling them directly would."""
    stripes = np.zeros((1, 256, 256, 1), np.uint8)
    stripes[:, :, ::2] = 255
    layer = FaceInput(64, EFFICIENTNET_INPUT.as_dict())
    warped = np.asarray(layer.augment(stripes, {"warp": IDENTITY[:1]}, fill="nearest"))
    assert np.abs(warped[:, 4:-4, 4:-4] - 127.5).max() < 3


def test_preprocessing_is_scale_mean_std_and_channel_order():
    pixels = np.random.default_rng(4).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    spec = Preprocessing(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), channels="bgr")
    found = np.asarray(FaceInput(16, spec.as_dict()).preprocess(pixels))
    assert np.allclose(found, (pixels[..., ::-1] / 255 - spec.mean) / spec.std, atol=1e-5)


def test_imagenet_preprocessing_equals_torch_mode_of_keras():
    pixels = np.random.default_rng(4).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    expected = keras.applications.imagenet_utils.preprocess_input(pixels.copy(), mode="torch")
    found = np.asarray(FaceInput(16, EFFICIENTNET_INPUT.as_dict()).preprocess(pixels))
    assert np.allclose(found, expected, atol=1e-5)


def test_grey_becomes_three_equal_channels():
    layer = FaceInput(16, Preprocessing(scale=1.0).as_dict())
    grey = np.random.default_rng(5).integers(0, 256, (2, 16, 16, 1)).astype(np.uint8)
    assert np.array_equal(np.asarray(layer(grey)), grey.repeat(3, axis=-1).astype(np.float32))


def test_mixup_and_cutmix_mix_pixels_as_targets(images):
    """With one-coloured images a mixed pixel mean must equal the mixed target."""
    ramp = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 1), np.uint8)
    from dlfer.data.augment import mix_targets

    layer = FaceInput(32, Preprocessing().as_dict())
    for augment in (AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)):
        drawn = draw_augmentation(augment, 8, image_size=32, rng=np.random.default_rng(6))
        means = np.asarray(layer.augment(ramp, drawn, fill="nearest")).mean(axis=(1, 2, 3))
        targets = mix_targets(np.eye(8, dtype=np.float32), drawn, image_size=32)
        assert np.allclose(means, targets @ np.arange(8), atol=1e-4)
        assert not np.allclose(means, np.arange(8))


def test_erasing_blanks_a_rectangle_with_the_mean(images):
    drawn = draw_augmentation(AugmentConfig(erasing=1.0), 3, image_size=48, rng=np.random.default_rng(7))
    layer = FaceInput(48, Preprocessing().as_dict())
    plain = np.asarray(layer.resize(images))
    erased = np.asarray(layer.augment(images, drawn, fill="nearest"))
    changed = (erased != plain).any(axis=-1)
    assert np.all(changed.mean(axis=(1, 2)) > 0.01)
    assert np.all(changed.mean(axis=(1, 2)) < 0.25)


def test_layer_is_saved_with_its_preprocessing():
    layer = FaceInput(32, EFFICIENTNET_INPUT.as_dict(), name="face_input")
    again = FaceInput.from_config(layer.get_config())
    image = np.random.default_rng(8).integers(0, 256, (1, 20, 20, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(layer(image)), np.asarray(again(image)))


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 24, 24, 1), 32), ((2, 48, 48, 1), 30), ((1, 100, 75, 3), 64), ((1, 90, 31, 3), 40)]
)
def test_resize_is_that_of_keras(shape, size):
    images = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    expected = keras.ops.image.resize(images, (size, size), interpolation="bilinear", antialias=True)
    found = resize_images(keras.ops.convert_to_tensor(images), size)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=0.01)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others compile everything by XLA")
@pytest.mark.parametrize("side", [20, 48])
def test_the_resize_compiles_by_xla(side):
    """Networks are compiled on a GPU; Keras' antialiased resize has no XLA kernel in TensorFlow."""
    import tensorflow as tf

    images = tf.constant(np.random.default_rng(0).uniform(0, 255, (2, side, side, 1)).astype(np.float32))
    compiled = tf.function(lambda x: resize_images(x, 32), jit_compile=True)(images)
    np.testing.assert_allclose(compiled, resize_images(images, 32), atol=1e-3)


def test_drawn_parts_are_the_very_pixels(images):
    """40 of 48 pixels into 40 pixels, in any place and mirrored or not: no pixel is interpolated."""
    images = np.random.default_rng(9).integers(0, 256, (200, 48, 48, 1)).astype(np.uint8)
    layer = FaceInput(40, Preprocessing().as_dict(), crop=0.8333)
    drawn = draw_augmentation(
        AugmentConfig(mirror=0.5), 200, image_size=40, rng=np.random.default_rng(3), crop=0.8333, native=48
    )
    found = np.asarray(layer.augment(images, drawn, fill="constant"))[..., 0]
    places = set()
    for image, part in zip(images[..., 0], found, strict=True):
        fitting = [
            (top, left, sign)
            for top in range(9)
            for left in range(9)
            for sign in (1, -1)
            if np.array_equal(image[top : top + 40, left : left + 40][:, ::sign], part)
        ]
        assert len(fitting) == 1
        places.add(fitting[0])
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(9))
    assert {sign for _, _, sign in places} == {1, -1}


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_parts_of_oblong_images_warped_equal_scipy(images, aspect):
    """A part of the square, turned and enlarged: the same map by scipy, in pixels of the image, with one scale."""
    augment = AugmentConfig(rotation=20.0, zoom=0.2, shift=0.1)
    plain = draw_warps(augment, 3, rng=np.random.default_rng(4))
    drawn = draw_augmentation(
        augment, 3, image_size=64, rng=np.random.default_rng(4), crop=0.75, native={"crop": 40, "pad": 48}[aspect]
    )
    layer = FaceInput(64, Preprocessing().as_dict(), crop=0.75, aspect=aspect)
    found = np.asarray(layer.augment(images, drawn, fill="nearest"))
    # Images are 48 x 40: of 40 x 40 the first column is 4; of 48 x 48 the first row is -4.
    half, moves, first = {"crop": (15, 11, (0, 4)), "pad": (18, 13, (-4, 0))}[aspect]
    best = np.full(3, np.inf)
    for top in range(first[0], first[0] + moves):
        for left in range(first[1], first[1] + moves):
            # The map of the part alone, sampled in the whole image: the part's centre and half sides in pixels.
            line = (np.arange(64) + 0.5) * 2 / 64 - 1
            across, down = np.meshgrid(line, line)
            for i, (a, b, c, d, e, f) in enumerate(plain):
                x = (a * across + b * down + c) * half + left + half - 0.5
                y = (d * across + e * down + f) * half + top + half - 0.5
                if aspect == "crop":
                    x = x.clip(4, 43)
                sampled = ndimage.map_coordinates(images[i, ..., 0].astype(float), [y, x], order=1, mode="nearest")
                best[i] = min(best[i], np.abs(found[i, ..., 0] - sampled).max())
    assert best.max() < 0.05


@pytest.mark.parametrize("shape", [(2, 48, 48, 1), (2, 41, 53, 3)])
def test_the_central_part_is_what_is_predicted_on(shape):
    pixels = np.random.default_rng(5).integers(0, 256, shape).astype(np.uint8)
    square = min(shape[1:3])
    side = round(0.8333 * square)
    top, left = ((length - square) // 2 + (square - side) // 2 for length in shape[1:3])
    part = pixels[:, top : top + side, left : left + side]
    layer = FaceInput(40, EFFICIENTNET_INPUT.as_dict(), crop=0.8333)
    assert np.array_equal(layer(pixels), FaceInput(40, EFFICIENTNET_INPUT.as_dict())(part))
    assert np.array_equal(FaceInput.from_config(layer.get_config())(pixels), layer(pixels))


SHAPES = [(96, 64), (64, 96), (20, 160), (160, 20), (61, 47), (47, 62), (1, 9)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_oblong_image_is_seen_as_numpy_crops_or_pads_it(shape, channels):
    pixels = np.random.default_rng(7).integers(0, 256, (2, *shape, channels)).astype(np.uint8)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    cropped = pixels[:, top : top + side, left : left + side]
    margins = [((max(shape) - n) // 2, (max(shape) - n) - (max(shape) - n) // 2) for n in shape]
    padded = np.pad(pixels, ((0, 0), *margins, (0, 0)), mode="edge")
    plain = FaceInput(32, EFFICIENTNET_INPUT.as_dict())
    for aspect, square in (("crop", cropped), ("pad", padded)):
        layer = FaceInput(32, EFFICIENTNET_INPUT.as_dict(), aspect=aspect)
        assert np.array_equal(layer(pixels), plain(square))
        assert np.array_equal(FaceInput.from_config(layer.get_config())(pixels), layer(pixels))
        # The array path of the data, which stores squares.
        assert np.array_equal(make_square(pixels, aspect), square)


@pytest.mark.parametrize("fill", ["nearest", "reflect", "constant"])
@pytest.mark.parametrize("shape", [(3, 48, 48, 1), (3, 100, 100, 3)])
def test_how_images_become_squares_is_nothing_to_squares(shape, fill):
    pixels = np.random.default_rng(8).integers(0, 256, shape).astype(np.uint8)
    drawn = draw_augmentation(
        AugmentConfig(rotation=20.0, shift=0.2, mirror=0.5), 3, image_size=40, rng=np.random.default_rng(0)
    )
    crop, pad = (FaceInput(40, EFFICIENTNET_INPUT.as_dict(), aspect=aspect) for aspect in ("crop", "pad"))
    assert np.array_equal(crop(pixels), pad(pixels))
    assert np.array_equal(crop.augment(pixels, drawn, fill=fill), pad.augment(pixels, drawn, fill=fill))
    assert np.array_equal(make_square(pixels, "crop"), pixels)
    assert np.array_equal(make_square(pixels, "pad"), pixels)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="sizes are always known elsewhere")
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_oblong_images_whose_size_is_not_known_when_the_graph_is_built(aspect):
    import tensorflow as tf

    layer = FaceInput(32, Preprocessing().as_dict(), aspect=aspect)
    free = tf.function(layer.call, input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)])
    for shape in SHAPES[:-1]:
        pixels = np.random.default_rng(6).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
        np.testing.assert_allclose(tf.function(layer.call, jit_compile=True)(pixels), layer(pixels), atol=1e-3)
        np.testing.assert_allclose(free(pixels), layer(pixels), atol=0.01)
    pixels = np.random.default_rng(6).integers(0, 256, (2, 61, 47, 3)).astype(np.uint8)
    narrow = tf.function(layer.call, input_signature=[tf.TensorSpec([None, None, 47, 3], tf.uint8)])
    np.testing.assert_allclose(narrow(pixels), layer(pixels), atol=0.01)


def test_a_large_image_is_shrunk_before_a_part_of_it_is_taken():
    stripes = np.zeros((1, 200, 200, 1), np.uint8)
    stripes[:, :, ::2] = 255
    drawn = draw_augmentation(AugmentConfig(), 1, image_size=32, rng=np.random.default_rng(0), crop=0.8, native=200)
    found = np.asarray(FaceInput(32, Preprocessing().as_dict(), crop=0.8).augment(stripes, drawn, fill="nearest"))
    assert np.abs(found - 127.5).max() < 8


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="sizes are always known elsewhere")
def test_a_part_of_images_whose_size_is_not_known_when_the_graph_is_built():
    import tensorflow as tf

    layer = FaceInput(40, Preprocessing().as_dict(), crop=0.8333)
    function = tf.function(layer.call, input_signature=[tf.TensorSpec([None, None, None, 1], tf.uint8)])
    for size in (48, 61):
        pixels = np.random.default_rng(6).integers(0, 256, (2, size, size, 1)).astype(np.uint8)
        np.testing.assert_allclose(function(pixels), layer(pixels), atol=0.01)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others compile everything by XLA")
@pytest.mark.parametrize("fill", ["nearest", "reflect", "constant"])
@pytest.mark.parametrize("channels", [1, 3])
def test_training_on_the_cpu_has_one_kernel_with_the_same_pixels(images, fill, channels):
    import tensorflow as tf

    augment = AugmentConfig(
        rotation=30.0, zoom=0.3, shift=0.3, mirror=0.5, brightness=0.2, contrast=0.2, erasing=0.5, mixup=0.2
    )
    layer = FaceInput(64, Preprocessing(scale=1.0, mean=(1.0, 2.0, 3.0), channels="bgr").as_dict())
    drawn = draw_augmentation(augment, len(images), image_size=64, rng=np.random.default_rng(1))
    images = images[..., :channels]
    prepare = tf.function(lambda pixels, changes: layer.prepare(pixels, changes, fill=fill))
    expected = layer.preprocess(layer.augment(images, drawn, fill=fill))
    # Rounded otherwise, positions move by a part of 1e-4 pixels, of grey levels up to 255 apart.
    np.testing.assert_allclose(prepare(images, drawn), expected, atol=0.03)
    if not tf.config.list_logical_devices("GPU"):
        calls = [
            operation
            for operation in prepare.get_concrete_function(images, drawn).graph.get_operations()
            if operation.type in ("PartitionedCall", "StatefulPartitionedCall")
        ]
        assert [operation.get_attr("_XlaMustCompile") for operation in calls] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others compile everything by XLA")
def test_drawn_parts_are_the_very_pixels_in_one_kernel_too():
    import tensorflow as tf

    images = np.random.default_rng(9).integers(0, 256, (50, 48, 48, 1)).astype(np.uint8)
    layer = FaceInput(40, Preprocessing(scale=1.0).as_dict(), crop=0.8333)
    drawn = draw_augmentation(
        AugmentConfig(mirror=0.5), 50, image_size=40, rng=np.random.default_rng(3), crop=0.8333, native=48
    )
    found = tf.function(lambda pixels, changes: layer.prepare(pixels, changes, fill="constant"))(images, drawn)
    assert np.array_equal(found, layer.prepare(images, drawn, fill="constant"))
