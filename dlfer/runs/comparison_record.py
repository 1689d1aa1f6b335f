"""Records of comparison.json, the results of a study's arms, and of the comparison of finished runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from dlfer.runs.metrics_record import CountedEstimate, Estimate, ModelPair, Number, rename_key
from dlfer.runs.records import FileRecord, Record
from dlfer.runs.text import format_html, format_interval, shorten


class SeedEstimate(CountedEstimate):
    """A mean over seeds; its 95 % interval covers the choice of images and, with several seeds, of seeds.

    Attributes:
        per_seed: the value of each seed, in the order of the seeds.
        sd_over_seeds: standard deviation of `per_seed`; None for one seed.
    """

    per_seed: list[float] = Field(default_factory=list)
    sd_over_seeds: float | None = None


class SeedsAndImages(Record):
    """A combination of a number of seeds and a number of images that is sufficient."""

    seeds: int
    images: int


class More(Record):
    """The seeds or images needed to detect a difference as large as the observed one; None if that is impracticable.

    Attributes:
        power: the probability of detecting it.
        seeds: number of seeds of each recipe, with the present images.
        images: number of images, with the present seeds.
        both: numbers of both, if neither alone is enough.
    """

    power: float | None = None
    seeds: int | None = None
    images: int | None = None
    both: SeedsAndImages | None = None


class PairedTest(Record):
    """The test of a difference between two models or two recipes on the same images.

    Attributes:
        names: names of the two.
        scope: "models" for a statement about two trained models; "recipes" for one over several seeds of each; None for
            two sets of predictions of unknown origin.
        n: number of images.
        accuracy_a, accuracy_b: in 0..1.
        difference: a - b, in percentage points.
        both_right, a_only, b_only, both_wrong: numbers of images; None over several seeds.
        test: name of the test.
        is_significant: whether the interval excludes 0 and the p value (p_holm, if there is one) is below 1 - level.
        required_n: number of images needed to detect such a difference; None if no number is enough.
        differences: differences of the seeds, in percentage points.
        sd_over_seeds: standard deviation of `differences`; sd_a, sd_b: of each recipe's accuracies; percentage points.
        df: Satterthwaite's degrees of freedom.
        more: the seeds and images needed; None if the difference is significant or there is one seed.
        p_holm, num_pairs: the p value after Holm's correction and the number of pairs, for one of several pairs.
        num_folds, sd_over_folds: for a cross-validation, whose `differences` are those of the folds; percentage points.
        not_learned: a clause for each training that did not learn; if there is one, there is no verdict.
    """

    names: list[str] = Field(default_factory=list)
    scope: str | None = None
    n: int
    accuracy_a: Number = None
    accuracy_b: Number = None
    difference: Estimate
    both_right: int | None = None
    a_only: int | None = None
    b_only: int | None = None
    both_wrong: int | None = None
    test: str | None = None
    p_value: float | None = None
    is_significant: bool = False
    required_n: int | None = None
    level: float = 0.95
    differences: list[float] = Field(default_factory=list)
    num_seeds: int = 1
    sd_over_seeds: float | None = None
    sd_a: float | None = None
    sd_b: float | None = None
    df: float | None = None
    more: More | None = None
    p_holm: float | None = None
    num_pairs: int = 1
    num_folds: int | None = None
    sd_over_folds: float | None = None
    not_learned: list[str] = Field(default_factory=list)


class ArmPair(PairedTest):
    """The test of a difference between two arms of a study; `a` is the arm that the others are compared with.

    Attributes:
        part: the split.
        unit: unit of the difference, its interval and the standard deviations.
        sentence: the verdict; "" if that of an earlier version has to be replaced by a new one.
    """

    a: str
    b: str
    part: str | None = None
    unit: Literal["percentage points"] = "percentage points"
    sentence: str = ""

    @classmethod
    def of(cls, test: PairedTest, **fields: Any) -> Self:
        """Return the test as a pair of arms, with additional fields."""
        given = {name: getattr(test, name) for name in test.model_fields_set}
        return cls(**given | {"a": test.names[0], "b": test.names[1], "unit": "percentage points"} | fields)


class FoldResult(Record):
    """One fold of a cross-validation.

    Attributes:
        fold: its number, from 0.
        arm: the trained arm; it may differ between folds if each fold chooses one.
        seed: seed of the training.
        n: number of images in the fold.
        accuracy: accuracy on the fold, with the interval for this one model.
        validation: accuracy on the split that selected the epoch.
    """

    fold: int
    arm: str
    seed: int
    n: int
    accuracy: Estimate
    validation: float


class CrossValidated(Record):
    """The result of a cross-validation for a recipe: each image is predicted once, by the model not trained on it.

    Attributes:
        num_folds: number of folds of the images; `folds` has those that finished.
        n, num_groups: numbers of evaluated images, and of groups of duplicates and subjects among them.
        trained: the pooled accuracy, with the interval for these trained models on other images.
        recipe: the same value, with the interval for the recipe with other training images and seeds.
        sd_over_folds: standard deviation of the folds' accuracies, in 0..1; None for one fold.
        macro_f1, macro_precision, macro_recall: of the pooled predictions, with intervals as for `trained`.
        predictions: path of the file of pooled predictions, relative to the study's folder.
    """

    num_folds: int
    n: int
    num_groups: int
    folds: list[FoldResult]
    trained: Estimate
    recipe: Estimate
    sd_over_folds: float | None = None
    macro_f1: Estimate
    macro_precision: Estimate
    macro_recall: Estimate
    predictions: str | None = None


class ArmRow(Record):
    """The accuracies of one arm of a study on each split, over the seeds that finished.

    Attributes:
        settings: for a cell of a sweep, axis -> value.
        ranked_by: for a cell, the value of the validation metric that ranks it.
        image_set: for a sweep, the number from 1 of the cell's set of validation images, within which it has its rank; None
            if all cells were validated on the same images.
        seconds: duration of fine-tuning, averaged over seeds.
        cross_validated: for a cross-validation, where `test` is the recipe's pooled accuracy, and `validation` and
            `train` are means over folds without an interval.
    """

    arm: str
    seeds: list[int] = Field(default_factory=list)
    train: SeedEstimate | None = None
    validation: SeedEstimate | None = None
    test: SeedEstimate | None = None
    validation_macro_f1: float | None = None
    test_macro_f1: float | None = None
    settings: dict[str, str | None] = Field(default_factory=dict)
    ranked_by: float | None = None
    seconds: float | None = None
    rank: int | None = None
    image_set: int | None = None
    cross_validated: CrossValidated | None = None

    def get(self, split: str) -> SeedEstimate | None:
        """Return the accuracy on "train", "validation" or "test"."""
        return getattr(self, split)


class ArmKey(Record):
    """A key of the experiment that differs between arms; `values` is arm -> value."""

    key: str
    values: dict[str, Any]


class UnfinishedMember(Record):
    """A member that has not finished, so that the table leaves it out."""

    arm: str
    seed: int
    status: str
    error: str = ""


class WinnerRun(Record):
    """A run of the best trial of a search's arm, with one seed."""

    arm: str
    seed: int
    run: str


Mean = int | float | None


class BestCell(Record):
    """The best cell on validation among those with the same values of some axes.

    Attributes:
        values: axis -> value; None if the axis does not apply.
        num_cells, num_planned: numbers of finished and of planned cells to choose from.
        ranked_by: the value of the validation metric that chose it.
        optimizer: its name, or None.
        epochs, kept_epoch, learning_rate, batch_size, steps_an_epoch, image_size, num_parameters: means over seeds,
            integers if all seeds agree on one; None if it does not apply to the model's family.
        accuracy ... macro_f1: on the evaluated split.
    """

    values: dict[str, str | None]
    arm: str
    seeds: list[int]
    num_cells: int
    num_planned: int
    ranked_by: float
    epochs: Mean = None
    kept_epoch: Mean = None
    optimizer: str | None = None
    learning_rate: Mean = None
    batch_size: Mean = None
    steps_an_epoch: Mean = None
    image_size: Mean = None
    num_parameters: Mean = None
    accuracy: SeedEstimate
    macro_precision: SeedEstimate
    macro_recall: SeedEstimate
    macro_f1: SeedEstimate

    def get(self, metric: str) -> SeedEstimate:
        """Return one of the four metrics."""
        return getattr(self, metric)


class BestCells(Record):
    """The table of the best cells for each combination of values of the axes in `sweep.best_of`."""

    axes: list[str]
    part: str
    judged_on: str
    notes: list[str] = Field(default_factory=list)
    table: list[BestCell] = Field(default_factory=list)


FORMER_SEEDS = (
    "The intervals over several seeds are those of an earlier version of dlfer, and too narrow. Compute them again with "
    "--resume."
)


class ComparisonRecord(FileRecord):
    """The contents of comparison.json of an ablation, a sweep, a search or a cross-validation.

    Attributes:
        table: one row per arm; for a sweep or a cross-validation, the best on validation first, of a sweep's sets of images
            the one with the most cells.
        paired: tests of the arms against the reference.
        notes: sentences that belong to the result.
        judged_on: description of the evaluated split.
        arm_keys: keys of the experiment that differ between arms.
        winners: for a search, arm -> the overrides of its best trial.
        rank_by, axes, reference, best_of: for a sweep.
        unfinished: members that are not in the table.
        chosen: for a cross-validation of several arms, the result if each fold uses the arm that is best on its own
            validation split.
    """

    FILE: ClassVar[str] = "comparison.json"
    ADVICE: ClassVar[str] = "Run the experiment again."

    table: list[ArmRow] = Field(default_factory=list)
    paired: list[ArmPair] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    judged_on: str | None = None
    arm_keys: list[ArmKey] = Field(default_factory=list)
    winners: dict[str, dict[str, Any]] | None = None
    runs: list[WinnerRun] = Field(default_factory=list)
    rank_by: str | None = None
    axes: list[str] = Field(default_factory=list)
    reference: str | None = None
    unfinished: list[UnfinishedMember] = Field(default_factory=list)
    best_of: BestCells | None = None
    chosen: CrossValidated | None = None

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the accuracy of each arm on validation and test as (value, low, high), and the verdicts."""
        yield "arms", {row.arm: shorten(row.test or row.validation) for row in self.table}
        yield "verdicts", [pair.sentence for pair in self.paired]

    def _repr_html_(self) -> str:
        """Return the accuracy of each arm on each split, the verdicts and the notes, for a notebook."""
        splits = [split for split in ("train", "validation", "test") if any(row.get(split) for row in self.table)]
        rows = [(row.arm, len(row.seeds), *(format_interval(row.get(split)) for split in splits)) for row in self.table]
        header = ("arm", "seeds", *(f"{split} accuracy" for split in splits))
        notes = [*(pair.sentence for pair in self.paired), *self.notes]
        return format_html("Comparison", rows, header=header, notes=notes)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with current key names.

        Old verdicts over one seed do not state their scope and are removed, to be written again. Old intervals over
        several seeds are not those of Student's t, which a note states.
        """
        values = rename_key(values, "is_larger_than_chance", "is_significant")
        values = rename_key(values, "n_needed", "required_n")
        found, notes = values.get("paired"), values.get("notes")
        if not isinstance(found, list) or not isinstance(notes, list):
            return values
        pairs, notes = [_upgrade_pair(pair) for pair in found], list(notes)
        if any(old != new and new["scope"] == "recipes" for old, new in zip(found, pairs, strict=True)):
            notes.append(FORMER_SEEDS)
        return {**values, "paired": pairs, "notes": notes}


def _upgrade_pair(pair: Any) -> Any:
    if not isinstance(pair, dict) or "scope" in pair:
        return pair
    if pair.get("num_seeds", 1) == 1:
        return {**pair, "scope": "models", "sentence": ""}
    return {**pair, "scope": "recipes", "more": None}


class ComparedRun(Record):
    """One of the runs that `dlfer compare` compares.

    Attributes:
        n: number of images of the accuracy: those that all runs evaluated.
        num_images: number of images that this run evaluated; None if it equals `n`.
        left_out: number of its images that another run lacks.
    """

    name: str
    n: int
    num_images: int | None = None
    left_out: int = 0
    accuracy: Estimate
    path: str | None = None


class CochranQ(Record):
    """Cochran's Q test of whether the accuracy of any of several models differs."""

    statistic: float
    p: float
    df: int


class System(Record):
    """Runs that differ only in the seed, with the mean and standard deviation of their accuracies, in 0..1."""

    name: str
    runs: list[str]
    seeds: list[int]
    mean: float
    sd: float


class ModelComparison(Record):
    """The comparison of two or more trained models on the images that all of them evaluated.

    Attributes:
        pairs: tests of each pair of models, with p values after Holm's correction.
        part: the split.
        systems: experiments with several seeds among the runs; system_pairs: tests of their differences over seeds.
        notes: sentences that belong to the result.
    """

    runs: list[ComparedRun]
    n_common: int
    cochran_q: CochranQ | None = None
    pairs: list[ModelPair] = Field(default_factory=list)
    part: str | None = None
    systems: list[System] = Field(default_factory=list)
    system_pairs: list[ArmPair] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def has_left_out(self) -> bool:
        """Whether a run evaluated images that another lacks; no accuracy here includes them."""
        return any(run.left_out for run in self.runs)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the split, the number of common images, each run's accuracy as (value, low, high), and the verdicts."""
        yield "part", self.part
        yield "n_common", self.n_common
        yield "accuracy", {run.name: shorten(run.accuracy) for run in self.runs}
        yield "verdicts", self._list_verdicts()

    def _repr_html_(self) -> str:
        """Return the accuracy of each run, the verdicts and the notes, for a notebook."""
        own = [(run.num_images or run.n,) if self.has_left_out else () for run in self.runs]
        rows = [
            (run.name, run.n, *more, format_interval(run.accuracy)) for run, more in zip(self.runs, own, strict=True)
        ]
        header = ("run", "n", *(("own images",) if self.has_left_out else ()), "accuracy")
        title = f"Comparison on {self.n_common:,} images of {self.part}"
        notes = [*self._list_verdicts(), *self.notes]
        return format_html(title, rows, header=header, notes=notes)

    def _list_verdicts(self) -> list[str]:
        return [pair.sentence for pair in (*self.pairs, *self.system_pairs)]
