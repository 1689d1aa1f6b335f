from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dlfer.metrics.learned import find_learning_failure, list_verdicts
from dlfer.metrics.predictions import Predictions

LABELS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")
SHARES = np.array([3995, 436, 4097, 7215, 4830, 3171, 4965]) / 28709


def make_train(accuracy: float, n: int = 2000, *, confidence: float = 0.5, shares=SHARES) -> Predictions:
    """Predictions that are right on a share of the images of each class alike."""
    targets = np.repeat(np.arange(len(shares)), np.round(shares * n).astype(int))
    n = len(targets)
    right = np.random.default_rng(0).permutation(n) < accuracy * n
    predicted = np.where(right, targets, (targets + 1) % len(shares))
    probabilities = np.full((n, len(shares)), (1 - confidence) / max(len(shares) - 1, 1))
    probabilities[np.arange(n), predicted] = confidence
    ids = np.array([f"train/{i}" for i in range(n)])
    labels = LABELS if len(shares) == 7 else tuple(f"class {number}" for number in range(len(shares)))
    return Predictions(ids, labels, targets, probabilities)


def make_majority(n: int = 2000) -> Predictions:
    train = make_train(1.0, n)
    probabilities = np.tile(np.r_[[0.1] * 3, 0.4, [0.1] * 3], (len(train), 1))
    return Predictions(train.ids, train.labels, train.targets, probabilities)


def test_always_answering_the_largest_class_is_no_learning():
    why = find_learning_failure(make_majority())
    assert why == (
        "its accuracy on 1,999 training images is 25.2 % (95 % interval 23.3 to 27.1), and always answering Happy is "
        "right on 25.2 %"
    )


@pytest.mark.parametrize(("accuracy", "has_learned"), [(0.25, False), (0.30, False), (0.40, True), (0.70, True)])
def test_the_accuracy_must_be_clearly_above_the_largest_class(accuracy, has_learned):
    assert (find_learning_failure(make_train(accuracy)) is None) == has_learned


def test_few_images_show_less():
    assert find_learning_failure(make_train(0.42, 2000)) is None
    assert find_learning_failure(make_train(0.42, 60)) is not None


def test_among_many_classes_a_low_accuracy_can_be_learned():
    train = make_train(0.1, 10_000, confidence=0.1, shares=np.full(200, 1 / 200))
    assert find_learning_failure(train) is None


def test_a_loss_at_its_start_is_no_learning():
    # Right more often than the largest class, by probabilities that have not left 1/7.
    flat = make_train(0.45, confidence=1 / 7 + 1e-3)
    why = find_learning_failure(flat)
    assert "its loss on" in why
    assert "ln(7) = 1.946" in why


def test_without_predictions_the_history_is_judged():
    rows = [{"epoch": "1", "train_loss": "1.80"}, {"epoch": "2", "train_loss": str(math.log(7) - 0.001)}]
    why = find_learning_failure(None, rows, num_classes=7)
    assert why == ("its training loss after epoch 2 is 1.945, and answering 1/7 for each class has ln(7) = 1.946")
    assert find_learning_failure(None, rows[:1], num_classes=7) is None
    assert find_learning_failure(None, [], num_classes=7) is None


def test_a_single_class_cannot_be_learned_from():
    train = make_train(1.0, 100, confidence=1.0, shares=np.array([1.0]))
    assert find_learning_failure(train) is not None


def test_pairs_without_a_conclusion_are_one_sentence_that_names_each_training_once():
    def make(name, *reasons):
        return SimpleNamespace(sentence=f"{name} is better.", not_learned=list(reasons))

    good, one, two = make("good"), make("one", "a, seed 0: poor", "b, seed 0: poor"), make("two", "a, seed 0: poor")
    assert list_verdicts([good, one]) == [("good is better.", False), ("one is better.", True)]
    (text, is_failed), rest = list_verdicts([one, good, two])
    assert is_failed
    assert text.startswith(
        "No conclusion from 2 of 3 comparisons, since training did not learn: a, seed 0: poor; b, seed 0: poor."
    )
    assert text.count("a, seed 0") == text.count("Try another") == 1
    assert rest == ("good is better.", False)
    many = [make(str(number), f"cell {number}: poor") for number in range(40)]
    ((text, _),) = list_verdicts(many)
    assert "cell 5: poor; and 34 more." in text
