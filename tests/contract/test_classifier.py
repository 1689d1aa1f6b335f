"""What every family's classifier must do: any uint8 image, save and load, and refuse damaged files."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from dlfer.config import names
from dlfer.config.sections import BoostingConfig, HeadConfig, ModelConfig
from dlfer.data.images import match_channels
from dlfer.errors import DataError, DlferError, ModelError
from dlfer.explain.explanation import Explainer, MapOptions, randomise
from dlfer.model.families import FAMILIES, build_level_features, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.trees import FeatureScale, import_xgboost, make_parameters
from dlfer.runs.find import ARTIFACT_FILE

LABELS = ("angry", "happy", "sad")

# Each family is saved and loaded in the quick set, and one does everything; `make test-slow` has the rest.
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in names.FAMILIES if family != "transfer"]
EVERY_FAMILY = ["transfer", *OTHERS]


def make_classifier(family: str, *, channels: int = 1, activation: str = "softmax"):
    if family == "ensemble":
        members = {name: make_classifier("transfer", channels=channels, activation=activation) for name in ("a", "b")}
        return FAMILIES[family](members, LABELS, config=ModelConfig(family=family), combine="average")
    fused = {"branches": ("efficientnet_nano", "resnet_nano"), "fusion": "attention"} if family == "hybrid" else {}
    config = ModelConfig(family=family, backbone="efficientnet_nano", head=HeadConfig(activation=activation), **fused)
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=channels)
    given = {"config": config, "channels": channels}
    if family == "boosted":
        given |= make_trees(network, config, channels=channels)
    return FAMILIES[family](network, LABELS, **given)


# For tests that change nothing: building and tracing costs more than what they look at.
get_classifier = functools.cache(make_classifier)


def make_trees(network, config, *, channels: int) -> dict:
    """Grow a few trees on the features of random images."""
    boosting = BoostingConfig(max_depth=2, colsample=1.0)
    features = build_level_features(network, config, boosting)
    values = features.compute(draw_images((30, 32, 32, channels)), batch_size=30)
    scale = FeatureScale.fit("standard", features.levels, values)
    xgb = import_xgboost()
    matrix = xgb.DMatrix(scale.apply(values), label=np.arange(30) % 3)
    booster = xgb.train(make_parameters(boosting, num_labels=3, seed=0), matrix, 3)
    return {"boosting": boosting, "trees": (features, scale, booster)}


def draw_images(shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_table_has_the_names_of_the_schema():
    assert tuple(FAMILIES) == names.FAMILIES


@pytest.mark.parametrize(
    ("family", "activation"),
    [
        *((family, "softmax") for family in names.FAMILIES),
        ("transfer", "sigmoid"),
        *(pytest.param(family, "sigmoid", marks=pytest.mark.slow) for family in names.FAMILIES if family != "transfer"),
    ],
)
def test_saved_and_loaded_it_is_the_same(family, activation, tmp_path):
    classifier = make_classifier(family, activation=activation)
    images = draw_images((5, 48, 48))
    classifier.save(tmp_path / "model")
    again = load_artifact(tmp_path / "model")
    assert again.labels == LABELS
    assert np.array_equal(classifier.predict(images), again.predict(images))
    assert json.loads((tmp_path / "model" / ARTIFACT_FILE).read_text())["input"]["dtype"] == "uint8"


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("shape", [(3, 48, 48), (3, 30, 50, 1), (3, 64, 64, 3), (1, 16, 16), (0, 48, 48)])
@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_of_any_size_and_a_batch_is_its_images(family, shape, channels):
    classifier = get_classifier(family, channels=channels, activation="sigmoid")
    images = draw_images(shape)
    together = classifier.predict(images)
    assert together.dtype == np.float32
    assert together.shape == (shape[0], 3)
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)
    for index in range(shape[0]):
        assert np.allclose(together[index], classifier.predict(images[index : index + 1])[0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "images", [np.zeros((2, 48, 48), np.float32), np.zeros(48, np.uint8), draw_images((2, 9, 9, 2))]
)
def test_other_arrays_are_refused(family, images):
    with pytest.raises(DataError, match="expected uint8"):
        get_classifier(family).predict(images)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_byte_is_refused(family, tmp_path):
    get_classifier(family).save(tmp_path)
    names_of_files = json.loads((tmp_path / ARTIFACT_FILE).read_text())["sha256"]
    assert names_of_files
    for name in names_of_files:
        whole = (tmp_path / name).read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ModelError, match=f"{name}: sha256"):
            load_artifact(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_grey_of_a_colour_image_is_pillows():
    from PIL import Image

    colour = draw_images((2, 20, 20, 3))
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    assert np.array_equal(match_channels(colour, 1)[..., 0], expected)


def test_unknown_format_is_refused(tmp_path):
    get_classifier("transfer").save(tmp_path)
    record = json.loads((tmp_path / ARTIFACT_FILE).read_text())
    (tmp_path / ARTIFACT_FILE).write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ModelError, match="another version of dlfer"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_its_answers_can_be_explained(family):
    """By occlusion in every family; by Grad-CAM in every one that has a network."""
    classifier = get_classifier(family)
    explainer = Explainer(classifier, MapOptions(size=16, stride=16))
    found = explainer.explain(draw_images((48, 40, 3)))
    assert found.occlusion.sensitivity.shape == found.occlusion.flips.shape == (48, 40)
    assert np.abs(found.occlusion.sensitivity).max() <= 1
    assert explainer.lacks_gradcam == (family == "boosted")
    expected = {
        "transfer": [""],
        "hybrid": ["branch1_efficientnet_nano", "branch2_resnet_nano"],
        "ensemble": ["a", "b"],
        "boosted": [],
    }
    assert [cam.network for cam in found.cams] == expected[family]
    for cam in found.cams:
        assert cam.values.shape == (48, 40)
        assert np.isfinite(cam.values).all()
        assert cam.values.min() >= 0
        assert cam.scaled.max() in (0, 1)
    if not found.cams:
        with pytest.raises(ModelError, match="--method occlusion"):
            Explainer(classifier, MapOptions(methods=("gradcam",)))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_with_new_weights_it_answers_otherwise(family):
    classifier = get_classifier(family)
    images = draw_images((4, 48, 48))
    changed = randomise(classifier)
    assert changed.labels == classifier.labels
    if family != "boosted":  # few trees on noise may well answer the same
        assert not np.allclose(classifier.predict(images), changed.predict(images), atol=1e-4)
    else:
        before, after = (one.features.compute(images[..., None], batch_size=4) for one in (classifier, changed))
        assert not np.allclose(before, after)
        assert changed.booster is classifier.booster


@pytest.mark.parametrize(
    ("family", "value"),
    [
        *(("transfer", value) for value in (np.nan, np.inf)),
        *(pytest.param(*other.values, value, marks=other.marks) for other in OTHERS for value in (np.nan, np.inf)),
    ],
)
def test_weights_that_are_not_finite_are_refused_when_loaded_and_give_no_answer(family, value, tmp_path):
    classifier = make_classifier(family)
    owner = classifier.members["b"] if family == "ensemble" else classifier
    weight = owner.parts.backbone.weights[0] if family == "boosted" else owner.network.weights[-1]
    values = np.array(weight)
    values.flat[0] = value
    weight.assign(values)
    with pytest.raises(DlferError, match=r"NaN"):
        classifier.predict(draw_images((3, 32, 32, 1)))
    classifier.save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"weights\.h5: found values that are NaN or infinite in 1 of"):
        load_artifact(tmp_path / "model")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_one_picture_a_list_and_a_path_are_predicted_as_a_batch_is(family, tmp_path):
    images = draw_images((2, 40, 40, 3))
    classifier = get_classifier(family)
    expected = classifier.predict(images)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    for one in (images[0], Image.fromarray(images[0]), tmp_path / "a.png", [images[0]]):
        found = classifier.predict(one)
        assert found.shape == (1, 3)
        assert np.allclose(found[0], expected[0], atol=1e-5)
    mixed = classifier.predict([images[1], images[0][:20], images[0]])
    assert np.allclose(mixed[[0, 2]], expected[[1, 0]], atol=1e-5)
    assert classifier.predict(np.zeros((0, 40, 40, 3), np.uint8)).shape == (0, 3)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_a_batch_size_is_a_whole_number_above_zero(batch_size):
    with pytest.raises(DataError, match="batch_size"):
        get_classifier("transfer").predict(draw_images((3, 32, 32, 1)), batch_size=batch_size)
