"""Metrics, comparisons and tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlfer.report.duplicates import describe_duplicates
from dlfer.runs.comparison_record import ModelComparison
from dlfer.runs.metrics_record import Estimate


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned columns with a heading; the last column is as long as it needs."""
    if not rows:
        return ""
    heads = list(rows[0])
    table = [heads, *([_format_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def format_values(values: Mapping[str, Any], indent: str = "") -> str:
    """Return nested values as lines "key: value"."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", format_values(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_format_cell(value)}")
    return "\n".join(line for line in lines if line)


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the figures of a metrics file in words: the banner, each part with n and intervals, the classes."""
    lines = [str(metrics["banner"])] if metrics.get("banner") else []
    for part in ("test", "test_without_duplicates", "validation", "validation_without_duplicates"):
        scores = metrics.get(part)
        if not scores:
            continue
        figures = [
            f"{name.replace('_', ' ')} {format_figure(scores[name])}"
            for name in ("accuracy", "macro_f1")
            if scores.get(name)
        ]
        lines.append(f"{_name_part(part, metrics)} (n = {scores['n']:,}): {', '.join(figures)}")
        names = ("precision", "recall", "f1", "specificity")
        rows = [
            {"label": label, "n": scores_of["n"], **{name: _get_class_figure(scores_of, name) for name in names}}
            for label, scores_of in scores.get("per_class", {}).items()
        ]
        lines.append(format_rows(rows))
        lines += [
            f"[–] {label}, {name.replace('_', ' ')}: no 95 % interval, because {reason}"
            for label, scores_of in scores.get("per_class", {}).items()
            for name, reason in (scores_of.get("reasons") or {}).items()
            if name in names
        ]
    duplicates = describe_duplicates(metrics, name=(metrics.get("judged_on") or {}).get("split"))
    lines += [duplicates] if duplicates else []
    if metrics.get("test_opened") and metrics.get("test"):
        lines.append(f"test parts opened with this model so far: {metrics['test_opened']}")
    lines += _format_views(metrics)
    if metrics.get("groups"):
        lines += _format_groups(metrics["groups"])
    if metrics.get("corruptions"):
        lines.append(format_corruptions(metrics["corruptions"]))
    return "\n".join(line for line in lines if line)


def _name_part(part: str, metrics: Mapping[str, Any]) -> str:
    """Return what a part is called: a test only if its images neither selected nor trained the model."""
    judged_on = metrics.get("judged_on") or {}
    use = judged_on.get("used_for")
    if part.startswith("validation") or use is None:
        return part.replace("_", " ")
    kind = {"selection": "validation figure", "training": "training figure"}[use]
    without = " without duplicates" if part == "test_without_duplicates" else ""
    return f"{kind} ({judged_on['split']}, used for {use}){without}"


def format_corruptions(corruptions: Mapping[str, Any]) -> str:
    """Return a result of `evaluate_corruptions` as a table: a row for each corruption, a column for each strength."""
    clean = format_figure(corruptions["clean"])
    lines = [f"corrupted images (n = {corruptions['n']:,}): accuracy in percent; clean: {clean}"]
    rows = []
    for name, levels in corruptions["corruptions"].items():
        cells = {f"strength {level['strength']}": _format_percent(level["accuracy"]) for level in levels}
        rows.append({"corruption": name.replace("_", " "), **cells})
    lines.append(format_rows(rows))
    for name, levels in corruptions["corruptions"].items():
        worst = levels[-1]["difference"]
        points = [f"{100 * worst[key]:.1f}" for key in ("value", "low", "high")]
        lines.append(
            f"{name.replace('_', ' ')} at strength {levels[-1]['strength']}: {points[0]} points against the clean "
            f"images, 95 % {points[1]} to {points[2]}"
        )
    return "\n".join(lines)


def _format_percent(figure: Mapping[str, float]) -> str:
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _format_views(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line for each part and view, with the paired difference to the single view."""
    lines = []
    for view, parts in (metrics.get("views") or {}).items():
        for part, scores in parts.items():
            mark = ", the headline" if metrics.get("headline") == view else ""
            figures = ", ".join(
                f"{name.replace('_', ' ')} {format_figure(scores[name])}" for name in ("accuracy", "macro_f1")
            )
            lines.append(
                f"{_name_part(part, metrics)} by {view.replace('_', ' ')}{mark} (n = {scores['n']:,}): {figures}"
            )
            lines.append(scores["paired"]["sentence"])
    return lines


def _format_groups(groups: Mapping[str, Any]) -> list[str]:
    """Return a table of each attribute, and how far its groups lie apart."""
    lines = []
    for attribute, found in groups["attributes"].items():
        rows = [
            {
                attribute: value,
                "n": group["n"],
                "accuracy": group["accuracy"],
                "note": "fewer than 20" if group["small"] else "",
            }
            for value, group in found["groups"].items()
        ]
        lines += [f"groups by {attribute} ({found['num_missing']:,} images without)", format_rows(rows)]
        gap = found["gaps"]["accuracy"]
        lines.append(f"largest gap in accuracy: {format_figure(gap) if gap else 'not defined'}")
        recalls = {label: value for label, value in found["gaps"]["recall"].items() if value is not None}
        if recalls:
            widest = max(recalls, key=lambda label: recalls[label]["value"])
            lines.append(f"largest gap in recall: {format_figure(recalls[widest])}, of {widest}")
    return lines


def format_comparison(comparison: ModelComparison) -> str:
    """Return a result of `compare_runs` in words: the runs, the systems, the tests, one sentence for each pair."""
    rows = [{"run": run.name, "n": run.n, "accuracy": run.accuracy} for run in comparison.runs]
    lines = [f"{comparison.part}, {comparison.n_common:,} images that all have", format_rows(rows)]
    for system in comparison.systems:
        seeds = ", ".join(str(seed) for seed in system.seeds)
        mean, sd = 100 * system.mean, 100 * system.sd
        lines.append(f"{system.name}, seeds {seeds}: mean {mean:.2f} %, standard deviation {sd:.2f} percentage points")
    test = comparison.cochran_q
    if test is not None:
        lines.append(f"Cochran's Q: {test.statistic:.2f} with {test.df} degrees of freedom, p = {test.p:.2g}")
    lines += [pair.sentence for pair in (*comparison.pairs, *comparison.system_pairs)]
    return "\n".join([*lines, *comparison.notes])


def _get_class_figure(scores: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one figure of a class with its interval."""
    low, high = (scores.get("intervals") or {}).get(name) or (None, None)
    return {"value": scores.get(name), "low": low, "high": high, "reason": (scores.get("reasons") or {}).get(name)}


def format_figure(figure: Mapping[str, Any]) -> str:
    """Return a figure in percent with its 95 % interval; "not defined" where there is no value, [–] for no interval."""
    if figure.get("value") is None:
        return "not defined"
    text = f"{100 * figure['value']:.2f} %"
    if figure.get("low") is None or figure.get("high") is None:
        return f"{text} [–]" if figure.get("reason") else text
    return f"{text} [{100 * figure['low']:.2f}, {100 * figure['high']:.2f}]"


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return format_figure(value.as_json())
    if isinstance(value, Mapping) and "value" in value:
        return format_figure(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return " ".join(str(value).split())
