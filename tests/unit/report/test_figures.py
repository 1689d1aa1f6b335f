from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dlfer.metrics.predictions import Predictions
from dlfer.report import curves, figures, pictures


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
    assert set(text) == {"Title", "Description", "Software"}


def test_a_figure_without_a_banner_is_left_as_it_is(drawn):
    before = drawn.read_bytes()
    figures.stamp_banner(drawn.parent, ["roc"], None)
    assert drawn.read_bytes() == before
