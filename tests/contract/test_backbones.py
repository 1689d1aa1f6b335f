"""Every backbone of the table passes this battery: register one, and it is tested."""

import re
import sys

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from dlfer.config import names
from dlfer.config.schema import FreezeConfig
from dlfer.config.sections import ModelConfig
from dlfer.errors import ModelError, TransferError
from dlfer.model.backbones import BACKBONES, build_backbone, load_published_weights
from dlfer.model.face_input import FaceInput
from dlfer.model.stage_network import build_transfer_network
from dlfer.train.plan import set_trainable

# In keras.applications, features without top, parameters with the top of 1000 classes as Keras publishes them.
APPLICATIONS = {
    "efficientnet_b0": ("EfficientNetB0", 1280, 5_330_571),
    "efficientnet_b1": ("EfficientNetB1", 1280, 7_856_239),
    "efficientnet_b2": ("EfficientNetB2", 1408, 9_177_569),
    "efficientnet_b3": ("EfficientNetB3", 1536, 12_320_535),
    "efficientnet_b4": ("EfficientNetB4", 1792, 19_466_823),
    "efficientnet_b5": ("EfficientNetB5", 2048, 30_562_527),
    "efficientnet_b6": ("EfficientNetB6", 2304, 43_265_143),
    "efficientnet_b7": ("EfficientNetB7", 2560, 66_658_687),
    "efficientnet_v2_b0": ("EfficientNetV2B0", 1280, 7_200_312),
    "efficientnet_v2_b1": ("EfficientNetV2B1", 1280, 8_212_124),
    "efficientnet_v2_b2": ("EfficientNetV2B2", 1408, 10_178_374),
    "efficientnet_v2_b3": ("EfficientNetV2B3", 1536, 14_467_622),
    "efficientnet_v2_s": ("EfficientNetV2S", 1280, 21_612_360),
    "resnet50": ("ResNet50", 2048, 25_636_712),
    "resnet101": ("ResNet101", 2048, 44_707_176),
    "resnet152": ("ResNet152", 2048, 60_419_944),
    "vgg16": ("VGG16", 512, 138_357_544),
    "vgg19": ("VGG19", 512, 143_667_240),
    "inception_v3": ("InceptionV3", 2048, 23_851_784),
    "inception_resnet_v2": ("InceptionResNetV2", 1536, 55_873_736),
    "xception": ("Xception", 2048, 22_910_480),
    "mobilenet": ("MobileNet", 1024, 4_253_864),
    "mobilenet_v2": ("MobileNetV2", 1280, 3_538_984),
    "densenet121": ("DenseNet121", 1024, 8_062_504),
    "convnext_tiny": ("ConvNeXtTiny", 768, 28_589_128),
}
# Small ones, and the network of the mission; `make test-slow` has all.
QUICK_TO_BUILD = {
    "efficientnet_b3",
    "efficientnet_lite0",
    "efficientnet_nano",
    "mobilenet_v2",
    "resnet18",
    "resnet_nano",
}
QUICK_TO_COMPARE = {"mobilenet"}
QUICK_TO_PREDICT = {"efficientnet_nano", "resnet18", "resnet_nano"}
# Sizes of EfficientNet are odd somewhere on the way down from 75 pixels, where padding goes wrong if anywhere.
COMPARED_SIZE = 75
# Keras' MobileNet pads odd sizes on the right alone, unlike the published network: a size without odd ones.
COMPARED_SIZES = {"mobilenet": 64}


def mark_slow(all_names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in all_names]


@pytest.fixture(scope="module", params=mark_slow(BACKBONES, QUICK_TO_BUILD))
def backbone(request):
    # Networks that were built before must not count up the names of this one.
    for layer in (keras.layers.Conv2D(1, 1), keras.layers.BatchNormalization(), keras.layers.LayerNormalization()):
        assert layer.name
    built = build_backbone(request.param)
    yield request.param, built
    keras.backend.clear_session()


def test_table_has_the_names_of_the_schema():
    assert tuple(BACKBONES) == names.BACKBONES


def test_every_published_network_is_compared():
    published = {name for name, spec in BACKBONES.items() if spec.weights}
    assert published - APPLICATIONS.keys() == {"efficientnet_lite2"}
    assert APPLICATIONS.keys() <= published


@pytest.mark.parametrize("name", APPLICATIONS)
def test_parameters_are_those_that_keras_publishes_less_the_top(name):
    _, features, num_parameters = APPLICATIONS[name]
    top = (features + 1) * 1000
    if name.startswith("vgg"):
        top = (7 * 7 * 512 + 1) * 4096 + 4097 * 4096 + 4097 * 1000
    # Mean, variance and count of the input stage that is cut off.
    input_stage = 7 if re.fullmatch(r"efficientnet_b\d", name) else 0
    assert BACKBONES[name].num_parameters_without_top == num_parameters - top - input_stage


def test_network_has_the_recorded_parameters_and_names_of_its_own(backbone):
    name, built = backbone
    assert built.name == "backbone"
    assert built.count_params() == BACKBONES[name].num_parameters_without_top
    paths = [weight.path for weight in built.weights]
    assert len(set(paths)) == len(paths)
    if name in APPLICATIONS:
        assert built.output.shape[-1] == APPLICATIONS[name][1]


def test_names_do_not_depend_on_what_was_built_before(backbone):
    """Weights are carried over by name: Keras' counted names (conv2d_94) must start anew in each network."""
    _, built = backbone
    counted = {}
    for layer in built.layers:
        match = re.fullmatch(r"(.*?)(?:_(\d+))?", layer.name)
        if layer.weights and match[1] in ("conv2d", "batch_normalization", "layer_normalization"):
            counted.setdefault(match[1], []).append(int(match[2] or 0))
    for kind, indices in counted.items():
        assert 0 in indices, kind
        assert len(set(indices)) == len(indices)
        assert max(indices) < len([layer for layer in built.layers if layer.name.startswith(kind)])


def test_each_layer_can_be_made_again_from_its_configuration(backbone):
    """A branch of a hybrid and the copies that exporters make are built from these."""
    _, built = backbone
    for layer in built.layers:
        again = type(layer).from_config(layer.get_config())
        assert again.get_config() == layer.get_config(), layer.name


def test_a_fraction_of_the_layers_can_be_frozen(backbone):
    """Of every network, whatever networks it has within it."""
    _, built = backbone
    try:
        set_trainable(built, FreezeConfig(layers=0.5), head_only=False)
        layers = [layer for layer in built.layers if layer.weights]
        frozen = [layer for layer in layers if not layer.trainable_weights]
        assert len(frozen) >= round(0.5 * len(layers)) > 0
        assert built.trainable_weights
        set_trainable(built, FreezeConfig(layers=1.0), head_only=False)
        assert built.trainable_weights == []
    finally:
        set_trainable(built, FreezeConfig(), head_only=False)


def test_stages_end_each_resolution(backbone):
    name, built = backbone
    spec = BACKBONES[name]
    stages = keras.Model(built.input, [built.get_layer(stage).output for stage in spec.stages])
    size = max(spec.min_image_size, 160)
    shapes = stages.compute_output_shape((1, size, size, 3))
    sides = [shape[1] for shape in shapes]
    assert sides == sorted(set(sides), reverse=True)
    assert sides[0] > size / 5
    assert tuple(shapes[-1]) == tuple(built.compute_output_shape((1, size, size, 3)))
    for layer in spec.auxiliary:
        assert built.get_layer(layer).output.shape[-1]


def test_min_image_size_is_the_smallest(backbone):
    name, built = backbone
    spec = BACKBONES[name]
    assert spec.min_image_size <= spec.image_size
    assert compute_side(built, spec.image_size) > 1 or name == "efficientnet_nano"
    assert compute_side(built, spec.min_image_size) >= 1
    assert compute_side(built, spec.min_image_size - 1) == 0


def test_resnets_have_a_small_stem():
    able = {name for name, spec in BACKBONES.items() if "small" in spec.stems}
    assert able == {"resnet18", "resnet34", "resnet_nano"}
    built = build_backbone("resnet_nano", stem="small")
    assert built.compute_output_shape((1, 48, 48, 3)) == (1, 6, 6, 64)


@pytest.mark.parametrize("name", mark_slow(BACKBONES, QUICK_TO_PREDICT))
def test_batch_gives_what_its_images_give_one_by_one(name):
    size = max(32, BACKBONES[name].min_image_size)
    network = build_transfer_network(ModelConfig(backbone=name), num_labels=7, image_size=size, channels=1)
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 1)).astype(np.uint8)
    together = np.asarray(network.model(images, training=False))
    alone = np.concatenate([np.asarray(network.model(image[None], training=False)) for image in images])
    assert together.shape == (3, 7)
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(together, alone, atol=1e-5)
    keras.backend.clear_session()


@pytest.mark.parametrize("name", [name for name in APPLICATIONS if not name.startswith(("efficientnet", "convnext"))])
def test_preprocessing_is_that_of_keras(name):
    """The EfficientNets and ConvNeXt have theirs in the network: see the comparison of features."""
    make = getattr(keras.applications, APPLICATIONS[name][0])
    images = draw_images(8)
    expected = sys.modules[make.__module__].preprocess_input(images.astype(np.float32))
    found = np.asarray(FaceInput(8, BACKBONES[name].preprocessing.as_dict())(images))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("backbone", mark_slow(APPLICATIONS, QUICK_TO_COMPARE), indirect=True)
def test_features_are_those_of_keras_with_published_weights(backbone, tmp_path, monkeypatch):
    """Published files cannot be had without a network: one of the same form, with random weights, stands for it."""
    name, built = backbone
    application = APPLICATIONS[name][0]
    size = COMPARED_SIZES.get(name, COMPARED_SIZE)
    images = draw_images(size)
    file = tmp_path / "weights_notop.h5"
    expected = write_published_form(application, file, images, monkeypatch)
    assert load_published_weights(name, built, str(file)).endswith(str(file))
    pixels = FaceInput(size, BACKBONES[name].preprocessing.as_dict())(images)
    found = np.asarray(built(pixels))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    # And they survive being saved.
    built.save_weights(tmp_path / "backbone.weights.h5")
    for weight in built.weights:
        weight.assign(np.zeros(weight.shape, "float32"))
    assert np.abs(np.asarray(built(pixels))).max() < 1e-6 * np.abs(found).max()
    built.load_weights(tmp_path / "backbone.weights.h5")
    assert np.array_equal(np.asarray(built(pixels)), found)


def test_published_weights_are_downloaded_where_no_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "weights_notop.h5"
    images = draw_images(COMPARED_SIZE)
    expected = write_published_form("VGG16", file, images, monkeypatch)
    asked = []
    monkeypatch.setattr(
        "keras.src.applications.vgg16.file_utils.get_file", lambda *names, **_: asked.append(names) or str(file)
    )
    built = build_backbone("vgg16")
    assert load_published_weights("vgg16", built) == "ImageNet weights of vgg16, downloaded by Keras"
    assert "notop" in asked[0][0]
    found = np.asarray(built(FaceInput(COMPARED_SIZE, BACKBONES["vgg16"].preprocessing.as_dict())(images)))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_without_a_network_the_error_names_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise Exception("URL fetch failure on https://storage.googleapis.com/...")

    monkeypatch.setattr("keras.src.applications.vgg16.file_utils.get_file", fail)
    with pytest.raises(ModelError, match=r"VGG16 could not be downloaded .*pretrain\.weights_file"):
        load_published_weights("vgg16", build_backbone("vgg16"))


def test_a_file_that_is_no_such_file_is_refused(tmp_path):
    file = tmp_path / "vgg16_notop.h5"
    file.write_text("<html>not found</html>")
    built = build_backbone("vgg16")
    before = built.get_weights()[0]
    with pytest.raises(ModelError, match=r"vgg16_notop.h5: expected the HDF5 file, its first bytes are b'<html>no'"):
        load_published_weights("vgg16", built, str(file))
    with h5py.File(file, "w") as group:
        legacy_h5_format.save_weights_to_hdf5_group(group, build_backbone("resnet_nano"))
    with pytest.raises(ModelError, match=r"does not hold the weights of this network.* Expected the weights of VGG16"):
        load_published_weights("vgg16", built, str(file))
    assert np.array_equal(built.get_weights()[0], before)


def test_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "weights_notop.h5"
    write_published_form("VGG16", file, draw_images(32), monkeypatch)
    other = build_backbone("resnet_nano")
    before = other.get_weights()
    with pytest.raises(TransferError, match="layers missing"):
        load_published_weights("vgg16", other, str(file))
    assert all(np.array_equal(a, b) for a, b in zip(before, other.get_weights(), strict=True))


@pytest.mark.slow
def test_a_file_with_another_normalisation_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "weights_notop.h5"
    write_published_form("EfficientNetB0", file, draw_images(32), monkeypatch, variance=(1.0, 1.0, 1.0))
    with pytest.raises(TransferError, match="another function"):
        load_published_weights("efficientnet_b0", build_backbone("resnet_nano"), str(file))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "vgg19_bn", "googlenet"])
def test_what_is_not_published_is_said_to_be_so(name):
    with pytest.raises(ModelError, match=f"no ImageNet weights of {name} are published"):
        load_published_weights(name, build_backbone("resnet_nano"))


def test_wrong_names_are_refused():
    with pytest.raises(ModelError, match="'resnet19', expected one of"):
        build_backbone("resnet19")
    with pytest.raises(ModelError, match=r"vgg19_bn has imagenet alone.*resnet18"):
        build_backbone("vgg19_bn", stem="small")


def compute_side(network: keras.Model, size: int) -> int:
    """Return the side of the feature map, 0 where a layer finds the image too small."""
    try:
        return network.compute_output_shape((1, size, size, 3))[1]
    except ValueError:
        return 0


def draw_images(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.uint8)


def write_published_form(application, file, images, monkeypatch, variance=(0.229, 0.224, 0.225)) -> np.ndarray:
    """Write Keras' legacy .h5 of a network without top, as the published files are, and return its features.

    The features are those that Keras' own network and preprocess_input give, built for this size, with Keras'
    own way of treating published weights (EfficientNet gets one more rescaling than with random weights).
    """
    make = getattr(keras.applications, application)
    module = sys.modules[make.__module__]
    network = make(weights=None, include_top=False, input_shape=(*images.shape[1:],))
    randomise(network)
    has_input_stage = re.fullmatch(r"EfficientNetB\d", application)
    if has_input_stage:
        normalization = next(layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
        mean = np.array([0.485, 0.456, 0.406], np.float32)
        normalization.set_weights([mean, np.array(variance, np.float32), np.array(0, np.int32)])
    with h5py.File(file, "w") as group:
        legacy_h5_format.save_weights_to_hdf5_group(group, network)
    if has_input_stage:
        monkeypatch.setattr(module.file_utils, "get_file", lambda *_, **__: str(file))
        network = make(weights="imagenet", include_top=False, input_shape=images.shape[1:])
        assert sum(isinstance(layer, keras.layers.Rescaling) for layer in network.layers) == 2
    return np.asarray(network(module.preprocess_input(images.astype(np.float32))))


def randomise(network: keras.Model) -> None:
    """Give every vector of weights values of its own; narrow ones, so that no activation explodes."""
    rng = np.random.default_rng(1)
    for weight in network.weights:
        if weight.path.endswith(("moving_variance", "gamma")):
            weight.assign(rng.uniform(0.8, 1.2, weight.shape))
        elif len(weight.shape) == 1:
            weight.assign(rng.normal(0, 0.1, weight.shape))
