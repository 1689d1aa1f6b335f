"""Figures and tables of a sweep and of a cross-validation.

For a sweep they show the ranking and comparison of its cells, and the best cells of `sweep.best_of`; for a
cross-validation the pooled accuracy with its two intervals, the folds, and the differences between arms.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.report.curves import MacroRoc, compute_class_rocs, draw_class_rocs, frame_roc
from dlfer.report.figures import (
    COLOURS,
    HATCHES,
    INK,
    LINES,
    SOFT,
    NamedFigure,
    figure_style,
    name_rows,
    new_figure,
    write_figures,
)
from dlfer.report.page import (
    format_cell,
    format_count,
    format_interval,
    format_percent,
    format_uncertainty,
    format_value,
    shorten_key,
)
from dlfer.runs.comparison_record import ArmPair, ArmRow, BestCell, BestCells, ComparisonRecord, CrossValidated, Mean
from dlfer.runs.metrics_record import Estimate, is_missing
from dlfer.runs.run import format_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


BEST_FIGURES = ("best_scores", "best_macro_roc", "best_roc")
MAX_ROWS = 16
"""Maximum number of best cells, the first ones, in the figures; the tables have all."""
SCORES = {
    "accuracy": "accuracy",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "macro_f1": "macro F1",
}
"""Metric -> display name."""
_MAX_PANELS = 4
"""Up to this many tables have a panel of bars each; more tables share one panel."""
_COLUMNS = 3


class BestRow(NamedTuple):
    """The best cell for some values of the axes, which are its title."""

    title: str
    cell: BestCell

    @property
    def chosen_from(self) -> str:
        """The number of cells that it was chosen from, in words."""
        finished, planned = self.cell.num_cells, self.cell.num_planned
        return f"best of {finished}" + (f" (of {planned})" if finished < planned else "")

    @property
    def training(self) -> Training:
        """The training settings of the cell."""
        cell = self.cell
        return Training(
            epochs=_count(cell.epochs),
            kept=_count(cell.kept_epoch),
            optimizer=cell.optimizer or "",
            rate="" if cell.learning_rate is None else format_value(cell.learning_rate),
            batch=_count(cell.batch_size),
            steps=_count(cell.steps_an_epoch),
            size="" if cell.image_size is None else f"{cell.image_size} px",
            parameters=_count(cell.num_parameters),
        )


class BestTable(NamedTuple):
    """The rows of one table; `heading` is None if there is only one table."""

    heading: str | None
    rows: list[BestRow]


class BestView(NamedTuple):
    """The best cells for the page; `scores` is metric -> display name, `tables` is title -> rows."""

    notes: list[str]
    scores: Mapping[str, str]
    tables: dict[str, list[BestRow]]


class Training(NamedTuple):
    """The training settings of a cell, each formatted for a table; "" for a missing value."""

    epochs: str
    kept: str
    optimizer: str
    rate: str
    batch: str
    steps: str
    size: str
    parameters: str

    def write_lines(self) -> str:
        """Return the values as lines of text for the terminal."""
        lines = (
            self.epochs
            and f"{self.epochs} {'epoch' if self.epochs == '1' else 'epochs'}{', kept ' + self.kept if self.kept else ''}",
            self.optimizer and f"{self.optimizer} {self.rate}",
            self.batch and f"batch {self.batch}{', ' + self.steps + ' steps' if self.steps else ''}",
            self.size,
            self.parameters and f"{self.parameters} parameters",
        )
        return "\n".join(filter(None, lines))


def group_best_rows(best: BestCells) -> list[BestTable]:
    """Return the best cells as tables: with two axes one table, with a heading, for each value of the second axis."""
    axes, groups, divided = best.axes, {}, len(best.axes) == 2
    for cell in best.table:
        heading = f"{axes[1]}: {cell.values[axes[1]] or '–'}" if divided else None
        groups.setdefault(heading, []).append(BestRow(_title(cell, axes[:1] if divided else axes), cell))
    return [BestTable(heading, rows) for heading, rows in groups.items()]


def describe_best_cells(best: BestCells | None) -> BestView | None:
    """Return the best cells for the page; None if the sweep has no `best_of`."""
    if best is None:
        return None
    tables = {
        f"{heading + ', ' if heading else ''}on {best.judged_on}": rows for heading, rows in group_best_rows(best)
    }
    notes = [*best.notes]
    if len(best.table) > MAX_ROWS:
        notes.append(f"The figures show the first {MAX_ROWS} of {len(best.table)} rows.")
    return BestView(notes, SCORES, tables)


def format_best_tables(best: BestCells | None) -> list[Table]:
    """Return the tables of the best cells for the terminal; an empty list if the sweep has no `best_of`."""
    from rich.table import Table

    tables = []
    for heading, rows in group_best_rows(best) if best else []:
        title = f"Best cells{', ' + heading if heading else ''}; chosen on validation, evaluated on {best.judged_on}"
        table = Table(title=title, show_lines=True)
        table.add_column("", overflow="fold")
        table.add_column("training", no_wrap=True)
        for words in SCORES.values():
            table.add_column(words, justify="right", overflow="fold")
        for row in rows:
            cell = row.cell
            seeds = f"\n{len(cell.seeds)} seeds" if len(cell.seeds) > 1 else ""
            estimates = [cell.get(metric) for metric in SCORES]
            scores = [f"{format_percent(estimate.value)}\n{format_interval(estimate)}" for estimate in estimates]
            scores[0] += f"\nn = {format_count(cell.accuracy.n)}"
            table.add_row(f"{row.title}\n{row.chosen_from}{seeds}", row.training.write_lines(), *scores)
        tables.append(table)
    return tables


def write_best_figures(folder: Path, best: BestCells | None, runs: Mapping[tuple[str, int | None], Path]) -> list[Path]:
    """Draw the scores and ROC curves of the best cells, at most `MAX_ROWS`; return the paths.

    Args:
        folder: the folder for the figures.
        best: from comparison.json.
        runs: (cell, seed) -> the member's run directory. The ROC curves are of each cell's first seed; a cell without
            stored predictions has none.
    """
    if best is None or not best.table:
        return []
    tables = _take_first(group_best_rows(best))
    shown = [BestRow(_title(row.cell, best.axes), row.cell) for table in tables for row in table.rows]
    which = f" (the first {len(shown)} of {len(best.table)} rows)" if len(shown) < len(best.table) else ""
    texts = [
        f"{title}: " + ", ".join(f"{words} {format_percent(cell.get(name).value)}" for name, words in SCORES.items())
        for title, cell in shown
    ]
    figure = draw_best_scores(tables if len(tables) <= _MAX_PANELS else [BestTable(None, shown)])
    title = f"The best cells{which} on {best.judged_on}, with 95 % intervals"
    drawn = [NamedFigure("best_scores", figure, title, f"On {best.judged_on}. {'; '.join(texts)}.")]
    panels = []
    for title, cell in shown:
        run = runs.get((cell.arm, cell.seeds[0]))
        path = None if run is None else run / "predictions" / f"{best.part}.npz"
        if path is not None and path.exists():
            panels.append((title, read_predictions(path)))
    return write_figures(folder, [*drawn, *_draw_rocs(panels, best.part, num_gone=len(shown) - len(panels))])


def _draw_rocs(panels: Sequence[tuple[str, Predictions]], split: str, *, num_gone: int) -> list[NamedFigure]:
    curves = [(title, compute_class_rocs(predictions)[1]) for title, predictions in panels]
    macros = [(title, macro) for title, macro in curves if macro is not None]
    if not macros:
        return []
    gone = f"; {num_gone} cells without predictions are left out" if num_gone else ""
    texts = [f"{title} {macro.area:.3f}" for title, macro in macros]
    return [
        NamedFigure(
            "best_macro_roc",
            draw_macro_rocs(macros),
            f"ROC on {split}: the mean over classes, of each best cell's first seed{gone}",
            f"Mean area under the ROC curves on {split}: {'; '.join(texts)}.",
        ),
        NamedFigure(
            "best_roc",
            draw_best_rocs(panels),
            f"ROC on {split}: each class against the rest, and their mean (grey), of each best cell's first seed{gone}",
            f"ROC curves of each class, by cell. Mean area: {'; '.join(texts)}.",
        ),
    ]


def draw_best_scores(tables: Sequence[BestTable]) -> Figure:
    """Draw accuracy, macro precision, recall and F1 of each row as bars with intervals, with a panel for each table."""
    width = 0.8 / len(SCORES)
    most = max(len(table.rows) for table in tables)
    room = 100 // most
    with figure_style():
        figure = new_figure(9, 0.5 + 3.1 * len(tables))
        for axes, (heading, rows) in zip(figure.subplots(len(tables), squeeze=False)[:, 0], tables, strict=True):
            for number, (name, words) in enumerate(SCORES.items()):
                estimates = [(place, row.cell.get(name)) for place, row in enumerate(rows)]
                estimates = [(place, estimate) for place, estimate in estimates if not is_missing(estimate.value)]
                places = [place + (number - (len(SCORES) - 1) / 2) * width for place, _ in estimates]
                values = [100 * estimate.value for _, estimate in estimates]
                look = {"color": COLOURS[number], "hatch": HATCHES[number]}
                axes.bar(places, values, width * 0.92, edgecolor="white", linewidth=0, label=words, **look)
                errors = np.array([get_errors(estimate) for _, estimate in estimates]).reshape(-1, 2).T
                axes.errorbar(places, values, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            axes.set_title(heading or "")
            axes.set_xticks(range(len(rows)), [_wrap(row.title, room) for row in rows])
            axes.set_xlim(-0.5, max(most, 2) - 0.5)
            axes.grid(visible=False, axis="x")
            axes.tick_params(axis="x", length=0, labelsize=8 if most > 3 else 10)
            axes.set_ylim(0, 100)
            axes.set_ylabel("%")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(SCORES))
    return figure


def draw_best_rocs(panels: Sequence[tuple[str, Predictions]]) -> Figure:
    """Draw a panel for each cell, with the ROC curve of each class against the rest, and their mean in grey."""
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
    """Draw the mean ROC curves of all cells in one panel, with their areas in the legend."""
    with figure_style():
        figure = new_figure(8.4, max(4.6, 1 + 0.26 * len(curves)))
        axes = figure.subplots()
        frame_roc(axes)
        for number, (title, macro) in enumerate(curves):
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
            axes.plot(macro.fpr, macro.tpr, linewidth=1.2, label=f"{_wrap(title, 40)}, {macro.area:.3f}", **look)
        figure.legend(title="mean area under the curve", loc="outside right upper", fontsize=8, title_fontsize=8)
    return figure


def _title(cell: BestCell, axes: Sequence[str]) -> str:
    """Return a cell's values of the axes as a title; values of dotted keys follow the shortened key."""
    words = [(f"{shorten_key(axis, axes)} " if "." in axis else "") + (cell.values[axis] or "–") for axis in axes]
    return ", ".join(words)


def _count(value: Mean) -> str:
    if value is None:
        return ""
    return format_count(value) if float(value).is_integer() else f"{value:,.1f}"


def get_errors(estimate: Estimate) -> tuple[float, float]:
    """Return the distances from the value to the interval's ends, in percentage points; 0 without an interval."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if is_missing(low) or is_missing(high):
        return 0.0, 0.0
    return 100 * max(0.0, value - low), 100 * max(0.0, high - value)


def _take_first(tables: Sequence[BestTable]) -> list[BestTable]:
    """Return the first tables, cut to `MAX_ROWS` rows in total."""
    left, taken = MAX_ROWS, []
    for heading, rows in tables:
        if left > 0:
            taken.append(BestTable(heading, rows[:left]))
            left -= len(rows)
    return taken


def _wrap(title: str, room: int) -> str:
    """Return a title wrapped to lines of `room` characters (at least 8); names may be broken at underscores."""
    return "\n".join(textwrap.wrap(title.replace("_", "_ "), max(8, room))).replace("_ ", "_")


SWEEP_FIGURES = ("ranking", "differences", "curves")
MAX_DRAWN = 30
"""Maximum number of cells or arms, the best ones, in the figures; the tables have all."""


def has_value(estimate: Estimate | None) -> bool:
    """Return whether an estimate has a value to draw."""
    return estimate is not None and not is_missing(estimate.value)


def list_drawn_pairs(comparison: ComparisonRecord) -> list[ArmPair]:
    """Return the pairs whose difference has a value and an interval."""
    ends = ((pair, pair.difference) for pair in comparison.paired)
    return [pair for pair, found in ends if not any(map(is_missing, (found.value, found.low, found.high)))]


def write_sweep_figures(folder: Path, comparison: ComparisonRecord) -> list[Path]:
    """Draw the ranking and the differences, if there are any; return the paths."""
    drawn, table, pairs = [], comparison.table[:MAX_DRAWN], list_drawn_pairs(comparison)[:MAX_DRAWN]
    which = f"the best {MAX_DRAWN} cells" if len(comparison.table) > MAX_DRAWN else "the cells"
    if table:
        texts = [f"{row.arm} {format_percent(row.validation.value)}" for row in table if row.validation]
        title = f"Accuracy of {which} with its 95 % interval, in the order of validation{_describe_sets(table)}"
        drawn.append(NamedFigure("ranking", draw_ranking(table), title, f"On validation: {'; '.join(texts)}."))
    if pairs:
        part, reference = pairs[0].part, pairs[0].a
        title = f"“{reference}” minus each cell on {part}, paired by image, with its 95 % interval, not corrected"
        text = " ".join(pair.sentence for pair in pairs)
        drawn.append(NamedFigure("differences", draw_sweep_differences(pairs), title, text))
    return write_figures(folder, drawn)


def draw_ranking(table: Sequence[ArmRow]) -> Figure:
    """Draw a row for each cell: its accuracy on validation and, below it, on test, each with its interval."""
    with figure_style():
        figure = new_figure(9, 1.3 + 0.42 * len(table))
        axes = figure.subplots()
        for number, (split, marker) in enumerate((("validation", "o"), ("test", "s"))):
            shown = [(place, row.get(split)) for place, row in enumerate(table) if has_value(row.get(split))]
            if not shown:
                continue
            places = [place + (0.17 if number else -0.17) for place, _ in shown]
            values = [100 * estimate.value for _, estimate in shown]
            errors = np.array([get_errors(estimate) for _, estimate in shown]).T
            look = {"fmt": marker, "color": COLOURS[number], "markersize": 5, "elinewidth": 1.4, "capsize": 2}
            axes.errorbar(values, places, xerr=errors, label=split, **look)
        name_rows(axes, [f"{row.arm} (set {row.image_set})" if row.image_set else row.arm for row in table])
        axes.set_xlabel("accuracy (%)")
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def draw_sweep_differences(pairs: Sequence[ArmPair]) -> Figure:
    """Draw the reference minus each cell as a dot with its interval, blue if significant after Holm's correction."""
    with figure_style():
        figure = new_figure(9, 1.2 + 0.36 * len(pairs))
        axes = figure.subplots()
        for place, pair in enumerate(pairs):
            value, low, high = pair.difference.value, pair.difference.low, pair.difference.high
            colour = COLOURS[0] if pair.is_significant else SOFT
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(value, place, "o", color=colour, markersize=6.5)
        axes.axvline(0, color=INK, linewidth=1)
        name_rows(axes, [pair.b for pair in pairs])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"percentage points: “{pairs[0].a}” minus the cell (blue: significant after Holm's correction)")
        axes.margins(x=0.08)
    return figure


def format_sweep_table(comparison: ComparisonRecord) -> Table:
    """Return a table of the cells for the terminal: the best on validation first, unfinished members last."""
    from rich.table import Table

    has_test = any(row.test for row in comparison.table)
    sets = _describe_sets(comparison.table)
    table = Table(title=f"Accuracy, its 95 % interval and the number of images; ranked on validation{sets}")
    for name in ("", "cell", "validation", "macro F1", *(["test"] if has_test else []), "a seed"):
        table.add_column(name, justify="left" if name == "cell" else "right", overflow="fold")
    for row in comparison.table:
        seeds = f"\n{len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
        test = [format_cell(row.test)] if has_test else []
        table.add_row(
            f"{row.rank}{f' (set {row.image_set})' if row.image_set else ''}",
            f"{row.arm}{seeds}",
            format_cell(row.validation),
            format_percent(row.validation_macro_f1),
            *test,
            format_duration(row.seconds),
        )
    unfinished = Counter((member.arm, member.status) for member in comparison.unfinished)
    for (arm, status), count in unfinished.items():
        table.add_row(
            "–", arm, status + (f", {count} seeds" if count > 1 else ""), "–", *(["–"] if has_test else []), "–"
        )
    return table


def _describe_sets(table: Sequence[ArmRow]) -> str:
    return " within each set of images" if any(row.image_set for row in table) else ""


def describe_best(comparison: ComparisonRecord) -> str | None:
    """Return the page's first sentences, on the best cell on validation and its accuracies; None without cells.

    Of several sets of validation images, the one with the most cells has a best cell, unless it has a single one.
    """
    if not comparison.table:
        return None
    best = comparison.table[0]
    num_cells = sum(row.image_set == best.image_set for row in comparison.table)
    if best.image_set is not None and num_cells == 1:
        return "No two cells were validated on the same images, so that none is the best."
    of_set = f" of the {num_cells} cells of set {best.image_set} of images" if best.image_set else ""
    text = f"Best on validation{of_set} by {SCORES.get(comparison.rank_by, comparison.rank_by)}: {best.arm}."
    for split, use in (("validation", "which selected it"), ("test", "which was not used for selection")):
        estimate = best.get(split)
        if estimate is not None:
            text += (
                f" {split.capitalize()} {format_percent(estimate.value)} (95 % {format_interval(estimate)}, "
                f"n = {format_count(estimate.n)}), {use}."
            )
    return text


CROSSVAL_FIGURES = ("folds", "differences")
CHOSEN = "each fold's own choice"
"""Name of the table row for which each fold uses the arm that is best on its own validation split."""
_MAX_FOLD_TABLES = 1


class PooledRow(NamedTuple):
    """A row of the table of pooled accuracies.

    Attributes:
        name: of the arm, or CHOSEN.
        validation: mean accuracy over folds, in 0..1; None for CHOSEN.
        found: its pooled results.
    """

    name: str
    validation: float | None
    found: CrossValidated


def list_pooled_rows(comparison: ComparisonRecord) -> list[PooledRow]:
    """Return a row for each arm, the best on validation first, and one for each fold's own choice of arm."""
    rows = [
        PooledRow(row.arm, None if row.validation is None else row.validation.value, row.cross_validated)
        for row in comparison.table
        if row.cross_validated is not None
    ]
    return rows + ([] if comparison.chosen is None else [PooledRow(CHOSEN, None, comparison.chosen)])


def format_folds_tables(comparison: ComparisonRecord) -> list[Table]:
    """Return the tables for the terminal: the folds, if there is only one arm, and the pooled accuracies."""
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
    if len(comparison.table) > _MAX_FOLD_TABLES or not rows:
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
    """Draw the folds of each arm, and the differences, if there are any; return the paths."""
    drawn, pairs = [], list_drawn_pairs(comparison)[:MAX_DRAWN]
    rows = [row for row in list_pooled_rows(comparison) if has_value(row.found.trained)][:MAX_DRAWN]
    if rows:
        texts = [f"{row.name} {format_percent(row.found.recipe.value)}" for row in rows]
        title = "Pooled accuracy with the 95 % interval of the recipe (thin) and of the trained models (thick); dots are folds"
        drawn.append(NamedFigure("folds", draw_folds(rows), title, f"Pooled accuracy: {'; '.join(texts)}."))
    if pairs:
        title = f"Difference from “{pairs[0].a}” over folds, with its 95 % interval, not corrected"
        drawn.append(
            NamedFigure("differences", draw_sweep_differences(pairs), title, " ".join(pair.sentence for pair in pairs))
        )
    return write_figures(folder, drawn)


def draw_folds(rows: Sequence[PooledRow]) -> Figure:
    """Draw a row for each arm: the accuracy of each fold, the pooled accuracy, and its two intervals."""
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
