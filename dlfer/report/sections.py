"""What stands in a report besides the figures of merit: what was asked, what it cost, the data, the transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlfer.report.boosting import describe_setting
from dlfer.report.ensemble import describe_members

STAGES = {"pretrain": "EF-FER1", "finetune": "EF-FER2"}
_MOST_LABELS = 12


def describe_question(config: Mapping[str, Any], labels: list[str] | None) -> list[tuple[str, str]]:
    """Return what an experiment asked for, as (name, value).

    Args:
        config: the resolved config; of an earlier version, what it holds.
        labels: that the model tells apart, if known.
    """
    finetune, model = config.get("finetune") or {}, config.get("model") or {}
    if not finetune:
        return []
    facts = []
    if labels:
        shown = ", ".join(labels[:_MOST_LABELS]) + (" ..." if len(labels) > _MOST_LABELS else "")
        facts.append(("question", f"which of {len(labels)} labels would annotators give: {shown}?"))
    facts.append(("data", _describe_source(finetune.get("data") or {})))
    has_dropout = model.get("dropout") and not config.get("boosting")
    dropout = f", dropout {model['dropout']:g}" if has_dropout else ""
    if config.get("ensemble"):
        facts.append(("members", describe_members(config["ensemble"])))
    else:
        facts.append(("network", f"{_describe_network(model)}{dropout}"))
    facts.append((STAGES["pretrain"], _describe_pretraining(config.get("pretrain"))))
    if config.get("boosting"):
        facts.append((STAGES["finetune"], describe_setting(config["boosting"], finetune)))
    else:
        facts.append((STAGES["finetune"], _describe_stage(finetune)))
        facts.append(("augmentation", _describe_augmentation(finetune.get("augment") or {})))
    for key, value in (config.get("expected") or {}).items():
        if isinstance(value, str):
            facts.append((f"expected {key}", value))
    return facts


def _describe_network(model: Mapping[str, Any]) -> str:
    if model.get("branches"):
        return f"{' with '.join(model['branches'])}, fused by {model.get('fusion')}"
    return str(model.get("backbone", "not told"))


def _describe_source(data: Mapping[str, Any]) -> str:
    words = [str(data.get("source", "not told"))]
    words += [str(data[key]) for key in ("name", "path") if data.get(key)]
    words.append(f"protocol {data.get('protocol', 'official')}" + (f" ({data['split']})" if data.get("split") else ""))
    if data.get("select_on"):
        words.append(f"selected on {100 * data['select_on']:g} % of training")
    if data.get("fraction"):
        words.append(f"{100 * data['fraction']:g} % of the images")
    return ", ".join(words)


def _describe_pretraining(pretrain: Mapping[str, Any] | None) -> str:
    if not pretrain:
        return "left out"
    if pretrain.get("weights"):
        return f"not trained here: weights {pretrain['weights']}"
    return f"on {_describe_source(pretrain.get('data') or {})}; {_describe_stage(pretrain)}"


def _describe_stage(stage: Mapping[str, Any]) -> str:
    optimizer, words = stage.get("optimizer") or {}, []
    for key, text in (("epochs", "{} epochs"), ("image_size", "{} px"), ("batch_size", "batches of {}")):
        if stage.get(key):
            words.append(text.format(stage[key]))
    if stage.get("crop"):
        words.append(f"random parts of {100 * stage['crop']:.0f} % of each side")
    if optimizer.get("name"):
        schedule = (stage.get("schedule") or {}).get("name")
        words.append(
            f"{optimizer['name']} at {optimizer.get('learning_rate')}" + (f" ({schedule})" if schedule else "")
        )
    if (stage.get("loss") or {}).get("name"):
        words.append(stage["loss"]["name"].replace("_", " "))
    if stage.get("balance") not in (None, "none"):
        words.append(f"classes balanced by {stage['balance']}")
    if stage.get("keep"):
        by = f" by {stage['monitor']} on validation" if stage["keep"] == "best" and stage.get("monitor") else ""
        words.append(f"{stage['keep']} epoch kept{by}")
    return ", ".join(words)


def _describe_augmentation(augment: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{key} {value:g}" for key, value in augment.items() if isinstance(value, float) and value) or "none"
    )


def list_costs(cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return time, images and rate of each stage that was trained, from run.json's cost."""
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


def describe_transfer(transfer: Mapping[str, Any] | None) -> dict[str, Any] | None:
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


def describe_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of data.json, and a row for each part with its counts by class."""
    labels, rows = data["labels"], []
    for part, split in data.get("splits", {}).items():
        per_class = split.get("per_class") or {}
        counts = [per_class.get(label) for label in labels] if len(labels) <= _MOST_LABELS else []
        rows.append({"part": part, "name": split.get("name", ""), "n": split["n"], "counts": counts})
    facts = [("source", data["source"]), ("protocol", data["protocol"]), ("selected on", data["selected_on"])]
    if len(labels) > _MOST_LABELS:
        facts.append(("labels", f"{len(labels)}"))
    return {
        "facts": facts,
        "labels": labels if len(labels) <= _MOST_LABELS else [],
        "rows": rows,
        "notes": data.get("notes") or [],
    }
