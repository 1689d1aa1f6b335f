from __future__ import annotations

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.metrics import several
from dlfer.metrics.paired import compute_mcnemar
from dlfer.metrics.predictions import Predictions
from dlfer.runs.comparison_record import CochranQ
from dlfer.runs.metrics_record import McNemar

LABELS = ("no", "yes", "perhaps")


def make(correct, *, ids=None, labels=LABELS, order=None) -> Predictions:
    """Predictions that are right where `correct` (bool [N]) says so, with ids test/0..N-1."""
    correct = np.asarray(correct, dtype=bool)
    n = len(correct)
    targets = np.arange(n) % 3
    predicted = np.where(correct, targets, (targets + 1) % 3)
    ids = np.array([f"test/{i}" for i in range(n)]) if ids is None else np.asarray(ids)
    # The same answers under another order of labels: codes are positions in `labels`.
    code = np.array([labels.index(label) for label in LABELS])
    order = np.arange(n) if order is None else order
    probabilities = np.full((n, 3), 0.1)
    probabilities[np.arange(n), code[predicted]] = 0.8
    return Predictions(ids[order], labels, code[targets][order], probabilities[order])


def draw(k: int, n: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    ease = generator.uniform(0.3, 0.9, n)
    return [generator.random(n) < np.clip(ease + 0.05 * i, 0, 1) for i in range(k)]


@pytest.mark.parametrize(("k", "n"), [(2, 30), (3, 200), (5, 1000)])
def test_cochran_q_is_that_of_statsmodels(k, n):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    correct = np.stack(draw(k, n))
    expected = tables.cochrans_q(correct.T.astype(int))
    found = several.compute_cochran_q(correct)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.df == expected.df == k - 1


@pytest.mark.parametrize("correct", [np.ones((3, 1)), np.zeros((3, 5)), np.tile([True, False], (4, 3))])
def test_cochran_q_of_those_who_always_agree_is_nothing(correct):
    assert several.compute_cochran_q(correct) == CochranQ(statistic=0.0, p=1.0, df=len(correct) - 1)


@pytest.mark.parametrize("p_values", [[0.5], [0.01, 0.04, 0.03], [0.02, 0.02, 0.02], [1.0, 0.0, 0.9, 0.011]])
def test_holm_is_that_of_statsmodels(p_values):
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    assert several.compute_holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_rows_are_matched_by_id_and_labels_by_name():
    a, b, c = draw(3, 60)
    shuffled = make(b, order=np.random.default_rng(1).permutation(60))
    renamed = make(c, labels=("perhaps", "no", "yes"))
    straight = several.compare_several([make(a), make(b), make(c)], ["a", "b", "c"])
    assert several.compare_several([make(a), shuffled, renamed], ["a", "b", "c"]) == straight
    assert straight.n_common == 60
    assert straight.runs[1].accuracy.value == pytest.approx(b.mean())


def test_only_common_images_count_and_the_rest_is_told():
    a, b = draw(2, 50)
    result = several.compare_several([make(a), make(b).take(np.arange(10, 50))], ["a", "b"])
    assert result.n_common == 40
    assert [run.left_out for run in result.runs] == [10, 0]
    assert [run.n for run in result.runs] == [50, 40]
    assert result.runs[0].accuracy.value == pytest.approx(a[10:].mean())


def test_a_pair_holds_its_test_and_holms_correction():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    correct = draw(3, 400)
    result = several.compare_several([make(row) for row in correct], ["x", "y", "z"])
    assert [(pair.a, pair.b) for pair in result.pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    p_values = []
    for pair, (i, j) in zip(result.pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        counts = int((correct[i] & ~correct[j]).sum()), int((correct[j] & ~correct[i]).sum())
        assert (pair.mcnemar.b, pair.mcnemar.c) == counts
        assert (pair.mcnemar.method, pair.mcnemar.p) == compute_mcnemar(*counts)
        table = [[0, counts[0]], [counts[1], 0]]
        p_values.append(tables.mcnemar(table, exact=sum(counts) < 25, correction=True).pvalue)
        assert pair.mcnemar.p == pytest.approx(p_values[-1])
        assert pair.difference.value == pytest.approx(correct[i].mean() - correct[j].mean())
        assert pair.difference.low < pair.difference.value < pair.difference.high
    expected = multitest.multipletests(p_values, method="holm")[1]
    assert [pair.p_holm for pair in result.pairs] == pytest.approx(expected)
    assert result.cochran_q.df == 2


def test_holm_can_take_a_difference_back():
    """One pair with p = 0.02 is significant alone; among ten pairs it is not, and the sentence says why."""
    a = np.repeat([True, True, False], [40, 17, 43])
    b = np.repeat([True, False, True, False], [40, 17, 5, 38])
    alone = several.compare_several([make(a), make(b)], ["a", "b"])
    assert alone.pairs[0].is_significant
    assert alone.cochran_q is None
    among = several.compare_several([make(a), make(b), make(a), make(a), make(b)], ["a", "b", "c", "d", "e"])
    assert not among.pairs[0].is_significant
    assert "n = 100): no significant difference" in among.pairs[0].sentence
    assert "by Holm over 10 pairs" in among.pairs[0].sentence


@pytest.mark.parametrize("n", [1, 2, 40])
def test_identical_runs_do_not_differ(n):
    correct = np.arange(n) % 2 == 0
    result = several.compare_several([make(correct)] * 3, ["a", "b", "c"])
    assert result.cochran_q.p == 1.0
    for pair in result.pairs:
        assert pair.difference.value == 0
        assert pair.difference.low < 0 < pair.difference.high
        assert pair.mcnemar == McNemar(b=0, c=0, p=1.0, method="McNemar's exact test")
        assert (pair.p_holm, pair.required_n, pair.is_significant) == (1.0, None, False)


def test_what_cannot_be_compared_is_refused():
    a = make(np.ones(6))
    with pytest.raises(DataError, match="two or more"):
        several.compare_several([a], ["a"])
    with pytest.raises(DataError, match="b: found no id in common with a"):
        several.compare_several([a, make(np.ones(3), ids=["x", "y", "z"])], ["a", "b"])
    other = Predictions(a.ids, ("no", "yes", "never"), a.targets, a.probabilities)
    with pytest.raises(DataError, match="b: found the labels no, yes, never, expected those of a"):
        several.compare_several([a, other], ["a", "b"])
    wrong = Predictions(a.ids, a.labels, (a.targets + np.array([0, 0, 1, 0, 0, 0])) % 3, a.probabilities)
    with pytest.raises(DataError, match=r"b: 1 of 6 images have another target than in a.*'test/2': no, there perhaps"):
        several.compare_several([a, wrong], ["a", "b"])
