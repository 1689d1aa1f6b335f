"""A hybrid is one backbone to whatever carries, freezes, clones or saves it; its fusion is as its formula says."""

import keras
import numpy as np
import pytest

from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.errors import ModelError, TransferError
from dlfer.model.backbones import BACKBONES, build_backbone
from dlfer.model.hybrid import BranchAttention, build_hybrid_backbone, load_branch_weights, name_branches
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.transfer import carry_backbone, draw_probe_images, write_backbone
from dlfer.train.loop import clone_network
from dlfer.train.plan import _count_activations

UNLIKE = ("efficientnet_nano", "resnet_nano")
TWICE = ("efficientnet_nano", "efficientnet_nano")


def compute_features(network, images):
    return np.asarray(network.pooling(network.backbone(network.face_input(images), training=False)))


def make_config(branches=UNLIKE, fusion="concat", **given) -> ModelConfig:
    return ModelConfig(family="hybrid", branches=branches, fusion=fusion, **given)


def build_network(config, num_labels=7, image_size=48):
    return build_transfer_network(config, num_labels=num_labels, image_size=image_size, channels=1)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_concatenation_holds_each_branch_on_its_own_preprocessing(pooling):
    config = make_config(head=HeadConfig(pooling=pooling))
    backbone, preprocessing = build_hybrid_backbone(config)
    assert preprocessing.compute_scale_and_offset()[0].tolist() == [1, 1, 1]
    pixels = draw_probe_images(48, 3).astype(np.float32)
    together = np.asarray(backbone(pixels))
    assert together.shape[1:3] == (1, 1)
    start = 0
    for branch, name in name_branches(UNLIKE).items():
        alone = build_backbone(name)
        alone.set_weights(backbone.get_layer(branch).get_weights())
        scale, offset = BACKBONES[name].preprocessing.compute_scale_and_offset()
        maps = np.asarray(alone(pixels * scale + offset))
        pooled = maps.mean(axis=(1, 2)) if pooling == "avg" else maps.max(axis=(1, 2))
        width = pooled.shape[1]
        assert np.allclose(together[:, 0, 0, start : start + width], pooled, rtol=1e-4, atol=1e-5)
        start += width
    assert start == together.shape[-1]


def test_sum_of_equal_widths_needs_no_projection_and_is_the_sum():
    backbone, _ = build_hybrid_backbone(make_config(TWICE, "add"))
    assert not any("projection" in layer.name for layer in backbone.layers)
    pixels = draw_probe_images(32, 3).astype(np.float32)
    parts = keras.Model(
        backbone.inputs, [backbone.get_layer(f"{branch}_pooling").output for branch in name_branches(TWICE)]
    )
    first, second = (np.asarray(part) for part in parts(pixels))
    assert not np.allclose(first, second)
    assert np.allclose(np.asarray(backbone(pixels)), first + second, atol=1e-6)


def test_the_narrower_branch_is_brought_to_the_greater_width():
    backbone, _ = build_hybrid_backbone(make_config(UNLIKE, "add"))
    widths = {branch: build_backbone(name).output_shape[-1] for branch, name in name_branches(UNLIKE).items()}
    narrow = min(widths, key=widths.get)
    assert backbone.get_layer(f"{narrow}_projection").units == max(widths.values()) == backbone.output_shape[-1]
    assert sum("projection" in layer.name for layer in backbone.layers) == 1


def test_attention_is_its_formula_and_starts_as_the_mean():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(5, 1, 1, 4)).astype(np.float32) for _ in range(3)]
    layer = BranchAttention()
    assert np.allclose(np.asarray(layer(features)), np.mean(features, axis=0), atol=1e-6)
    w, b = rng.normal(size=(12, 3)), rng.normal(size=3)
    layer.set_weights([w, b])
    logits = np.concatenate(features, axis=-1) @ w + b
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = sum(weights[..., k : k + 1] * features[k] for k in range(3))
    assert np.allclose(np.asarray(layer(features)), expected, atol=1e-5)
    assert np.allclose(np.asarray(layer.compute_weights(features)), weights, atol=1e-5)


@pytest.mark.parametrize("branches", [UNLIKE, TWICE])
@pytest.mark.parametrize("fusion", ["concat", "attention"])
def test_it_is_carried_cloned_and_serialised_like_any_backbone(branches, fusion, tmp_path):
    network = build_network(make_config(branches, fusion))
    paths = [variable.path for variable in network.backbone.variables]
    assert len(set(paths)) == len(paths)
    write_backbone(network, tmp_path, source="a test")
    other = build_network(make_config(branches, fusion), num_labels=3, image_size=32)
    record = carry_backbone(tmp_path, other)
    assert len(record.loaded) >= len(network.backbone.weights) - 4
    assert record.newly_initialised == ["head/kernel", "head/bias"]
    assert record.feature_difference < 1e-5
    images = draw_probe_images(48, 1)
    expected = np.asarray(network.model(images))
    assert np.array_equal(np.asarray(clone_network(network).model(images)), expected)
    again = keras.models.model_from_json(network.model.to_json())
    again.set_weights(network.model.get_weights())
    assert np.array_equal(np.asarray(again(images)), expected)


def test_swapped_branches_do_not_carry_over(tmp_path):
    write_backbone(build_network(make_config(UNLIKE)), tmp_path, source="a test")
    network = build_network(make_config(UNLIKE[::-1]))
    before = compute_features(network, draw_probe_images(48, 1))
    with pytest.raises(TransferError, match="Missing: branch1_resnet_nano"):
        carry_backbone(tmp_path, network)
    assert np.array_equal(before, compute_features(network, draw_probe_images(48, 1)))


def test_activations_of_the_branches_are_counted():
    counts = [_count_activations(build_backbone(name), (1, 48, 48, 3)) for name in UNLIKE]
    hybrid, _ = build_hybrid_backbone(make_config())
    assert sum(counts) < _count_activations(hybrid, (1, 48, 48, 3)) < 1.1 * sum(counts)


def test_published_weights_that_a_branch_lacks_are_named_and_nothing_is_loaded():
    with pytest.raises(ModelError, match="has no ImageNet weights for resnet_nano; nothing was loaded"):
        load_branch_weights(("efficientnet_lite2", "resnet_nano"), backbone=None)
    with pytest.raises(ModelError, match="has no ImageNet weights for efficientnet_lite0; nothing was loaded"):
        load_branch_weights(("efficientnet_lite2", "efficientnet_lite0"), backbone=None)


def test_published_weights_reach_every_branch(tmp_path, monkeypatch):
    import dlfer.model.hybrid as hybrid

    branches = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
    (tmp_path / "efficientnet_lite1.weights.h5").touch()
    monkeypatch.setattr(hybrid, "build_backbone", lambda name, stem="imagenet": build_backbone("efficientnet_nano"))
    files = []

    def load(name, backbone, file):
        files.append(file)
        backbone.set_weights([np.full(weight.shape, 0.25, np.float32) for weight in backbone.weights])
        return f"weights of {name}"

    monkeypatch.setattr(hybrid, "load_published_weights", load)
    backbone, _ = build_hybrid_backbone(make_config(branches))
    assert load_branch_weights(branches, backbone, str(tmp_path)) == "; ".join(
        f"weights of {name}" for name in branches
    )
    # A file that is not there is asked for, too, to be refused by its name; Lite2's weights come with dlfer.
    assert files == [f"{tmp_path}/efficientnet_lite0.h5", f"{tmp_path}/efficientnet_lite1.weights.h5", None]
    assert all(np.all(weight == 0.25) for weight in backbone.get_weights())


def test_a_stem_that_a_branch_lacks_is_refused():
    with pytest.raises(ModelError, match="efficientnet_nano has imagenet alone"):
        build_hybrid_backbone(make_config(stem="small"))
