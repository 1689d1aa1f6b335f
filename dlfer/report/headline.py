"""The headline of a report, and the table of all figures of merit beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dlfer.report.duplicates import describe_duplicates, find_without, format_without
from dlfer.report.page import format_percent, is_missing

PARTS = ("test", "test_without_duplicates", "validation", "validation_without_duplicates", "train")
VIEWS = {"single": "the image as it is", "mirror": "the image and its mirror image", "ten_crop": "ten crops"}


class Metric(NamedTuple):
    """A row of the table: its name, where it stands in a part of metrics.json, how it is written, and a remark."""

    name: str
    get: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
    scale: str = "percent"
    remark: str = ""


def _plain(key: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    return lambda scores: scores.get(key)


def _calibrated(key: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    return lambda scores: ((scores.get("calibration") or {}).get("raw") or {}).get(key)


METRICS = (
    Metric("accuracy", _plain("accuracy")),
    Metric("balanced accuracy", _plain("balanced_accuracy"), remark="the mean recall of the classes"),
    Metric("macro F1", _plain("macro_f1")),
    Metric("macro precision", _plain("macro_precision")),
    Metric("macro specificity", _plain("macro_specificity")),
    Metric("MCC", _plain("mcc"), "fraction", "0 is chance"),
    Metric("Cohen's kappa", _plain("cohen_kappa"), "fraction", "0 is chance"),
    Metric("macro AUC", _plain("macro_auc"), "fraction", "0.5 is chance"),
    Metric("macro average precision", _plain("macro_average_precision"), "fraction"),
    Metric("log-loss", _plain("log_loss"), "fraction", "less is better"),
    Metric("ECE", _calibrated("ece_equal_mass"), remark="less is better"),
    Metric("Brier score", _calibrated("brier"), "fraction", "0 to 2, less is better"),
    Metric("emotion detection rate", _plain("emotion_detection_rate"), remark="classes mostly predicted as themselves"),
    Metric("one-vs-rest accuracy", _plain("one_vs_rest_accuracy"), remark="not the accuracy, see below"),
)


def get_judged_part(metrics: Mapping[str, Any] | None) -> str | None:
    """Return the part that a run is judged on: "test", else "validation", else None."""
    return next((part for part in ("test", "validation") if (metrics or {}).get(part)), None)


def name_part(metrics: Mapping[str, Any], data: Mapping[str, Any] | None) -> str:
    """Return what the judged part is, in words; a validation that also selected the model is called so."""
    if get_judged_part(metrics) == "validation":
        return f"validation figure ({metrics['selected_on']}, used for selection)"
    split = (data or {}).get("splits", {}).get("test", {}).get("name")
    return f"test ({split})" if split and split != "test" else "test"


def build_headline(
    metrics: Mapping[str, Any], data: Mapping[str, Any] | None, *, openings: int, expected: Any
) -> dict[str, Any] | None:
    """Return the scores of the judged part with what a reader must know beside the number.

    Args:
        metrics: metrics.json.
        data: data.json, if there is one.
        openings: how often the test part was opened.
        expected: the range of the test accuracy that the experiment names, or None.

    Returns:
        The part's scores with "accuracy" of the views that are the headline, "title" of that, "what" the part
        is, "facts" as (name, value), and "largest_class", its share. None where nothing was judged.
    """
    part = get_judged_part(metrics)
    if part is None:
        return None
    scores, facts = metrics[part], [("protocol", metrics["protocol"]), ("selected on", metrics["selected_on"])]
    shown = _choose_view(metrics, part)
    without = find_without(metrics)
    if without:
        of_single = "" if shown is scores else ", of single images"
        facts.append(("without duplicates", f"{format_without(without)}{of_single}"))
    if part == "test":
        openings = metrics.get("test_opened") or openings
        if openings:
            facts.append(("test opened", "once" if openings == 1 else f"{openings} times"))
    else:
        facts.append(("test", "none: the run was not judged on a test part"))
    facts.append(("macro F1", f"{format_percent(shown['macro_f1']['value'])} over {len(scores['labels'])} classes"))
    if shown is not scores:
        facts.append(("of single images", f"{format_percent(scores['accuracy']['value'])}; so are all figures below"))
    if expected and part == "test":
        low, high = (float(value) for value in expected)
        verdict = "within" if low <= shown["accuracy"]["value"] <= high else "outside"
        facts.append(("expected", f"{format_percent(low)} to {format_percent(high)}: {verdict}"))
    largest = max(figures["n"] for figures in scores["per_class"].values()) / scores["n"]
    what = name_part(metrics, data)
    averaged = f", averaged over {VIEWS.get(metrics['headline'], metrics['headline'])}" if shown is not scores else ""
    return {
        **scores,
        "accuracy": shown["accuracy"],
        "title": what + averaged,
        "what": what,
        "facts": facts,
        "largest_class": largest,
    }


def build_metrics_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of merit, a row each, with a column for each part; the judged one comes first.

    A figure that no part has, as in runs of an earlier version, is left out.

    Returns:
        {"parts": [{"name", "n"}], "rows": [{"name", "remark", "scale", "cells": [figure or None]}]}.
    """
    names = {
        "test": "test",
        "test_without_duplicates": "test without duplicates",
        "validation": f"validation ({metrics['selected_on']})",
        "validation_without_duplicates": "validation without duplicates",
        "train": "train",
    }
    parts = [part for part in PARTS if metrics.get(part)]
    rows = []
    for metric in METRICS:
        cells = [metric.get(metrics[part]) for part in parts]
        if any(cell and not is_missing(cell["value"]) for cell in cells):
            rows.append({"name": metric.name, "remark": metric.remark, "scale": metric.scale, "cells": cells})
    return {"parts": [{"name": names[part], "n": metrics[part]["n"]} for part in parts], "rows": rows}


def describe_parts(metrics: Mapping[str, Any]) -> list[str]:
    """Return the remarks below the table: duplicates, what validation was used for, and what is no accuracy."""
    lines, duplicates, part = [], describe_duplicates(metrics), get_judged_part(metrics)
    if duplicates:
        lines.append(duplicates)
    if metrics.get("validation"):
        lines.append("Validation was used to select the model, so that its figures are on the high side.")
    if part is None:
        return lines
    num_labels = len(metrics[part]["labels"])
    if metrics[part].get("one_vs_rest_accuracy"):
        lines.append(
            "One-vs-rest accuracy is the mean over the classes of (TP + TN) / N, where every image of another class "
            f"that was not given this label counts as a hit. It is not accuracy: with {num_labels} classes an accuracy "
            f"of 70 % is {format_percent(1 - 2 * 0.3 / num_labels)} when counted so."
        )
    rate = metrics[part].get("emotion_detection_rate")
    if rate:
        lines.append(
            f"Emotion detection rate: of {rate['num_classes']} classes, {rate['num_detected']} are predicted as "
            "themselves more often than as any other."
        )
    return lines


def _choose_view(metrics: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return the scores that the headline is taken from: the part's own unless views were asked to be it."""
    views = (metrics.get("views") or {}).get(metrics.get("headline") or "single") or {}
    return views.get(part) or metrics[part]
