"""A sweep: every cell of a grid is trained with every seed, each as an ordinary run in a separate process.

The cells are ranked on validation, within each set of cells that have the same validation images. Each member is
evaluated on the test split once, at its end, and this is not used for ranking. `sweep.best_of` adds a table with the
best cell for each combination of the values of some axes: validation selects a cell, and its metrics are those on the
test split, or on validation if there is no test split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from dlfer.config.schema import ExperimentConfig, SweepConfig
from dlfer.config.variations import Cell, list_cells
from dlfer.errors import ConfigError
from dlfer.report.sweep import SCORES, format_best_tables, format_sweep_table
from dlfer.runs.comparison_record import (
    ArmPair,
    ArmRow,
    BestCell,
    BestCells,
    ComparisonRecord,
    Mean,
    SeedEstimate,
)
from dlfer.runs.files import write_rows
from dlfer.runs.metrics_record import Estimate
from dlfer.runs.run_records import read_events, read_history
from dlfer.study.compare import (
    Finished,
    choose_split,
    collect_notes,
    compare_with,
    describe_groups,
    describe_left_out,
    describe_missing,
    describe_split,
    group_comparable,
    list_unfinished,
    summarise_arm,
)
from dlfer.study.comparison import Comparison, Rules, show_verdicts
from dlfer.study.members import Member, Plan, average_seconds, group_finished, refuse_fixed_members
from dlfer.study.runner import StudyConsole

BEST_FILE = "best.csv"
_PARAMETERS = re.compile(r"^EF-FER2: ([\d,]+) parameters")


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
"""Settings and sizes of a training: columns of best.csv and attributes of `BestCell`."""


def choose_best_cells(
    sweep: SweepConfig, cells: Mapping[str, Cell], rows: Sequence[ArmRow], finished: Finished, *, split: str
) -> BestCells | None:
    """Return the best finished cell for each combination of values of the axes in `sweep.best_of`; None without axes.

    `rows` are ranked, the best on validation first. A combination has none if its cells had other validation images.
    """
    if not sweep.best_of:
        return None
    axes, table, missing, unequal = list(sweep.best_of), [], [], []
    in_grid = [cell for name, cell in cells.items() if name not in sweep.cells]
    for values, names in _group_cells(in_grid, axes).items():
        ranked = [row for row in rows if row.arm in names]
        if not ranked or len({row.image_set for row in ranked}) > 1:
            (unequal if ranked else missing).append(", ".join(value or "–" for value in values))
            continue
        choice = {"values": dict(zip(axes, values, strict=True)), "num_cells": len(ranked), "num_planned": len(names)}
        table.append(_describe_cell(ranked[0], finished[ranked[0].arm], split, choice))
    judged_on, validation = (
        describe_split(split, finished, is_ranked=True),
        describe_split("validation", finished, is_ranked=True),
    )
    notes = _write_best_notes(sweep, table, missing, validation, split=split)
    if unequal:
        notes.append(f"No best cell of: {'; '.join(unequal)}; the cells of each were validated on different images.")
    return BestCells(axes=axes, part=split, judged_on=judged_on, notes=notes, table=table)


def write_best_csv(path: Path, best: BestCells) -> None:
    """Write the table of best cells as csv; a missing value is an empty field."""
    metrics = [f"{metric}{end}" for metric in SCORES for end in ("", "_low", "_high")]
    own = ["cell", *TRAINING, "num_seeds", "num_cells", "num_planned", "ranked_by", "part", "n", *metrics]
    columns = _name_columns(best.axes, own)
    rows = []
    for cell in best.table:
        row: dict[str, Any] = {columns[axis]: value for axis, value in cell.values.items()}
        row |= {name: getattr(cell, name) for name in (*TRAINING, "num_cells", "num_planned", "ranked_by")}
        row |= {"cell": cell.arm, "num_seeds": len(cell.seeds), "part": best.part, "n": cell.accuracy.n}
        for metric in SCORES:
            estimate = cell.get(metric)
            row |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
        rows.append(row)
    write_rows(path, [*columns.values(), *own], rows)


def _group_cells(cells: Iterable[Cell], axes: Sequence[str]) -> dict[tuple[str | None, ...], list[str]]:
    """Return values of the axes -> names of their cells, in the order of the grid; the first axis varies slowest."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.settings.get(axis) for axis in axes), []).append(cell.name)
    orders = [list(dict.fromkeys(values)) for values in zip(*groups, strict=True)]
    places = {values: [order.index(value) for order, value in zip(orders, values, strict=True)] for values in groups}
    return {values: groups[values] for values in sorted(groups, key=places.__getitem__)}


def _describe_cell(row: ArmRow, members: Sequence[Member], split: str, choice: Mapping[str, Any]) -> BestCell:
    """Return a cell with its training settings, its metrics on a split, and what it was selected from."""
    several = [member.metrics.get(split) for member in members]
    trainings = [_read_training(member) for member in members]
    means = {name: _average([training.get(name) for training in trainings]) for name in TRAINING}
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


def _read_training(member: Member) -> dict[str, Mean | str]:
    """Return the training settings of a member, without those that its family lacks or its files do not record."""
    run = member.run
    config, stage = run.config(), run.config().finetune
    history, events = read_history(run.path / "finetune" / "history.csv"), read_events(run.path)
    kept = [event.kept_epoch for event in events if event.event == "finetune_end"]
    plans = [_PARAMETERS.match(event.text or "") for event in events if event.event == "plan"]
    found = {
        "epochs": len(history) or None,
        "kept_epoch": kept[-1] if kept else None,
        "num_parameters": next((int(plan[1].replace(",", "")) for plan in reversed(plans) if plan), None),
    }
    if config.ensemble is not None:
        return found  # its members have settings of their own
    found["image_size"] = stage.image_size
    if config.boosting is not None:
        return found
    images = (history[-1].seconds or 0) * (history[-1].images_per_second or 0) if history else 0
    return found | {
        "optimizer": stage.optimizer.name,
        "learning_rate": stage.optimizer.learning_rate,
        "batch_size": stage.batch_size,
        "steps_an_epoch": max(1, round(images / stage.batch_size)) if images else None,
    }


def _average(values: Sequence[Mean | str]) -> Mean | str:
    """Return the value if all seeds agree, else the mean; None if any seed has none."""
    if any(value is None for value in values):
        return None
    return values[0] if len(set(values)) == 1 else float(np.mean(values))


def _average_estimates(estimates: Sequence[Estimate], n: int) -> SeedEstimate:
    """Return the means over seeds of a metric and of the bounds of its interval over images.

    The mean of several values on the same images varies at most as much as they do on average, so the interval of mean
    bounds is too wide rather than too narrow.
    """
    values = [estimate.value for estimate in estimates]
    low, high = _average([estimate.low for estimate in estimates]), _average([estimate.high for estimate in estimates])
    mean = SeedEstimate(value=_average(values), low=low, high=high, n=n)
    if len(values) < 2 or mean.value is None:
        return mean
    return mean.model_copy(update={"sd_over_seeds": float(np.std(values, ddof=1))})


def _write_best_notes(
    sweep: SweepConfig, table: Sequence[BestCell], missing: Sequence[str], validation: str, *, split: str
) -> list[str]:
    """Return notes on what selected the cells, which split the metrics are on, and what is not in the table."""
    notes = [
        f"For each {' and '.join(sweep.best_of)}, the best of the cells by {SCORES[sweep.rank_by]} on {validation}."
    ]
    if split == "test":
        notes[0] += " The metrics are those on test, which was not used for selection."
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


SWEEP_FILE = "sweep.csv"
_SHOWN_PAIRS = 5


def _plan(config: ExperimentConfig, file: object, smoke: bool) -> Plan:
    if config.sweep is None:
        raise ConfigError(
            f"{file}: there is no section sweep. Add one, e.g. sweep: {{grid: {{finetune.batch_size: [16, 32], "
            "finetune.optimizer.learning_rate: [1e-3, 1e-4]}}, or give it by --set sweep.grid.KEY=[VALUES]."
        )
    seeds = config.sweep.seeds or (config.experiment.seed,)
    arms = {cell.name: cell.overrides for cell in list_cells(config)}
    without = any("pretrain" in overrides and overrides["pretrain"] is None for overrides in arms.values())
    refuse_fixed_members(config, num_seeds=len(seeds), drops_pretrain=without)
    return Plan("sweep", arms, seeds[:1] if smoke else seeds, reference=config.sweep.reference)


def _conclude(comparison: Comparison) -> ComparisonRecord:
    """Return the cells ranked on validation, and write sweep.csv and best.csv."""
    config, members = comparison.config, comparison.members
    cells = {cell.name: cell for cell in list_cells(config)}
    finished = group_finished(members)
    groups = group_comparable(finished, "validation")
    rows = []
    for image_set, arms in enumerate(groups, start=1):
        some = [_make_row(cells[arm], finished[arm], config.sweep.rank_by) for arm in arms]
        some.sort(key=lambda row: -row.ranked_by)
        found_set = image_set if len(groups) > 1 else None
        rows += [
            row.model_copy(update={"rank": rank, "image_set": found_set}) for rank, row in enumerate(some, start=1)
        ]
    found = ComparisonRecord(
        table=rows,
        paired=[],
        notes=["No member finished."],
        judged_on=None,
        rank_by=config.sweep.rank_by,
        axes=list(config.sweep.grid),
        reference=None,
        unfinished=list_unfinished(members),
        best_of=None,
    )
    if rows:
        split = choose_split(finished)
        reference = _choose_reference(comparison, rows)
        pairs = [] if reference is None else compare_with(reference, finished, split)
        order = [row.arm for row in rows]
        changes = {
            "judged_on": describe_split(split, finished, is_ranked=True),
            "reference": reference,
            "paired": sorted(pairs, key=lambda pair: order.index(pair.b)),
            "notes": [*describe_groups(groups), *_write_notes(comparison, finished, rows, pairs, split=split)],
            "best_of": choose_best_cells(config.sweep, cells, rows, finished, split=split),
        }
        found = found.model_copy(update=changes)
    if found.best_of is not None:
        write_best_csv(comparison.run.path / BEST_FILE, found.best_of)
    _write_csv(comparison, cells, rows)
    return found


def _choose_reference(comparison: Comparison, rows: Sequence[ArmRow]) -> str | None:
    """Return the cell that the others are compared with; None if none is named and no two share validation images."""
    if comparison.plan.reference is None and len(rows) > 1 and rows[0].image_set != rows[1].image_set:
        return None
    return comparison.plan.reference or rows[0].arm


def _make_row(cell: Cell, members: Sequence[Member], rank_by: str) -> ArmRow:
    """Return a cell's row: the row of any arm plus settings, macro F1 (mean over seeds) and mean training time."""
    row = summarise_arm(cell.name, members)
    macro_f1 = _average_macro_f1(members, "validation")
    changes = {
        "validation_macro_f1": macro_f1,
        "test_macro_f1": _average_macro_f1(members, "test"),
        "settings": cell.settings,
        "ranked_by": row.validation.value if rank_by == "accuracy" else macro_f1,
        "seconds": average_seconds(members),
    }
    return row.model_copy(update=changes)


def _write_notes(
    comparison: Comparison,
    finished: Finished,
    rows: Sequence[ArmRow],
    pairs: Sequence[ArmPair],
    *,
    split: str,
) -> list[str]:
    """Return notes on what ranked the cells, the bias of the ranking, and which cells were compared."""
    metric = SCORES[comparison.config.sweep.rank_by]
    validation = describe_split("validation", finished, is_ranked=True)
    num_members = sum(len(members) for members in finished.values())
    largest = [row for row in rows if row.image_set == rows[0].image_set]
    which = "" if len(largest) == len(rows) else f" of set {rows[0].image_set}"
    reference, notes = _choose_reference(comparison, rows), []
    if len(largest) > 1 or not which:
        notes.append(
            f"Ranked by {metric} on {validation}. The best of {len(largest)} cells{which} was chosen on the same images, so "
            f"its {metric} on validation is too good by an unknown amount{_describe_selection_bias(largest)}."
        )
    if split == "test":
        notes.append(
            f"The ranking does not use test: each of the {num_members} finished members opened it once, at its end. "
            "Report the metrics on test of the cell that is best on validation; if test selected the cell, they "
            "would be too high, too."
        )
    else:
        notes.append(
            "There is no test split: nothing here shows how good the best cell is on images that were not used for selection. "
            "Set finetune.data.select_on, or judge it on other data."
        )
    why = "named beforehand" if comparison.plan.reference else f"the best on validation{which}"
    if pairs:
        notes.append(
            f"The others are compared with {reference!r}, {why}, on {describe_split(split, finished, is_ranked=True)}"
            + (f", and Holm's correction holds over all {len(pairs)} pairs." if len(pairs) > 1 else ".")
            + (
                " Its value is optimistic, because it was selected here."
                if split == "validation" and not comparison.plan.reference
                else ""
            )
        )
    notes += [] if reference is None else describe_left_out(reference, finished, pairs)
    notes += describe_missing(comparison.members, arms="cells")
    return [*notes, *collect_notes(finished, describe_split(split, finished, is_ranked=True), pairs)]


def _describe_selection_bias(rows: Sequence[ArmRow]) -> str:
    """Return a clause on how far chance would lift the best of k equally good cells above their mean; "" for one cell.

    The largest of k independent normal values lies near the quantile (k - 0.375) / (k + 0.25) (Blom, 1958).
    The cells share their images, which makes this an upper bound.
    """
    if len(rows) < 2:
        return ""
    value = float(np.mean([row.validation.value for row in rows]))
    error = np.sqrt(value * (1 - value) / rows[0].validation.n)
    points = 100 * error * NormalDist().inv_cdf((len(rows) - 0.375) / (len(rows) + 0.25))
    return f"; if all cells were equally good, the best would by chance be up to about {points:.1f} percentage points of accuracy above their mean"


def _write_csv(comparison: Comparison, cells: dict[str, Cell], rows: Sequence[ArmRow]) -> None:
    """Write sweep.csv with a row for each cell, first the ranked ones, then those without a finished member."""
    metrics = ("accuracy", "low", "high", "sd_over_seeds", "macro_f1", "n")
    own = ["image_set", "status", "num_seeds"]
    own += [f"{split}_{metric}" for split in ("validation", "test") for metric in metrics]
    own += ["train_accuracy", "seconds", "error"]
    axes = _name_columns(comparison.config.sweep.grid, ["rank", "cell", *own])
    table = [_make_csv_row(row, cells[row.arm], axes) for row in rows]
    ranked = {row.arm for row in rows}
    table += [
        {"cell": name, **{axes[axis]: value for axis, value in cell.settings.items()}}
        for name, cell in cells.items()
        if name not in ranked
    ]
    for row in table:
        of_cell = [member for member in comparison.members if member.arm == row["cell"]]
        counts = Counter(member.status for member in of_cell)
        # "finished" if the status is the same for all seeds, else e.g. "finished 1, failed 2".
        row["status"] = ", ".join(counts if len(counts) == 1 else [f"{status} {n}" for status, n in counts.items()])
        row["error"] = next((member.error for member in of_cell if member.error), "")
    write_rows(comparison.run.path / SWEEP_FILE, ["rank", "cell", *axes.values(), *own], table)


def _name_columns(axes: Iterable[str], own: Sequence[str]) -> dict[str, str]:
    """Return axis -> column name; e.g. "axis status" for an axis that is named like another column, `status`."""
    return {axis: f"axis {axis}" if axis in own else axis for axis in axes}


def _make_csv_row(row: ArmRow, cell: Cell, axes: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {axes[axis]: value for axis, value in cell.settings.items()}
    values |= {"rank": row.rank, "cell": cell.name, "image_set": row.image_set}
    values |= {"num_seeds": len(row.seeds), "seconds": row.seconds}
    if row.train:
        values["train_accuracy"] = row.train.value
    for split, macro_f1 in (("validation", row.validation_macro_f1), ("test", row.test_macro_f1)):
        accuracy = row.get(split)
        if accuracy is not None:
            values |= {f"{split}_accuracy": accuracy.value, f"{split}_macro_f1": macro_f1}
            values |= {f"{split}_{name}": getattr(accuracy, name) for name in ("low", "high", "n", "sd_over_seeds")}
    return values


def _show(found: ComparisonRecord, console: StudyConsole) -> None:
    for table in (format_sweep_table(found), *format_best_tables(found.best_of)):
        console.console.print(table)
    show_verdicts(found, console, most=_SHOWN_PAIRS, style=None)


def _average_macro_f1(members: Sequence[Member], split: str) -> float | None:
    found = [scores.macro_f1.value for scores in (member.metrics.get(split) for member in members) if scores]
    return float(np.mean(found)) if found else None


SWEEP = Rules("sweep", _plan, _conclude, _show)
