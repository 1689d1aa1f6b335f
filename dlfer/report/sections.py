"""Sections of a run's report beside its metrics: settings, cost, data, transfer, trees, other systems, architecture.

The architecture is a table of the network's blocks and a diagram of the cascade as inline SVG. Everything comes from
the run's records; what an earlier version did not record is left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dlfer.config.names import STAGES
from dlfer.config.schema import ExperimentConfig, PretrainConfig, StageConfig
from dlfer.config.sections import BoostingConfig, DataConfig, EnsembleConfig
from dlfer.report.figures import COLOURS, HATCHES, MAX_LABELS, figure_style, new_figure
from dlfer.report.headline import COMBINATIONS
from dlfer.report.page import format_count, format_interval, format_percent
from dlfer.runs.metrics_record import Metrics, is_missing
from dlfer.runs.records import Cost, DataRecord
from dlfer.runs.run import format_duration
from dlfer.runs.run_records import Block, BoostedLevel, BoostingRecord, NetworkRecord, TransferRecord
from dlfer.runs.text import count_noun

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


def describe_question(config: ExperimentConfig | None, labels: list[str]) -> list[tuple[str, str]]:
    """Return the settings of an experiment as (name, value) pairs.

    Args:
        config: the run's experiment; None if it is unknown, which gives an empty list.
        labels: the labels that the model predicts; empty if they are unknown.
    """
    if config is None:
        return []
    finetune, facts = config.finetune, []
    if labels:
        shown = ", ".join(labels[:MAX_LABELS]) + (" ..." if len(labels) > MAX_LABELS else "")
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
        words.append(f"validation is {100 * data.select_on:g} % of training")
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
    """The training cost of one stage; `rate` is in images per second."""

    stage: str
    seconds: float
    images: int | None
    rate: float | None
    image_size: str
    remark: str


def list_costs(cost: Cost | None) -> list[CostRow]:
    """Return the training time, number of images and throughput of each trained stage."""
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
    """The transfer section of a page: facts, and titled lists of variable names."""

    facts: list[tuple[str, str]]
    lists: list[tuple[str, list[str]]]


def describe_transfer(transfer: TransferRecord | None) -> TransferSection | None:
    """Return the variable lists of transfer.json, their lengths, and the largest feature difference; or None."""
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
    """A split, its name in the data source, and its number of images in total and for each label."""

    split: str
    name: str
    n: int | None
    counts: list[int | None]


class DataSection(NamedTuple):
    """The data section of a page; `labels` is empty if there are too many for columns."""

    facts: list[tuple[str, str | None]]
    labels: list[str]
    rows: list[SplitRow]
    notes: list[str]


def describe_data(data: DataRecord) -> DataSection:
    """Return the facts and notes of data.json, and a row with class counts for each split."""
    labels = data.labels if len(data.labels) <= MAX_LABELS else []
    rows = []
    for name, split in data.splits.items():
        per_class = split.per_class or {}
        rows.append(SplitRow(name, split.name or "", split.n, [per_class.get(label) for label in labels]))
    facts = [("source", data.source), ("protocol", data.protocol), ("validation split", data.selected_on)]
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
    """Return the `boosting` section of an experiment on one line, with the `finetune` settings that apply to trees."""
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
    """The section of a page on a boosted model's trees."""

    facts: list[tuple[str, str]]
    levels: list[BoostedLevel]
    num_features: int
    notes: Sequence[str]


def describe_trees(record: BoostingRecord | None) -> TreesSection | None:
    """Return the facts and feature levels of boosting.json with notes on them; None without a record."""
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
    """Draw each feature level's share of the total gain beside its share of the features, from input to output."""
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
    """Return the alternative text of `draw_levels`."""
    shares = "; ".join(f"{level.name}, {level.features} features: {format_percent(level.gain)}" for level in levels)
    return f"Share of the total gain of all splits by feature level of the backbone, from the image to the output: {shares}."


class PublishedRow(NamedTuple):
    """A system and its accuracy; `protocol` says how it was evaluated, as far as that is known."""

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
"""Published systems: name, accuracy on FER2013 in 0..1, and a remark on its evaluation."""


def list_published(config: ExperimentConfig | None, metrics: Metrics, name: str) -> list[PublishedRow]:
    """Return the published accuracies on FER2013 together with that of this run, largest first.

    The list is empty if the run used other data or was not evaluated.
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
    """Return the `ensemble` section of an experiment in words: its members and how they are combined."""
    members = []
    for member in section.members:
        keys = ", ".join(f"{key}: {value}" for key, value in (member.set or {}).items())
        members.append(f"{member.name} ({keys or member.model})")
    return f"{'; '.join(members)}; combined by {COMBINATIONS.get(section.combine, section.combine)}"


_MAX_BRANCHES, _MAX_NAMED = 4, 7


class BlockRow(NamedTuple):
    """A row of the block table; `state` is "trained", "frozen", "partly trained", or "–" without parameters."""

    name: str
    layer: str
    shape: str
    layers: int
    parameters: int
    trained: int
    state: str


class BlockTable(NamedTuple):
    """The blocks of a network, its total numbers of parameters, and a note."""

    rows: list[BlockRow]
    parameters: int
    trained: int
    note: str


def describe_blocks(record: NetworkRecord | None) -> BlockTable | None:
    """Return the table of a network's blocks; None if they were not recorded."""
    if record is None or not record.blocks:
        return None
    rows = [
        BlockRow(
            ", ".join(word for word in (block.branch, block.name) if word),
            block.layer,
            " x ".join(f"{length:,}" for length in block.shape),
            block.layers,
            block.parameters,
            block.trained,
            _describe_state(block),
        )
        for block in record.blocks
    ]
    size, colours = record.image_size, "grey" if record.channels == 1 else "RGB"
    note = (
        f"From {colours} images, which the network itself resizes to {size} x {size} pixels. A feature level is the part of a "
        "backbone that works at one resolution; its output is that of the named layer, height x width x channels. "
        "Parameters are counted as trained if gradients change them in EF-FER2; BatchNorm's statistics are not."
    )
    return BlockTable(rows, record.parameters, record.trained, note)


def _describe_state(block: Block) -> str:
    if not block.parameters:
        return "–"
    if not block.trained:
        return "frozen"
    return "trained" if block.trained == block.parameters - block.statistics else "partly trained"


class Box(NamedTuple):
    """A box of a diagram; `is_absent` marks a stage that was left out, drawn dashed."""

    title: str
    lines: list[str]
    is_absent: bool = False


class Diagram(NamedTuple):
    """A flow diagram of boxes connected by arrows, from left to right.

    Attributes:
        boxes: in order.
        arrows: the text lines at the arrow after each box but the last.
        description: the alternative text, one sentence.
    """

    boxes: list[Box]
    arrows: list[list[str]]
    description: str


def describe_cascade(
    config: ExperimentConfig | None,
    *,
    data: DataRecord | None,
    transfer: TransferRecord | None,
    network: NetworkRecord | None,
    cost: Cost | None,
    trees: BoostingRecord | None,
) -> Diagram | None:
    """Return the diagram of EF-FER1, transfer and EF-FER2, or of an ensemble's members; None without a `config`."""
    if config is None:
        return None
    labels = [] if data is None else data.labels
    answer = Box(f"{len(labels)} labels" if labels else "labels", _list_labels(labels))
    if config.ensemble is not None:
        members = [member.name for member in config.ensemble.members]
        how = COMBINATIONS.get(config.ensemble.combine, config.ensemble.combine)
        boxes = [Box(f"{len(members)} members", members), Box("ensemble", [how]), answer]
        return _complete(boxes, [["probabilities"], []])
    boxes = [_box_pretraining(config.pretrain, cost), _box_finetuning(config, data, network, trees), answer]
    return _complete(boxes, [_label_transfer(config.pretrain, transfer), []])


def _list_labels(labels: Sequence[str]) -> list[str]:
    more = [f"and {len(labels) - _MAX_NAMED} others"] if len(labels) > _MAX_NAMED else []
    return [", ".join(labels[:_MAX_NAMED]), *more] if labels else []


def _box_pretraining(pretrain: PretrainConfig | None, cost: Cost | None) -> Box:
    if pretrain is None:
        return Box(STAGES["pretrain"], ["left out: random weights"], is_absent=True)
    if pretrain.weights:
        return Box(STAGES["pretrain"], [f"not trained here: weights {pretrain.describe_weights()}"])
    lines = [
        pretrain.data.source,
        f"{pretrain.image_size} x {pretrain.image_size} px, {count_noun(pretrain.epochs, 'epoch')}",
    ]
    if cost is not None and cost.pretrain_images:
        lines.append(f"{count_noun(cost.pretrain_images, 'image')} seen")
    return Box(STAGES["pretrain"], lines)


def _box_finetuning(
    config: ExperimentConfig, data: DataRecord | None, network: NetworkRecord | None, trees: BoostingRecord | None
) -> Box:
    stage, model = config.finetune, config.model
    lines = [" and ".join(model.branches) or model.backbone]
    train = None if data is None else data.splits.get("train")
    size = f", {count_noun(train.n, 'image')}" if train is not None and train.n is not None else ""
    lines.append(f"{stage.data.source}{size}")
    lines.append(f"{stage.image_size} x {stage.image_size} px, at most {count_noun(stage.epochs, 'epoch')}")
    if network is not None:
        lines.append(f"{network.parameters:,} parameters, {network.trained:,} trained")
    if trees is not None:
        lines.append(f"{trees.trees:,} trees on {trees.num_features:,} features")
    return Box(STAGES["finetune"], lines)


def _label_transfer(pretrain: PretrainConfig | None, transfer: TransferRecord | None) -> list[str]:
    if transfer is None:
        return ["nothing loaded"] if pretrain is None else ["transfer"]
    lines = ["transfer", f"{len(transfer.loaded):,} loaded", f"{len(transfer.newly_initialised):,} newly initialised"]
    branches = [f"{name}: {len(lists.loaded):,} loaded" for name, lists in transfer.branches.items()]
    return [*lines, *branches[:_MAX_BRANCHES]]


def _complete(boxes: list[Box], arrows: list[list[str]]) -> Diagram:
    texts = [f"{box.title}: {', '.join(box.lines)}" if box.lines else box.title for box in boxes]
    joined = texts[0]
    for arrow, text in zip(arrows, texts[1:], strict=True):
        joined += f"; then{' ' if arrow else ''}{', '.join(arrow)}: {text}" if arrow else f"; then {text}"
    return Diagram(boxes, arrows, f"{joined}.")


_LINE, _PAD, _WIDTH, _GAP = 18, 12, 232, 132
"""Layout in CSS pixels: line height, padding of a box, width of a box, and length of an arrow in a row of boxes."""
_CHARACTERS, _ARROW_CHARACTERS = 29, 18
"""Maximum characters per line in a box and beside an arrow, at font sizes of 13 and 12 pixels."""


def draw_diagram(diagram: Diagram, *, is_column: bool = False) -> Markup:
    """Return a diagram as an SVG element, with its boxes in a row or, for narrow screens, in a column.

    The page's CSS (classes in base.html.j2) sets the colours. The column is hidden from screen readers, because the row
    is on the page, too.
    """
    from markupsafe import Markup, escape

    texts = [[line for text in box.lines for line in textwrap.wrap(text, _CHARACTERS) or [""]] for box in diagram.boxes]
    notes = [
        [line for text in arrow for line in textwrap.wrap(text, 30 if is_column else _ARROW_CHARACTERS)]
        for arrow in diagram.arrows
    ]
    heights = [2 * _PAD + _LINE * (1 + len(lines)) for lines in texts]
    parts, left, top = [], 1, 1
    # In a row, half of an arrow's text lines are drawn above the arrow and half below.
    tallest = max([*heights, *(2 * _LINE * -(-len(lines) // 2) + 2 * _PAD for lines in notes)])
    for number, box in enumerate(diagram.boxes):
        height = heights[number] if is_column else tallest
        parts.append(_draw_box(box, texts[number], left=left, top=top, height=height))
        if number == len(diagram.arrows):
            break
        if is_column:
            length = max(34, _LINE * len(notes[number]) + _PAD)
            parts.append(_draw_arrow((left + 24, top + height), (left + 24, top + height + length)))
            first = top + height + (length - _LINE * len(notes[number])) / 2 + 13
            parts.append(_draw_lines(notes[number], "arrow", left=left + 38, top=first))
            top += height + length
        else:
            middle = top + height / 2
            parts.append(_draw_arrow((left + _WIDTH, middle), (left + _WIDTH + _GAP, middle)))
            half, centre = -(-len(notes[number]) // 2), left + _WIDTH + _GAP / 2 - 4
            above, below = notes[number][:half], notes[number][half:]
            first = middle - 8 - _LINE * (half - 1)
            parts.append(_draw_lines(above, "arrow middle", left=centre, top=first))
            parts.append(_draw_lines(below, "arrow middle", left=centre, top=middle + 20))
            left += _WIDTH + _GAP
    width = _WIDTH + 2 if is_column else left + _WIDTH + 1
    height = top + heights[-1] + 1 if is_column else tallest + 2
    name = (
        Markup('aria-hidden="true"') if is_column else Markup('role="img" aria-label="{}"').format(diagram.description)
    )
    kind = escape("flow column" if is_column else "flow")
    return Markup('<svg class="{}" viewBox="0 0 {} {}" style="max-width: {}px" {}>{}</svg>').format(
        kind, width, height, width, name, Markup("").join(parts)
    )


def _draw_box(box: Box, lines: Sequence[str], *, left: float, top: float, height: float) -> Markup:
    from markupsafe import Markup

    kind = "absent" if box.is_absent else ""
    frame = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="7"/>').format(
        kind, left, top, _WIDTH, height
    )
    first = top + _PAD + 13
    title = _draw_lines([box.title], "title", left=left + _PAD, top=first)
    return frame + title + _draw_lines(lines, "", left=left + _PAD, top=first + _LINE)


def _draw_lines(lines: Sequence[str], kind: str, *, left: float, top: float) -> Markup:
    from markupsafe import Markup

    form = Markup('<text class="{}" x="{}" y="{}">{}</text>')
    return Markup("").join(form.format(kind, left, top + _LINE * number, line) for number, line in enumerate(lines))


def _draw_arrow(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    """Return an arrow that points right or down."""
    from markupsafe import Markup

    (x0, y0), (x1, y1) = start, end
    head = f"M{x1} {y1}l-9 -5v10z" if y0 == y1 else f"M{x1} {y1}l-5 -9h10z"
    stop = f"M{x0} {y0}L{x1 - 8 if y0 == y1 else x1} {y1 if y0 == y1 else y1 - 8}"
    return Markup('<path class="line" d="{}"/><path class="head" d="{}"/>').format(stop, head)
