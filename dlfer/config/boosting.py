"""The section `boosting` of an experiment file: gradient-boosted trees on the features of a backbone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dlfer.config.section import Count, Fraction, Section


class NormalizeConfig(Section):
    """What "weight-normalised" may mean: each reading of the words is a key of its own."""

    rows: bool = True
    """Weights of the training images by class, so that all classes count alike; their mean is 1."""
    features: Literal["none", "standard", "l2"] = "standard"
    """standard: each feature less its mean, divided by its standard deviation on train (trees ask only for the order
    of values, so that this changes next to nothing). l2: each level of each image to length 1 (ParseNet)."""
    leaves: bool = False
    """No leaf before the learning rate is beyond -1 or 1 (XGBoost's max_delta_step: 1)."""


class BoostingConfig(Section):
    """How the trees are grown (family boosted).

    An epoch of `finetune` is `rounds_per_epoch` rounds; epochs, monitor, keep, early_stopping, batch_size,
    image_size, crop and balance of that section apply, and what concerns gradients and augmentation does not.
    """

    rounds_per_epoch: Count = 10
    """A round is one tree a class. After each epoch validation is judged and the trees so far are saved."""
    levels: Literal["all", "last"] = "all"
    """Features of every stage of the backbone, or of its output alone."""
    normalize: NormalizeConfig = NormalizeConfig()
    learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.1
    """Factor of each new tree. XGBoost's leaf is half of -S/V (reg_lambda 0), since it takes 2 p (1-p) for the second
    derivative: 1 adds half of Newton's step -S/V of each class, and 2 adds all of it."""
    max_depth: Count = 6
    min_child_weight: Annotated[float, Field(ge=0)] = 1.0
    """Smallest sum of second derivatives on either side of a split."""
    reg_lambda: Annotated[float, Field(ge=0)] = 1.0
    """Added to the sum of second derivatives in split gain and leaf weight."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Smallest gain of a split, in XGBoost's count, which leaves out the factor 1/2."""
    subsample: Annotated[Fraction, Field(gt=0)] = 1.0
    """Fraction of the images that a round sees."""
    colsample: Annotated[Fraction, Field(gt=0)] = 0.3
    """Fraction of the features that a tree sees."""
    max_bin: Annotated[int, Field(ge=2, le=65535)] = 256
    """Bins of a feature among which splits are sought."""
