"""What a report says of milestones and of an ensemble's members: tables, and a confusion matrix for each milestone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlfer.config.sections import EnsembleConfig
from dlfer.report.figures import INK, SOFT, figure_style, new_figure
from dlfer.report.headline import VIEWS
from dlfer.report.page import format_count, format_percent
from dlfer.runs.metrics_record import Estimate, Metrics, SplitMetrics, SplitSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMBINATIONS = {
    "average": "average of the probabilities",
    "vote": "vote",
    "trained": "trained on validation",
}
_MOST_LABELS = 12
_COLUMNS = 3


def describe_members(section: EnsembleConfig) -> str:
    """Return in words what the section `ensemble` of an experiment asks for."""
    members = []
    for member in section.members:
        keys = ", ".join(f"{key}: {value}" for key, value in (member.set or {}).items())
        members.append(f"{member.name} ({keys or member.model})")
    return f"{'; '.join(members)}; combined by {COMBINATIONS.get(section.combine, section.combine)}"


class MilestoneRow(NamedTuple):
    """The metrics of the judged split after `epoch` epochs, with the recall of each class."""

    epoch: int
    metrics: SplitMetrics
    recalls: list[Estimate]


class MilestoneTable(NamedTuple):
    """What was reached at some epochs, a row for each; `labels` is empty where there are too many for columns."""

    split: str
    labels: list[str]
    rows: list[MilestoneRow]
    notes: list[str]


def describe_milestones(metrics: Metrics) -> MilestoneTable | None:
    """Return what was reached at some epochs; None where no milestone was judged."""
    rows, split = _choose_rows(metrics), _name_split(metrics)
    if not rows:
        return None
    labels = rows[0].metrics.labels
    view = VIEWS.get(metrics.headline, metrics.headline)
    notes = [
        f"The model as it was at the end of each of these epochs, judged on {split} (n = "
        f"{format_count(rows[0].metrics.n)}) by {view}. None of them was selected by these values: the "
        "model that the run ends with is chosen on validation, by itself.",
        "Emotion detection rate: the share of the classes that are predicted as themselves more often than as any other.",
    ]
    return MilestoneTable(split, labels if len(labels) <= _MOST_LABELS else [], rows, notes)


class EnsembleRow(NamedTuple):
    """A member or a combination with its accuracy at each milestone and as it was kept."""

    name: str
    remark: str
    is_used: bool
    cells: list[Estimate | None]


class EnsembleTable(NamedTuple):
    """Members and combinations of an ensemble, with a column for each milestone and the end."""

    split: str
    columns: list[str]
    rows: list[EnsembleRow]
    notes: list[str]


def describe_ensemble(metrics: Metrics) -> EnsembleTable | None:
    """Return the table of an ensemble; None where there is no ensemble."""
    ensemble = metrics.ensemble
    if ensemble is None:
        return None
    is_test = metrics.members[0].test is not None
    split = "test" if is_test else "validation"

    def get_accuracy(row) -> Estimate | None:
        summary: SplitSummary | None = row.test if is_test else row.validation
        return None if summary is None else summary.accuracy

    stages = [*ensemble.milestones, metrics]
    rows = [
        EnsembleRow(member.name, member.note, False, [get_accuracy(stage.members[number]) for stage in stages])
        for number, member in enumerate(metrics.members)
    ]
    for number, combination in enumerate(metrics.combinations):
        name = f"ensemble: {COMBINATIONS.get(combination.name, combination.name)}"
        remark = "this run's model" if combination.is_used else ""
        cells = [get_accuracy(stage.combinations[number]) for stage in stages]
        rows.append(EnsembleRow(name, remark, combination.is_used, cells))
    judged = metrics.members[0].test if is_test else metrics.members[0].validation
    view = VIEWS.get(ensemble.view, ensemble.view)
    notes = [
        f"Accuracy on {split}, n = {format_count(judged and judged.n)}, by {view}. “As kept” is each member's best epoch "
        "on validation."
    ]
    if ensemble.paired is not None:
        notes.append(f"Against the member that is best on validation, on the same images: {ensemble.paired.sentence}")
    notes.append(
        "The trained combination is a logistic regression on the logarithms of the members' probabilities, fitted on "
        "validation alone. Its value on validation is out of fold: each fifth is answered by a fit on the others."
    )
    return EnsembleTable(split, [f"epoch {stage.epoch}" for stage in ensemble.milestones] + ["as kept"], rows, notes)


def draw_milestones(metrics: Metrics) -> Figure | None:
    """Draw the confusion matrix of each milestone, side by side; None where there is none."""
    rows = _choose_rows(metrics)
    if not rows:
        return None
    labels = rows[0].metrics.labels
    lines = -(-len(rows) // _COLUMNS)
    columns = min(len(rows), _COLUMNS)
    has_text = len(labels) <= _MOST_LABELS
    with figure_style():
        figure = new_figure(1.0 + 3.6 * columns, 0.4 + 3.7 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(rows) :]:
            axes.axis("off")
        for number, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
            confusion = np.array(row.metrics.confusion)
            totals = confusion.sum(axis=1, keepdims=True)
            shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
            axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_title(f"epoch {row.epoch}: {format_percent(row.metrics.accuracy.value)}", color=INK)
            is_left = number % _COLUMNS == 0
            axes.set_yticks(range(len(labels)), labels if is_left and has_text else [], fontsize=8)
            axes.set_xticks(range(len(labels)), labels if has_text else [], fontsize=8, rotation=40, ha="right")
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
            for i, j in np.ndindex(*confusion.shape) if has_text else ():
                colour = "white" if shares[i, j] > 0.55 else INK
                axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
        figure.supxlabel("predicted; numbers are percent of the target's images", fontsize=8, color=SOFT)
    return figure


def describe_milestone_figure(metrics: Metrics) -> str:
    """Return what `draw_milestones` shows, for readers who do not see it."""
    rows = _choose_rows(metrics)
    texts = [f"epoch {row.epoch} {format_percent(row.metrics.accuracy.value)}" for row in rows]
    return f"Confusion matrices on {_name_split(metrics)} after {', '.join(texts)} accuracy."


def _name_split(metrics: Metrics) -> str:
    """Return the split that the milestones are judged on."""
    return "test" if metrics.milestones and metrics.milestones[0].test is not None else "validation"


def _choose_rows(metrics: Metrics) -> list[MilestoneRow]:
    """Return the milestones with the metrics of the split that they are judged on."""
    rows, is_test = [], _name_split(metrics) == "test"
    for milestone in metrics.milestones:
        judged = milestone.test if is_test else milestone.validation
        if judged is not None:
            recalls = [row.get("recall") for row in judged.per_class.values()]
            rows.append(MilestoneRow(milestone.epoch, judged, recalls))
    return rows
