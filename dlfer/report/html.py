"""report.html of a run: one self-contained page, made only from the files beside it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ModelError
from dlfer.report.audit import describe_audit
from dlfer.report.boosting import describe_trees
from dlfer.report.ensemble import describe_ensemble, describe_milestones
from dlfer.report.headline import build_headline, build_metrics_table, describe_splits
from dlfer.report.judgement import (
    describe_abstention,
    describe_calibration,
    describe_corruptions,
    describe_groups,
    describe_missing_groups,
    list_views,
)
from dlfer.report.page import load_figures, render_page
from dlfer.report.record import (
    describe_environment,
    describe_run,
    find_comparisons,
    format_command,
    get_name,
    read_text,
    try_experiment,
)
from dlfer.report.run_figures import FIGURES, write_run_figures
from dlfer.report.sections import describe_data, describe_question, describe_transfer, list_costs
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.evaluations import read_metrics
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.records import DataRecord, RunRecord
from dlfer.runs.training_records import BoostingRecord, TransferRecord, read_events

_NO_CONFIG = "What was asked is not shown, because config.yaml cannot be read."


def write_report(run_path: Path) -> Path:
    """Draw the figures of a run and write its report.html; return the page's path.

    The page leaves out what a run has no files for, because it stopped early or had no EF-FER1, and what the files of an
    earlier version do not contain.

    Args:
        run_path: a run directory, finished or not.

    Raises:
        ModelError: the folder is no run directory, or one of its files is damaged.
    """
    run_path = Path(run_path)
    run = RunRecord.read(run_path)
    if run is None:
        raise ModelError(f"{run_path}: found no run.json; expected a run directory, e.g. saved_models/runs/NAME/STAMP.")
    write_run_figures(run_path)
    data, metrics, audit = DataRecord.read(run_path), read_metrics(run_path) or Metrics(), AuditRecord.read(run_path)
    config, problem = try_experiment(run_path)
    context = {
        "name": get_name(run_path, run),
        "subtitle": describe_run(run_path, run),
        "status": run.status,
        "error": run.error,
        "warnings": [text for text in (metrics.banner, *run.warnings, problem and f"{_NO_CONFIG} {problem}") if text],
        "question": describe_question(config, [] if data is None else data.labels),
        "figures": load_figures(run_path / "figures", FIGURES),
        "costs": list_costs(run.cost),
        "trees": describe_trees(BoostingRecord.read(run_path)),
        "transfer": describe_transfer(TransferRecord.read(run_path)),
        "data": None if data is None else describe_data(data),
        "audit": [] if audit is None else describe_audit(audit),
        "comparisons": find_comparisons(run_path),
        "command": format_command(run),
        "config_path": shlex.quote(str(run_path / "config.yaml")),
        "environment": describe_environment(run),
        "config": read_text(run_path / "config.yaml"),
        **_judge(run_path, metrics, data=data, config=config),
    }
    return render_page("run.html.j2", run_path / "report.html", context)


def _judge(
    run_path: Path, metrics: Metrics, *, data: DataRecord | None, config: ExperimentConfig | None
) -> dict[str, Any]:
    """Return what the page says of the metrics; all of it empty where nothing was judged."""
    openings = sum(event.event == "test_opened" for event in read_events(run_path))
    expected = None if config is None else config.expected.test_accuracy
    headline = build_headline(metrics, data, openings=openings, expected=expected)
    if headline is None:
        return {"headline": None}
    return {
        "headline": headline,
        "table": build_metrics_table(metrics),
        "split_notes": describe_splits(metrics),
        "calibration": describe_calibration(metrics),
        "abstention": describe_abstention(metrics),
        "views": list_views(metrics),
        "milestones": describe_milestones(metrics),
        "ensemble": describe_ensemble(metrics),
        "groups": describe_groups(metrics),
        "no_groups": describe_missing_groups(None if data is None else data.source),
        "corruptions": describe_corruptions(metrics),
    }
