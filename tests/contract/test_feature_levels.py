"""A backbone that ends at a feature level: it loads its weights strictly, and does all that a whole one does."""

import functools
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.synthetic.faces import draw_face
from dlfer.errors import ModelError, TransferError
from dlfer.experiment.limits import find_obstacles
from dlfer.explain.figures import compute_preparation
from dlfer.explain.gradcam import GradCam
from dlfer.export.contract import Sample
from dlfer.export.exporters import EXPORTERS, Origin, export_classifier
from dlfer.export.ship import write_embedded_onnx
from dlfer.model.backbones import BACKBONES, build_backbone, list_levels
from dlfer.model.families import FAMILIES, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.transfer import transfer_backbone, write_backbone
from dlfer.predict.engines import load_engine
from dlfer.predict.runtimes import open_export
from dlfer.runs.artifact import ExportAbout
from dlfer.train.cascade import obtain_backbone
from dlfer.train.plan import describe_network

LABELS = ("angry", "happy", "sad")
CUT = [("efficientnet_nano", 3), ("resnet_nano", 4), ("resnet_nano", 2)]
CUT_ONCE = [CUT[0], *(pytest.param(*cut, marks=pytest.mark.slow) for cut in CUT[1:])]


def build(backbone: str, level: int | None, *, image_size: int = 32, channels: int = 1, seed: int | None = None):
    config = ModelConfig(backbone=backbone, feature_level=level)
    network = build_transfer_network(config, num_labels=3, image_size=image_size, channels=channels)
    if seed is not None:
        rng = np.random.default_rng(seed)
        for weight in network.model.weights:
            drawn = rng.normal(0, 0.3, weight.shape) if len(weight.shape) > 1 else rng.uniform(0.5, 1.5, weight.shape)
            weight.assign(drawn)
    return network, config


@functools.cache
def get_classifier(backbone: str, level: int):
    network, config = build(backbone, level, seed=0)
    return FAMILIES["transfer"](network, LABELS, config=config, channels=1)


def draw_faces(number: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([draw_face("Happy", rng=rng) for _ in range(number)])[..., None]


def compute_features(network) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 1)).astype(np.uint8)
    return np.asarray(network.backbone(network.face_input(images), training=False))


@pytest.mark.parametrize(
    "backbone", [pytest.param("mobilenet", marks=pytest.mark.slow), "efficientnet_nano", "resnet_nano"]
)
def test_each_level_is_that_of_the_whole_backbone(backbone):
    whole = build_backbone(backbone)
    levels = BACKBONES[backbone].stages
    shapes = keras.Model(whole.input, [whole.get_layer(name).output for name in levels]).output_shape
    counts = []
    for number, shape in enumerate(shapes, 1):
        cut = build_backbone(backbone, feature_level=number)
        assert (cut.name, cut.output_shape) == ("backbone", shape)
        assert list_levels(backbone, number) == levels[:number]
        counts.append(cut.count_params())
    assert counts == sorted(counts)
    assert counts[-1] == whole.count_params()


def test_mobilenet_to_stride_16_has_half_its_parameters():
    assert build_backbone("mobilenet", feature_level=4).count_params() == 1_627_840


@pytest.mark.parametrize("level", [0, 6, 100])
def test_a_level_that_is_not_there_is_refused_with_those_that_are(level):
    with pytest.raises(ModelError, match=r"found \d+, expected 1 to 5 for mobilenet \(conv_pw_1_relu, .*null"):
        list_levels("mobilenet", level)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"family": "hybrid", "branches": ("resnet_nano", "resnet18"), "feature_level": 2}, "whose branches are whole"),
        ({"backbone": "googlenet", "auxiliary_heads": True, "feature_level": 4}, "branch off the whole backbone"),
        ({"backbone": "mobilenet", "feature_level": 0}, "greater than or equal to 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(model, text):
    with pytest.raises(ValueError, match=text):
        ModelConfig(**model)


def make_config(model: dict, weights: str | None, **changes) -> ExperimentConfig:
    pretrain = None if weights is None else {"weights": weights, "image_size": 32, **changes}
    return ExperimentConfig.model_validate(
        {
            "experiment": {"name": "cut"},
            "model": model,
            "pretrain": pretrain,
            "finetune": {"data": {"source": "synthetic_faces"}, "image_size": 32},
        }
    )


def test_check_says_which_levels_there_are():
    found = find_obstacles(make_config({"backbone": "resnet_nano", "feature_level": 9}, None))
    assert any("model.feature_level: found 9, expected 1 to 5 for resnet_nano" in line for line in found)
    assert not any(
        "feature_level" in line
        for line in find_obstacles(make_config({"backbone": "resnet_nano", "feature_level": 5}, None))
    )


def write_source(kind: str, backbone: str, level: int | None, folder) -> tuple[object, str]:
    """Return a network with random weights, and the weights of it on disk: those of a run, a model, or a file."""
    network, config = build(backbone, level, channels=3, seed=1)
    if kind == "run":
        write_backbone(network, folder / "pretrain", source="a test")
        return network, str(folder / "pretrain")
    if kind == "model":
        FAMILIES["transfer"](network, LABELS, config=config, channels=3).save(folder / "model")
        return network, str(folder / "model")
    network.backbone.save_weights(folder / "whole.weights.h5")
    return network, str(folder / "whole.weights.h5")


@pytest.mark.parametrize(("backbone", "level"), CUT_ONCE)
@pytest.mark.parametrize(("kind", "longer"), [("run", None), ("model", 5), ("file", None), ("run", 0)])
def test_what_remains_is_loaded_and_what_is_left_out_is_listed(backbone, level, kind, longer, tmp_path):
    # 0: the source ends where the network does.
    source, weights = write_source(kind, backbone, level if longer == 0 else longer, tmp_path)
    config = make_config({"backbone": backbone, "feature_level": level}, weights)
    job = SimpleNamespace(folder=tmp_path / "own")
    pretrained = obtain_backbone(config, job, load_bundle=None, cache=None)
    network, _ = build(backbone, level)
    record = transfer_backbone(pretrained.folder, network)
    last = list_levels(backbone, level)[-1]
    tapped = keras.Model(source.backbone.input, source.backbone.get_layer(last).output)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    wanted = np.asarray(tapped(source.face_input(images), training=False))
    found = np.asarray(network.backbone(network.face_input(images), training=False))
    assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
    paths = {weight.path for weight in source.backbone.weights}
    assert set(record.loaded) == {weight.path for weight in network.backbone.weights}
    assert set(record.left_out) == paths - set(record.loaded)
    assert record.missing == record.unexpected == []
    assert ("left out by model.feature_level" in record.describe()[0]) == bool(record.left_out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "model"])
@pytest.mark.parametrize("other", [pytest.param("resnet18", marks=pytest.mark.slow), "efficientnet_nano"])
def test_weights_of_another_backbone_are_refused_though_what_remains_could_be_among_them(kind, other, tmp_path):
    """ResNet34 has all layers that ResNet18 has up to its second level, and more within it."""
    wanted = {"resnet18": "resnet34"}.get(other, "resnet_nano")
    _, weights = write_source(kind, wanted, None, tmp_path)
    config = make_config({"backbone": other, "feature_level": 2}, weights)
    folder = obtain_backbone(config, SimpleNamespace(folder=tmp_path / "own"), load_bundle=None, cache=None).folder
    with pytest.raises(TransferError, match="Unexpected"):
        transfer_backbone(folder, build(other, 2)[0])


@pytest.mark.parametrize("level", [None, 4])
def test_a_source_that_ends_before_is_refused(level, tmp_path):
    _, weights = write_source("run", "resnet_nano", 3, tmp_path)
    config = make_config({"backbone": "resnet_nano", "feature_level": level}, weights)
    folder = obtain_backbone(config, SimpleNamespace(folder=tmp_path / "own"), load_bundle=None, cache=None).folder
    with pytest.raises(TransferError, match=r"Missing: .*model.feature_level"):
        transfer_backbone(folder, build("resnet_nano", level)[0])


@pytest.mark.parametrize(("backbone", "level"), CUT_ONCE)
def test_saved_and_loaded_it_is_the_same_and_has_its_onnx_file(backbone, level, tmp_path):
    classifier = get_classifier(backbone, level)
    images = draw_faces(6, seed=0)
    write = functools.partial(write_embedded_onnx, images=images, source="drawn faces")
    classifier.save(tmp_path / "model", write_onnx=write)
    expected = classifier.predict(images)
    assert np.array_equal(load_artifact(tmp_path / "model").predict(images), expected)
    for engine in ("keras", "onnx"):
        assert np.abs(load_engine(tmp_path / "model", engine).predict(images) - expected).max() < 1e-4


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form == "onnx" else pytest.mark.slow) for form in EXPORTERS]
)
def test_every_format_holds_it(form, tmp_path):
    classifier = get_classifier("efficientnet_nano", 3)
    sample = Sample(draw_faces(20, seed=0), "drawn faces", draw_faces(20, seed=1), "other drawn faces")
    origin = Origin(card="# A card\n", about=ExportAbout(model="cut"), size=(48, 48))
    folder, _ = export_classifier(classifier, form, out=tmp_path, sample=sample, origin=origin)
    found = open_export(folder)(sample.images[:4])
    assert found.shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "level"), CUT)
@pytest.mark.parametrize("where", ["auto", "last", "1"])
def test_maps_and_blocks_are_of_the_levels_that_are_there(backbone, level, where):
    classifier = get_classifier(backbone, level)
    levels = list_levels(backbone, level)
    if (backbone, where) != ("efficientnet_nano", "1"):  # beside it a shortcut leads on
        [[cam]] = GradCam(classifier, feature_level=where).compute(draw_faces(1, seed=2), np.array([1]))
        assert cam.layer in levels
        assert where != "last" or cam.layer == levels[-1]
    with pytest.raises(ModelError, match=rf"a number 1\.\.{level} "):
        GradCam(classifier, feature_level=str(level + 1)).compute(draw_faces(1, seed=2), np.array([1]))
    blocks = describe_network(classifier.parts, classifier.config).blocks
    assert [block.layer for block in blocks] == [*levels, "head"]
    assert sum(block.parameters for block in blocks) == classifier.parts.model.count_params()
    assert compute_preparation(classifier, draw_faces(1, seed=3))
