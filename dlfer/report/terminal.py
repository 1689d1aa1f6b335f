"""Metrics, comparisons and tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlfer.report.headline import describe_duplicates, describe_not_judged, name_other_split
from dlfer.runs.comparison_record import ModelComparison
from dlfer.runs.metrics_record import Corruptions, Estimate, Groups, Metrics, SplitMetrics

_CLASS_METRICS = ("precision", "recall", "f1", "specificity")


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table with a header and left-aligned columns; cells are not truncated."""
    if not rows:
        return ""
    heads = list(rows[0])
    table = [heads, *([_format_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def format_values(values: Mapping[str, Any], indent: str = "") -> str:
    """Return nested values as lines "key: value", indented by level."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", format_values(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_format_cell(value)}")
    return "\n".join(line for line in lines if line)


def format_metrics(metrics: Metrics) -> str:
    """Return metrics as text: the banner, then each split with its n, its metrics with intervals, and its classes."""
    lines = [metrics.banner, *(metrics.foreign.describe() if metrics.foreign is not None else ())]
    for name in ("test", "test_without_duplicates", "validation", "validation_without_duplicates"):
        split = metrics.get(name)
        if split is not None:
            lines += _format_split(name, split, metrics)
    lines.append(describe_duplicates(metrics))
    if metrics.test_opened and metrics.test is not None:
        lines.append(f"openings of the test split with this model so far: {metrics.test_opened}")
    lines += _format_views(metrics)
    if metrics.groups is not None:
        lines += _format_groups(metrics.groups)
    if metrics.corruptions is not None:
        lines.append(format_corruptions(metrics.corruptions))
    return "\n".join(line for line in lines if line)


def _format_split(name: str, split: SplitMetrics, metrics: Metrics) -> list[str]:
    """Return a split's accuracy and macro F1, the table of its classes, and why intervals are missing."""
    rows = [
        {"label": label, "n": row.n, **{metric: row.get(metric) for metric in _CLASS_METRICS}}
        for label, row in split.per_class.items()
    ]
    missing = [
        f"[–] {label}, {metric.replace('_', ' ')}: no 95 % interval, because {reason}"
        for label, row in split.per_class.items()
        for metric, reason in row.reasons.items()
        if metric in _CLASS_METRICS
    ]
    summary = _format_summary(split.accuracy, split.macro_f1)
    absent = describe_not_judged(split)
    return [
        f"{_name_split(name, metrics)} (n = {split.n:,}): {summary}",
        format_rows(rows),
        *([absent] if absent else []),
        *missing,
    ]


def _format_summary(accuracy: Estimate, macro_f1: Estimate | None) -> str:
    text = f"accuracy {format_estimate(accuracy)}"
    return text if macro_f1 is None else f"{text}, macro F1 {format_estimate(macro_f1)}"


def _name_split(name: str, metrics: Metrics) -> str:
    """Return the display name of a split; it is "test" only if its images neither selected nor trained the model."""
    judged_on = metrics.judged_on
    if name.startswith("validation") or judged_on is None or judged_on.used_for is None:
        return name.replace("_", " ")
    return name_other_split(judged_on) + (" without duplicates" if name == "test_without_duplicates" else "")


def format_corruptions(found: Corruptions) -> str:
    """Return a result of `evaluate_corruptions` as a table with a row per corruption and a column per strength."""
    lines = [f"corrupted images (n = {found.n:,}): accuracy in percent; clean: {format_estimate(found.clean)}"]
    rows = []
    for name, levels in found.corruptions.items():
        by_strength = {level.strength: _format_percent(level.accuracy) for level in levels}
        cells = {f"strength {strength}": by_strength.get(strength) for strength in found.strengths}
        rows.append({"corruption": name.replace("_", " "), **cells})
    lines.append(format_rows(rows))
    for name, levels in found.corruptions.items():
        worst = levels[-1]
        if worst.difference is not None:
            value, low, high = (f"{100 * end:.1f}" for end in _list_ends(worst.difference))
            lines.append(
                f"{name.replace('_', ' ')} at strength {worst.strength}: {value} percentage points against the clean "
                f"images, 95 % {low} to {high}"
            )
    return "\n".join(lines)


def _list_ends(estimate: Estimate) -> tuple[float | None, ...]:
    return estimate.value, estimate.low, estimate.high


def _format_percent(estimate: Estimate) -> str:
    value, low, high = (f"{100 * end:.1f}" for end in _list_ends(estimate))
    return f"{value} [{low}, {high}]"


def _format_views(metrics: Metrics) -> list[str]:
    """Return two lines for each view and split: its metrics, and its paired difference from single images."""
    lines = []
    for view, splits in metrics.views.items():
        mark = ", the headline" if metrics.headline == view else ""
        for name, found in splits.items():
            summary = _format_summary(found.accuracy, found.macro_f1)
            title = f"{_name_split(name, metrics)} by {view.replace('_', ' ')}{mark}"
            lines += [f"{title} (n = {found.n:,}): {summary}", found.paired.sentence]
    return lines


def _format_groups(groups: Groups) -> list[str]:
    """Return, for each attribute, a table of its groups and their largest gaps in accuracy and recall."""
    lines = []
    for name, attribute in groups.attributes.items():
        rows = [
            {name: value, "n": group.n, "accuracy": group.accuracy, "note": "fewer than 20" if group.small else ""}
            for value, group in attribute.groups.items()
        ]
        lines += [f"groups by {name} ({attribute.num_missing:,} images without)", format_rows(rows)]
        gap = attribute.gaps.accuracy
        lines.append(f"largest gap in accuracy: {'not defined' if gap is None else format_estimate(gap)}")
        recalls = {label: found for label, found in attribute.gaps.recall.items() if found is not None}
        if recalls:
            widest = max(recalls, key=lambda label: recalls[label].value)
            lines.append(f"largest gap in recall: {format_estimate(recalls[widest])}, of {widest}")
    return lines


def format_comparison(comparison: ModelComparison) -> str:
    """Return a result of `compare_runs` as text: the runs, the systems, Cochran's Q, and a sentence for each pair."""
    rows = []
    for run in comparison.runs:
        own = {"own images": run.num_images or run.n} if comparison.has_left_out else {}
        rows.append({"run": run.name, "n": run.n, **own, "accuracy": run.accuracy})
    lines = [f"{comparison.part}, {comparison.n_common:,} common images", format_rows(rows)]
    for system in comparison.systems:
        seeds = ", ".join(str(seed) for seed in system.seeds)
        mean, sd = 100 * system.mean, 100 * system.sd
        lines.append(f"{system.name}, seeds {seeds}: mean {mean:.2f} %, standard deviation {sd:.2f} percentage points")
    test = comparison.cochran_q
    if test is not None:
        lines.append(f"Cochran's Q: {test.statistic:.2f} with {test.df} degrees of freedom, p = {test.p:.2g}")
    lines += [pair.sentence for pair in (*comparison.pairs, *comparison.system_pairs)]
    return "\n".join([*lines, *comparison.notes])


def format_estimate(estimate: Estimate) -> str:
    """Return a percentage with its 95 % interval; "not defined" without a value, [–] if only a reason is recorded."""
    if estimate.value is None:
        return "not defined"
    text = f"{100 * estimate.value:.2f} %"
    if estimate.low is None or estimate.high is None:
        return f"{text} [–]" if estimate.reason else text
    return f"{text} [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return format_estimate(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return " ".join(str(value).split())
