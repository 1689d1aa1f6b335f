"""report.html of a run: one self-contained page, made only from the files beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.errors import ModelError
from dlfer.evaluate.predictions import read_predictions
from dlfer.report.figures import draw_confusion, draw_history, draw_roc, write_figure
from dlfer.report.page import (
    format_count,
    format_percent,
    load_figures,
    read_json,
    read_rows,
    render_page,
)
from dlfer.report.record import describe_environment, describe_run, format_command, get_name, read_config, read_text

STAGES = {"pretrain": "EF-FER1", "finetune": "EF-FER2"}
FIGURES = ("pretrain_history", "finetune_history", "confusion", "roc", "errors", "augmented")


def write_report(run_path: Path) -> Path:
    """Draw the figures of a run and write its report.html; return the page's path.

    Files that a run does not have, because it stopped early or had no EF-FER1, are left out.

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
    data, metrics = read_json(run_path / "data.json"), read_json(run_path / "metrics.json")
    config_text = read_text(run_path / "config.yaml")
    headline = _build_headline(metrics, data, _count_openings(run_path), config_text) if metrics else None
    context = {
        "name": get_name(run_path, config_text),
        "subtitle": describe_run(run_path, run),
        "status": run.get("status"),
        "error": _describe_error(run),
        "warnings": [text for text in [(metrics or {}).get("banner"), *run.get("warnings", [])] if text],
        "headline": headline,
        "parts": _list_parts(metrics) if metrics else [],
        "part_notes": _describe_parts(metrics) if metrics else [],
        "figures": load_figures(run_path / "figures", FIGURES),
        "costs": _list_costs(run.get("cost") or {}),
        "transfer": _describe_transfer(read_json(run_path / "transfer.json")),
        "data": _describe_data(data) if data else None,
        "audit": _describe_audit(read_json(run_path / "audit.json")),
        "command": format_command(run),
        "config_path": shlex.quote(str(run_path / "config.yaml")),
        "environment": describe_environment(run),
        "config": config_text,
    }
    return render_page("run.html.j2", run_path / "report.html", context)


def write_run_figures(run_path: Path) -> list[Path]:
    """Draw what a run's csv, JSON and prediction files allow: histories, confusion, ROC; return the paths.

    Confusion and ROC are of the test part, or of validation where there is no test.
    """
    figures, written = run_path / "figures", []
    for stage, title in STAGES.items():
        rows = read_rows(run_path / stage / "history.csv")
        if rows:
            last = rows[-1]
            written.append(
                write_figure(
                    draw_history(rows, kept_epoch=_find_kept_epoch(run_path, stage)),
                    figures / f"{stage}_history.png",
                    title=f"{title}: loss and accuracy over the epochs",
                    description=f"Loss and accuracy of {title} over {len(rows)} epochs; at the end the accuracy is "
                    f"{format_percent(_number(last.get('train_accuracy')))} in training and "
                    f"{format_percent(_number(last.get('validation_accuracy')))} on validation.",
                )
            )
    part = find_judged_part(run_path)
    if part is None:
        return written
    predictions = read_predictions(run_path / "predictions" / f"{part}.npz")
    scores = (read_json(run_path / "metrics.json") or {}).get(part)
    if scores:
        written.append(
            write_figure(
                draw_confusion(np.array(scores["confusion"]), scores["labels"]),
                figures / "confusion.png",
                title=f"Confusion on {part}: rows are targets, columns predictions",
                description=_describe_confusion(scores, part),
            )
        )
    written.append(
        write_figure(
            draw_roc(predictions),
            figures / "roc.png",
            title=f"ROC on {part}: each class against the rest",
            description=f"ROC curves of {len(predictions.labels)} classes on {part}, n = {len(predictions):,}"
            + (f"; the mean area is {scores['macro_auc']['value']:.3f}." if _has_value(scores, "macro_auc") else "."),
        )
    )
    return written


def find_judged_part(run_path: Path) -> str | None:
    """Return the part that a run is judged on: "test", else "validation", else None."""
    for part in ("test", "validation"):
        if (run_path / "predictions" / f"{part}.npz").exists():
            return part
    return None


def _build_headline(
    metrics: Mapping[str, Any], data: Mapping[str, Any] | None, openings: int, config_text: str | None
) -> dict[str, Any] | None:
    """Return the scores of the judged part with what a reader must know beside the number."""
    part = "test" if metrics.get("test") else "validation"
    scores = metrics.get(part)
    if not scores:
        return None
    split = (data or {}).get("splits", {}).get(part, {}).get("name")
    selected_on = metrics["selected_on"]
    if part == "test":
        what = f"test ({split})" if split and split != "test" else "test"
    else:
        what = f"validation figure ({selected_on}, used for selection)"
    facts = [("protocol", metrics["protocol"]), ("selected on", selected_on)]
    if part == "test":
        twins = metrics.get("test_without_twins")
        if twins and twins["n"] < scores["n"]:
            accuracy = twins["accuracy"]["value"]
            facts.append(("without twins", f"{format_percent(accuracy)}, n = {format_count(twins['n'])}"))
        if openings:
            facts.append(("test opened", "once" if openings == 1 else f"{openings} times"))
    else:
        facts.append(("test", "none: the data has no test part"))
    facts.append(("macro F1", f"{format_percent(scores['macro_f1']['value'])} over {len(scores['labels'])} classes"))
    expected = (read_config(config_text).get("expected") or {}).get("test_accuracy")
    if expected and part == "test":
        low, high = (float(value) for value in expected)
        verdict = "within" if low <= scores["accuracy"]["value"] <= high else "outside"
        facts.append(("expected", f"{format_percent(low)} to {format_percent(high)}: {verdict}"))
    largest = max(figures["n"] for figures in scores["per_class"].values()) / scores["n"]
    return {**scores, "what": what, "facts": facts, "largest_class": largest}


def _list_parts(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts that have figures; the one that the run is judged on comes first."""
    names = {
        "test": "test",
        "test_without_twins": "test without twins",
        "validation": f"validation ({metrics['selected_on']})",
        "train": "train",
    }
    return [{"name": name, "scores": metrics[key]} for key, name in names.items() if metrics.get(key)]


def _describe_parts(metrics: Mapping[str, Any]) -> list[str]:
    lines, twins = [], metrics.get("twins")
    if twins is not None and metrics.get("test"):
        lines.append(
            f"Twins: {format_count(twins['exact'])} test images have an exact copy in training, "
            f"{format_count(twins['near_or_mirrored'])} an exact, nearly equal or mirrored one."
        )
    if metrics.get("validation"):
        lines.append("Validation was used to select the model, so that its figures are on the high side.")
    return lines


def _describe_confusion(scores: Mapping[str, Any], part: str) -> str:
    """Say the recall of each class and the commonest confusion."""
    confusion, labels = np.array(scores["confusion"]), scores["labels"]
    recalls = [f"{label} {format_percent(scores['per_class'][label]['recall'], 0)}" for label in labels[:12]]
    wrong = confusion - np.diag(np.diag(confusion))
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (
        f"Confusion matrix on {part}. Right by class: {', '.join(recalls)}. "
        f"The commonest confusion: {labels[row]} predicted as {labels[column]}, {wrong[row, column]:,} times."
    )


def _list_costs(cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for stage, title in STAGES.items():
        seconds, images = cost.get(f"{stage}_seconds"), cost.get(f"{stage}_images")
        if seconds is None:
            continue
        rows.append(
            {
                "stage": title,
                "seconds": seconds,
                "images": images,
                "rate": images / seconds if images and seconds else None,
                "image_size": f"{cost[f'{stage}_image_size']} px" if cost.get(f"{stage}_image_size") else "–",
                "remark": "taken from the cache; this is what it cost once" if cost.get(f"{stage}_was_cached") else "",
            }
        )
    return rows


def _describe_transfer(transfer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the four lists of transfer.json, their lengths, and how far the features differ."""
    if transfer is None:
        return None
    lists = [
        (key, transfer.get(key) if isinstance(transfer.get(key), list) else [])
        for key in ("carried", "fresh", "missing", "unexpected")
    ]
    counts = {key: transfer[key] if isinstance(transfer.get(key), int) else len(names) for key, names in lists}
    facts = [("weights", ", ".join(f"{count:,} {key}" for key, count in counts.items()))]
    if transfer.get("feature_difference") is not None:
        facts.append(("largest difference of features", f"{transfer['feature_difference']:.1e}, on the same images"))
    if transfer.get("source"):
        facts.append(("from", str(transfer["source"])))
    return {"facts": facts, "lists": lists}


def _describe_data(data: Mapping[str, Any]) -> dict[str, Any]:
    labels, rows = data["labels"], []
    for part, split in data.get("splits", {}).items():
        per_class = split.get("per_class") or {}
        counts = [per_class.get(label) for label in labels] if len(labels) <= 12 else []
        rows.append({"part": part, "name": split.get("name", ""), "n": split["n"], "counts": counts})
    facts = [("source", data["source"]), ("protocol", data["protocol"]), ("selected on", data["selected_on"])]
    if len(labels) > 12:
        facts.append(("labels", f"{len(labels)}"))
    return {
        "facts": facts,
        "labels": labels if len(labels) <= 12 else [],
        "rows": rows,
        "notes": data.get("notes") or [],
    }


def _describe_audit(audit: Mapping[str, Any] | None) -> list[str]:
    """Return what audit.json counts, in sentences."""
    if not audit or "distinct_images" not in audit:
        return []
    lines = [
        f"{format_count(audit['num_images'])} images, {format_count(audit['distinct_images'])} of them distinct; "
        f"{format_count(audit['duplicate_groups'])} occur more than once, "
        f"{format_count(audit['conflicting_groups'])} of these under different labels; "
        f"{format_count(audit['constant_images'])} images are of one colour."
    ]
    for pair, leak in (audit.get("leaks") or {}).items():
        left, _, right = pair.partition("->")
        lines.append(
            f"{format_count(leak['exact'])} images of {right} have an exact copy in {left}, "
            f"{format_count(leak['near_or_mirrored'])} an exact, nearly equal or mirrored one."
        )
    return lines


def _describe_error(run: Mapping[str, Any]) -> str | None:
    error = run.get("error")
    return None if not error else error if isinstance(error, str) else json.dumps(error, indent=2)


def _read_log(run_path: Path) -> list[dict[str, Any]]:
    """Return the events of log.jsonl; a last line that was cut off by a kill is left out."""
    events = []
    for line in (read_text(run_path / "log.jsonl") or "").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _count_openings(run_path: Path) -> int:
    return sum(event.get("event") == "test_opened" for event in _read_log(run_path))


def _find_kept_epoch(run_path: Path, stage: str) -> int | None:
    ends = [event for event in _read_log(run_path) if event.get("event") == f"{stage}_end"]
    return ends[-1].get("kept_epoch") if ends else None


def _number(text: str | None) -> float | None:
    return float(text) if text not in (None, "") else None


def _has_value(scores: Mapping[str, Any] | None, key: str) -> bool:
    return bool(scores) and scores[key]["value"] is not None
