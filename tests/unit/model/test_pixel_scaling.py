"""model.pixel_scaling: what the first layer sees, what is saved of it, and what a transfer makes of a difference."""

import json
from itertools import permutations

import keras
import numpy as np
import pytest

from dlfer.config import names
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import BoostingConfig, ModelConfig
from dlfer.data.bundle import Split
from dlfer.errors import TransferError
from dlfer.experiment.fit_ensemble import make_member_config
from dlfer.model.backbone_spec import TORCH_INPUT, choose_preprocessing
from dlfer.model.families import FAMILIES, build_level_features, load_artifact
from dlfer.model.stage_network import TrainingNetwork, build_transfer_network
from dlfer.model.transfer import RECORD_FILE, transfer_backbone, write_backbone
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.train.boosting import Extraction, compute_features_digest
from dlfer.train.cascade import describe_foreign_scaling
from dlfer.train.progress import StopControl, TrainingListener

SINGLE = [{"backbone": name} for name in ("efficientnet_nano", "resnet_nano", "vgg16", "mobilenet", "mobilenet_v2")]
HYBRID = [{"family": "hybrid", "branches": ("resnet_nano", "vgg16")}]


def build(given: dict, *, channels: int = 3, image_size: int = 32):
    return build_transfer_network(ModelConfig(**given), num_labels=3, image_size=image_size, channels=channels)


def draw_images(channels: int, side: int = 32) -> np.ndarray:
    """Every value of a pixel occurs."""
    values = np.arange(4 * side * side * channels) % 256
    return np.random.default_rng(0).permutation(values).reshape(4, side, side, channels).astype(np.uint8)


def watch_first_layers(network, monkeypatch) -> list[np.ndarray]:
    """Collect what the first layer with weights of each backbone is given; padding before it adds zeros alone."""
    seen: list[np.ndarray] = []
    branches = [layer for layer in network.backbone.layers if isinstance(layer, keras.Model)]
    for backbone in branches or [network.backbone]:
        first = next(layer for layer in backbone.layers if layer.weights)

        def call(inputs, *args, own=first.call, **kwargs):
            seen.append(np.asarray(inputs))
            return own(inputs, *args, **kwargs)

        monkeypatch.setattr(first, "call", call)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("way", ["predicts", "trains"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "given",
    [
        given if given in (*SINGLE[:2], *HYBRID) else pytest.param(given, marks=pytest.mark.slow)
        for given in SINGLE + HYBRID
    ],
    ids=str,
)
def test_the_first_layer_sees_x_over_255(given, channels, way, monkeypatch):
    network = build({**given, "pixel_scaling": "divide_by_255"}, channels=channels)
    seen, images = watch_first_layers(network, monkeypatch), draw_images(channels)
    if way == "predicts":
        network.model(images)
    else:
        TrainingNetwork(network)({"image": images})
    expected = np.repeat(images, 3 // channels, axis=-1).astype(np.float64) / 255
    assert len(seen) == len(given.get("branches", "1"))
    for found in seen:
        margin = found.shape[1] - 32
        inside = found[:, margin // 2 :, margin // 2 :][:, :32, :32]
        # One bit of float32.
        assert np.abs(inside - expected).max() <= np.finfo(np.float32).eps
        assert found.sum(dtype=np.float64) == pytest.approx(inside.sum(dtype=np.float64))


@pytest.mark.parametrize("given", SINGLE[:1] + HYBRID, ids=str)
def test_the_backbones_own_scaling_is_the_default_and_another_one(given, monkeypatch):
    network = build(given)
    seen = watch_first_layers(network, monkeypatch)
    network.model(draw_images(3))
    assert all(found.min() < -0.5 for found in seen)


def test_every_name_of_the_schema_has_its_preprocessing():
    found = {name: choose_preprocessing(TORCH_INPUT, name) for name in names.PIXEL_SCALINGS}
    assert found["backbone"] is TORCH_INPUT
    assert len(set(found.values())) == len(names.PIXEL_SCALINGS)


@pytest.mark.parametrize(
    "given",
    [
        {"backbone": "resnet_nano"},
        pytest.param({"family": "hybrid", "branches": ("resnet_nano",) * 2}, marks=pytest.mark.slow),
    ],
)
def test_a_saved_model_has_its_scaling_and_one_of_an_earlier_version_the_backbones_own(tmp_path, given):
    config = ModelConfig(**given, pixel_scaling="divide_by_255")
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    labels = ("a", "b", "c")
    FAMILIES[config.family](network, labels, config=config, channels=1).save(tmp_path)
    images, path = draw_images(1), tmp_path / ARTIFACT_FILE
    loaded = load_artifact(tmp_path)
    expected = np.asarray(network.model(images))
    assert loaded.config.pixel_scaling == "divide_by_255"
    assert np.abs(loaded.predict(images) - expected).max() < 1e-5
    record = json.loads(path.read_text())
    del record["model"]["pixel_scaling"]
    path.write_text(json.dumps(record))
    old = load_artifact(tmp_path)
    assert old.config.pixel_scaling == "backbone"
    assert np.abs(old.predict(images) - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), list(permutations(names.PIXEL_SCALINGS, 2)))
@pytest.mark.parametrize(
    "given",
    [
        {"backbone": "resnet_nano"},
        pytest.param({"family": "hybrid", "branches": ("resnet_nano",) * 2}, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_of_the_other_scaling_is_refused(tmp_path, given, first, second):
    write_backbone(build({**given, "pixel_scaling": first}), tmp_path, source="a test")
    network = build({**given, "pixel_scaling": second})
    before = [np.asarray(weight) for weight in network.model.weights]
    with pytest.raises(TransferError, match=r"pixels prepared as .*Set model\.pixel_scaling"):
        transfer_backbone(tmp_path, network)
    assert all(np.array_equal(a, b) for a, b in zip(before, network.model.weights, strict=True))
    same = build({**given, "pixel_scaling": first})
    assert transfer_backbone(tmp_path, same).feature_difference < 1e-5


def test_a_backbone_of_an_earlier_version_is_compared_by_its_features(tmp_path):
    network = build({"backbone": "resnet_nano"})
    write_backbone(network, tmp_path, source="a test")
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    del record["preprocessing"]
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    assert transfer_backbone(tmp_path, build({"backbone": "resnet_nano"})).feature_difference < 1e-5
    with pytest.raises(TransferError, match="not the same function"):
        transfer_backbone(tmp_path, build({"backbone": "resnet_nano", "pixel_scaling": "divide_by_255"}))


@pytest.mark.slow
def test_features_of_trees_are_those_of_the_scaling(monkeypatch):
    images = draw_images(1)
    split = Split("train", images, np.zeros(4, np.int64), np.array(list("abcd")))
    digests = set()
    for scaling in names.PIXEL_SCALINGS:
        keras.utils.set_random_seed(0)
        config = ModelConfig(family="boosted", backbone="efficientnet_nano", pixel_scaling=scaling)
        network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
        features = build_level_features(network, config, BoostingConfig())
        extraction = Extraction(features, network, 4, None, StopControl(), TrainingListener())
        digests.add(compute_features_digest(extraction, split))
        seen = watch_first_layers(network, monkeypatch)
        network.backbone(network.face_input(images))
        assert (seen[0].min() >= 0) == (scaling == "divide_by_255")
    assert len(digests) == len(names.PIXEL_SCALINGS)


def make_experiment(**given) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {"experiment": {"name": "a"}, "finetune": {"data": {"source": "synthetic_faces"}}, **given}
    )


def test_members_of_an_ensemble_have_its_scaling_unless_they_say_otherwise():
    config = make_experiment(
        model={"family": "ensemble", "pixel_scaling": "divide_by_255"},
        ensemble={
            "members": (
                {"name": "one", "set": {"model.backbone": "resnet18"}},
                {"name": "two", "set": {"model.pixel_scaling": "backbone"}},
            )
        },
    )
    found = [make_member_config(config, member).model.pixel_scaling for member in config.ensemble.members]
    assert found == ["divide_by_255", "backbone"]


@pytest.mark.parametrize(
    ("weights", "backbone", "scaling", "is_told"),
    [
        ("imagenet", "efficientnet_b3", "divide_by_255", True),
        ("imagenet", "efficientnet_b3", "backbone", False),
        ("imagenet", "efficientnet_b3", "caffe", True),
        ("imagenet", "mobilenet", "caffe", True),
        ("imagenet", "resnet50", "caffe", False),
        ("some/published.h5", "vgg16", "divide_by_255", True),
        ("some/published.h5", "vgg16", "caffe", False),
        ("some/run", "vgg16", "divide_by_255", False),
    ],
)
def test_published_weights_with_pixels_of_another_scale_are_told(weights, backbone, scaling, is_told):
    model = {"backbone": backbone, "pixel_scaling": scaling}
    config = make_experiment(model=model, pretrain={"weights": weights})
    note = describe_foreign_scaling(config)
    assert (note is not None) == is_told
    if is_told:
        assert f"{weights} with model.pixel_scaling: {scaling}" in note


@pytest.mark.slow
def test_branches_are_named_as_before():
    """Their input stages take the scaling; the names of the weights must not change with it."""
    paths = [
        [weight.path for weight in build({**HYBRID[0], "pixel_scaling": scaling}).backbone.weights]
        for scaling in names.PIXEL_SCALINGS
    ]
    assert all(found == paths[0] for found in paths)
    assert all(path.split("/")[0].split("_")[0] in {"branch1", "branch2"} for path in paths[0])
