"""Combinations of classifiers, against scikit-learn and against votes counted by hand."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dlfer.errors import DataError
from dlfer.metrics.combine import (
    SMALLEST,
    TrainedCombination,
    combine_average,
    combine_vote,
    fit_combination,
    predict_out_of_fold,
)


def draw(num_members: int = 2, num_images: int = 400, num_classes: int = 4, seed: int = 0):
    """Members that are right somewhat more often than not, the second one much more."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, num_classes, num_images)
    scores = rng.normal(size=(num_members, num_images, num_classes))
    scores += np.arange(1, num_members + 1)[:, None, None] * np.eye(num_classes)[targets]
    raised = np.exp(scores)
    return (raised / raised.sum(axis=2, keepdims=True)).astype(np.float32), targets


def test_the_average_is_the_mean():
    probabilities, _ = draw(3)
    assert np.allclose(combine_average(probabilities), sum(probabilities.astype(float)) / 3)


def test_votes_are_counted_and_ties_go_to_the_average():
    several = np.array(
        [
            [[0.5, 0.4, 0.1], [0.6, 0.4, 0.0]],
            [[0.5, 0.4, 0.1], [0.0, 0.9, 0.1]],
            [[0.0, 1.0, 0.0], [0.1, 0.2, 0.7]],
        ]
    )
    found = combine_vote(several)
    # Two votes beat one that is sure; of three different votes the average, 0.5 for the second, decides.
    assert found.argmax(axis=1).tolist() == [0, 1]
    assert np.allclose(found.sum(axis=1), 1)
    assert np.allclose(found[0], [(2 + 1 / 3) / 4, (1 + 0.6) / 4, (0.2 / 3) / 4])


@pytest.mark.parametrize("num_members", [2, 5])
def test_no_average_turns_a_majority(num_members):
    probabilities, _ = draw(num_members, 2000, seed=1)
    counts = np.eye(4)[probabilities.argmax(axis=2)].sum(axis=0)
    winners = combine_vote(probabilities).argmax(axis=1)
    assert np.array_equal(counts[np.arange(2000), winners], counts.max(axis=1))


def test_the_trained_combination_is_scikit_learns_logistic_regression():
    probabilities, targets = draw()
    inputs = np.concatenate(list(np.log(np.maximum(probabilities.astype(float), SMALLEST))), axis=1)
    oracle = LogisticRegression(C=1.0, tol=1e-9, max_iter=10000).fit(inputs, targets)
    found = fit_combination(probabilities, targets)
    assert np.allclose(found.coefficients, oracle.coef_.T, atol=2e-3)
    fresh, _ = draw(seed=5)
    expected = oracle.predict_proba(np.concatenate(list(np.log(fresh.astype(float))), axis=1))
    assert np.allclose(found.predict(fresh), expected, atol=1e-3)
    assert np.allclose(found.predict(fresh).sum(axis=1), 1)


def test_it_is_kept_as_numbers_exactly():
    probabilities, targets = draw()
    fitted = fit_combination(probabilities, targets)
    again = TrainedCombination.from_dict(json.loads(json.dumps(fitted.as_dict())))
    assert np.array_equal(again.predict(probabilities), fitted.predict(probabilities))


@pytest.mark.slow
def test_out_of_fold_no_image_helps_to_answer_itself():
    """With random targets nothing can be learned; the fit itself would be right more often than chance."""
    rng = np.random.default_rng(2)
    probabilities, _ = draw(3, 120, 6)
    targets = rng.integers(0, 6, 120)
    inside = fit_combination(probabilities, targets).predict(probabilities)
    outside = predict_out_of_fold(probabilities, targets)
    assert np.allclose(outside.sum(axis=1), 1)
    assert (inside.argmax(axis=1) == targets).mean() > 0.28
    assert (outside.argmax(axis=1) == targets).mean() < 0.28
    assert np.array_equal(predict_out_of_fold(probabilities, targets), outside)


def test_probabilities_of_zero_and_few_images_are_taken():
    several = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    found = predict_out_of_fold(several, np.array([0, 1]))
    assert np.isfinite(found).all()
    with pytest.raises(DataError, match="no image"):
        fit_combination(np.zeros((2, 0, 3)), np.zeros(0, int))
