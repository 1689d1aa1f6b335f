"""How far a model can be trusted: calibration, abstaining, views, groups, corrupted images; from metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlfer.report.headline import VIEWS, get_judged_part
from dlfer.report.page import format_count, format_percent, format_uncertainty

_CALIBRATION = {
    "ece_equal_mass": ("ECE, 15 bins of equally many images", "percent"),
    "ece_equal_width": ("ECE, 15 bins of equal width", "percent"),
    "classwise_ece": ("classwise ECE", "percent"),
    "brier": ("Brier score", "fraction"),
    "log_loss": ("log-loss", "fraction"),
}


def describe_calibration(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the calibration errors before and after the temperature, and remarks; None where there are none."""
    part = get_judged_part(metrics)
    calibration = metrics[part].get("calibration") if part else None
    if not calibration:
        return None
    rows = [
        {
            "name": name,
            "scale": scale,
            "raw": calibration["raw"].get(key),
            "scaled": (calibration.get("scaled") or {}).get(key),
        }
        for key, (name, scale) in _CALIBRATION.items()
    ]
    notes = []
    floor = calibration["raw"].get("ece_if_calibrated")
    if floor is not None:
        notes.append(
            f"ECE cannot be negative, so that even a perfectly calibrated model would show about {format_percent(floor)} "
            f"on {format_count(metrics[part]['n'])} images."
        )
    return {
        "rows": rows,
        "has_scaled": calibration.get("scaled") is not None,
        "notes": notes + _tell_temperature(metrics),
    }


def _tell_temperature(metrics: Mapping[str, Any]) -> list[str]:
    temperature = metrics.get("temperature")
    if not temperature:
        return ["No temperature was fitted: there were no predictions on validation to fit it on."]
    value = temperature["value"]
    verdict = "overconfident" if value > 1 else "underconfident" if value < 1 else "neither over- nor underconfident"
    where = f"{temperature['fitted_on']}, n = {format_count(temperature['n'])}"
    lines = [f"The temperature {value:.3f} was fitted on validation ({where}); the model is {verdict} there."]
    if temperature.get("note"):
        lines.append(f"It is not to be relied on: {temperature['note']}.")
    if get_judged_part(metrics) == "validation":
        lines.append("It is judged on the same images here, so that the figures after it are on the low side.")
    return lines


def describe_abstention(metrics: Mapping[str, Any]) -> list[str]:
    """Return what the abstain threshold gives, in sentences; empty where nothing is known about it."""
    part = get_judged_part(metrics)
    selective = metrics[part].get("selective") if part else None
    if not selective:
        return []
    lines, abstain, at = [], metrics.get("abstain"), selective.get("at_threshold")
    if not abstain or not at:
        lines.append("No threshold was chosen: on validation no part of the images reaches the accuracy asked for.")
    elif not at["n"]:
        lines.append(f"No image here has a confidence of {abstain['threshold']:.2f} or more.")
    else:
        lines.append(
            f"Where the model answers only if its confidence is at least {abstain['threshold']:.3f}, it answers "
            f"{format_percent(at['coverage']['value'])} of the images ({format_count(at['n'])}), and "
            f"{format_percent(at['accuracy']['value'])} of these answers are right "
            f"({format_uncertainty(at['accuracy'])})."
        )
        same = (
            " They are the images judged here, so that the figure is on the high side." if part == "validation" else ""
        )
        lines.append(
            f"The threshold is the lowest one with which {format_percent(abstain['target_accuracy'], 0)} are right on "
            f"validation ({abstain['chosen_on']}, n = {format_count(abstain['n'])}).{same}"
        )
    if selective.get("aurc") is not None:
        area = selective["aurc"]
        lines.append(
            f"Area under the risk-coverage curve: {area['value']:.3f} ({format_uncertainty(area, 'fraction')}; "
            "less is better)."
        )
    return lines


def list_views(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each view and part that was judged by test-time augmentation, the single view before them."""
    views, rows = metrics.get("views") or {}, []
    for part in ("test", "validation"):
        judged = {view: parts[part] for view, parts in views.items() if parts.get(part)}
        if not judged or not metrics.get(part):
            continue
        rows.append(
            {"part": part, "view": VIEWS["single"], "scores": metrics[part], "is_headline": False, "sentence": ""}
        )
        for view, scores in judged.items():
            rows.append(
                {
                    "part": part,
                    "view": VIEWS.get(view, view),
                    "scores": scores,
                    "is_headline": view == metrics.get("headline") and part == get_judged_part(metrics),
                    "sentence": (scores.get("paired") or {}).get("sentence", ""),
                }
            )
    return rows


def describe_groups(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a table for each attribute: its groups with accuracy and recall by class, and the largest gaps."""
    found = metrics.get("groups")
    if not found:
        return []
    tables = []
    for name, attribute in found["attributes"].items():
        groups, gaps = attribute["groups"], attribute["gaps"]
        labels = list(next(iter(groups.values()))["recall"]) if groups else []
        notes = []
        if gaps["accuracy"]:
            notes.append(
                f"Largest gap in accuracy between two groups: {100 * gaps['accuracy']['value']:.1f} points "
                f"({format_uncertainty(gaps['accuracy'])})."
            )
        recalls = {label: gap for label, gap in gaps["recall"].items() if gap is not None}
        if recalls:
            widest = max(recalls, key=lambda label: recalls[label]["value"])
            notes.append(
                f"Largest gap in recall: {100 * recalls[widest]['value']:.1f} points "
                f"({format_uncertainty(recalls[widest])}), of {widest}."
            )
        if any(group.get("small") for group in groups.values()):
            notes.append("Groups marked by an asterisk have so few images that they take no part in a gap.")
        if attribute.get("num_missing"):
            notes.append(f"{format_count(attribute['num_missing'])} images have no value of it.")
        tables.append({"name": name, "groups": groups, "labels": labels[:12], "notes": notes})
    return tables


def tell_missing_groups(source: str | None) -> str:
    """Return the sentence that stands where no attributes were given."""
    if source == "fer2013":
        return (
            "No attributes such as age, sex or skin tone exist for FER2013, so no claim per group of people is made. "
            "Whether the model is as good for everyone is not known."
        )
    return (
        "No attributes such as age, sex or skin tone were given, so no claim per group of people is made. A csv of "
        "them goes with evaluate.attributes."
    )


def describe_corruptions(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the accuracy on corrupted images, a row for each corruption; None where it was not asked for."""
    found = metrics.get("corruptions")
    if not found:
        return None
    strengths = sorted({level["strength"] for levels in found["corruptions"].values() for level in levels})
    rows = [
        {
            "name": name.replace("_", " "),
            "meaning": (found.get("meanings") or {}).get(name, ""),
            "cells": [next((level for level in levels if level["strength"] == s), None) for s in strengths],
        }
        for name, levels in found["corruptions"].items()
    ]
    return {"clean": found["clean"], "n": found["n"], "strengths": strengths, "rows": rows}
