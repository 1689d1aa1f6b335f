"""Figures of maps, of the way into the network, and the page of dlfer explain: what they say to those who read and hear."""

import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import ModelConfig
from dlfer.explain.explanation import Explanation, MapAverage
from dlfer.explain.figures import (
    Preparation,
    choose_examples,
    compute_otsu_threshold,
    compute_preparation,
    describe_place,
    describe_sanity,
    format_correlation,
    list_sanity_rows,
    write_averages,
    write_explanation,
    write_explanation_report,
    write_occlusion_page,
    write_preparation_page,
)
from dlfer.explain.gradcam import Cam
from dlfer.explain.occlusion import compute_occlusion
from dlfer.metrics.predictions import Predictions
from dlfer.model.families import FAMILIES
from dlfer.model.stage_network import build_transfer_network

LABELS = ("angry", "happy", "sad")


def predict(images):
    """Happy to the extent that the lower left quarter is bright."""
    bright = images[:, 8:, :8].mean(axis=(1, 2, 3)) / 255
    return np.stack([1 - bright, bright, 0 * bright], axis=1)


def make_explanation(*, num_cams=1, grid=(2, 2), target=1):
    image = np.full((16, 16, 1), 20, np.uint8)
    image[8:, :8] = 255
    values = np.zeros((16, 16), np.float32)
    values[12, 3] = 3
    cams = tuple(Cam("" if num_cams == 1 else f"branch{n}", "last", grid, values) for n in range(num_cams))
    found = compute_occlusion(predict, image, target, size=8, stride=8)
    return image, Explanation(predict(image[None])[0].astype(np.float32), target, found, cams)


def read_text(path):
    with Image.open(path) as figure:
        return figure.info["Title"], figure.info["Description"], figure.size


def test_a_figure_says_what_was_answered_where_it_hangs_and_what_it_does_not_show(tmp_path):
    image, explanation = make_explanation()
    path = write_explanation(tmp_path / "a.png", image, explanation, labels=LABELS, name="a.jpg")
    title, description, _ = read_text(path)
    assert title.startswith("a.jpg: predicted happy, 100 %. Explained: happy.")
    for words in (
        "8x8 pixels in steps of 8",
        "“happy”",
        "not why",
        "2x2 cells",
        "--feature-level",
        "A map shows neither what a person feels",
    ):
        assert words in title
    assert "greatest in the lower left, and changes the answer on 25 % of the image" in description
    assert description.endswith("Grad-CAM is greatest in the lower left.")


def test_another_label_is_named_with_its_probability_and_finer_maps_are_not_called_coarse(tmp_path):
    image, explanation = make_explanation(grid=(7, 7), target=0)
    title, _, _ = read_text(write_explanation(tmp_path / "a.png", image, explanation, labels=LABELS, name="a"))
    assert title.startswith("a: predicted happy, 100 %, of angry 0 %. Explained: angry.")
    assert "--feature-level" not in title
    assert "7x7 cells" in title


def test_one_method_speaks_of_itself_alone_and_many_networks_fill_rows(tmp_path):
    image, explanation = make_explanation(num_cams=8)
    alone = Explanation(explanation.probabilities, 1, explanation.occlusion, ())
    title, _, small = read_text(write_explanation(tmp_path / "a.png", image, alone, labels=LABELS, name="a"))
    assert "Grad-CAM" not in title
    cams = Explanation(explanation.probabilities, 1, None, explanation.cams)
    title, description, large = read_text(write_explanation(tmp_path / "b.png", image, cams, labels=LABELS, name="b"))
    assert "Occlusion" not in title
    assert "Grad-CAM branch7 is" in description
    assert large[1] > 1.5 * small[1]
    assert large[0] == small[0] < 450 * 160 / 96  # CSS pixels, at 160 dots per inch: a phone shows it at 80 % or more


def test_averages_say_of_how_many_and_how_firm_they_are(tmp_path):
    image, explanation = make_explanation()
    average = MapAverage("happy")
    for _ in range(2):
        average.add(image, explanation)
    title, description, _ = read_text(write_averages(tmp_path / "a.png", average.finish(), note="How it is made."))
    assert title.startswith("happy: mean of 2 faces, 2 of them predicted so. occlusion: the averages of two halves")
    assert title.endswith("How it is made.")
    assert "rank correlation 1.00" in title
    assert "occlusion: greatest in the lower left" in description


@pytest.mark.parametrize(
    ("place", "words"),
    [((0, 0), "upper left"), ((8, 8), "the middle"), ((15, 8), "lower middle"), ((8, 15), "middle right")],
)
def test_places_have_names(place, words):
    values = np.zeros((16, 16))
    values[place] = 1
    assert describe_place(values).endswith(words)
    assert describe_place(-values) == "nowhere above 0"


def test_correlations_are_written_with_a_true_minus():
    assert [format_correlation(value) for value in (0.834, -0.1, -0.004, None)] == ["0.83", "−0.10", "0.00", "none"]


def make_sanity(mean, *, alike=0.1, flat=0):
    values = {"mean": mean, "low": mean, "high": mean, "n": 6, "flat": flat}
    return {"all": {"occlusion": values}, "other_face": {"occlusion": {**values, "mean": alike, "flat": 0}}}


@pytest.mark.parametrize(
    ("mean", "alike", "words", "other"),
    [
        (0.02, 0.1, "it depends on what was learned.", "alike"),
        (0.97, 0.1, "it hardly depends on what was learned.", "alike"),
        (0.02, 0.83, "the maps of different faces are similar, too (0.83)", "hardly depends"),
        (None, None, "no verdict", "depends"),
    ],
)
def test_the_verdict_on_maps(mean, alike, words, other):
    [text] = describe_sanity(make_sanity(mean, alike=alike))
    assert words in text
    assert other not in text


def test_the_page_holds_the_figures_the_check_and_what_failed(tmp_path):
    image, explanation = make_explanation()
    write_explanation(tmp_path / "a.png", image, explanation, labels=LABELS, name="<a>")
    sanity = make_sanity(-0.2, flat=2)
    context = {
        **{"title": "Maps", "subtitle": "Model: m", "reading": ["How to read."], "failed": ["b.jpg: <no> picture"]},
        **{"sanity": list_sanity_rows(sanity), "verdicts": describe_sanity(sanity), "notice": "The notice."},
    }
    page = write_explanation_report(tmp_path, ["a", "absent"], context).read_text()
    for words in (
        "How to read.",
        "b.jpg: &lt;no&gt; picture",
        "all weights re-initialised",
        "−0.20",
        "6, 2 flat",
        "The notice.",
    ):
        assert words in page
    assert page.count("<img") == 1
    assert "<a>" not in page
    assert (
        "rank correlation"
        not in write_explanation_report(tmp_path, [], {**context, "sanity": [], "verdicts": []}).read_text()
    )


@pytest.mark.slow
def test_on_a_phone_nothing_on_the_page_scrolls_sideways(tmp_path, list_scrolled):
    image, explanation = make_explanation(num_cams=3)
    write_explanation(tmp_path / "a.png", image, explanation, labels=LABELS, name="a" * 100)
    long = "b" * 100
    rows = [
        {"what": "all weights re-initialised", "map": long, "mean": "0.10", "range": "−0.14 to −0.10", "n": "6, 2 flat"}
    ]
    context = {"title": long, "subtitle": long, "reading": [long], "failed": [long], "notice": long, "sanity": rows}
    assert list_scrolled(write_explanation_report(tmp_path, ["a"], {**context, "verdicts": [long]})) == []


def make_predictions() -> Predictions:
    targets = np.array([2, 0, 0, 2, 1, 0])
    return Predictions([f"i{i}" for i in range(6)], ("angry", "happy", "sad"), targets, np.full((6, 3), 1 / 3))


def test_examples_are_the_first_of_each_label():
    assert choose_examples(make_predictions()).tolist() == [1, 4, 0]
    assert choose_examples(make_predictions(), limit=2).tolist() == [1, 4]
    only = Predictions(["a"], ("angry", "happy"), [1], [[0.5, 0.5]])
    assert choose_examples(only).tolist() == [0]


def predict_left(images):
    """Happy to the extent that the left half is bright."""
    bright = images[:, :, :8].mean(axis=(1, 2, 3)) / 255
    return np.stack([1 - bright, bright, 0 * bright], axis=1)


def test_occlusion_page_says_what_the_maps_show_and_what_not(tmp_path):
    images = np.full((2, 16, 16, 1), 200, np.uint8)
    predictions = make_predictions()
    rows = np.array([4, 1])
    maps = [compute_occlusion(predict_left, images[0], target, size=8, stride=8, fill=0) for target in (1, 0)]
    path = write_occlusion_page(tmp_path, images, maps, predictions=predictions, rows=rows)
    assert path.name == "occlusion.png"
    with Image.open(path) as image:
        assert "a square of 8x8 pixels" in image.text["Title"]
        assert "not why" in image.text["Title"]
        assert "happy predicted as happy, 78 % for happy" in image.text["Description"]
        assert (
            "lowers that by up to 39 percentage points on average and changes the predicted label on 50 % of the image"
            in image.text["Description"]
        )
        assert "angry predicted as happy" in image.text["Description"]
    assert write_occlusion_page(tmp_path, images[:0], [], predictions=predictions, rows=rows[:0]) is None


def test_preparation_page_names_each_station(tmp_path):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    preparation = Preparation(
        resized=np.zeros((2, 24, 24, 3), np.uint8),
        grey=np.zeros((2, 24, 24), np.uint8),
        binary=np.zeros((2, 24, 24), bool),
        features=(("first features", np.ones((2, 12, 12))), ("last features", np.ones((2, 3, 3)))),
    )
    path = write_preparation_page(tmp_path, images, preparation, ["happy", "sad"])
    with Image.open(path) as image:
        assert "stored 16x16, resized 24x24" in image.text["Description"]
        assert "first features, 12x12; last features, 3x3" in image.text["Description"]
        assert "the network gets the resized image" in image.text["Title"]


@pytest.mark.parametrize("seed", range(8))
def test_otsu_is_opencvs(seed):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.integers(20, 235, 2))
    grey = np.where(rng.random((40, 40)) < rng.uniform(0.2, 0.8), low, high) + rng.normal(0, 12, (40, 40))
    grey = grey.round().clip(0, 255).astype(np.uint8)
    expected, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    assert compute_otsu_threshold(grey) == expected


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("branches", [(), ("efficientnet_nano", "resnet_nano")])
def test_stations_have_their_form_and_the_last_features_are_those_that_are_pooled(branches, channels):
    family = "hybrid" if branches else "transfer"
    config = ModelConfig(family=family, backbone="efficientnet_nano", branches=branches)
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=channels)
    classifier = FAMILIES[family](network, ("a", "b", "c"), config=config, channels=channels)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, channels)).astype(np.uint8)
    found = compute_preparation(classifier, images)
    assert found.resized.shape == (2, 32, 32, channels)
    assert found.grey.shape == found.binary.shape == (2, 32, 32)
    assert found.binary.dtype == bool
    assert len(found.features) == 2 * max(1, len(branches))
    assert all(values.ndim == 3 and len(values) == 2 for _, values in found.features)
    if not branches:
        last = np.abs(np.asarray(network.backbone(network.face_input(images)))).mean(axis=-1)
        assert np.allclose(found.features[1][1], last, atol=1e-5)
