"""The section `model` of an experiment file: which family, of which parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dlfer.config import names
from dlfer.config.section import Count, Section


class HeadConfig(Section):
    """The layers after the backbone."""

    pooling: Literal["avg", "max"] = "avg"
    hidden: tuple[Count, ...] = ()
    """Units of dense layers (ReLU, each with the dropout) before the last one; [4096, 4096] is VGG's own head."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid goes with binary_crossentropy; its outputs are normalised to sum to one when predicting."""


class ModelConfig(Section):
    """The network, the same in both stages but for the number of labels."""

    family: Literal[names.FAMILIES] = "transfer"
    """transfer: one backbone. hybrid: several, fused. boosted: trees on a backbone's features. ensemble: of runs."""
    backbone: Literal[names.BACKBONES] = "efficientnet_b3"
    branches: tuple[Literal[names.BACKBONES], ...] = ()
    """hybrid: the backbones that are fused, instead of `backbone`."""
    fusion: Literal[names.FUSIONS] = "concat"
    """hybrid: concat of the pooled features, their sum (add), or a sum weighted per image (attention)."""
    stem: Literal[names.STEMS] = "imagenet"
    """resnet18, resnet34: imagenet is 7x7 of stride 2 and a max pool; small is 3x3 of stride 1, for small images."""
    pixel_scaling: Literal[names.PIXEL_SCALINGS] = "backbone"
    """What the first layer sees of a pixel x in 0..255. backbone: what the published weights of the backbone were
    trained with, e.g. (x / 255 - mean) / deviation (`dlfer show backbones`); divide_by_255: x / 255 in RGB order and
    nothing else. It is saved with the model; both stages have the same, and hybrid: all branches."""
    auxiliary_heads: bool = False
    """googlenet: train its two auxiliary classifiers, too, with weight 0.3 each; predictions leave them out."""
    norm_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum of BatchNorm's moving statistics; null: the backbone's own. They settle after some 5 / (1 - momentum)
    steps: MobileNetV2's own 0.999 needs 5,000, and validation stays at chance until then where nothing is pretrained."""
    drop_connect: Annotated[float, Field(ge=0, lt=1)] | None = None
    """EfficientNets: rate at which the last residual block is skipped in training (stochastic depth, drop path); null: the
    published 0.2, made for hundreds of epochs. Set 0 for short trainings, above all from random weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Dropout between pooling and the last dense layer."""
    head: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.family == "hybrid") != bool(self.branches):
            raise ValueError(
                f"branches: found {list(self.branches)} with family {self.family}; a hybrid names two or more, "
                "e.g. branches: [resnet50, resnet34], and other families none."
            )
        if self.branches and len(self.branches) < 2:
            raise ValueError("branches: found one, expected two or more; one backbone is family transfer.")
        if self.fusion != "concat" and self.family != "hybrid":
            raise ValueError(f"fusion: found {self.fusion} with family {self.family}; it belongs to family hybrid.")
        used = self.branches or (self.backbone,)
        if self.drop_connect is not None and not any(name.startswith("efficientnet_") for name in used):
            raise ValueError(
                f"drop_connect: found {self.drop_connect:g} with {', '.join(used)}; only EfficientNets have it. Leave it out."
            )
        if self.auxiliary_heads and (self.family, self.backbone) != ("transfer", "googlenet"):
            raise ValueError("auxiliary_heads: only backbone googlenet of family transfer has them.")
        return self
