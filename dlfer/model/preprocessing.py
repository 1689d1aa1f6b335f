"""What a backbone expects of its pixels, stated once, outside the network that it belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

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
# Caffe's, of VGG and Keras' ResNets: BGR in 0..255 less the mean pixel of ImageNet.
CAFFE_INPUT = Preprocessing(scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr")
# The Inceptions', Xception's and MobileNetV2's: -1..1.
SIGNED_INPUT = Preprocessing(scale=1 / 127.5, mean=(1.0,) * 3)
# EfficientNetV2-S's, as Keras has it: not quite -1..1.
EFFICIENTNET_V2_S_INPUT = Preprocessing(scale=1 / 128, mean=(1.0,) * 3)

# 0..1, whatever the backbone.
UNIT_INPUT = Preprocessing()


def choose_preprocessing(own: Preprocessing, pixel_scaling: str) -> Preprocessing:
    """Return what `model.pixel_scaling` says: a backbone's own preprocessing, or x / 255."""
    return {"backbone": own, "divide_by_255": UNIT_INPUT}[pixel_scaling]
