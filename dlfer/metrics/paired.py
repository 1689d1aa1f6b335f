"""Paired comparison of two classifiers on the same images.

Two models tend to be right and wrong on the same images, so their difference can be estimated more precisely than
either accuracy: it depends only on the discordant images, which one model gets right and the other wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_quantile, find_limit
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.seeds import POWER, compare_recipes, plan_more
from dlfer.runs.comparison_record import PairedTest
from dlfer.runs.metrics_record import Estimate

FEW_DISCORDANT = 25
"""With fewer discordant images McNemar's test is exact, otherwise chi-square with continuity correction."""

WELCH = "Welch's t test over seeds and images"
EXACT, CHI_SQUARE = "McNemar's exact test", "McNemar's chi-square test with continuity correction"


def compare_paired(
    a: Predictions, b: Predictions, *, names: tuple[str, str] = ("a", "b"), level: float = 0.95
) -> PairedTest:
    """Compare the accuracies of two classifiers on the same images.

    Args:
        a: the predictions of the first classifier; the order of rows may differ from that of b.
        b: the predictions of the second classifier.
        names: the names of the two in the result.

    Raises:
        DataError: the two have different images, or an image has different targets.

    Source: interval: Tango, Stat. Med. 17 (1998) 891; test: McNemar, Psychometrika 12 (1947) 153.
    """
    correct_a, correct_b = align_correct(a, b)
    n = len(correct_a)
    a_only, b_only = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    low, high = compute_tango_interval(a_only, b_only, n, level=level)
    test, p_value = compute_mcnemar(a_only, b_only)
    excludes_zero = low > 0 or high < 0
    return PairedTest(
        names=list(names),
        n=n,
        accuracy_a=float(correct_a.mean()),
        accuracy_b=float(correct_b.mean()),
        difference=Estimate(value=100 * (a_only - b_only) / n, low=100 * low, high=100 * high),
        both_right=int((correct_a & correct_b).sum()),
        a_only=a_only,
        b_only=b_only,
        both_wrong=int((~correct_a & ~correct_b).sum()),
        test=test,
        p_value=float(p_value),
        is_significant=bool(excludes_zero and p_value < 1 - level),
        required_n=compute_required_n((a_only - b_only) / n, (a_only + b_only) / n, level=level),
        level=level,
    )


def compare_seeds(
    pairs: Sequence[tuple[Predictions, Predictions]],
    *,
    names: tuple[str, str] = ("a", "b"),
    level: float = 0.95,
) -> PairedTest:
    """Compare two recipes over several trainings of each, all evaluated on the same images.

    With two seeds or more the result is about the recipes: seeds and images are random effects, and the quantile is
    Student's with Satterthwaite's degrees of freedom (`dlfer.metrics.seeds.compare_recipes`). With one seed it is only
    about the two trained models, as "scope" says.

    Args:
        pairs: one pair of predictions (a, b) per seed.
        names: the names of the two recipes.

    Returns:
        For a single pair the result of `compare_paired` with the scope "models". For several the scope is "recipes",
        the four counts are None, and `required_n` is the number of images needed with the same number of seeds.

    Raises:
        DataError: there is no pair, or the pairs do not all have the same images.
    """
    if not pairs:
        raise DataError("compare_seeds: found no pair of predictions, expected one for each seed.")
    if len(pairs) == 1:
        return compare_paired(*pairs[0], names=names, level=level).model_copy(
            update={"num_seeds": 1, "scope": "models"}
        )
    reference = pairs[0][0]
    correct_a, correct_b = (
        np.stack([align_correct(reference, pair[side])[1] for pair in pairs]).astype(np.float64) for side in (0, 1)
    )
    compared = compare_recipes(correct_a, correct_b)
    low, high = compared.compute_interval(level)
    p_value = compared.compute_p_value()
    if np.array_equal(correct_a, correct_b):  # there are no discordant images: use the interval of one pair
        low, high = compute_tango_interval(0, 0, correct_a.shape[1], level=level)
        p_value = 1.0
    is_significant = low > 0 or high < 0
    per_seed = 100 * (correct_a - correct_b).mean(axis=1)
    more = plan_more(compared, level=level)
    return PairedTest(
        names=list(names),
        scope="recipes",
        n=correct_a.shape[1],
        accuracy_a=float(correct_a.mean()),
        accuracy_b=float(correct_b.mean()),
        difference=Estimate(value=100 * float(compared.difference), low=100 * float(low), high=100 * float(high)),
        differences=per_seed.tolist(),
        num_seeds=len(pairs),
        sd_over_seeds=float(per_seed.std(ddof=1)),
        sd_a=100 * float(correct_a.mean(axis=1).std(ddof=1)),
        sd_b=100 * float(correct_b.mean(axis=1).std(ddof=1)),
        test=WELCH,
        df=None if math.isinf(compared.df) else float(compared.df),
        p_value=float(p_value),
        is_significant=bool(is_significant),
        required_n=more.images,
        more=None if is_significant else more,
        level=level,
    )


def align_correct(a: Predictions, b: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a and b are right on each image (bool [N], bool [N]), in the order of a, matched by id.

    Raises:
        DataError: the ids differ, or an image has different targets.
    """
    order_a, order_b = np.argsort(a.ids), np.argsort(b.ids)
    if not np.array_equal(a.ids[order_a], b.ids[order_b]):
        alone = np.setdiff1d(a.ids, b.ids), np.setdiff1d(b.ids, a.ids)
        example = next(str(ids[0]) for ids in alone if len(ids))
        raise DataError(
            f"paired comparison: {len(alone[0])} of {len(a)} ids stand in the first only, {len(alone[1])} of {len(b)} "
            f"in the second only, e.g. {example!r}; expected the same images. Evaluate both models on one split."
        )
    rows_b = np.empty(len(a), dtype=np.int64)
    rows_b[order_a] = order_b
    names_a, names_b = np.array(a.labels)[a.targets], np.array(b.labels)[b.targets[rows_b]]
    wrong = np.flatnonzero(names_a != names_b)
    if len(wrong):
        row = wrong[0]
        raise DataError(
            f"paired comparison: {len(wrong)} images have two targets, e.g. {str(a.ids[row])!r}: {names_a[row]} in the "
            f"first, {names_b[row]} in the second; expected the same. Evaluate both models on one version of the data."
        )
    return a.correct, b.correct[rows_b]


def compute_mcnemar(a_only: int, b_only: int) -> tuple[str, float]:
    """Return the name of the variant of McNemar's test that was used, and its two-sided p value.

    If the accuracies are equal, each discordant image favours either model with probability 1/2. With fewer than 25 of
    them the exact binomial test is used, otherwise chi-square with continuity correction, which approximates it well.

    Source: McNemar, Psychometrika 12 (1947) 153; the correction: Edwards, Psychometrika 13 (1948) 185,
    without an exception for equal counts, as in statsmodels.
    """
    n, fewer = a_only + b_only, min(a_only, b_only)
    if n >= FEW_DISCORDANT:
        statistic = (abs(a_only - b_only) - 1) ** 2 / n
        return CHI_SQUARE, math.erfc(math.sqrt(statistic / 2))
    chances = [math.comb(n, k) / 2**n for k in range(fewer + 1)]
    return EXACT, min(1.0, 2 * math.fsum(chances))


def compute_tango_interval(a_only: int, b_only: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of the difference of two paired proportions, (low, high) in -1..1.

    It contains all differences that the score test does not reject. It therefore excludes 0 exactly if McNemar's test
    without continuity correction is significant, and its width is positive even if no image is discordant.

    Args:
        a_only, b_only: numbers of images that only a, or only b, gets right.
        n: number of all images, at least 1.

    Source: Tango, Stat. Med. 17 (1998) 891, equation 8 and appendix.
    """
    z, difference = compute_quantile(level), (a_only - b_only) / n

    def is_within(candidate: float) -> bool:
        linear = -a_only - b_only + (2 * n - a_only + b_only) * candidate
        constant = -b_only * candidate * (1 - candidate)
        b_alone = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = max(n * (2 * b_alone + candidate * (1 - candidate)), 0.0)
        return abs(a_only - b_only - n * candidate) <= z * math.sqrt(variance)

    return find_limit(is_within, difference, -1.0), find_limit(is_within, difference, 1.0)


def compute_required_n(difference: float, discordance: float, *, level: float = 0.95) -> int | None:
    """Return how many images McNemar's two-sided test needs to detect such a difference with a power of 80 %.

    Among them are at least as many discordant images as the exact test needs to be able to give a significant result.

    Args:
        difference: of the accuracies, as a fraction; 0 gives None, since no number of images is enough.
        discordance: the fraction of images that one gets right and the other wrong; over several seeds the mean square
            of an image's difference, which for one seed is the same.
        level: 1 - the significance level of the test.

    Raises:
        DataError: the square of the difference exceeds the discordance, or the discordance is not in 0..1.

    Source: Connor, Biometrics 43 (1987) 207, the unconditional formula after Miettinen, Biometrics 24
    (1968) 339.

    Example:
        >>> compute_required_n(0.05, 0.19)
        595
    """
    if not difference**2 <= discordance + 1e-12 <= 1 + 1e-9:
        raise DataError(
            f"required_n: found the difference {difference:g} and the discordance {discordance:g}, expected "
            "fractions, and no difference without images that make it."
        )
    if difference == 0:
        return None
    z_size, z_power = compute_quantile(level), NormalDist().inv_cdf(POWER)
    rest = math.sqrt(max(discordance - difference**2, 0.0))
    by_formula = math.ceil(((z_size * math.sqrt(discordance) + z_power * rest) / difference) ** 2)
    # The smallest p value of k discordant images, 2 / 2^k, results if all of them favour the same model.
    least = math.floor(math.log2(2 / (1 - level))) + 1
    return max(by_formula, math.ceil(least / discordance - 1e-9))


def describe_difference(result: PairedTest) -> str:
    """Return sentences that interpret a result of `compare_paired`, `compare_seeds` or `compare_folds`.

    For one of several pairs Holm's p value decides. The text for one seed (scope "models") states that the result is
    about two trained models and not about the recipes.

    Example:
        >>> describe_difference(compare_paired(a, b, names=("lite2", "lite2_96")))
        'lite2 minus lite2_96: 0.8 percentage points of accuracy (95 % interval -0.4 to 2.0, n = 3,589): no significant
        difference; about 9,000 images would be needed for a power of 80 %, if the true difference is the observed one
        (McNemar's exact test, p = 0.21).'
    """
    value, low, high = map(format_points, (result.difference.value, result.difference.low, result.difference.high))
    first, second = result.names
    what = f"{first} minus {second}: {value} percentage points of accuracy"
    if result.scope == "models":
        what = f"The two trained models, {what}"
    counts = [f"n = {result.n:,}"]
    if result.num_seeds > 1:
        counts.insert(0, f"{result.num_seeds} seeds")
    if result.num_folds is not None:
        counts.insert(0, f"{result.num_folds} folds")
    where = f"({100 * result.level:g} % interval {low} to {high}, {', '.join(counts)})"
    verdict = "significant difference" if result.is_significant else "no significant difference"
    text = (
        f"{what} {where}: {verdict}{_describe_more(result)}{_describe_conflict(result)} ({_describe_evidence(result)})."
    )
    if result.scope == "models":
        text += (
            " This is a statement about these two trained models on these images. One seed each does not show whether "
            f"{first} is better or worse than {second} in general; train at least three seeds of each for that."
        )
    return text


def _describe_more(result: PairedTest) -> str:
    """Return the clause on what it would take to detect a difference as large as the observed one, or ""."""
    if result.is_significant:
        return ""
    assumed = f"for a power of {POWER:.0%}, if the true difference is the observed one".replace("%", " %")
    if result.scope != "recipes":
        needed = result.required_n
        if needed is None or needed <= result.n:
            return ""
        return f"; about {_round_up(needed):,} images would be needed {assumed}"
    if result.more is None:  # significant on its own, but not after Holm's correction
        return ""
    more, ways = result.more, []
    if more.seeds is not None:
        ways.append(f"about {_round_up(more.seeds):,} seeds of each on these images")
    if more.images is not None:
        ways.append(f"about {_round_up(more.images):,} images with these {result.num_seeds} seeds")
    if more.both is not None:
        both = more.both
        ways.append(
            f"about {_round_up(both.seeds):,} seeds of each and {_round_up(both.images):,} images, since neither "
            "alone is enough,"
        )
    if not ways:
        return "" if result.difference.value == 0 else "; no practicable number of seeds and images would do"
    assumed += " and trainings and images vary as observed"
    return f"; {' or '.join(ways)} would be needed {assumed}"


def _describe_conflict(result: PairedTest) -> str:
    """Return the clause on why a difference is not significant although its interval excludes 0, or ""."""
    low, high = result.difference.low, result.difference.high
    if result.is_significant or result.p_value is None or low is None or high is None or low <= 0 <= high:
        return ""
    if result.p_value < 1 - result.level:  # significant on its own, but not after Holm's correction
        return "; the interval is of this pair alone and excludes 0, but p by Holm decides" if result.p_holm else ""
    return f"; the interval is that of another test, is approximate and excludes 0, but {result.test} decides"


def _describe_evidence(result: PairedTest) -> str:
    text = f"{result.test}, p {_format_p(result.p_value)}"
    if result.num_pairs > 1:
        text += f", by Holm over {result.num_pairs} pairs {_format_p(result.p_holm)}"
    if result.num_seeds > 1:
        text += (
            f", {result.df:.1f} degrees of freedom; standard deviation over seeds "
            f"{result.sd_a:.1f} and {result.sd_b:.1f} percentage points"
        )
    if result.num_folds is not None:
        text += (
            f", {result.df:.0f} degrees of freedom; standard deviation of the difference over folds {result.sd_over_folds:.1f} "
            "percentage points"
        )
    return text


def format_points(points: float) -> str:
    """Return percentage points with one decimal; -0.04 becomes 0.0 rather than -0.0."""
    return f"{round(points, 1) + 0.0:.1f}"


def _format_p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}" if value < 0.1 else f"= {value:.2f}"


def _round_up(value: int) -> int:
    """Round up to two significant digits, since more would suggest that the observed difference is the true one."""
    step = 10 ** max(len(str(value)) - 2, 0)
    return -(-value // step) * step
