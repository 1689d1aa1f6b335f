"""The report.html of a run and its figures: a self-contained page made only from the run's files."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.names import STAGES
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ModelError
from dlfer.metrics.predictions import read_predictions
from dlfer.report.audit import describe_audit
from dlfer.report.curves import draw_corruptions, draw_history, draw_reliability, draw_risk_coverage, draw_roc
from dlfer.report.figures import NamedFigure, stamp_banner, write_figures
from dlfer.report.headline import build_headline, build_metrics_table, describe_splits, name_other_split
from dlfer.report.judgement import (
    describe_abstention,
    describe_calibration,
    describe_corruptions,
    describe_ensemble,
    describe_final_labels,
    describe_groups,
    describe_milestone_figure,
    describe_milestones,
    describe_missing_groups,
    draw_members,
    draw_milestones,
    list_views,
)
from dlfer.report.page import (
    describe_environment,
    describe_run,
    find_comparisons,
    format_command,
    format_percent,
    get_name,
    load_figures,
    read_text,
    render_page,
    try_experiment,
)
from dlfer.report.pictures import draw_confusion
from dlfer.report.sections import (
    describe_blocks,
    describe_cascade,
    describe_data,
    describe_levels,
    describe_question,
    describe_transfer,
    describe_trees,
    draw_diagram,
    draw_levels,
    list_costs,
    list_published,
)
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.metrics_record import Abstention, Calibration, Corruptions, Metrics, Selective, SplitMetrics, is_missing
from dlfer.runs.records import DataRecord, RunRecord
from dlfer.runs.run_records import (
    BoostingRecord,
    NetworkRecord,
    TransferRecord,
    count_openings,
    read_events,
    read_history,
    read_metrics,
)
from dlfer.runs.text import count_noun

FIGURES = (
    "pretrain_history",
    "finetune_history",
    "levels",
    "members",
    "milestones",
    "confusion",
    "roc",
    "reliability",
    "risk_coverage",
    "confusions",
    "corruptions",
    "errors",
    "augmented",
    "preprocessing",
    "occlusion",
)
"""All figures of a run; those that show images are written during the run, while the images are in memory."""


def write_run_figures(run_path: Path) -> list[Path]:
    """Draw the figures that a run's csv, JSON and prediction files allow; return the paths.

    Confusion, ROC, reliability and risk-coverage are of the test split or, if there is none, of validation. The run's
    banner is added at the top of every figure in the folder.
    """
    folder, metrics = run_path / "figures", read_metrics(run_path) or Metrics()
    drawn = (*_draw_histories(run_path), *_draw_trees(run_path), *_draw_judgement(run_path, metrics))
    written = write_figures(folder, drawn)
    stamp_banner(folder, FIGURES, metrics.banner)
    return written


def _draw_histories(run_path: Path) -> Iterator[NamedFigure]:
    events = read_events(run_path)
    for stage, title in STAGES.items():
        history = read_history(run_path / stage / "history.csv")
        if not history:
            continue
        ends = [event for event in events if event.event == f"{stage}_end"]
        last = history[-1]
        yield NamedFigure(
            f"{stage}_history",
            draw_history(history, kept_epoch=ends[-1].kept_epoch if ends else None),
            f"{title}: loss and accuracy over the epochs",
            f"Loss and accuracy of {title} over {count_noun(len(history), 'epoch')}; at the end the accuracy is "
            f"{format_percent(last.train_accuracy)} in training and {format_percent(last.validation_accuracy)} on "
            "validation.",
        )


def _draw_trees(run_path: Path) -> Iterator[NamedFigure]:
    record = BoostingRecord.read(run_path)
    if record is not None and record.levels:
        yield NamedFigure(
            "levels",
            draw_levels(record.levels),
            "Each feature level's share of the training gain, and its share of the features",
            describe_levels(record.levels),
        )


def _draw_judgement(run_path: Path, metrics: Metrics) -> Iterator[NamedFigure]:
    yield from _draw_metrics(metrics)
    yield from _draw_roc(run_path, metrics)


def _draw_metrics(metrics: Metrics) -> Iterator[NamedFigure]:
    """Yield the figures that need nothing but the metrics."""
    judged, split = metrics.judged, metrics.judged_split
    if metrics.judged_on is not None:
        split = name_other_split(metrics.judged_on)
    if judged is not None and judged.confusion:
        yield NamedFigure(
            "confusion",
            draw_confusion(np.array(judged.confusion), judged.labels),
            f"Confusion on {split}: rows are targets, columns predictions",
            _describe_confusion(judged, split),
        )
    if judged is not None and judged.calibration is not None and judged.calibration.has_bins:
        yield _draw_calibration(judged.calibration, judged.n, split)
    if judged is not None and judged.selective is not None and judged.selective.curve:
        yield _draw_abstention(judged.selective, metrics.abstain, split)
    members = draw_members(metrics)
    if members is not None:
        yield members
    milestones = draw_milestones(metrics)
    if milestones is not None:
        text = describe_milestone_figure(metrics)
        yield NamedFigure("milestones", milestones, "Confusion after some epochs: rows are targets", text)
    if metrics.corruptions is not None:
        yield _draw_robustness(metrics.corruptions)


def _draw_roc(run_path: Path, metrics: Metrics) -> Iterator[NamedFigure]:
    # A run that was stopped during its evaluation has predictions but no metrics.
    splits = ["test", "validation"] if metrics.judged is None else [metrics.judged_split]
    paths = {split: run_path / "predictions" / f"{split}.npz" for split in splits}
    split = next((split for split, path in paths.items() if path.exists()), None)
    if split is None:
        return
    predictions = read_predictions(paths[split])
    area = None if metrics.judged is None or metrics.judged.macro_auc is None else metrics.judged.macro_auc.value
    yield NamedFigure(
        "roc",
        draw_roc(predictions),
        f"ROC on {split}: each class against the rest",
        f"ROC curves of {len(predictions.labels)} classes on {split}, n = {len(predictions):,}"
        + ("." if is_missing(area) else f"; the mean area is {area:.3f}."),
    )


def _draw_calibration(calibration: Calibration, n: int, split: str) -> NamedFigure:
    raw, scaled = calibration.raw, calibration.scaled
    errors = [f"{format_percent(raw.ece_equal_mass.value)} as the network gives it"]
    if scaled is not None:
        errors.append(f"{format_percent(scaled.ece_equal_mass.value)} after the temperature")
    rows = raw.reliability
    low, high = rows[0], rows[-1]
    return NamedFigure(
        "reliability",
        draw_reliability(calibration),
        f"Reliability on {split}: how often the model is right, over how sure it is; {len(rows)} bins of equally many "
        "images",
        f"Reliability diagram on {split}, n = {n:,}. Expected calibration error: {', '.join(errors)}. As the "
        f"network gives it, the least sure bin has a confidence of {format_percent(low.confidence)} and an accuracy "
        f"of {format_percent(low.accuracy)}, the surest {format_percent(high.confidence)} and "
        f"{format_percent(high.accuracy)}.",
    )


def _draw_abstention(selective: Selective, abstain: Abstention | None, split: str) -> NamedFigure:
    curve, at = selective.curve, selective.at_threshold
    half = min(curve, key=lambda point: abs(point.coverage - 0.5))
    text = (
        f"Risk-coverage curve on {split}: {format_percent(curve[0].risk)} of all answers are wrong, "
        f"{format_percent(half.risk)} where the surest {format_percent(half.coverage, 0)} are answered."
    )
    if at is not None and at.accuracy.value is not None:
        text += (
            f" At the threshold {at.threshold:.2f}, {format_percent(at.coverage.value)} are answered and "
            f"{format_percent(1 - at.accuracy.value)} of these are wrong."
        )
    return NamedFigure(
        "risk_coverage",
        draw_risk_coverage(selective, target_accuracy=None if abstain is None else abstain.target_accuracy),
        f"Risk and coverage on {split}: what is gained by answering only where the model is sure",
        text,
    )


def _draw_robustness(found: Corruptions) -> NamedFigure:
    worst = [
        f"{name.replace('_', ' ')} {format_percent(levels[-1].accuracy.value)}"
        for name, levels in found.corruptions.items()
    ]
    return NamedFigure(
        "corruptions",
        draw_corruptions(found),
        f"Accuracy on corrupted images (n = {found.n:,}) with 95 % intervals",
        f"Accuracy is {format_percent(found.clean.value)} on clean images and, at the greatest strength, "
        f"{', '.join(worst)}.",
    )


def _describe_confusion(judged: SplitMetrics, split: str) -> str:
    """Return the recalls of the first 12 classes and the most frequent confusion in words."""
    confusion, labels = np.array(judged.confusion), judged.labels
    recalls = [f"{label} {format_percent(judged.per_class[label].recall, 0)}" for label in labels[:12]]
    wrong = confusion - np.diag(np.diag(confusion))
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    right = f"Confusion matrix on {split}. Right by class: {', '.join(recalls)}. "
    if not wrong.any():
        return f"{right}No image was predicted wrongly."
    return (
        f"{right}The most common confusion: {labels[row]} predicted as {labels[column]}, {wrong[row, column]:,} times."
    )


_NO_CONFIG = "The experiment is not shown, because config.yaml cannot be read."


def write_report(run_path: Path, *, ending: Mapping[str, Any] | None = None) -> Path:
    """Draw the figures of a run and write its report.html; return the page's path.

    The page leaves out what the run's files do not contain, because it stopped early, had no EF-FER1, or was made by an
    earlier version.

    Args:
        run_path: a run directory, finished or not.
        ending: the final `status` and `finished` of run.json, which is updated only after the page is written.

    Raises:
        ModelError: the folder is not a run directory, or one of its files is damaged.
    """
    run_path = Path(run_path)
    run = RunRecord.read(run_path)
    if run is None:
        raise ModelError(f"{run_path}: found no run.json; expected a run directory, e.g. saved_models/runs/NAME/STAMP.")
    run = run.model_copy(update=dict(ending or {}))
    write_run_figures(run_path)
    data, metrics, audit = DataRecord.read(run_path), read_metrics(run_path) or Metrics(), AuditRecord.read(run_path)
    config, problem = try_experiment(run_path)
    network, transfer, trees = (
        NetworkRecord.read(run_path),
        TransferRecord.read(run_path),
        BoostingRecord.read(run_path),
    )
    cascade = describe_cascade(config, data=data, transfer=transfer, network=network, cost=run.cost, trees=trees)
    context = {
        "name": get_name(run_path, run),
        "subtitle": describe_run(run_path, run),
        "status": run.present_status,
        "error": run.error,
        "warnings": [text for text in (metrics.banner, *run.warnings, problem and f"{_NO_CONFIG} {problem}") if text],
        "question": describe_question(config, [] if data is None else data.labels),
        "figures": load_figures(run_path / "figures", FIGURES),
        "costs": list_costs(run.cost),
        "blocks": describe_blocks(network),
        "diagrams": [] if cascade is None else [draw_diagram(cascade), draw_diagram(cascade, is_column=True)],
        "trees": describe_trees(trees),
        "transfer": describe_transfer(transfer),
        "data": None if data is None else describe_data(data),
        "audit": [] if audit is None else describe_audit(audit),
        "comparisons": find_comparisons(run_path),
        "command": format_command(run),
        "config_path": shlex.quote(str(run_path / "config.yaml")),
        "environment": describe_environment(run),
        "config": read_text(run_path / "config.yaml"),
        **_build_metrics_context(
            metrics,
            get_name(run_path, run),
            data=data,
            config=config,
            openings=count_openings(run_path),
        ),
    }
    return render_page("run.html.j2", run_path / "report.html", {"kind": "run report", **context})


def write_metrics_page(path: Path, metrics: Metrics, name: str) -> Path:
    """Write the metrics of a model on other data as a self-contained page like a run's report; return its path.

    Args:
        path: the file.
        metrics: from `dlfer.experiment.evaluate.evaluate_model`, or of an external model.
        name: of the model.
    """
    judged_on, foreign = metrics.judged_on, metrics.foreign
    absent = (
        "blocks",
        "diagrams",
        "status",
        "error",
        "question",
        "costs",
        "trees",
        "transfer",
        "data",
        "command",
        "environment",
        "config",
    )
    with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
        write_figures(Path(folder), _draw_metrics(metrics))
        context: dict[str, Any] = {
            **dict.fromkeys(absent),
            "name": name,
            "kind": "evaluation",
            "subtitle": "" if judged_on is None else f"evaluated on {judged_on.split} of {judged_on.file}",
            "warnings": [text for text in (metrics.banner, *(foreign.describe() if foreign else ())) if text],
            "figures": load_figures(Path(folder), FIGURES),
            "audit": [],
            "comparisons": [],
            **_build_metrics_context(metrics, name, data=None, config=None, openings=0),
        }
    return render_page("run.html.j2", Path(path), context)


def _build_metrics_context(
    metrics: Metrics, name: str, *, data: DataRecord | None, config: ExperimentConfig | None, openings: int
) -> dict[str, Any]:
    """Return the template variables for the metrics; only an empty headline if no split was evaluated."""
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
        "final_labels": describe_final_labels(metrics),
        "published": list_published(config, metrics, name),
        "groups": describe_groups(metrics),
        "no_groups": describe_missing_groups(None if data is None else data.source),
        "corruptions": describe_corruptions(metrics),
    }
