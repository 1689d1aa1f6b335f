from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from dlfer.config.load import load_experiment, parse_override
from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.errors import ConfigError, ModelError, TransferError
from dlfer.model.backbones import BACKBONES, build_backbone
from dlfer.model.stage_network import (
    PUBLISHED_RATE,
    BranchAttention,
    build_feature_extractor,
    build_hybrid_backbone,
    build_transfer_network,
    find_branch_file,
    list_drop_connects,
)
from dlfer.model.transfer import draw_probe_images, read_backbone_record, transfer_backbone, write_backbone
from dlfer.train.cascade import divide_branches, obtain_backbone
from dlfer.train.loop import clone_network
from dlfer.train.plan import _count_activations


def list_rates(**keys) -> list[float]:
    backbone, _ = build_feature_extractor(ModelConfig(**keys))
    return [layer.rate for layer in list_drop_connects(backbone)]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["efficientnet_lite2", "efficientnet_b0", "efficientnet_v2_b0"])
def test_the_rate_is_that_of_the_last_block_and_falls_towards_the_first(backbone):
    published = list_rates(backbone=backbone)
    assert published == sorted(published)
    assert 0.8 * PUBLISHED_RATE < published[-1] < PUBLISHED_RATE
    assert list_rates(backbone=backbone, drop_connect=0.1) == pytest.approx([rate / 2 for rate in published])
    assert set(list_rates(backbone=backbone, drop_connect=0.0)) == {0.0}


def test_switched_off_a_training_step_is_deterministic():
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    for rate, equal in ((0.0, True), (0.9, False)):
        backbone, _ = build_feature_extractor(ModelConfig(backbone="efficientnet_nano", drop_connect=rate))
        first, second = (np.asarray(backbone(images, training=True)) for _ in range(2))
        assert np.allclose(first, second, atol=1e-5) == equal


def test_only_efficientnets_have_it():
    assert list_drop_connects(build_backbone("resnet_nano")) == []
    with pytest.raises(ValueError, match=r"drop_connect: found 0.1 with resnet18; only EfficientNets have it"):
        ModelConfig(backbone="resnet18", drop_connect=0.1)


def test_it_reaches_the_branches_of_a_hybrid():
    keys = {"family": "hybrid", "branches": ("resnet_nano", "efficientnet_nano")}
    assert set(list_rates(**keys, drop_connect=0.0)) == {0.0}
    assert max(list_rates(**keys)) > 0


UNLIKE = ("efficientnet_nano", "resnet_nano")
TWICE = ("efficientnet_nano", "efficientnet_nano")


def compute_features(network, images):
    return np.asarray(network.pooling(network.backbone(network.face_input(images), training=False)))


def make_config(branches=UNLIKE, fusion="concat", **given) -> ModelConfig:
    return ModelConfig(family="hybrid", branches=branches, fusion=fusion, **given)


def build_network(config, num_labels=7, image_size=48):
    return build_transfer_network(config, num_labels=num_labels, image_size=image_size, channels=1)


@pytest.mark.parametrize("pooling", ["avg", pytest.param("max", marks=pytest.mark.slow)])
def test_concatenation_holds_each_branch_on_its_own_preprocessing(pooling):
    config = make_config(head=HeadConfig(pooling=pooling))
    backbone, preprocessing = build_hybrid_backbone(config)
    assert preprocessing.compute_scale_and_offset()[0].tolist() == [1, 1, 1]
    pixels = draw_probe_images(48, 3).astype(np.float32)
    together = np.asarray(backbone(pixels))
    assert together.shape[1:3] == (1, 1)
    start = 0
    for branch, name in make_config(UNLIKE).name_branches().items():
        alone = build_backbone(name)
        alone.set_weights(backbone.get_layer(branch).get_weights())
        scale, offset = BACKBONES[name].preprocessing.compute_scale_and_offset()
        maps = np.asarray(alone(pixels * scale + offset))
        pooled = maps.mean(axis=(1, 2)) if pooling == "avg" else maps.max(axis=(1, 2))
        width = pooled.shape[1]
        assert np.allclose(together[:, 0, 0, start : start + width], pooled, rtol=1e-4, atol=1e-5)
        start += width
    assert start == together.shape[-1]


@pytest.mark.slow
def test_a_network_of_keras_is_a_branch():
    """Its layers that pad became others, of which a copy has to be made, too."""
    backbone, _ = build_hybrid_backbone(make_config(("mobilenet", "resnet_nano")))
    branch = backbone.get_layer(next(iter(make_config(("mobilenet", "resnet_nano")).name_branches())))
    alone = build_backbone("mobilenet")
    alone.set_weights(branch.get_weights())
    pixels = draw_probe_images(48, 3).astype(np.float32)
    assert np.allclose(branch(pixels), alone(pixels), rtol=1e-4, atol=1e-5)


def test_sum_of_equal_widths_needs_no_projection_and_is_the_sum():
    backbone, _ = build_hybrid_backbone(make_config(TWICE, "add"))
    assert not any("projection" in layer.name for layer in backbone.layers)
    pixels = draw_probe_images(32, 3).astype(np.float32)
    parts = keras.Model(
        backbone.inputs,
        [backbone.get_layer(f"{branch}_pooling").output for branch in make_config(TWICE).name_branches()],
    )
    first, second = (np.asarray(part) for part in parts(pixels))
    assert not np.allclose(first, second)
    assert np.allclose(np.asarray(backbone(pixels)), first + second, atol=1e-6)


def test_the_narrower_branch_is_brought_to_the_greater_width():
    backbone, _ = build_hybrid_backbone(make_config(UNLIKE, "add"))
    widths = {
        branch: build_backbone(name).output_shape[-1] for branch, name in make_config(UNLIKE).name_branches().items()
    }
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


@pytest.mark.slow
@pytest.mark.parametrize("branches", [UNLIKE, pytest.param(TWICE, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fusion", ["attention", pytest.param("concat", marks=pytest.mark.slow)])
def test_it_is_carried_cloned_and_serialised_like_any_backbone(branches, fusion, tmp_path):
    network = build_network(make_config(branches, fusion))
    paths = [variable.path for variable in network.backbone.variables]
    assert len(set(paths)) == len(paths)
    write_backbone(network, tmp_path, source="a test")
    other = build_network(make_config(branches, fusion), num_labels=3, image_size=32)
    record = transfer_backbone(tmp_path, other)
    assert len(record.loaded) >= len(network.backbone.weights) - 4
    assert record.newly_initialised == ["head/kernel", "head/bias"]
    assert record.feature_difference < 1e-5
    images = draw_probe_images(48, 1)
    expected = np.asarray(network.model(images))
    assert np.array_equal(np.asarray(clone_network(network).model(images)), expected)
    again = keras.models.model_from_json(network.model.to_json())
    again.set_weights(network.model.get_weights())
    assert np.array_equal(np.asarray(again(images)), expected)


@pytest.mark.slow
def test_swapped_branches_do_not_carry_over(tmp_path):
    write_backbone(build_network(make_config(UNLIKE)), tmp_path, source="a test")
    network = build_network(make_config(UNLIKE[::-1]))
    before = compute_features(network, draw_probe_images(48, 1))
    with pytest.raises(TransferError, match="Missing: branch1_resnet_nano"):
        transfer_backbone(tmp_path, network)
    assert np.array_equal(before, compute_features(network, draw_probe_images(48, 1)))


@pytest.mark.slow
def test_activations_of_the_branches_are_counted():
    counts = [_count_activations(build_backbone(name), (1, 48, 48, 3)) for name in UNLIKE]
    hybrid, _ = build_hybrid_backbone(make_config())
    assert sum(counts) < _count_activations(hybrid, (1, 48, 48, 3)) < 1.1 * sum(counts)


def load_config(tmp_path, weights, *, model="", extra="", branches="efficientnet_nano, resnet_nano"):
    (tmp_path / "a.yaml").write_text(
        f"experiment: {{name: a}}\nmodel: {{family: hybrid, branches: [{branches}]{model}}}\n"
        f"pretrain: {{weights: {weights}, image_size: 32{extra}}}\n"
        "finetune: {data: {source: synthetic_faces}, image_size: 32}\n"
    )
    return load_experiment(tmp_path / "a.yaml")


def obtain(config, folder):
    return obtain_backbone(config, SimpleNamespace(folder=folder / "pretrain"), load_bundle=None, cache=None).folder


def write_sources(tmp_path):
    """Write weights of each branch alone: a file, and the folder of an EF-FER1; return the networks."""
    networks = {}
    for name in UNLIKE:
        keras.utils.set_random_seed(len(networks) + 5)
        alone = build_transfer_network(ModelConfig(backbone=name), num_labels=3, image_size=32, channels=1)
        for variable in alone.backbone.variables:
            variable.assign(variable + 0.01)
        networks[name] = alone
    networks[UNLIKE[0]].backbone.save_weights(tmp_path / "own.weights.h5")
    write_backbone(networks[UNLIKE[1]], tmp_path / "run" / "pretrain", source="EF-FER1 of a test")
    return networks


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["concat", "attention"])
def test_each_branch_starts_from_weights_of_its_own(tmp_path, fusion):
    networks = write_sources(tmp_path)
    weights = f"{{efficientnet_nano: {tmp_path}/own.weights.h5, resnet_nano: {tmp_path}/run/pretrain}}"
    config = load_config(tmp_path, weights, model=f", fusion: {fusion}")
    folder = obtain(config, tmp_path)
    network = build_network(config.model, image_size=32)
    record = transfer_backbone(folder, network)
    images = draw_probe_images(32, 1)
    for branch, name in config.model.name_branches().items():
        lists = record.branches[branch]
        assert lists.loaded == [
            v.path for v in network.backbone.get_layer(branch).variables if "seed_gen" not in v.path
        ]
        assert (lists.missing, lists.unexpected, lists.newly_initialised) == ([], [], [])
        assert lists.feature_difference < 1e-5
        alone = networks[name]
        expected = np.asarray(alone.backbone(alone.face_input(images), training=False))
        branch_of = keras.Model(network.backbone.inputs, network.backbone.get_layer(f"{branch}_pooling").output)
        found = np.asarray(branch_of(network.face_input(images), training=False))[:, 0, 0]
        assert np.abs(found - expected.mean(axis=(1, 2))).max() / max(1.0, np.abs(expected).max()) < 1e-5
    assert record.branches["branch2_resnet_nano"].source == "EF-FER1 of a test"
    fused = [path for path in record.newly_initialised if not path.startswith("head/")]
    assert bool(fused) == (fusion != "concat")
    assert set(record.loaded).isdisjoint(record.newly_initialised)
    summary = record.summarize_branches()["branch1_efficientnet_nano"]
    assert (summary.loaded, summary.missing) == (len(record.branches["branch1_efficientnet_nano"].loaded), 0)
    # What fuses the branches is drawn by the seed of EF-FER1.
    again = transfer_backbone(obtain(config, tmp_path / "again"), build_network(config.model, image_size=32))
    assert again.loaded == record.loaded
    assert (
        read_backbone_record(tmp_path / "again" / "pretrain")["variables"] == read_backbone_record(folder)["variables"]
    )


@pytest.mark.slow
def test_an_artifact_or_a_wrong_source_of_a_branch(tmp_path):
    write_sources(tmp_path)
    own, run = f"{tmp_path}/own.weights.h5", f"{tmp_path}/run/pretrain"
    cases = [
        (f"{{efficientnet_nano: {run}, resnet_nano: {run}}}", TransferError, "branch1_efficientnet_nano.*Missing: "),
        (f"{{efficientnet_nano: {own}, resnet_nano: {own}}}", ModelError, "branch2_resnet_nano.*another network"),
        (f"{{efficientnet_nano: {own}, resnet_nano: {tmp_path}/absent.h5}}", ModelError, "branch2_resnet_nano.*absent"),
        (
            f"{{efficientnet_nano: {own}, resnet_nano: imagenet}}",
            ModelError,
            "ImageNet weights for resnet_nano; nothing",
        ),
        ("imagenet", ModelError, r"efficientnet_nano, resnet_nano; nothing was loaded.*of efficientnet_lite2 alone"),
    ]
    for weights, kind, text in cases:
        with pytest.raises(kind, match=text):
            obtain(load_config(tmp_path, weights), tmp_path)
        assert not (tmp_path / "pretrain" / "backbone.json").exists()


@pytest.mark.slow
def test_a_folder_of_files_and_a_single_file_of_all_branches(tmp_path):
    networks = write_sources(tmp_path)
    for name in UNLIKE:
        networks[name].backbone.save_weights(tmp_path / f"{name}.weights.h5")
    folder = obtain(load_config(tmp_path, "imagenet", extra=f", weights_file: {tmp_path}"), tmp_path / "a")
    assert set(read_backbone_record(folder)["branches"]) == {"branch1_efficientnet_nano", "branch2_resnet_nano"}
    whole = obtain(load_config(tmp_path, folder / "backbone.weights.h5"), tmp_path / "b")
    assert read_backbone_record(whole)["variables"] == read_backbone_record(folder)["variables"]


@pytest.mark.slow
def test_two_branches_of_one_backbone_start_from_different_weights(tmp_path):
    twice = ModelConfig(family="hybrid", branches=("resnet_nano", "resnet_nano"))
    alone = build_transfer_network(ModelConfig(backbone="resnet_nano"), num_labels=1, image_size=32, channels=3)
    sources = []
    for number in (1, 2):
        for variable in alone.backbone.variables:
            variable.assign(variable + number / 100)
        sources.append([np.asarray(variable) for variable in alone.backbone.variables])
        if number == 1:
            alone.backbone.save_weights(tmp_path / "own.weights.h5")
    write_backbone(alone, tmp_path / "run", source="EF-FER1 of a test")
    weights = f"{{branch1_resnet_nano: {tmp_path}/own.weights.h5, branch2_resnet_nano: {tmp_path}/run}}"
    config = load_config(tmp_path, weights, branches="resnet_nano, resnet_nano")
    network = build_network(twice, image_size=32)
    record = transfer_backbone(obtain(config, tmp_path), network)
    for branch, source in zip(twice.name_branches(), sources, strict=True):
        found = [np.asarray(variable) for variable in network.backbone.get_layer(branch).variables]
        assert all(np.array_equal(a, b) for a, b in zip(found, source, strict=True)), branch
    assert "own.weights.h5" in record.branches["branch1_resnet_nano"].source
    assert record.branches["branch2_resnet_nano"].source == "EF-FER1 of a test"


@pytest.mark.parametrize(
    ("branches", "weights", "extra", "expected"),
    [
        ("resnet50, resnet34", "{resnet34: a.h5, resnet50: imagenet}", "", [("imagenet", None), ("a.h5", None)]),
        ("resnet50, resnet34", "{branch2_resnet34: run, branch1_resnet50: b.h5}", "", [("b.h5", None), ("run", None)]),
        (
            "resnet18, resnet34, vgg16",
            "{vgg16: c, resnet18: d, resnet34: e}",
            "",
            [("d", None), ("e", None), ("c", None)],
        ),
        ("resnet18, resnet18", "{branch1_resnet18: x, branch2_resnet18: y}", "", [("x", None), ("y", None)]),
        (
            "resnet50, vgg16",
            "imagenet",
            ", weights_file: files",
            [("imagenet", "files/resnet50.h5"), ("imagenet", "files/vgg16.weights.h5")],
        ),
    ],
)
def test_each_branch_gets_the_source_that_is_named_for_it(tmp_path, monkeypatch, branches, weights, extra, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "vgg16.weights.h5").touch()
    config = load_config(tmp_path, weights, branches=branches, extra=extra)
    found = divide_branches(config)
    assert list(found) == list(config.model.name_branches())
    assert [own.model.backbone for own in found.values()] == branches.split(", ")
    assert [(own.pretrain.weights, own.pretrain.weights_file) for own in found.values()] == expected
    assert {own.model.family for own in found.values()} == {"transfer"}


def test_a_branch_file_that_is_not_there_is_asked_for_and_lite2_needs_none(tmp_path):
    (tmp_path / "efficientnet_lite1.weights.h5").touch()
    names = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
    files = [find_branch_file(str(tmp_path), name) for name in names]
    assert files == [f"{tmp_path}/efficientnet_lite0.h5", f"{tmp_path}/efficientnet_lite1.weights.h5", None]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ("{resnet_nano: a.h5}", "and none for efficientnet_nano"),
        ("{resnet_nano: a.h5, efficientnet_nano: b.h5, resnet50: c.h5}", "of which resnet50 is no branch"),
        (
            "{branch1_resnet_nano: a.h5, efficientnet_nano: b.h5}",
            "branch1_resnet_nano is no branch.*none for resnet_nano",
        ),
        ("{}", "found weights for nothing, and none for efficientnet_nano, resnet_nano"),
        ("{resnet_nano: 5, efficientnet_nano: b.h5}", "found 5, expected text"),
    ],
)
def test_weights_that_are_not_one_for_each_branch_are_refused(tmp_path, weights, text):
    with pytest.raises(ConfigError, match=text):
        load_config(tmp_path, weights)


def test_the_experiment_names_weights_for_its_branches():
    file = Path(__file__).parents[3] / "experiments" / "hybrid.yaml"
    line = next(line for line in file.read_text().splitlines() if "--set 'pretrain=" in line)
    text = re.search(r"--set '(pretrain=[^']*)'", line)[1]
    config = load_experiment(file, dict([parse_override(text)]))
    assert set(config.pretrain.weights) == set(config.model.branches) == {"resnet50", "resnet34"}
    assert config.pretrain.weights["resnet50"] == "imagenet"
    # The short run finds faces as the whole one does.
    short = file.read_text().partition("# Short")[2].partition("--set ")[2].splitlines()[0]
    config = load_experiment(file, dict([parse_override(short.strip())]))
    assert (config.finetune.epochs, config.finetune.data.faces.detect) == (2, "centerface")


def test_a_stem_that_a_branch_lacks_is_refused():
    with pytest.raises(ModelError, match="efficientnet_nano has imagenet alone"):
        build_hybrid_backbone(make_config(stem="small"))
