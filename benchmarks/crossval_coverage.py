"""Coverage of the intervals of a cross-validation, and false-positive rate of its test, by simulation.

    python benchmarks/crossval_coverage.py [--replicates 1000] [--json FILE]

Learners: samples of a known population are cross-validated with a real learner (multinomial logistic regression, or one
nearest neighbour, which depends more on its training images). Each model's true accuracy is estimated on 5,000 further
images from the probabilities of their classes in the population; the error of this estimate is taken into account. The
results are how often

- the interval of the trained models contains the mean true accuracy of these k models, and that of macro F1 their F1;
- the interval of the recipe contains the accuracy of the recipe, which is the mean over all replicates;
- common alternatives contain the accuracy of the recipe: the mean of the folds +- Student's quantile times their
  standard error (naive), the same with Nadeau and Bengio's correction of the whole variance (plain), and the interval
  of the trained models, read as one of the recipe.

Two recipes of equal accuracy are the same learner on each of two halves of the features, which have the same
distribution. The results are how often each test calls them significantly different: `compare_folds`, the paired t test
over folds, the corrected resampled t test (plain), and McNemar's test on all images.

Simulated predictions: the model of images and seeds of seed_tests.py with 3,589 images, where each fold has its own
seed. Grouped images: subjects with 20 images each, whose predictions are correlated.

Population: four classes with proportions 0.4, 0.3, 0.2, 0.1; ten features in each half, normal with unit variance
around the mean of the class. It needs no data and no network, and takes about six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from seed_tests import EASE, SPREAD, draw_recipe

from dlfer.data.bundle import Split
from dlfer.data.split import assign_folds
from dlfer.metrics import classification as mt
from dlfer.metrics.intervals import compute_average_intervals, compute_wilson_interval
from dlfer.metrics.paired import compute_mcnemar
from dlfer.metrics.seeds import compute_t_quantile
from dlfer.metrics.several import compare_folds, compute_recipe_accuracy, compute_trained_accuracy

PROPORTIONS = np.array([0.4, 0.3, 0.2, 0.1])
FEATURES = 10
"""Number of features in each half; a learner uses one half."""
DISTANCE = 0.55
"""Standard deviation of the classes' means in each feature: logistic regression reaches about 0.7."""
NUM_NEW = 5_000

Learner = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def fit_logistic(features: np.ndarray, targets: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the classes (int [M]) that multinomial logistic regression with a ridge predicts for `asked` [M, F]."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(max_iter=100).fit(features, targets).predict(asked)


def fit_neighbour(features: np.ndarray, targets: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the classes (int [M]) of the nearest training images of `asked` (float [M, F])."""
    distances = (features**2).sum(axis=1) - asked @ (2 * features.T)
    return targets[np.argmin(distances, axis=1)]


LEARNERS: dict[str, Learner] = {"logistic": fit_logistic, "neighbour": fit_neighbour}


def draw_population(num: int, means: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return features float32 [num, 2 F] and targets int [num]; `means`, float [C, F], apply to both halves."""
    targets = generator.choice(len(means), num, p=PROPORTIONS)
    noise = generator.normal(size=(num, 2 * FEATURES))
    return (np.tile(means[targets], 2) + noise).astype(np.float32), targets


def describe_new(features: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of one half (float [M, F]) and the probability of each class in the population (float [M, C])."""
    logits = features @ means.T - (means**2).sum(axis=1) / 2 + np.log(PROPORTIONS)
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    return features, chances / chances.sum(axis=1, keepdims=True)


class Validated(NamedTuple):
    """The result of one cross-validation.

    Attributes:
        predicted: int [n], the class of each image, predicted by the model that was not trained on it.
        correct: bool [n], whether the prediction is correct.
        confusion: float [C, C], the true confusion matrix, averaged over the k models, as shares of the population.
        error: standard error of the true accuracy, which is estimated on a sample.
    """

    predicted: np.ndarray
    correct: np.ndarray
    confusion: np.ndarray
    error: float

    @property
    def truth(self) -> float:
        """The true accuracy of the k models."""
        return float(np.trace(self.confusion))


def cross_validate(
    data: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray], folds: np.ndarray, learner: Learner
) -> Validated:
    """Cross-validate a learner.

    Args:
        data: features and targets of the cross-validated images.
        new: features and class probabilities (float [M, C]) of other images, for the true accuracy.
        folds: int [n], the fold of each image.
        learner: fits training images, and predicts others.
    """
    (features, targets), found, truths = data, np.zeros(len(folds), np.int64), []
    confusion = np.zeros((len(PROPORTIONS), len(PROPORTIONS)))
    for fold in np.unique(folds):
        held = folds == fold
        predicted = learner(features[~held], targets[~held], np.concatenate([features[held], new[0]]))
        found[held], of_new = predicted[: held.sum()], predicted[held.sum() :]
        truths.append(np.take_along_axis(new[1], of_new[:, None], axis=1)[:, 0])
        for label in range(len(PROPORTIONS)):
            confusion[:, label] += new[1][of_new == label].sum(axis=0)
    of_image = np.mean(truths, axis=0)
    error = float(of_image.std() / np.sqrt(len(of_image)))
    return Validated(found, found == targets, confusion / confusion.sum(), error)


def covers_macro_f1(targets: np.ndarray, found: Validated) -> bool:
    """Return whether the interval of the pooled macro F1 contains the k models' macro F1 in the population."""
    confusion = mt.compute_confusion(targets, found.predicted, len(PROPORTIONS))
    low, high = compute_average_intervals(confusion)["macro_f1"]
    return bool(low <= mt.compute_macro_f1(found.confusion) <= high)


def draw_folds(targets: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, drawn as in a run."""
    n = len(targets)
    split = Split("all", np.zeros((n, 1, 1, 1), np.uint8), targets, np.array([str(row) for row in range(n)]))
    return assign_folds(split, num_folds, seed=seed, groups=np.arange(n))


def compute_t_interval(values: np.ndarray, folds: np.ndarray, *, is_corrected: bool) -> tuple[float, float]:
    """Return the t interval of the mean over folds, with Nadeau and Bengio's correction if `is_corrected`."""
    means = np.array([values[folds == fold].mean() for fold in np.unique(folds)])
    factor = 1 / len(means) + (1 / (len(means) - 1) if is_corrected else 0)
    half = compute_t_quantile(len(means) - 1) * float(means.std(ddof=1)) * np.sqrt(factor)
    return float(means.mean()) - half, float(means.mean()) + half


def simulate_learner(name: str, n: int, num_folds: int, *, replicates: int, seed: int) -> dict:
    """Return the coverage of each interval and the false-positive rate of each test for one learner."""
    generator, learner = np.random.default_rng(seed), LEARNERS[name]
    means = np.random.default_rng(0).normal(scale=DISTANCE, size=(len(PROPORTIONS), FEATURES))
    rows, covered = [], 0
    for _ in range(replicates):
        features, targets = draw_population(n, means, generator)
        new = draw_population(NUM_NEW, means, generator)[0]
        folds = draw_folds(targets, num_folds, int(generator.integers(2**31)))
        sides = [
            cross_validate((features[:, half], targets), describe_new(new[:, half], means), folds, learner)
            for half in (slice(None, FEATURES), slice(FEATURES, None))
        ]
        covered += covers_macro_f1(targets, sides[0])
        rows.append((sides[0].correct, sides[0].truth, sides[0].error, sides[1].correct, folds))
    truth = float(np.mean([true for _, true, *_ in rows]))
    return (
        {"learner": name, "n": n, "folds": num_folds, "replicates": replicates, "accuracy": truth}
        | _count(rows, truth)
        | {"macro_f1": covered / replicates}
    )


def simulate_predictions(n: int, num_folds: int, sd: float, *, shift: float, replicates: int, seed: int) -> dict:
    """Return the same for simulated predictions of two recipes that differ by `shift`; each fold has its own seed."""
    generator, rows = np.random.default_rng(seed), []
    folds = np.arange(n) % num_folds
    ease = generator.normal(EASE, SPREAD, 200_000)
    truth = np.mean([draw_recipe(ease, 1, sd, 0.0, generator).mean() for _ in range(200 if sd else 5)])
    for _ in range(replicates):
        ease = generator.normal(EASE, SPREAD, n)
        a, b = (_pick(draw_recipe(ease, num_folds, sd, moved, generator), folds) for moved in (0.0, shift))
        rows.append((a, truth, 0.0, b, folds))
    found = _count(rows, truth)
    del found["trained"]  # the true accuracy of the individual models is not simulated
    return {"n": n, "folds": num_folds, "sd": sd, "difference": shift, "replicates": replicates} | found


def _pick(correct: np.ndarray, folds: np.ndarray) -> np.ndarray:
    return correct[folds, np.arange(len(folds))]


def _count(rows: list[tuple], truth: float) -> dict:
    """Return the share of replicates that each interval covers and each test rejects, and the median half-widths.

    Args:
        rows: per replicate: correct predictions of a, true accuracy of its models and the error of it, those of b,
            folds.
        truth: the accuracy of the recipe.
    """
    intervals = ("trained", "recipe", "naive", "plain", "trained_as_recipe")
    found = dict.fromkeys((*intervals, "test", "paired_t", "plain_test", "mcnemar"), 0)
    halves: dict[str, list[float]] = {
        name: [] for name in ("trained", "recipe", "plain", "difference", "plain_difference")
    }
    for a, true, error, b, folds in rows:
        n, num_folds = len(a), int(folds.max()) + 1
        alone = np.arange(n)
        trained = compute_trained_accuracy(a, alone)
        recipe = compute_recipe_accuracy(a, alone, folds, num_folds=num_folds)
        naive, plain = (compute_t_interval(a.astype(float), folds, is_corrected=given) for given in (False, True))
        of_pair = [compute_t_interval(a.astype(float) - b, folds, is_corrected=given) for given in (False, True)]
        pair = compare_folds((a, b), alone, folds, num_folds=num_folds, names=("a", "b"))
        # The true accuracy is estimated on a sample, so the interval is widened by the error of that estimate.
        limits = [
            trained.value + np.sign(end - trained.value) * np.hypot(end - trained.value, 1.96 * error)
            for end in (trained.low, trained.high)
        ]
        found["trained"] += limits[0] <= true <= limits[1]
        found["recipe"] += recipe.low <= truth <= recipe.high
        found["naive"] += naive[0] <= truth <= naive[1]
        found["plain"] += plain[0] <= truth <= plain[1]
        found["trained_as_recipe"] += trained.low <= truth <= trained.high
        found["test"] += pair.is_significant
        for name, (low, high) in zip(("paired_t", "plain_test"), of_pair, strict=True):
            found[name] += bool(low > 0 or high < 0)
        found["mcnemar"] += compute_mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))[1] < 0.05
        halves["trained"].append((trained.high - trained.low) / 2)
        halves["recipe"].append((recipe.high - recipe.low) / 2)
        halves["plain"].append((plain[1] - plain[0]) / 2)
        halves["plain_difference"].append((of_pair[1][1] - of_pair[1][0]) / 2)
        halves["difference"].append((pair.difference.high - pair.difference.low) / 200)
    shares = {name: float(count) / len(rows) for name, count in found.items()}
    return shares | {f"half_{name}": float(np.median(values)) for name, values in halves.items()}


def simulate_subjects(num_subjects: int, sd: float, *, replicates: int, seed: int) -> dict:
    """Return the coverage for grouped images: subjects with 20 images, whose accuracies have the deviation `sd`.

    The coverage of Wilson's interval, which assumes independent images, is included for comparison.
    """
    generator, size, mean = np.random.default_rng(seed), 20, 0.7
    spread = mean * (1 - mean) / sd**2 - 1  # of the beta distribution of a subject's accuracy
    groups = np.repeat(np.arange(num_subjects), size)
    covered, wilson, halves = 0, 0, []
    for _ in range(replicates):
        chances = generator.beta(mean * spread, (1 - mean) * spread, num_subjects)
        correct = generator.random(num_subjects * size) < np.repeat(chances, size)
        found = compute_trained_accuracy(correct, groups)
        low, high = compute_wilson_interval(float(correct.sum()), len(correct))
        covered += found.low <= mean <= found.high
        wilson += low <= mean <= high
        halves.append((found.high - found.low) / 2)
    return {
        "subjects": num_subjects,
        "sd": sd,
        "replicates": replicates,
        "trained": covered / replicates,
        "wilson": wilson / replicates,
        "half_trained": float(np.median(halves)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    count = given.replicates
    result: dict[str, list] = {"learners": [], "predictions": [], "subjects": []}

    def keep(name: str, row: dict) -> None:
        result[name].append(row)
        print(json.dumps(row), flush=True)

    cases = [(name, n, k) for name in LEARNERS for n in (200, 1000) for k in ((2, 5, 10) if n == 200 else (5,))]
    for number, (name, n, k) in enumerate(cases):
        keep("learners", simulate_learner(name, n, k, replicates=count, seed=number))
    settings = [(k, sd, shift) for shift in (0.0, 0.02) for sd in (0.0, 0.0125) for k in (2, 5, 10, 20)]
    for number, (k, sd, shift) in enumerate(settings):
        keep("predictions", simulate_predictions(3589, k, sd, shift=shift, replicates=count, seed=number))
    for number, (subjects, sd) in enumerate((s, sd) for s in (10, 30, 118) for sd in (0.05, 0.15, 0.25)):
        keep("subjects", simulate_subjects(subjects, sd, replicates=4 * count, seed=number))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
