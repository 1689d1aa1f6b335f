"""Coverage of the 95 % intervals of metrics.json: how often each contains the true value, by simulation.

    python benchmarks/coverage.py                                      # all metrics, about 20 minutes on one core
    python benchmarks/coverage.py --n 150 --replicates 300 --metrics macro_f1,per_class.Disgust --scenarios usual

Test sets of n images are drawn repeatedly from a population with known metrics. `compute_scores` and
`compute_group_scores` evaluate each test set, and every interval in their results is compared with the value of the
whole population. A new metric with an interval is therefore included without a change of this file.

The population: images are independent, with the class proportions of FER2013 (Training: Angry 3,995, Disgust 436,
Fear 4,097, Happy 7,215, Sad 4,830, Surprise 3,171, Neutral 4,965), so that the number of images of a class in a test
set is random. An image has seven features, normal with variance 1 around the prototype of its class; prototypes of
classes that people confuse are close together, and Disgust is close to Angry. The classifier predicts the posterior of
this model, raised to the power 1/temperature and normalised:

    usual       accuracy about 0.70, recall of Disgust about 0.5, overconfident (temperature 0.7)
    good        accuracy about 0.95
    poor        accuracy about 0.40, recall of Disgust about 0.1
    calibrated  like usual with temperature 1: the true calibration error is 0

The true values are computed on a sample of 1,000,000 images. A test set without images of some class is a sample of the
population without this class, since images are independent; its intervals are compared with that population's values.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from timing import tell_row, write_figures

from dlfer.metrics.confidence import apply_temperature
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_group_scores, compute_scores

COUNTS = {
    **{"Angry": 3995, "Disgust": 436, "Fear": 4097, "Happy": 7215},
    **{"Sad": 4830, "Surprise": 3171, "Neutral": 4965},
}
"""Number of images of each class in FER2013's Training."""

LABELS = tuple(COUNTS)

CONFUSED = {
    ("Angry", "Disgust"): 0.5,
    ("Angry", "Fear"): 0.3,
    ("Angry", "Sad"): 0.35,
    ("Angry", "Neutral"): 0.3,
    ("Fear", "Sad"): 0.45,
    ("Fear", "Surprise"): 0.35,
    ("Fear", "Neutral"): 0.3,
    ("Sad", "Neutral"): 0.45,
    ("Happy", "Neutral"): 0.2,
}
"""The value of a class's prototype in the feature of the other class; in its own feature it is 1."""

SCENARIOS = {
    # scale of the prototypes, that of Disgust relative to it, temperature of the predictions
    "usual": (2.05, 1.35, 0.7),
    "good": (4.0, 1.0, 0.7),
    "poor": (0.92, 1.8, 0.7),
    "calibrated": (2.05, 1.35, 1.0),
}

SIZES = (150, 300, 1000, 3589)
POPULATION = 1_000_000
TEMPERATURE, THRESHOLD = 1.3, 0.6
"""Passed to `compute_scores` as if they had been fitted and selected on other images."""


class Population:
    """A scenario's population of images with its classifier, and the true value of each metric.

    Args:
        scenario: a key of SCENARIOS.
        size: number of images from which the true values are computed.
    """

    def __init__(self, scenario: str, *, size: int = POPULATION) -> None:
        distance, of_disgust, self._temperature = SCENARIOS[scenario]
        prototypes = np.eye(len(LABELS))
        for (a, b), common in CONFUSED.items():
            i, j = LABELS.index(a), LABELS.index(b)
            prototypes[i, j] = prototypes[j, i] = common
        prototypes[LABELS.index("Disgust")] *= of_disgust
        self._prototypes = distance * prototypes
        self._shares = np.array(list(COUNTS.values())) / sum(COUNTS.values())
        self._size = size
        self._values: dict[tuple[int, ...], dict[str, float]] = {}

    def draw(self, n: int, generator: np.random.Generator) -> Predictions:
        """Return the predictions of n new images."""
        targets = generator.choice(len(LABELS), n, p=self._shares)
        features = self._prototypes[targets] + generator.normal(size=(n, len(LABELS)))
        logits = features @ self._prototypes.T - 0.5 * (self._prototypes**2).sum(axis=1) + np.log(self._shares)
        powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / self._temperature)
        ids = np.arange(n).astype(np.str_)
        return Predictions(ids, LABELS, targets, powers / powers.sum(axis=1, keepdims=True))

    @cached_property
    def everyone(self) -> Predictions:
        """The sample from which the true values are computed."""
        return self.draw(self._size, np.random.default_rng(20_13))

    def find_values(self, classes: tuple[int, ...]) -> dict[str, float]:
        """Return path -> true value in the population restricted to `classes`."""
        if classes not in self._values:
            kept = np.isin(self.everyone.targets, classes)
            # Test sets without some class are rare, so a smaller sample is sufficient.
            sample = self.everyone if kept.all() else self.everyone.take(np.flatnonzero(kept)[:300_000])
            found = score(sample, generator=np.random.default_rng(0))
            self._values[classes] = {path: figure["value"] for path, figure in iterate_intervals(found)}
        return self._values[classes]

    @cached_property
    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Kind of confidence -> (confidences in rising order, cumulative number of correct predictions from 0)."""
        rows = np.arange(self._size), self.everyone.predicted
        kinds = {
            "raw": self.everyone.probabilities[rows].astype(np.float64),
            "scaled": apply_temperature(self.everyone.probabilities, TEMPERATURE)[rows],
        }
        orders = {kind: np.argsort(confidences) for kind, confidences in kinds.items()}
        return {
            kind: (kinds[kind][order], np.r_[0, np.cumsum(self.everyone.correct[order])])
            for kind, order in orders.items()
        }

    def find_accuracy(self, kind: str, low: float, high: float) -> float:
        """Return the accuracy of the images whose confidence is in [low, high); NaN if there are none."""
        confidences, right = self.curves[kind]
        first, last = np.searchsorted(confidences, [low, high])
        return (right[last] - right[first]) / (last - first) if last > first else np.nan


def score(predictions: Predictions, *, generator: np.random.Generator) -> dict[str, Any]:
    """Return the contents of metrics.json for `predictions`, including groups.

    Of the two groups of the attribute "two", one has more errors; the groups of "five" do not differ.
    """
    scores = compute_scores(predictions, temperature=TEMPERATURE, threshold=THRESHOLD).as_json()
    first = generator.random(len(predictions)) < np.where(predictions.correct, 0.5, 0.35)
    values = {
        "two": np.where(first, "first", "second"),
        "five": generator.choice(list("abcde"), len(predictions)),
    }
    attributes = {name: dict(zip(predictions.ids.tolist(), v.tolist(), strict=True)) for name, v in values.items()}
    return scores | {"groups": compute_group_scores(predictions, attributes).as_json()["attributes"]}


def iterate_intervals(found: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, {"value", "low", "high", ...}) for each interval in a nested structure.

    An interval is a dictionary with the keys low and high, or an entry of "intervals" in the same dictionary as its
    value. An item of a list is named by its coverage in percent, if it has one, or by its index.
    """
    if isinstance(found, list):
        for number, item in enumerate(found):
            if isinstance(item, dict):
                name = f"{100 * item['coverage']:.0f} %" if "coverage" in item else str(number)
                yield from iterate_intervals(item, f"{path}[{name}]")
    if not isinstance(found, dict):
        return
    if "low" in found:
        value = next(found[key] for key in ("value", "risk", "accuracy") if key in found)
        yield path, {**found, "value": value}
        return
    for name, (low, high) in found.get("intervals", {}).items():
        reason = found.get("reasons", {}).get(name)
        yield f"{path}.{name}", {"value": found[name], "low": low, "high": high, "reason": reason}
    for key, item in found.items():
        if key != "intervals":
            yield from iterate_intervals(item, f"{path}.{key}" if path else key)


def find_truths(population: Population, predictions: Predictions, scores: dict[str, Any]) -> dict[str, float]:
    """Return path -> true value; for a point of a curve, the value at the thresholds that this test set gave."""
    truths = dict(population.find_values(tuple(np.unique(predictions.targets).tolist())))
    for path, point in iterate_intervals(scores["selective"]["curve"], "selective.curve"):
        truths[path] = 1 - population.find_accuracy("scaled", point["threshold"], np.inf)
    rows = np.arange(len(predictions)), predictions.predicted
    for kind in ("raw", "scaled"):
        answers = predictions.probabilities
        answers = apply_temperature(answers, TEMPERATURE) if kind == "scaled" else answers.astype(np.float64)
        confidences, start = np.sort(answers[rows]), 0
        path = f"calibration.{kind}.reliability"
        for number, row in enumerate(scores["calibration"][kind]["reliability"]):
            end = start + row["n"]
            edges = [confidences[max(start - 1, 0) : start + 1].mean() if start else 0.0]
            edges += [confidences[end - 1 : end + 1].mean() if end < len(confidences) else np.inf]
            truths[f"{path}[{number}]"] = population.find_accuracy(kind, *edges)
            start = end
    return truths


def simulate(population: Population, n: int, *, replicates: int, seed: int) -> dict[str, np.ndarray]:
    """Return path -> float64 [R, 3]: whether the interval contains the true value (NaN: no interval), width, value."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for replicate in range(replicates):
        generator = np.random.default_rng([seed, n, replicate])
        predictions = population.draw(n, generator)
        scores = score(predictions, generator=generator)
        truths = find_truths(population, predictions, scores)
        for path, figure in iterate_intervals(scores):
            value, low, high = (figure[key] for key in ("value", "low", "high"))
            truth = truths.get(path)
            if value is None or truth is None or np.isnan(truth):
                continue
            if low is None or high is None or np.isnan([low, high]).any():
                found[path].append((np.nan, np.nan, value))
            else:
                found[path].append((low - 1e-9 <= truth <= high + 1e-9, high - low, value))
    return {path: np.array(rows) for path, rows in found.items()}


def summarise(path: str, rows: np.ndarray, truth: float | None) -> dict[str, Any]:
    """Return a row of the result: the coverage with its Monte Carlo interval (Wilson), and the mean width."""
    given = ~np.isnan(rows[:, 0])
    hits, num_given = int(rows[given, 0].sum()), int(given.sum())
    low, high = compute_wilson_interval(hits, num_given)
    return {
        "metric": path,
        "true": None if truth is None else round(float(truth), 5),
        "mean": round(float(rows[:, 2].mean()), 5),
        "num_sets": len(rows),
        "num_given": num_given,
        "coverage": round(hits / num_given, 4) if num_given else None,
        "monte_carlo": [round(low, 4), round(high, 4)] if num_given else None,
        "mean_width": round(float(rows[given, 1].mean()), 5) if num_given else None,
    }


def main() -> None:
    """Run the simulation, and print a row for each metric, n and scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=_list_of(int), default=SIZES, help="sizes of the test sets, with commas between")
    parser.add_argument("--replicates", type=int, default=1000, help="test sets of each size (default: 1000)")
    parser.add_argument("--scenarios", type=_list_of(str), default=tuple(SCENARIOS), help="see above")
    parser.add_argument("--metrics", type=_list_of(str), default=(), help="print those whose path begins so")
    parser.add_argument("--seed", type=int, default=1, help="of the test sets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    given = parser.parse_args()
    rows: list[dict] = []
    for scenario in given.scenarios:
        population = Population(scenario)
        truths = population.find_values(tuple(range(len(LABELS))))
        for n in given.n:
            found = simulate(population, n, replicates=given.replicates, seed=given.seed)
            for path, values in found.items():
                if not given.metrics or path.startswith(tuple(given.metrics)):
                    tell_row({"scenario": scenario, "n": n, **summarise(path, values, truths.get(path))}, rows)
    write_figures(given.json, rows, "numpy", "scipy")


def _list_of(kind: type):
    return lambda text: tuple(kind(item) for item in text.split(","))


if __name__ == "__main__":
    main()
