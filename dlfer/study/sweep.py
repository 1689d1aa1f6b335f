"""A sweep: every cell of a grid with every seed, each an ordinary run in a process of its own.

The cells are ranked on validation. The test part is opened once by each member, at its end, and its
figures stand beside; they rank nothing.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from dlfer.config.grid import Cell, list_cells
from dlfer.config.load import load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError
from dlfer.report.sweep import SCORES, format_best_tables, format_sweep_table
from dlfer.runs.comparison_record import ArmPair, ArmRow, ComparisonRecord, UnfinishedMember
from dlfer.runs.files import write_atomically
from dlfer.runs.find import open_run
from dlfer.runs.options import RunOptions
from dlfer.study.best_cells import BEST_FILE, choose_best_cells, write_best_csv
from dlfer.study.comparison import (
    ArrayTask,
    Comparison,
    Rules,
    explain_members,
    run_comparison,
    start_comparison,
)
from dlfer.study.members import Member, Plan, group_finished
from dlfer.study.progress import StudyConsole
from dlfer.study.summary import (
    Finished,
    choose_split,
    collect_notes,
    compare_with,
    describe_split,
    summarise_arm,
)

SWEEP_FILE = "sweep.csv"
_SHOWN_PAIRS = 5


def run_sweep(
    file: Path | str,
    options: RunOptions,
    *,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    array: ArrayTask | None = None,
) -> Path | None:
    """Run every cell of an experiment's `sweep` with every seed, and compare them; return the sweep's folder.

    Args:
        file: an experiment with a `sweep` section.
        options: of the command line.
        seeds: instead of `sweep.seeds`.
        workers: how many members train at a time; None: one for each GPU, one on a machine without.
        array: run one member in a shared folder of runs, or collect those that have finished there; None: run all here.

    Raises:
        ConfigError: the experiment has no sweep.
        TrainingStopped: by Ctrl-C, SIGTERM or --max-hours; the sweep can be resumed.
        DlferError: members failed; the others were run.
    """
    overrides = dict(options.overrides)
    if seeds is not None:
        overrides["sweep.seeds"] = list(seeds)
    config = load_experiment(file, overrides)
    if config.sweep is None:
        raise ConfigError(
            f"{file}: there is no section sweep. Add one, e.g. sweep: {{grid: {{finetune.batch_size: [16, 32], "
            "finetune.optimizer.learning_rate: [1e-3, 1e-4]}}, or give it by --set sweep.grid.KEY=[VALUES]."
        )
    plan = _plan(config, smoke=options.smoke)
    if options.dry_run:
        explain_members(config, plan, options)
        return None
    return start_comparison(config, plan, options, workers=workers, array=array, rules=RULES)


def resume_sweep(run: Path | str, options: RunOptions, *, workers: int | None = None) -> Path:
    """Go on with a sweep: finished members stay, stopped and failed ones continue from their checkpoints."""
    opened = open_run(run, options.out)
    plan = _plan(opened.config(), smoke=opened.is_smoke)
    return run_comparison(Comparison(opened, opened.config(), plan), options, workers=workers, rules=RULES)


def _plan(config: ExperimentConfig, *, smoke: bool) -> Plan:
    seeds = config.sweep.seeds or (config.experiment.seed,)
    arms = {cell.name: cell.overrides for cell in list_cells(config)}
    return Plan("sweep", arms, seeds[:1] if smoke else seeds, reference=config.sweep.reference)


def _conclude(comparison: Comparison) -> ComparisonRecord:
    """Return the cells, the best on validation first, and write sweep.csv and best.csv."""
    config, members = comparison.config, comparison.members
    cells = {cell.name: cell for cell in list_cells(config)}
    finished = group_finished(members)
    rows = [_make_row(cells[arm], some, config.sweep.rank_by) for arm, some in finished.items()]
    rows.sort(key=lambda row: -row.ranked_by)
    rows = [row.model_copy(update={"rank": number}) for number, row in enumerate(rows, start=1)]
    found = ComparisonRecord(
        table=rows,
        paired=[],
        notes=["No member finished."],
        judged_on=None,
        rank_by=config.sweep.rank_by,
        axes=list(config.sweep.grid),
        reference=None,
        unfinished=[
            UnfinishedMember(arm=member.arm, seed=member.seed, status=member.status, error=member.error)
            for member in members
            if member.status != "finished"
        ],
        best_of=None,
    )
    if rows:
        split = choose_split(finished)
        reference = config.sweep.reference or rows[0].arm
        pairs = compare_with(reference, finished, split)
        order = [row.arm for row in rows]
        changes = {
            "judged_on": describe_split(split, finished),
            "reference": reference,
            "paired": sorted(pairs, key=lambda pair: order.index(pair.b)),
            "notes": _write_notes(comparison, finished, rows, pairs, split=split),
            "best_of": choose_best_cells(config.sweep, cells, rows, finished, split=split),
        }
        found = found.model_copy(update=changes)
    if found.best_of is not None:
        write_best_csv(comparison.run.path / BEST_FILE, found.best_of)
    _write_csv(comparison, cells, rows)
    return found


def _make_row(cell: Cell, members: Sequence[Member], rank_by: str) -> ArmRow:
    """Return a cell's row: that of any arm, with its settings, macro F1 (mean over seeds) and time."""
    row = summarise_arm(cell.name, members)
    macro_f1 = _average_macro_f1(members, "validation")
    changes = {
        "validation_macro_f1": macro_f1,
        "test_macro_f1": _average_macro_f1(members, "test"),
        "settings": cell.settings,
        "ranked_by": row.validation.value if rank_by == "accuracy" else macro_f1,
        "seconds": float(np.mean([member.cost.finetune_seconds for member in members])),
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
    """Return what a reader must know: what ranked the cells, what that costs, and what was compared with what."""
    reference = comparison.plan.reference or rows[0].arm
    metric = SCORES[comparison.config.sweep.rank_by]
    validation = describe_split("validation", finished)
    num_members = sum(len(members) for members in finished.values())
    notes = [
        f"Ranked by {metric} on {validation}. The best of {len(rows)} cells has been chosen by these very images, so "
        f"that its {metric} on validation is too good by an unknown amount{_describe_luck(rows)}."
    ]
    if split == "test":
        notes.append(
            f"Test has ranked nothing: it was opened once by each of {num_members} finished members, at its end. "
            "Report the metrics on test of the cell that is best on validation; if test chose the cell, they would be too "
            "good as well."
        )
    else:
        notes.append(
            "There is no test split: nothing here shows how good the best cell is on images that chose nothing. "
            "Set finetune.data.select_on, or judge it on other data."
        )
    why = "named beforehand" if comparison.plan.reference else "the best on validation"
    if pairs:
        notes.append(
            f"The others are compared with {reference!r}, {why}, on {describe_split(split, finished)}"
            + (f", and Holm's correction holds over all {len(pairs)} pairs." if len(pairs) > 1 else ".")
            + (" The choice flatters it here." if split == "validation" and not comparison.plan.reference else "")
        )
    if len({tuple(row.seeds) for row in rows}) > 1:
        notes.append("The cells differ in which of their seeds finished; their means are not over the same seeds.")
    counts = Counter(member.status for member in comparison.members if member.status != "finished")
    if counts:
        listed = ", ".join(f"{count} {status}" for status, count in counts.items())
        notes.append(f"Not in the table: {listed} of {len(comparison.members)} members.")
    return [*notes, *collect_notes(finished, describe_split(split, finished))]


def _describe_luck(rows: Sequence[ArmRow]) -> str:
    """Say how far the best of k equally good cells would be above them by the luck of the images.

    The largest of k independent normal values lies near the quantile (k - 0.375) / (k + 0.25) (Blom, 1958).
    The cells share their images, so that it is less: an upper bound.
    """
    if len(rows) < 2:
        return ""
    value = float(np.mean([row.validation.value for row in rows]))
    error = np.sqrt(value * (1 - value) / rows[0].validation.n)
    points = 100 * error * NormalDist().inv_cdf((len(rows) - 0.375) / (len(rows) + 0.25))
    return f"; were all equally good, the luckiest would still be up to about {points:.1f} percentage points of accuracy above"


def _write_csv(comparison: Comparison, cells: dict[str, Cell], rows: Sequence[ArmRow]) -> None:
    """Write sweep.csv: a row for each cell, the ranked ones first, then those of which no member finished."""
    axes = list(comparison.config.sweep.grid)
    table = [_make_csv_row(row, cells[row.arm]) for row in rows]
    ranked = {row.arm for row in rows}
    for name, cell in cells.items():
        if name not in ranked:
            of_cell = [member for member in comparison.members if member.arm == name]
            error = next((member.error for member in of_cell if member.error), "")
            statuses = dict.fromkeys(member.status for member in of_cell)
            table.append({"cell": name, **cell.settings, "status": " ".join(statuses), "error": error})
    metrics = ("accuracy", "low", "high", "sd_over_seeds", "macro_f1", "n")
    columns = ["rank", "cell", *axes, "status", "num_seeds"]
    columns += [f"{split}_{metric}" for split in ("validation", "test") for metric in metrics]
    columns += ["train_accuracy", "seconds", "error"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(columns)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(comparison.run.path / SWEEP_FILE, text.getvalue())


def _make_csv_row(row: ArmRow, cell: Cell) -> dict[str, Any]:
    values = {**cell.settings, "rank": row.rank, "cell": cell.name, "status": "finished"}
    values |= {"num_seeds": len(row.seeds), "seconds": row.seconds}
    if row.train:
        values["train_accuracy"] = row.train.value
    for split, macro_f1 in (("validation", row.validation_macro_f1), ("test", row.test_macro_f1)):
        accuracy = row.get(split)
        if accuracy is not None:
            of_split = {
                "accuracy": accuracy.value,
                "macro_f1": macro_f1,
                "low": accuracy.low,
                "high": accuracy.high,
                "n": accuracy.n,
                "sd_over_seeds": accuracy.sd_over_seeds,
            }
            values |= {f"{split}_{name}": value for name, value in of_split.items()}
    return values


def _show(found: ComparisonRecord, console: StudyConsole) -> None:
    for table in (format_sweep_table(found), *format_best_tables(found.best_of)):
        console.console.print(table)
    for pair in found.paired[:_SHOWN_PAIRS]:
        console.say(pair.sentence, style="bold red" if pair.not_learned else None)
    if len(found.paired) > _SHOWN_PAIRS:
        console.say(f"... and {len(found.paired) - _SHOWN_PAIRS} more comparisons in the report.")
    for note in found.notes:
        console.say(note)


def _average_macro_f1(members: Sequence[Member], split: str) -> float | None:
    found = [scores.macro_f1.value for scores in (member.metrics.get(split) for member in members) if scores]
    return float(np.mean(found)) if found else None


RULES = Rules(_conclude, _show)
