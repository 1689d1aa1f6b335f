from __future__ import annotations

import math

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.metrics import seeds
from dlfer.metrics.intervals import compute_mean_interval, compute_wilson_interval
from dlfer.runs.comparison_record import More


def make_correct(num_seeds, n, *, sd_items=0.35, sd_seeds=0.0, mean=0.7, seed=0):
    """Each image has its own chance to be got right, each seed its own shift."""
    generator = np.random.default_rng(seed)
    chances = mean + sd_items * generator.normal(size=n) + sd_seeds * generator.normal(size=(num_seeds, 1))
    return generator.random((num_seeds, n)) < chances


def test_mean_squares_are_those_of_a_linear_model():
    smf = pytest.importorskip("statsmodels.formula.api")
    anova = pytest.importorskip("statsmodels.stats.anova")
    import pandas as pd

    correct = make_correct(3, 25, sd_seeds=0.1).astype(float)
    rows, columns = np.indices(correct.shape)
    frame = pd.DataFrame({"y": correct.ravel(), "s": rows.ravel(), "i": columns.ravel()})
    table = anova.anova_lm(smf.ols("y ~ C(s) + C(i)", frame).fit())
    layout = seeds.decompose(correct)
    assert layout.residual_variance == pytest.approx(table.loc["Residual", "mean_sq"])
    assert 25 * layout.seed_variance == pytest.approx(table.loc["C(s)", "mean_sq"])
    assert 3 * layout.per_image.var(ddof=1) == pytest.approx(table.loc["C(i)", "mean_sq"])


def test_where_images_add_nothing_the_test_is_welchs():
    from scipy.stats import ttest_ind

    # Two equal recipes: what their images differ by is residual alone, and it is subtracted.
    a, b = (make_correct(4, 2000, sd_items=0.0, sd_seeds=0.02, seed=seed) for seed in (1, 2))
    found = seeds.compare_recipes(a, b)
    expected = ttest_ind(a.mean(axis=1), b.mean(axis=1), equal_var=False)
    assert found.image_variance == pytest.approx(0, abs=0.01)
    assert found.df == pytest.approx(expected.df, rel=0.05)
    assert found.compute_p_value() == pytest.approx(expected.pvalue, rel=0.05)
    interval = expected.confidence_interval(0.95)
    assert found.compute_interval() == pytest.approx((interval.low, interval.high), abs=0.002)


def test_where_seeds_add_nothing_the_interval_is_that_of_paired_images():
    generator = np.random.default_rng(0)
    a = np.repeat(generator.random((1, 500)) < 0.8, 3, axis=0)
    b = np.repeat(generator.random((1, 500)) < 0.7, 3, axis=0)
    found = seeds.compare_recipes(a, b)
    differences = a[0].astype(float) - b[0]
    low, high = compute_mean_interval(differences)
    assert found.compute_interval() == pytest.approx((low, high), abs=0.002)


def test_seeds_of_one_recipe_count_in_the_order_of_their_own_variance():
    a = make_correct(3, 3000, sd_items=0.0, sd_seeds=0.15, mean=0.5, seed=1)
    b = make_correct(3, 3000, sd_items=0.0, sd_seeds=0.0, mean=0.5, seed=2)
    # One recipe alone varies over seeds: nearly two degrees of freedom, not four.
    assert 2 <= seeds.compare_recipes(a, b).df < 2.6


def test_two_seeds_that_happen_to_agree_are_no_certainty():
    a, b = np.zeros((2, 1000), bool), np.zeros((2, 1000), bool)
    a[0, :700], a[1, 10:710] = True, True
    b[0, :680], b[1, 10:690] = True, True
    found = seeds.compare_recipes(a, b)
    low, high = found.compute_interval()
    assert found.difference == pytest.approx(0.02)
    assert low < found.difference < high
    # Each training is right on 20 images where the other is wrong, so that it varies by about 0.3 percentage points at least.
    assert high - low > 2 * 1.96 * 0.004


def test_the_quantile_is_students():
    from scipy.stats import t

    for df in (1, 2, 3.7, 30, 3588):
        assert seeds.compute_t_quantile(df) == pytest.approx(t.ppf(0.975, df))


@pytest.mark.parametrize("seed", range(5))
def test_swapping_the_recipes_mirrors_the_result(seed):
    a, b = (make_correct(3, 300, sd_seeds=0.03, mean=mean, seed=seed) for mean in (0.7, 0.6))
    one, other = seeds.compare_recipes(a, b), seeds.compare_recipes(b, a)
    assert one.compute_interval() == pytest.approx(tuple(-bound for bound in reversed(other.compute_interval())))
    assert one.compute_p_value() == pytest.approx(other.compute_p_value())


def test_the_order_of_images_and_seeds_does_not_matter():
    a, b = (make_correct(4, 200, sd_seeds=0.03, mean=mean) for mean in (0.7, 0.6))
    order, turn = np.random.default_rng(0).permutation(200), [2, 0, 3, 1]
    moved = seeds.compare_recipes(a[turn][:, order], b[:, order])
    assert moved.compute_interval() == pytest.approx(seeds.compare_recipes(a, b).compute_interval())


def test_one_seed_has_wilsons_interval_and_none_over_seeds():
    correct = make_correct(1, 50)
    found = seeds.compute_seed_summary(correct)
    assert found.items == compute_wilson_interval(correct.sum(), 50)
    assert found.items_and_seeds is found.sd_over_seeds is None
    assert found.value == correct.mean()


def test_the_summary_has_mean_and_standard_deviation_over_seeds():
    correct = make_correct(4, 300)
    found = seeds.compute_seed_summary(correct)
    assert (found.num_seeds, found.n) == (4, 300)
    assert found.per_seed == pytest.approx(correct.mean(axis=1))
    assert found.value == pytest.approx(correct.mean())
    assert found.sd_over_seeds == pytest.approx(np.std(correct.mean(axis=1), ddof=1))
    assert found.items == pytest.approx(compute_mean_interval(correct.mean(axis=0)))


def test_the_summary_over_seeds_alone_is_students_interval():
    from scipy.stats import t

    # Images of one chance: between images there is residual alone.
    correct = make_correct(5, 4000, sd_items=0.0, sd_seeds=0.05)
    found = seeds.compute_seed_summary(correct)
    per_seed = correct.mean(axis=1)
    expected = t.interval(0.95, 4, per_seed.mean(), per_seed.std(ddof=1) / math.sqrt(5))
    assert found.items_and_seeds == pytest.approx(expected, abs=0.002)


def test_seeds_that_are_right_on_every_image_have_wilsons_interval():
    summary = seeds.compute_seed_summary(np.ones((3, 10), bool))
    assert summary.items == summary.items_and_seeds == compute_wilson_interval(10, 10)


def test_the_summary_refuses_other_arrays():
    for wrong in (np.ones(3), np.ones((0, 3)), np.ones((2, 0))):
        with pytest.raises(DataError, match=r"expected \[seeds, images\]"):
            seeds.compute_seed_summary(wrong)


def make_comparison(*, difference=0.01, sd=0.01, images=0.0, residual=0.2, num_seeds=3, n=3589):
    one = sd**2 + residual / 2 / n
    return seeds.Comparison(difference, difference, 0.01, 4.0, (one, one), (residual / 2,) * 2, images, num_seeds, n)


def test_a_plan_that_lacks_seeds_names_seeds():
    plan = seeds.plan_more(make_comparison())
    # A two-sample t test of 1 point with a standard deviation near 1 point over seeds.
    power = pytest.importorskip("statsmodels.stats.power")
    sd = math.sqrt((2 * 0.01**2 + 0.2 / 3589) / 2)
    expected = power.TTestIndPower().solve_power(0.01 / sd, power=0.8, alpha=0.05)
    assert expected <= plan.seeds <= expected + 8
    assert (plan.power, plan.both) == (0.8, None)
    assert plan.images is None  # three seeds are too few, however many images there are


def test_a_plan_that_lacks_images_names_images():
    plan = seeds.plan_more(make_comparison(sd=0.0, images=0.5, residual=0.0, n=500))
    assert plan.seeds is None
    # The classic size for a mean: (1.96 + 0.84)^2 variance / difference^2.
    assert plan.images == pytest.approx(7.849 * 0.5 / 0.01**2, rel=0.02)


def test_a_plan_that_lacks_both_names_both():
    comparison = make_comparison(sd=0.01, images=0.5, residual=0.1, n=500)
    plan = seeds.plan_more(comparison)
    assert plan.seeds is plan.images is None
    both = plan.both
    assert both.seeds > 3
    assert both.images > 500
    assert seeds._compute_power(comparison, both.seeds, both.images, 0.95) >= 0.8
    assert seeds._compute_power(comparison, both.seeds, both.images - 1, 0.95) < 0.8


def test_a_plan_is_larger_than_an_experiment_that_found_nothing():
    # One arm's accuracies differ, the other's do not: Satterthwaite's degrees of freedom are about 1, not 2.
    generator, found = np.random.default_rng(0), 0
    for _ in range(100):
        base, accuracies = generator.random(1000), 0.7 + 0.05 * generator.normal(size=(2, 1))
        a = (base < accuracies) ^ (generator.random((2, 1000)) < 0.05)
        b = (base < 0.85) ^ (generator.random((2, 1000)) < 0.05)
        compared = seeds.compare_recipes(a, b)
        low, high = compared.compute_interval()
        if low <= 0 <= high:
            plan = seeds.plan_more(compared)
            assert plan.seeds is None or plan.seeds > 2
            assert plan.images is None or plan.images > 1000
            found += 1
    assert found > 20


@pytest.mark.parametrize("sds", [(0.03, 0.0), (0.02, 0.02)])
def test_the_planned_power_is_that_of_welchs_test_in_simulation(sds):
    from scipy.stats import ttest_ind

    number, n = 4, 10**6  # so many images that only the seeds vary
    comparison = seeds.Comparison(0.05, 0.05, 0.01, 4.0, (sds[0] ** 2, sds[1] ** 2), (0.0, 0.0), 0.0, 2, n)
    generator = np.random.default_rng(0)
    a, b = (sd * generator.normal(size=(number, 20_000)) for sd in sds)
    expected = np.mean(ttest_ind(a + 0.05, b, equal_var=False).pvalue < 0.05)
    assert seeds._compute_power(comparison, number, n, 0.95) == pytest.approx(expected, abs=0.05)  # its df vary


def test_no_difference_has_no_plan():
    assert seeds.plan_more(make_comparison(difference=0.0)) == More(power=0.8)


def test_a_larger_difference_needs_fewer_seeds():
    needed = [seeds.plan_more(make_comparison(difference=d)).seeds for d in (0.01, 0.015, 0.02)]
    assert needed == sorted(needed, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("sd", [0.0, 0.007, 0.0125, 0.021])
def test_equal_recipes_are_rarely_called_different(num_seeds, sd):
    from benchmarks.seed_tests import simulate

    found = simulate(3589, num_seeds, sd, shift=0.0, replicates=1000, seed=17)
    # At most 6 %, and three standard errors of 1,000 replicates.
    assert found["significant"] <= 0.06 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("sd", [0.007, 0.021])
def test_the_interval_of_a_recipe_covers(num_seeds, sd):
    from benchmarks.seed_tests import simulate_accuracy

    found = simulate_accuracy(1000, num_seeds, sd, replicates=1000, seed=17)
    assert found["covered"] >= 0.93 - 3 * math.sqrt(0.05 * 0.95 / 1000)
