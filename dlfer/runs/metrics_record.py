"""Records of metrics.json: all metrics of a run or an evaluation, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dlfer.runs.records import DuplicatesRecord, FileRecord, Record, Temperature
from dlfer.runs.text import format_html, format_interval, shorten

Number = float | None
"""A value of a metric; None if it is undefined."""

LAST_EPOCH = "nothing (the last epoch was kept)"
"""Description of what a model was selected on, if no validation metric chose its epoch or ended its training."""

SUBJECTS_BANNER = (
    "The intervals treat the images as independent. Images of one subject vary together, so the intervals are too narrow "
    "where a subject has several images; dlfer crossval counts subjects for the accuracy."
)
"""Banner of a run with data.subjects."""


def _check_ends(record: Any) -> Any:
    """Return a record; raise ValueError if it has only one end of its interval."""
    if (record.low is None) != (record.high is None):
        raise ValueError("both ends of an interval or neither")
    return record


def _check_pair(ends: list[Number]) -> list[Number]:
    if len(ends) != 2 or (ends[0] is None) != (ends[1] is None):
        raise ValueError("both ends of an interval or two nulls")
    return ends


class Estimate(Record):
    """A value with its 95 % interval.

    Attributes:
        value: the value; None if undefined.
        low, high: ends of the interval; None if there is none.
        reason: why a value has no interval, or None.
    """

    value: Number = None
    low: Number = None
    high: Number = None
    reason: str | None = None

    _check = model_validator(mode="after")(_check_ends)


def _require_value(estimate: Estimate) -> Estimate:
    if estimate.value is None:
        raise ValueError("a value")
    return estimate


KnownEstimate = Annotated[Estimate, AfterValidator(_require_value)]
"""An estimate that must have a value, since the metric is defined for any number of images."""

NumImages = Annotated[int, Field(ge=1)]


class CountedEstimate(Estimate):
    """A value with its interval and the number of images that it is computed from."""

    n: int | None = None


class DetectionRate(Estimate):
    """The share of classes whose most frequent prediction is the class itself."""

    num_detected: int | None = None
    num_classes: int | None = None


class ClassMetrics(Record):
    """Metrics of one class, one versus rest; each in 0..1, None where undefined."""

    n: int
    precision: Number = None
    recall: Number = None
    f1: Number = None
    specificity: Number = None
    one_vs_rest_accuracy: Number = None
    auc: Number = None
    average_precision: Number = None
    intervals: dict[str, Annotated[list[Number], AfterValidator(_check_pair)]] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)

    def get(self, name: str) -> Estimate:
        """Return one of the metrics with its interval."""
        low, high = self.intervals.get(name) or (None, None)
        return Estimate(value=getattr(self, name), low=low, high=high, reason=self.reasons.get(name))


class ReliabilityBin(Record):
    """One bin of the reliability diagram: mean confidence, and accuracy with its interval."""

    n: int
    confidence: float
    accuracy: float
    low: Number = None
    high: Number = None

    _check = model_validator(mode="after")(_check_ends)


class CalibrationMetrics(Record):
    """Metrics of the deviation of probabilities from observed frequencies."""

    ece_equal_mass: Estimate
    ece_equal_width: Estimate | None = None
    classwise_ece: Estimate | None = None
    brier: Estimate | None = None
    log_loss: Estimate | None = None
    ece_if_calibrated: Number = None
    reliability: list[ReliabilityBin] = Field(default_factory=list)


class Calibration(Record):
    """Calibration before and after temperature scaling; `scaled` is None if no temperature was fitted."""

    raw: CalibrationMetrics
    scaled: CalibrationMetrics | None = None

    @property
    def has_bins(self) -> bool:
        """Whether the bins of a reliability diagram are recorded."""
        return bool(self.raw.reliability) and (self.scaled is None or bool(self.scaled.reliability))


class RiskPoint(Record):
    """One point of the risk-coverage curve: answering `coverage` of the images gives the error rate `risk`."""

    coverage: float
    risk: float
    low: Number = None
    high: Number = None
    threshold: float

    _check = model_validator(mode="after")(_check_ends)


class AtThreshold(Record):
    """Coverage and accuracy if the model abstains below a confidence threshold."""

    threshold: float
    coverage: Estimate
    accuracy: Estimate
    n: int


class Selective(Record):
    """Metrics of selective prediction, in which the model may abstain."""

    aurc: KnownEstimate
    curve: list[RiskPoint] = Field(default_factory=list)
    at_threshold: AtThreshold | None = None


class SplitSummary(Record):
    """The two metrics of a split that short tables show."""

    n: NumImages
    accuracy: KnownEstimate
    macro_f1: Estimate | None = None


class SplitMetrics(SplitSummary):
    """All metrics of one split.

    Attributes:
        n: number of images.
        per_class: label -> its metrics, in the order of the labels.
        confusion: rows are targets, columns are predictions.
        not_judged: labels without images in the split; averages are over the others.
    """

    labels: list[str] = Field(default_factory=list)
    not_judged: list[str] = Field(default_factory=list)
    macro_precision: Estimate | None = None
    macro_recall: Estimate | None = None
    macro_specificity: Estimate | None = None
    balanced_accuracy: Estimate | None = None
    mcc: Estimate | None = None
    cohen_kappa: Estimate | None = None
    weighted_f1: Estimate | None = None
    weighted_precision: Estimate | None = None
    weighted_recall: Estimate | None = None
    one_vs_rest_accuracy: Estimate | None = None
    macro_auc: Estimate | None = None
    macro_average_precision: Estimate | None = None
    emotion_detection_rate: DetectionRate | None = None
    log_loss: Estimate | None = None
    per_class: dict[str, ClassMetrics] = Field(default_factory=dict)
    confusion: list[list[int]] = Field(default_factory=list)
    calibration: Calibration | None = None
    selective: Selective | None = None

    @model_validator(mode="after")
    def _check_confusion(self) -> Self:
        size = len(self.labels)
        if self.confusion and (size != len(self.confusion) or any(size != len(row) for row in self.confusion)):
            raise ValueError(f"a confusion matrix of {size} rows and columns, as there are labels")
        counts = [count for row in self.confusion for count in row]
        if counts and (min(counts) < 0 or sum(counts) != self.n):
            raise ValueError(f"a confusion matrix whose counts make {self.n} images")
        if counts and set(self.per_class) != set(self.labels):
            raise ValueError("metrics of each of the labels in per_class")
        return self

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the number of images and the main metrics over all classes as (value, low, high)."""
        yield "n", self.n
        for name in ("accuracy", "macro_f1", "balanced_accuracy"):
            if self.get(name) is not None:
                yield name, shorten(self.get(name))

    def _repr_html_(self) -> str:
        """Return the metrics of each class, for a notebook."""
        names = ("precision", "recall", "f1", "specificity")
        rows = [
            (label, row.n, *(format_interval(row.get(name)) for name in names)) for label, row in self.per_class.items()
        ]
        title = f"accuracy {format_interval(self.accuracy)}, macro F1 {format_interval(self.macro_f1)}, n = {self.n:,}"
        note = "In parentheses: 95 % intervals, in percent."
        return format_html(title, rows, header=("label", "n", *names), notes=[note])

    def get(self, name: str) -> Estimate | None:
        """Return one of the metrics over all classes, or None if the file does not have it."""
        return getattr(self, name)


class McNemar(Record):
    """McNemar's test: `b` images that only model a classifies correctly, `c` that only model b does."""

    b: int
    c: int
    p: float
    method: str | None = None


class ModelPair(Record):
    """The comparison of two trained models on the same images.

    Attributes:
        difference: difference of the accuracies, a - b, in -1..1.
        unit: unit of the difference and its interval.
        p_holm: p value after Holm's correction for all pairs of the comparison.
        required_n: number of images needed to detect such a difference; None if no number is enough.
        part: the split, if it is not recorded elsewhere.
        not_learned: a clause for each training that did not learn; if there is one, the pair supports no conclusion.
    """

    a: str
    b: str
    difference: KnownEstimate
    unit: Literal["fraction"] = "fraction"
    mcnemar: McNemar
    p_holm: float | None = None
    required_n: int | None = None
    is_significant: bool = False
    sentence: str
    part: str | None = None
    not_learned: list[str] = Field(default_factory=list)


class ViewMetrics(SplitSummary):
    """Metrics of predictions averaged over views, and their comparison with single-view predictions."""

    paired: ModelPair


class GroupMetrics(Record):
    """Metrics of the images with one value of an attribute; `small` marks fewer than 20 images."""

    n: int
    accuracy: Estimate
    recall: dict[str, CountedEstimate | None] = Field(default_factory=dict)
    small: bool = False


class Gaps(Record):
    """The largest minus the smallest value over the groups; None if fewer than two groups are large enough."""

    accuracy: KnownEstimate | None = None
    recall: dict[str, KnownEstimate | None] = Field(default_factory=dict)


class AttributeMetrics(Record):
    """Metrics by the values of one attribute, with the numbers of images without one and of ids that match no image."""

    groups: dict[str, GroupMetrics]
    gaps: Gaps
    num_missing: int = 0
    num_unknown: int = 0


class Groups(Record):
    """Metrics by attributes of the images, which are read from `file`."""

    file: str
    attributes: dict[str, AttributeMetrics]
    part: str | None = None


class CorruptionLevel(Record):
    """Accuracy at one strength of a corruption, and its difference from the accuracy on the clean images."""

    strength: int
    parameter: Any = None
    accuracy: Estimate
    difference: KnownEstimate | None = None


class Corruptions(Record):
    """Accuracy on corrupted images; `meanings` describes the parameter of each corruption."""

    n: int
    clean: Estimate
    corruptions: dict[str, Annotated[list[CorruptionLevel], Field(min_length=1)]]
    meanings: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    part: str | None = None

    @property
    def strengths(self) -> list[int]:
        """All strengths of the applied corruptions, the weakest first."""
        return sorted({level.strength for levels in self.corruptions.values() for level in levels})


class MilestoneMetrics(Record):
    """Metrics of the weights after `epoch` epochs."""

    epoch: int
    validation: SplitMetrics | None = None
    test: SplitMetrics | None = None


class MemberMetrics(Record):
    """Metrics of a member of an ensemble."""

    name: str
    path: str = ""
    status: str = ""
    note: str = ""
    validation: SplitSummary | None = None
    test: SplitSummary | None = None


class CombinationMetrics(Record):
    """Metrics of one way to combine the members; `is_used` marks the one that the model uses."""

    name: str
    is_used: bool = False
    validation: SplitSummary | None = None
    test: SplitSummary | None = None


class EnsembleMilestone(Record):
    """Metrics of the members and combinations after `epoch` epochs."""

    epoch: int
    members: list[MemberMetrics]
    combinations: list[CombinationMetrics]


class EnsembleGrowth(Record):
    """Metrics of the average of the first members, by descending validation accuracy; `added` is the last of them."""

    added: str
    validation: SplitSummary | None = None
    test: SplitSummary | None = None


class FinalLabel(Record):
    """The most frequent prediction for the `n` images to which annotators gave one label, and its share of them."""

    label: str
    share: float
    n: int


class FinalLabels(Record):
    """The final label for each label with images, of a member or of the combination in use ("ensemble")."""

    name: str
    labels: dict[str, FinalLabel]


class EnsembleMetrics(Record):
    """The combination of an ensemble's members, and its comparison with the member that is best on validation.

    Attributes:
        growth: averages of one member, of two, and so on; empty in a file of an earlier version.
        final_labels: of each member and of the combination, on test, else on validation; also empty in such a file.
    """

    combine: str
    view: str
    paired: ModelPair | None = None
    milestones: list[EnsembleMilestone] = Field(default_factory=list)
    growth: list[EnsembleGrowth] = Field(default_factory=list)
    final_labels: list[FinalLabels] = Field(default_factory=list)


class Abstention(Record):
    """The confidence below which the model abstains, with its target accuracy and the split that it was chosen on.

    Attributes:
        temperature: by which the confidences were calibrated before, as `dlfer predict` does; None: they were not, as in
            metrics of before 0.2.
    """

    threshold: float
    target_accuracy: float
    chosen_on: str
    n: int
    temperature: float | None = None


class JudgedOn(Record):
    """The data of an evaluation.

    Attributes:
        used_for: how the training used these images: "training", "selection", "calibration" (if no epoch was selected)
            or None.
    """

    split: str
    file: str
    used_for: str | None = None


class ForeignModelRecord(Record):
    """An external model that was evaluated, as its user described it.

    Attributes:
        file, sha256, size_bytes: of the model's file.
        input: its input, in the syntax of `dlfer evaluate --input`.
        output: "softmax", "logits" or "sigmoid".
        labels: labels of its outputs, in order.
        ignored: labels whose outputs were left out before the probabilities were normalised.
        unknown: labels of the data for which the model has no output, so that it is wrong on their images.
        runtime: the runtime that executed it.
        ms_per_image: milliseconds per image in batches of `batch_size`, including preprocessing.
        ms_alone: milliseconds for a single image.
    """

    file: str
    sha256: str
    size_bytes: int | None = None
    input: str
    output: str
    labels: list[str]
    ignored: list[str] = Field(default_factory=list)
    unknown: list[str] = Field(default_factory=list)
    runtime: str
    batch_size: int
    ms_per_image: float
    ms_alone: float

    def describe(self) -> list[str]:
        """Return sentences that describe the evaluated model."""
        size = "" if self.size_bytes is None else f"; {self.size_bytes / 1e6:.1f} MB"
        lines = [
            f"{self.file}: input {self.input}; output {self.output}; {self.runtime}: {self.ms_per_image:.2f} ms per "
            f"image ({self.batch_size} at a time), {self.ms_alone:.2f} ms alone{size}."
        ]
        if self.ignored:
            lines.append(f"Outputs left out: {', '.join(self.ignored)}.")
        if self.unknown:
            lines.append(f"The model has no output for {', '.join(self.unknown)}: it is wrong on every image of these.")
        return lines


class Metrics(FileRecord):
    """The contents of metrics.json.

    Attributes:
        protocol: "official", "resplit", "cross_validation" or "paper".
        banner: a warning that every output shows, or None.
        selected_on: description of the validation split.
        is_selected: whether validation decided which epoch was kept, or when training ended; taken as true in a file
            of an earlier version.
        test: None if there is no test split.
        test_without_duplicates: for the test images without a duplicate in the data that trained or selected the model.
        test_opened: how often the model had been evaluated on a test split by then; None if unknown.
        headline: "single", or the view whose accuracy is the headline.
        views: view -> split -> metrics.
        foreign: for `dlfer evaluate FILE`, the external model that was evaluated.
    """

    FILE: ClassVar[str] = "metrics.json"

    protocol: str | None = None
    banner: str | None = None
    selected_on: str | None = None
    is_selected: bool = True
    test: SplitMetrics | None = None
    test_without_duplicates: SplitMetrics | None = None
    duplicates: DuplicatesRecord | None = None
    validation: SplitMetrics | None = None
    validation_without_duplicates: SplitMetrics | None = None
    train: SplitMetrics | None = None
    temperature: Temperature | None = None
    abstain: Abstention | None = None
    test_opened: int | None = None
    headline: str = "single"
    views: dict[str, dict[str, ViewMetrics]] = Field(default_factory=dict)
    groups: Groups | None = None
    corruptions: Corruptions | None = None
    milestones: list[MilestoneMetrics] = Field(default_factory=list)
    members: list[MemberMetrics] = Field(default_factory=list)
    combinations: list[CombinationMetrics] = Field(default_factory=list)
    ensemble: EnsembleMetrics | None = None
    judged_on: JudgedOn | None = None
    foreign: ForeignModelRecord | None = None

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the protocol and the metrics of each available split."""
        yield "protocol", self.protocol
        yield from self._list_splits().items()

    def _repr_html_(self) -> str:
        """Return the accuracy and macro F1 of each split, for a notebook."""
        rows = [
            (name.replace("_", " "), split.n, format_interval(split.accuracy), format_interval(split.macro_f1))
            for name, split in self._list_splits().items()
        ]
        used = f"Selected on {self.describe_selection()}, protocol {self.protocol}. In parentheses: 95 % intervals, in percent."
        return format_html("Metrics", rows, header=("split", "n", "accuracy", "macro F1"), notes=[self.banner, used])

    def _list_splits(self) -> dict[str, SplitMetrics]:
        """Return the metrics of the available splits, the evaluation split first."""
        splits = ("test", "test_without_duplicates", "validation", "validation_without_duplicates", "train")
        return {name: split for name in splits if (split := self.get(name)) is not None}

    @property
    def judged_split(self) -> str:
        """The evaluation split: test, else validation."""
        return "validation" if self.test is None else "test"

    @property
    def judged(self) -> SplitMetrics | None:
        """The metrics of the evaluation split."""
        return self.validation if self.test is None else self.test

    @property
    def judged_without_duplicates(self) -> SplitMetrics | None:
        """The metrics of the evaluation split's images without duplicates."""
        return self.validation_without_duplicates if self.test is None else self.test_without_duplicates

    @property
    def is_clean(self) -> bool:
        """Whether no banner concerns the evaluation split itself."""
        return self.banner in (None, "", SUBJECTS_BANNER)

    def describe_selection(self) -> str:
        """Return a description of what the model was selected on."""
        return str(self.selected_on) if self.is_selected else LAST_EPOCH

    def describe_validation(self) -> str:
        """Return a description of the validation split and its use: selection makes its values optimistic."""
        use = "used for selection" if self.is_selected else "used for calibration only: the last epoch was kept"
        return f"validation ({self.selected_on}, {use})"

    def get(self, split: str) -> SplitMetrics | None:
        """Return the metrics of a split, e.g. "test" or "test_without_duplicates"."""
        return getattr(self, split)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with current key names.

        `twins` counted only the test images with a duplicate in training, and `test_without_twins` left out only these.
        Its exact copies included augmented ones, which occur under protocol paper, so that their number is unknown
        there.
        """
        upgraded: dict[str, Any] = {}
        for key, value in values.items():
            if key == "test_without_twins":
                upgraded["test_without_duplicates"] = value
            elif key == "twins":
                upgraded["duplicates"] = _upgrade_twins(value, values)
            elif key == "selected_on" and isinstance(value, str):
                upgraded[key] = value.replace("(twins kept together)", "(duplicates kept together)")
            else:
                upgraded[key] = value
        return rename_key(upgraded, "told_apart", "is_significant")


def rename_key(values: Any, old: str, new: str) -> Any:
    """Return nested values with a key renamed wherever it occurs."""
    if isinstance(values, dict):
        return {new if key == old else key: rename_key(item, old, new) for key, item in values.items()}
    return [rename_key(item, old, new) for item in values] if isinstance(values, list) else values


def _upgrade_twins(twins: Any, values: dict[str, Any]) -> dict[str, Any] | None:
    test = values.get("test")
    if not isinstance(test, dict) or not isinstance(twins, dict) or "near_or_mirrored" not in twins:
        return None
    exact = None if values.get("protocol") == "paper" else twins.get("exact")
    in_train = {"exact": exact, "augmented": None, "any": twins["near_or_mirrored"]}
    return {"split": "test", "n": test.get("n"), "in_train": in_train, "in_selection": None, "in_either": None}


def is_missing(value: float | None) -> bool:
    """Return whether a value is undefined: None (null in JSON) or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
