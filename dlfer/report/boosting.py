"""What a report shows of boosted trees: how they were grown, and what each feature level of the backbone gave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dlfer.config.sections import BoostingConfig
from dlfer.config.stage_section import StageConfig
from dlfer.report.figures import COLOURS, HATCHES, figure_style, new_figure
from dlfer.report.page import format_count, format_percent
from dlfer.runs.training_records import BoostedLevel, BoostingRecord
from dlfer.runs.wording import format_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMPORTANCE_NOTES = (
    "The share of the gain says where the trees found the splits that lowered the training loss most. It does not "
    "measure what a level is worth: features that carry the same information share the gain by chance, a level with many "
    "features has more chances, and a level without any gain might have done as well alone. To learn what a level is "
    "worth, grow trees without it (boosting.levels: last) and compare the metrics on validation.",
)


def describe_setting(boosting: BoostingConfig, stage: StageConfig) -> str:
    """Return the section `boosting` of an experiment in one line, with what of `finetune` applies to trees."""
    words = [
        f"at most {stage.epochs} epochs of {boosting.rounds_per_epoch} rounds of trees",
        f"features at {stage.image_size} px",
        f"depth {boosting.max_depth}",
        f"rate {boosting.learning_rate:g}",
        f"lambda {boosting.reg_lambda:g}",
        f"gamma {boosting.gamma:g}",
        f"{boosting.subsample:.0%} of the images a round",
        f"{boosting.colsample:.0%} of the features a tree",
    ]
    if stage.balance != "none":
        words.append(f"classes balanced by {stage.balance}")
    normalize = boosting.normalize
    rows = "weighted so that classes count alike" if normalize.rows else "unweighted"
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
    return f"Share of the total gain of all splits by level of the backbone, from the image on: {shares}."
