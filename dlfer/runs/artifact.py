"""Records of artifact.json (a trained model) and export.json (an exported model), readable without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dlfer.config import names
from dlfer.errors import ModelError
from dlfer.runs.comparison_record import PairedTest
from dlfer.runs.files import read_json
from dlfer.runs.find import ARTIFACT_FILE, EXPORT_FILE, find_model
from dlfer.runs.metrics_record import Estimate, Number, rename_key
from dlfer.runs.records import (
    MAX_LABELS,
    About,
    ArtifactRecord,
    Count,
    FacesSection,
    FileRecord,
    Label,
    Record,
    Side,
    Text,
)

FORMAT = 1
MEND = "Copy the artifact again, or train it again"
"""Advice on a modified artifact for the end of an error message; it has no full stop."""


def read_artifact_record(folder: Path) -> ArtifactRecord:
    """Return the record of an artifact folder's artifact.json, after checking that this version can read it.

    Raises:
        ModelError: the file is absent, damaged or of another format, or its values are outside the limits.
    """
    path = Path(folder) / ARTIFACT_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected the description of a trained model: {error}.") from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{path}: found a {type(values).__name__}, expected the description of a trained model. {MEND}."
        )
    form, family = values.get("format"), values.get("family")
    if form != FORMAT or family not in names.FAMILIES:
        raise ModelError(
            f"{path}: found format {str(form)[:40]!r} and family {str(family)[:40]!r}, "
            f"expected format {FORMAT} and one of {', '.join(names.FAMILIES)}; it needs another version of dlfer."
        )
    record = ArtifactRecord.parse(values, path)
    if len(set(record.labels)) < len(record.labels):
        raise ModelError(
            f"{path}: labels: found {str(record.labels)[:80]!r}, expected different names of classes. {MEND}."
        )
    return record


def find_network_model(name: Path | str) -> Path:
    """Return the folder of a model, as `find_model` does, whose backbone can initialise another network.

    Raises:
        ModelError: there is no such model, or it is an ensemble.
    """
    folder = find_model(name)
    if read_artifact_record(folder).family == "ensemble":
        raise ModelError(
            f"{name}: found an ensemble, expected a model of one network, whose backbone is taken; name the model or the run "
            "of one of its members."
        )
    return folder


class ExportInput(Record):
    """The input of an exported model.

    Attributes:
        shape: [None, H, W, channels]; H and W are None if images of any size are accepted.
        channels: "grey" or "RGB".
        network_size: side in pixels of the square image that the network receives.
        aspect: how images that are not square become squares: "crop" or "pad".
        faces: the section `finetune.data.faces` that prepared the training images, or None.
    """

    name: Text = "images"
    dtype: Text = "uint8"
    range: list[int] | None = None
    shape: list[int | None]
    channels: Text | None = None
    network_size: Side
    aspect: Literal[names.ASPECTS] = "crop"
    faces: FacesSection = None
    note: str = ""


class ExportOutput(Record):
    """The output of an exported model: probabilities of `shape` [None, number of labels]."""

    name: str = "probabilities"
    dtype: str = "float32"
    shape: list[int | None] = Field(default_factory=list)
    note: str = ""


class ExportTemperature(Record):
    """The temperature of the original model, which no export applies; `value` is None if none was fitted."""

    value: Annotated[Number, Field(gt=0)] = None
    applied: bool = False
    note: str = ""


class ExportLimits(Record):
    """The limits that an export had to meet: the maximum probability difference and minimum share of equal labels."""

    difference: Number = None
    agreement: Number = None


class OtherSizes(Record):
    """The comparison of an export with its original on images resized to other sizes."""

    sizes: list[list[int]]
    n: Count
    largest_difference: Number = None


class ExportAccuracy(PairedTest):
    """The paired comparison of the accuracies of the original (a) and the export (b); the difference is the loss."""

    sentence: str = ""


class Agreement(Record):
    """How well an export agrees with its original.

    Attributes:
        images: description of the images on which the two were compared.
        largest_difference, mean_difference: of the probabilities; None if NaN, which makes the export useless.
        labels_agree: the share of images with the same most probable label.
    """

    images: str
    n: Count
    size: list[int] = Field(default_factory=list)
    largest_difference: Number = None
    mean_difference: Number = None
    labels_agree: Estimate
    other_sizes: OtherSizes | None = None
    accuracy: ExportAccuracy | None = None


class Quantised(Record):
    """The images that calibrated an int8 export's activations, and its float32 operations, kind -> number."""

    num_images: Count
    images: str
    float_operations: dict[str, int] = Field(default_factory=dict)


class ExportAbout(Record):
    """The provenance of an exported model.

    Attributes:
        artifact_sha256: file of the original artifact -> checksum.
        trained: the section `about` of the original's artifact.json.
        packages: name -> version of each package that made the export.
    """

    model: str | None = None
    family: str | None = None
    backbone: str | None = None
    artifact_sha256: dict[str, str] | None = None
    trained: About | None = None
    packages: dict[str, str] = Field(default_factory=dict)


class ExportRecord(FileRecord):
    """The contents of export.json, which describes a model exported to one format.

    Attributes:
        version: version of the folder's layout.
        file: name of the model's file or folder.
        sha256: file -> checksum, for all other files of the folder.
        opset: ONNX opset; None for other formats.
        quantised: for litert-int8 and onnx-int8, else None.
    """

    FILE: ClassVar[str] = EXPORT_FILE

    version: int
    format: str
    file: str
    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS)]
    input: ExportInput
    output: ExportOutput = Field(default_factory=ExportOutput)
    temperature: ExportTemperature = Field(default_factory=ExportTemperature)
    limits: ExportLimits = Field(default_factory=ExportLimits)
    about: ExportAbout = Field(default_factory=ExportAbout)
    opset: int | None = None
    quantised: Quantised | None = None
    agreement: Agreement | None = None
    sha256: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with current key names and without some nulls."""
        values = rename_key(values, "is_larger_than_chance", "is_significant")
        return {key: value for key, value in values.items() if value is not None or key not in ("temperature", "about")}
