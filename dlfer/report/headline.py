"""The headline of a report, its table of all metrics, and sentences about duplicates and missing labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dlfer.report.page import format_count, format_interval, format_percent
from dlfer.runs.metrics_record import Estimate, JudgedOn, Metrics, SplitMetrics, is_missing
from dlfer.runs.records import DataRecord, DuplicateCounts, DuplicatesRecord

COMBINATIONS = {
    "average": "average of the probabilities",
    "vote": "vote",
    "trained": "trained on validation",
}


DEFINITION = "A duplicate is an exact, near or horizontally flipped copy, or an augmented copy of the same image."


def get_metrics_without_duplicates(metrics: Metrics | None) -> SplitMetrics | None:
    """Return the metrics of the evaluated split without duplicates; None if none were found or searched for."""
    if metrics is None or metrics.judged is None or metrics.judged_without_duplicates is None:
        return None
    without = metrics.judged_without_duplicates
    return without if without.n < metrics.judged.n else None


def format_accuracy(split: SplitMetrics) -> str:
    """Return the accuracy of a split with its interval and n: "69.1 % (95 % 67.4 to 70.7, n = 3,201)"."""
    accuracy = split.accuracy
    return f"{format_percent(accuracy.value)} (95 % {format_interval(accuracy)}, n = {format_count(split.n)})"


def describe_duplicate_sources(duplicates: DuplicatesRecord | None) -> str:
    """Return the data sets whose duplicates "without duplicates" leaves out, e.g. "training or validation"."""
    places = ["training"]
    if duplicates is not None and duplicates.in_selection:
        places.append("validation")
    if duplicates is not None and duplicates.in_pretrain is not None and duplicates.in_pretrain.any:
        places.append("EF-FER1's data")
    return " or ".join(places)


def describe_duplicates(metrics: Metrics) -> str | None:
    """Return how many images of the evaluated split have a duplicate, and in which data; None if that is unknown."""
    found = metrics.duplicates
    if found is None or not found.n or found.in_train is None:
        return None
    n, num_in_train = found.n, found.in_train.any
    name = metrics.judged_on.split if metrics.judged_on is not None and metrics.judged_on.split else found.split
    text = (
        f"{format_count(num_in_train)} of {format_count(n)} {name} images "
        f"({format_percent(num_in_train / n)}) have a duplicate in training{list_kinds(found.in_train)}"
    )
    others = []
    if found.in_selection is not None and found.in_either is not None:
        use = ", which selected the model" if metrics.is_selected else ""
        others.append(f"{format_count(found.in_selection.any)} have one in validation{use}")
    if found.in_pretrain is not None and found.in_pretrain.any:
        others.append(f"{format_count(found.in_pretrain.any)} have one in EF-FER1's data")
    if others and found.in_either is not None:
        either = "either" if len(others) == 1 else "any of these"
        text += f"; {'; '.join(others)}{', and' if len(others) == 1 else ';'} {format_count(found.in_either.any)} in {either}"
    if get_metrics_without_duplicates(metrics):
        text += f'. "Without duplicates" leaves out those with one in {describe_duplicate_sources(found)}'
    return f"{text}. {DEFINITION}"


def describe_not_judged(split: SplitMetrics) -> str | None:
    """Return which labels have no image in a split, and how many are averaged over; None if all have images."""
    if not split.not_judged:
        return None
    shown = ", ".join(split.not_judged[:12]) + (" ..." if len(split.not_judged) > 12 else "")
    num_others = len(split.labels) - len(split.not_judged)
    others = "the other label" if num_others == 1 else f"the other {num_others} labels"
    return f"not evaluated: {shown} (no image of {'it' if len(split.not_judged) == 1 else 'them'}; averages are over {others})"


def list_kinds(counts: DuplicateCounts) -> str:
    """Return the numbers of exact and (if any) augmented copies in parentheses; "" if they are unknown."""
    kinds = []
    if counts.exact is not None and counts.any:
        kinds.append(f"{format_count(counts.exact)} an exact copy")
    if counts.augmented:
        kinds.append(f"{format_count(counts.augmented)} an augmented copy")
    return f" ({', '.join(kinds)})" if kinds else ""


SPLITS = ("test", "test_without_duplicates", "validation", "validation_without_duplicates", "train")
VIEWS = {"single": "the image as it is", "mirror": "the image and its horizontal flip", "ten_crop": "ten crops"}


class Metric(NamedTuple):
    """A row of the table of metrics.

    Attributes:
        name: the display name.
        get: returns the metric of a split, or None if the split does not have it.
        scale: "percent" or "fraction", the format of its values.
        remark: a note for the reader.
    """

    name: str
    get: Callable[[SplitMetrics], Estimate | None]
    scale: str = "percent"
    remark: str = ""


METRICS = (
    Metric("accuracy", lambda split: split.accuracy),
    Metric("balanced accuracy", lambda split: split.balanced_accuracy, remark="the mean recall of the classes"),
    Metric("macro F1", lambda split: split.macro_f1),
    Metric("macro precision", lambda split: split.macro_precision),
    Metric("macro specificity", lambda split: split.macro_specificity),
    Metric("MCC", lambda split: split.mcc, "fraction", "0 is chance"),
    Metric("Cohen's kappa", lambda split: split.cohen_kappa, "fraction", "0 is chance"),
    Metric("macro AUC", lambda split: split.macro_auc, "fraction", "0.5 is chance"),
    Metric("macro average precision", lambda split: split.macro_average_precision, "fraction"),
    Metric("log-loss", lambda split: split.log_loss, "fraction", "lower is better"),
    Metric("ECE", lambda split: split.calibration and split.calibration.raw.ece_equal_mass, remark="lower is better"),
    Metric(
        "Brier score",
        lambda split: split.calibration and split.calibration.raw.brier,
        "fraction",
        "0 to 2, lower is better",
    ),
    Metric(
        "emotion detection rate",
        lambda split: split.emotion_detection_rate,
        remark="classes mostly predicted as themselves",
    ),
    Metric("one-vs-rest accuracy", lambda split: split.one_vs_rest_accuracy, remark="not the accuracy, see below"),
)


class Headline(NamedTuple):
    """The metrics of the evaluated split, with the facts that qualify the accuracy.

    Attributes:
        metrics: of the split, without test-time augmentation.
        accuracy: of the headline's view, which may be test-time augmentation.
        title: the split and, if views were averaged, the view.
        what: the display name of the split.
        facts: (name, value) pairs that qualify the accuracy.
        largest_class: share of the largest class, in 0..1.
    """

    metrics: SplitMetrics
    accuracy: Estimate
    title: str
    what: str
    facts: list[tuple[str, str | None]]
    largest_class: float


def name_other_split(judged_on: JudgedOn) -> str:
    """Return the display name of a split of `dlfer evaluate`: "test" only if it did not train or select the model."""
    if judged_on.used_for is None:
        return f"test ({judged_on.split})" if judged_on.split not in ("", "test") else "test"
    kind = "training" if judged_on.used_for == "training" else "validation"
    return f"{kind} ({judged_on.split}, used for {judged_on.used_for})"


def name_judged_split(metrics: Metrics, data: DataRecord | None) -> str:
    """Return the display name of the evaluated split; that of a validation split says what else it was used for."""
    if metrics.judged_on is not None:
        return name_other_split(metrics.judged_on)
    if metrics.judged_split == "validation":
        return metrics.describe_validation()
    split = data.splits.get("test") if data is not None else None
    return f"test ({split.name})" if split is not None and split.name not in (None, "", "test") else "test"


def build_headline(
    metrics: Metrics, data: DataRecord | None, *, openings: int, expected: tuple[float, float] | None
) -> Headline | None:
    """Return the headline of a report; None if no split was evaluated.

    Args:
        metrics: of the run.
        data: data.json, if there is one.
        openings: how often the log says the test split was opened; used if the metrics do not have the number.
        expected: the range of the test accuracy that the experiment expects, in 0..1.
    """
    judged, is_test = metrics.judged, metrics.judged_split == "test"
    if judged is None:
        return None
    # The metrics of single images, unless the experiment selects another view as headline.
    shown = metrics.views.get(metrics.headline, {}).get(metrics.judged_split) or judged
    facts = [("protocol", metrics.protocol), ("selected on", metrics.describe_selection())]
    without = get_metrics_without_duplicates(metrics)
    if without:
        of_single = "" if shown is judged else ", of single images"
        facts.append(("without duplicates", f"{format_accuracy(without)}{of_single}"))
    openings = metrics.test_opened or openings
    if not is_test:
        facts.append(("test", "none: the run has no test split"))
    elif openings:
        facts.append(("test opened", "once" if openings == 1 else f"{openings} times"))
    if shown.macro_f1 is not None:
        num_judged = len(judged.labels) - len(judged.not_judged)
        facts.append(("macro F1", f"{format_percent(shown.macro_f1.value)} over {num_judged} classes"))
    if absent := describe_not_judged(judged):
        facts.append(("not evaluated", absent.partition(": ")[2]))
    if shown is not judged:
        facts.append(("of single images", f"{format_percent(judged.accuracy.value)}; so are all values below"))
    if expected and is_test:
        low, high = expected
        is_within = shown.accuracy.value is not None and low <= shown.accuracy.value <= high
        verdict = "within" if is_within else "outside"
        facts.append(("expected", f"{format_percent(low)} to {format_percent(high)}: {verdict}"))
    what = name_judged_split(metrics, data)
    return Headline(
        metrics=judged,
        accuracy=shown.accuracy,
        title=what if shown is judged else f"{what}, averaged over {VIEWS.get(metrics.headline, metrics.headline)}",
        what=what,
        facts=facts,
        largest_class=max((row.n for row in judged.per_class.values()), default=0) / judged.n,
    )


class MetricsColumn(NamedTuple):
    """A column of the metrics table: a split and its number of images."""

    name: str
    n: int


class MetricsRow(NamedTuple):
    """A row of the metrics table: a metric with a cell for each split."""

    name: str
    remark: str
    scale: str
    cells: list[Estimate | None]


class MetricsTable(NamedTuple):
    """A table with a row for each metric and a column for each split."""

    columns: list[MetricsColumn]
    rows: list[MetricsRow]


def build_metrics_table(metrics: Metrics, splits: Sequence[str] = SPLITS) -> MetricsTable:
    """Return the table of metrics with a column for each of `splits`; by default the evaluated split comes first.

    Metrics that no split has, as in runs of an earlier version, are left out.
    """
    shown = {name: metrics.get(name) for name in splits}
    shown = {name: split for name, split in shown.items() if split is not None}
    rows = []
    for metric in METRICS:
        cells = [metric.get(split) for split in shown.values()]
        if any(cell and not is_missing(cell.value) for cell in cells):
            rows.append(MetricsRow(metric.name, metric.remark, metric.scale, cells))
    names = {"validation": metrics.describe_validation()}
    if metrics.judged_on is not None and metrics.judged_on.used_for is not None:
        names["test"] = name_other_split(metrics.judged_on)
        names["test_without_duplicates"] = f"{names['test']} without duplicates"
    columns = [MetricsColumn(names.get(name, name.replace("_", " ")), split.n) for name, split in shown.items()]
    return MetricsTable(columns, rows)


def describe_splits(metrics: Metrics) -> list[str]:
    """Return the notes below the table: duplicates, optimism of validation, and definitions of unusual metrics."""
    lines, duplicates, judged = [], describe_duplicates(metrics), metrics.judged
    if duplicates:
        lines.append(duplicates)
    if metrics.validation is not None and metrics.is_selected:
        lines.append("Validation was used to select the model, so its values are optimistic.")
    if judged is None:
        return lines
    if judged.one_vs_rest_accuracy is not None:
        num_labels = len(judged.labels)
        lines.append(
            f"One-vs-rest accuracy is the mean over the classes of (TP + TN) / N, where an image of another class "
            f"counts as correct unless this label was predicted. It is not the accuracy: with {num_labels} classes "
            f"an accuracy of 70 % gives {format_percent(1 - 2 * 0.3 / num_labels)} when counted so."
        )
    rate = judged.emotion_detection_rate
    if rate is not None:
        lines.append(
            f"Emotion detection rate: of {rate.num_classes} classes, {rate.num_detected} are predicted as "
            "themselves more often than as any other."
        )
    return lines
