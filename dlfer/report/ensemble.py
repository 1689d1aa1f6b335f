"""What a report says of milestones and of an ensemble's members: tables, and a confusion matrix for each milestone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.report.figures import INK, SOFT, figure_style, new_figure
from dlfer.report.headline import VIEWS
from dlfer.report.page import format_count, format_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMBINATIONS = {
    "average": "average of the probabilities",
    "vote": "vote",
    "trained": "trained on validation",
}
_MOST_LABELS = 12
_COLUMNS = 3


def describe_members(section: Mapping[str, Any]) -> str:
    """Return in words what the section `ensemble` of an experiment asks for."""
    members = []
    for member in section["members"]:
        keys = ", ".join(f"{key}: {value}" for key, value in (member.get("set") or {}).items())
        members.append(f"{member['name']} ({keys or member.get('model')})")
    return f"{'; '.join(members)}; combined by {COMBINATIONS.get(section['combine'], section['combine'])}"


def describe_milestones(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was reached at some epochs: a row for each with accuracy and recalls; None where none was kept.

    Returns:
        {"part", "labels", "rows": [{"epoch", "scores"}], "notes"}.
    """
    rows, part = _choose_rows(metrics)
    if not rows:
        return None
    labels = rows[0]["scores"]["labels"]
    view = VIEWS.get(metrics.get("headline") or "single", metrics.get("headline"))
    notes = [
        f"The model as it was at the end of each of these epochs, judged on {part} (n = "
        f"{format_count(rows[0]['scores']['n'])}) by {view}. None of them was selected for these figures: the "
        "model that the run ends with is chosen on validation, by itself.",
        "Emotion detection rate: the share of the classes that are predicted as themselves more often than as any other.",
    ]
    return {"part": part, "labels": labels if len(labels) <= _MOST_LABELS else [], "rows": rows, "notes": notes}


def describe_ensemble(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of an ensemble: members and combinations, with a column for each milestone and the end.

    Returns:
        {"part", "columns": names, "rows": [{"name", "remark", "is_used", "cells": [figure or None]}], "notes"}; None
        where there is no ensemble.
    """
    ensemble = metrics.get("ensemble")
    if not ensemble:
        return None
    part = "test" if metrics["members"][0].get("test") else "validation"
    stages = [*ensemble["milestones"], metrics]
    columns = [f"epoch {stage['epoch']}" for stage in ensemble["milestones"]] + ["as kept"]
    rows = []
    for kind in ("members", "combinations"):
        for number, row in enumerate(metrics[kind]):
            cells = [stage[kind][number][part] for stage in stages]
            is_member = kind == "members"
            remark = row.get("note", "") if is_member else ("this run's model" if row["is_used"] else "")
            name = row["name"] if is_member else f"ensemble: {COMBINATIONS.get(row['name'], row['name'])}"
            rows.append(
                {
                    "name": name,
                    "remark": remark,
                    "is_used": row.get("is_used", False),
                    "cells": [cell["accuracy"] for cell in cells],
                }
            )
    n = metrics["members"][0][part]["n"]
    view = VIEWS.get(ensemble["view"], ensemble["view"])
    notes = [
        f"Accuracy on {part}, n = {format_count(n)}, by {view}. “As kept” is each member's best epoch on validation."
    ]
    pair = ensemble["paired"]
    notes.append(f"Against the member that is best on validation, on the same images: {pair['sentence']}")
    notes.append(
        "The trained combination is a logistic regression on the logarithms of the members' probabilities, fitted on "
        "validation alone; its figure on validation is out of fold: each fifth is answered by a fit on the others."
    )
    return {"part": part, "columns": columns, "rows": rows, "notes": notes}


def draw_milestones(metrics: Mapping[str, Any]) -> Figure | None:
    """Draw the confusion matrix of each milestone, side by side; None where there is none."""
    rows, _ = _choose_rows(metrics)
    if not rows:
        return None
    labels = rows[0]["scores"]["labels"]
    lines = -(-len(rows) // _COLUMNS)
    columns = min(len(rows), _COLUMNS)
    has_text = len(labels) <= _MOST_LABELS
    with figure_style():
        figure = new_figure(1.0 + 3.6 * columns, 0.4 + 3.7 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(rows) :]:
            axes.axis("off")
        for number, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
            confusion = np.array(row["scores"]["confusion"])
            totals = confusion.sum(axis=1, keepdims=True)
            shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
            axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_title(f"epoch {row['epoch']}: {format_percent(row['scores']['accuracy']['value'])}", color=INK)
            is_left = number % _COLUMNS == 0
            axes.set_yticks(range(len(labels)), labels if is_left and has_text else [], fontsize=8)
            axes.set_xticks(range(len(labels)), labels if has_text else [], fontsize=8, rotation=40, ha="right")
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
            for i, j in np.ndindex(*confusion.shape) if has_text else ():
                colour = "white" if shares[i, j] > 0.55 else INK
                axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
        figure.supxlabel("predicted; numbers are percent of the target's images", fontsize=8, color=SOFT)
    return figure


def describe_milestone_figure(metrics: Mapping[str, Any]) -> str:
    """Return what `draw_milestones` shows, for readers who do not see it."""
    rows, part = _choose_rows(metrics)
    texts = [f"epoch {row['epoch']} {format_percent(row['scores']['accuracy']['value'])}" for row in rows]
    return f"Confusion matrices on {part} after {', '.join(texts)} accuracy."


def list_milestone_cells(row: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Yield the recall of each class of a row with its interval."""
    for figures in row["scores"]["per_class"].values():
        low, high = figures["intervals"]["recall"]
        yield {"value": figures["recall"], "low": low, "high": high}


def _choose_rows(metrics: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the milestones with the scores of the judged part, and that part."""
    found = metrics.get("milestones") or []
    part = "test" if found and found[0].get("test") else "validation"
    rows = []
    for row in found:
        if row.get(part):
            kept = {"epoch": row["epoch"], "scores": row[part]}
            rows.append({**kept, "recalls": list(list_milestone_cells(kept))})
    return rows, part
