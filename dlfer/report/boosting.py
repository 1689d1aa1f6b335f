"""What a report shows of boosted trees: how they were grown, and what each level of the backbone gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlfer.report.figures import COLOURS, HATCHES, figure_style, new_figure
from dlfer.report.page import format_count, format_duration, format_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMPORTANCE_NOTES = (
    "The share of the gain says where the trees found the splits that lowered the training loss most. It is no measure "
    "of what a level is worth: features that say the same share the gain by chance, a level with many features has "
    "more chances, and a level without any gain might have done as well alone. To learn what a level is worth, grow "
    "trees without it (boosting.levels: last) and compare the figures on validation.",
)


def describe_setting(boosting: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    """Return the section `boosting` of an experiment in one line, with what of `finetune` applies to trees."""
    words = []
    if stage.get("epochs") and boosting.get("rounds_per_epoch"):
        words.append(f"at most {stage['epochs']} epochs of {boosting['rounds_per_epoch']} rounds of trees")
    if stage.get("image_size"):
        words.append(f"features at {stage['image_size']} px")
    for key, text in (
        ("max_depth", "depth {}"),
        ("learning_rate", "rate {:g}"),
        ("reg_lambda", "lambda {:g}"),
        ("gamma", "gamma {:g}"),
        ("subsample", "{:.0%} of the images a round"),
        ("colsample", "{:.0%} of the features a tree"),
    ):
        if boosting.get(key) is not None:
            words.append(text.format(boosting[key]))
    if stage.get("balance") not in (None, "none"):
        words.append(f"classes balanced by {stage['balance']}")
    normalize = boosting.get("normalize") or {}
    if normalize:
        rows = "weighted so that classes count alike" if normalize.get("rows") else "unweighted"
        leaves = "within -1..1" if normalize.get("leaves") else "as they are"
        words.append(f"rows {rows}, features {normalize.get('features')}, leaves {leaves}")
    if stage.get("keep") == "best" and stage.get("monitor"):
        words.append(f"best epoch kept by {stage['monitor']} on validation")
    return ", ".join(words)


def describe_trees(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the facts, the table of levels and the notes of boosting.json; None where there is none."""
    if record is None:
        return None
    facts = [
        (
            "kept",
            f"{format_count(record['rounds'])} rounds, {format_count(record['trees'])} trees; an epoch is "
            f"{record['rounds_an_epoch']} rounds",
        ),
        (
            "features",
            f"computed in {format_duration(record['features_seconds'])}"
            + (", taken from the cache here" if record["features_were_cached"] else ""),
        ),
        ("growing", format_duration(record["trees_seconds"])),
    ]
    if record.get("row_weights"):
        weights = ", ".join(f"{label} {weight:.2f}" for label, weight in record["row_weights"].items())
        facts.append(("weight of an image", weights))
    total = sum(level["features"] for level in record["levels"])
    rows = [{**level, "share": level["features"] / total} for level in record["levels"]]
    return {"facts": facts, "levels": rows, "notes": list(IMPORTANCE_NOTES)}


def draw_levels(levels: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each level's share of the total gain beside its share of the features, from the image on.

    Args:
        levels: of boosting.json, {"name", "features", "gain"} each.
    """
    total = sum(level["features"] for level in levels)
    with figure_style():
        figure = new_figure(7.5, 1.0 + 0.55 * len(levels))
        axes = figure.subplots()
        series = (
            ("share of the gain", [100 * level["gain"] for level in levels]),
            ("share of the features", [100 * level["features"] / total for level in levels]),
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
        axes.set_yticks([index + 0.19 for index in range(len(levels))], [level["name"] for level in levels])
        axes.invert_yaxis()
        axes.set_xlabel("percent")
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="best")
    return figure


def describe_levels(levels: Sequence[Mapping[str, Any]]) -> str:
    """Return what a reader who does not see the figure needs to know."""
    shares = "; ".join(
        f"{level['name']}, {level['features']} features: {format_percent(level['gain'])}" for level in levels
    )
    return f"Share of the total gain of all splits by level of the backbone, from the image on: {shares}."
