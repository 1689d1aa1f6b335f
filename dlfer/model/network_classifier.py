"""Classifiers that are one network: family transfer and family hybrid."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from dlfer.config.sections import ModelConfig
from dlfer.model.classifier import Classifier, read_model_config
from dlfer.model.predict import predict_probabilities
from dlfer.model.stage_network import TransferNetwork, build_transfer_network
from dlfer.model.weights_file import load_weights
from dlfer.runs.records import ArtifactRecord, Temperature

WEIGHTS_FILE = "network.weights.h5"


class NetworkClassifier(Classifier):
    """A trained network that takes uint8 images of any size.

    Args:
        network: with its trained weights.
        labels, config, channels, temperature_fit: as `Classifier` has them.
    """

    def __init__(
        self,
        network: TransferNetwork,
        labels: tuple[str, ...],
        *,
        config: ModelConfig,
        channels: int,
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
        self.network = network.model

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return float32 [N, C], rows sum to one."""
        return predict_probabilities(self.network, images, batch_size=batch_size)

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the weights."""
        temporary = folder / f"new.{WEIGHTS_FILE}"
        self.network.save_weights(temporary)
        temporary.replace(folder / WEIGHTS_FILE)
        return (WEIGHTS_FILE,)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the name of the weights."""
        return (WEIGHTS_FILE,)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Build the network and set its weights."""
        config, given = read_model_config(record), record.input
        network = build_transfer_network(
            config,
            num_labels=len(record.labels),
            image_size=given.image_size,
            channels=given.channels,
            crop=given.crop,
            aspect=given.aspect,
        )
        load_weights(network.model, folder / WEIGHTS_FILE)
        return cls(
            network,
            tuple(record.labels),
            config=config,
            channels=given.channels,
            temperature_fit=record.temperature,
        )


class TransferClassifier(NetworkClassifier):
    """One backbone, pooled, with a dense head."""

    family = "transfer"


class HybridClassifier(NetworkClassifier):
    """Several backbones whose features are fused, with a dense head."""

    family = "hybrid"
