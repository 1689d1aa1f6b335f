from __future__ import annotations

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.metrics.predictions import Predictions, read_predictions, write_predictions


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
