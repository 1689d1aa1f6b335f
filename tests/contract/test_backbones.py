"""Every backbone of the table passes this battery: register one, and it is tested."""

import keras
import numpy as np
import pytest

from dlfer.config import names
from dlfer.config.schema import ModelConfig
from dlfer.errors import TransferError
from dlfer.model.backbones import BACKBONES, _load_keras_imagenet, build_backbone
from dlfer.model.transfer import build_transfer_network

SMALL = ("efficientnet_b0", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "efficientnet_nano")
LARGE = tuple(name for name in BACKBONES if name not in SMALL)


def test_table_has_the_names_of_the_schema():
    assert tuple(BACKBONES) == names.BACKBONES


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_backbone(name):
    spec = BACKBONES[name]
    network = build_transfer_network(ModelConfig(backbone=name), num_labels=7, image_size=32, channels=1)
    assert network.backbone.count_params() == spec.num_parameters_without_top
    paths = [weight.path for weight in network.backbone.weights]
    assert len(set(paths)) == len(paths)
    # uint8 of any size; a batch gives what its images give one by one.
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 1)).astype(np.uint8)
    together = network.model.predict(images, verbose=0)
    alone = np.concatenate([network.model.predict(image[None], verbose=0) for image in images])
    assert together.shape == (3, 7)
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(together, alone, atol=1e-5)
    keras.backend.clear_session()


@pytest.mark.parametrize("name", ["efficientnet_b0", pytest.param("efficientnet_b3", marks=pytest.mark.slow)])
def test_backbone_and_preprocessing_equal_keras_with_imagenet_weights(name, tmp_path, monkeypatch):
    """Keras builds an extra rescaling for "imagenet"; ours must be the same function all the same.

    The published file cannot be had without a network: one of the same form, with random weights and
    the published normalisation, stands for it where Keras would download it.
    """
    file = write_published_form(name, tmp_path / "weights.h5")
    monkeypatch.setattr("keras.src.applications.efficientnet.file_utils.get_file", lambda *_, **__: str(file))
    application = application_of(name)(weights="imagenet", include_top=False, input_shape=(64, 64, 3))
    assert sum(isinstance(layer, keras.layers.Rescaling) for layer in application.layers) == 2
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    expected = np.asarray(application(images.astype(np.float32)))
    for weights_file in (None, str(file)):
        network = build_transfer_network(ModelConfig(backbone=name), num_labels=7, image_size=64, channels=3)
        _load_keras_imagenet(BACKBONES[name], network.backbone, weights_file)
        found = np.asarray(network.backbone(network.face_input(images)))
        assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    keras.backend.clear_session()


def test_a_file_with_another_normalisation_is_refused(tmp_path):
    file = write_published_form("efficientnet_b0", tmp_path / "weights.h5", variance=(1.0, 1.0, 1.0))
    with pytest.raises(TransferError, match="another function"):
        _load_keras_imagenet(BACKBONES["efficientnet_b0"], build_backbone("efficientnet_b0"), str(file))


def application_of(name: str):
    return getattr(keras.applications, "EfficientNet" + name.rpartition("_")[2].upper())


def write_published_form(name: str, path, variance=(0.229, 0.224, 0.225)):
    """Write Keras' legacy .h5 of an EfficientNet without top, as the published files are."""
    import h5py
    from keras.src.legacy.saving import legacy_h5_format

    application = application_of(name)(weights=None, include_top=False, input_shape=(None, None, 3))
    rng = np.random.default_rng(1)
    for weight in application.weights:
        if weight.path.endswith(("moving_variance", "gamma")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    normalization = next(layer for layer in application.layers if isinstance(layer, keras.layers.Normalization))
    normalization.set_weights([mean, np.array(variance, np.float32), np.array(0, np.int32)])
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, application)
    return path
