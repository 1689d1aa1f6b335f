from __future__ import annotations

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.metrics import paired
from dlfer.metrics.predictions import Predictions


def make(correct: np.ndarray, *, order=None, ids=None, targets=None) -> Predictions:
    """Predictions over two classes that are right where `correct` (bool [N]) says so."""
    n = len(correct)
    targets = np.arange(n) % 2 if targets is None else targets
    probabilities = np.where((np.arange(2) == targets[:, None]) == correct[:, None], 0.9, 0.1)
    ids = np.array([f"test/{i}" for i in range(n)]) if ids is None else np.asarray(ids)
    order = np.arange(n) if order is None else order
    return Predictions(ids[order], ("no", "yes"), targets[order], probabilities[order])


def make_pair(both: int, a_only: int, b_only: int, neither: int) -> tuple[Predictions, Predictions]:
    counts = (both, a_only, b_only, neither)
    return make(np.repeat([True, True, False, False], counts)), make(np.repeat([True, False, True, False], counts))


def test_counts_and_difference_do_not_depend_on_the_order_of_rows():
    a, b = make_pair(60, 25, 10, 5)
    result = paired.compare_paired(a, b)
    assert (result.both_right, result.a_only, result.b_only, result.both_wrong) == (60, 25, 10, 5)
    assert result.difference.value == pytest.approx(15.0)
    assert (result.accuracy_a, result.accuracy_b) == (0.85, 0.70)
    shuffled = b.take(np.random.default_rng(0).permutation(100))
    assert paired.compare_paired(a, shuffled) == result
    assert paired.compare_paired(shuffled, a).difference.low == pytest.approx(-result.difference.high)


@pytest.mark.parametrize(("a_only", "b_only"), [(0, 0), (1, 0), (5, 5), (3, 12), (20, 4)])
def test_mcnemar_exact_is_that_of_statsmodels(a_only, b_only):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    name, p_value = paired.compute_mcnemar(a_only, b_only)
    assert name == "McNemar's exact test"
    expected = tables.mcnemar([[30, a_only], [b_only, 10]], exact=True).pvalue
    assert p_value == pytest.approx(min(1.0, expected))


@pytest.mark.parametrize(("a_only", "b_only"), [(13, 12), (25, 0), (30, 30), (40, 15), (898, 232), (900, 1000)])
def test_mcnemar_of_many_is_statsmodels_chi_square_with_correction(a_only, b_only):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    name, p_value = paired.compute_mcnemar(a_only, b_only)
    assert name == "McNemar's chi-square test with continuity correction"
    expected = tables.mcnemar([[30, a_only], [b_only, 10]], exact=False, correction=True).pvalue
    assert p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("a_only", "b_only", "n"), [(12, 2, 50), (3, 9, 40), (0, 0, 30), (5, 0, 20), (300, 260, 3589)])
def test_tango_interval_inverts_the_score_test(a_only, b_only, n):
    optimize = pytest.importorskip("scipy.optimize")
    low, high = paired.compute_tango_interval(a_only, b_only, n)
    assert low <= (a_only - b_only) / n <= high
    for bound in (low, high):
        # Restricted likelihood: P(b only) = q, P(a only) = q + bound, found numerically.
        def loss(q, bound=bound):
            cells = np.array([q + bound, q, 1 - 2 * q - bound])
            counts = np.array([a_only, b_only, n - a_only - b_only])
            return -np.sum(counts[counts > 0] * np.log(np.maximum(cells[counts > 0], 1e-300)))

        smallest, largest = max(0.0, -bound), (1 - bound) / 2
        q = optimize.minimize_scalar(loss, bounds=(smallest, largest), method="bounded", options={"xatol": 1e-12}).x
        score = (a_only - b_only - n * bound) / np.sqrt(n * (2 * q + bound - bound**2))
        assert abs(score) == pytest.approx(1.959964, rel=2e-3)


def test_tango_interval_covers():
    generator = np.random.default_rng(1)
    drawn = generator.multinomial(200, [0.12, 0.07, 0.81], size=1500)
    bounds = [paired.compute_tango_interval(int(x), int(y), 200) for x, y, _ in drawn]
    covered = np.mean([low <= 0.05 <= high for low, high in bounds])
    assert 0.93 < covered < 0.97


def test_no_discordant_image_is_no_proof_of_equality():
    result = paired.compare_paired(*make_pair(50, 0, 0, 10))
    assert result.p_value == 1.0
    assert result.difference.low < -3
    assert result.difference.high > 3
    assert result.required_n is None
    assert "no significant difference (" in paired.describe_difference(result)


@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_one_image_is_never_significant(counts):
    result = paired.compare_paired(*make_pair(*counts))
    low, value, high = result.difference.low, result.difference.value, result.difference.high
    assert -100 <= low <= value <= high <= 100
    assert result.p_value == 1.0
    assert not result.is_significant
    assert "n = 1): no significant difference" in paired.describe_difference(result)


def test_required_n_has_the_promised_power():
    needed = paired.compute_required_n(0.05, 0.19)
    generator = np.random.default_rng(2)
    drawn = generator.multinomial(needed, [0.12, 0.07, 0.81], size=1500)
    seen = np.mean([paired.compute_mcnemar(int(x), int(y))[1] < 0.05 for x, y, _ in drawn])
    # The continuity correction costs a little of the 80 % that the formula promises.
    assert 0.74 < seen < 0.84


def test_required_n_is_that_of_the_published_formula():
    """Connor (1987): n = (z_a sqrt(psi) + z_b sqrt(psi - delta^2))^2 / delta^2, computed by scipy's quantiles."""
    norm = pytest.importorskip("scipy.stats").norm
    for delta, psi in ((0.05, 0.19), (0.008, 0.13), (-0.2, 0.25), (0.1, 0.1), (1.0, 1.0)):
        root = norm.ppf(0.975) * np.sqrt(psi) + norm.ppf(0.8) * np.sqrt(psi - delta**2)
        # Six discordant images are the fewest of which the exact test is significant at 5 %; the formula says 4 for (1, 1).
        assert paired.compute_required_n(delta, psi) == max(np.ceil(root**2 / delta**2), np.ceil(6 / psi))
    assert paired.compute_required_n(0.0, 0.1) is None
    with pytest.raises(DataError, match="difference"):
        paired.compute_required_n(0.5, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [f"other/{i}" for i in range(4)]}, "4 of 4 ids stand in the first only.*'test/0'"),
        ({"targets": np.array([1, 1, 0, 1])}, "1 images have two targets, e.g. 'test/0': no in the first, yes"),
    ],
)
def test_other_images_or_targets_are_refused(change, message):
    correct = np.array([True, True, False, True])
    with pytest.raises(DataError, match=message):
        paired.compare_paired(make(correct), make(correct, **change))


def test_another_order_of_labels_is_no_difference():
    a, b = make_pair(5, 3, 2, 1)
    swapped = Predictions(b.ids, b.labels[::-1], 1 - b.targets, b.probabilities[:, ::-1])
    assert paired.compare_paired(a, swapped) == paired.compare_paired(a, b)


def test_sentences():
    names = ("with EF-FER1", "without EF-FER1")
    clear = paired.describe_difference(paired.compare_paired(*make_pair(2300, 300, 200, 789), names=names))
    assert clear == (
        "with EF-FER1 minus without EF-FER1: 2.8 percentage points of accuracy (95 % interval 1.6 to 4.0, n = 3,589): "
        "significant difference (McNemar's chi-square test with continuity correction, p < 0.0001)."
    )
    reverse = paired.describe_difference(paired.compare_paired(*make_pair(2300, 200, 300, 789), names=names))
    assert "-2.8 percentage points of accuracy (95 % interval -4.0 to -1.6, n = 3,589): significant" in reverse
    open_result = paired.compare_paired(*make_pair(2300, 260, 235, 794), names=names)
    sentence = paired.describe_difference(open_result)
    assert (
        "0.7 percentage points of accuracy (95 % interval -0.5 to 1.9, n = 3,589): no significant difference; about "
        "23,000 images would be needed for a power of 80 %, if the true difference is the observed one (" in sentence
    )
    assert 22_000 < open_result.required_n <= 23_000


@pytest.mark.parametrize("n", range(1, 8))
def test_as_many_images_are_asked_for_as_the_exact_test_needs(n):
    result = paired.compare_paired(*make_pair(0, n, 0, 0))
    sentence = paired.describe_difference(result)
    assert result.required_n == 6
    assert result.is_significant == (n >= 6)
    assert ("about 6 images would be needed" in sentence) == (n < 6)
    assert paired.compute_required_n(1.0, 1.0, level=0.99) == 8  # 2 / 2^8 < 0.01 < 2 / 2^7


def test_a_sentence_says_why_an_interval_without_zero_is_no_significant_difference():
    for n, is_told in ((3, False), (4, True), (5, True), (6, False)):
        result = paired.compare_paired(*make_pair(0, n, 0, 0))
        told = "; the interval is that of another test, is approximate and excludes 0, but McNemar's exact test decides"
        assert (told in paired.describe_difference(result)) == is_told
    result = paired.compare_paired(*make_pair(80, 16, 4, 0))
    assert result.is_significant
    told = "; the interval is of this pair alone and excludes 0, but p by Holm decides"
    assert told not in paired.describe_difference(result)
    among = result.model_copy(update={"p_holm": 0.2, "num_pairs": 20, "is_significant": False})
    assert told in paired.describe_difference(among)


def test_no_sentence_says_minus_zero():
    sentence = paired.describe_difference(paired.compare_paired(*make_pair(5000, 20, 21, 5000)))
    assert "a minus b: 0.0 percentage points" in sentence


def make_seeds(num_seeds: int, n: int, gain: float, seed_sd: float, seed: int) -> list:
    generator = np.random.default_rng(seed)
    ease = generator.uniform(0.4, 0.8, n)
    pairs = []
    for _ in range(num_seeds):
        a = generator.random(n) < np.clip(ease + gain + generator.normal(0, seed_sd), 0, 1)
        pairs.append((make(a), make(generator.random(n) < np.clip(ease + generator.normal(0, seed_sd), 0, 1))))
    return pairs


def test_seeds_are_averaged_and_their_standard_deviation_is_given():
    pairs = make_seeds(3, 400, 0.08, 0.0, seed=0)
    result = paired.compare_seeds(pairs, names=("x", "y"))
    single = [paired.compare_paired(*pair).difference.value for pair in pairs]
    assert result.differences == pytest.approx(single)
    assert result.difference.value == pytest.approx(np.mean(single))
    assert result.sd_over_seeds == pytest.approx(np.std(single, ddof=1))
    accuracies = [[100 * pair[side].correct.mean() for pair in pairs] for side in (0, 1)]
    assert [result.sd_a, result.sd_b] == pytest.approx([np.std(some, ddof=1) for some in accuracies])
    assert (result.num_seeds, result.scope) == (3, "recipes")
    sentence = paired.describe_difference(result)
    assert "3 seeds, n = 400" in sentence
    assert f"standard deviation over seeds {result.sd_a:.1f} and {result.sd_b:.1f} percentage points" in sentence


def test_what_is_needed_is_named_with_power_and_assumption():
    result = paired.compare_seeds(make_seeds(3, 2000, 0.01, 0.02, seed=4), names=("x", "y"))
    assert not result.is_significant
    more, sentence = result.more, paired.describe_difference(result)
    assert more.power == 0.8
    assert more.seeds > 3
    assert "seeds of each on these images would be needed for a power of 80 %" in sentence
    assert "if the true difference is the observed one and trainings and images vary as observed" in sentence
    clear = paired.compare_seeds(make_seeds(3, 2000, 0.3, 0.005, seed=3))
    assert clear.is_significant
    assert clear.more is None
    assert "would be needed" not in paired.describe_difference(clear)


def test_the_interval_over_seeds_covers_where_seeds_matter():
    covered = [
        result.low <= 5 <= result.high
        for result in (paired.compare_seeds(make_seeds(4, 200, 0.05, 0.03, seed=s)).difference for s in range(300))
    ]
    assert np.mean(covered) > 0.92


@pytest.mark.parametrize(("n", "is_significant"), [(1, False), (2, False), (6, True)])
def test_few_images_that_all_favour_one_side_are_no_certainty(n, is_significant):
    a, b = make(np.ones(n, bool)), make(np.zeros(n, bool))
    result = paired.compare_seeds([(a, b)] * 3)
    exact = 2 * 0.5**n  # of one pair of trainings
    assert exact / 8 < result.p_value < 1
    assert result.is_significant == is_significant
    assert result.difference.low < result.difference.value == result.difference.high == 100


def test_seeds_that_never_differ_have_the_interval_of_one():
    a, _ = make_pair(20, 0, 0, 10)
    result, single = paired.compare_seeds([(a, a)] * 2), paired.compare_paired(a, a)
    assert result.difference == single.difference
    assert result.difference.low < 0 < result.difference.high
    assert (result.p_value, result.is_significant, result.required_n) == (1.0, False, None)


def test_one_seed_is_the_paired_comparison():
    a, b = make_pair(60, 25, 10, 5)
    result = paired.compare_seeds([(a, b)], names=("x", "y"))
    assert result == paired.compare_paired(a, b, names=("x", "y")).model_copy(
        update={"num_seeds": 1, "scope": "models"}
    )
    sentence = paired.describe_difference(result)
    assert "The two trained models, x minus y: 15.0 percentage points" in sentence
    assert "a statement about these two trained models on these images" in sentence
    assert "does not show whether x is better or worse than y in general" in sentence
    assert "at least three seeds" in sentence


def test_seeds_need_pairs_on_the_same_images():
    with pytest.raises(DataError, match="no pair"):
        paired.compare_seeds([])
    with pytest.raises(DataError, match="stand in the first only"):
        paired.compare_seeds([make_pair(2, 1, 1, 0), make_pair(2, 1, 1, 1)])
