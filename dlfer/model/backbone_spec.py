"""The record of one backbone in the table, and what a backbone expects of its pixels. Keras is not imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of its pixels: ((x * scale) - mean) / std, channel by channel.

    Attributes:
        scale: factor of the pixels (0..255).
        mean, std: in units of the scaled pixels, in the order of `channels`.
        channels: "rgb" or "bgr".
    """

    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: str = "rgb"

    def compute_scale_and_offset(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 [3] factor and summand that do the same in one step."""
        std = np.asarray(self.std, np.float64)
        return (self.scale / std).astype(np.float32), (-np.asarray(self.mean) / std).astype(np.float32)

    def as_dict(self) -> dict:
        """Return the fields as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# torchvision's, DenseNet's, ConvNeXt's and most EfficientNets': 0..1, then ImageNet's mean and deviation.
TORCH_INPUT = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)
EFFICIENTNET_INPUT = TORCH_INPUT
# EfficientNet-Lite's.
LITE_INPUT = Preprocessing(scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3)
# Caffe's, of VGG, Keras' ResNets and MobileNet from VGGFace2: BGR in 0..255 less the mean pixel of ImageNet.
CAFFE_INPUT = Preprocessing(scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr")
# The Inceptions', Xception's and the MobileNets': -1..1.
SIGNED_INPUT = Preprocessing(scale=1 / 127.5, mean=(1.0,) * 3)
# EfficientNetV2-S's, as Keras has it: not quite -1..1.
EFFICIENTNET_V2_S_INPUT = Preprocessing(scale=1 / 128, mean=(1.0,) * 3)

# 0..1, whatever the backbone.
UNIT_INPUT = Preprocessing()


def choose_preprocessing(own: Preprocessing, pixel_scaling: str) -> Preprocessing:
    """Return what `model.pixel_scaling` says: a backbone's own preprocessing, x / 255, or Caffe's."""
    return {"backbone": own, "divide_by_255": UNIT_INPUT, "caffe": CAFFE_INPUT}[pixel_scaling]


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the table.

    Attributes:
        name: as in `dlfer.config.names.BACKBONES`.
        image_size: side in pixels that its authors trained it at.
        num_parameters_without_top: of the network that `build` gives, BatchNorm's moving statistics included.
        build: makes the network with random weights; takes the name of the stem.
        preprocessing: what its pixels must look like.
        stages: names of the layers whose outputs are the last feature maps of each resolution, from the
            image on; the last one is the network's output.
        min_image_size: the smallest side that leaves a feature map of 1x1 or more, by any stem.
        load: sets published weights or those of a file: (backbone, weights_file or None); None if neither can be had.
        weights: names of published weights that can be asked for; those beside imagenet need a file.
        is_packaged: whether the published weights come with dlfer.
        stems: what the first layers may be: "imagenet" as published, "small" for small images.
        auxiliary: names of the layers behind which auxiliary classifiers branch off in training.
        note: one line for `dlfer show backbones`.
    """

    name: str
    image_size: int
    num_parameters_without_top: int
    build: Callable[[str], keras.Model]
    preprocessing: Preprocessing
    stages: tuple[str, ...]
    min_image_size: int = 1
    load: Callable[[keras.Model, str | None], None] | None = None
    weights: tuple[str, ...] = ()
    is_packaged: bool = False
    stems: tuple[str, ...] = ("imagenet",)
    auxiliary: tuple[str, ...] = ()
    note: str = ""


def name_blocks(last_blocks: str) -> tuple[str, ...]:
    """Return the layers that end blocks "1a 2b 3b 5c" and the last one; a block that stands alone has no addition."""
    ends = [f"block{block}_{'project_bn' if block.endswith('a') else 'add'}" for block in last_blocks.split()]
    return (*ends, "top_activation")


def name_residual_blocks(repeats: tuple[int, ...]) -> tuple[str, ...]:
    """Return the layers that end the stages of a ResNet with so many blocks in each."""
    ends = (f"conv{stage}_block{num_blocks}_out" for stage, num_blocks in enumerate(repeats, start=2))
    return ("conv1_relu", *ends)
