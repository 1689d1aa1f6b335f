"""Tables and figures of a cross-validation: the pooled accuracy with its two intervals, the folds, and the differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dlfer.report.figures import COLOURS, INK, SOFT, Drawn, figure_style, name_rows, new_figure, write_figures
from dlfer.report.page import format_count, format_percent, format_uncertainty
from dlfer.report.sweep import MOST_DRAWN, draw_sweep_differences, has_value, list_drawn_pairs
from dlfer.runs.comparison_record import ComparisonRecord, CrossValidated

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

CROSSVAL_FIGURES = ("folds", "differences")
CHOSEN = "each fold's own choice"
"""The arm that is best on a fold's validation split, evaluated on the fold."""
_MOST_FOLD_TABLES = 1


class PooledRow(NamedTuple):
    """A row of the table of pooled accuracies.

    Attributes:
        name: of the arm, or CHOSEN.
        validation: mean over folds; None for CHOSEN.
        found: what the folds say of it.
    """

    name: str
    validation: float | None
    found: CrossValidated


def list_pooled_rows(comparison: ComparisonRecord) -> list[PooledRow]:
    """Return the arms, the best on validation first, and what the folds chose themselves."""
    rows = [
        PooledRow(row.arm, None if row.validation is None else row.validation.value, row.cross_validated)
        for row in comparison.table
        if row.cross_validated is not None
    ]
    return rows + ([] if comparison.chosen is None else [PooledRow(CHOSEN, None, comparison.chosen)])


def format_folds_tables(comparison: ComparisonRecord) -> list[Table]:
    """Return the tables for the terminal: pooled accuracies, and the folds of a single arm."""
    from rich.table import Table

    rows = list_pooled_rows(comparison)
    pooled = Table(
        title="Accuracy pooled over folds: each image is predicted by the model that did not see it", show_lines=True
    )
    for name in (
        "arm",
        "validation",
        "accuracy of the recipe",
        "of the trained models",
        "SD over folds",
        "macro F1",
        "images",
    ):
        pooled.add_column(name, justify="left" if name == "arm" else "right", overflow="fold")
    for row in rows:
        found = row.found
        num_folds = (
            f"{len(found.folds)} folds"
            if len(found.folds) == found.num_folds
            else f"{len(found.folds)} of {found.num_folds} folds"
        )
        pooled.add_row(
            f"{row.name}\n{num_folds}",
            format_percent(row.validation),
            f"{format_percent(found.recipe.value)}\n{format_uncertainty(found.recipe)}",
            f"{format_percent(found.trained.value)}\n{format_uncertainty(found.trained)}",
            format_percent(found.sd_over_folds),
            f"{format_percent(found.macro_f1.value)}\n{format_uncertainty(found.macro_f1)}",
            f"{format_count(found.n)}\n{format_count(found.num_groups)} groups",
        )
    if len(comparison.table) > _MOST_FOLD_TABLES or not rows:
        return [pooled]
    folds = Table(title="Folds, each with the interval of its model")
    for name in ("fold", "seed", "validation", "accuracy", "95 % interval", "images"):
        folds.add_column(name, justify="right")
    for fold in rows[0].found.folds:
        interval = format_uncertainty(fold.accuracy).removeprefix("95 % ")
        values = format_percent(fold.validation), format_percent(fold.accuracy.value), interval, format_count(fold.n)
        folds.add_row(str(fold.fold), str(fold.seed), *values)
    return [folds, pooled]


def write_crossval_figures(folder: Path, comparison: ComparisonRecord) -> list[Path]:
    """Draw the folds of each arm and the differences as far as there are any; return the paths."""
    drawn, pairs = [], list_drawn_pairs(comparison)[:MOST_DRAWN]
    rows = [row for row in list_pooled_rows(comparison) if has_value(row.found.trained)][:MOST_DRAWN]
    if rows:
        texts = [f"{row.name} {format_percent(row.found.recipe.value)}" for row in rows]
        title = "Pooled accuracy with the 95 % interval of the recipe (thin) and of the trained models (thick); dots are folds"
        drawn.append(Drawn("folds", draw_folds(rows), title, f"Pooled accuracy: {'; '.join(texts)}."))
    if pairs:
        title = f"Difference from “{pairs[0].a}” over folds, with its 95 % interval, not corrected"
        drawn.append(
            Drawn("differences", draw_sweep_differences(pairs), title, " ".join(pair.sentence for pair in pairs))
        )
    return write_figures(folder, drawn)


def draw_folds(rows: Sequence[PooledRow]) -> Figure:
    """Draw a row for each arm: the accuracy of each fold, the pooled one, and its two intervals."""
    with figure_style():
        figure = new_figure(9, 1.2 + 0.5 * len(rows))
        axes = figure.subplots()
        for place, row in enumerate(rows):
            found = row.found
            for estimate, width in ((found.recipe, 1.5), (found.trained, 5)):
                if estimate.low is not None and estimate.high is not None:
                    ends = [100 * estimate.low, 100 * estimate.high]
                    axes.plot(
                        ends, [place, place], color=COLOURS[0], linewidth=width, solid_capstyle="butt", alpha=0.75
                    )
            values = [100 * fold.accuracy.value for fold in found.folds if has_value(fold.accuracy)]
            axes.plot(values, [place - 0.24] * len(values), "o", color=SOFT, markersize=4.5, alpha=0.85)
            axes.plot(100 * found.trained.value, place, "o", color=INK, markersize=6)
        name_rows(axes, [row.name for row in rows])
        axes.set_xlabel("accuracy (%)")
        axes.margins(x=0.06)
    return figure
