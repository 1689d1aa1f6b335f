"""External models in a single file, whose input is described by a few words and whose outputs are described by labels.

    "48x48 gray /255"                    height x width, colours, how pixels of 0..255 are scaled
    "224x224 rgb /255 mean=0.485,0.456,0.406 std=0.229,0.224,0.225 nchw"

The words may have any order. The file is checked against them when it is opened; nothing is inferred from its outputs.
TensorFlow is loaded only for Keras files.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.data.images import match_channels, resize_all
from dlfer.errors import ModelError, UserError, shorten
from dlfer.metrics.confidence import check_finite
from dlfer.predict.runtimes import check_onnx, import_extra
from dlfer.quiet import keep_back_stderr
from dlfer.runs.text import describe_damage

SUFFIXES = (".onnx", ".tflite", ".h5", ".hdf5", ".keras")
OUTPUTS = ("softmax", "logits", "sigmoid")
"""Kinds of outputs: probabilities that sum to one, logits, or an independent probability for each class."""
BATCH = 64
LARGEST_SIDE = 4096
TOLERANCE = 1e-2
ROUNDING = 1 / 512
"""Maximum error of a softmax output in float16 or 8 bits, whose steps are 1/256: rows sum to one only approximately,
and are divided by their sum."""
_SUM_TOLERANCE = 1e-3
NUM_TIMED = 30
_FORM = (
    'expected e.g. "48x48 gray /255": height x width; gray, rgb or bgr; a scaling of the pixels 0..255 (/255, -1..1, 0..1, or '
    "0..255 for none), with mean=A,B,C and std=A,B,C of the scaled pixels where they are used; and nhwc or nchw if "
    "the file does not say"
)
_COLOURS = {"gray": 1, "grey": 1, "rgb": 3, "bgr": 3}
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class InputDescription:
    """The input that a model expects: ((x * scale) - mean) / std for pixels x in 0..255.

    Attributes:
        text: the description as it was given.
        height, width: in pixels.
        colours: "gray", "rgb" or "bgr".
        scale: factor of the pixels.
        mean, std: one number, or one for each channel in the order of `colours`.
        layout: "nhwc", "nchw", or None: determined from the file.
    """

    text: str
    height: int
    width: int
    colours: str
    scale: float
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str | None = None

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return _COLOURS[self.colours]

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Resize and scale images uint8 [N, H, W, 1 or 3] to the input float32 [N, height, width, channels]."""
        images = resize_all(match_channels(images, self.channels), (self.height, self.width))
        images = images[..., ::-1] if self.colours == "bgr" else images
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return (images.astype(np.float32) * np.float32(self.scale) - mean) / std


def parse_input(text: str) -> InputDescription:
    """Parse an input description such as "48x48 gray /255".

    Raises:
        UserError: a word is unknown, missing or repeated; the message names it and the expected form.
    """
    found: dict[str, Any] = {}
    for word in text.split():
        for key, value in _read_word(word, text).items():
            if key in found:
                raise UserError(f'--input "{text}": found a second value for the {key}, {word!r}; {_FORM}.')
            found[key] = value
    missing = [key for key in ("size", "colours", "scaling") if key not in found]
    if missing:
        raise UserError(f'--input "{text}": does not say the {" and the ".join(missing)}; {_FORM}.')
    (height, width), (scale, low) = found["size"], found["scaling"]
    mean, std = found.get("mean"), found.get("std", (1.0,))
    if low and mean is not None:
        raise UserError(
            f'--input "{text}": a range from {low:g} already subtracts a mean; use /255 with mean=, or the range alone.'
        )
    mean = (-low,) if mean is None else mean
    channels = _COLOURS[found["colours"]]
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(f'--input "{text}": {key} has {len(values)} numbers, expected one or {channels}.')
    return InputDescription(text, height, width, found["colours"], scale, mean, std, found.get("layout"))


def _read_word(word: str, text: str) -> dict[str, Any]:
    """Parse one word of a description into a dictionary with one key."""
    plain = word.casefold()
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", plain):
        size = int(match[1]), int(match[2])
        if not all(1 <= side <= LARGEST_SIDE for side in size):
            raise UserError(f'--input "{text}": found {word}, expected sides of 1 to {LARGEST_SIDE} pixels.')
        return {"size": size}
    if plain in _COLOURS:
        return {"colours": plain.replace("grey", "gray")}
    if plain in ("nhwc", "nchw"):
        return {"layout": plain}
    if (match := re.fullmatch(rf"/({_NUMBER})", plain)) and float(match[1]) > 0:
        return {"scaling": (1 / float(match[1]), 0.0)}
    if (match := re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})", plain)) and float(match[1]) < float(match[2]):
        low, high = float(match[1]), float(match[2])
        return {"scaling": ((high - low) / 255, low)}
    if match := re.fullmatch(rf"(mean|std)=({_NUMBER}(?:,{_NUMBER})*)", plain):
        values = tuple(map(float, match[2].split(",")))
        if match[1] == "mean" or min(values) > 0:
            return {match[1]: values}
    raise UserError(f'--input "{text}": {word!r} is not understood; {_FORM}.')


@dataclass(frozen=True)
class ExternalModel:
    """An external model that has been opened.

    Attributes:
        path: of the file.
        given: the input that it expects.
        runtime: name of the runtime that runs it.
        answer: function of prepared images float32 [N, height, width, channels] that returns outputs float [N, C].
        batch: fixed number of images per call; None: any number.
    """

    path: Path
    given: InputDescription
    runtime: str
    answer: Callable[[np.ndarray], np.ndarray]
    batch: int | None
    aspect: str = "crop"

    @property
    def image_size(self) -> int:
        """Side in pixels to which images of several sizes are resized."""
        return max(self.given.height, self.given.width)

    def compute_outputs(self, images: np.ndarray) -> np.ndarray:
        """Return the outputs, float32 [N, C], for images uint8 [N, H, W, 1 or 3].

        Raises:
            ModelError: the model cannot be run, or outputs are NaN or infinite.
        """
        size = self.batch or BATCH
        found = []
        for start in range(0, len(images), size):
            part = self.given.prepare(images[start : start + size])
            missing = size - len(part) if self.batch else 0
            # Pad a fixed batch by repeating the last image.
            filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
            found.append(self.run(filled)[: len(part)])
        return check_finite(np.concatenate(found), str(self.path))

    def run(self, prepared: np.ndarray) -> np.ndarray:
        """Return the outputs, float32 [N, C], for prepared images, as many as the file accepts.

        Raises:
            ModelError: the runtime raises an error, or returns another number of outputs.
        """
        try:
            outputs = np.asarray(self.answer(prepared), np.float32)
        except UserError:
            raise
        except Exception as error:  # any runtime's, for values or shapes that the network does not accept
            raise ModelError(
                f'{self.path}: cannot answer arrays of the shape {list(prepared.shape)} that --input "{self.given.text}" makes '
                f"({type(error).__name__}: {shorten(error, self.path)})."
            ) from error
        if len(outputs) != len(prepared):
            raise ModelError(
                f"{self.path}: gave {len(outputs)} answers for {len(prepared)} images, expected one for each."
            )
        return outputs

    def time_one(self, images: np.ndarray) -> float:
        """Return the median time in milliseconds for a single image, including its preparation."""
        self.compute_outputs(images[:1])
        taken = []
        for index in range(min(NUM_TIMED, len(images))):
            start = time.perf_counter()
            self.compute_outputs(images[index : index + 1])
            taken.append(1000 * (time.perf_counter() - start))
        return statistics.median(taken)


def to_probabilities(outputs: np.ndarray, kind: str, where: object) -> np.ndarray:
    """Convert a model's outputs to probabilities float32 [N, C] whose rows sum to one.

    Args:
        outputs: float [N, C].
        kind: one of OUTPUTS.
        where: the file, for error messages.

    Raises:
        ModelError: the outputs are not of the given kind.
    """
    values = np.asarray(outputs, np.float64)
    if kind == "logits":
        if _are_probabilities(values):
            raise ModelError(
                f"{where}: its outputs are in 0..1 and sum to 1 for each image, so they are probabilities already, expected logits; "
                "use --output softmax."
            )
        values = np.exp(values - values.max(axis=1, keepdims=True))
    else:
        sums, low, high = values.sum(axis=1), values.min(), values.max()
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise ModelError(
                f"{where}: its outputs reach from {low:.3g} to {high:.3g}, expected 0..1; use --output logits."
            )
        if kind == "softmax" and np.abs(sums - 1).max() > max(TOLERANCE, values.shape[1] * ROUNDING):
            raise ModelError(
                f"{where}: its outputs sum to {sums.min():.3g} to {sums.max():.3g}, expected 1 in each row; use "
                "--output sigmoid if each class has its own probability, or --output logits."
            )
        values = values.clip(1e-12)
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def _are_probabilities(values: np.ndarray) -> bool:
    """Return whether outputs [N, C] are in 0..1 and each row sums to 1, which logits of several classes do not."""
    if values.shape[1] < 2 or values.min() < 0 or values.max() > 1:
        return False
    return bool(np.abs(values.sum(axis=1) - 1).max() <= _SUM_TOLERANCE)


def open_external(path: Path | str, given: InputDescription, num_labels: int) -> ExternalModel:
    """Open an external model, and check it against the described input and the number of labels.

    Args:
        path: of a file with one of SUFFIXES.
        given: the described input.
        num_labels: expected number of outputs per image.

    Raises:
        ModelError: the file is missing or damaged, has another input or number of outputs, or fails for a black image.
        EnvironmentProblem: its runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; expected a model as {', '.join(SUFFIXES)}.")
    opener = {".onnx": _open_onnx, ".tflite": _open_litert}.get(path.suffix, _open_keras)
    try:
        opened = opener(path, given, num_labels)
    except (UserError, ImportError):
        raise
    except Exception as error:  # runtimes raise almost any exception for an invalid file
        raise ModelError(
            f"{path}: the runtime cannot open it ({type(error).__name__}: {shorten(error, path)}). {describe_damage(path)}"
        ) from error
    prepared = given.prepare(np.zeros((2, given.height, given.width, given.channels), np.uint8))
    opened.run(prepared[[0] * (opened.batch or 1)])
    if opened.batch is None:
        try:
            opened.run(prepared)
        except ModelError:
            # A file may declare any number of images and accept only one.
            opened = replace(opened, batch=1)
    return opened


def _match_shape(path: Path, given: InputDescription, shape: Sequence[Any]) -> tuple[str, int | None]:
    """Return the layout of an input and its fixed batch size, or None for any size."""
    sides = [side if isinstance(side, int) and side > 0 else None for side in shape]
    wanted = {
        "nhwc": (given.height, given.width, given.channels),
        "nchw": (given.channels, given.height, given.width),
    }
    fitting = [
        layout
        for layout, sizes in wanted.items()
        if given.layout in (None, layout)
        and len(sides) == 4
        and all(side in (None, size) for side, size in zip(sides[1:], sizes, strict=True))
    ]
    shown = [side if side is not None else "any" for side in sides]
    if not fitting:
        raise ModelError(f'{path}: takes arrays of the shape {shown}, which is not --input "{given.text}".')
    if len(fitting) > 1:
        raise ModelError(f'{path}: takes arrays of the shape {shown}; add nhwc or nchw to --input "{given.text}".')
    return fitting[0], sides[0]


def _choose_output(path: Path, shapes: Sequence[Sequence[Any]], num_labels: int) -> int:
    """Return the index of the output that has one number for each label."""
    fitting = [
        index
        for index, shape in enumerate(shapes)
        if len(shape) >= 2
        and (not all(isinstance(side, int) and side > 0 for side in shape[1:]) or math.prod(shape[1:]) == num_labels)
    ]
    if len(fitting) != 1:
        listed = ", ".join(str(list(shape)) for shape in shapes)
        raise ModelError(
            f"{path}: gives outputs of the shapes {listed}, expected one of [N, {num_labels}], one number for each "
            f"of the {num_labels} --labels, in the order of the outputs."
        )
    return fitting[0]


def _check_outputs(path: Path, outputs: np.ndarray, num_labels: int) -> np.ndarray:
    """Return outputs as [N, C], after checking C, which a file need not declare."""
    outputs = np.asarray(outputs)
    outputs = outputs.reshape(len(outputs) if outputs.ndim else 1, -1)
    if outputs.shape[1] != num_labels:
        raise ModelError(
            f"{path}: gave {outputs.shape[1]} numbers for an image, expected one for each of {num_labels} --labels."
        )
    return outputs


def _arrange(images: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if layout == "nchw" else images)


def _to_integers(path: Path, given: InputDescription, dtype: np.dtype, images: np.ndarray) -> np.ndarray:
    """Return pixels as uint8 for a model whose integer input has no quantisation scale."""
    if dtype != np.uint8 or (given.scale, given.mean, given.std) != (1.0, (0.0,), (1.0,)):
        raise ModelError(f'{path}: takes {dtype}, expected float32; for uint8 use 0..255 in --input "{given.text}".')
    return images.astype(np.uint8)


def _open_onnx(path: Path, given: InputDescription, num_labels: int) -> ExternalModel:
    check_onnx(path)
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are also raised
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        names = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise ModelError(f"{path}: takes {len(inputs)} inputs ({names}), expected one, the images.")
    layout, batch = _match_shape(path, given, inputs[0].shape)
    name = outputs[_choose_output(path, [each.shape for each in outputs], num_labels)].name
    dtype = np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8"}.get(inputs[0].type, "u1"))
    if dtype.kind == "u" and inputs[0].type != "tensor(uint8)":
        raise ModelError(f"{path}: takes {inputs[0].type}, expected a tensor of float, float16, double or uint8.")
    if dtype.kind == "u":
        _to_integers(path, given, dtype, np.zeros(1))

    def answer(images: np.ndarray) -> np.ndarray:
        arranged = _arrange(images, layout).astype(dtype)
        return _check_outputs(path, session.run([name], {inputs[0].name: arranged})[0], num_labels)

    return ExternalModel(path, given, "ONNX Runtime", answer, batch)


def _open_litert(path: Path, given: InputDescription, num_labels: int) -> ExternalModel:
    litert = import_extra("ai_edge_litert.interpreter")
    with keep_back_stderr():
        interpreter = litert.Interpreter(model_path=str(path))
        details, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        if len(details) != 1:
            raise ModelError(f"{path}: takes {len(details)} inputs, expected one, the images.")
        detail = details[0]
        layout, _ = _match_shape(path, given, detail["shape_signature"].tolist())
        batch = int(detail["shape"][0])
        shape = _arrange(np.zeros((batch, given.height, given.width, given.channels)), layout).shape
        if tuple(detail["shape"]) != shape:
            interpreter.resize_tensor_input(detail["index"], shape)
        interpreter.allocate_tensors()
    output = outputs[_choose_output(path, [each["shape"].tolist() for each in outputs], num_labels)]

    def answer(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(detail["index"], _quantise(path, given, detail, _arrange(images, layout)))
        interpreter.invoke()
        found = interpreter.get_tensor(output["index"])
        scale, zero = output["quantization"]
        return _check_outputs(path, (found.astype(np.float32) - zero) * scale if scale else found, num_labels)

    return ExternalModel(path, given, "LiteRT", answer, batch)


def _quantise(path: Path, given: InputDescription, detail: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """Return images in the dtype and quantisation of a LiteRT file's input."""
    dtype, (scale, zero) = np.dtype(detail["dtype"]), detail["quantization"]
    if dtype.kind == "f":
        return images.astype(dtype)
    if not scale:
        return _to_integers(path, given, dtype, images)
    limits, steps = np.iinfo(dtype), np.round(images / scale + zero)
    low, high = ((limit - zero) * scale for limit in (limits.min, limits.max))
    # Calibration clips a few values on purpose; values far out of range indicate a wrong --input scaling.
    if images.size and not (2 * low - high <= images.min() and images.max() <= 2 * high - low):
        raise ModelError(
            f'{path}: --input "{given.text}" makes numbers from {images.min():.3g} to {images.max():.3g}, and the file takes '
            f"{low:.3g} to {high:.3g}; give the scaling that it was made for."
        )
    return np.clip(steps, limits.min, limits.max).astype(dtype)


def _open_keras(path: Path, given: InputDescription, num_labels: int) -> ExternalModel:
    """Open a model of Keras' built-in layers; its configuration is checked before anything is built from it."""
    from dlfer.model.weights_file import check_keras_file, check_layers

    check_keras_file(path)
    import keras

    network = keras.models.load_model(path, compile=False, safe_mode=True)
    if path.suffix != ".keras":
        try:
            check_layers(path, network)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
    if len(network.inputs) != 1:
        raise ModelError(f"{path}: takes {len(network.inputs)} inputs, expected one, the images.")
    layout, batch = _match_shape(path, given, network.inputs[0].shape)
    index = _choose_output(path, [output.shape for output in network.outputs], num_labels)
    single = keras.Model(network.inputs[0], network.outputs[index])

    def answer(images: np.ndarray) -> np.ndarray:
        return _check_outputs(path, single.predict_on_batch(_arrange(images, layout)), num_labels)

    return ExternalModel(path, given, f"Keras on {keras.backend.backend()}", answer, batch)
