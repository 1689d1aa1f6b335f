from __future__ import annotations

from dlfer.report import page
from dlfer.runs.metrics_record import Estimate


def test_numbers():
    assert page.format_percent(0.7031) == "70.3 %"
    assert page.format_percent(1) == "100.0 %"
    assert page.format_percent(None) == page.format_percent(float("nan")) == "–"
    assert page.format_count(3589) == "3,589"
    assert page.format_fraction(0.91349) == "0.913"
    assert [page.format_p_value(p) for p in (0.04567, 1e-9, 0.0001, None)] == ["0.0457", "< 0.0001", "0.0001", "–"]
    assert [page.format_value(value) for value in (None, True, 1e-3, "adam", [0, 1])] == [
        "null",
        "true",
        "0.001",
        "adam",
        "[0, 1]",
    ]
    assert page.format_interval(Estimate(low=0.688, high=0.7181)) == "68.8 to 71.8"
    assert page.format_interval([0.9, 0.91], "fraction") == "0.900 to 0.910"
    assert page.format_interval([None, 0.5]) == ""


def test_a_missing_interval_is_said_with_its_reason():
    missing = Estimate(low=None, high=None)
    assert page.format_uncertainty(Estimate(low=0.688, high=0.7181)) == "95 % 68.8 to 71.8"
    assert page.format_uncertainty([0.9, 0.91], "fraction") == "95 % 0.900 to 0.910"
    assert page.format_uncertainty(missing) == page.format_uncertainty([None, None]) == "no 95 % interval"
    assert page.format_uncertainty(Estimate(reason="only one image")) == "no 95 % interval: only one image"
