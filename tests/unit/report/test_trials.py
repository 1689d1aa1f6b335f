"""What each key of a search told about the score."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dlfer.report.trials import compute_importance


def test_groups_against_scipys_analysis_of_variance():
    rng = np.random.default_rng(0)
    names = ["adam", "sgd", "rmsprop"] * 5
    y = rng.normal(size=15) + np.array([0.0, 1.0, 0.3] * 5)
    found = compute_importance([{"k": name} for name in names], y, "k")
    groups = [y[np.array(names) == name] for name in ("adam", "sgd", "rmsprop")]
    f = stats.f_oneway(*groups).statistic
    assert found.share == pytest.approx(2 * f / (2 * f + 12))
    assert found.chance == pytest.approx(2 / 14)


def test_numbers_against_numpys_fit_of_a_parabola():
    rng = np.random.default_rng(1)
    x = 10 ** rng.uniform(-5, -1, 20)
    ranks = stats.rankdata(x)
    y = -((ranks - 12) ** 2) / 50 + rng.normal(scale=0.5, size=20)
    found = compute_importance([{"k": value} for value in x.tolist()], y, "k")
    residual = y - np.polyval(np.polyfit(ranks, y, 2), ranks)
    assert found.share == pytest.approx(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum())
    assert found.share > 0.5


def test_chance_is_what_noise_gives_on_average():
    rng = np.random.default_rng(2)
    found = [
        compute_importance([{"k": value} for value in rng.normal(size=12).tolist()], rng.normal(size=12), "k")
        for _ in range(400)
    ]
    assert np.mean([f.share for f in found]) == pytest.approx(found[0].chance, abs=0.02)


def test_a_conditional_key_is_judged_among_the_trials_in_which_it_was_searched():
    settings = [{"k": 0.8}, {}, {"k": 0.9}, {}, {"k": 0.8}, {}, {"k": 0.9}]
    found = compute_importance(settings, [1, 7, 0, 9, 1, 8, 0], "k")
    assert found == (pytest.approx(1), pytest.approx(1 / 3), pytest.approx(1), 4)
    assert compute_importance(settings[:5], [1, 7, 0, 9, 1], "k") is None


@pytest.mark.parametrize(
    ("values", "scores"), [([1, 2, 3], [1, 2, 3]), ([1] * 5, [1, 2, 3, 4, 5]), ([1, 2, 3, 4, 5], [2] * 5)]
)
def test_nothing_is_said_where_nothing_can_be_known(values, scores):
    assert compute_importance([{"k": value} for value in values], scores, "k") is None
