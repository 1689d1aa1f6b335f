"""Maps before and after the weights are re-initialised, and averages of maps."""

import numpy as np
import pytest
from scipy import stats

from dlfer.config.sections import ModelConfig
from dlfer.errors import ModelError, UserError
from dlfer.explain.explanation import (
    ALL,
    HEAD,
    OTHER,
    Explainer,
    Explanation,
    MapAverage,
    MapOptions,
    check_maps,
    compute_rank_correlation,
    randomise,
)
from dlfer.explain.figures import describe_sanity, list_sanity_rows
from dlfer.explain.gradcam import Cam
from dlfer.explain.occlusion import Occlusion
from dlfer.model.families import FAMILIES
from dlfer.model.stage_network import build_transfer_network

LABELS = ("a", "b", "c")


def make_classifier(**given):
    config = ModelConfig(backbone="efficientnet_nano", **given)
    network = build_transfer_network(config, num_labels=3, image_size=64, channels=1)
    return FAMILIES["transfer"](network, LABELS, config=config, channels=1)


def draw_images(shape, seed=1):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, (2, 9, 7))  # with ties
    expected = stats.spearmanr(first.ravel(), second.ravel()).statistic
    assert compute_rank_correlation(first, second) == pytest.approx(expected)
    assert compute_rank_correlation(first, 3.0 * first**3) == pytest.approx(1)
    assert compute_rank_correlation(first, -first) == pytest.approx(-1)
    assert compute_rank_correlation(first, np.zeros((9, 7))) is None


@pytest.mark.slow
def test_new_weights_are_new_where_they_should_be_and_nowhere_else():
    classifier = make_classifier()
    before = [value.copy() for value in classifier.network.get_weights()]
    head, whole = (randomise(classifier, part=part, seed=5) for part in (HEAD, ALL))
    assert all(np.array_equal(*pair) for pair in zip(before, classifier.network.get_weights(), strict=True))
    same = [np.array_equal(*pair) for pair in zip(before, head.network.get_weights(), strict=True)]
    assert [w.path for w, is_same in zip(classifier.network.weights, same, strict=True) if not is_same] == [
        "head/kernel"
    ]
    kernels = [
        np.array_equal(old, new) for old, new in zip(before, whole.network.get_weights(), strict=True) if old.ndim > 1
    ]
    assert not any(kernels)
    again = randomise(classifier, seed=5).network.get_weights()
    assert all(np.array_equal(*pair) for pair in zip(again, whole.network.get_weights(), strict=True))


def test_an_ensembles_members_are_all_new():
    members = {"one": make_classifier(), "two": make_classifier()}
    ensemble = FAMILIES["ensemble"](members, LABELS, config=ModelConfig(family="ensemble"), combine="vote")
    changed = randomise(ensemble, seed=5)
    assert changed.combine_by == "vote"
    heads = [
        np.asarray(member.parts.head.kernel)
        for classifier in (ensemble, changed)
        for member in classifier.members.values()
    ]
    assert all(not np.array_equal(heads[i], heads[j]) for i in range(4) for j in range(i))


def test_another_part_is_refused():
    with pytest.raises(ModelError, match="expected head"):
        randomise(make_classifier(), part="body")


@pytest.mark.slow
def test_maps_of_a_network_change_with_its_weights():
    explainer = Explainer(make_classifier(), MapOptions(size=16, stride=16, feature_level="3"))
    images = draw_images((3, 64, 64, 1))
    explanations = [explainer.explain(image) for image in images]
    told = []
    found = check_maps(explainer, images, explanations, say=lambda *done: told.append(done))
    assert list(found) == [HEAD, ALL, OTHER]
    assert told == [(number, 6) for number in range(1, 7)]
    for part in (HEAD, ALL):
        assert set(found[part]) == {"occlusion", "gradcam"}
        assert found[part]["gradcam"]["n"] == 3
    assert found[OTHER]["occlusion"]["n"] == 2
    for name in ("occlusion", "gradcam"):
        assert found[ALL][name]["low"] <= found[ALL][name]["mean"] <= found[ALL][name]["high"] < 0.9


@pytest.mark.slow
def test_a_single_face_has_no_other_to_be_compared_with():
    explainer = Explainer(make_classifier(), MapOptions(methods=("occlusion",), size=32, stride=32))
    image = draw_images((1, 64, 64, 1))[0]
    found = check_maps(explainer, [image], [explainer.explain(image)])
    assert found[OTHER]["occlusion"]["n"] == 0
    assert {row["what"] for row in list_sanity_rows(found)} == {"head re-initialised", "all weights re-initialised"}
    [verdict] = describe_sanity(found)
    assert "alike" not in verdict


def test_maps_that_do_not_hang_on_the_weights_are_found_out(monkeypatch):
    """A method that draws the image itself, as edge detectors do, fails the check."""

    class Edges:
        classifier, options = make_classifier(), MapOptions()

        def __init__(self, *_):
            pass

        def explain(self, image, target=0):
            cam = Cam("", "edges", image.shape[:2], np.abs(np.gradient(image[..., 0].astype(np.float32), axis=0)))
            return Explanation(np.array([1.0, 0, 0], np.float32), target, None, (cam,))

    monkeypatch.setattr("dlfer.explain.explanation.Explainer", Edges)
    images = draw_images((3, 16, 16, 1))
    found = check_maps(Edges(), images, [Edges().explain(image) for image in images])
    assert found[ALL]["gradcam"] == {"mean": 1, "low": 1, "high": 1, "n": 3, "flat": 0}
    assert abs(found[OTHER]["gradcam"]["mean"]) < 0.5


def make_explanation(rng, *, target=0, predicted=0):
    sensitivity, flips = rng.normal(size=(6, 5)), rng.random((6, 5)) < 0.5
    shares = np.full(3, 0.1, np.float32)
    shares[predicted] = 0.8
    cam = Cam("", "last", (2, 2), rng.random((6, 5)).astype(np.float32))
    return Explanation(shares, target, Occlusion(sensitivity, flips, 0.8, predicted, 2, 1, 9), (cam,))


def test_averages_are_means():
    rng = np.random.default_rng(0)
    explanations = [make_explanation(rng, predicted=predicted) for predicted in (0, 1, 0, 0, 2)]
    images = draw_images((5, 6, 5, 1))
    average = MapAverage("a")
    for image, explanation in zip(images, explanations, strict=True):
        average.add(image, explanation)
    found = average.finish()
    assert (found.label, found.num_images, found.num_correct) == ("a", 5, 3)
    assert np.array_equal(found.image, images.mean(axis=0).round())
    for name in ("occlusion", "gradcam"):
        maps = np.stack([explanation.maps[name] for explanation in explanations]).astype(np.float64)
        assert np.allclose(found.maps[name], maps.mean(axis=0))
        expected = stats.spearmanr(maps[::2].sum(axis=0).ravel(), maps[1::2].sum(axis=0).ravel()).statistic
        assert found.halves[name] == pytest.approx(expected)
    assert np.allclose(found.flips, np.mean([e.occlusion.flips for e in explanations], axis=0))


def test_one_face_has_no_halves_and_grad_cam_alone_no_flips():
    average = MapAverage("a")
    explanation = make_explanation(np.random.default_rng(0))
    average.add(draw_images((6, 5, 3)), Explanation(explanation.probabilities, 0, None, explanation.cams))
    found = average.finish()
    assert found.flips is None
    assert found.halves == {"gradcam": None}
    assert found.image.shape == (6, 5, 1)


@pytest.mark.parametrize("methods", [(), ("lime",)])
def test_other_methods_are_refused(methods):
    with pytest.raises(UserError, match="expected occlusion or gradcam"):
        Explainer(make_classifier(), MapOptions(methods=methods))


@pytest.mark.slow
def test_an_explanation_is_about_the_most_probable_label_or_the_one_asked_for():
    classifier = make_classifier()
    image = draw_images((48, 48, 1))
    explainer = Explainer(classifier, MapOptions(size=16, stride=16))
    own, other = explainer.explain(image), explainer.explain(image, 2)
    assert own.target == own.predicted == classifier.predict(image[None])[0].argmax()
    assert other.target == 2
    assert other.occlusion.probability == pytest.approx(float(own.probabilities[2]), abs=1e-6)
    assert list(own.maps) == ["occlusion", "gradcam"]
    assert Explainer(classifier, MapOptions(methods=("gradcam",))).explain(image).occlusion is None


@pytest.mark.slow
def test_a_network_with_new_weights_passes_its_input_on():
    """Glorot's depthwise kernels shrink their input; BatchNorm has to undo it, else the maps would be flat."""
    config = ModelConfig(backbone="efficientnet_lite2")
    network = build_transfer_network(config, num_labels=3, image_size=48, channels=1)
    classifier = FAMILIES["transfer"](network, ("a", "b", "c"), config=config, channels=1)
    images = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 1)).astype(np.uint8)

    def spread(parts):
        features = np.asarray(parts.pooling(parts.backbone(parts.face_input(images), training=False)))
        return float(features.std(axis=0).mean())

    assert spread(network) < 1e-3
    assert spread(randomise(classifier).parts) > 0.02
