"""Typed records of the JSON files of runs and models, with one reader and one writer for all of them.

This version writes `"schema": 2`. A file without a schema was written before dlfer 0.2 and is upgraded when it is
read; a file of a later schema is refused. Unknown keys are ignored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dlfer.config import names
from dlfer.config.sections import FacesConfig
from dlfer.errors import ModelError, shorten
from dlfer.runs.files import read_json, write_atomically
from dlfer.runs.text import count_noun

SCHEMA = 2


def to_json(value: Any) -> Any:
    """Convert a value to JSON types: records and NumPy values by their own methods, NaN and infinity to None."""
    if hasattr(value, "as_json"):
        return to_json(value.as_json())
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    return str(value)


class Record(BaseModel):
    """A base class of typed records, which ignore unknown keys and reject NaN and infinity."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, populate_by_name=True, defer_build=True)

    @classmethod
    def build(cls, values: Mapping[str, Any] | Record) -> Self:
        """Return a record built from nested values; NumPy numbers become Python numbers, NaN and infinity None."""
        return cls.model_validate(to_json(values))

    def as_json(self) -> dict[str, Any]:
        """Return the values that were set explicitly, as nested dicts with the keys of the file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class FileRecord(Record):
    """A base class of records that are the contents of one JSON file, named `FILE`."""

    FILE: ClassVar[str]
    ADVICE: ClassVar[str] = "Get the model again."
    """Advice on a damaged file for the end of an error message."""

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with current key names."""
        return values

    @classmethod
    def read(cls, folder: Path | str) -> Self | None:
        """Return the record read from a folder; None if the file is absent.

        Raises:
            ModelError: the file is damaged, or a later version of dlfer wrote it.
        """
        path = Path(folder) / cls.FILE
        try:
            values = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path}: not JSON ({shorten(error, path)}). The run is damaged; run the experiment again."
            ) from error
        return cls.parse(values, path)

    @classmethod
    def require(cls, folder: Path | str) -> Self:
        """Return the record read from a folder, whose file must exist.

        Raises:
            ModelError: the file is absent or damaged, or a later version of dlfer wrote it.
        """
        record = cls.read(folder)
        if record is None:
            path = Path(folder) / cls.FILE
            raise ModelError(
                f"{path}: there is no such file. The run did not reach this step, or the folder is not a run."
            )
        return record

    @classmethod
    def parse(cls, values: Any, path: Path | str) -> Self:
        """Return the record for the parsed contents of a file.

        Args:
            values: the parsed JSON.
            path: path of the file, for messages.

        Raises:
            ModelError: the values do not match the record, or have the schema of a later version.
        """
        if not isinstance(values, dict):
            raise ModelError(f"{path}: the file: found {_shorten(values)}, expected an object. {cls.ADVICE}")
        schema = values.get("schema", 1)
        if isinstance(schema, bool) or not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise ModelError(
                f"{path}: found schema {_shorten(schema)}, expected {SCHEMA} or an earlier one. A later version of dlfer "
                "wrote the file; update dlfer to read it."
            )
        try:
            return cls.model_validate(cls.upgrade(values) if schema == 1 else values)
        except ValidationError as error:
            raise ModelError(f"{path}: {_describe(error)}. {cls.ADVICE}") from error

    def dump(self) -> str:
        """Return the JSON text of the file."""
        return json.dumps({"schema": SCHEMA, **self.as_json()}, indent=2, allow_nan=False) + "\n"

    def write(self, folder: Path | str) -> Path:
        """Write the record into a folder atomically and return the path of the file."""
        path = Path(folder) / self.FILE
        write_atomically(path, self.dump())
        return path


Text = Annotated[str, Field(max_length=1000)]

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "list_type": "a list",
    "missing": "a value",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number from {ge}",
    "less_than_equal": "a number up to {le}",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a text of at most {max_length} characters",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "value_error": "{error}",
}


def _describe(error: ValidationError) -> str:
    """Return the key of the first validation error, with what was found there and what was expected."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    found = "nothing" if first["type"] == "missing" else _shorten(first["input"])
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"].replace("'", "")
    else:
        expected = (
            _EXPECTED[first["type"]].format(**first.get("ctx", {})) if first["type"] in _EXPECTED else first["msg"]
        )
    return f"{where}: found {found}, expected {expected}"


def _shorten(value: Any) -> str:
    return repr(str(value)[:60])


class Checkout(Record):
    """The commit of dlfer's own source, and whether tracked files differ from it."""

    commit: str
    dirty: bool = False


class DeviceRecord(Record):
    """The device and the Keras backend that a run computed with."""

    kind: str | None = None
    name: str | None = None
    backend: str | None = None
    jit: bool | None = None
    replicas: int | None = None
    workers: int | None = None


class Cost(Record):
    """The cost of training: wall time in seconds, images processed, and the side of the images in pixels."""

    finetune_seconds: float | None = None
    finetune_images: int | None = None
    finetune_image_size: int | None = None
    pretrain_seconds: float | None = None
    pretrain_images: int | None = None
    pretrain_image_size: int | None = None
    pretrain_was_cached: bool | None = None


class SearchOptionsRecord(Record):
    """The options that a search was started with.

    Attributes:
        ablation: whether it has an arm with EF-FER1 and one without.
        trials: maximum number of trials in each arm; None for the experiment's own number.
        storage: whether several machines share the search.
        engine: name of the search engine; None if an earlier version of dlfer started the search.
    """

    ablation: bool = False
    trials: int | None = None
    storage: bool = False
    engine: str | None = None


class AcceptedChanges(Record):
    """The changes since a run's start that --accept-changes accepted when the run was resumed.

    Attributes:
        time: UTC, ISO 8601.
        differences: one line for each change.
    """

    time: str
    differences: list[str]


class BranchWeights(Record):
    """The source of the weights of a hybrid's branch, and counts of its variables; transfer.json lists their names.

    Attributes:
        source: description of the source.
        loaded, newly_initialised, missing, unexpected: numbers of variables.
        feature_difference: largest difference from the source on the same images, relative to the largest feature.
    """

    source: str | None = None
    loaded: int = 0
    newly_initialised: int = 0
    missing: int = 0
    unexpected: int = 0
    feature_difference: float | None = None


class WeightsOrigin(Record):
    """The origin of published weights or of a teacher, with licence terms that also apply to the model trained from it.

    Attributes:
        name: name of the weights, as in `pretrain.weights`, or of the teacher.
        role: how the training used them.
        source: who made them, on what data, and where they were obtained.
        terms: the licence terms, in sentences.
        sha256: file of the weights -> checksum.
        research_only: whether the terms allow research use only.
    """

    name: Text
    role: Literal["published weights", "teacher"] = "published weights"
    source: Text
    terms: Text
    sha256: dict[str, str] = Field(default_factory=dict)
    research_only: bool = True


class TeacherRecord(Record):
    """A trained model that a run was distilled from.

    Attributes:
        name: the teacher's name in the experiment.
        run: the run that trained it, if its artifact names one.
        sha256: file of the model -> checksum.
        origins: its origins, ending with the teacher itself, with the licence terms that apply to its student.
        leak: a sentence on which of its student's evaluation images it has seen, or None.
        note: a sentence on what is unknown about it, or None.
    """

    name: str
    run: str | None = None
    sha256: dict[str, str] = Field(default_factory=dict)
    origins: list[WeightsOrigin] = Field(default_factory=list)
    leak: str | None = None
    note: str | None = None

    def format_digests(self) -> str:
        """Return the name and the sha256 of the model's file that predicts: the ONNX file, if there is one."""
        file = min(self.sha256, key=lambda name: not name.endswith(".onnx"), default=None)
        return "no file" if file is None else f"{file}, sha256 {self.sha256[file]}"


class RunRecord(FileRecord):
    """The contents of run.json: how a run was started, its status, and the software and machine it ran with.

    Attributes:
        status: running, stopped, failed or finished.
        kind: run, ablation, sweep, cross_validation or search.
        argv: the command line.
        started, finished: UTC, ISO 8601.
        error: the error of a failed run.
        reason: why the run was stopped.
        seed: `experiment.seed`.
        settings: the full experiment that the run started with, or was resumed with by --accept-changes.
        git: commit of dlfer's source; None outside a git checkout.
        packages: name -> version.
        host, pid: of the process that works on the run, or was the last to do so.
        smoke: whether it is a smoke run (--smoke).
        use_cache: whether a cached EF-FER1 may be used.
        judge_test: whether the model is evaluated on the test split; False for the trials of a search.
        warnings: sentences that the report shows.
        cost: the cost of training.
        changes: changes accepted with --accept-changes.
        data_like: for a member of a study, "<experiment>/<run>" of an earlier member with the same data.
        study: for a member, "<experiment>/<run>" of its ablation, sweep, search or ensemble.
        branches: branch -> its weights, for a hybrid whose branches have their own weights.
        teachers: the teachers of a student.
    """

    FILE: ClassVar[str] = "run.json"
    ADVICE: ClassVar[str] = "Run the experiment again."

    status: str = "running"
    kind: str = "run"
    experiment: str | None = None
    argv: list[str] = Field(default_factory=list)
    started: str | None = None
    finished: str | None = None
    error: str | None = None
    reason: str | None = None
    device: DeviceRecord | None = None
    seed: int | None = None
    config_digest: str | None = None
    settings: dict[str, Any] | None = None
    git: Checkout | None = None
    dlfer: str | None = None
    python: str | None = None
    platform: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    host: str | None = None
    pid: int | None = None
    smoke: bool = False
    use_cache: bool = True
    judge_test: bool = True
    warnings: list[str] = Field(default_factory=list)
    cost: Cost | None = None
    branches: dict[str, BranchWeights] = Field(default_factory=dict)
    search: SearchOptionsRecord | None = None
    changes: list[AcceptedChanges] = Field(default_factory=list)
    data_like: str | None = None
    study: str | None = None
    teachers: list[TeacherRecord] = Field(default_factory=list)

    @property
    def present_status(self) -> str:
        """The recorded status, or "interrupted" if it is "running" but its process on this host no longer exists."""
        import socket

        if self.status != "running" or self.host != socket.gethostname() or self.pid is None:
            return self.status
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "interrupted"
        except (PermissionError, OverflowError):
            pass
        return self.status


class DuplicateCounts(Record):
    """Numbers of images that have a duplicate in another split.

    Attributes:
        exact: images with an exact copy; None if unknown.
        augmented: images with an augmented copy; None if unknown.
        any: images with an exact, augmented, near or mirrored duplicate.
    """

    exact: int | None = None
    augmented: int | None = None
    any: int


class DuplicatesRecord(Record):
    """Counts of the evaluation images that have a duplicate in the data that trained or selected the model.

    Attributes:
        split: the evaluation split: "test", or "validation" if there is no test split.
        n: number of its images.
        in_train: images with a duplicate in the split that trained the model.
        in_selection: in the split that selected it; None if that is the evaluation split, or does not exist.
        in_pretrain: in the images that trained EF-FER1 (for a test split, also that selected it); None if unknown.
        in_either: in any of these; None if unknown.
    """

    split: str
    n: int | None = None
    in_train: DuplicateCounts | None = None
    in_selection: DuplicateCounts | None = None
    in_pretrain: DuplicateCounts | None = None
    in_either: DuplicateCounts | None = None


class SplitRecord(Record):
    """One split of a run's data.

    Attributes:
        name: the source's name for it, e.g. "PublicTest".
        n: number of images.
        shape: (height, width, channels); None for streamed images.
        per_class: label -> number of images.
        fingerprint: sha256 over ids, targets and pixels.
    """

    name: str | None = None
    n: int | None = None
    shape: list[int] | None = None
    per_class: dict[str, int] | None = None
    fingerprint: str | None = None


class LeftOut(Record):
    """The number of files or rows that a reader left out for one reason, with the first few names."""

    reason: str
    n: int
    first: list[str] = Field(default_factory=list)


class ReadingRecord(Record):
    """Counts of the files or rows that a source read and left out, by reason.

    Attributes:
        what: "files", "rows" or "images".
        seen: number that were read, including those left out.
        used: number that became images of a split.
        left_out: by reason, the most frequent first.
    """

    what: str = "files"
    seen: int
    used: int
    left_out: list[LeftOut] = Field(default_factory=list)

    def describe(self) -> list[str]:
        """Return a sentence with the counts, and one for each reason."""
        lost = self.seen - self.used
        lines = [f"{count_noun(self.seen, self.what.removesuffix('s'))} seen, {self.used:,} used, {lost:,} left out."]
        for reason in self.left_out:
            more = ", ..." if reason.n > len(reason.first) else ""
            lines.append(f"Left out, {reason.reason}: {reason.n:,} ({', '.join(reason.first)}{more}).")
        return lines


class DataRecord(FileRecord):
    """The contents of data.json: a run's labels and splits, with counts and fingerprints, and what was left out."""

    FILE: ClassVar[str] = "data.json"

    source: str | None = None
    labels: list[str] = Field(default_factory=list)
    protocol: str | None = None
    selected_on: str | None = None
    splits: dict[str, SplitRecord] = Field(default_factory=dict)
    duplicates: DuplicatesRecord | None = None
    reading: ReadingRecord | None = None
    notes: list[str] = Field(default_factory=list)


MAX_LABELS, LARGEST_IMAGE = 10_000, 4096
Side = Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]
"""Side of a square image, in pixels."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Difference = Annotated[float, Field(ge=0)]
Label = Annotated[str, Field(min_length=1, max_length=200)]


def _check_faces(faces: dict[str, Any] | None) -> dict[str, Any] | None:
    """Validate a section `finetune.data.faces`, or None, and return it unchanged."""
    try:
        if faces is not None:
            FacesConfig.model_validate(faces)
    except ValidationError as error:
        raise ValueError(f"the section faces of an experiment ({_describe(error)[:200]})") from error
    return faces


FacesSection = Annotated[dict[str, Any] | None, AfterValidator(_check_faces)]


def _check_model(model: dict[str, Any]) -> dict[str, Any]:
    """Validate the backbone names in a section `model`, which are shown before a network is built, and return it."""
    backbone, branches = model.get("backbone"), model.get("branches") or []
    if not isinstance(backbone, str | None) or not isinstance(branches, list):
        raise ValueError("names of backbones in backbone and branches")
    if not all(isinstance(branch, str) for branch in branches):
        raise ValueError("names of backbones in branches")
    return model


class Temperature(Record):
    """The number that divides the logits to calibrate the probabilities.

    Attributes:
        value: above 0; 1 changes nothing.
        fitted_on: the split on which it was fitted.
        n: number of images of that split.
        note: why the value is uncertain, or None.
    """

    value: Annotated[float, Field(gt=0)]
    fitted_on: Text | None = None
    n: Count | None = None
    note: Text | None = None


class InputRecord(Record):
    """The input of a model: uint8 images of `channels` channels, resized to a square of `image_size` pixels."""

    dtype: Text | None = None
    range: list[int] | None = None
    channels: Literal[1, 3]
    image_size: Side
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    aspect: Literal[names.ASPECTS] = "crop"
    note: str | None = None


class SpeedRecord(Record):
    """The measured prediction time of a model, and the machine.

    Attributes:
        milliseconds: wall time per face; the minimum of several rounds.
        batch_size: number of faces in a batch.
        engine: "ONNX Runtime" or "Keras".
        machine: description of the processor, its cores and its load.
    """

    milliseconds: Annotated[float, Field(gt=0)]
    batch_size: Count
    engine: Text
    machine: Text


class ShippedRecord(Record):
    """The changes that shipping made to a model, and its speed when it was shipped."""

    weights: Text | None = None
    largest_difference: Difference | None = None
    num_faces: Count | None = None
    speed: SpeedRecord | None = None


class About(Record):
    """The section `about` of artifact.json: how a model was trained and shipped.

    Attributes:
        selected_on: description of the split that selected the epoch, or a text that none was selected.
        faces: the section `finetune.data.faces` that prepared the training images, or None.
        face_size: side in pixels of the face crops; None if unknown.
        smoke: whether a smoke run trained it, so that its predictions are meaningless.
        research_only: whether the terms of its data or weights allow research use only.
        origins: origins of the published weights it was trained from, directly or through other models, where known.
    """

    experiment: Text | None = None
    run: Text | None = None
    protocol: Text | None = None
    selected_on: Text | None = None
    faces: FacesSection = None
    face_size: Side | None = None
    name: Text | None = None
    default: bool = False
    smoke: bool = False
    research_only: bool | None = None
    origins: list[WeightsOrigin] = Field(default_factory=list)
    shipped: ShippedRecord | None = None


class FeatureLevel(Record):
    """One feature level of the backbone whose features are inputs of a boosted model's trees."""

    name: Text
    features: Annotated[int, Field(ge=1, le=2**31)]


class QuantisedAccuracy(Record):
    """The accuracy that an int8 model loses, on the same images.

    Attributes:
        n: number of images.
        original, quantised: accuracies, in 0..1.
        lost, low, high: original - quantised with its paired 95 % interval, in percentage points.
    """

    n: Count
    original: Annotated[float, Field(ge=0, le=1)]
    quantised: Annotated[float, Field(ge=0, le=1)]
    lost: float
    low: float
    high: float


class OnnxRecord(Record):
    """The ONNX file of an artifact, for prediction without TensorFlow.

    Attributes:
        file: its name in the folder.
        opset: ONNX opset.
        output: "probabilities"; or "features", the input of a boosted model's trees.
        weights: "float32", or a description of weights with large kernels in float16 or of int8 weights.
        images: description of the images on which it was compared with Keras.
        n: number of these images.
        largest_difference: largest difference of a probability from Keras.
        labels_agree: for int8, the share of these images with the same most probable label as with Keras, in 0..1.
        calibration: for int8, description of the images that calibrated the activations.
        accuracy: for int8, the loss of accuracy, if the images have labels.
        temperature: for int8, the temperature fitted on this file's predictions; None: it is the artifact's.
    """

    file: Text
    opset: Annotated[int, Field(ge=1, le=1000)]
    output: Literal["probabilities", "features"] = "probabilities"
    weights: Text = "float32"
    images: Text
    n: Count
    largest_difference: Difference
    labels_agree: Annotated[float, Field(ge=0, le=1)] | None = None
    calibration: Text | None = None
    accuracy: QuantisedAccuracy | None = None
    temperature: Temperature | None = None


INT8_FILES = (
    "Of an int8 model the ONNX file answers (dlfer.load, predict, serve, evaluate); the Keras weights beside it, in float16, "
    "are for the Grad-CAM of explain, export, --engine keras, ensembles and trainings that start from the model."
)
"""A sentence on which of the two files of weights of an int8 model is for what."""


class ArtifactRecord(FileRecord):
    """The contents of artifact.json, from which a trained model is built.

    Attributes:
        format: version of the folder's layout.
        model: the section `model` of the experiment.
        sha256: file -> checksum, which is verified before the file is parsed.
        boosting, levels: for the boosted family.
        ensemble: for the ensemble family: how members are combined, their names, and the fitted parameters.
        onnx: its ONNX file, or None.
        onnx_absent: why there is no ONNX file, if known.
    """

    FILE: ClassVar[str] = "artifact.json"

    format: int
    family: str
    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS)]
    model: Annotated[dict[str, Any], AfterValidator(_check_model)]
    input: InputRecord
    sha256: dict[str, str]
    temperature: Temperature | None = None
    about: About = Field(default_factory=About)
    boosting: dict[str, Any] | None = None
    levels: list[FeatureLevel] | None = None
    ensemble: dict[str, Any] | None = None
    onnx: OnnxRecord | None = None
    onnx_absent: str | None = None

    @property
    def backbone(self) -> str | None:
        """The name of the backbone, or of a hybrid's branches, separated by commas."""
        return ", ".join(self.model.get("branches") or []) or self.model.get("backbone")
