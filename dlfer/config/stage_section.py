"""The sections of one training: its data, what is done to them, and how the network is fitted to them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dlfer.config import names
from dlfer.config.data_section import DataConfig
from dlfer.config.section import Count, Fraction, OpenFraction, Positive, Section, Seed


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
    """Decoupled weight decay (adamw: 0.004 if left out; others: none). Not applied to biases and BatchNorm."""

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
    """step: how often."""
    start_epoch: Annotated[int, Field(ge=0)] = 0
    """step: constant until this epoch."""
    patience: Annotated[int, Field(ge=0)] = 3
    """plateau: epochs without improvement of the monitored figure before the rate falls."""


class LossConfig(Section):
    """What training minimises."""

    name: Literal[names.LOSSES] = "categorical_crossentropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: exponent of (1 - p)."""


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


class FreezeConfig(Section):
    """Which weights of the backbone move, and when."""

    head_epochs: Annotated[int, Field(ge=0)] = 0
    """First so many of the stage's epochs train the head alone."""
    head_learning_rate: Positive | None = None
    """Their constant rate; null takes the optimiser's."""
    layers: Fraction = 0.0
    """This fraction of the backbone's layers (hybrid: of each branch's), counted from the input, never moves."""
    batch_norm: Literal["update", "frozen"] = "update"
    """frozen: BatchNorm keeps its statistics and weights in the whole stage."""


class EarlyStopping(Section):
    """Stop when the monitored figure no longer improves."""

    patience: Count
    min_delta: Annotated[float, Field(ge=0)] = 0.0


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
    """Of train only. augment: copies up to the largest class; undersample: down to the smallest."""
    freeze: FreezeConfig = FreezeConfig()
    monitor: Literal[names.MONITORS] = "accuracy"
    """The validation figure that selects the epoch, stops early and drives plateau."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights the stage ends with."""
    early_stopping: EarlyStopping | None = None
    ema: OpenFraction | None = None
    """Decay of an exponential moving average of the weights; validated and kept instead of the raw ones."""
    clip: Positive | None = None
    """Largest global norm of the gradient."""
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
    """With weights: imagenet, a local copy of the published file, instead of a download; hybrid: a folder of them."""
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
