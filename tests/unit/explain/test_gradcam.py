"""Grad-CAM is that of other programs and of its closed form, and stands where the evidence stands."""

import json
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest

from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.explain import gradcam
from dlfer.explain.gradcam import GradCam, build_gradient, compute_cam, list_networks, upsample_cells
from dlfer.model.backbone_spec import Preprocessing
from dlfer.model.backbones import find_backbone
from dlfer.model.face_input import FaceInput
from dlfer.model.families import FAMILIES
from dlfer.model.stage_network import build_transfer_network

LABELS = ("a", "b", "c")
GOLDEN = Path(__file__).parents[2] / "golden" / "gradcam.json"


def make_classifier(family="transfer", *, seed=0, crop=None, channels=1, image_size=64, **given):
    """Return a classifier with weights that NumPy drew, the same on every backend."""
    if family == "transfer":
        given.setdefault("backbone", "resnet_nano")
    config = ModelConfig(family=family, **given)
    network = build_transfer_network(config, num_labels=3, image_size=image_size, channels=channels, crop=crop)
    draw_weights(network.model, seed)
    return FAMILIES[family](network, LABELS, config=config, channels=channels)


def draw_weights(model, seed):
    rng = np.random.default_rng(seed)
    values = []
    for weight in model.weights:
        spread = np.sqrt(2 / np.prod(weight.shape[:-1])) if len(weight.shape) > 1 else 0.1
        drawn = rng.normal(0, spread, weight.shape)
        values.append(1 + np.abs(drawn) if weight.path.endswith(("gamma", "variance")) else drawn)
    model.set_weights(values)


def draw_images(shape, seed=1):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def get_cells(classifier, images, targets):
    """Return the closed form of a mean over the map and one dense layer: Zhou et al. 2016, cut at 0, over h w."""
    parts = classifier.parts
    maps = np.asarray(parts.backbone(parts.face_input(images), training=False))
    kernel = np.asarray(parts.head.kernel)[:, targets]
    return np.maximum(np.einsum("nhwk,kn->nhw", maps, kernel), 0) / (maps.shape[1] * maps.shape[2]), maps


def test_it_is_cam_where_the_head_is_one_dense_layer_on_a_mean():
    classifier = make_classifier()
    images, targets = draw_images((3, 64, 64, 1)), np.array([0, 2, 1])
    cells, maps = get_cells(classifier, images, targets)
    assert cells.max() > 0
    for cams, expected in zip(GradCam(classifier, feature_level="last").compute(images, targets), cells, strict=True):
        [cam] = cams
        assert (cam.network, cam.layer, cam.grid) == ("", "conv5_block1_out", (2, 2))
        assert cam.values.dtype == np.float32
        assert np.allclose(cam.values, upsample_cells(expected[None], (64, 64), crop=None)[0], atol=1e-5)
    # And before the cut the cells add up to the logit less its bias.
    weighed = np.einsum("nhwk,kn->n", maps, np.asarray(classifier.parts.head.kernel)[:, targets]) / 4
    logits = np.asarray(classifier.parts.head(classifier.parts.pooling(maps)))
    biases = np.asarray(classifier.parts.head.bias)
    assert np.allclose(weighed, (logits - biases)[np.arange(3), targets], atol=1e-4)


def compute_golden():
    """Return what the golden file holds of our own."""
    classifier = make_classifier()
    images, targets = draw_images((2, 64, 64, 1)), np.array([1, 0])
    parts = classifier.parts
    pixels = np.asarray(parts.face_input(images))
    return classifier, images, targets, pixels


def test_it_is_tf_keras_vis():
    """golden/gradcam.json is Grad-CAM by tf-keras-vis 0.8.7 (Keras 3.15.1): `expand_cam=False, normalize_cam=False`.

    It is no requirement: its wheel puts a package of the name `tests` into the environment. Where it is there, it is asked
    itself.
    """
    classifier, images, targets, pixels = compute_golden()
    golden = np.array(json.loads(GOLDEN.read_text()))
    found = GradCam(classifier, feature_level="last").compute(images, targets)
    for cams, expected in zip(found, golden, strict=True):
        assert np.allclose(cams[0].values, upsample_cells(expected[None], (64, 64), crop=None)[0], atol=1e-4)
    other = pytest.importorskip("tf_keras_vis.gradcam")
    assert np.allclose(ask_tf_keras_vis(other, classifier, pixels, targets), golden, atol=1e-4)


def ask_tf_keras_vis(other, classifier, pixels, targets):
    from tf_keras_vis.utils.scores import CategoricalScore

    parts = classifier.parts
    flat = keras.Model(parts.backbone.inputs, parts.head(parts.pooling(parts.backbone.output)))
    return other.Gradcam(flat, clone=False)(
        CategoricalScore(targets.tolist()),
        pixels,
        penultimate_layer="conv5_block1_out",
        seek_penultimate_conv_layer=False,
        expand_cam=False,
        normalize_cam=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"family": "transfer", "head": HeadConfig(hidden=(8,))},
        pytest.param({"family": "transfer", "head": HeadConfig(pooling="max")}, marks=pytest.mark.slow),
        {"family": "transfer", "feature_level": "last"},
        {"family": "transfer", "feature_level": "4", "backbone": "efficientnet_nano"},
        pytest.param(
            {"family": "hybrid", "branches": ("efficientnet_nano", "resnet_nano"), "fusion": "attention"},
            marks=pytest.mark.slow,
        ),
        {
            "family": "hybrid",
            "branches": ("efficientnet_nano", "resnet_nano"),
            "fusion": "concat",
            "feature_level": "4",
        },
    ],
    ids=["hidden", "max", "last", "level4", "attention", "concat"],
)
def test_weights_are_those_of_finite_differences(given):
    """The mean gradient of a channel is what the logit gains, per cell, when that channel rises everywhere."""
    feature_level = given.pop("feature_level", "auto")
    classifier = make_classifier(**given)
    images, targets = draw_images((2, 64, 64, 1)), np.array([2, 0])
    maker = GradCam(classifier, feature_level=feature_level)
    [view] = maker.views
    maps = [np.asarray(values) for values in view.front(classifier.parts.face_input(images))]
    # What is cut in two is still the network.
    whole = np.asarray(classifier.network.predict(images, verbose=0))
    assert np.allclose(np.asarray(keras.ops.softmax(view.back(maps))), whole, atol=1e-5)
    found = maker.compute(images, targets)
    for number, values in enumerate(maps):
        num_channels = values.shape[-1]
        weights = np.zeros((2, num_channels))
        for row in range(2):
            ends = []
            for step in (1e-2, -1e-2):
                # One channel after the other, side by side in a batch.
                moved = [one[row : row + 1].repeat(num_channels, axis=0) for one in maps]
                moved[number] += step * np.eye(num_channels, dtype=np.float32)[:, None, None, :]
                ends.append(np.asarray(view.back(moved))[:, targets[row]])
            weights[row] = (ends[0] - ends[1]) / 2e-2 / (values.shape[1] * values.shape[2])
        cells = np.maximum(np.einsum("nhwk,nk->nhw", values, weights), 0)
        expected = upsample_cells(cells, (64, 64), crop=None)
        for row in range(2):
            assert np.allclose(found[row][number].values, expected[row], atol=0.02 * expected[row].max() + 1e-5)


@pytest.mark.slow
def test_hybrid_has_a_map_for_each_branch_and_an_ensemble_for_each_member_that_is_a_network():
    hybrid = make_classifier("hybrid", branches=("efficientnet_nano", "resnet_nano"))
    plain = make_classifier(channels=3)
    # Members may have their labels in another order; the maps are about the same names.
    turned = FAMILIES["transfer"](plain.parts, ("c", "b", "a"), config=plain.config, channels=3)
    members = {"one": hybrid, "two": turned}
    ensemble = FAMILIES["ensemble"](members, LABELS, config=ModelConfig(family="ensemble"), combine="average")
    images = draw_images((1, 48, 40, 3))
    [cams] = GradCam(ensemble).compute(images, np.array([0]))
    assert [cam.network for cam in cams] == ["one branch1_efficientnet_nano", "one branch2_resnet_nano", "two"]
    assert {cam.values.shape for cam in cams} == {(48, 40)}
    [[alone]] = GradCam(plain).compute(images, np.array([2]))
    assert np.array_equal(cams[2].values, alone.values)


def test_a_max_pooling_at_the_end_is_left_out():
    classifier = make_classifier(backbone="vgg16")
    [[cam]] = GradCam(classifier, feature_level="last").compute(draw_images((1, 64, 64)), np.array([1]))
    assert (cam.layer, cam.grid) == ("block5_conv3", (4, 4))
    [[cam]] = GradCam(classifier).compute(draw_images((1, 64, 64)), np.array([1]))
    assert (cam.layer, cam.grid) == ("block4_conv3", (8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "image_size", "level", "side"),
    [
        *(("resnet_nano", *row) for row in ((8, 1, 4), (32, 2, 8), (96, 3, 12))),
        *(pytest.param("resnet_nano", *row, marks=pytest.mark.slow) for row in ((20, 1, 10), (64, 3, 8), (224, 5, 7))),
        ("efficientnet_nano", 48, 2, 12),
        *(
            pytest.param("efficientnet_nano", *row, marks=pytest.mark.slow)
            for row in ((64, 3, 8), (112, 4, 7), (224, 5, 7))
        ),
        # Beside its first level a shortcut leads on, so that no network can be cut there.
        ("efficientnet_nano", 20, 2, 5),
    ],
)
def test_the_deepest_feature_level_with_seven_cells_a_side_is_chosen(backbone, image_size, level, side):
    """Of a size at which no level has them, the finest at which the network can be cut in two."""
    classifier = make_classifier(backbone=backbone, image_size=image_size)
    [[cam]] = GradCam(classifier).compute(draw_images((1, 50, 50)), np.array([1]))
    assert (cam.layer, cam.grid) == (find_backbone(backbone).stages[level - 1], (side, side))
    assert cam.values.shape == (50, 50)


@pytest.mark.slow
def test_each_branch_has_its_own_feature_level():
    classifier = make_classifier("hybrid", branches=("efficientnet_nano", "resnet_nano"), image_size=96)
    [cams] = GradCam(classifier).compute(draw_images((1, 48, 48)), np.array([1]))
    assert [cam.grid for cam in cams] == [(12, 12), (12, 12)]
    levels = [find_backbone(backbone).stages[2] for backbone in ("efficientnet_nano", "resnet_nano")]
    assert [cam.layer for cam in cams] == [f"branch1_efficientnet_nano_{levels[0]}", f"branch2_resnet_nano_{levels[1]}"]


def test_maps_stand_in_the_part_that_the_network_sees():
    cells = np.ones((1, 2, 2), np.float32)
    maps = upsample_cells(cells, (40, 60), crop=0.5)
    expected = np.zeros((40, 60))
    expected[10:30, 20:40] = 1
    assert np.allclose(maps[0], expected)
    classifier = make_classifier(crop=0.5)
    images = draw_images((8, 40, 60))
    for [cam] in GradCam(classifier).compute(images, np.arange(8) % 3):
        assert not cam.values[expected == 0].any()


@pytest.mark.parametrize("shape", [(2, 3), (5, 1), (4, 4)])
def test_cells_are_spread_as_images_are_resized(shape):
    cells = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    resized = np.asarray(keras.ops.image.resize(cells[..., None], (30, 30), interpolation="bilinear"))[..., 0]
    assert np.allclose(upsample_cells(cells, (30, 30), crop=None), resized, atol=1e-5)
    # Of an image that is not square: in the square that is seen, or without the padding.
    maps = upsample_cells(cells, (30, 37), crop=None)
    assert np.allclose(maps[:, :, 3:33], resized, atol=1e-5)
    assert not maps[:, :, :3].any()
    assert not maps[:, :, 33:].any()
    for shape, inside in (((30, 23), np.s_[:, :, 3:26]), ((15, 30), np.s_[:, 7:22])):
        assert np.allclose(upsample_cells(cells, shape, crop=None, aspect="pad"), resized[inside], atol=1e-5)


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("crop", [None, 0.75])
@pytest.mark.parametrize("shape", [(40, 60), (61, 47), (16, 128)])
def test_a_cell_lies_over_the_very_pixels_that_the_network_sees_there(shape, crop, aspect):
    """What the input stage makes of an image of positions, spread back over it, is those positions again."""
    rows, columns = np.indices(shape).astype(np.float32)
    layer = FaceInput(64, Preprocessing().as_dict(), crop, aspect)
    covered = upsample_cells(np.ones((1, 64, 64), np.float32), shape, crop=crop, aspect=aspect)[0] > 0
    for positions in (rows, columns):
        seen = np.asarray(layer.resize(positions[None, ..., None].astype(np.uint8)))[..., 0]
        found = upsample_cells(seen, shape, crop=crop, aspect=aspect)[0]
        # Off by less than what two resizes blur at the end of a line; a shift or a stretch would be more.
        assert np.abs(found - positions)[covered].max() < 1
        assert np.abs(found - positions)[covered].mean() < 0.1
    assert covered.any()


def test_the_evidence_is_where_the_image_has_it():
    """A network that sums brightness has its map in the bright corner; of a label that speaks against it, nowhere."""
    classifier = make_classifier(backbone="efficientnet_nano")
    maps = np.zeros((2, 4, 4, 1), np.float32)
    maps[:, 0, 3] = 5
    assert np.array_equal(compute_cam(maps, np.ones_like(maps))[0], maps[0, ..., 0])
    assert not compute_cam(maps, -np.ones_like(maps)).any()
    [[cam]] = GradCam(classifier).compute(draw_images((1, 20, 20)), np.array([0]))
    assert 0 <= cam.scaled.min() <= cam.scaled.max() <= 1


@pytest.mark.parametrize(
    ("feature_level", "targets", "message"),
    [
        ("6", [0], r'"auto", "last" or a number 1\.\.5'),
        ("0", [0], "found the feature level '0'"),
        ("top", [0], "found the feature level 'top'"),
        ("last", [3], "0..2"),
        ("last", [0, 1], "0..2"),
    ],
)
def test_what_is_not_there_is_refused(feature_level, targets, message):
    with pytest.raises(ModelError, match=message):
        GradCam(make_classifier(), feature_level=feature_level).compute(draw_images((1, 32, 32)), np.array(targets))


def test_a_feature_level_beside_which_others_lead_on_is_refused_or_passed_over():
    pixels = keras.Input((4, 4, 3))
    beside = keras.layers.Conv2D(3, 1, name="beside")(pixels)
    network = keras.Model(pixels, keras.layers.Add(name="end")([pixels, beside]))
    levels = ("beside", "end")
    # Neither is fine enough, and at the first of the two no network can be cut.
    assert gradcam._cut(network, levels, image_size=4)[0] == "end"
    with pytest.raises(ModelError, match=r"feature level 1 .beside. is on one of several parallel paths"):
        gradcam._cut(network, levels, image_size=4, feature_level="1")


def test_trees_have_no_gradients():
    class Trees:
        family, labels = "boosted", LABELS

    assert list_networks(Trees()) == []
    with pytest.raises(ModelError, match="--method occlusion"):
        GradCam(Trees())


def test_a_backend_without_gradients_says_so(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(EnvironmentProblem, match="KERAS_BACKEND=tensorflow"):
        build_gradient(lambda values: values[0])


ROOT = Path(__file__).parents[3]
JAX = ROOT / ".venv-jax" / "bin" / "python"
SCRIPT = """
import sys
import numpy as np
import dlfer, keras
from dlfer.explain import gradcam
from dlfer.explain.gradcam import GradCam
assert keras.backend.backend() == "jax"
folder, level = sys.argv[1:]
given = np.load(folder + "/given.npz")
found = GradCam(dlfer.load(folder), feature_level=level).compute(given["images"], given["targets"])
np.save(folder + "/found.npy", np.stack([cam.values for [cam] in found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not JAX.exists(), reason="make jax makes the environment for this test")
def test_it_is_the_same_on_jax(tmp_path):
    classifier = make_classifier()
    images, targets = draw_images((2, 48, 48)), np.array([1, 2])
    classifier.save(tmp_path)
    np.savez(tmp_path / "given.npz", images=images, targets=targets)
    done = subprocess.run(
        [JAX, "-c", SCRIPT, tmp_path, "4"],
        cwd=ROOT,
        env={"KERAS_BACKEND": "jax", "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = np.stack([cam.values for [cam] in GradCam(classifier, feature_level="4").compute(images, targets)])
    assert ours.max() > 0
    assert np.allclose(ours, np.load(tmp_path / "found.npy"), atol=1e-3 * ours.max())
