from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image

from dlfer.evaluate.predictions import Predictions
from dlfer.report.pictures import find_confusions, write_confusion_page


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
