"""Laws of comparisons that hold whatever the predictions are."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfer.metrics.paired import compute_mcnemar, compute_required_n, compute_tango_interval
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_group_scores
from dlfer.metrics.several import compare_several, compute_cochran_q, compute_holm

tables = pytest.importorskip("statsmodels.stats.contingency_tables")
multitest = pytest.importorskip("statsmodels.stats.multitest")

counts = st.integers(0, 60)


@given(counts, counts)
def test_mcnemar_equals_statsmodels(a_only, b_only):
    n = a_only + b_only
    expected = tables.mcnemar([[3, a_only], [b_only, 2]], exact=n < 25, correction=True).pvalue
    assert compute_mcnemar(a_only, b_only)[1] == pytest.approx(min(1.0, float(expected)), rel=1e-9)


@given(counts, counts, st.integers(0, 100))
def test_interval_holds_the_difference_and_turns_with_the_order(a_only, b_only, others):
    n = max(a_only + b_only + others, 1)
    low, high = compute_tango_interval(a_only, b_only, n)
    assert -1 <= low <= (a_only - b_only) / n <= high <= 1
    assert compute_tango_interval(b_only, a_only, n) == pytest.approx((-high, -low))


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_statsmodels(p_values):
    with mock.patch("gc.collect"):  # it collects garbage in every call, nearly a second late in a run
        expected = multitest.multipletests(p_values, method="holm")[1]
    assert compute_holm(p_values) == pytest.approx(expected)


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_cochran_equals_statsmodels_and_ignores_unanimous_images(k, n, seed):
    correct = np.random.default_rng(seed).random((k, n)) < 0.6
    found = compute_cochran_q(correct)
    assert compute_cochran_q(np.concatenate([correct, np.ones((k, 3)), np.zeros((k, 2))], axis=1)) == found
    sums = correct.sum(axis=0)
    if ((sums > 0) & (sums < k)).any():
        expected = tables.cochrans_q(correct.T.astype(int))
        assert (found.statistic, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    else:
        assert found.p == 1.0


@given(st.floats(0.001, 0.3), st.floats(0, 0.5))
def test_smaller_differences_need_more_images(difference, more):
    discordance = difference + more
    assert compute_required_n(difference / 2, discordance) > compute_required_n(difference, discordance)
    assert compute_required_n(-difference, discordance) == compute_required_n(difference, discordance)


def draw_predictions(n: int, seed: int) -> Predictions:
    generator = np.random.default_rng(seed)
    ids = [f"i{number}" for number in range(n)]
    return Predictions(ids, ("a", "b", "c"), np.arange(n) % 3, generator.dirichlet(np.ones(3), n).astype(np.float32))


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(2, 4), st.integers(0, 1000))
def test_a_comparison_does_not_depend_on_the_order_of_rows(n, k, seed):
    runs = [draw_predictions(n, seed + number) for number in range(k)]
    names = [f"run {number}" for number in range(k)]
    generator = np.random.default_rng(seed)
    shuffled = [run.take(generator.permutation(n)) for run in runs]
    assert compare_several(shuffled, names) == compare_several(runs, names)


@settings(max_examples=30)
@given(st.integers(1, 120), st.integers(1, 4), st.integers(0, 1000))
def test_groups_are_complete_and_their_accuracies_average_to_the_whole(n, num_groups, seed):
    predictions = draw_predictions(n, seed)
    generator = np.random.default_rng(seed)
    values = {str(name): f"g{generator.integers(num_groups)}" for name in predictions.ids}
    scores = compute_group_scores(predictions, {"group": values}).attributes["group"]
    groups = scores.groups.values()
    assert sum(group.n for group in groups) == n
    assert sum(group.n * group.accuracy.value for group in groups) == pytest.approx(predictions.correct.sum())
    gap = scores.gaps.accuracy
    assert gap is None or 0 <= gap.low <= gap.value <= gap.high <= 1
