"""What a report shows beside the metrics: what was asked, what training cost, the data, the transfer, and the trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dlfer.config.names import STAGES
from dlfer.config.schema import ExperimentConfig, PretrainConfig, StageConfig
from dlfer.config.sections import BoostingConfig, DataConfig, EnsembleConfig
from dlfer.report.figures import COLOURS, HATCHES, MOST_LABELS, figure_style, new_figure
from dlfer.report.headline import COMBINATIONS
from dlfer.report.page import format_count, format_interval, format_percent
from dlfer.runs.metrics_record import Metrics, is_missing
from dlfer.runs.records import Cost, DataRecord
from dlfer.runs.run import format_duration
from dlfer.runs.run_records import BoostedLevel, BoostingRecord, TransferRecord
from dlfer.runs.text import count_noun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        shown = ", ".join(labels[:MOST_LABELS]) + (" ..." if len(labels) > MOST_LABELS else "")
        facts.append(("question", f"which of {len(labels)} labels would annotators give: {shown}?"))
    facts.append(("data", _describe_source(finetune.data)))
    if config.ensemble is not None:
        facts.append(("members", describe_members(config.ensemble)))
    else:
        model = config.model
        network = f"{' with '.join(model.branches)}, fused by {model.fusion}" if model.branches else model.backbone
        network += "" if model.feature_level is None else f" up to feature level {model.feature_level}"
        dropout = f", dropout {model.dropout:g}" if model.dropout and config.boosting is None else ""
        facts.append(("network", f"{network}{dropout}"))
    facts.append((STAGES["pretrain"], _describe_pretraining(config.pretrain)))
    if config.boosting is not None:
        facts.append((STAGES["finetune"], describe_setting(config.boosting, finetune)))
    else:
        facts.append((STAGES["finetune"], _describe_stage(finetune)))
        augment = [f"{key} {value:g}" for key, value in finetune.augment if isinstance(value, float) and value]
        facts.append(("augmentation", ", ".join(augment) or "none"))
        if finetune.distill is not None:
            section = finetune.distill
            setting = f"weight {section.weight:g}, temperature {section.temperature:g}"
            facts.append(("distilled from", f"{', '.join(section.names)} ({setting})"))
    for name, value in (("result", config.expected.result), ("cost", config.expected.cost)):
        if value is not None:
            facts.append((f"expected {name}", value))
    return facts


def _describe_source(data: DataConfig) -> str:
    words = [data.source, *(text for text in (data.name, data.path) if text)]
    words.append(f"protocol {data.protocol}" + (f" ({data.split})" if data.split else ""))
    if data.folds is not None:
        words[-1] += f" ({data.folds} folds" + (")" if data.fold is None else f", fold {data.fold} is the test)")
    if data.select_on:
        words.append(f"selected on {100 * data.select_on:g} % of training")
    if data.fraction:
        words.append(f"{100 * data.fraction:g} % of the images")
    return ", ".join(words)


def _describe_pretraining(pretrain: PretrainConfig | None) -> str:
    if pretrain is None:
        return "left out"
    if pretrain.weights:
        return f"not trained here: weights {pretrain.describe_weights()}"
    return f"on {_describe_source(pretrain.data)}; {_describe_stage(pretrain)}"


def _describe_stage(stage: StageConfig) -> str:
    words = [count_noun(stage.epochs, "epoch"), f"{stage.image_size} px", f"batches of {stage.batch_size}"]
    if stage.crop:
        words.append(f"random crops of {100 * stage.crop:.0f} % of each side")
    words.append(f"{stage.optimizer.name} at {stage.optimizer.learning_rate} ({stage.schedule.name})")
    words.append(stage.loss.name.replace("_", " "))
    if stage.balance != "none":
        words.append(f"classes balanced by {stage.balance}")
    by = f" by {stage.monitor} on validation" if stage.keep == "best" else ""
    words.append(f"{stage.keep} epoch kept{by}")
    return ", ".join(words)


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
    cached = "taken from the cache; the cost is that of the original training" if cost.pretrain_was_cached else ""
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
    """Return the lists of transfer.json, their lengths, and how far the features differ."""
    if transfer is None:
        return None
    lists = [
        ("loaded", transfer.loaded),
        ("newly initialised", transfer.newly_initialised),
        ("missing", transfer.missing),
        ("unexpected", transfer.unexpected),
    ]
    if transfer.left_out:
        lists.append(("left out by model.feature_level", transfer.left_out))
    facts = [("weights", ", ".join(f"{len(names):,} {title}" for title, names in lists))]
    if transfer.feature_difference is not None:
        facts.append(("largest difference of features", f"{transfer.feature_difference:.1e}, on the same images"))
    if transfer.source and not transfer.branches:
        facts.append(("from", transfer.source))
    for name, branch in transfer.branches.items():
        facts.append((name, f"{branch.source}; {len(branch.loaded):,} loaded"))
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
    labels = data.labels if len(data.labels) <= MOST_LABELS else []
    rows = []
    for name, split in data.splits.items():
        per_class = split.per_class or {}
        rows.append(SplitRow(name, split.name or "", split.n, [per_class.get(label) for label in labels]))
    facts = [("source", data.source), ("protocol", data.protocol), ("selected on", data.selected_on)]
    if not labels:
        facts.append(("labels", f"{len(data.labels)}"))
    return DataSection(facts, labels, rows, [*(data.reading.describe() if data.reading else []), *data.notes])


IMPORTANCE_NOTES = (
    "The share of the gain shows which splits lowered the training loss most. It does not measure the value of a "
    "level: features with the same information share the gain by chance, and a level with many features has more "
    "chances. To measure the value of a level, train without it (boosting.levels: last) and compare validation "
    "metrics.",
)


def describe_setting(boosting: BoostingConfig, stage: StageConfig) -> str:
    """Return the section `boosting` of an experiment in one line, with what of `finetune` applies to trees."""
    words = [
        f"at most {count_noun(stage.epochs, 'epoch')} of {boosting.rounds_per_epoch} rounds of trees",
        f"features at {stage.image_size} px",
        f"depth {boosting.max_depth}",
        f"rate {boosting.learning_rate:g}",
        f"lambda {boosting.reg_lambda:g}",
        f"gamma {boosting.gamma:g}",
        f"{boosting.subsample:.0%} of the images per round",
        f"{boosting.colsample:.0%} of the features per tree",
    ]
    if stage.balance != "none":
        words.append(f"classes balanced by {stage.balance}")
    normalize = boosting.normalize
    rows = "weighted so that all classes count equally" if normalize.rows else "unweighted"
    leaves = "within -1..1" if normalize.leaves else "as they are"
    words.append(f"rows {rows}, features {normalize.features}, leaves {leaves}")
    if stage.keep == "best":
        words.append(f"best epoch kept by {stage.monitor} on validation")
    return ", ".join(words)


class TreesSection(NamedTuple):
    """What a page shows of the trees."""

    facts: list[tuple[str, str]]
    levels: list[BoostedLevel]
    num_features: int
    notes: Sequence[str]


def describe_trees(record: BoostingRecord | None) -> TreesSection | None:
    """Return the facts, the table of levels and the notes of boosting.json; None where there is none."""
    if record is None:
        return None
    kept = f"{format_count(record.rounds)} rounds, {format_count(record.trees)} trees"
    cached = ", taken from the cache here" if record.features_were_cached else ""
    facts = [
        ("kept", f"{kept}; an epoch is {record.rounds_an_epoch} rounds"),
        ("features", f"computed in {format_duration(record.features_seconds)}{cached}"),
        ("growing", format_duration(record.trees_seconds)),
    ]
    if record.row_weights:
        weights = ", ".join(f"{label} {weight:.2f}" for label, weight in record.row_weights.items())
        facts.append(("weight of an image", weights))
    return TreesSection(facts, record.levels, record.num_features, IMPORTANCE_NOTES)


def draw_levels(levels: Sequence[BoostedLevel]) -> Figure:
    """Draw each level's share of the total gain beside its share of the features, from the image on."""
    total = sum(level.features for level in levels)
    with figure_style():
        figure = new_figure(7.5, 1.0 + 0.55 * len(levels))
        axes = figure.subplots()
        series = (
            ("share of the gain", [100 * (level.gain or 0) for level in levels]),
            ("share of the features", [100 * level.features / total for level in levels]),
        )
        for number, (label, values) in enumerate(series):
            places = [index + 0.38 * number for index in range(len(levels))]
            bars = axes.barh(
                places,
                values,
                height=0.36,
                color=COLOURS[number],
                hatch=HATCHES[number],
                edgecolor="white",
                label=label,
            )
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.set_yticks([index + 0.19 for index in range(len(levels))], [level.name for level in levels])
        axes.invert_yaxis()
        axes.set_xlabel("percent")
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="best")
    return figure


def describe_levels(levels: Sequence[BoostedLevel]) -> str:
    """Return what a reader who does not see the figure needs to know."""
    shares = "; ".join(f"{level.name}, {level.features} features: {format_percent(level.gain)}" for level in levels)
    return f"Share of the total gain of all splits by feature level of the backbone, from the image to the output: {shares}."


class PublishedRow(NamedTuple):
    """A system with its accuracy; `protocol` says what is known of how it was judged."""

    system: str
    accuracy: float
    interval: str
    protocol: str
    remark: str
    is_own: bool = False


NOT_CHECKED = "protocol not checked"
PUBLISHED = (
    ("DLFER, with EF-FER1", 0.8209, "n = 7,178; “80 % of the total images post-preprocessing”"),
    ("ResEmoteNet", 0.7979, "users of its code report about 60 %"),
    ("EmoNeXt", 0.7612, "ten crops; users of its code report 71.4 to 71.6 %"),
    ("ResMaskNet", 0.7414, "random test-time augmentation; users of its code report 65.6 to 73.6 %"),
    ("VGGNet", 0.7328, "a validation value: PublicTest and PrivateTest are swapped in its code"),
    ("DLFER, without EF-FER1", 0.6621, "n = 7,178"),
)
"""Accuracies on FER2013 as published, 0..1, and what is known of them."""


def list_published(config: ExperimentConfig | None, metrics: Metrics, name: str) -> list[PublishedRow]:
    """Return the published accuracies on FER2013 with that of this run among them, the largest first.

    Empty for a run of other data, and for one without a judged split.
    """
    judged = metrics.judged
    if (
        config is None
        or config.finetune.data.source != "fer2013"
        or judged is None
        or is_missing(judged.accuracy.value)
    ):
        return []
    rows = [PublishedRow(system, value, "", NOT_CHECKED, remark) for system, value, remark in PUBLISHED]
    own = PublishedRow(
        f"this run: {name}",
        judged.accuracy.value,
        format_interval(judged.accuracy),
        f"{metrics.protocol or config.finetune.data.protocol}, {metrics.judged_split}",
        f"n = {format_count(judged.n)}",
        is_own=True,
    )
    return sorted([*rows, own], key=lambda row: -row.accuracy)


def describe_members(section: EnsembleConfig) -> str:
    """Return in words what the section `ensemble` of an experiment asks for."""
    members = []
    for member in section.members:
        keys = ", ".join(f"{key}: {value}" for key, value in (member.set or {}).items())
        members.append(f"{member.name} ({keys or member.model})")
    return f"{'; '.join(members)}; combined by {COMBINATIONS.get(section.combine, section.combine)}"
