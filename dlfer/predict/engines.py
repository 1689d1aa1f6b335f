"""The engines that run a model (Keras, ONNX Runtime, OpenVINO, LiteRT), and the choice of the fastest one."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dlfer.config.names import FER2013_LABELS, expand_home
from dlfer.data.images import make_square, resize_all
from dlfer.data.pictures import PictureModel
from dlfer.data.synthetic.faces import FACE_SIZE, draw_face
from dlfer.errors import EnvironmentProblem, ModelError, UserError, shorten
from dlfer.predict.runtimes import EXPORT_FILE, OTHER_RUNTIMES, open_artifact, open_export, read_export
from dlfer.runs.artifact import ExportRecord, read_artifact_record
from dlfer.runs.find import find_model, is_hub_name, read_about
from dlfer.runs.machine import describe_machine
from dlfer.runs.records import About, SpeedRecord, Temperature

if TYPE_CHECKING:
    import keras

    from dlfer.model.classifier import Classifier

ENGINES = ("keras", "onnx", "openvino", "litert")
AUTO = "auto"
"""Value of `--engine` that selects the fastest engine, see `choose_engine`."""


class Engine(Protocol):
    """The interface that `FacePredictor` requires of a classifier; `dlfer.model.classifier.Classifier` implements it.

    Attributes:
        labels: class names in the order of the outputs.
        channels: number of channels of the images, 1 or 3.
        image_size: side in pixels of the network's square input.
        crop: side of the central part of an image that the network sees, in 0..1; None: the whole image, or not known.
        takes_any_size: whether the network takes images of any size; otherwise they are resized to its own size first.
        aspect: how non-square images are made square, see `dlfer.data.images.make_square`.
        temperature_fit: the temperature and what it was fitted on, or None.
        about: the artifact's record of its training.
    """

    labels: tuple[str, ...]
    channels: int
    image_size: int
    crop: float | None
    takes_any_size: bool
    aspect: str
    temperature_fit: Temperature | None
    about: About

    def predict(self, images: np.ndarray, *, batch_size: int = 64, calibrated: bool = False) -> np.ndarray:
        """Return class probabilities float32 [N, C] of images uint8 [N, H, W, channels]."""
        ...


def load_model(name: str | Path) -> Engine:
    """Load a trained model for prediction, with ONNX Runtime if its artifact has an ONNX file, else with Keras.

    Args:
        name: a shipped model's name, a run, an artifact's folder, or hf://ORG/NAME[@REVISION] on the Hugging Face hub.

    Raises:
        ModelError: there is no model of that name, or its artifact is damaged.
        UserError: `name` is an exported model, which needs an engine.

    Example:
        >>> classifier = dlfer.load("lite2_96")
        >>> classifier.predict(images).shape  # uint8 [2, 48, 48]
        (2, 7)
    """
    return load_engine(name)


def load_engine(name: str | Path, engine: str | None = None) -> Engine:
    """Load a classifier that is run by the given engine.

    Args:
        name: a model's name, a run or an artifact's folder; for engines other than keras, also a folder written by
            `dlfer export`.
        engine: one of ENGINES; openvino reads ONNX files, too. None: onnx if the artifact has an ONNX file, else keras.

    Raises:
        UserError: an unknown engine, or an exported model without an engine.
        ModelError: there is no such model, or it is damaged.
        EnvironmentProblem: the engine's package is not installed.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join((*ENGINES, AUTO))}.")
    runtime = "openvino" if engine == "openvino" else None
    if engine != "litert" and (engine is None or not _is_export(name)):
        folder = _find_artifact(name, engine)
        if engine != "keras" and folder is not None and read_artifact_record(folder).onnx is not None:
            return ArtifactModel(folder, runtime=runtime)
    if engine in (None, "keras"):
        from dlfer.model.families import load_artifact

        return load_artifact(name)
    return ExportedModel(find_export(name, engine), runtime=runtime)


def _is_export(name: str | Path) -> bool:
    folder = expand_home(name)
    return any((place / EXPORT_FILE).is_file() for place in (folder, folder / "onnx"))


def _find_artifact(name: str | Path, engine: str | None) -> Path | None:
    """Return the folder of an artifact; None if there is none and `engine` is given, since `name` may be an export."""
    try:
        return find_model(name)
    except ModelError:
        if engine is None and isinstance(name, str | Path) and _is_export(name):
            raise UserError(
                f"{name}: is an export; say what runs it with --engine: onnx, openvino or litert."
            ) from None
        if engine is None or is_hub_name(name):
            raise
        return None


class RuntimeModel(PictureModel, Engine):
    """A model run by a runtime other than Keras, without TensorFlow; it has the attributes of `Engine` and `folder`."""

    folder: Path
    _size: tuple[int, int] | None = None
    """Fixed input size (H, W); None: any size."""
    _answer: Callable[[np.ndarray], np.ndarray]

    @property
    def takes_any_size(self) -> bool:
        return self._size is None

    def _check_answer(self) -> None:
        """Predict a uniform grey image, so that a broken model raises ModelError at once and not during a long job."""
        side = int(self.about.face_size or self.image_size)
        self.predict(np.full((1, side, side, self.channels), 128, np.uint8))

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return uncalibrated probabilities float32 [N, C] of images uint8 [N, H, W, channels], N at least 1."""
        # Old exports of free size (no aspect in export.json) would stretch non-square images: make them square here.
        fit = make_square if self._size is None else partial(resize_all, size=self._size)
        images = fit(images, aspect=self.aspect)
        answers = [
            np.asarray(self._answer(np.ascontiguousarray(images[start : start + batch_size])), np.float32)
            for start in range(0, len(images), batch_size)
        ]
        raw = np.concatenate(answers)
        if raw.shape != (len(images), len(self.labels)):
            raise ModelError(
                f"its outputs have the shape {raw.shape}, expected {(len(images), len(self.labels))} for its "
                f"{len(self.labels)} labels; its record describes another model."
            )
        with np.errstate(invalid="ignore"):
            return raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-12)


class ExportedModel(RuntimeModel):
    """An exported model, run by the runtime of its format or by another one that supports the format.

    Args:
        folder: written by `dlfer export`, with one format.
        runtime: one of OTHER_RUNTIMES for the format; None: the format's own.

    Raises:
        ModelError: it is not an export, its files were changed, or its outputs are not finite.
        EnvironmentProblem: the runtime is not installed.
    """

    def __init__(self, folder: Path, *, runtime: str | None = None) -> None:
        record = read_export(folder)
        given, temperature = record.input, record.temperature
        self.labels = tuple(record.labels)
        self.channels = given.shape[-1]
        self.image_size = given.network_size
        self.aspect = given.aspect
        self.temperature_fit = Temperature(value=temperature.value) if temperature.value else None
        height, width = given.shape[1:3]
        self._size = (height, width) if height and width else None
        trained = record.about.trained or About()
        # A fixed input size is that of the training images, so faces are cropped at this size.
        size = min(self._size) if self._size else trained.face_size
        self.about = trained.model_copy(update={"faces": given.faces, "face_size": size})
        self.folder = Path(folder)
        self._answer = open_export(folder, runtime=runtime)
        self._check_answer()


class ArtifactModel(RuntimeModel):
    """A trained model, run by ONNX Runtime (or OpenVINO) from the ONNX file in its artifact.

    Args:
        folder: of the artifact.
        runtime: "openvino", or None for ONNX Runtime.

    Raises:
        ModelError: the artifact is damaged or has no ONNX file, or the outputs are not finite.
        EnvironmentProblem: the runtime is not installed.
    """

    def __init__(self, folder: Path, *, runtime: str | None = None) -> None:
        record = read_artifact_record(folder)
        if record.onnx is None:
            raise ModelError(f"{folder}: has no ONNX file ({record.onnx_absent or 'trained by an earlier version'}).")
        self.folder = Path(folder)
        self.family = record.family
        self.labels = tuple(record.labels)
        self.channels = record.input.channels
        self.image_size = record.input.image_size
        self.crop = record.input.crop
        self.aspect = record.input.aspect
        self.temperature_fit = record.onnx.temperature or record.temperature
        # Only an int8 file has a share of labels that agree: it predicts otherwise than Keras.
        self.is_int8 = record.onnx.labels_agree is not None
        self.about = read_about(folder, record)
        self._answer = open_artifact(folder, record, runtime=runtime)
        self._check_answer()

    @cached_property
    def keras_classifier(self) -> Classifier:
        """The same model run by Keras; the first access loads it, together with the framework."""
        from dlfer.model.families import load_artifact

        return load_artifact(self.folder)

    @property
    def network(self) -> keras.Model | None:
        """The Keras model, loaded on first access; None if the classifier is not a single network."""
        return self.keras_classifier.network


def find_export(name: str | Path, engine: str) -> Path:
    """Return the folder of an export for an engine: `name` itself, or its subfolder for a suitable format.

    Raises:
        ModelError: there is no export, or it has another format.
    """
    onnx = ("onnx", "onnx-int8")
    formats = {"onnx": onnx, "openvino": onnx, "litert": ("litert", "litert-int8")}[engine]
    places = [expand_home(name), *(expand_home(name) / form for form in formats)]
    for place in places:
        if (place / EXPORT_FILE).is_file():
            found = read_export(place).format
            if found not in formats:
                raise ModelError(f"{place}: its format is {found}, expected {' or '.join(formats)} for {engine}.")
            return place
    raise ModelError(
        f"{name}: found no export for --engine {engine} (looked for {EXPORT_FILE} in "
        f"{', '.join(str(place) for place in places)}). Make one: dlfer export MODEL --to {formats[0]}."
    )


NUM_FACES = 16
"""Number of drawn faces on which engines are compared, and largest batch size with which they are timed."""
LARGEST_DIFFERENCE = 1e-4
ROUNDS = 3
FORMATS = ("litert", "onnx", "litert-int8", "onnx-int8")


@dataclass(frozen=True)
class Trial:
    """The result of comparing an engine with the reference, and of timing it.

    Attributes:
        name: "onnx" for the artifact's ONNX file, "keras", the format of an export, or another runtime for one of them.
        engine: the loaded engine, or None if it was refused.
        difference: largest absolute difference of a probability from the reference; 0 for the reference itself.
        milliseconds: time per face; infinite if it was not measured.
        refused: why the engine was refused, or None.
    """

    name: str
    engine: Engine | None = None
    difference: float = 0.0
    milliseconds: float = float("inf")
    refused: str | None = None


def choose_engine(
    name: str, *, num_faces: int = 64, any_size: bool = False, say: Callable[[str], None] = lambda text: None
) -> Engine:
    """Return the fastest engine that gives the same predictions as the model itself, and report the choice.

    The reference is the artifact's ONNX file run by ONNX Runtime, or Keras if there is no such file. The candidates are
    OpenVINO, if installed, and exports of this very model, recognised by the checksums in their export.json. One is
    accepted if faces of photographs are cropped at the reference's size for it, no calibrated probability on drawn faces
    of this size and of the training images' differs by more than 1e-4, and all predicted labels agree.

    Args:
        name: a model's name, a run or an artifact's folder.
        num_faces: number of faces that will be predicted per batch.
        any_size: whether images of several sizes will come; exports of one size are excluded, as results would differ.
        say: receives one line that reports the choice.

    Raises:
        ModelError: there is no such model, or it is damaged.
    """
    folder = find_model(name)
    model = load_engine(str(folder))
    own = "keras" if read_artifact_record(folder).onnx is None else "onnx"
    openers = {
        runtime or form: partial(ExportedModel, place, runtime=runtime)
        for form, place in find_exports(folder).items()
        for runtime in (None, *OTHER_RUNTIMES.get(form, {}))
    }
    if own == "onnx":
        openers = {
            **openers,
            **{runtime: partial(ArtifactModel, folder, runtime=runtime) for runtime in OTHER_RUNTIMES["onnx"]},
        }
        openers.pop("onnx", None)  # the same network as the reference
    elif not openers:
        places = " or ".join(str(place) for place in list_places(folder))
        say(
            f"engine keras: found no export of this model in {places}. dlfer export {shlex.quote(str(name))} --to onnx,litert makes some, "
            "which may be faster."
        )
        return model
    faces = draw_faces(model)
    trials = [
        Trial(own, model),
        *(_compare(other, opener, model, any_size=any_size) for other, opener in openers.items()),
    ]
    batch = min(num_faces, NUM_FACES)
    trials = time_trials(trials, faces[:batch])
    best = min(trials, key=lambda trial: trial.milliseconds)
    say(describe_choice(best, trials, batch))
    return best.engine


def list_places(folder: Path) -> list[Path]:
    """Return the folders that are searched, one and two levels deep, for exports of an artifact."""
    return [Path("exports"), folder / "exports"]


def find_exports(folder: Path) -> dict[str, Path]:
    """Return format -> folder of the newest export that was made of the artifact in `folder`."""
    checksums = read_artifact_record(folder).sha256
    files = [
        file for place in list_places(folder) for depth in ("*", "*/*") for file in place.glob(f"{depth}/{EXPORT_FILE}")
    ]
    found: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        try:
            record = ExportRecord.require(file.parent)
        except ModelError:
            continue  # an invalid record does not say which model was exported
        if record.about.artifact_sha256 == checksums and record.format in FORMATS:
            found[record.format] = file.parent
    return {form: found[form] for form in FORMATS if form in found}


def get_crop_size(classifier: Engine) -> int:
    """Return the side in pixels of the face crops of photographs.

    It is that of the training images. If those were ready-made crops (`data.faces` not set) that the network enlarges,
    it is the side to which the network enlarges them, so that each face is interpolated only once.
    """
    about = classifier.about
    size = int(about.face_size or classifier.image_size)
    if about.faces or not classifier.takes_any_size:
        return size
    return max(size, math.ceil(classifier.image_size / (classifier.crop or 1)))


def draw_faces(engine: Engine, side: int | None = None) -> np.ndarray:
    """Return drawn faces of all expressions in a model's input format, uint8 [NUM_FACES, S, S, channels].

    `side` is S; None: that of the training images.
    """
    rng = np.random.default_rng(0)
    drawn = [draw_face(FER2013_LABELS[row % len(FER2013_LABELS)], rng=rng) for row in range(NUM_FACES)]
    side = side or int(engine.about.face_size or engine.image_size)
    faces = resize_all(np.stack(drawn).reshape(NUM_FACES, FACE_SIZE, FACE_SIZE, 1), (side, side))
    return np.repeat(faces, engine.channels, axis=-1)


def _compare(name: str, opener: Callable[[], RuntimeModel], model: Engine, *, any_size: bool) -> Trial:
    """Load a candidate engine and return its trial: refused unless it reproduces the probabilities of `model`."""
    try:
        engine = opener()
    except EnvironmentProblem:
        return Trial(name, refused="not installed")
    except ModelError:
        return Trial(name, refused="damaged")
    if any_size and not engine.takes_any_size:
        return Trial(name, refused="takes images of one size only")
    crop, own_crop = get_crop_size(engine), get_crop_size(model)
    if crop != own_crop:
        return Trial(name, refused=f"takes faces of {crop} instead of {own_crop} px")
    sets = [draw_faces(model), draw_faces(model, own_crop)]  # ready-made crops, and faces of photographs
    expected = np.concatenate([model.predict(faces, batch_size=NUM_FACES, calibrated=True) for faces in sets])
    try:
        found = np.concatenate([engine.predict(faces, batch_size=NUM_FACES, calibrated=True) for faces in sets])
    except Exception as error:  # runtimes raise errors of many kinds, and the other engines remain
        return Trial(name, refused=f"cannot compute ({shorten(error)})")
    difference = float(np.abs(found - expected).max())
    if not difference <= LARGEST_DIFFERENCE or (found.argmax(axis=1) != expected.argmax(axis=1)).any():
        return Trial(name, refused=f"differs by {difference:.1g}")
    return Trial(name, engine, difference)


def time_trials(trials: Sequence[Trial], faces: np.ndarray) -> list[Trial]:
    """Return the trials with their times per face: the minimum over `ROUNDS` rounds in which the engines take turns."""
    taken = [trial for trial in trials if trial.engine is not None]
    seconds: dict[str, list[float]] = {trial.name: [] for trial in taken}
    for _ in range(ROUNDS + 1):
        for trial in taken:
            start = time.perf_counter()
            trial.engine.predict(faces, batch_size=len(faces), calibrated=True)
            seconds[trial.name].append(time.perf_counter() - start)
    # The first round is a warm-up. Other programs can only slow an engine down, hence the minimum instead of the mean.
    return [
        Trial(trial.name, trial.engine, trial.difference, 1000 * min(seconds[trial.name][1:]) / len(faces))
        if trial.name in seconds
        else trial
        for trial in trials
    ]


def measure_speed(name: str | Path, *, num_faces: int = NUM_FACES) -> SpeedRecord:
    """Measure the time per face of a model on this machine, with the engine that `load_model` chooses.

    Args:
        name: a model's name, a run or an artifact's folder.
        num_faces: batch size, at most `NUM_FACES`; the faces are drawn.

    Raises:
        ModelError: there is no such model, or it is damaged.
    """
    engine = load_engine(name)
    kind = "ONNX Runtime" if isinstance(engine, RuntimeModel) else "Keras"
    faces = draw_faces(engine)[:num_faces]
    [trial] = time_trials([Trial(kind, engine)], faces)
    return SpeedRecord(
        milliseconds=round(trial.milliseconds, 4), batch_size=len(faces), engine=kind, machine=describe_machine()
    )


def describe_choice(best: Trial, trials: Sequence[Trial], batch: int) -> str:
    """Return one line with the chosen engine, its time, and the times or refusals of the others."""
    others = [
        f"{trial.name} {trial.refused or f'{trial.milliseconds:.3g}'}" for trial in trials if trial.name != best.name
    ]
    text = f"engine {best.name}: {best.milliseconds:.3g} ms per face in batches of {batch} ({', '.join(others)})"
    own = trials[0].name
    if best.name == own:
        return f"{text}."
    return f"{text}; largest difference of a probability to {own} {best.difference:.1g} on {NUM_FACES} drawn faces."
