"""Tables and figures of `sweep.best_of`: the best cell for each combination of the values of some axes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.report.curves import MacroRoc, compute_class_rocs, draw_class_rocs, frame_roc
from dlfer.report.figures import COLOURS, HATCHES, INK, LINES, SOFT, figure_style, new_figure, write_figure
from dlfer.report.keys import format_value, shorten_key
from dlfer.report.page import format_count, format_interval, format_percent, is_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

BEST_FIGURES = ("best_scores", "best_macro_roc", "best_roc")
MOST_ROWS = 16
"""Of more rows than this the figures show the first; the tables have all."""
_SCORES = {
    "accuracy": "accuracy",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "macro_f1": "macro F1",
}
_MOST_PANELS = 4
"""So many groups have a panel of bars each; more stand in one."""
_COLUMNS = 3

Groups = list[tuple[str | None, list[tuple[str, Mapping[str, Any]]]]]
"""(heading, [(title of the row, row)]) of each table."""


def group_best_rows(best: Mapping[str, Any]) -> Groups:
    """Return the rows with their titles; of two axes each value of the last has a table, with a heading, of its own."""
    axes, groups = best["axes"], {}
    divided = len(axes) == 2
    for row in best["table"]:
        heading = f"{axes[1]}: {row['values'][axes[1]] or '–'}" if divided else None
        groups.setdefault(heading, []).append((_title(row, axes[:1] if divided else axes), row))
    return list(groups.items())


def describe_best_cells(best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the page shows: {"notes", "scores", "tables": [{"title", "rows": [{"title", "cells", ...}]}]}."""
    if best is None:
        return None
    tables = [
        {
            "title": f"{heading + ', ' if heading else ''}on {best['judged_on']}",
            "rows": [
                {**row, "title": title, "cells": _count_cells(row), "training": _describe_training(row)}
                for title, row in rows
            ],
        }
        for heading, rows in group_best_rows(best)
    ]
    notes = [*best["notes"]]
    if len(best["table"]) > MOST_ROWS:
        notes.append(f"The figures show the first {MOST_ROWS} of {len(best['table'])} rows.")
    return {"notes": notes, "scores": _SCORES, "tables": tables}


def format_best_tables(best: Mapping[str, Any] | None) -> list[Table]:
    """Return the tables for the terminal; none where nothing was asked for."""
    from rich.table import Table

    tables = []
    for heading, rows in group_best_rows(best) if best else []:
        title = f"Best cells{', ' + heading if heading else ''}; chosen on validation, judged on {best['judged_on']}"
        table = Table(title=title, show_lines=True)
        table.add_column("", overflow="fold")
        table.add_column("training", no_wrap=True)
        for words in _SCORES.values():
            table.add_column(words, justify="right", overflow="fold")
        for title, row in rows:
            seeds = f"\n{len(row['seeds'])} seeds" if len(row["seeds"]) > 1 else ""
            scores = [f"{format_percent(row[name]['value'])}\n{format_interval(row[name])}" for name in _SCORES]
            scores[0] += f"\nn = {format_count(row['accuracy']['n'])}"
            table.add_row(f"{title}\n{_count_cells(row)}{seeds}", _write_training(row), *scores)
        tables.append(table)
    return tables


def write_best_figures(
    folder: Path, best: Mapping[str, Any] | None, members: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Draw scores and ROC curves of the first rows; return the paths.

    Args:
        folder: for the figures.
        best: "best_of" of comparison.json.
        members: of the sweep, as `read_members` gives them. The ROC curves are of each cell's first seed; a
            cell whose folder is gone has none.
    """
    if best is None or not best["table"]:
        return []
    groups = _take_first(group_best_rows(best))
    shown = [(_title(row, best["axes"]), row) for _, rows in groups for _, row in rows]
    which = f" (the first {len(shown)} of {len(best['table'])} rows)" if len(shown) < len(best["table"]) else ""
    texts = [
        f"{title}: " + ", ".join(f"{words} {format_percent(row[name]['value'])}" for name, words in _SCORES.items())
        for title, row in shown
    ]
    written = [
        write_figure(
            draw_best_scores(groups if len(groups) <= _MOST_PANELS else [(None, shown)]),
            folder / "best_scores.png",
            title=f"The best cells{which} on {best['judged_on']}, with 95 % intervals",
            description=f"On {best['judged_on']}. {'; '.join(texts)}.",
        )
    ]
    found = [(title, _read_first_seed(row, members, best["part"])) for title, row in shown]
    panels = [(title, predictions) for title, predictions in found if predictions is not None]
    return written + _write_rocs(folder, panels, best["part"], num_gone=len(found) - len(panels))


def _write_rocs(folder: Path, panels: Sequence[tuple[str, Predictions]], part: str, *, num_gone: int) -> list[Path]:
    curves = [(title, compute_class_rocs(predictions)[1]) for title, predictions in panels]
    macros = [(title, macro) for title, macro in curves if macro is not None]
    if not macros:
        return []
    gone = f"; {num_gone} cells without predictions are left out" if num_gone else ""
    texts = [f"{title} {macro.area:.3f}" for title, macro in macros]
    return [
        write_figure(
            draw_macro_rocs(macros),
            folder / "best_macro_roc.png",
            title=f"ROC on {part}: the mean over classes, of each best cell's first seed{gone}",
            description=f"Mean area under the ROC curves on {part}: {'; '.join(texts)}.",
        ),
        write_figure(
            draw_best_rocs(panels),
            folder / "best_roc.png",
            title=f"ROC on {part}: each class against the rest, and their mean (grey), of each best cell's first seed{gone}",
            description=f"ROC curves of each class, by cell. Mean area: {'; '.join(texts)}.",
        ),
    ]


def draw_best_scores(groups: Groups) -> Figure:
    """Draw accuracy, macro precision, macro recall and macro F1 of each row as bars with intervals, a panel a group."""
    width = 0.8 / len(_SCORES)
    most = max(len(rows) for _, rows in groups)
    room = 100 // most
    with figure_style():
        figure = new_figure(9, 0.5 + 3.1 * len(groups))
        for axes, (heading, rows) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
            for number, (name, words) in enumerate(_SCORES.items()):
                cells = [
                    (place, row[name]) for place, (_, row) in enumerate(rows) if not is_missing(row[name]["value"])
                ]
                places = [place + (number - (len(_SCORES) - 1) / 2) * width for place, _ in cells]
                values = [100 * cell["value"] for _, cell in cells]
                look = {"color": COLOURS[number], "hatch": HATCHES[number]}
                axes.bar(places, values, width * 0.92, edgecolor="white", linewidth=0, label=words, **look)
                errors = np.array([_get_errors(cell) for _, cell in cells]).reshape(-1, 2).T
                axes.errorbar(places, values, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            axes.set_title(heading or "")
            axes.set_xticks(range(len(rows)), [_wrap(title, room) for title, _ in rows])
            axes.set_xlim(-0.5, max(most, 2) - 0.5)
            axes.grid(visible=False, axis="x")
            axes.tick_params(axis="x", length=0, labelsize=8 if most > 3 else 10)
            axes.set_ylim(0, 100)
            axes.set_ylabel("%")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(_SCORES))
    return figure


def draw_best_rocs(panels: Sequence[tuple[str, Predictions]]) -> Figure:
    """Draw a panel for each cell: the ROC curve of each class against the rest, and their mean in grey."""
    num_rows = -(-len(panels) // _COLUMNS)
    with figure_style():
        figure = new_figure(9.6, 0.2 + 3.35 * num_rows)
        grid = figure.subplots(num_rows, _COLUMNS, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (title, predictions) in zip(grid, panels, strict=False):
            curves, macro = compute_class_rocs(predictions)
            frame_roc(axes)
            if macro is not None:
                label = f"mean, {macro.area:.3f}"
                axes.plot(macro.fpr, macro.tpr, color=SOFT, linewidth=2.4, alpha=0.6, label=label)
            draw_class_rocs(axes, curves, predictions.labels, width=0.9)
            axes.set_title(_wrap(title, 34), fontsize=9)
            axes.set_xlabel(axes.get_xlabel(), fontsize=8)
            axes.set_ylabel(axes.get_ylabel(), fontsize=8)
            axes.tick_params(labelsize=7)
            if macro is not None:
                axes.legend(loc="lower right", fontsize=6, handlelength=2.6, labelspacing=0.25)
    return figure


def draw_macro_rocs(curves: Sequence[tuple[str, MacroRoc]]) -> Figure:
    """Draw the mean ROC curves of all cells into one panel, with their areas."""
    with figure_style():
        figure = new_figure(8.4, max(4.6, 1 + 0.26 * len(curves)))
        axes = figure.subplots()
        frame_roc(axes)
        for number, (title, macro) in enumerate(curves):
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
            axes.plot(macro.fpr, macro.tpr, linewidth=1.2, label=f"{_wrap(title, 40)}, {macro.area:.3f}", **look)
        figure.legend(title="mean area under the curve", loc="outside right upper", fontsize=8, title_fontsize=8)
    return figure


def _title(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    """Return the values of the axes; that of a key, which may be a mere number, with the key's last part."""
    parts = [(f"{shorten_key(axis, axes)} " if "." in axis else "") + (row["values"][axis] or "–") for axis in axes]
    return ", ".join(parts)


def _describe_training(row: Mapping[str, Any]) -> dict[str, str]:
    """Return how a cell was trained, each as it stands in a table; "" where there is none."""
    names = {"epochs": "epochs", "kept": "kept_epoch", "batch": "batch_size", "steps": "steps_an_epoch"}
    names |= {"parameters": "num_parameters"}
    numbers = {name: "" if row[key] is None else _count(row[key]) for name, key in names.items()}
    rate, size = row["learning_rate"], row["image_size"]
    return numbers | {
        "optimizer": row["optimizer"] or "",
        "rate": "" if rate is None else format_value(rate),
        "size": "" if size is None else f"{size} px",
    }


def _write_training(row: Mapping[str, Any]) -> str:
    """Return how a cell was trained, in lines for the terminal."""
    t = _describe_training(row)
    lines = [
        t["epochs"] and f"{t['epochs']} epochs{', kept ' + t['kept'] if t['kept'] else ''}",
        t["optimizer"] and f"{t['optimizer']} {t['rate']}",
        t["batch"] and f"batch {t['batch']}{', ' + t['steps'] + ' steps' if t['steps'] else ''}",
        t["size"],
        t["parameters"] and f"{t['parameters']} parameters",
    ]
    return "\n".join(line for line in lines if line)


def _count(value: float) -> str:
    return format_count(value) if float(value).is_integer() else f"{value:,.1f}"


def _count_cells(row: Mapping[str, Any]) -> str:
    finished, planned = row["num_cells"], row["num_planned"]
    return f"best of {finished}" + (f" (of {planned})" if finished < planned else "")


def _get_errors(figure: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far the interval goes below and above the value, in points; 0 where it is undefined."""
    if is_missing(figure["low"]) or is_missing(figure["high"]):
        return 0.0, 0.0
    value = figure["value"]
    return 100 * max(0.0, value - figure["low"]), 100 * max(0.0, figure["high"] - value)


def _take_first(groups: Groups) -> Groups:
    """Return the groups with `MOST_ROWS` rows in all."""
    left, taken = MOST_ROWS, []
    for heading, rows in groups:
        if left > 0:
            taken.append((heading, rows[:left]))
            left -= len(rows)
    return taken


def _read_first_seed(row: Mapping[str, Any], members: Sequence[Mapping[str, Any]], part: str) -> Predictions | None:
    seed = row["seeds"][0]
    folders = [member["folder"] for member in members if (member["arm"], member["seed"]) == (row["arm"], seed)]
    path = folders[0] / "predictions" / f"{part}.npz" if folders and folders[0] is not None else None
    return read_predictions(path) if path is not None and path.exists() else None


def _wrap(title: str, room: int) -> str:
    """Return a title in lines of at most `room` letters; names may be divided at their underlines."""
    return "\n".join(textwrap.wrap(title.replace("_", "_ "), max(8, room))).replace("_ ", "_")
