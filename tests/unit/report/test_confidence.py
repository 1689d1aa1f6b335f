from __future__ import annotations

import json

import pytest
from dlfer.report.confidence import draw_reliability, draw_risk_coverage


@pytest.fixture
def metrics(tmp_path, run_maker) -> dict:
    return json.loads((run_maker(tmp_path / "run") / "metrics.json").read_text())


def test_reliability_shows_the_bins_and_errors_of_the_metrics(metrics):
    calibration = metrics["test"]["calibration"]
    panels = draw_reliability(calibration).axes
    assert len(panels) == 2
    for axes, name in zip(panels, ("raw", "scaled"), strict=True):
        rows, drawn = calibration[name]["reliability"], axes.containers[0]
        assert drawn.lines[0].get_xdata() == pytest.approx([100 * row["confidence"] for row in rows])
        assert drawn.lines[0].get_ydata() == pytest.approx([100 * row["accuracy"] for row in rows])
        spans = [[y for _, y in span] for span in drawn.lines[2][0].get_segments()]
        assert spans == [pytest.approx([100 * row["low"], 100 * row["high"]]) for row in rows]
        assert f"ECE {100 * calibration[name]['ece_equal_mass']['value']:.1f} %" in axes.texts[0].get_text()


def test_reliability_without_a_temperature_has_one_panel(metrics):
    assert len(draw_reliability(metrics["test"]["calibration"] | {"scaled": None}).axes) == 1


def test_risk_coverage_shows_the_curve_and_the_threshold_of_the_metrics(metrics):
    selective = metrics["test"]["selective"]
    axes = draw_risk_coverage(selective, target_accuracy=0.8).axes[0]
    curve = axes.get_lines()[0]
    assert curve.get_xdata() == pytest.approx([100 * point["coverage"] for point in selective["curve"]])
    assert curve.get_ydata() == pytest.approx([100 * point["risk"] for point in selective["curve"]])
    (mark,), at = axes.containers, selective["at_threshold"]
    assert mark.lines[0].get_xydata()[0] == pytest.approx(
        [100 * at["coverage"]["value"], 100 * (1 - at["accuracy"]["value"])]
    )
    assert [y for _, y in mark.lines[2][0].get_segments()[0]] == pytest.approx(
        [100 * (1 - at["accuracy"]["high"]), 100 * (1 - at["accuracy"]["low"])]
    )
    assert "aimed at: 20 % wrong" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("at", [None, {"threshold": 0.99, "n": 0, "coverage": {}, "accuracy": {"value": None}}])
def test_risk_coverage_without_a_threshold_that_answers_has_no_mark(metrics, at):
    axes = draw_risk_coverage(metrics["test"]["selective"] | {"at_threshold": at}).axes[0]
    assert not axes.containers
    assert not any("aimed" in text.get_text() for text in axes.get_legend().get_texts())
