"""report.html of a search: leaderboard, parallel coordinates, what each key told, history."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer.errors import ModelError
from dlfer.metrics.importance import FEWEST, compute_importance
from dlfer.report.comparison import upgrade_comparison, write_comparison_figures
from dlfer.report.figures import write_figure
from dlfer.report.keys import format_overrides, format_value, shorten_key
from dlfer.report.page import load_figures, read_json, render_page
from dlfer.report.record import describe_environment, describe_run, format_command, get_name, read_config, read_text
from dlfer.report.search_figures import draw_coordinates, draw_history, draw_importance
from dlfer.runs.member_rows import MEMBERS_FILE, read_member_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMER_TRIALS_FILE = "trials.json"
ALONE = "search"
"""Name of the arm of a search that has but one."""
FIGURES = ("coordinates", "importance", "history")
STATES = {
    "finished": "finished",
    "rung": "ended with its rung",
    "pruned": "pruned",
    "failed": "failed",
    "running": "under way",
    "waiting": "interrupted",
}


def write_search_report(path: Path) -> Path:
    """Draw the figures of a search and write its report.html; return the page's path.

    Args:
        path: a search's directory with run.json, config.yaml and members.csv; comparison.json where the winners were
            compared.

    Raises:
        ModelError: the folder is no search, or one of its files is damaged.
    """
    path = Path(path)
    run, config_text = read_json(path / "run.json"), read_text(path / "config.yaml")
    trials = read_trials(path, config_text)
    if run is None or trials is None:
        missing = "run.json" if run is None else MEMBERS_FILE
        raise ModelError(f"{path}: found no {missing}; expected the directory of a search that has begun.")
    comparison = read_json(path / "comparison.json")
    if comparison is not None:
        comparison = upgrade_comparison(comparison)
        write_comparison_figures(path, comparison, [])
    context = {
        "name": get_name(path, config_text),
        "subtitle": describe_run(path, run),
        "warnings": _collect_warnings(run),
        "figure": trials["figure"],
        "arms": [_describe_arm(path, trials, arm) for arm in trials["arms"]],
        "fewest": FEWEST,
        "comparison": None if comparison is None else _describe_comparison(path, comparison),
        "compared": load_figures(path / "figures", ("accuracies", "differences")) if comparison else {},
        "command": format_command(run),
        "environment": describe_environment(run),
        "config": config_text,
    }
    return render_page("search.html.j2", path / "report.html", context)


def read_trials(path: Path, config_text: str | None) -> dict[str, Any] | None:
    """Return the trials of a search; None where none has begun.

    Returns:
        {"figure", "direction", "keys", "arms": [{"name", "records"}]}, with the fields of members.csv in a record.
        Searches of earlier versions wrote it as trials.json.
    """
    former = read_json(path / FORMER_TRIALS_FILE)
    if former is not None:
        return former
    section = read_config(config_text).get("search")
    if not section or not (path / MEMBERS_FILE).exists():
        return None
    rows = [row for row in read_member_rows(path) if row.trial is not None]
    arms: dict[str, list[dict[str, Any]]] = {} if rows else {ALONE: []}
    for row in rows:
        record = {**row.model_dump(exclude={"settings"}), "overrides": row.settings, "epochs": row.epochs or 0}
        record |= {"run": Path(row.path).name if row.path else None, "error": row.error or None}
        arms.setdefault(row.arm, []).append(record)
    return {
        "figure": section["objective"],
        "direction": "min" if section["objective"] == "loss" else "max",
        "keys": list(section["space"]),
        "arms": [{"name": name, "records": records} for name, records in arms.items()],
    }


def rank_records(records: Sequence[Mapping[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Return the trials as a leaderboard: run to the end first, each by score; those without one last."""
    sign = 1 if direction == "min" else -1

    def place(record: Mapping[str, Any]) -> tuple:
        has_score = record["score"] is not None
        return (not has_score, record["status"] != "finished", sign * record["score"] if has_score else 0)

    numbered = [{**record, "number": number} for number, record in enumerate(records, start=1)]
    return sorted(numbered, key=place)


def _describe_arm(path: Path, trials: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    records, alone = arm["records"], arm["name"] == ALONE
    ranked = rank_records(records, trials["direction"])
    scored = [record for record in records if record["score"] is not None]
    keys = [key for key in trials["keys"] if any(key in record["overrides"] for record in records)]
    importance = {
        key: compute_importance([r["overrides"] for r in scored], [r["score"] for r in scored], key) for key in keys
    }
    best_file = "best.yaml" if alone else f"best-{_slug(arm['name'])}.yaml"
    best = ranked[0] if ranked and ranked[0]["score"] is not None else None
    prefix = "" if alone else f"{_slug(arm['name'])}-"
    figures = _draw(path / "figures", prefix, trials, records, keys, importance)
    return {
        "name": None if alone else arm["name"],
        "keys": [shorten_key(key, keys) for key in keys],
        "rows": [_describe_row(path, record, keys) for record in ranked],
        "best": best,
        "best_file": best_file if (path / best_file).exists() else None,
        "num_scored": len(scored),
        "num_failed": sum(record["status"] == "failed" for record in records),
        "num_alike": _count_alike(ranked),
        "figures": figures,
        "seconds": sum(record["seconds"] or 0 for record in records),
    }


def _describe_comparison(path: Path, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return comparison.json with, for each arm, the keys of its winner and its runs."""
    rows = []
    for row in comparison["table"]:
        keys = {
            key: value
            for key, value in comparison["winners"][row["arm"]].items()
            if key not in ("pretrain", "experiment.seed")
        }
        runs = [{**run, "link": _find_link(path, run["run"])} for run in comparison["runs"] if run["arm"] == row["arm"]]
        rows.append({**row, "keys": format_overrides(keys), "runs": runs})
    parts = [part for part in ("train", "validation", "test") if any(row[part] for row in rows)]
    return {**comparison, "table": rows, "parts": parts}


def _find_link(path: Path, run: str | None) -> str | None:
    """Return where the page of a trial's run stands, seen from that of the search; None: it has none."""
    if run is None:
        return None
    report = path.parent / run / "report.html"
    return Path(os.path.relpath(report, path)).as_posix() if report.exists() else None


def _describe_row(path: Path, record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    values = [format_value(record["overrides"][key]) if key in record["overrides"] else "" for key in keys]
    error = (record["error"] or "").splitlines()
    return {
        **record,
        "state": STATES[record["status"]],
        "values": values,
        "link": _find_link(path, record["run"]),
        "error": error[0][:300] if error else None,
    }


def _count_alike(ranked: Sequence[Mapping[str, Any]]) -> int:
    """Return how many finished trials besides the best have a score within the best one's interval."""
    if not ranked or ranked[0].get("low") is None:
        return 0
    low, high = ranked[0]["low"], ranked[0]["high"]
    return sum(r["status"] == "finished" and r["score"] is not None and low <= r["score"] <= high for r in ranked[1:])


def _draw(
    folder: Path,
    prefix: str,
    trials: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    importance: Mapping[str, dict | None],
) -> dict[str, dict | None]:
    """Draw what the records allow, and return the figures ready for the page."""
    scored = [record for record in records if record["score"] is not None]
    drawn: dict[str, tuple[Figure, str, str]] = {}
    name, direction = trials["figure"], trials["direction"]
    if len(scored) > 1 and keys:
        drawn["coordinates"] = (
            draw_coordinates(scored, keys, name, direction),
            f"Each line is a trial: its keys, and on the right its validation {name}; strong lines are better, the orange one is the best",
            f"Parallel coordinates of {len(scored)} trials over {', '.join(keys)}.",
        )
    known = {key: value for key, value in importance.items() if value is not None}
    if known:
        shares = ", ".join(f"{key} {100 * value['share']:.0f} %" for key, value in known.items())
        drawn["importance"] = (
            draw_importance(known),
            f"Share of the variance of {name} that each key alone explains; the tick is what chance would",
            f"Shares: {shares}.",
        )
    if scored:
        drawn["history"] = (
            draw_history(records, name, direction),
            f"Validation {name} of each trial in the order of their beginning; the line is the best so far",
            f"{len(scored)} trials with a score, {len(records) - len(scored)} without.",
        )
    for key, (figure, title, description) in drawn.items():
        write_figure(figure, folder / f"{prefix}{key}.png", title=title, description=description)
    loaded = load_figures(folder, [f"{prefix}{key}" for key in drawn])
    return {key: loaded.get(f"{prefix}{key}") for key in FIGURES}


def _collect_warnings(run: Mapping[str, Any]) -> list[str]:
    if run.get("smoke"):
        return ["Smoke search: two batches of at most eight images a stage. The figures mean nothing."]
    return []


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
