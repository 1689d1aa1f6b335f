"""Base classes of trained classifiers, and their artifact folders.

`artifact.json` describes how the classifier is built and holds the sha256 of every other file. The folder contains no
code, and nothing in it is unpickled.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

import keras
import numpy as np

from dlfer.config import names
from dlfer.config.sections import ModelConfig
from dlfer.data.pictures import PictureModel
from dlfer.errors import ModelError, shorten
from dlfer.model.predict import predict_probabilities
from dlfer.model.stage_network import TransferNetwork, build_transfer_network
from dlfer.model.weights_file import load_weights, save_weights
from dlfer.runs.artifact import FORMAT, MEND, read_artifact_record
from dlfer.runs.files import check_manifest, hash_file
from dlfer.runs.find import ARTIFACT_FILE, read_about
from dlfer.runs.records import About, ArtifactRecord, OnnxRecord, Temperature

_FAMILIES: dict[str, type[Classifier]] = {}
"""Classes of the families by name; a class registers itself when its module is imported."""


class Classifier(PictureModel):
    """A trained classifier that takes uint8 images of any size.

    Args:
        labels: names of the classes, in the order of the outputs.
        config: the section `model` from which it was built.
        channels: channels of the images it was trained on, 1 (grey) or 3 (RGB); other images are converted.
        image_size: side in pixels of the square input of its network.
        temperature_fit: the temperature and what it was fitted on; None if none was fitted.
    """

    family: ClassVar[str]
    network: keras.Model | None = None
    """Network from uint8 [B, H, W, channels] to activated outputs [B, C]; None if it is not a single network."""
    aspect: str = "crop"
    """How images that are not square are made square: "crop" or "pad", see `dlfer.data.images.make_square`."""
    about: About = About()
    """What its artifact records of its training: experiment, protocol, faces, ...; empty unless it was loaded."""

    def __init_subclass__(cls) -> None:
        if "family" in vars(cls):
            _FAMILIES[cls.family] = cls

    def __init__(
        self,
        labels: tuple[str, ...],
        *,
        config: ModelConfig,
        channels: int,
        image_size: int,
        temperature_fit: Temperature | None = None,
    ) -> None:
        self.labels = tuple(labels)
        self.config = config
        self.channels = channels
        self.image_size = image_size
        self.temperature_fit = temperature_fit

    @abstractmethod
    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the trained parameters to `folder`; return the names of the files, relative to it."""

    @classmethod
    @abstractmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the names of the files that `read_files` opens, as in the hashes of artifact.json."""

    @classmethod
    @abstractmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Read a classifier from `folder`, whose files have been verified; `record` is its artifact.json."""

    def describe(self) -> dict:
        """Return the entries that the family adds to artifact.json, for `read_files`."""
        return {}

    def save(
        self,
        folder: Path,
        *,
        about: About | None = None,
        write_onnx: Callable[[Classifier, Path], OnnxRecord | str] | None = None,
    ) -> None:
        """Write the artifact to `folder`.

        Args:
            folder: the target folder; created if it does not exist.
            about: facts about the training to store with it (experiment, protocol, ...).
            write_onnx: writes a classifier's ONNX file to a folder; returns its record, or why there is none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.write_files(folder)
        onnx = write_onnx(self, folder) if write_onnx is not None else None
        has_onnx = isinstance(onnx, OnnxRecord)
        if has_onnx:
            files = (*files, onnx.file)
        record = {
            "format": FORMAT,
            "family": self.family,
            "labels": list(self.labels),
            "model": self.config.model_dump(mode="json"),
            "input": {
                "dtype": "uint8",
                "range": [0, 255],
                "channels": self.channels,
                "image_size": self.image_size,
                "crop": self.crop,
                "aspect": self.aspect,
                "note": "any height and width; made square as aspect says, cropped if so, resized, made three channels and "
                "preprocessed inside the network",
            },
            **self.describe(),
            "sha256": {name: hash_file(folder / name) for name in files},
            "temperature": self.temperature_fit,
            "about": about or About(),
            "onnx": onnx if has_onnx else None,
            "onnx_absent": None if has_onnx else onnx,
        }
        ArtifactRecord.build(record).write(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a classifier that `save` wrote, after comparing the sha256 of every file.

        Raises:
            ModelError: a file is missing, of another format, or was changed.
        """
        folder = Path(folder)
        record = read_artifact_record(folder)
        file = folder / ARTIFACT_FILE
        check_manifest(folder, record.sha256, file=file, needed=cls.name_files(record), mend=MEND)
        classifier = cls.read_files(folder, record)
        classifier.about = read_about(folder, record)
        return classifier


def load_classifier(folder: Path) -> Classifier:
    """Load the classifier of any family from an artifact folder.

    Raises:
        ModelError: there is no artifact, it is damaged, or the module of its family was not imported
            (`dlfer.model.families` imports all of them).
    """
    family = read_artifact_record(folder).family
    if family not in _FAMILIES:
        raise ModelError(f"{folder}: the module of family {family} is not imported; load it by dlfer.load(FOLDER).")
    return _FAMILIES[family].load(folder)


def list_families() -> dict[str, type[Classifier]]:
    """Return the classes of the families whose modules have been imported, by name, ordered as `names.FAMILIES`."""
    return {name: _FAMILIES[name] for name in names.FAMILIES if name in _FAMILIES}


def read_model_config(record: ArtifactRecord) -> ModelConfig:
    """Return the section `model` from which the classifier of an artifact was built.

    Raises:
        ModelError: the section is not valid in this version of dlfer.
    """
    try:
        return ModelConfig.model_validate_json(json.dumps(record.model))
    except ValueError as error:
        raise ModelError(
            f"{ARTIFACT_FILE}: model: {shorten(error)}; it was changed, or needs another version of dlfer."
        ) from error


def build_recorded_network(config: ModelConfig, record: ArtifactRecord) -> TransferNetwork:
    """Build the network of an artifact, with random weights."""
    given = record.input
    return build_transfer_network(
        config,
        num_labels=len(record.labels),
        image_size=given.image_size,
        channels=given.channels,
        crop=given.crop,
        aspect=given.aspect,
    )


WEIGHTS_FILE = "network.weights.h5"


class BackboneClassifier(Classifier):
    """A classifier that uses the input layer and the backbone of a network.

    Args:
        network: the network, with its trained weights.
        labels, config, channels, temperature_fit: see `Classifier`.
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
        size = network.face_input.image_size
        super().__init__(labels, config=config, channels=channels, image_size=size, temperature_fit=temperature_fit)
        self.parts = network
        self.crop = network.face_input.crop
        self.aspect = network.face_input.aspect


class NetworkClassifier(BackboneClassifier):
    """A classifier that consists of a single trained network."""

    @property
    def network(self) -> keras.Model:
        """Network from uint8 [B, H, W, channels] to activated outputs [B, C]."""
        return self.parts.model

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return the probabilities, float32 [N, C], whose rows sum to one."""
        return predict_probabilities(self.network, images, batch_size=batch_size)

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the weights; return the name of their file."""
        save_weights(self.network, folder / WEIGHTS_FILE)
        return (WEIGHTS_FILE,)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the name of the weights file."""
        return (WEIGHTS_FILE,)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Build the network and load its weights."""
        config = read_model_config(record)
        network = build_recorded_network(config, record)
        load_weights(network.model, folder / WEIGHTS_FILE)
        return cls(
            network,
            tuple(record.labels),
            config=config,
            channels=record.input.channels,
            temperature_fit=record.temperature,
        )


class TransferClassifier(NetworkClassifier):
    """A network of one backbone, pooling and a dense head."""

    family = "transfer"


class HybridClassifier(NetworkClassifier):
    """A network of several backbones, whose features are fused, and a dense head."""

    family = "hybrid"
