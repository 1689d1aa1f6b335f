from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from dlfer.metrics.predictions import Predictions
from dlfer.report import curves, figures, pictures
from dlfer.report.page import load_figures


def make_predictions(n=40, num_classes=3, seed=0, targets=None) -> Predictions:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, num_classes, n) if targets is None else targets
    probabilities = generator.dirichlet(np.ones(num_classes), len(targets))
    labels = tuple(f"class {c}" for c in range(num_classes))
    return Predictions([f"t/{i}" for i in range(len(targets))], labels, targets, probabilities)


def test_a_written_figure_carries_its_caption_and_description(tmp_path):
    path = figures.write_figure(
        curves.draw_roc(make_predictions()), tmp_path / "f" / "h.png", title="Title", description="Was man sieht ü"
    )
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["Title"] == "Title"
        assert image.info["Description"] == "Was man sieht ü"
    assert [entry.name for entry in path.parent.iterdir()] == ["h.png"]


@pytest.mark.filterwarnings("error")
def test_figures_show_control_characters_escaped(tmp_path):
    labels = ["\x1b[31mred", "left\u202eright", "$x_{$"]
    figure = pictures.draw_confusion(np.eye(3, dtype=int), labels)
    figure.axes[0].set_title("\x07bell")
    figures.write_figure(figure, tmp_path / "a.png", title="\x1b", description="\x1b")
    drawn = [text.get_text() for text in figure.axes[0].get_xticklabels()] + [figure.axes[0].get_title()]
    assert drawn == [r"\x1b[31mred", r"left\u202eright", "$x_{$", r"\x07bell"]


SCRIPTS = ("Happy", "Грусть", "怒り", "غاضب", "गुस्सा जी", "ዜና ደስታ", "Wut 惊讶")


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_or_numbered(tmp_path):
    """An installed font that has the characters is used; otherwise the figure shows a number, and a legend explains it."""
    figure = pictures.draw_confusion(np.eye(len(SCRIPTS), dtype=int), SCRIPTS)
    path = figures.write_figure(figure, tmp_path / "a.png", title="t", description="d")
    with Image.open(path) as image:
        legend = image.info.get("Legend", "")
    drawn = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    families, missing = figures._choose_fonts(frozenset("".join(SCRIPTS)) - {" "})
    numbered = {number: word for number, word in re.findall(r"(\[\d+\]) ([^,]+?)(?=, \[|\.$)", legend)}
    for name, text in zip(SCRIPTS, drawn, strict=True):
        # A word of which a character is missing is a number; what the legend says of it gives the name again.
        assert ("[" in text) == bool(missing & set(name)), name
        assert re.sub(r"\[\d+\]", lambda found: numbered[found[0]], text) == name
    assert drawn[:2] == ["Happy", "Грусть"]
    known = set().union(*(figures._read_characters(family) for family in ("DejaVu Sans", *families)))
    assert {ord(character) for text in drawn for character in text if figures._is_drawn(character)} <= known


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("names", "shown", "legend"),
    [
        (("怒り", "笑"), ["[1]", "[2]"], "[1] 怒り, [2] 笑."),
        (("怒り", "怒り 2", "dir/怒.png"), ["[1]", "[1] 2", "dir/[2].png"], "[1] 怒り, [2] 怒."),
        (("गुस्सा जी", "Wut गुस्सा"), ["[1]", "Wut [2]"], "[1] गुस्सा जी, [2] गुस्सा."),
        (("a", "→ 50 %"), ["a", "→ 50 %"], None),
    ],
)
def test_without_a_font_names_become_numbers_with_a_legend(tmp_path, monkeypatch, names, shown, legend):
    monkeypatch.setattr(figures, "_choose_fonts", lambda characters: ((), characters))
    figure = pictures.draw_confusion(np.eye(len(names), dtype=int), names)
    figure.axes[0].set_title(names[0])
    figures.write_figure(figure, tmp_path / "a.png", title="t", description=names[0])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == shown
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"{text}\nn = 1" for text in shown]
    assert figure.axes[0].get_title() == shown[0]
    [placed] = load_figures(tmp_path, ["a"]).values()
    assert placed.description == names[0]
    assert placed.legend.endswith(legend) if legend else not placed.legend


def test_a_page_inverts_charts_in_dark_mode_and_leaves_photographs(tmp_path):
    figures.write_figure(curves.draw_roc(make_predictions()), tmp_path / "roc.png", title="t", description="d")
    faces = pictures.draw_image_grid(np.zeros((2, 8, 8, 1), np.uint8), ["a", "b"])
    figures.write_figure(faces, tmp_path / "faces.png", title="t", description="d")
    figures.stamp_banner(tmp_path, ["roc", "faces"], "A banner.")
    placed = load_figures(tmp_path, ["roc", "faces"])
    assert (placed["roc"].is_chart, placed["faces"].is_chart) == (True, False)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first, second = (
        figures.write_figure(curves.draw_roc(make_predictions()), tmp_path / name, title="t", description="d")
        for name in ("a.png", "b.png")
    )
    assert first.read_bytes() == second.read_bytes()


def test_confusion_writes_row_percent_and_count_in_every_cell():
    axes = pictures.draw_confusion(np.array([[3, 1], [0, 0]]), ("angry", "happy")).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["75 %\n3", "25 %\n1", "0 %\n0", "0 %\n0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["angry\nn = 4", "happy\nn = 0"]


def test_confusion_of_many_classes_has_colours_only():
    figure = pictures.draw_confusion(np.eye(30, dtype=int), [str(c) for c in range(30)])
    assert not figure.axes[0].texts


@pytest.mark.parametrize("channels", [1, 3])
def test_error_page_names_target_and_prediction(tmp_path, channels):
    predictions = Predictions(["a", "b"], ("sad", "happy"), [0, 1], [[0.2, 0.8], [0.9, 0.1]])
    images = np.zeros((2, 8, 8, channels), dtype=np.uint8)
    path = pictures.write_error_page(tmp_path, images, predictions, np.array([1, 0]))
    with Image.open(path) as image:
        assert "happy → sad 90 %; sad → happy 80 %" in image.info["Description"]
    assert path.name == "errors.png"


def test_error_page_without_errors_is_not_written(tmp_path):
    predictions = make_predictions()
    assert pictures.write_error_page(tmp_path, np.zeros((0, 8, 8, 1), np.uint8), predictions, np.array([], int)) is None
    assert list(tmp_path.iterdir()) == []


def test_augmented_page(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    with Image.open(pictures.write_augmented_page(tmp_path, images, ["sad"] * 4 + ["happy"])) as image:
        assert image.info["Description"] == "5 augmented training images of the classes happy, sad."


BANNER = "Published protocol, not a clean test: 4 of 60 test images have a duplicate in training – " + "compare. " * 20


def read_png(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), image.text, image.info["dpi"]


@pytest.fixture
def drawn(tmp_path):
    return figures.write_figure(curves.draw_roc(make_predictions()), tmp_path / "roc.png", title="t", description="ü")


def test_a_banner_is_drawn_above_the_figure_and_kept_in_its_text(drawn):
    before, _, dpi = read_png(drawn)
    figures.stamp_banner(drawn.parent, ["roc", "absent"], BANNER)
    after, text, stamped_dpi = read_png(drawn)
    height = int(text["Banner height"])
    assert text["Banner"] == BANNER
    assert (text["Title"], text["Description"]) == ("t", "ü")
    assert stamped_dpi == pytest.approx(dpi)
    assert height > 60
    np.testing.assert_array_equal(after[height:], before)
    assert len(np.unique(after[:height].reshape(-1, 3), axis=0)) > 10
    assert [entry.name for entry in drawn.parent.iterdir()] == ["roc.png"]


def test_a_banner_is_drawn_once_replaced_by_another_and_taken_away(drawn):
    bare = read_png(drawn)[0]
    figures.stamp_banner(drawn.parent, ["roc"], BANNER)
    once = drawn.read_bytes()
    figures.stamp_banner(drawn.parent, ["roc"], BANNER)
    assert drawn.read_bytes() == once
    figures.stamp_banner(drawn.parent, ["roc"], "Smoke run.")
    shorter, text, _ = read_png(drawn)
    assert text["Banner"] == "Smoke run."
    np.testing.assert_array_equal(shorter[int(text["Banner height"]) :], bare)
    figures.stamp_banner(drawn.parent, ["roc"], None)
    again, text, _ = read_png(drawn)
    np.testing.assert_array_equal(again, bare)
    assert set(text) == {"Title", "Description", "Software", "Kind"}


def test_a_figure_without_a_banner_is_left_as_it_is(drawn):
    before = drawn.read_bytes()
    figures.stamp_banner(drawn.parent, ["roc"], None)
    assert drawn.read_bytes() == before
