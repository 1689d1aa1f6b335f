"""MODEL_CARD.md of a run: what the model is for, what it is not for, on what it was trained, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer.errors import ModelError
from dlfer.report.duplicates import describe_duplicates, name_left_out
from dlfer.report.headline import METRICS, PARTS, VIEWS, get_judged_part
from dlfer.report.judgement import describe_abstention, describe_calibration, describe_groups, tell_missing_groups
from dlfer.report.page import (
    format_count,
    format_fraction,
    format_interval,
    format_percent,
    format_uncertainty,
    is_missing,
    read_json,
    render_text,
)
from dlfer.report.record import describe_environment, get_name, read_config, read_text
from dlfer.report.terms import find_terms
from dlfer.runs.evaluations import read_metrics
from dlfer.runs.files import write_atomically
from dlfer.runs.find import ARTIFACT_FILE

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD_FILE = "MODEL_CARD.md"

# Figure of merit -> the name that the hub knows it by.
_HUB_METRICS = {
    "accuracy": "accuracy",
    "macro F1": "f1",
    "macro precision": "precision",
    "balanced accuracy": "balanced_accuracy",
    "macro AUC": "roc_auc",
    "MCC": "matthews_correlation",
    "ECE": "expected_calibration_error",
    "Brier score": "brier_score",
}
_MOST_LABELS = 12


def write_card(run_path: Path) -> Path:
    """Write the model card of a run beside its model, as model/MODEL_CARD.md; return its path.

    The file may be renamed README.md and put on a model hub: it begins with the metadata that hubs read.

    Args:
        run_path: a run directory that has a model. What its files do not tell is left out.

    Raises:
        ModelError: the folder has no model, or one of its files is damaged.
    """
    path = Path(run_path) / "model" / CARD_FILE
    write_atomically(path, compose_card(run_path))
    return path


def compose_card(run_path: Path) -> str:
    """Return the text of the model card of a run; see `write_card`."""
    from huggingface_hub import ModelCard, ModelCardData

    run_path = Path(run_path)
    artifact = read_json(run_path / "model" / ARTIFACT_FILE)
    if artifact is None:
        raise ModelError(f"{run_path}: found no model/{ARTIFACT_FILE}; a card is written for a run that has a model.")
    run, data = (read_json(run_path / f"{name}.json") or {} for name in ("run", "data"))
    metrics = read_metrics(run_path) or {}
    config_text = read_text(run_path / "config.yaml")
    config, name = read_config(config_text), get_name(run_path, config_text)
    terms = find_terms(config)
    research_only = any(term.research_only for term in terms)
    metadata = ModelCardData(
        language=None,
        license="other" if research_only else "unknown",
        license_name="research-only" if research_only else None,
        library_name="keras",
        pipeline_tag="image-classification",
        tags=_list_tags(config, metrics, research_only=research_only),
        metrics=["accuracy", "f1"],
        model_name=name,
        eval_results=_list_results(metrics, data, config) or None,
    )
    context = {
        "name": name,
        "run_name": run_path.resolve().name,
        "labels": artifact["labels"],
        "image": artifact.get("input") or {},
        "has_temperature": bool(artifact.get("temperature")),
        "backbone": " with ".join(_list_backbones(config)) or artifact.get("family", "not told"),
        "banner": metrics.get("banner"),
        "warnings": run.get("warnings") or [],
        "research_only": research_only,
        "terms": terms,
        "protocol": _describe_protocol(metrics, data),
        "figures": _list_figures(metrics),
        "calibration": [*(describe_calibration(metrics) or {"notes": []})["notes"], *describe_abstention(metrics)],
        "limits": _list_limits(metrics, data),
        "environment": describe_environment(run),
    }
    card = ModelCard.from_template(
        metadata,
        template_str="---\n{{ card_data }}\n---\n\n{{ body }}",
        body=render_text("card.md.j2", context),
    )
    return str(card).rstrip() + "\n"


def _list_backbones(config: Mapping[str, Any]) -> list[str]:
    """Return the one backbone of a config, the branches of a hybrid, or the names of an ensemble's members."""
    if config.get("ensemble"):
        return [member["name"] for member in config["ensemble"]["members"]]
    model = config.get("model") or {}
    return model.get("branches") or [model["backbone"]] if model.get("backbone") else []


def _list_tags(config: Mapping[str, Any], metrics: Mapping[str, Any], *, research_only: bool) -> list[str]:
    tags = ["facial-expression-recognition", "dlfer", f"protocol-{metrics.get('protocol', 'unknown')}"]
    tags += [backbone.replace("_", "-") for backbone in _list_backbones(config)]
    if metrics.get("banner"):
        tags.append("not-a-clean-test")
    return [*tags, "research-only"] if research_only else tags


def _list_results(metrics: Mapping[str, Any], data: Mapping[str, Any], config: Mapping[str, Any]) -> list[EvalResult]:
    """Return the figures as the hub's metadata holds them: of test, else of validation, whole and without duplicates.

    A name says what a number alone would hide: that validation selected the model, or that the test is not clean.
    """
    from huggingface_hub import EvalResult

    part = get_judged_part(metrics)
    if part is None:
        return []
    source = data.get("source") or ((config.get("finetune") or {}).get("data") or {}).get("source") or "unknown"
    remark = " (not a clean test)" if metrics.get("banner") else ""
    results = []
    without = f"{part}_without_duplicates"
    for shown in [part, *([without] if metrics.get(without) else [])]:
        split = (data.get("splits") or {}).get(part, {}).get("name") or part
        what = f"{source} {split}"
        if part == "validation":
            what = f"{source} {split} (validation figure, used for selection)"
        if shown == without:
            what += f", images without a duplicate in {name_left_out(metrics.get('duplicates'))}"
        else:
            what += remark
        for metric in METRICS:
            figure = metric.get(metrics[shown])
            if metric.name not in _HUB_METRICS or not figure or is_missing(figure["value"]):
                continue
            interval = format_interval(figure, "fraction")
            words = f"95 % {interval}, n = {metrics[shown]['n']}" if interval else f"n = {metrics[shown]['n']}"
            results.append(
                EvalResult(
                    task_type="image-classification",
                    task_name="Facial expression recognition",
                    dataset_type=source,
                    dataset_name=what,
                    dataset_config=f"{metrics['protocol']}{'-without-duplicates' if shown == without else ''}",
                    dataset_split=split,
                    metric_type=_HUB_METRICS[metric.name],
                    metric_name=f"{metric.name} ({words})",
                    metric_value=round(float(figure["value"]), 6),
                )
            )
    return results


def _list_figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that are known as rows of texts, the name first, and the names of the columns, all but train.

    Returns:
        {"parts": [name], "rows": [[name of the figure, a text for each part]]}.
    """
    names = {
        "test": "test",
        "test_without_duplicates": "test without duplicates",
        "validation": "validation figure (used for selection)",
        "validation_without_duplicates": "validation without duplicates",
    }
    parts = [part for part in PARTS if metrics.get(part) and part in names]
    rows = []
    for metric in METRICS:
        cells = [metric.get(metrics[part]) for part in parts]
        if not any(cell and not is_missing(cell["value"]) for cell in cells):
            continue
        write = format_percent if metric.scale == "percent" else format_fraction
        texts = []
        for cell in cells:
            interval = format_interval(cell, metric.scale) if cell and "low" in cell else ""
            interval = interval or (format_uncertainty(cell) if cell and cell.get("reason") else "")
            texts.append((write(cell["value"]) if cell else "–") + (f" ({interval})" if interval else ""))
        rows.append([f"{metric.name} ({metric.remark})" if metric.remark else metric.name, *texts])
    return {"parts": [f"{names[part]}, n = {format_count(metrics[part]['n'])}" for part in parts], "rows": rows}


def _describe_protocol(metrics: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return ["The model was not judged."]
    splits = ", ".join(
        f"{part} {format_count(split['n'])} ({split.get('name') or part})"
        for part, split in (data.get("splits") or {}).items()
    )
    lines = [
        f"Protocol `{metrics['protocol']}`, selected on {metrics['selected_on']}" + (f"; {splits}." if splits else ".")
    ]
    if get_judged_part(metrics) == "validation":
        lines.append(
            "There is no test figure. The validation figure below is of the images that the model was selected on, "
            "so that it is on the high side."
        )
    duplicates = describe_duplicates(metrics)
    if duplicates:
        lines.append(duplicates)
    view = metrics.get("headline") or "single"
    if view != "single":
        lines.append(
            f"The run's headline averages over {VIEWS.get(view, view)}; the figures below are of single images."
        )
    opened = metrics.get("test_opened")
    if opened and metrics.get("test"):
        lines.append(f"The test part was opened {'once' if opened == 1 else f'{opened} times'}.")
    return lines


def _list_limits(metrics: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Return what the figures say of the weak places of this model."""
    lines, part = [], get_judged_part(metrics)
    if part:
        per_class = metrics[part]["per_class"]
        known = {label: row for label, row in per_class.items() if not is_missing(row["recall"])}
        if known and len(per_class) <= _MOST_LABELS:
            worst = min(known, key=lambda label: known[label]["recall"])
            lines.append(
                f"It is worst at {worst}: {format_percent(known[worst]['recall'])} of {format_count(known[worst]['n'])} "
                f"images are found ({format_uncertainty(known[worst]['intervals']['recall'])})."
            )
        tables = describe_groups(metrics)
        gaps = [f"By {table['name']}: {' '.join(table['notes'])}" for table in tables if table["notes"]]
        lines += gaps or [tell_missing_groups(data.get("source"))]
    return lines
