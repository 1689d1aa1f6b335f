"""Every interval that is called 95 % covers at least 93 % of simulated test sets (benchmarks/coverage.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dlfer.metrics.scores import compute_scores

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def coverage():
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("coverage_of_intervals", folder / "coverage.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def find_failures(found, least=0.93):
    """Return the metrics that cover significantly less (3.5 standard errors, for some 300 metrics at once)."""
    failures = {}
    for path, rows in found.items():
        hits = rows[~np.isnan(rows[:, 0]), 0]
        if len(hits) >= 100 and hits.mean() < least - 3.5 * np.sqrt(least * (1 - least) / len(hits)):
            failures[path] = float(hits.mean())
    return failures


def test_the_population_is_that_of_its_description(coverage):
    predictions = coverage.Population("usual", size=1000).draw(40_000, np.random.default_rng(0))
    assert predictions.correct.mean() == pytest.approx(0.70, abs=0.02)
    rare = predictions.targets == predictions.labels.index("Disgust")
    assert rare.mean() == pytest.approx(436 / 28709, abs=0.003)
    assert predictions.correct[rare].mean() == pytest.approx(0.5, abs=0.06)


def test_every_interval_of_the_scores_is_found(coverage):
    """Counted in the text of the JSON, where every interval has the word low, or stands in "intervals"."""
    predictions = coverage.Population("usual", size=1000).draw(200, np.random.default_rng(0))
    scores = compute_scores(predictions, temperature=1.3, threshold=0.5).as_json()
    found = dict(coverage.iterate_intervals(scores))
    in_lists = sum(len(figures["intervals"]) for figures in scores["per_class"].values())
    assert len(found) == json.dumps(scores).count('"low"') + in_lists
    assert {"accuracy", "per_class.Disgust.recall", "selective.curve[100 %]"} <= set(found)


@pytest.mark.slow
def test_an_interval_that_is_too_narrow_is_noticed(coverage, monkeypatch):
    from dlfer.metrics import intervals

    monkeypatch.setattr(intervals, "compute_quantile", lambda level: 1.3)
    population = coverage.Population("usual", size=20_000)
    failures = find_failures(coverage.simulate(population, 150, replicates=100, seed=3))
    assert "accuracy" in failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "n", "replicates"),
    [("usual", 150, 500), ("usual", 1000, 400), ("good", 150, 300), ("poor", 300, 300), ("calibrated", 1000, 300)],
)
def test_every_interval_covers_93_percent(coverage, scenario, n, replicates):
    population = coverage.Population(scenario, size=300_000)
    found = coverage.simulate(population, n, replicates=replicates, seed=11)
    assert len(found) > 200
    assert find_failures(found) == {}
