from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dlfer.metrics.predictions import Predictions
from dlfer.report.figures import DOTS_PER_INCH, write_figure
from dlfer.report.pictures import draw_image_grid, find_confusions, write_confusion_page


def make_predictions(n=200, seed=0) -> Predictions:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet([3, 2, 1, 1], n)
    return Predictions([f"i{i}" for i in range(n)], ("a", "b", "c", "d"), generator.integers(0, 4, n), probabilities)


def test_confusions_are_the_commonest_and_most_confident():
    predictions = make_predictions()
    pairs = list(zip(predictions.targets.tolist(), predictions.predicted.tolist(), strict=True))
    counts = Counter(pair for pair in pairs if pair[0] != pair[1])
    found = find_confusions(predictions)
    assert [counts[pairs[rows[0]]] for rows in found] == sorted(counts.values(), reverse=True)[:3]
    for rows in found:
        kind = pairs[rows[0]]
        sure = sorted(
            (predictions.probabilities[i].max() for i, pair in enumerate(pairs) if pair == kind), reverse=True
        )
        assert [pairs[row] for row in rows] == [kind] * 6
        assert [predictions.probabilities[row].max() for row in rows] == sure[:6]


def test_confusion_page_says_counts_and_shares(tmp_path):
    probabilities = [[0.1, 0.9], [0.3, 0.7], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6]]
    predictions = Predictions(list("uvwxy"), ("sad", "happy"), [0, 0, 0, 1, 1], probabilities)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    path = write_confusion_page(tmp_path, images, predictions)
    assert path.name == "confusions.png"
    with Image.open(path) as image:
        assert (
            "sad → happy: 2 images, 67 % of sad; shown with the probabilities 90 %, 70 %" in image.text["Description"]
        )
        assert "happy → sad: 1 image, 50 % of happy; shown with the probabilities 60 %" in image.text["Description"]


def test_nothing_is_written_where_all_are_right(tmp_path):
    predictions = Predictions(["u"], ("sad", "happy"), [0], [[0.9, 0.1]])
    assert write_confusion_page(tmp_path, np.zeros((1, 8, 8, 1), np.uint8), predictions) is None
    assert list(tmp_path.iterdir()) == []


def render(figure, path) -> np.ndarray:
    with Image.open(write_figure(figure, path, title="t", description="d")) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def find_box(pixels: np.ndarray, colour: np.ndarray) -> tuple[int, int, int, int]:
    """Return the first and last row and column that have a colour, within two levels of it."""
    rows, columns = np.nonzero((np.abs(pixels - colour) <= 2).all(axis=-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_images_of_a_page_are_in_reading_order_apart_and_of_one_size(tmp_path):
    colours = np.array([[40 + 20 * number, 200 - 15 * number, 90] for number in range(8)])
    images = np.broadcast_to(colours[:, None, None], (8, 12, 12, 3)).astype(np.uint8)
    pixels = render(draw_image_grid(images, ["one line\nand another"] * 8, columns=3), tmp_path / "page.png")
    boxes = [find_box(pixels, colour) for colour in colours]
    sides = {side for top, bottom, left, right in boxes for side in (bottom - top, right - left)}
    assert max(sides) - min(sides) <= 1
    for number, (top, _, left, _) in enumerate(boxes):
        if number % 3:
            assert top == boxes[number - 1][0]
            assert left > boxes[number - 1][3]
        if number >= 3:
            assert left == boxes[number - 3][2]
            # Two lines of 8.5 points above each image.
            assert top - boxes[number - 3][1] > 2 * 8.5 / 72 * DOTS_PER_INCH
    assert boxes[0][0] > 2 * 8.5 / 72 * DOTS_PER_INCH
    assert boxes[-1][1] < len(pixels) - 1


def test_an_image_keeps_its_proportions(tmp_path):
    image = np.full((1, 10, 20, 1), 77, np.uint8)
    top, bottom, left, right = find_box(
        render(draw_image_grid(image, ["wide"]), tmp_path / "wide.png"), np.array([77, 77, 77])
    )
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.03)


def test_images_of_a_confusion_stand_below_its_heading_in_one_row(tmp_path):
    rows = 4 * [0.9], 2 * [0.8]
    probabilities = [[1 - p, p] for p in rows[0]] + [[p, 1 - p] for p in rows[1]]
    predictions = Predictions(list("abcdef"), ("sad", "happy"), [0] * 4 + [1] * 2, probabilities)
    levels = np.array([50, 80, 110, 140, 170, 200])
    images = np.broadcast_to(levels[:, None, None, None], (6, 8, 8, 1)).astype(np.uint8)
    with Image.open(write_confusion_page(tmp_path, images, predictions)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    boxes = [find_box(pixels, np.full(3, level)) for level in levels]
    assert len({box[0] for box in boxes[:4]}) == len({box[0] for box in boxes[4:]}) == 1
    assert boxes[4][0] > boxes[0][1]
    assert [box[2] for box in boxes[:4]] == sorted(box[2] for box in boxes[:4])
