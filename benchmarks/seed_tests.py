"""False-positive rate and power of the test over seeds, and coverage of the interval over seeds, by simulation.

    python benchmarks/seed_tests.py [--replicates 4000] [--json FILE]

In each replicate, two equal recipes are trained S times each and evaluated on the same n images. The first table shows
how often `compare_recipes` calls them significantly different (it should be at most 5 %), and how often the interval
used until commit 6b78133 did, 1.96 standard errors. The half-widths of both show the cost of the correct test. The
second table shows how often a difference of two percentage points is detected, the third how often the interval of one
recipe's accuracy over seeds and images covers the true accuracy.

Model: image i is classified correctly with probability p[i], logistic-normal with a mean of 0.70 and a spread for which
two trainings disagree on 20 % of the images; a seed shifts all logits so that the accuracies have the given standard
deviation. It needs no data and no training, and takes about 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dlfer.metrics.seeds import compare_recipes, compute_seed_summary

SIZES = (1000, 3589)
SEEDS = (2, 3, 5, 10)
SDS = (0.0, 0.007, 0.0125, 0.021)
"""Standard deviations of accuracy over seeds; those measured with dlfer are 0.009 to 0.012."""
EASE, SPREAD = 1.6, 2.8
"""Mean and standard deviation of the images' logits: accuracy 0.70, disagreement of two trainings 0.2."""


def draw_recipe(
    ease: np.ndarray, num_seeds: int, sd: float, shift: float, generator: np.random.Generator
) -> np.ndarray:
    """Return bool [S, n]: whether each training classifies each image correctly.

    Args:
        ease: logits [n] of the images.
        sd: standard deviation of the accuracy over seeds, as a fraction.
        shift: shift of the mean accuracy, as a fraction.
    """
    chances = 1 / (1 + np.exp(-ease))
    slope = float((chances * (1 - chances)).mean())  # derivative of the accuracy by a shift of all logits
    moved = ease + (shift + sd * generator.normal(size=(num_seeds, 1))) / slope
    return generator.random((num_seeds, len(ease))) < 1 / (1 + np.exp(-moved))


def compute_former_half(a: np.ndarray, b: np.ndarray) -> float:
    """Return the half-width of the interval that was used until commit 6b78133."""
    differences = a.astype(float) - b
    of_images = np.sqrt((differences.mean(axis=0) ** 2).mean() / a.shape[1])
    return 1.96 * float(np.hypot(of_images, differences.mean(axis=1).std(ddof=1) / np.sqrt(len(a))))


def simulate(n: int, num_seeds: int, sd: float, *, shift: float, replicates: int, seed: int) -> dict:
    """Return how often two recipes whose accuracies differ by `shift` are found different, and median half-widths."""
    generator = np.random.default_rng(seed)
    found, former, halves, former_halves = 0, 0, [], []
    for _ in range(replicates):
        ease = generator.normal(EASE, SPREAD, n)
        a = draw_recipe(ease, num_seeds, sd, shift, generator)
        b = draw_recipe(ease, num_seeds, sd, 0.0, generator)
        compared = compare_recipes(a, b)
        low, high = compared.compute_interval()
        half = compute_former_half(a, b)
        found += low > 0 or high < 0
        former += abs(compared.difference) > half
        halves.append((high - low) / 2)
        former_halves.append(half)
    return {
        "n": n,
        "seeds": num_seeds,
        "sd": sd,
        "difference": shift,
        "replicates": replicates,
        "significant": found / replicates,
        "half_width": float(np.median(halves)),
        "former_significant": former / replicates,
        "former_half_width": float(np.median(former_halves)),
    }


def simulate_accuracy(n: int, num_seeds: int, sd: float, *, replicates: int, seed: int) -> dict:
    """Return how often the interval of one recipe's accuracy over seeds and images covers the true accuracy."""
    generator = np.random.default_rng(seed)
    ease = generator.normal(EASE, SPREAD, 1_000_000)
    # Averaged over seeds, since accuracy is not exactly linear in the shift of the logits.
    truth = np.mean([draw_recipe(ease, 1, sd, 0.0, generator).mean() for _ in range(200 if sd else 5)])
    covered, halves = 0, []
    for _ in range(replicates):
        correct = draw_recipe(generator.normal(EASE, SPREAD, n), num_seeds, sd, 0.0, generator)
        low, high = compute_seed_summary(correct).items_and_seeds
        covered += low <= truth <= high
        halves.append((high - low) / 2)
    return {
        "n": n,
        "seeds": num_seeds,
        "sd": sd,
        "replicates": replicates,
        "covered": covered / replicates,
        "half_width": float(np.median(halves)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, list] = {"equal": [], "different": [], "accuracy": []}
    print("equal recipes:  n  seeds  sd    false alarms (former)    median half-width (former), percentage points")
    for shift, name in ((0.0, "equal"), (0.02, "different")):
        if shift:
            print("recipes that differ by 2 percentage points: share detected instead of false alarms")
        for number, (n, s, sd) in enumerate((n, s, sd) for n in SIZES for sd in SDS for s in SEEDS):
            row = simulate(n, s, sd, shift=shift, replicates=given.replicates, seed=number)
            result[name].append(row)
            print(
                f"{n:6,} {s:5} {100 * sd:6.2f}   {100 * row['significant']:5.1f} % ({100 * row['former_significant']:.1f} %)"
                f"   {100 * row['half_width']:.2f} ({100 * row['former_half_width']:.2f})",
                flush=True,
            )
    print("coverage of one recipe's accuracy over seeds and images")
    for number, (n, s, sd) in enumerate((n, s, sd) for n in SIZES for sd in SDS for s in SEEDS):
        row = simulate_accuracy(n, s, sd, replicates=given.replicates, seed=number)
        result["accuracy"].append(row)
        print(
            f"{n:6,} {s:5} {100 * sd:6.2f}   {100 * row['covered']:5.1f} %   {100 * row['half_width']:.2f}", flush=True
        )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
