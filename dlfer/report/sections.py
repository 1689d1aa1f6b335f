"""What a report shows beside the metrics: what was asked, what training cost, the data, and the transfer."""

from __future__ import annotations

from typing import NamedTuple

from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig, ModelConfig
from dlfer.config.stage_section import AugmentConfig, PretrainConfig, StageConfig
from dlfer.report.boosting import describe_setting
from dlfer.report.ensemble import describe_members
from dlfer.runs.records import Cost, DataRecord
from dlfer.runs.training_records import TransferRecord

STAGES = {"pretrain": "EF-FER1", "finetune": "EF-FER2"}
_MOST_LABELS = 12


def describe_question(config: ExperimentConfig | None, labels: list[str]) -> list[tuple[str, str]]:
    """Return what an experiment asked for, as (name, value).

    Args:
        config: of the run; None: not known.
        labels: those that the model predicts; empty: not known.
    """
    if config is None:
        return []
    finetune, facts = config.finetune, []
    if labels:
        shown = ", ".join(labels[:_MOST_LABELS]) + (" ..." if len(labels) > _MOST_LABELS else "")
        facts.append(("question", f"which of {len(labels)} labels would annotators give: {shown}?"))
    facts.append(("data", _describe_source(finetune.data)))
    if config.ensemble is not None:
        facts.append(("members", describe_members(config.ensemble)))
    else:
        has_dropout = config.model.dropout and config.boosting is None
        dropout = f", dropout {config.model.dropout:g}" if has_dropout else ""
        facts.append(("network", f"{_describe_network(config.model)}{dropout}"))
    facts.append((STAGES["pretrain"], _describe_pretraining(config.pretrain)))
    if config.boosting is not None:
        facts.append((STAGES["finetune"], describe_setting(config.boosting, finetune)))
    else:
        facts.append((STAGES["finetune"], _describe_stage(finetune)))
        facts.append(("augmentation", _describe_augmentation(finetune.augment)))
    for name, value in (("result", config.expected.result), ("cost", config.expected.cost)):
        if value is not None:
            facts.append((f"expected {name}", value))
    return facts


def _describe_network(model: ModelConfig) -> str:
    if model.branches:
        return f"{' with '.join(model.branches)}, fused by {model.fusion}"
    return model.backbone


def _describe_source(data: DataConfig) -> str:
    words = [data.source, *(text for text in (data.name, data.path) if text)]
    words.append(f"protocol {data.protocol}" + (f" ({data.split})" if data.split else ""))
    if data.select_on:
        words.append(f"selected on {100 * data.select_on:g} % of training")
    if data.fraction:
        words.append(f"{100 * data.fraction:g} % of the images")
    return ", ".join(words)


def _describe_pretraining(pretrain: PretrainConfig | None) -> str:
    if pretrain is None:
        return "left out"
    if pretrain.weights:
        return f"not trained here: weights {pretrain.weights}"
    return f"on {_describe_source(pretrain.data)}; {_describe_stage(pretrain)}"


def _describe_stage(stage: StageConfig) -> str:
    words = [f"{stage.epochs} epochs", f"{stage.image_size} px", f"batches of {stage.batch_size}"]
    if stage.crop:
        words.append(f"random crops of {100 * stage.crop:.0f} % of each side")
    words.append(f"{stage.optimizer.name} at {stage.optimizer.learning_rate} ({stage.schedule.name})")
    words.append(stage.loss.name.replace("_", " "))
    if stage.balance != "none":
        words.append(f"classes balanced by {stage.balance}")
    by = f" by {stage.monitor} on validation" if stage.keep == "best" else ""
    words.append(f"{stage.keep} epoch kept{by}")
    return ", ".join(words)


def _describe_augmentation(augment: AugmentConfig) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in augment if isinstance(value, float) and value) or "none"


class CostRow(NamedTuple):
    """What the training of one stage took; `rate` is in images per second."""

    stage: str
    seconds: float
    images: int | None
    rate: float | None
    image_size: str
    remark: str


def list_costs(cost: Cost | None) -> list[CostRow]:
    """Return time, images and rate of each stage that was trained."""
    if cost is None:
        return []
    cached = "taken from the cache; this is what it cost once" if cost.pretrain_was_cached else ""
    stages = (
        ("pretrain", cost.pretrain_seconds, cost.pretrain_images, cost.pretrain_image_size, cached),
        ("finetune", cost.finetune_seconds, cost.finetune_images, cost.finetune_image_size, ""),
    )
    return [
        CostRow(
            STAGES[stage],
            seconds,
            images,
            images / seconds if images and seconds else None,
            f"{size} px" if size else "–",
            remark,
        )
        for stage, seconds, images, size, remark in stages
        if seconds is not None
    ]


class TransferSection(NamedTuple):
    """What a page shows of the transfer: facts, and lists of variables by title."""

    facts: list[tuple[str, str]]
    lists: list[tuple[str, list[str]]]


def describe_transfer(transfer: TransferRecord | None) -> TransferSection | None:
    """Return the four lists of transfer.json, their lengths, and how far the features differ."""
    if transfer is None:
        return None
    lists = [
        ("loaded", transfer.loaded),
        ("newly initialised", transfer.newly_initialised),
        ("missing", transfer.missing),
        ("unexpected", transfer.unexpected),
    ]
    facts = [("weights", ", ".join(f"{len(names):,} {title}" for title, names in lists))]
    if transfer.feature_difference is not None:
        facts.append(("largest difference of features", f"{transfer.feature_difference:.1e}, on the same images"))
    if transfer.source:
        facts.append(("from", transfer.source))
    return TransferSection(facts, lists)


class SplitRow(NamedTuple):
    """A split with its name in the source and its numbers of images, in all and of each label."""

    split: str
    name: str
    n: int | None
    counts: list[int | None]


class DataSection(NamedTuple):
    """What a page shows of the data; `labels` is empty where there are too many for columns."""

    facts: list[tuple[str, str | None]]
    labels: list[str]
    rows: list[SplitRow]
    notes: list[str]


def describe_data(data: DataRecord) -> DataSection:
    """Return the facts of data.json, and a row for each split with its counts by class."""
    labels = data.labels if len(data.labels) <= _MOST_LABELS else []
    rows = []
    for name, split in data.splits.items():
        per_class = split.per_class or {}
        rows.append(SplitRow(name, split.name or "", split.n, [per_class.get(label) for label in labels]))
    facts = [("source", data.source), ("protocol", data.protocol), ("selected on", data.selected_on)]
    if not labels:
        facts.append(("labels", f"{len(data.labels)}"))
    return DataSection(facts, labels, rows, data.notes)
