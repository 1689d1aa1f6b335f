"""Figures and tables of a sweep: its cells ranked on validation, and each compared with one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlfer.report.best_cells import SCORES
from dlfer.report.figures import COLOURS, INK, SOFT, figure_style, new_figure, write_figure
from dlfer.report.page import format_count, format_interval, format_percent
from dlfer.runs.comparison_record import ArmPair, ArmRow, ComparisonRecord
from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.wording import format_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SWEEP_FIGURES = ("ranking", "differences", "curves")
MOST_DRAWN = 30
"""The figures show at most this many cells, the best ones; the tables have all."""


def write_sweep_figures(folder: Path, comparison: ComparisonRecord) -> list[Path]:
    """Draw the ranking and the differences as far as there are any; return the paths."""
    written, table, pairs = [], comparison.table[:MOST_DRAWN], comparison.paired[:MOST_DRAWN]
    which = f"the best {MOST_DRAWN} cells" if len(comparison.table) > MOST_DRAWN else "the cells"
    if table:
        texts = [f"{row.arm} {format_percent(row.validation.value)}" for row in table]
        written.append(
            write_figure(
                draw_ranking(table),
                folder / "ranking.png",
                title=f"Accuracy of {which} with its 95 % interval, in the order of validation",
                description=f"On validation: {'; '.join(texts)}.",
            )
        )
    if pairs:
        written.append(
            write_figure(
                draw_sweep_differences(pairs),
                folder / "differences.png",
                title=f"Difference on {pairs[0].part} from “{pairs[0].a}”, paired by image, with its 95 % interval, not corrected",
                description=" ".join(pair.sentence for pair in pairs),
            )
        )
    return written


def draw_ranking(table: Sequence[ArmRow]) -> Figure:
    """Draw a row for each cell: its accuracy on validation and, below it, on test, each with its interval."""
    with figure_style():
        figure = new_figure(9, 1.3 + 0.42 * len(table))
        axes = figure.subplots()
        for number, (split, marker) in enumerate((("validation", "o"), ("test", "s"))):
            shown = [(place, row.get(split)) for place, row in enumerate(table) if row.get(split)]
            if not shown:
                continue
            places = [place + (0.17 if number else -0.17) for place, _ in shown]
            values = [100 * estimate.value for _, estimate in shown]
            below = [100 * max(0.0, estimate.value - estimate.low) for _, estimate in shown]
            above = [100 * max(0.0, estimate.high - estimate.value) for _, estimate in shown]
            look = {"fmt": marker, "color": COLOURS[number], "markersize": 5, "elinewidth": 1.4, "capsize": 2}
            axes.errorbar(values, places, xerr=[below, above], label=split, **look)
        axes.set_yticks(range(len(table)), [row.arm for row in table])
        axes.set_ylim(len(table) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy (%)")
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def draw_sweep_differences(pairs: Sequence[ArmPair]) -> Figure:
    """Draw each cell minus the reference as a dot with its interval, coloured where it is significant after Holm."""
    with figure_style():
        figure = new_figure(9, 1.2 + 0.36 * len(pairs))
        axes = figure.subplots()
        for place, pair in enumerate(pairs):
            # The pair is reference minus cell; here the cell is read against the reference.
            value, low, high = -pair.difference.value, -pair.difference.high, -pair.difference.low
            colour = COLOURS[0] if pair.is_significant else SOFT
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(value, place, "o", color=colour, markersize=6.5)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(pairs)), [pair.b for pair in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(
            f"percentage points of accuracy from “{pairs[0].a}” (blue: significant after Holm's correction)"
        )
        axes.margins(x=0.08)
    return figure


def format_sweep_table(comparison: ComparisonRecord) -> Table:
    """Return the cells for the terminal: the best on validation first, and what did not finish last."""
    from rich.table import Table

    has_test = any(row.test for row in comparison.table)
    table = Table(title="Accuracy, its 95 % interval and the number of images; ranked on validation")
    for name in ("", "cell", "validation", "macro F1", *(["test"] if has_test else []), "a seed"):
        table.add_column(name, justify="left" if name == "cell" else "right", overflow="fold")
    for row in comparison.table:
        seeds = f"\n{len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
        test = [format_cell(row.test)] if has_test else []
        table.add_row(
            str(row.rank),
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


def describe_best(comparison: ComparisonRecord) -> str | None:
    """Return the sentence that the page begins with: the best cell on validation and what it reaches on test."""
    if not comparison.table:
        return None
    best = comparison.table[0]
    text = f"Best on validation by {SCORES[comparison.rank_by]}: {best.arm}."
    for split, use in (("validation", "which chose it"), ("test", "which chose nothing")):
        estimate = best.get(split)
        if estimate is not None:
            text += (
                f" {split.capitalize()} {format_percent(estimate.value)} (95 % {format_interval(estimate)}, "
                f"n = {format_count(estimate.n)}), {use}."
            )
    return text


def format_cell(estimate: CountedEstimate | None) -> str:
    """Return a value, its interval and its n in three lines; a dash where there is none."""
    if estimate is None:
        return "–"
    return f"{format_percent(estimate.value)}\n{format_interval(estimate)}\nn = {format_count(estimate.n)}"
