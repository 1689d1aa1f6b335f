"""Multi-level features: the feature maps of every stage of a backbone, pooled and concatenated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import keras
import numpy as np
from keras import ops

from dlfer.errors import NonFiniteError
from dlfer.model.backbones import BACKBONES
from dlfer.model.stage_network import TransferNetwork

LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Level:
    """One stage of a backbone.

    Attributes:
        name: of its last layer.
        size: number of its features, one a channel.
    """

    name: str
    size: int


class LevelFeatures:
    """What turns images into features, in inference mode.

    Features are float16: the cache is half as large, and, more to the point, a split of a tree asks whether a
    value is below that of some training image. In float32 the same image in a batch of another size differs in
    the last bits, and falls on the other side; rounded, it is equal but for one value in a thousand.

    Args:
        network: whose backbone and input stage are used.
        backbone: its name in the table.
        pooling: over each feature map, "avg" or "max".
        levels: "all" stages, or the "last" alone.
    """

    def __init__(
        self, network: TransferNetwork, *, backbone: str, pooling: str, levels: Literal["all", "last"]
    ) -> None:
        stages = BACKBONES[backbone].stages
        taps = [network.backbone.get_layer(name).output for name in (stages if levels == "all" else stages[-1:])]
        pool = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}[pooling]
        self.levels = tuple(
            Level(name, int(tap.shape[-1])) for name, tap in zip(stages[-len(taps) :], taps, strict=True)
        )
        self.pooling = [pool(name=f"pooled_{number}", dtype="float32") for number in range(len(taps))]
        pooled = [layer(tap) for layer, tap in zip(self.pooling, taps, strict=True)]
        tapped = keras.Model(network.backbone.inputs, pooled, name="stages")
        images = keras.Input(network.model.input_shape[1:], dtype="uint8", name="images")
        found = tapped(network.face_input(images), training=False)
        found = found if isinstance(found, list | tuple) else [found]
        self.model = keras.Model(images, ops.concatenate(list(found), axis=-1), name="level_features")

    @property
    def num_features(self) -> int:
        """Of all levels together, F."""
        return sum(level.size for level in self.levels)

    def compute(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return float16 [N, F] of uint8 images [N, H, W, channels], the levels one after the other."""
        return np.concatenate(list(self.iterate(images, batch_size=batch_size)))

    def iterate(self, images: np.ndarray, *, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield float16 [B, F] batch by batch, from the image `start` on.

        Raises:
            NonFiniteError: a feature is NaN; the backbone's weights are broken.
        """
        for first in range(start, len(images), batch_size):
            batch = np.asarray(self.model.predict_on_batch(images[first : first + batch_size]))
            if np.isnan(batch).any():
                column = int(np.flatnonzero(np.isnan(batch).any(axis=0))[0])
                raise NonFiniteError(
                    f"feature {column} (level {find_level(self.levels, column).name}) is NaN; expected numbers. "
                    "The backbone's weights are broken: train EF-FER1 again, or take other pretrain.weights."
                )
            yield np.clip(batch, -LARGEST, LARGEST).astype(np.float16)


def find_level(levels: tuple[Level, ...], column: int) -> Level:
    """Return the level that a column of the features belongs to."""
    ends = np.cumsum([level.size for level in levels])
    return levels[int(np.searchsorted(ends, column, side="right"))]
