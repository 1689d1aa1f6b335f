"""report.html of a run: one self-contained page, made only from the files beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlfer.errors import ModelError
from dlfer.report.audit import describe_audit
from dlfer.report.boosting import describe_trees
from dlfer.report.ensemble import describe_ensemble, describe_milestones
from dlfer.report.headline import build_headline, build_metrics_table, describe_parts
from dlfer.report.judgement import (
    describe_abstention,
    describe_calibration,
    describe_corruptions,
    describe_groups,
    list_views,
    tell_missing_groups,
)
from dlfer.report.page import load_figures, read_json, render_page
from dlfer.report.record import (
    describe_environment,
    describe_run,
    find_comparisons,
    format_command,
    get_name,
    read_config,
    read_text,
)
from dlfer.report.run_figures import FIGURES, read_log, write_run_figures
from dlfer.report.sections import describe_data, describe_question, describe_transfer, list_costs
from dlfer.runs.evaluations import read_metrics
from dlfer.runs.records import read_audit


def write_report(run_path: Path) -> Path:
    """Draw the figures of a run and write its report.html; return the page's path.

    Files that a run does not have, because it stopped early or had no EF-FER1, are left out, and so is what
    the files of an earlier version do not tell.

    Args:
        run_path: a run directory, finished or not.

    Raises:
        ModelError: the folder is no run directory, or one of its files is damaged.
    """
    run_path = Path(run_path)
    run = read_json(run_path / "run.json")
    if run is None:
        raise ModelError(f"{run_path}: found no run.json; expected a run directory, e.g. saved_models/runs/NAME/STAMP.")
    write_run_figures(run_path)
    data, metrics, audit = read_json(run_path / "data.json"), read_metrics(run_path), read_audit(run_path)
    config_text = read_text(run_path / "config.yaml")
    config = read_config(config_text)
    context = {
        "name": get_name(run_path, config_text),
        "subtitle": describe_run(run_path, run),
        "status": run.get("status"),
        "error": _describe_error(run),
        "warnings": [text for text in [(metrics or {}).get("banner"), *run.get("warnings", [])] if text],
        "question": describe_question(config, (data or {}).get("labels")),
        "figures": load_figures(run_path / "figures", FIGURES),
        "costs": list_costs(run.get("cost") or {}),
        "trees": describe_trees(read_json(run_path / "boosting.json")),
        "transfer": describe_transfer(read_json(run_path / "transfer.json")),
        "data": describe_data(data) if data else None,
        "audit": describe_audit(audit) if audit else [],
        "comparisons": find_comparisons(run_path),
        "command": format_command(run),
        "config_path": shlex.quote(str(run_path / "config.yaml")),
        "environment": describe_environment(run),
        "config": config_text,
        **_judge(run_path, metrics or {}, data, config),
    }
    return render_page("run.html.j2", run_path / "report.html", context)


def _judge(
    run_path: Path, metrics: Mapping[str, Any], data: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the page says of metrics.json; all of it empty where nothing was judged."""
    openings = sum(event.get("event") == "test_opened" for event in read_log(run_path))
    expected = (config.get("expected") or {}).get("test_accuracy")
    headline = build_headline(metrics, data, openings=openings, expected=expected)
    if headline is None:
        return {"headline": None}
    return {
        "headline": headline,
        "table": build_metrics_table(metrics),
        "part_notes": describe_parts(metrics),
        "calibration": describe_calibration(metrics),
        "abstention": describe_abstention(metrics),
        "views": list_views(metrics),
        "milestones": describe_milestones(metrics),
        "ensemble": describe_ensemble(metrics),
        "groups": describe_groups(metrics),
        "no_groups": tell_missing_groups((data or {}).get("source")),
        "corruptions": describe_corruptions(metrics),
    }


def _describe_error(run: Mapping[str, Any]) -> str | None:
    error = run.get("error")
    return None if not error else error if isinstance(error, str) else json.dumps(error, indent=2)
