"""The sections of one training: its data, what is done to them, and how the network is fitted to them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dlfer.config import names
from dlfer.config.sections import Count, DataConfig, Fraction, OpenFraction, Positive, Section, Seed


class OptimizerConfig(Section):
    """The optimiser; keys that the chosen one lacks must be left out."""

    name: Literal[names.OPTIMIZERS] = "adamw"
    learning_rate: Positive = 1e-3
    beta_1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """adam, adamw: decay of the first moment (0.9)."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """adam, adamw: decay of the second moment (0.999)."""
    epsilon: Positive | None = None
    """adam, adamw, rmsprop (1e-7)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """sgd, rmsprop (0)."""
    nesterov: bool | None = None
    """sgd."""
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
    """kernels: biases and the weights of normalisation layers are not decayed; all: they are, as PyTorch does by
    default."""

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
    """How the learning rate moves within a stage."""

    name: Literal[names.SCHEDULES] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear rise from 0; constant, step and cosine."""
    final: Fraction = 0.0
    """cosine: the last rate as a fraction of the first."""
    restarts: Annotated[int, Field(ge=0)] = 0
    """cosine: number of warm restarts, in equal periods."""
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
    """What training minimises."""

    name: Literal[names.LOSSES] = "categorical_crossentropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: exponent of (1 - p); 0 is categorical_crossentropy."""


class AugmentConfig(Section):
    """Random changes of training images. The geometric ones are one affine warp, sampled once."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, uniform in -rotation..rotation."""
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction, uniform in 1-zoom..1+zoom, the same in both directions."""
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the side, uniform in -shift..shift, each direction on its own."""
    mirror: Fraction = 0.0
    """Probability of a left-right flip."""
    fill: Literal["nearest", "reflect", "constant"] = "nearest"
    """What stands outside the image: its edge, its mirror image, or black."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the range 0..255 added, uniform in -brightness..brightness."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor around the image's mean, uniform in 1-contrast..1+contrast."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of the mixing weight; 0 is off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of the kept area; 0 is off. With mixup, a batch takes one or the other."""
    erasing: Fraction = 0.0
    """Probability that a rectangle (2 to 20 % of the area) becomes the image's mean."""

    @property
    def changes_images(self) -> bool:
        """Whether any of the random changes is switched on."""
        return any(getattr(self, name) for name in type(self).model_fields if name != "fill")


class FreezeConfig(Section):
    """Which weights of a pretrained backbone move, and when.

    A stage that starts from random weights (pretrain: null, and EF-FER1 itself) trains the whole network from its
    first epoch: its run says that these keys were not applied.
    """

    head_epochs: Annotated[int, Field(ge=0)] = 0
    """First so many of the stage's epochs train the head alone."""
    head_learning_rate: Positive | None = None
    """Their constant rate; null takes the optimiser's."""
    layers: Fraction = 0.0
    """This fraction of the backbone's layers (hybrid: of each branch's), counted from the input, never moves."""
    batch_norm: Literal["update", "frozen"] = "update"
    """frozen: BatchNorm keeps its statistics and weights in the whole stage."""


class EarlyStopping(Section):
    """Stop when the monitored metric no longer improves; counted as Keras' EarlyStopping counts."""

    patience: Count
    """The stage ends after that many epochs in a row without an improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """An epoch is an improvement if it beats the value at the last improvement by more than this. The weights that
    are kept are those of the best value in any case."""


class StageConfig(Section):
    """One training: its data, and how the network is fitted to it."""

    data: DataConfig
    epochs: Count = 30
    batch_size: Count = 64
    image_size: Annotated[int, Field(ge=16, le=1024)] = 224
    """Side in pixels of the square that the network sees."""
    crop: OpenFraction | None = None
    """Side of the part of an image that becomes this square, e.g. 0.8333 for 40 of 48 pixels: a random part in
    training, the central one in plain predictions, ten of them under the view ten_crop. null: the whole image."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    balance: Literal[names.BALANCES] = "none"
    """Of train only. augment: images repeat up to the size of the largest class, each repetition augmented anew by the
    section augment, which must change something; undersample: down to the smallest class; sampler: classes are drawn
    with equal probability; class_weight: the loss of each class counts in inverse proportion to its share of the
    targets, mixed and soft targets included."""
    freeze: FreezeConfig = FreezeConfig()
    monitor: Literal[names.MONITORS] = "accuracy"
    """The validation figure that selects the epoch, stops early and drives plateau."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights the stage ends with."""
    early_stopping: EarlyStopping | None = None
    ema: OpenFraction | None = None
    """Decay of an exponential moving average of the weights; validated and kept instead of the raw ones."""
    clip: Positive | None = 1.0
    """Largest global norm of the gradient, before an l2 weight decay is added; null: no clipping. It keeps the first
    steps from random weights small."""
    milestones: tuple[Count, ...] = ()
    """finetune: epochs at whose end the network, as it is then, is judged in a row of its own."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.freeze.head_epochs >= self.epochs and self.freeze.head_epochs > 0:
            raise ValueError(
                f"freeze.head_epochs: found {self.freeze.head_epochs} with epochs {self.epochs}; "
                "the stage's epochs include those of the head, so it must be smaller."
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
        if self.schedule.name == "plateau" and self.schedule.warmup_epochs:
            raise ValueError("schedule.warmup_epochs: plateau has no warm-up; set it to 0 or choose cosine.")
        if max(self.milestones, default=0) > self.epochs or sorted(set(self.milestones)) != list(self.milestones):
            raise ValueError(
                f"milestones: found {list(self.milestones)} with epochs {self.epochs}; expected rising numbers of "
                "epochs, the last at most epochs."
            )
        return self

    @property
    def native_size(self) -> int:
        """Side in pixels of images that are brought to one size before the network: S, or S / crop."""
        return self.image_size if self.crop is None else math.ceil(self.image_size / self.crop)


class PretrainConfig(StageConfig):
    """EF-FER1. Either trained here on `data`, or taken from `weights`."""

    data: DataConfig | None = None
    weights: str | None = None
    """null: train on data. "imagenet": published weights. Else: a weights file, or an earlier run."""
    weights_file: str | None = None
    """With weights: imagenet, a local file (.weights.h5, .h5, .keras) instead of the published one; hybrid: a folder of them."""
    seed: Seed = 0
    """Seed of EF-FER1, apart from experiment.seed, so that all seeds share one EF-FER1."""

    @model_validator(mode="after")
    def _check_weights(self) -> PretrainConfig:
        if self.weights is None and self.data is None:
            raise ValueError("data: EF-FER1 needs data to train on, or weights (imagenet, a file, a run).")
        if self.weights_file is not None and self.weights != "imagenet":
            raise ValueError("weights_file: goes with weights: imagenet only.")
        if self.milestones:
            raise ValueError("milestones: belong to finetune; EF-FER1 is not judged.")
        return self
