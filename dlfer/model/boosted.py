"""The boosted family: multi-level features of a backbone, and weight-normalised XGBoost on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import keras
import numpy as np
from keras import ops

from dlfer.config.sections import BoostingConfig, ModelConfig
from dlfer.errors import ModelError
from dlfer.model.backbones import list_levels
from dlfer.model.classifier import BackboneClassifier, build_recorded_network, read_model_config
from dlfer.model.stage_network import TransferNetwork
from dlfer.model.trees import (
    SCALE_FILE,
    TREES_FILE,
    FeatureScale,
    Level,
    import_xgboost,
    predict_trees,
    read_boosting,
    read_trees,
    round_features,
)
from dlfer.model.weights_file import load_weights, save_weights
from dlfer.runs.files import write_atomically
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.runs.records import ArtifactRecord, Temperature

if TYPE_CHECKING:
    import xgboost

WEIGHTS_FILE = "backbone.weights.h5"


class LevelFeatures:
    """What turns images into features, in inference mode.

    Features are float16: the cache is half as large, and, more to the point, a split of a tree asks whether a
    value is below that of some training image. In float32 the same image in a batch of another size differs in
    the last bits, and falls on the other side; rounded, it is equal but for one value in a thousand.

    Args:
        network: whose backbone and input stage are used.
        layers: of the backbone, whose outputs are the feature maps.
        pooling: over each feature map, "avg" or "max".
    """

    def __init__(self, network: TransferNetwork, *, layers: Sequence[str], pooling: str) -> None:
        taps = [network.backbone.get_layer(name).output for name in layers]
        pool = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}[pooling]
        self.levels = tuple(Level(name, int(tap.shape[-1])) for name, tap in zip(layers, taps, strict=True))
        self.pooling = [pool(name=f"pooled_{number}", dtype="float32") for number in range(len(taps))]
        pooled = [layer(tap) for layer, tap in zip(self.pooling, taps, strict=True)]
        self.tapped = keras.Model(network.backbone.inputs, pooled, name="stages")
        images = keras.Input(network.model.input_shape[1:], dtype="uint8", name="images")
        found = self.tapped(network.face_input(images), training=False)
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
            yield round_features(
                np.asarray(self.model.predict_on_batch(images[first : first + batch_size])), self.levels
            )


class BoostedClassifier(BackboneClassifier):
    """Trees on the pooled features of every stage of a backbone.

    The source of this family (ResNet50 with "weight-normalised XGBoost", see experiments/boosted.yaml) leaves
    open which weights are normalised. Our reading: those of the rows, so that each class has the same sum of
    weights and the mean weight is 1; and each feature is standardised. The other readings are the keys
    `boosting.normalize`: `features` (none, standard, l2) and `leaves`.

    Args:
        network: whose backbone gives the features; its head is not used.
        features: of that network.
        scale: how they are normalised.
        booster: the trees.
        labels, config, channels, temperature_fit: as `Classifier` has them.
        boosting: how the trees were grown.
    """

    family = "boosted"

    def __init__(
        self,
        network: TransferNetwork,
        labels: tuple[str, ...],
        *,
        config: ModelConfig,
        channels: int,
        boosting: BoostingConfig,
        trees: tuple[LevelFeatures, FeatureScale, xgboost.Booster],
        temperature_fit: Temperature | None = None,
    ) -> None:
        super().__init__(network, labels, config=config, channels=channels, temperature_fit=temperature_fit)
        self.boosting = boosting
        self.features, self.scale, self.booster = trees

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return float32 [N, C], rows sum to one."""
        scaled = self.scale.apply(self.features.compute(images, batch_size=batch_size))
        return predict_trees(self.booster, scaled)

    def describe(self) -> dict:
        """Return the section `boosting` and the levels of the features."""
        return {
            "boosting": self.boosting.model_dump(mode="json"),
            "levels": [{"name": level.name, "features": level.size} for level in self.features.levels],
        }

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the trees, the statistics of the features, and the backbone's weights."""
        write_atomically(folder / TREES_FILE, bytes(self.booster.save_raw("json")))
        self.scale.write(folder / SCALE_FILE)
        save_weights(self.parts.backbone, folder / WEIGHTS_FILE)
        return (TREES_FILE, SCALE_FILE, WEIGHTS_FILE)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the names of the trees, the statistics and the weights.

        Raises:
            ModelError: the trees are in the binary format of dlfer 0.1.
        """
        if "trees.ubj" in record.sha256:
            raise ModelError(
                f"{ARTIFACT_FILE}: found trees in the format of dlfer 0.1 (trees.ubj), expected {TREES_FILE}; train the "
                "model again with this version, or use it with dlfer 0.1."
            )
        return (TREES_FILE, SCALE_FILE, WEIGHTS_FILE)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Build the backbone, set its weights, and read the trees."""
        import_xgboost()
        config = read_model_config(record)
        boosting = read_boosting(folder, record)
        network = build_recorded_network(config, record)
        load_weights(network.backbone, folder / WEIGHTS_FILE)
        features = build_level_features(network, config, boosting)
        scale, booster = read_trees(folder, record, features.levels)
        return cls(
            network,
            tuple(record.labels),
            config=config,
            channels=record.input.channels,
            boosting=boosting,
            trees=(features, scale, booster),
            temperature_fit=record.temperature,
        )


def build_level_features(network: TransferNetwork, config: ModelConfig, boosting: BoostingConfig) -> LevelFeatures:
    """Return what turns images into the features that an experiment asks for."""
    layers = list_levels(config.backbone, config.feature_level)
    return LevelFeatures(
        network, layers=layers if boosting.levels == "all" else layers[-1:], pooling=config.head.pooling
    )
