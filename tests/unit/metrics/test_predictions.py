from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dlfer.errors import DataError
from dlfer.metrics.predictions import (
    SMALLEST,
    Predictions,
    TrainedCombination,
    combine_average,
    combine_vote,
    fit_combination,
    predict_out_of_fold,
    read_predictions,
    write_predictions,
)


def make(**changes) -> Predictions:
    values = {
        "ids": np.array(["Training/0", "Training/1", "gesicht-ü"]),
        "labels": ("angry", "happy"),
        "targets": np.array([0, 1, 1]),
        "probabilities": np.array([[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]),
    }
    return Predictions(**{**values, **changes})


def test_construction_converts_dtypes_and_breaks_ties_towards_the_first_class():
    predictions = make(targets=np.array([0, 1, 1], dtype=np.uint8), labels=["angry", "happy"])
    assert predictions.targets.dtype == np.int64
    assert predictions.probabilities.dtype == np.float32
    assert predictions.labels == ("angry", "happy")
    assert predictions.predicted.tolist() == [0, 0, 1]
    assert predictions.correct.tolist() == [True, False, True]
    assert len(predictions) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": np.array([[0.5, 0.4], [0.5, 0.5], [0.1, 0.9]])}, "row 0 .Training/0. .* sum 0.9"),
        ({"probabilities": np.array([[np.nan, 1], [0.5, 0.5], [0.1, 0.9]])}, "row 0 .* NaN"),
        ({"probabilities": np.array([[1.5, -0.5], [0.5, 0.5], [0.1, 0.9]])}, "values in 0..1"),
        ({"probabilities": np.ones((3, 1))}, "shape|\\(3, 1\\)"),
        ({"ids": ["a", "a", "b"]}, "'a' occurs more than once"),
        ({"ids": ["a", "b"]}, "expected \\[N\\]"),
        ({"targets": np.array([0, 1, 2])}, "row 2 .* target 2; expected 0..1"),
        ({"targets": np.array([0, -1, 1])}, "row 1 .* target -1"),
        ({"targets": np.array([0.0, 1.0, 1.0])}, "dtype float64"),
        ({"labels": ("angry", "angry")}, "no two alike"),
        ({"ids": [], "targets": [], "probabilities": np.zeros((0, 2))}, "found no row"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_sums_within_the_tolerance_pass():
    make(probabilities=np.array([[0.75, 0.25009], [0.5, 0.5], [0.1, 0.9]]))


def test_take_selects_rows():
    assert make().take(np.array([2, 0])).ids.tolist() == ["gesicht-ü", "Training/0"]
    assert len(make().take(np.array([True, False, False]))) == 1


def test_write_and_read_are_inverse_and_leave_no_other_file(tmp_path):
    path = tmp_path / "predictions" / "test.npz"
    assert write_predictions(make(), path) == path
    write_predictions(make(), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["test.npz"]
    back, expected = read_predictions(path), make()
    assert back.labels == expected.labels
    for name in ("ids", "targets", "probabilities"):
        np.testing.assert_array_equal(getattr(back, name), getattr(expected, name))
        assert getattr(back, name).dtype.kind == getattr(expected, name).dtype.kind


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_predictions(make(), tmp_path / "test.npz")
    before = path.read_bytes()

    def fail(stream, **_arrays):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        write_predictions(make(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["test.npz"]


def test_absent_damaged_and_pickled_files_are_refused_with_their_path(tmp_path):
    with pytest.raises(DataError, match=r"none.npz: no such file"):
        read_predictions(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"text.npz: not a predictions file"):
        read_predictions(tmp_path / "text.npz")
    cut = write_predictions(make(), tmp_path / "cut.npz")
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cut.npz: not a predictions file"):
        read_predictions(cut)
    np.savez(tmp_path / "pickle.npz", ids=np.array([{}]), labels=["a"], targets=[0], probabilities=[[1.0]])
    with pytest.raises(DataError, match=r"pickle.npz: not a predictions file"):
        read_predictions(tmp_path / "pickle.npz")
    np.savez(tmp_path / "other.npz", ids=np.array(["a"]))
    with pytest.raises(DataError, match=r"other.npz: .*labels, targets, probabilities missing"):
        read_predictions(tmp_path / "other.npz")


def test_a_file_whose_arrays_do_not_fit_is_refused_with_its_path(tmp_path):
    np.savez(tmp_path / "bad.npz", ids=["a"], labels=["x", "y"], targets=[0], probabilities=[[0.5, 0.1]])
    with pytest.raises(DataError, match=r"bad.npz: predictions: row 0"):
        read_predictions(tmp_path / "bad.npz")


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
