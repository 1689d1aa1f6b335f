"""Typed records: what the JSON files of a run hold, with one reader and one writer for all of them.

A file of this version says `"schema": 2`. A file without a schema was written before dlfer 0.2 and is upgraded when it is
read; a file of a later schema is refused. Keys that a record does not know are left out.
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
    """Return a value as JSON can hold it: records and numpy's by their own methods, NaN and infinity as null."""
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
    """Named values of fixed types; NaN and infinity are not among them."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, populate_by_name=True, defer_build=True)

    @classmethod
    def build(cls, values: Mapping[str, Any] | Record) -> Self:
        """Return the record of nested values; numbers of NumPy become plain ones, NaN and infinity None."""
        return cls.model_validate(to_json(values))

    def as_json(self) -> dict[str, Any]:
        """Return the values that were given, nested, with the keys of the file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class FileRecord(Record):
    """What one JSON file holds."""

    FILE: ClassVar[str]
    ADVICE: ClassVar[str] = "Get the model again."
    """What helps where the file is damaged."""

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file that was written before dlfer 0.2 with the present names of its keys."""
        return values

    @classmethod
    def read(cls, folder: Path | str) -> Self | None:
        """Return the record in a folder; None where there is no such file.

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
        """Return the record in a folder.

        Raises:
            ModelError: there is no such file, it is damaged, or a later version of dlfer wrote it.
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
        """Return the record that a file's contents are.

        Args:
            values: what the JSON says.
            path: of the file, for messages.

        Raises:
            ModelError: they are no such record, or of a later version.
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
        """Return the text of the file."""
        return json.dumps({"schema": SCHEMA, **self.as_json()}, indent=2, allow_nan=False) + "\n"

    def write(self, folder: Path | str) -> Path:
        """Write the record into a folder, whole or not at all, and return the path of the file."""
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
    """Say where the first problem is, what was found there and what was expected."""
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
    """What a run computed on."""

    kind: str | None = None
    name: str | None = None
    backend: str | None = None
    jit: bool | None = None
    replicas: int | None = None
    workers: int | None = None


class Cost(Record):
    """What training took: seconds of wall time, images seen, and the side of the images in pixels."""

    finetune_seconds: float | None = None
    finetune_images: int | None = None
    finetune_image_size: int | None = None
    pretrain_seconds: float | None = None
    pretrain_images: int | None = None
    pretrain_image_size: int | None = None
    pretrain_was_cached: bool | None = None


class SearchOptionsRecord(Record):
    """How a search was started.

    Attributes:
        ablation: with EF-FER1 and without.
        trials: at most so many in each arm; None: as the experiment says.
        storage: whether several machines share it.
        engine: None: an earlier version of dlfer began it.
    """

    ablation: bool = False
    trials: int | None = None
    storage: bool = False
    engine: str | None = None


class AcceptedChanges(Record):
    """What had changed since a run began when it went on by --accept-changes.

    Attributes:
        time: UTC, ISO 8601.
        differences: one line each.
    """

    time: str
    differences: list[str]


class BranchWeights(Record):
    """Where a branch of a hybrid has its weights from, and what became of its variables; transfer.json names them.

    Attributes:
        source: in words.
        loaded, newly_initialised, missing, unexpected: numbers of variables.
        feature_difference: of the branch and its source on the same images, relative to the largest feature.
    """

    source: str | None = None
    loaded: int = 0
    newly_initialised: int = 0
    missing: int = 0
    unexpected: int = 0
    feature_difference: float | None = None


class WeightsOrigin(Record):
    """Where published weights or a teacher come from that a model was trained from, with terms that hold for the model as well.

    Attributes:
        name: as `pretrain.weights` names them.
        role: what they were for the model.
        source: who made them, on what data, and where they were taken from.
        terms: in sentences.
        sha256: name of each file of the weights -> checksum.
        research_only: whether the terms forbid other use.
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
        name: as the experiment names it.
        run: that trained it, where it says so.
        sha256: file of the model -> checksum.
        origins: where it comes from, itself the last, with the terms that hold for its student.
        leak: what it has seen of the images that judge its student, in a sentence, or None.
        note: what is not known of it, in a sentence, or None.
    """

    name: str
    run: str | None = None
    sha256: dict[str, str] = Field(default_factory=dict)
    origins: list[WeightsOrigin] = Field(default_factory=list)
    leak: str | None = None
    note: str | None = None

    def format_digests(self) -> str:
        """Return the file that answers, of several the ONNX file, with its sha256."""
        file = min(self.sha256, key=lambda name: not name.endswith(".onnx"), default=None)
        return "no file" if file is None else f"{file}, sha256 {self.sha256[file]}"


class RunRecord(FileRecord):
    """run.json: how a run was started, where it stands, and what it was made with.

    Attributes:
        status: running, stopped, failed or finished.
        kind: run, ablation, sweep, cross_validation or search.
        argv: the command.
        started, finished: UTC, ISO 8601.
        error: what went wrong.
        reason: what asked for the stop.
        seed: of the experiment.
        settings: the experiment in full as the run began with it, or went on with by --accept-changes.
        git: of dlfer's source; None outside a checkout.
        packages: name -> version.
        host, pid: of the process that works on it, or did last.
        smoke: made by --smoke.
        use_cache: whether EF-FER1 is taken from the cache.
        judge_test: whether the model is judged on the test split; not for the trials of a search.
        warnings: sentences that the report shows.
        cost: what training took.
        changes: what had changed when it went on by --accept-changes.
        data_like: of a member of a study, "<experiment>/<run>" of one before it with the same data.
        study: of a member, "<experiment>/<run>" of its ablation, sweep, search or ensemble.
        branches: of a hybrid, whose branches have weights of their own: by the branch.
        teachers: of a student.
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
        """The status, or "interrupted" where it says running and its process on this host is gone."""
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
        exact: an exact copy; None: not known.
        augmented: an augmented copy of the same image; None: not known.
        any: an exact, augmented, near or mirrored duplicate.
    """

    exact: int | None = None
    augmented: int | None = None
    any: int


class DuplicatesRecord(Record):
    """How many of the images that judge a model have a duplicate in the data that made it.

    Attributes:
        split: "test", or "validation" where there is no test split.
        n: number of images that judge.
        in_train: duplicates in the split that trained the model.
        in_selection: in the split that selected it; None: that is the judged split, or is not there.
        in_pretrain: in the images that trained EF-FER1 (of a test split, in those that selected it, too); None: not known.
        in_either: in any of them; None: not known.
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
        name: as the source calls it, e.g. "PublicTest".
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
    """Files or rows that a reader left out for one reason, and the first of their names."""

    reason: str
    n: int
    first: list[str] = Field(default_factory=list)


class ReadingRecord(Record):
    """How many files or rows a source saw, and what of them was left out, by reason.

    Attributes:
        what: "files", "rows" or "images".
        seen: their number, those left out included.
        used: how many became images of a split.
        left_out: the most frequent reason first.
    """

    what: str = "files"
    seen: int
    used: int
    left_out: list[LeftOut] = Field(default_factory=list)

    def describe(self) -> list[str]:
        """Return a sentence with the numbers, and one for each reason."""
        lost = self.seen - self.used
        lines = [f"{count_noun(self.seen, self.what.removesuffix('s'))} seen, {self.used:,} used, {lost:,} left out."]
        for reason in self.left_out:
            more = ", ..." if reason.n > len(reason.first) else ""
            lines.append(f"Left out, {reason.reason}: {reason.n:,} ({', '.join(reason.first)}{more}).")
        return lines


class DataRecord(FileRecord):
    """data.json: labels and splits of a run, with their counts and fingerprints, and what was left out of them."""

    FILE: ClassVar[str] = "data.json"

    source: str | None = None
    labels: list[str] = Field(default_factory=list)
    protocol: str | None = None
    selected_on: str | None = None
    splits: dict[str, SplitRecord] = Field(default_factory=dict)
    duplicates: DuplicatesRecord | None = None
    reading: ReadingRecord | None = None
    notes: list[str] = Field(default_factory=list)


MOST_LABELS, LARGEST_IMAGE = 10_000, 4096
Side = Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]
"""Of a square, in pixels."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Difference = Annotated[float, Field(ge=0)]
Label = Annotated[str, Field(min_length=1, max_length=200)]


def _check_faces(faces: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the section `finetune.data.faces` as it was given, where it is one."""
    try:
        if faces is not None:
            FacesConfig.model_validate(faces)
    except ValidationError as error:
        raise ValueError(f"the section faces of an experiment ({_describe(error)[:200]})") from error
    return faces


FacesSection = Annotated[dict[str, Any] | None, AfterValidator(_check_faces)]


def _check_model(model: dict[str, Any]) -> dict[str, Any]:
    """Return the section `model`, of which the names of backbones are told before a network is built."""
    backbone, branches = model.get("backbone"), model.get("branches") or []
    if not isinstance(backbone, str | None) or not isinstance(branches, list):
        raise ValueError("names of backbones in backbone and branches")
    if not all(isinstance(branch, str) for branch in branches):
        raise ValueError("names of backbones in branches")
    return model


class Temperature(Record):
    """The number that the logits are divided by so that probabilities are calibrated.

    Attributes:
        value: above 0; 1 changes nothing.
        fitted_on: the split.
        n: number of its images.
        note: what makes it uncertain, or None.
    """

    value: Annotated[float, Field(gt=0)]
    fitted_on: Text | None = None
    n: Count | None = None
    note: Text | None = None


class InputRecord(Record):
    """What a model takes: uint8 images of `channels` channels, seen as a square of `image_size` pixels."""

    dtype: Text | None = None
    range: list[int] | None = None
    channels: Literal[1, 3]
    image_size: Side
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    aspect: Literal[names.ASPECTS] = "crop"
    note: str | None = None


class SpeedRecord(Record):
    """How long a model took for a face, and where.

    Attributes:
        milliseconds: of wall time for a face; the least of several rounds.
        batch_size: faces at a time.
        engine: that computed it.
        machine: processor and number of cores, in words.
    """

    milliseconds: Annotated[float, Field(gt=0)]
    batch_size: Count
    engine: Text
    machine: Text


class ShippedRecord(Record):
    """What shipping changed in a model, and how fast it was then."""

    weights: Text | None = None
    largest_difference: Difference | None = None
    num_faces: Count | None = None
    speed: SpeedRecord | None = None


class About(Record):
    """What an artifact says of its training, and of its shipping.

    Attributes:
        selected_on: in words, the split that selected an epoch, or that none was selected.
        faces: how faces were found in the training images (the section `finetune.data.faces`), or None.
        face_size: side in pixels that faces are cut out with; None: not known.
        smoke: whether a smoke run trained it, so that its answers mean nothing.
        research_only: whether data or weights forbid other use.
        origins: of the published weights that it was trained from, itself or by way of other models, where they are known.
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
    """One level of features that the trees of a boosted model see."""

    name: Text
    features: Annotated[int, Field(ge=1, le=2**31)]


class QuantisedAccuracy(Record):
    """What a model of eight bits loses, on the same images; fractions, but for `lost`, in percentage points.

    Attributes:
        n: number of images.
        original, quantised: accuracies.
        lost, low, high: their difference with its paired 95 % interval.
    """

    n: Count
    original: Annotated[float, Field(ge=0, le=1)]
    quantised: Annotated[float, Field(ge=0, le=1)]
    lost: float
    low: float
    high: float


class OnnxRecord(Record):
    """The ONNX file of an artifact, by which it predicts without TensorFlow.

    Attributes:
        file: its name in the folder.
        opset: of ONNX.
        output: "probabilities"; or "features", which the trees of a boosted model take.
        weights: how they are kept: "float32", that large kernels are in float16, or that all computes with eight bits.
        images: by which it was compared with Keras, in words.
        n: number of these.
        largest_difference: of a probability to that of Keras.
        labels_agree: of eight bits, the share of these images with the same most probable label as Keras has, in 0..1.
        calibration: of eight bits, the images that gave the ranges of activations, in words.
        accuracy: of eight bits, what is lost, where the labels of the images are known.
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


class ArtifactRecord(FileRecord):
    """artifact.json: what a trained model is built from.

    Attributes:
        format: of the folder.
        model: the section `model` of the experiment.
        sha256: file -> checksum; every file is compared with it before it is parsed.
        boosting, levels: of the boosted family.
        ensemble: of the ensemble family: how members are combined, their names, and what was fitted.
        onnx: its ONNX file; None without one.
        onnx_absent: why there is none, where that is known.
    """

    FILE: ClassVar[str] = "artifact.json"

    format: int
    family: str
    labels: Annotated[list[Label], Field(min_length=1, max_length=MOST_LABELS)]
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
        """The backbone, or the branches of a hybrid with commas."""
        return ", ".join(self.model.get("branches") or []) or self.model.get("backbone")
