"""report.html of an ablation, a sweep or a cross-validation: the table, paired differences, and the members' curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.errors import ModelError
from dlfer.metrics.learned import DID_NOT_LEARN, list_verdicts
from dlfer.metrics.paired import describe_difference, format_points
from dlfer.report.curves import draw_line, finish_epoch_axis, read_series
from dlfer.report.figures import (
    COLOURS,
    HATCHES,
    INK,
    SOFT,
    NamedFigure,
    figure_style,
    name_rows,
    new_figure,
    stamp_banner,
    write_figures,
)
from dlfer.report.page import (
    describe_environment,
    describe_run,
    format_cell,
    format_command,
    format_count,
    format_percent,
    format_value,
    get_name,
    load_figures,
    read_text,
    render_page,
)
from dlfer.report.sweep import (
    BEST_FIGURES,
    CROSSVAL_FIGURES,
    SWEEP_FIGURES,
    describe_best,
    describe_best_cells,
    get_errors,
    has_value,
    list_drawn_pairs,
    list_pooled_rows,
    write_best_figures,
    write_crossval_figures,
    write_sweep_figures,
)
from dlfer.runs.comparison_record import ArmPair, ComparisonRecord, ModelComparison
from dlfer.runs.member_rows import MemberRow, read_member_rows
from dlfer.runs.metrics_record import SUBJECTS_BANNER, Metrics
from dlfer.runs.records import RunRecord
from dlfer.runs.run_records import Epoch, read_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SPLITS = ("train", "validation", "test")
_MAX_NAMED = 8

FIGURES = ("accuracies", "differences", "curves")
_MAX_CURVES = 6
"""Maximum number of arms, the best, whose curves a sweep or cross-validation draws: more cannot be distinguished."""


@dataclass(frozen=True)
class ReportedMember:
    """A member of a comparison, for the page.

    Attributes:
        row: its row of members.csv.
        folder: of its run; None before it has started.
        link: relative address of the run's report; None if there is no report.
    """

    row: MemberRow
    folder: Path | None
    link: str | None

    @property
    def name(self) -> str:
        """The name of the run in the table."""
        return "–" if self.folder is None else self.folder.name


def write_comparison_report(path: Path, *, ending: Mapping[str, Any] | None = None) -> Path:
    """Draw the figures of a comparison and write its report.html; return the page's path.

    Args:
        path: a comparison's directory with run.json, members.csv and comparison.json. The curves come
            from the members' own directories; members whose directory is missing have none.
        ending: the final `status` and `finished` of run.json, which is updated only after the page is written.

    Raises:
        ModelError: the folder is not that of a comparison, or one of its files is damaged.
    """
    path = Path(path)
    run, comparison = RunRecord.read(path), read_comparison(path)
    if run is None or comparison is None:
        missing = RunRecord.FILE if run is None else ComparisonRecord.FILE
        raise ModelError(f"{path}: found no {missing}; expected the directory of a comparison that has begun.")
    run = run.model_copy(update=dict(ending or {}))
    members = read_members(path)
    names = _write_figures(path, comparison, members, kind=run.kind)
    config_text = read_text(path / "config.yaml")
    warnings = _collect_warnings(run, members)
    context: dict[str, Any] = {
        "name": get_name(path, run),
        "kind": "ablation" if run.kind == "run" else run.kind.replace("_", "-"),
        "subtitle": describe_run(path, run),
        "warnings": warnings,
        "comparison": comparison,
        "verdicts": list_verdicts(comparison.paired),
        "arm_keys": [
            row.model_copy(update={"values": {arm: format_value(value) for arm, value in row.values.items()}})
            for row in comparison.arm_keys
        ],
        "splits": title_splits(comparison),
        "figures": load_figures(path / "figures", names),
        "notes": [note for note in comparison.notes if note not in warnings],
        "members": members,
        "has_folds": any(member.row.fold is not None for member in members),
        "command": format_command(run),
        "environment": describe_environment(run),
        "config": config_text,
    }
    if run.kind == "cross_validation":
        context["pooled"] = list_pooled_rows(comparison)
        return render_page("crossval.html.j2", path / "report.html", context)
    if run.kind != "sweep":
        return render_page("comparison.html.j2", path / "report.html", context)
    context |= {"best": describe_best(comparison), "best_cells": describe_best_cells(comparison.best_of)}
    context |= {
        "describe_required_sample_size": describe_required_sample_size,
        "drawn_pairs": list_drawn_pairs(comparison),
    }
    return render_page("sweep.html.j2", path / "report.html", context)


def write_models_page(path: Path, comparison: ModelComparison) -> Path:
    """Write the result of `dlfer compare` as a self-contained page; return its path."""
    context = {"comparison": comparison, "pairs": [*comparison.pairs, *comparison.system_pairs]}
    return render_page("models.html.j2", Path(path), context)


def read_comparison(path: Path) -> ComparisonRecord | None:
    """Return the comparison.json of a folder, with sentences for pairs that have none; None if there is no file.

    Raises:
        ModelError: the file is damaged.
    """
    comparison = ComparisonRecord.read(path)
    if comparison is None:
        return None
    known = list_drawn_pairs(comparison)
    pairs = [
        pair.model_copy(update={"sentence": describe_difference(pair)})
        if not pair.sentence and pair in known and len(pair.names) == 2 and pair.p_value is not None
        else pair
        for pair in comparison.paired
    ]
    return comparison.model_copy(update={"paired": pairs})


def describe_required_sample_size(pair: ArmPair) -> str:
    """Return how many images or seeds would detect the observed difference; "" if it is significant or unknown."""
    if pair.is_significant or pair.not_learned:
        return ""
    if pair.scope == "models":
        # required_n is at most n if only the correction for multiple comparisons made the difference insignificant.
        is_known = pair.required_n is not None and not (pair.n is not None and pair.required_n <= pair.n)
        return f"{format_count(pair.required_n)} images" if is_known else ""
    more = pair.more
    if more is None:
        return ""
    counts = ((more.seeds, "seeds"), (more.images, "images"))
    ways = [f"{format_count(number)} {what}" for number, what in counts if number]
    if more.both:
        ways.append(f"{format_count(more.both.seeds)} seeds and {format_count(more.both.images)} images")
    return " or ".join(ways)


def read_members(path: Path) -> list[ReportedMember]:
    """Return the rows of members.csv of a comparison.

    A member's directory is searched for at its recorded path, then near the comparison, as both may have been moved.
    """
    members = []
    for row in read_member_rows(path):
        folder = row.find_folder(path) or (Path(row.path) if row.path else None)
        report = None if folder is None else folder / "report.html"
        has_report = report is not None and os.path.exists(report)
        link = Path(os.path.relpath(report, path)).as_posix() if has_report else None
        members.append(ReportedMember(row, folder, link))
    return members


def _write_figures(
    path: Path, comparison: ComparisonRecord, members: Sequence[ReportedMember], *, kind: str
) -> tuple[str, ...]:
    """Draw the figures of the page, add the members' banners to them, and return their names."""
    best = [row.arm for row in comparison.table[:_MAX_CURVES]]
    if kind == "cross_validation":
        names: tuple[str, ...] = (*CROSSVAL_FIGURES, "curves")
        write_crossval_figures(path / "figures", comparison)
        _write_curves(path / "figures", [member for member in members if member.row.arm in best])
    elif kind == "sweep":
        names = (*SWEEP_FIGURES, *BEST_FIGURES)
        write_sweep_figures(path / "figures", comparison)
        folders = {(member.row.arm, member.row.seed): member.folder for member in members if member.folder is not None}
        write_best_figures(path / "figures", comparison.best_of, folders)
        _write_curves(path / "figures", [member for member in members if member.row.arm in best])
    else:
        names = FIGURES
        write_comparison_figures(path, comparison, members)
    stamp_banner(path / "figures", names, " ".join(_collect_banners(members)) or None)
    return names


def write_comparison_figures(path: Path, comparison: ComparisonRecord, members: Sequence[ReportedMember]) -> list[Path]:
    """Draw the accuracies, paired differences and members' curves for which there are data; return the paths."""
    drawn = []
    if comparison.table:
        texts = [
            f"{row.arm}: "
            + ", ".join(f"{split} {format_percent(row.get(split).value)}" for split in SPLITS if row.get(split))
            for row in comparison.table
        ]
        title = "Accuracy of each arm with its 95 % interval"
        text = f"Accuracy of each arm. {'; '.join(texts)}."
        drawn.append(NamedFigure("accuracies", draw_accuracies(comparison), title, text))
    pairs = list_drawn_pairs(comparison)
    if pairs:
        title = "Difference of accuracy with its 95 % interval; the line marks no difference"
        text = " ".join(pair.sentence for pair in pairs)
        drawn.append(NamedFigure("differences", draw_differences(pairs), title, text))
    return write_figures(path / "figures", drawn) + _write_curves(path / "figures", members)


def _write_curves(figures: Path, members: Sequence[ReportedMember]) -> list[Path]:
    histories = [
        (member.row.arm, read_history(member.folder / "finetune" / "history.csv"))
        for member in members
        if member.folder is not None
    ]
    histories = [(arm, rows) for arm, rows in histories if rows]
    if not histories:
        return []
    title = "Loss and accuracy of EF-FER2 over the epochs; validation is solid, training is thin and dashed"
    text = f"Loss and accuracy over the epochs of {len(histories)} trainings, coloured by arm."
    return write_figures(figures, [NamedFigure("curves", draw_curves(histories), title, text)])


def draw_accuracies(comparison: ComparisonRecord) -> Figure:
    """Draw a bar for each arm and split, with its interval and value."""
    titles = title_splits(comparison)
    table = comparison.table
    width = 0.8 / len(table)
    with figure_style():
        figure = new_figure(9, 3.8)
        axes = figure.subplots()
        for number, row in enumerate(table):
            shown = [(place, row.get(split)) for place, split in enumerate(titles) if has_value(row.get(split))]
            places = [place + (number - (len(table) - 1) / 2) * width for place, _ in shown]
            values = np.array([100 * estimate.value for _, estimate in shown])
            look = {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}
            axes.bar(places, values, width * 0.92, edgecolor="white", linewidth=0, label=row.arm, **look)
            errors = np.array([get_errors(estimate) for _, estimate in shown]).reshape(-1, 2).T
            axes.errorbar(places, values, yerr=errors, fmt="none", ecolor=INK, elinewidth=1.3, capsize=4)
            for place, value, high in zip(places, values, values + errors[1], strict=True):
                axes.text(place, high + 1.5, f"{value:.1f}", ha="center", va="bottom", fontsize=9.5)
        axes.set_xticks(range(len(titles)), [title.replace(" (", "\n(") for title in titles.values()])
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("accuracy (%)")
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_differences(paired: Sequence[ArmPair]) -> Figure:
    """Draw each paired difference as a dot with its interval, and a vertical line at zero."""
    with figure_style():
        figure = new_figure(5.5, 1.1 + 0.5 * len(paired))
        axes = figure.subplots()
        for place, pair in enumerate(paired):
            difference = pair.difference
            colour = COLOURS[0] if pair.is_significant else SOFT
            ends = [difference.low, difference.high]
            axes.plot(ends, [place, place], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(difference.value, place, "o", color=colour, markersize=8)
            text, at = format_points(difference.value), (difference.value, place)
            axes.annotate(text, at, (0, 8), textcoords="offset points", ha="center")
        axes.axvline(0, color=INK, linewidth=1)
        name_rows(axes, [f"{pair.a}\nminus {pair.b}" for pair in paired], below=0.5)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("percentage points of accuracy")
        axes.margins(x=0.1)
    return figure


def draw_curves(histories: Sequence[tuple[str, Sequence[Epoch]]]) -> Figure:
    """Draw the loss and accuracy curves of several trainings in two panels, coloured by arm.

    Args:
        histories: (arm, epochs) of each member.
    """
    arms = list(dict.fromkeys(arm for arm, _ in histories))
    with figure_style():
        figure = new_figure(9, 3.7)
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            percent, named = name == "accuracy", set()
            for arm, rows in histories:
                number, label = arms.index(arm), None if arm in named else arm
                named.add(arm)
                draw_line(axes, *read_series(rows, f"validation_{name}"), number=number, label=label, percent=percent)
                epochs, values = read_series(rows, f"train_{name}")
                shown = [100 * value if percent else value for value in values]
                axes.plot(epochs, shown, "--", color=COLOURS[number % len(COLOURS)], linewidth=0.9, alpha=0.8)
            axes.set_title(name.capitalize() + (" (%)" if percent else ""))
            finish_epoch_axis(axes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def format_comparison_table(comparison: ComparisonRecord) -> Table:
    """Return the paper's table for the terminal: accuracy of each arm in training, validation and test.

    Example:
        >>> rich.print(format_comparison_table(ComparisonRecord.require(path)))
    """
    from rich.table import Table

    table = Table(title="Accuracy, its 95 % interval, and the number of images", show_lines=True)
    table.add_column("arm")
    titles = title_splits(comparison)
    for title in titles.values():
        table.add_column(title, justify="right")
    for row in comparison.table:
        seeds = f"\n{len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
        table.add_row(f"{row.arm}{seeds}", *(format_cell(row.get(split)) for split in titles))
    return table


def title_splits(comparison: ComparisonRecord) -> dict[str, str]:
    """Return the splits that any arm has, with titles; validation's is `judged_on` if the arms are compared on it."""
    judged_on = comparison.judged_on or ""
    titles = {split: split for split in SPLITS if any(row.get(split) for row in comparison.table)}
    if "validation" in titles and judged_on.startswith("validation"):
        titles["validation"] = judged_on
    return titles


def _collect_warnings(run: RunRecord, members: Sequence[ReportedMember]) -> list[str]:
    """Return the distinct warnings of a comparison and its members, with one for all trainings that did not learn."""
    texts, failed = [*run.warnings, *_collect_banners(members)], []
    for member in members:
        record = None if member.folder is None else RunRecord.read(member.folder)
        for warning in [] if record is None else record.warnings:
            if warning.startswith(DID_NOT_LEARN):
                failed.append(f"{member.row.arm}, seed {member.row.seed}")
            else:
                texts.append(warning)
    if failed:
        more = f"; and {len(failed) - _MAX_NAMED} more" if len(failed) > _MAX_NAMED else ""
        texts.append(
            f"Trainings that did not learn: {len(failed)} of {len(members)} ({'; '.join(failed[:_MAX_NAMED])}{more}). The "
            "report of each says why."
        )
    return list(dict.fromkeys(texts))


def _collect_banners(members: Sequence[ReportedMember]) -> list[str]:
    """Return the distinct banners of the members."""
    found = [Metrics.read(member.folder) for member in members if member.folder is not None]
    # A cross-validation counts subjects itself.
    return list(
        dict.fromkeys(
            metrics.banner
            for metrics in found
            if metrics is not None
            and metrics.banner
            and not (metrics.protocol == "cross_validation" and metrics.banner == SUBJECTS_BANNER)
        )
    )
