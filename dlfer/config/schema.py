"""An experiment file as strict and frozen pydantic models; the larger sections have files of their own.

A key's docstring is its documentation: `dlfer show schema` prints it, and the JSON Schema for
editors is made from it. Rules that concern several keys stand in the validators.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from dlfer.config import names
from dlfer.config.sections import (
    BoostingConfig,
    Count,
    DataConfig,
    EnsembleConfig,
    FacesConfig,
    Fraction,
    HeadConfig,
    LabelsConfig,
    ModelConfig,
    NumImages,
    OpenFraction,
    Positive,
    Section,
    Seed,
)
from dlfer.config.stage_section import (
    AugmentConfig,
    EarlyStopping,
    FreezeConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    StageConfig,
)

__all__ = [
    "AblationConfig",
    "AugmentConfig",
    "BoostingConfig",
    "DataConfig",
    "EarlyStopping",
    "EnsembleConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "ExperimentSection",
    "FacesConfig",
    "FreezeConfig",
    "HeadConfig",
    "LabelsConfig",
    "LossConfig",
    "ModelConfig",
    "NumImages",
    "OptimizerConfig",
    "PretrainConfig",
    "ScheduleConfig",
    "SearchConfig",
    "Section",
    "StageConfig",
    "SweepConfig",
]


class ExperimentSection(Section):
    """What the experiment is called and how it is computed."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Short name; the folder of its runs. Lower-case letters, digits, - and _."""
    seed: Seed = 0
    """Seed of EF-FER2: initial head, order, augmentation, dropout."""
    deterministic: bool = False
    """Bit-exact repetition and resume on the same machine; somewhat slower."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """Arithmetic of the network; the head stays in float32."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes a GPU if there is one; gpu refuses to run without."""
    devices: Literal["auto"] | Count = "auto"
    """How many devices share each batch. auto: all GPUs that are visible, or the one CPU; more of a CPU for trials."""
    jit: Literal["auto"] | bool = "auto"
    """Compile by XLA; auto: on a GPU yes, on a CPU no (there it is several times slower)."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """Minutes between checkpoints inside an epoch; each epoch ends with one in any case. 0: every step."""


class EvaluateConfig(Section):
    """How the trained model is judged."""

    batch_size: Count = 64
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Has no effect: no interval is a bootstrap any more. It remains so that configs of earlier runs can be read."""
    num_train: Annotated[int, Field(ge=0)] | None = 2000
    """How many training images (a stratified draw) the training figure is computed on; null: all; 0: none."""
    target_accuracy: OpenFraction = 0.8
    """Below which confidence to abstain: as low as lets the answered validation images reach this accuracy."""
    views: tuple[Literal[names.VIEWS], ...] = ()
    """Test-time augmentation, each as a row of its own: mirror (2 views), ten_crop (10)."""
    headline: Literal[names.HEADLINES] = "single"
    """Which of them the headline accuracy is; single: the image as it is."""
    attributes: str | None = None
    """A csv of attributes per id (id, then a column each); accuracy is given for each group, with its gaps."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if self.headline != "single" and self.headline not in self.views:
            raise ValueError(f"headline: found {self.headline}, which is not among views; add it there.")
        return self


class AblationConfig(Section):
    """The comparison with and without EF-FER1."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Of EF-FER2, in every arm. One seed supports a statement about two trained models only, three or more a statement
    about EF-FER1; with the usual standard deviation of 1 percentage point, three detect a difference of about 4."""
    with_keys: dict[str, Any | None] = Field({}, alias="with")
    """Dotted key -> value, for the arm with EF-FER1 alone, e.g. {finetune.epochs: 10}."""
    without: dict[str, Any | None] = {}
    """Dotted key -> value, for the arm without EF-FER1 alone, e.g. its own rate, {finetune.optimizer.learning_rate: 4e-3}."""
    equal_compute: bool = False
    """A third arm without EF-FER1 whose fine-tuning is longer by what EF-FER1 cost."""


class ExpectedConfig(Section):
    """What a reader who runs the file should see; it changes nothing."""

    result: str | None = None
    cost: str | None = None
    test_accuracy: tuple[Fraction, Fraction] | None = None
    """Range that the report sets beside the figure found."""


class SearchConfig(Section):
    """Which keys a search may set, and how it looks for the best."""

    engine: Literal[names.ENGINES] = "random"
    """random, bayesian, hyperband and grid are KerasTuner's, on one machine; optuna searches on several by --storage, too."""
    objective: Literal[names.MONITORS] = "macro_f1"
    """A figure on validation; loss is minimised, the others are maximised."""
    trials: Count | None = None
    """At most so many, on all machines together; null: 10, but all that there are of hyperband and grid."""
    seed: Seed = 0
    """Seed of the engine; the trials have experiment.seed."""
    factor: Annotated[int, Field(ge=2)] = 3
    """hyperband: one trial in so many goes on to the next rung, for so many times the epochs."""
    pruner: Literal["none", "median"] = "median"
    """optuna: median ends a trial that is worse, after an epoch, than half of those before it were."""
    lost_after_seconds: Positive = 60.0
    """Several machines: a trial without a heartbeat for so long is lost, and another machine goes on with it."""
    space: dict[str, dict[str, Any]]
    """Dotted key -> {log: [low, high]}, {between: [low, high], step: s} or {choice: [...]}; if it depends on
    a choice, with when: {KEY: [values]}."""


Axis = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "object"}]})]


class SweepConfig(Section):
    """A grid of experiments: every combination of the values of some keys, each over the same seeds."""

    grid: dict[str, Axis] = {}
    """Dotted key -> list of values, or a name -> {name: {dotted key: value}}, named bundles of keys."""
    cells: dict[str, dict[str, Any]] = {}
    """Cells beside the grid: name -> {dotted key: value}."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Every cell is trained with each of them; null: experiment.seed alone."""
    rank_by: Literal["accuracy", "macro_f1"] = "accuracy"
    """The figure on validation that the cells are sorted by; test never ranks them."""
    reference: str | None = None
    """The cell that the others are compared with; null: the best on validation."""
    best_of: tuple[str, ...] = ()
    """Axes of grid: for each combination of their values, the best cell on validation stands in a table of its own."""


class ExperimentConfig(Section):
    """A whole experiment: EF-FER1, EF-FER2, and how they are judged."""

    experiment: ExperimentSection
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig | None = None
    """EF-FER1; null in the ablation's arm without it."""
    finetune: StageConfig
    """EF-FER2."""
    boosting: BoostingConfig | None = None
    """family boosted: the trees."""
    ensemble: EnsembleConfig | None = None
    """family ensemble: its members."""
    evaluate: EvaluateConfig = EvaluateConfig()
    ablation: AblationConfig = AblationConfig()
    search: SearchConfig | None = None
    sweep: SweepConfig | None = None
    expected: ExpectedConfig = ExpectedConfig()

    @model_validator(mode="after")
    def _check_family(self) -> ExperimentConfig:
        if self.model.family == "boosted" and self.finetune.data.soft_targets is not None:
            raise ValueError(
                f"finetune.data.soft_targets: found {self.finetune.data.soft_targets} with model.family: boosted, whose "
                "trees take labels alone; set it to null."
            )
        for stage in ("pretrain", "finetune"):
            self._check_copies(stage)
        for family, key in (("boosted", "boosting"), ("ensemble", "ensemble")):
            if (self.model.family == family) != (getattr(self, key) is not None):
                found = "null" if getattr(self, key) is None else "a section"
                raise ValueError(
                    f"{key}: found {found} with model.family: {self.model.family}; the section {key} goes with "
                    f"family {family}, and the family needs it."
                )
        return self

    def _check_copies(self, stage: str) -> None:
        """Raise where classes would be balanced by copies that are all the same; family boosted augments them itself."""
        section: StageConfig | None = getattr(self, stage)
        if section is None or section.balance != "augment" or (stage, self.model.family) == ("finetune", "boosted"):
            return
        # Under after_balance the copies are made, and augmented, before the split.
        is_done = section.data is not None and section.data.split == "after_balance"
        if not is_done and not section.augment.changes_images and section.crop is None:
            raise ValueError(
                f"{stage}.balance: found augment, but {stage}.augment changes nothing, so that smaller classes would only "
                f"repeat the very same images. Set {stage}.augment, e.g. {{rotation: 10, zoom: 0.1, mirror: 0.5}}, or "
                "balance: sampler or class_weight."
            )
