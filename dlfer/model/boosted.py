"""The boosted family: multi-level features of a backbone, and weight-normalised XGBoost on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from dlfer.config.sections import BoostingConfig, ModelConfig
from dlfer.errors import ModelError
from dlfer.model.classifier import Classifier, build_recorded_network, read_model_config
from dlfer.model.stage_network import TransferNetwork
from dlfer.model.trees import FeatureScale, LevelFeatures, count_threads, import_xgboost, read_booster
from dlfer.model.weights_file import load_weights, save_weights
from dlfer.runs.files import write_atomically
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.runs.records import ArtifactRecord, Temperature

if TYPE_CHECKING:
    import xgboost

TREES_FILE, SCALE_FILE, WEIGHTS_FILE = "trees.json", "features.npz", "backbone.weights.h5"


class BoostedClassifier(Classifier):
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
        super().__init__(
            labels,
            config=config,
            channels=channels,
            image_size=network.face_input.image_size,
            temperature_fit=temperature_fit,
        )
        self.parts = network
        self.crop = network.face_input.crop
        self.aspect = network.face_input.aspect
        self.boosting = boosting
        self.features, self.scale, self.booster = trees

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return float32 [N, C], rows sum to one."""
        scaled = self.scale.apply(self.features.compute(images, batch_size=batch_size))
        threads = count_threads(scaled.size)
        self.booster.set_param({"nthread": threads})
        return self.booster.predict(import_xgboost().DMatrix(scaled, nthread=threads)).astype(np.float32)

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
        boosting = _read_boosting(record, folder)
        network = build_recorded_network(config, record)
        load_weights(network.backbone, folder / WEIGHTS_FILE)
        features = build_level_features(network, config, boosting)
        scale = FeatureScale.read(folder / SCALE_FILE, boosting.normalize.features, features.levels)
        booster = read_booster(folder / TREES_FILE, num_features=features.num_features, num_labels=len(record.labels))
        return cls(
            network,
            tuple(record.labels),
            config=config,
            channels=record.input.channels,
            boosting=boosting,
            trees=(features, scale, booster),
            temperature_fit=record.temperature,
        )


def _read_boosting(record: ArtifactRecord, folder: Path) -> BoostingConfig:
    try:
        return BoostingConfig.model_validate_json(json.dumps(record.boosting))
    except ValueError as error:
        raise ModelError(
            f"{folder}: boosting: {str(error)[:600]}; copy the artifact again, or train it anew."
        ) from error


def build_level_features(network: TransferNetwork, config: ModelConfig, boosting: BoostingConfig) -> LevelFeatures:
    """Return what turns images into the features that an experiment asks for."""
    return LevelFeatures(network, backbone=config.backbone, pooling=config.head.pooling, levels=boosting.levels)
