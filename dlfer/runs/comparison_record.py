"""comparison.json: the verdicts of an ablation, a sweep or a search over its arms; and that of finished runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from dlfer.runs.metrics_record import CountedEstimate, Estimate, ModelPair, Number, rename_key
from dlfer.runs.records import FileRecord, Record
from dlfer.runs.text import format_html, format_interval, shorten


class SeedEstimate(CountedEstimate):
    """A mean over seeds with its 95 % interval over images and, for several seeds, over seeds.

    Attributes:
        per_seed: the value of each seed, in the order of the seeds.
        sd_over_seeds: standard deviation of these; None for one seed.
    """

    per_seed: list[float] = Field(default_factory=list)
    sd_over_seeds: float | None = None


class SeedsAndImages(Record):
    """Numbers of seeds and of images that are needed together."""

    seeds: int
    images: int


class More(Record):
    """What would detect a difference as large as the observed one; None: no practicable number does.

    Attributes:
        power: the probability of detecting it.
        seeds: of each recipe, on the images at hand.
        images: with the seeds at hand.
        both: where neither alone is enough.
    """

    power: float | None = None
    seeds: int | None = None
    images: int | None = None
    both: SeedsAndImages | None = None


class PairedTest(Record):
    """The test of a difference between two models or two recipes on the same images.

    Attributes:
        names: of the two.
        scope: "models": a statement about two trained models; "recipes": over several seeds of each; None: two sets of
            predictions of which no more is known.
        n: number of images.
        accuracy_a, accuracy_b: in 0..1.
        difference: a - b, in percentage points.
        both_right, a_only, b_only, both_wrong: numbers of images, of one pair.
        test: its name.
        is_significant: the interval excludes 0, and the p value is below 1 - level (Holm's where it is one of several).
        required_n: images that would be needed; None: no number is enough.
        differences: percentage points, one per seed.
        sd_over_seeds: of these; sd_a, sd_b: of the accuracies of each recipe, in percentage points.
        df: Satterthwaite's degrees of freedom.
        more: what would be needed; None where the difference is significant or there is one seed.
        p_holm, num_pairs: where it is one of several pairs.
        num_folds, sd_over_folds: of a cross-validation, and then `differences` has one for each fold; percentage points.
        not_learned: a clause for each training that did not learn; then there is no verdict.
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
    """Two arms of a study: `a` is the one that the others are compared with.

    Attributes:
        part: the split.
        unit: of the difference, of its interval and of the standard deviations.
        sentence: the verdict; "" where an earlier version wrote one in other words, and it is to be written again.
    """

    a: str
    b: str
    part: str | None = None
    unit: Literal["percentage points"] = "percentage points"
    sentence: str = ""

    @classmethod
    def of(cls, test: PairedTest, **fields: Any) -> Self:
        """Return the pair of arms that a test compared, with further fields."""
        given = {name: getattr(test, name) for name in test.model_fields_set}
        return cls(**given | {"a": test.names[0], "b": test.names[1], "unit": "percentage points"} | fields)


class FoldResult(Record):
    """One fold of a cross-validation.

    Attributes:
        fold: its number, from 0.
        arm: that was trained; where each fold chooses an arm, it may differ.
        seed: of the training.
        n: number of images in the fold.
        accuracy: on them, with the interval of this one model.
        validation: accuracy on the split that selected the epoch.
    """

    fold: int
    arm: str
    seed: int
    n: int
    accuracy: Estimate
    validation: float


class CrossValidated(Record):
    """What a cross-validation says of a recipe: each image is judged once, by the model that did not see it.

    Attributes:
        num_folds: into which the images were divided; `folds` has those that finished.
        n, num_groups: images that were judged, and groups of duplicates and subjects in them.
        trained: the pooled accuracy, with the interval of these trained models on other images.
        recipe: the same value, with the interval of the recipe with other training images and seeds.
        sd_over_folds: standard deviation of the folds' accuracies, in 0..1; None for one fold.
        macro_f1, macro_precision, macro_recall: of the pooled predictions, with intervals as those of `trained`.
        predictions: the file of the pooled predictions, relative to the folder.
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
    """One arm of a study: its accuracy on each split over the seeds that finished.

    Attributes:
        settings: of a cell of a sweep, axis -> value.
        ranked_by: of a cell, the validation metric that ranks it.
        seconds: of fine-tuning, a mean over seeds.
        cross_validated: of a cross-validation; then `test` is the recipe's pooled accuracy, and `validation` and `train` are means
            over folds without an interval.
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
    cross_validated: CrossValidated | None = None

    def get(self, split: str) -> SeedEstimate | None:
        """Return the accuracy on "train", "validation" or "test"."""
        return getattr(self, split)


class ArmKey(Record):
    """A key in which the arms differ, with its value in each."""

    key: str
    values: dict[str, Any]


class UnfinishedMember(Record):
    """A member that is not in the table."""

    arm: str
    seed: int
    status: str
    error: str = ""


class WinnerRun(Record):
    """The run of a winner of a search."""

    arm: str
    seed: int
    run: str


Mean = int | float | None


class BestCell(Record):
    """The best cell on validation among those with the same values of some axes.

    Attributes:
        values: axis -> value; None where the axis does not apply.
        num_cells, num_planned: how many finished, and how many there were to choose from.
        ranked_by: what chose it.
        optimizer: its name, or None.
        epochs, kept_epoch, learning_rate, batch_size, steps_an_epoch, image_size, num_parameters: means over seeds, whole
            numbers where the seeds agree on one; None where a family has no such thing.
        accuracy ... macro_f1: on the judged split.
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
    """The table of `sweep.best_of`."""

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
    """comparison.json of an ablation, a sweep or a search.

    Attributes:
        table: one row per arm; of a sweep the best on validation first.
        paired: the arms against the reference.
        notes: sentences that belong to the result.
        judged_on: the split in words.
        arm_keys: keys in which the arms differ.
        winners: of a search, arm -> the overrides of its best trial.
        rank_by, axes, reference, best_of: of a sweep.
        unfinished: members that are not in the table.
        chosen: of a cross-validation of several arms, the accuracy where each fold takes the arm that is best on its own
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
        """Return the contents of a file from before dlfer 0.2 with the present names of its keys.

        A pair of that time over one seed has a sentence that does not say what it is about: it is to be written again. One
        over several seeds does not have the interval of Student's t: a note says so.
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
        n: number of images that the accuracy is of: those that all runs judged.
        num_images: that the run judged; None: as many.
        left_out: those of them that another run lacks.
    """

    name: str
    n: int
    num_images: int | None = None
    left_out: int = 0
    accuracy: Estimate
    path: str | None = None


class CochranQ(Record):
    """Cochran's Q test of whether any of several models differs."""

    statistic: float
    p: float
    df: int


class System(Record):
    """Runs that differ in the seed alone: mean and standard deviation of their accuracies, in 0..1."""

    name: str
    runs: list[str]
    seeds: list[int]
    mean: float
    sd: float


class ModelComparison(Record):
    """Two or more trained models on the images that all of them judged.

    Attributes:
        pairs: each pair of models; their p values are corrected by Holm.
        part: the split.
        systems: experiments of which several seeds are compared; system_pairs: their differences over seeds.
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
        """Whether some run judged images that another lacks, on which no accuracy here is computed."""
        return any(run.left_out for run in self.runs)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the split, the accuracy of each run as (value, low, high), and the verdicts."""
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
