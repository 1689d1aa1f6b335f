"""`sweep.best_of`: the best cell for each combination of the values of some axes, in a table of its own.

Validation chooses a cell. Its metrics are those on the test split, which has chosen nothing, or on validation where
there is no test split.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlfer.config.grid import Cell
from dlfer.config.schema import SweepConfig
from dlfer.report.sweep import SCORES
from dlfer.runs.comparison_record import ArmRow, BestCell, BestCells, Mean, SeedEstimate
from dlfer.runs.files import write_atomically
from dlfer.runs.metrics_record import Estimate
from dlfer.runs.run_records import Epoch, read_events, read_history
from dlfer.study.members import Member
from dlfer.study.summary import Finished, describe_split

BEST_FILE = "best.csv"
_PARAMETERS = re.compile(r"^EF-FER2: ([\d,]+) parameters")


class Training(NamedTuple):
    """How one member was trained; None where its family has no such thing or its files do not say.

    The fields are columns of best.csv and attributes of `BestCell`.
    """

    epochs: int | None = None
    kept_epoch: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    steps_an_epoch: int | None = None
    image_size: int | None = None
    num_parameters: int | None = None


def choose_best_cells(
    sweep: SweepConfig, cells: Mapping[str, Cell], rows: Sequence[ArmRow], finished: Finished, *, split: str
) -> BestCells | None:
    """Return the best finished cell for each combination of the values of `sweep.best_of`; None if that is empty.

    Args:
        sweep: the section of the experiment.
        cells: all that were planned, by name.
        rows: of the ranking, the best on validation first.
        finished: cell -> its finished members.
        split: that the metrics are of, "test" or "validation".
    """
    if not sweep.best_of:
        return None
    axes, table, missing = list(sweep.best_of), [], []
    in_grid = [cell for name, cell in cells.items() if name not in sweep.cells]
    for values, names in _group_cells(in_grid, axes).items():
        ranked = [row for row in rows if row.arm in names]
        if not ranked:
            missing.append(", ".join(value or "–" for value in values))
            continue
        choice = {"values": dict(zip(axes, values, strict=True)), "num_cells": len(ranked), "num_planned": len(names)}
        table.append(_describe_cell(ranked[0], finished[ranked[0].arm], split, choice))
    judged_on, validation = describe_split(split, finished), describe_split("validation", finished)
    notes = _write_notes(sweep, table, missing, validation, split=split)
    return BestCells(axes=axes, part=split, judged_on=judged_on, notes=notes, table=table)


def write_best_csv(path: Path, best: BestCells) -> None:
    """Write the table as csv; a missing value is an empty cell."""
    metrics = [f"{metric}{end}" for metric in SCORES for end in ("", "_low", "_high")]
    own = ["cell", *Training._fields, "num_seeds", "num_cells", "num_planned", "ranked_by", "part", "n", *metrics]
    columns = {axis: axis if axis not in own else f"axis {axis}" for axis in best.axes}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns.values(), *own], lineterminator="\n")
    writer.writeheader()
    for cell in best.table:
        row: dict[str, Any] = {columns[axis]: value for axis, value in cell.values.items()}
        row |= {name: getattr(cell, name) for name in Training._fields}
        row |= {"num_cells": cell.num_cells, "num_planned": cell.num_planned, "ranked_by": cell.ranked_by}
        row |= {"cell": cell.arm, "num_seeds": len(cell.seeds), "part": best.part, "n": cell.accuracy.n}
        for metric in SCORES:
            estimate = cell.get(metric)
            row |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
        writer.writerow(row)
    write_atomically(path, text.getvalue())


def _group_cells(cells: Iterable[Cell], axes: Sequence[str]) -> dict[tuple[str | None, ...], list[str]]:
    """Return the values of the axes -> the names of their cells, the first axis slowest, values as in the grid."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.settings.get(axis) for axis in axes), []).append(cell.name)
    orders = [list(dict.fromkeys(values)) for values in zip(*groups, strict=True)]
    places = {values: [order.index(value) for order, value in zip(orders, values, strict=True)] for values in groups}
    return {values: groups[values] for values in sorted(groups, key=places.__getitem__)}


def _describe_cell(row: ArmRow, members: Sequence[Member], split: str, choice: Mapping[str, Any]) -> BestCell:
    """Return a cell with how it was trained, its metrics on a split, and what it was chosen from."""
    several = [member.metrics.get(split) for member in members]
    trainings = zip(*[_read_training(member) for member in members], strict=True)
    means = {name: _average(values) for name, values in zip(Training._fields, trainings, strict=True)}
    n = several[0].n
    return BestCell(
        arm=row.arm,
        seeds=row.seeds,
        ranked_by=row.ranked_by,
        **choice,
        **means,
        accuracy=row.get(split),
        macro_precision=_average_estimates([scores.macro_precision for scores in several], n),
        macro_recall=_average_estimates([scores.macro_recall for scores in several], n),
        macro_f1=_average_estimates([scores.macro_f1 for scores in several], n),
    )


def _read_training(member: Member) -> Training:
    """Return how a member was trained, as its own files have it."""
    run = member.run
    config = run.config()
    history, events = read_history(run.path / "finetune" / "history.csv"), read_events(run.path)
    kept = [event.kept_epoch for event in events if event.event == "finetune_end"]
    plans = [_PARAMETERS.match(event.text or "") for event in events if event.event == "plan"]
    training = Training(
        epochs=len(history) or None,
        kept_epoch=kept[-1] if kept else None,
        num_parameters=next((int(plan[1].replace(",", "")) for plan in reversed(plans) if plan), None),
    )
    if config.ensemble is not None:
        return training  # its members have settings of their own
    stage = config.finetune
    training = training._replace(image_size=stage.image_size)
    if config.boosting is not None:
        return training
    return training._replace(
        optimizer=stage.optimizer.name,
        learning_rate=stage.optimizer.learning_rate,
        batch_size=stage.batch_size,
        steps_an_epoch=_count_steps(history, stage.batch_size),
    )


def _count_steps(history: Sequence[Epoch], batch_size: int) -> int | None:
    """Return the steps of an epoch, from the images that the last one has seen; None where that is not recorded."""
    images = (history[-1].seconds or 0) * (history[-1].images_per_second or 0) if history else 0
    return max(1, round(images / batch_size)) if images else None


def _average(values: Sequence[Mean | str]) -> Mean | str:
    """Return what the seeds agree on, else the mean of their numbers; None where a seed has none."""
    if any(value is None for value in values):
        return None
    return values[0] if len(set(values)) == 1 else float(np.mean(values))


def _average_estimates(estimates: Sequence[Estimate], n: int) -> SeedEstimate:
    """Return the mean over seeds of a metric and of the ends of its interval over images.

    The mean of several values on the same images varies at most as much as they do on average, so that the interval of
    mean ends is rather too wide than too narrow.
    """
    values = [estimate.value for estimate in estimates]
    low, high = _average([estimate.low for estimate in estimates]), _average([estimate.high for estimate in estimates])
    mean = SeedEstimate(value=_average(values), low=low, high=high, n=n)
    if len(values) < 2 or mean.value is None:
        return mean
    return mean.model_copy(update={"sd_over_seeds": float(np.std(values, ddof=1))})


def _write_notes(
    sweep: SweepConfig, table: Sequence[BestCell], missing: Sequence[str], validation: str, *, split: str
) -> list[str]:
    """Return what chose the cells, what split the metrics are of, and what is not in the table."""
    notes = [
        f"For each {' and '.join(sweep.best_of)}, the best of the cells by {SCORES[sweep.rank_by]} on {validation}."
    ]
    if split == "test":
        notes[0] += " The metrics are those on test, which chose nothing."
    else:
        notes[0] += (
            " Not all cells have a test split: the metrics are those on validation, too, and choosing by them has made "
            "them too good by an unknown amount."
        )
    if any(len(cell.seeds) > 1 for cell in table):
        notes.append(
            "Metrics are means over seeds; the ends of the intervals of precision, recall and F1 are means of the seeds' "
            "ends."
        )
    if any(cell.num_cells < cell.num_planned for cell in table):
        notes.append("Where not all cells have finished, the best of those that have is given.")
    if missing:
        notes.append(f"No cell has finished of: {'; '.join(missing)}.")
    if sweep.cells:
        notes.append("Cells that are named by themselves have no values of these axes, and are not among them.")
    return notes
