"""The architecture of a run's model: the table of its blocks, and a diagram of the cascade as SVG within the page.

Both are made from the records of the run; what an earlier version did not record is left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dlfer.config.names import STAGES
from dlfer.config.schema import ExperimentConfig, PretrainConfig
from dlfer.report.headline import COMBINATIONS
from dlfer.runs.records import Cost, DataRecord
from dlfer.runs.run_records import Block, BoostingRecord, NetworkRecord, TransferRecord
from dlfer.runs.text import count_noun

if TYPE_CHECKING:
    from markupsafe import Markup

_MOST_BRANCHES, _MOST_LABELS = 4, 7


class BlockRow(NamedTuple):
    """A block of the network as the table shows it; `state` is "trained", "frozen" or "partly trained"."""

    name: str
    layer: str
    shape: str
    layers: int
    parameters: int
    trained: int
    state: str


class BlockTable(NamedTuple):
    """The blocks of a network, and what holds for all of them."""

    rows: list[BlockRow]
    parameters: int
    trained: int
    note: str


def describe_blocks(record: NetworkRecord | None) -> BlockTable | None:
    """Return the table of a network's blocks; None where they were not recorded."""
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
    """A box of a diagram: its title, its lines, and whether something was left out there (dashed)."""

    title: str
    lines: list[str]
    is_absent: bool = False


class Diagram(NamedTuple):
    """What becomes of what, from left to right.

    Attributes:
        boxes: in order.
        arrows: the lines of text at the arrow behind each box but the last.
        description: all of it in one sentence, for readers who do not see it.
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
    """Return the diagram of EF-FER1, the transfer and EF-FER2, or of an ensemble's members; None without an experiment."""
    if config is None:
        return None
    labels = [] if data is None else data.labels
    answer = Box(f"{len(labels)} labels" if labels else "labels", _list_labels(labels))
    if config.ensemble is not None:
        members = [member.name for member in config.ensemble.members]
        how = COMBINATIONS.get(config.ensemble.combine, config.ensemble.combine)
        boxes = [Box(f"{len(members)} members", members), Box("ensemble", [how]), answer]
        return _complete(boxes, [["probabilities"], []])
    boxes = [_describe_pretraining(config.pretrain, cost), _describe_finetuning(config, data, network, trees), answer]
    return _complete(boxes, [_describe_transfer(config.pretrain, transfer), []])


def _list_labels(labels: Sequence[str]) -> list[str]:
    more = [f"and {len(labels) - _MOST_LABELS} others"] if len(labels) > _MOST_LABELS else []
    return [", ".join(labels[:_MOST_LABELS]), *more] if labels else []


def _describe_pretraining(pretrain: PretrainConfig | None, cost: Cost | None) -> Box:
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


def _describe_finetuning(
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


def _describe_transfer(pretrain: PretrainConfig | None, transfer: TransferRecord | None) -> list[str]:
    if transfer is None:
        return ["nothing loaded"] if pretrain is None else ["transfer"]
    lines = ["transfer", f"{len(transfer.loaded):,} loaded", f"{len(transfer.newly_initialised):,} newly initialised"]
    branches = [f"{name}: {len(lists.loaded):,} loaded" for name, lists in transfer.branches.items()]
    return [*lines, *branches[:_MOST_BRANCHES]]


def _complete(boxes: list[Box], arrows: list[list[str]]) -> Diagram:
    texts = [f"{box.title}: {', '.join(box.lines)}" if box.lines else box.title for box in boxes]
    joined = texts[0]
    for arrow, text in zip(arrows, texts[1:], strict=True):
        joined += f"; then{' ' if arrow else ''}{', '.join(arrow)}: {text}" if arrow else f"; then {text}"
    return Diagram(boxes, arrows, f"{joined}.")


_LINE, _PAD, _WIDTH, _GAP = 18, 12, 232, 132
"""In CSS pixels: height of a line, margin in a box, width of a box, length of an arrow in a row of boxes."""
_CHARACTERS, _ARROW_CHARACTERS = 29, 18
"""Most in a line of a box and beside an arrow, at 13 and 12 pixels."""


def draw_diagram(diagram: Diagram, *, is_column: bool = False) -> Markup:
    """Return a diagram as an SVG element, boxes in a row, or for narrow screens in a column.

    Its colours are those of the page (classes in base.html.j2). The column is hidden from screen readers, since the row
    beside it says the same.
    """
    from markupsafe import Markup, escape

    texts = [[line for text in box.lines for line in textwrap.wrap(text, _CHARACTERS) or [""]] for box in diagram.boxes]
    notes = [
        [line for text in arrow for line in textwrap.wrap(text, 30 if is_column else _ARROW_CHARACTERS)]
        for arrow in diagram.arrows
    ]
    heights = [2 * _PAD + _LINE * (1 + len(lines)) for lines in texts]
    parts, left, top = [], 1, 1
    # In a row half of an arrow's lines stand above it, the others below.
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
    """Return a line with a head; it goes to the right or down."""
    from markupsafe import Markup

    (x0, y0), (x1, y1) = start, end
    head = f"M{x1} {y1}l-9 -5v10z" if y0 == y1 else f"M{x1} {y1}l-5 -9h10z"
    stop = f"M{x0} {y0}L{x1 - 8 if y0 == y1 else x1} {y1 if y0 == y1 else y1 - 8}"
    return Markup('<path class="line" d="{}"/><path class="head" d="{}"/>').format(stop, head)
