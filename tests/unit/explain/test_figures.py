"""Figures and the page of dlfer explain: what they say to those who read and to those who hear."""

import numpy as np
import pytest
from PIL import Image

from dlfer.explain.explanation import Explanation, MapAverage
from dlfer.explain.figures import (
    describe_place,
    describe_sanity,
    format_correlation,
    list_sanity_rows,
    write_averages,
    write_explanation,
    write_explanation_report,
)
from dlfer.explain.gradcam import Cam
from dlfer.explain.occlusion import compute_occlusion

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
        "No map shows what a person feels",
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
        (0.02, 0.83, "the maps of different faces are alike, too (0.83)", "hardly depends"),
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
