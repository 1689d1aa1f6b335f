"""Whether two classifiers differ, judged on the very same images.

Two models tend to be right and wrong on the same images, so that their difference is known better than
either accuracy: all of it stands in the images that one gets right and the other wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from dlfer.errors import DataError
from dlfer.evaluate.intervals import compute_quantile
from dlfer.evaluate.predictions import Predictions

FEW_DISCORDANT = 25
"""Below this many discordant images McNemar's test is exact, from it on chi-square with continuity correction."""

EXACT, CHI_SQUARE = "McNemar's exact test", "McNemar's chi-square test with continuity correction"

POWER = 0.8
"""The chance of seeing the difference that `required_n` is computed for."""


def compare_paired(
    a: Predictions, b: Predictions, *, names: tuple[str, str] = ("a", "b"), level: float = 0.95
) -> dict[str, Any]:
    """Compare the accuracies of two classifiers on the same images.

    Args:
        a: the predictions of one; its rows may stand in another order than those of b.
        b: the predictions of the other.
        names: what the two are called in the sentence.
        level: the probability that the interval covers the true difference.

    Returns:
        {"names", "n", "accuracy_a", "accuracy_b" (fractions), "difference": {"value", "low", "high"} of
        a - b in points, "both_right", "a_only", "b_only", "both_wrong" (numbers of images), "test",
        "p_value", "is_larger_than_chance", "required_n" (None where the accuracies are equal), "level"}.

    Raises:
        DataError: the two are not about the same images, or disagree about a target.

    Source: interval: Tango, Stat. Med. 17 (1998) 891; test: McNemar, Psychometrika 12 (1947) 153.
    """
    correct_a, correct_b = align_correct(a, b)
    n = len(correct_a)
    a_only, b_only = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    low, high = compute_tango_interval(a_only, b_only, n, level=level)
    test, p_value = compute_mcnemar(a_only, b_only)
    excludes_zero = low > 0 or high < 0
    return {
        "names": list(names),
        "n": n,
        "accuracy_a": float(correct_a.mean()),
        "accuracy_b": float(correct_b.mean()),
        "difference": {"value": 100 * (a_only - b_only) / n, "low": 100 * low, "high": 100 * high},
        "both_right": int((correct_a & correct_b).sum()),
        "a_only": a_only,
        "b_only": b_only,
        "both_wrong": int((~correct_a & ~correct_b).sum()),
        "test": test,
        "p_value": p_value,
        "is_larger_than_chance": bool(excludes_zero and p_value < 1 - level),
        "required_n": compute_required_n((a_only - b_only) / n, (a_only + b_only) / n, level=level),
        "level": level,
    }


def compare_seeds(
    pairs: Sequence[tuple[Predictions, Predictions]],
    *,
    names: tuple[str, str] = ("a", "b"),
    level: float = 0.95,
) -> dict[str, Any]:
    """Compare two recipes over several trainings of each, all judged on the same images.

    The difference is the mean over seeds. Its standard error joins what other images would change (the
    root mean square of the images' differences, as in McNemar's statistic, so that it does not vanish where
    few images all speak for one side) and what other seeds would change (the spread over seeds); the second
    holds a little of the first, so that the interval errs on the wide side. With few seeds their spread is
    itself poorly known: the number of seeds belongs beside the result. Where no image ever differs the
    interval is that of `compare_paired`.

    Args:
        pairs: one (a, b) of predictions for each seed.
        names: what the two recipes are called.
        level: the probability that the interval covers the true difference.

    Returns:
        As `compare_paired`, without the four counts, with "num_seeds", "differences" (points, one per
        seed) and "sd_over_seeds" (points). A single pair gives the result of `compare_paired`, with
        "num_seeds" 1 beside.

    Raises:
        DataError: no pair was given, or the pairs are not all about the same images.
    """
    if not pairs:
        raise DataError("compare_seeds: found no pair of predictions, expected one for each seed.")
    if len(pairs) == 1:
        return {**compare_paired(*pairs[0], names=names, level=level), "num_seeds": 1}
    reference = pairs[0][0]
    correct_a, correct_b = (
        np.stack([align_correct(reference, pair[side])[1] for pair in pairs]).astype(np.float64) for side in (0, 1)
    )
    per_item = (correct_a - correct_b).mean(axis=0)
    per_seed = 100 * (correct_a - correct_b).mean(axis=1)
    n, num_seeds = len(per_item), len(pairs)
    value, sd = float(per_seed.mean()), float(per_seed.std(ddof=1))
    discordance = float((per_item**2).mean())
    error = math.hypot(100 * math.sqrt(discordance / n), sd / math.sqrt(num_seeds))
    half = compute_quantile(level) * error
    low, high = max(value - half, -100.0), min(value + half, 100.0)
    if discordance == 0:
        low, high = (100 * bound for bound in compute_tango_interval(0, 0, n, level=level))
    p_value = 2 * NormalDist().cdf(-abs(value) / error) if error > 0 else 1.0
    return {
        "names": list(names),
        "n": n,
        "accuracy_a": float(correct_a.mean()),
        "accuracy_b": float(correct_b.mean()),
        "difference": {"value": value, "low": low, "high": high},
        "differences": per_seed.tolist(),
        "num_seeds": num_seeds,
        "sd_over_seeds": sd,
        "test": "z test over images and seeds",
        "p_value": float(p_value),
        "is_larger_than_chance": low > 0 or high < 0,
        "required_n": compute_required_n(value / 100, discordance, level=level),
        "level": level,
    }


def align_correct(a: Predictions, b: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a and b are right on each image of a (bool [N], bool [N]), matched by id.

    Raises:
        DataError: the ids differ, or an image has two targets.
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
    """Return the name of McNemar's test that was used and its two-sided p value.

    Under equal accuracies each discordant image is a fair coin. Fewer than 25 of them: the exact binomial
    test; else chi-square with continuity correction, which is never far from it.

    Args:
        a_only: number of images that only a has right.
        b_only: number of images that only b has right.

    Source: McNemar, Psychometrika 12 (1947) 153; the correction: Edwards, Psychometrika 13 (1948) 185,
    without an exception for equal counts, as statsmodels has it.
    """
    n, fewer = a_only + b_only, min(a_only, b_only)
    if n >= FEW_DISCORDANT:
        statistic = (abs(a_only - b_only) - 1) ** 2 / n
        return CHI_SQUARE, math.erfc(math.sqrt(statistic / 2))
    chances = [math.comb(n, k) / 2**n for k in range(fewer + 1)]
    return EXACT, min(1.0, 2 * math.fsum(chances))


def compute_tango_interval(a_only: int, b_only: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of the difference of two paired proportions.

    It holds all differences D that the score test does not reject, so that it excludes 0 where McNemar's
    statistic (without continuity correction) does, and has a width also where no image is discordant.

    Args:
        a_only: number of images that only a has right.
        b_only: number of images that only b has right.
        n: number of all images, at least 1.
        level: the probability of covering.

    Returns:
        (low, high) of accuracy a - accuracy b, in -1..1.

    Source: Tango, Stat. Med. 17 (1998) 891, equation 8 and appendix.
    """
    z, difference = compute_quantile(level), (a_only - b_only) / n

    def is_within(candidate: float) -> bool:
        linear = -a_only - b_only + (2 * n - a_only + b_only) * candidate
        constant = -b_only * candidate * (1 - candidate)
        b_alone = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = max(n * (2 * b_alone + candidate * (1 - candidate)), 0.0)
        return abs(a_only - b_only - n * candidate) <= z * math.sqrt(variance)

    def bisect(outside: float) -> float:
        inside = difference
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
        return inside

    return bisect(-1.0), bisect(1.0)


def compute_required_n(difference: float, discordance: float, *, level: float = 0.95) -> int | None:
    """Return how many images McNemar's test needs to tell such a difference apart: power 80 %, two-sided 5 %.

    Args:
        difference: of the accuracies, as a fraction; 0 gives None, for no number of images is enough.
        discordance: the fraction of images that one has right and the other wrong; over several seeds the
            mean square of an image's difference, which is the same for one.
        level: 1 - the size of the test.

    Raises:
        DataError: the difference is larger than the discordance, or one is no fraction.

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
    return math.ceil(((z_size * math.sqrt(discordance) + z_power * rest) / difference) ** 2)


def describe_difference(result: dict[str, Any]) -> str:
    """Say in plain words what a result of `compare_paired` or `compare_seeds` allows to conclude.

    With "p_holm" and "num_pairs" in it, the result is one of several, and Holm's p value decides.

    Example:
        >>> describe_difference(compare_paired(a, b, names=("with EF-FER1", "without EF-FER1")))
        'with EF-FER1 against without EF-FER1: 0.8 points, 95 % -0.4 to 2.0: not told apart at n = 3,589;
        about 9,000 images would be needed (McNemar's exact test, p = 0.21).'
    """
    value, low, high = (_format_points(result["difference"][key]) for key in ("value", "low", "high"))
    first, second = result["names"]
    start = f"{first} against {second}: {value} points, {100 * result['level']:g} % {low} to {high}"
    verdict = "told apart" if result["is_larger_than_chance"] else "not told apart"
    needed = result["required_n"]
    more = (
        f"; about {_round_up(needed):,} images would be needed"
        if needed is not None and needed > result["n"] and not result["is_larger_than_chance"]
        else ""
    )
    return f"{start}: {verdict} at n = {result['n']:,}{more} ({_describe_evidence(result)})."


def _describe_evidence(result: dict[str, Any]) -> str:
    text = f"{result['test']}, p {_format_p(result['p_value'])}"
    if result.get("num_pairs", 1) > 1:
        text += f", by Holm over {result['num_pairs']} pairs {_format_p(result['p_holm'])}"
    if result.get("num_seeds", 1) > 1:
        text += f", {result['num_seeds']} seeds with a standard deviation of {result['sd_over_seeds']:.1f} points"
    return text


def _format_points(points: float) -> str:
    """Return points with one digit; -0.04 is 0.0, for a sign would say what the digit does not."""
    return f"{round(points, 1) + 0.0:.1f}"


def _format_p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}" if value < 0.1 else f"= {value:.2f}"


def _round_up(value: int) -> int:
    """Round up to two digits: more would pretend that the observed difference were the true one."""
    step = 10 ** max(len(str(value)) - 2, 0)
    return -(-value // step) * step
