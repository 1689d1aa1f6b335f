"""`sweep.best_of`: the best cell for each combination of the values of some axes, in a table of its own.

Validation chooses a cell. The figures beside it are of the test part, which has chosen nothing, or of
validation where there is no test part.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.grid import Cell
from dlfer.config.schema import SweepConfig
from dlfer.report.page import read_rows
from dlfer.report.run_figures import read_log
from dlfer.runs.files import write_atomically
from dlfer.study.members import Member
from dlfer.study.summary import Finished, describe_part

BEST_FILE = "best.csv"
FIGURES = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
TRAINING = (
    "epochs",
    "kept_epoch",
    "optimizer",
    "learning_rate",
    "batch_size",
    "steps_an_epoch",
    "image_size",
    "num_parameters",
)
_PARAMETERS = re.compile(r"^EF-FER2: ([\d,]+) parameters")


def choose_best_cells(
    sweep: SweepConfig, cells: Mapping[str, Cell], rows: Sequence[Mapping[str, Any]], finished: Finished, *, part: str
) -> dict[str, Any] | None:
    """Return the best finished cell for each combination of the values of `sweep.best_of`; None if that is empty.

    Args:
        sweep: the section of the experiment.
        cells: all that were planned, by name.
        rows: of the ranking, the best on validation first.
        finished: cell -> its finished members.
        part: what the figures are of, "test" or "validation".

    Returns:
        {"axes", "part", "judged_on", "notes", "table"}. A row of the table has "values" (axis -> value, None
        where the axis fell away), "arm", "seeds", "num_cells" and "num_planned" (how many finished, and how
        many there were to choose from), "ranked_by" (what chose it), the keys of `TRAINING` (means over seeds;
        None where a family has no such thing), and each of `FIGURES` as {"value", "low", "high", "n"}.
    """
    if not sweep.best_of:
        return None
    axes, table, missing = list(sweep.best_of), [], []
    in_grid = [cell for name, cell in cells.items() if name not in sweep.cells]
    for values, names in _group_cells(in_grid, axes).items():
        ranked = [row for row in rows if row["arm"] in names]
        if not ranked:
            missing.append(", ".join(value or "–" for value in values))
            continue
        best = {"values": dict(zip(axes, values, strict=True)), "num_cells": len(ranked), "num_planned": len(names)}
        table.append(best | _describe_cell(ranked[0], finished[ranked[0]["arm"]], part))
    notes = _write_notes(sweep, table, missing, describe_part("validation", finished), part=part)
    return {"axes": axes, "part": part, "judged_on": describe_part(part, finished), "notes": notes, "table": table}


def write_best_csv(path: Path, best: Mapping[str, Any]) -> None:
    """Write the table as csv; a missing value is an empty cell."""
    figures = [f"{figure}{end}" for figure in FIGURES for end in ("", "_low", "_high")]
    own = ["cell", *TRAINING, "num_seeds", "num_cells", "num_planned", "ranked_by", "part", "n", *figures]
    columns = {axis: axis if axis not in own else f"axis {axis}" for axis in best["axes"]}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns.values(), *own], lineterminator="\n")
    writer.writeheader()
    for row in best["table"]:
        values = {columns[axis]: value for axis, value in row["values"].items()}
        values |= {name: row[name] for name in (*TRAINING, "num_cells", "num_planned", "ranked_by")}
        values |= {"cell": row["arm"], "num_seeds": len(row["seeds"]), "part": best["part"], "n": row["accuracy"]["n"]}
        for figure in FIGURES:
            values |= {figure: row[figure]["value"]}
            values |= {f"{figure}_{end}": row[figure][end] for end in ("low", "high")}
        writer.writerow(values)
    write_atomically(path, text.getvalue())


def _group_cells(cells: Iterable[Cell], axes: Sequence[str]) -> dict[tuple[str | None, ...], list[str]]:
    """Return the values of the axes -> the names of their cells, the first axis slowest, values as in the grid."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.settings.get(axis) for axis in axes), []).append(cell.name)
    orders = [list(dict.fromkeys(values)) for values in zip(*groups, strict=True)]
    places = {values: [order.index(value) for order, value in zip(orders, values, strict=True)] for values in groups}
    return {values: groups[values] for values in sorted(groups, key=places.__getitem__)}


def _describe_cell(row: Mapping[str, Any], members: Sequence[Member], part: str) -> dict[str, Any]:
    several = [member.read_record()["metrics"][part] for member in members]
    facts = [_read_training(member) for member in members]
    return {
        "arm": row["arm"],
        "seeds": row["seeds"],
        "ranked_by": row["ranked_by"],
        **{name: _average([fact[name] for fact in facts]) for name in TRAINING},
        "accuracy": row[part],
        **{figure: _average_figures([scores[figure] for scores in several], several[0]["n"]) for figure in FIGURES[1:]},
    }


def _read_training(member: Member) -> dict[str, Any]:
    """Return the values of `TRAINING` as the member's own files have them."""
    run = member.run
    config = run.config()
    history, events = read_rows(run.path / "finetune" / "history.csv"), read_log(run.path)
    kept = [event.get("kept_epoch") for event in events if event.get("event") == "finetune_end"]
    plans = [_PARAMETERS.match(event["text"]) for event in events if event.get("event") == "plan"]
    values: dict[str, Any] = dict.fromkeys(TRAINING)
    values |= {"epochs": len(history) or None, "kept_epoch": kept[-1] if kept else None}
    values["num_parameters"] = next((int(plan[1].replace(",", "")) for plan in reversed(plans) if plan), None)
    if config.ensemble is not None:
        return values  # its members have settings of their own
    stage = config.finetune
    values["image_size"] = stage.image_size
    if config.boosting is None:
        values |= {"optimizer": stage.optimizer.name, "learning_rate": stage.optimizer.learning_rate}
        values |= {"batch_size": stage.batch_size, "steps_an_epoch": _count_steps(history, stage.batch_size)}
    return values


def _count_steps(history: Sequence[Mapping[str, str]], batch_size: int) -> int | None:
    """Return the steps of an epoch, from the images that the last one has seen; None where that is not recorded."""
    last = history[-1] if history else {}
    images = float(last.get("seconds") or 0) * float(last.get("images_per_second") or 0)
    return max(1, round(images / batch_size)) if images else None


def _average(values: Sequence[Any]) -> Any:
    """Return what the seeds agree on, else the mean of their numbers; None where a seed has none."""
    if any(value is None for value in values):
        return None
    return values[0] if len(set(values)) == 1 else float(np.mean(values))


def _average_figures(figures: Sequence[Mapping[str, float | None]], n: int) -> dict[str, Any]:
    """Return the mean over seeds of a figure and of the bounds of its interval over images, with n.

    The mean of several figures of the same images scatters at most as much as they do on average, so that
    the mean of the bounds errs on the wide side.
    """
    mean = {key: _average([figure[key] for figure in figures]) for key in ("value", "low", "high")} | {"n": n}
    if len(figures) > 1 and mean["value"] is not None:
        mean["sd_over_seeds"] = float(np.std([figure["value"] for figure in figures], ddof=1))
    return mean


def _write_notes(
    sweep: SweepConfig, table: Sequence[Mapping[str, Any]], missing: Sequence[str], validation: str, *, part: str
) -> list[str]:
    """Return what chose the cells, what the figures are of, and what is not in the table."""
    figure = {"accuracy": "accuracy", "macro_f1": "macro F1"}[sweep.rank_by]
    notes = [f"For each {' and '.join(sweep.best_of)}, the best of the cells by {figure} on {validation}."]
    if part == "test":
        notes[0] += " The figures are on test, which chose nothing."
    else:
        notes[0] += (
            " There is no test part for all cells: the figures are on validation, too, and choosing by them has made "
            "them too good by an unknown amount."
        )
    if any(len(row["seeds"]) > 1 for row in table):
        notes.append(
            "Figures are means over seeds; the bounds of precision, recall and F1 are means of the seeds' bounds."
        )
    if any(row["num_cells"] < row["num_planned"] for row in table):
        notes.append("Where not all cells have finished, the best of those that have is given.")
    if missing:
        notes.append(f"No cell has finished of: {'; '.join(missing)}.")
    if sweep.cells:
        notes.append("Cells that are named by themselves have no values of these axes, and are not among them.")
    return notes
