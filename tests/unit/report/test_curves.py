from __future__ import annotations

import numpy as np
import pytest

from dlfer.metrics.predictions import Predictions
from dlfer.report import curves
from dlfer.runs.metrics_record import AtThreshold, Calibration, Corruptions, Estimate, Metrics
from dlfer.runs.run_records import Epoch, read_history


def make_predictions(n=40, num_classes=3, seed=0, targets=None) -> Predictions:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, num_classes, n) if targets is None else targets
    probabilities = generator.dirichlet(np.ones(num_classes), len(targets))
    labels = tuple(f"class {c}" for c in range(num_classes))
    return Predictions([f"t/{i}" for i in range(len(targets))], labels, targets, probabilities)


def make_history(epochs=3, **changes) -> list[Epoch]:
    return [
        Epoch(
            epoch=epoch,
            phase="head" if epoch == 1 else "all",
            **{
                "train_loss": 2.0 / epoch,
                "train_accuracy": 0.2 * epoch,
                "validation_loss": 2.1 / epoch,
                "validation_accuracy": 0.15 * epoch,
                **changes,
            },
        )
        for epoch in range(1, epochs + 1)
    ]


def get_curves(axes) -> dict[str, list[float]]:
    return {line.get_label(): line.get_ydata() for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_history_shows_both_splits_and_the_kept_epoch():
    loss, accuracy = curves.draw_history(make_history(), kept_epoch=2).axes
    assert get_curves(loss)["train"] == pytest.approx([2.0, 1.0, 2 / 3])
    assert get_curves(accuracy)["validation"] == pytest.approx([15, 30, 45])
    assert "kept epoch" in get_curves(accuracy)


def test_history_leaves_out_empty_and_undefined_cells(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("epoch,phase,train_accuracy,validation_loss\n1,head,0.2,\n2.0,all,0.4,nan\n3,all,0.6,0.5\n")
    history = read_history(path)
    assert curves.read_series(history, "train_accuracy") == ([1, 2, 3], [0.2, 0.4, 0.6])
    assert curves.read_series(history, "validation_loss") == ([3], [0.5])
    assert curves.read_series(history, "validation_accuracy") == ([], [])


def test_roc_names_each_class_with_its_area_and_skips_absent_ones():
    predictions = make_predictions(targets=np.array([0, 0, 1, 1, 1, 0]))
    labels = [text.get_text() for text in curves.draw_roc(predictions).axes[0].get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == ["class 0", "class 1", "macro average"]
    areas = [float(label.split(",")[1]) for label in labels]
    assert areas[2] == pytest.approx((areas[0] + areas[1]) / 2, abs=1e-3)


def test_roc_of_one_class_only_draws_no_curve():
    axes = curves.draw_roc(make_predictions(targets=np.zeros(4, dtype=int))).axes[0]
    assert axes.get_legend() is None


def test_curves_differ_by_line_as_well_as_by_colour():
    axes = curves.draw_roc(make_predictions(n=200, num_classes=7)).axes[0]
    looks = [(line.get_color(), str(line.get_linestyle())) for line in axes.get_lines()[1:8]]
    assert len({colour for colour, _ in looks}) == 7
    lines = [line._unscaled_dash_pattern for line in axes.get_lines()[1:8]]
    assert len({str(line) for line in lines}) == 7
    parts = curves.draw_history(make_history()).axes[0].get_lines()[:2]
    assert parts[0].get_linestyle() != parts[1].get_linestyle()
    assert parts[0].get_marker() != parts[1].get_marker()


def test_corruptions_show_the_accuracies_from_the_clean_images_on():
    levels = [
        {"strength": s, "accuracy": {"value": v, "low": v - 0.1, "high": v + 0.1}} for s, v in ((1, 0.5), (2, 0.3))
    ]
    clean = Estimate(value=0.6, low=0.5, high=0.7)
    found = Corruptions.build({"n": 60, "clean": clean, "corruptions": {"low_resolution": levels}})
    axes = curves.draw_corruptions(found).axes[0]
    assert axes.containers[0].get_label() == "low resolution"
    assert axes.containers[0].lines[0].get_ydata() == pytest.approx([60, 50, 30])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "1", "2"]
    spans = axes.containers[0].lines[2][0].get_segments()
    assert np.array(spans)[:, :, 1] == pytest.approx(np.array([[50, 70], [40, 60], [20, 40]]))


@pytest.fixture
def metrics(tmp_path, run_maker) -> Metrics:
    return Metrics.require(run_maker(tmp_path / "run"))


def test_reliability_shows_the_bins_and_errors_of_the_metrics(metrics):
    calibration = metrics.test.calibration
    panels = curves.draw_reliability(calibration).axes
    assert len(panels) == 2
    for axes, version in zip(panels, (calibration.raw, calibration.scaled), strict=True):
        rows, drawn = version.reliability, axes.containers[0]
        assert drawn.lines[0].get_xdata() == pytest.approx([100 * row.confidence for row in rows])
        assert drawn.lines[0].get_ydata() == pytest.approx([100 * row.accuracy for row in rows])
        spans = [[y for _, y in span] for span in drawn.lines[2][0].get_segments()]
        assert spans == [pytest.approx([100 * row.low, 100 * row.high]) for row in rows]
        assert f"ECE {100 * version.ece_equal_mass.value:.1f} %" in axes.texts[0].get_text()


def test_reliability_without_a_temperature_has_one_panel(metrics):
    assert len(curves.draw_reliability(Calibration(raw=metrics.test.calibration.raw)).axes) == 1


def test_risk_coverage_shows_the_curve_and_the_threshold_of_the_metrics(metrics):
    selective = metrics.test.selective
    axes = curves.draw_risk_coverage(selective, target_accuracy=0.8).axes[0]
    curve = axes.get_lines()[0]
    assert curve.get_xdata() == pytest.approx([100 * point.coverage for point in selective.curve])
    assert curve.get_ydata() == pytest.approx([100 * point.risk for point in selective.curve])
    (mark,), at = axes.containers, selective.at_threshold
    assert mark.lines[0].get_xydata()[0] == pytest.approx([100 * at.coverage.value, 100 * (1 - at.accuracy.value)])
    assert [y for _, y in mark.lines[2][0].get_segments()[0]] == pytest.approx(
        [100 * (1 - at.accuracy.high), 100 * (1 - at.accuracy.low)]
    )
    assert "aimed at: 20 % wrong" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("at", [None, AtThreshold(threshold=0.99, n=0, coverage=Estimate(), accuracy=Estimate())])
def test_risk_coverage_without_a_threshold_that_answers_has_no_mark(metrics, at):
    selective = metrics.test.selective.model_copy(update={"at_threshold": at})
    axes = curves.draw_risk_coverage(selective).axes[0]
    assert not axes.containers
    assert not any("aimed" in text.get_text() for text in axes.get_legend().get_texts())
