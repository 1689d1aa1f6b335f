"""report.html of an ablation or a sweep: the table, paired differences, and the members' curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.errors import ModelError
from dlfer.metrics.paired import describe_difference
from dlfer.report.best_cells import BEST_FIGURES, describe_best_cells, write_best_figures
from dlfer.report.curves import draw_line, finish_epoch_axis, read_series
from dlfer.report.figures import COLOURS, HATCHES, INK, SOFT, figure_style, new_figure, stamp_banner, write_figure
from dlfer.report.keys import format_value
from dlfer.report.page import (
    format_count,
    format_interval,
    format_percent,
    load_figures,
    read_json,
    read_rows,
    render_page,
)
from dlfer.report.record import describe_environment, describe_run, format_command, get_name, read_text
from dlfer.report.sweep import SWEEP_FIGURES, describe_best, write_sweep_figures
from dlfer.runs.member_rows import read_member_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

PARTS = ("train", "validation", "test")
_MOST_CURVES = 6
"""More curves in one figure cannot be distinguished; of a sweep those of the best cells are drawn."""
FIGURES = ("accuracies", "differences", "curves")
FORMER_SEEDS = (
    "The intervals over several seeds are those of an earlier version of dlfer, and too narrow. Compute them again with "
    "--resume."
)


def write_comparison_report(path: Path) -> Path:
    """Draw the figures of a comparison and write its report.html; return the page's path.

    Args:
        path: a comparison's directory with run.json, members.csv and comparison.json. The curves come
            from the members' own directories; those that are gone are left out.

    Raises:
        ModelError: the folder is no comparison, or one of its files is damaged.
    """
    path = Path(path)
    run, comparison = read_json(path / "run.json"), read_json(path / "comparison.json")
    if run is None or comparison is None:
        missing = "run.json" if run is None else "comparison.json"
        raise ModelError(f"{path}: found no {missing}; expected the directory of a comparison that has begun.")
    comparison = upgrade_comparison(comparison)
    members, is_sweep = read_members(path), run.get("kind") == "sweep"
    if is_sweep:
        write_sweep_figures(path / "figures", comparison)
        write_best_figures(path / "figures", comparison.get("best_of"), members)
        best = [row["arm"] for row in comparison["table"][:_MOST_CURVES]]
        _write_curves(path / "figures", [member for member in members if member["arm"] in best])
    else:
        write_comparison_figures(path, comparison, members)
    names = (*SWEEP_FIGURES, *BEST_FIGURES) if is_sweep else FIGURES
    stamp_banner(path / "figures", names, " ".join(_collect_banners(members)) or None)
    config_text = read_text(path / "config.yaml")
    warnings = _collect_warnings(run, members)
    context = {
        "name": get_name(path, config_text),
        "kind": run.get("kind") or "ablation",
        "subtitle": describe_run(path, run),
        "warnings": warnings,
        "paired": comparison["paired"],
        "table": comparison["table"],
        "arm_keys": [
            {"key": row["key"], "values": {arm: format_value(value) for arm, value in row["values"].items()}}
            for row in comparison["arm_keys"]
        ],
        "parts": [{"key": part, "title": title} for part, title in _title_parts(comparison).items()],
        "figures": load_figures(path / "figures", names),
        "notes": [note for note in comparison["notes"] if note not in warnings],
        "members": members,
        "command": format_command(run),
        "environment": describe_environment(run),
        "config": config_text,
    }
    if not is_sweep:
        return render_page("comparison.html.j2", path / "report.html", context)
    context |= {key: comparison[key] for key in ("rank_by", "judged_on", "unfinished")}
    context |= {"best": describe_best(comparison), "best_cells": describe_best_cells(comparison.get("best_of"))}
    return render_page("sweep.html.j2", path / "report.html", context)


def upgrade_comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return comparison.json with what this version adds to each pair: "not_learned", "scope" and "needed".

    A record of an earlier version has neither the first two nor the interval of Student's t. The sentence of a pair of
    single seeds is written anew; one over several seeds keeps its sentence, and a note says that it is too confident.
    """
    pairs, notes = [], list(comparison["notes"])
    for pair in comparison["paired"]:
        new = {"not_learned": [], **pair}
        if "scope" not in pair and pair.get("num_seeds", 1) == 1:
            new["scope"] = "models"
            new["sentence"] = describe_difference(new)
        elif "scope" not in pair:
            new |= {"scope": "recipes", "more": None}
            if FORMER_SEEDS not in notes:
                notes.append(FORMER_SEEDS)
        new["needed"] = describe_needed(new)
        pairs.append(new)
    return {"arm_keys": [], **comparison, "paired": pairs, "notes": notes}


def describe_needed(pair: Mapping[str, Any]) -> str:
    """Return in a few words what would detect a difference as large as the observed one; "" where it was detected."""
    if pair["is_larger_than_chance"] or pair["not_learned"]:
        return ""
    if pair["scope"] == "models":
        return "" if pair["required_n"] is None else f"{format_count(pair['required_n'])} images"
    more = pair["more"] or {}
    seeds, images, both = (more.get(key) for key in ("seeds", "images", "both"))
    ways = [f"{format_count(number)} {what}" for number, what in ((seeds, "seeds"), (images, "images")) if number]
    if both:
        ways.append(f"{format_count(both['seeds'])} seeds and {format_count(both['images'])} images")
    return " or ".join(ways)


def read_members(path: Path) -> list[dict[str, Any]]:
    """Return the rows of members.csv, with "name", "folder" and "link".

    A member is looked for where members.csv says, else beside the comparison, so that a folder of runs
    may be moved. "link" is the relative address of its report, None where there is none.
    """
    members = []
    for row in read_member_rows(path):
        folder = row.find_folder(path) or (Path(row.path) if row.path else None)
        report = folder / "report.html" if folder is not None else None
        has_report = report is not None and report.exists()
        link = Path(os.path.relpath(report, path)).as_posix() if has_report else None
        name = folder.name if folder is not None else "–"
        members.append({**row.model_dump(), "folder": folder, "name": name, "link": link})
    return members


def write_comparison_figures(
    path: Path, comparison: Mapping[str, Any], members: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Draw accuracies, paired differences and the members' curves, as far as the files allow; return the paths."""
    figures, written = path / "figures", []
    if comparison["table"]:
        texts = [
            f"{row['arm']}: "
            + ", ".join(f"{part} {format_percent(row[part]['value'])}" for part in PARTS if row.get(part))
            for row in comparison["table"]
        ]
        written.append(
            write_figure(
                draw_accuracies(comparison),
                figures / "accuracies.png",
                title="Accuracy of each arm with its 95 % interval",
                description=f"Accuracy of each arm. {'; '.join(texts)}.",
            )
        )
    with_difference = [pair for pair in comparison["paired"] if pair.get("difference")]
    if with_difference:
        written.append(
            write_figure(
                draw_differences(with_difference),
                figures / "differences.png",
                title="Difference of accuracy with its 95 % interval; the line is no difference",
                description=" ".join(pair["sentence"] for pair in with_difference),
            )
        )
    written += _write_curves(figures, members)
    return written


def _write_curves(figures: Path, members: Sequence[Mapping[str, Any]]) -> list[Path]:
    histories = [
        (member["arm"], read_rows(member["folder"] / "finetune" / "history.csv"))
        for member in members
        if member["folder"] is not None
    ]
    histories = [(arm, rows) for arm, rows in histories if rows]
    if not histories:
        return []
    arms = dict.fromkeys(arm for arm, _ in histories)
    return [
        write_figure(
            draw_curves(histories),
            figures / "curves.png",
            title=f"EF-FER2 of {'; '.join(arms)}: validation is solid, training is thin and dashed",
            description=f"Loss and accuracy over the epochs of {len(histories)} trainings, coloured by arm.",
        )
    ]


def draw_accuracies(comparison: Mapping[str, Any]) -> Figure:
    """Draw a bar for each arm and part, with interval and value."""
    titles = _title_parts(comparison)
    table = comparison["table"]
    width = 0.8 / len(table)
    with figure_style():
        figure = new_figure(9, 3.8)
        axes = figure.subplots()
        for number, row in enumerate(table):
            shown = [(place, row[part]) for place, part in enumerate(titles) if row.get(part)]
            places = [place + (number - (len(table) - 1) / 2) * width for place, _ in shown]
            values = np.array([100 * cell["value"] for _, cell in shown])
            spans = np.array([[100 * cell["low"], 100 * cell["high"]] for _, cell in shown]).reshape(-1, 2)
            look = {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}
            axes.bar(places, values, width * 0.92, edgecolor="white", linewidth=0, label=row["arm"], **look)
            errors = np.abs(spans.T - values)
            axes.errorbar(places, values, yerr=errors, fmt="none", ecolor=INK, elinewidth=1.3, capsize=4)
            for place, value, high in zip(places, values, spans[:, 1], strict=True):
                axes.text(place, high + 1.5, f"{value:.1f}", ha="center", va="bottom", fontsize=9.5)
        axes.set_xticks(range(len(titles)), [title.replace(" (", "\n(") for title in titles.values()])
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("accuracy (%)")
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_differences(paired: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each paired difference as a dot with its interval, beside the line of no difference."""
    with figure_style():
        figure = new_figure(5.5, 1.1 + 0.5 * len(paired))
        axes = figure.subplots()
        for place, pair in enumerate(paired):
            value, low, high = (pair["difference"][key] for key in ("value", "low", "high"))
            colour = COLOURS[0] if pair["is_larger_than_chance"] else SOFT
            axes.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(value, place, "o", color=colour, markersize=8)
            axes.annotate(f"{value:+.1f}", (value, place), (0, 8), textcoords="offset points", ha="center")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(paired)), [f"{pair['a']}\nminus {pair['b']}" for pair in paired])
        axes.set_ylim(len(paired) - 0.5, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("percentage points of accuracy")
        axes.margins(x=0.1)
    return figure


def draw_curves(histories: Sequence[tuple[str, Sequence[Mapping[str, str]]]]) -> Figure:
    """Draw loss and accuracy of several trainings into the same two panels, coloured by arm.

    Args:
        histories: (arm, rows of its history.csv) of each member.
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


def format_comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Return the paper's table for the terminal: accuracy of each arm in training, validation and test.

    Example:
        >>> rich.print(format_comparison_table(read_json(path / "comparison.json")))
    """
    from rich.table import Table

    table = Table(title="Accuracy, its 95 % interval, and the number of images", show_lines=True)
    table.add_column("arm")
    titles = _title_parts(comparison)
    for title in titles.values():
        table.add_column(title, justify="right")
    for row in comparison["table"]:
        seeds = f"\n{len(row['seeds'])} seeds" if len(row["seeds"]) > 1 else ""
        table.add_row(f"{row['arm']}{seeds}", *(_format_cell(row.get(part)) for part in titles))
    return table


def _collect_warnings(run: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the comparison and its members warn of, each sentence once."""
    texts = [*run.get("warnings", []), *_collect_banners(members)]
    for member in members:
        if member["folder"] is not None:
            texts.extend((read_json(member["folder"] / "run.json") or {}).get("warnings", []))
    return list(dict.fromkeys(texts))


def _collect_banners(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the banners of the members, each once."""
    found = [read_json(member["folder"] / "metrics.json") or {} for member in members if member["folder"] is not None]
    return list(dict.fromkeys(metrics["banner"] for metrics in found if metrics.get("banner")))


def _format_cell(figure: Mapping[str, Any] | None) -> str:
    if not figure:
        return "–"
    return f"{format_percent(figure['value'])}\n{format_interval(figure)}\nn = {format_count(figure['n'])}"


def _title_parts(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts that some arm has, with their titles; validation says so if it selected and judged."""
    judged_on = comparison.get("judged_on") or ""
    titles = {part: part for part in PARTS if any(row.get(part) for row in comparison["table"])}
    if "validation" in titles and judged_on.startswith("validation"):
        titles["validation"] = judged_on
    return titles
