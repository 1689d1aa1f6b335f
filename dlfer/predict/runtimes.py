"""Exported models: reading and checking their folders, and inference with the runtime of their format.

<out>/<format>/
    export.json     format, file, labels, input, output, sha256 of the other files, agreement with the artifact
    labels.json     the labels alone, in the order of the outputs
    MODEL_CARD.md   what the model is for, what it is not for, how good it is, and what the export costs
    example.py      ten lines that need only the format's runtime
    example.png     a drawn face, for the example
    model.*         the model, including preprocessing

TensorFlow is loaded only for a SavedModel.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.errors import EnvironmentProblem, ModelError, UserError, shorten
from dlfer.model.trees import SCALE_FILE, TREES_FILE, FeatureScale, predict_trees, read_trees, round_features
from dlfer.quiet import keep_back_stderr
from dlfer.runs.artifact import MEND, ExportRecord
from dlfer.runs.files import check_inside, check_manifest, hash_file, read_json
from dlfer.runs.machine import count_cores
from dlfer.runs.records import ArtifactRecord

if TYPE_CHECKING:
    import xgboost

EXPORT_FILE = ExportRecord.FILE
VERSION = 1
LARGEST_IMAGE = 4096
_CONTRACT = "expected labels and an input of a shape [null, H, W, 1 or 3]; export the model again."
FORMATS = ("savedmodel", "litert", "litert-int8", "onnx", "onnx-int8")

_OTHER_NAMES = {
    **dict.fromkeys(("tflite", "lite", "tf-lite"), "litert"),
    **dict.fromkeys(("int8", "tflite-int8", "quantized"), "litert-int8"),
    **dict.fromkeys(("saved_model", "saved-model", "tf", "tensorflow"), "savedmodel"),
}
"""Name of a format in other tools -> its name here; for error messages only."""


def parse_formats(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of formats such as "savedmodel,onnx".

    Raises:
        UserError: a format is unknown, or the list is empty.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        meant = [_OTHER_NAMES[fold] for name in unknown if (fold := name.casefold()) in _OTHER_NAMES]
        raise UserError(
            f"--to {text}: found {', '.join(unknown) or 'no format'}, expected some of {', '.join(FORMATS)} "
            f"separated by commas.{' Did you mean ' + ','.join(meant) + '?' if meant else ''}"
        )
    return names


def read_export(folder: Path | str) -> ExportRecord:
    """Return export.json of an exported model, after verifying the checksums of all files that it names.

    Raises:
        ModelError: there is no valid export.json, it has another version, a file is missing or was changed, or a path
            leads out of the folder.

    Example:
        >>> read_export("exports/lite2/onnx").input.shape
        [None, None, None, 1]
    """
    folder = Path(folder)
    path = folder / EXPORT_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: expected the description of an exported model: {error}. Make one: dlfer export MODEL --to onnx."
        ) from error
    if not isinstance(values, dict) or values.get("version") != VERSION or values.get("format") not in FORMATS:
        raise ModelError(
            f"{path}: expected version {VERSION} and a format of {', '.join(FORMATS)}; another version of dlfer "
            "wrote it. Export the model again."
        )
    check_manifest(
        folder,
        values.get("sha256"),
        file=path,
        needed=_name_files(folder, values.get("file"), path),
        mend="Copy the export again, or export the model again",
    )
    try:
        record = ExportRecord.parse(values, path)
    except ModelError as error:
        raise ModelError(f"{error} {_CONTRACT}") from error
    shape = record.input.shape
    if (
        len(shape) != 4
        or shape[-1] not in (1, 3)
        or not all(side is None or 0 < side <= LARGEST_IMAGE for side in shape[1:3])
    ):
        raise ModelError(f"{path}: {_CONTRACT}")
    return record


def compute_checksums(folder: Path) -> dict[str, str]:
    """Return relative path (with slashes) -> sha256 (hex) of each file under `folder`."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _name_files(folder: Path, file: Any, path: Path) -> list[str]:
    """Return the names of the model's files; for a SavedModel, which reads its whole folder, of all files in it."""
    check_inside(folder, file, file=path)
    if not (folder / file).is_dir():
        return [file]
    return [found.relative_to(folder).as_posix() for found in (folder / file).rglob("*") if not found.is_dir()]


Answer = Callable[[np.ndarray], np.ndarray]
"""A function of images uint8 [N, H, W, C], N at least 1, that returns probabilities float32 [N, number of labels]."""

PACKAGES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime.quantization": "onnxruntime",
    "openvino": "openvino",
    "ai_edge_litert.interpreter": "ai-edge-litert",
    "tf2onnx": "tf2onnx",
    "onnx": "onnx",
}
"""Module -> the package that contains it."""

EXTRAS = {"openvino": "openvino", "ai-edge-litert": "litert"}
"""Package -> the extra of dlfer that installs it; the other packages are requirements."""

FACES_AT_A_TIME = 8
"""Batch size for LiteRT and OpenVINO. CPU time per face with LiteRT: EfficientNet-B3 at 224 pixels takes a seventh more
in batches of 32 than in small ones, because its feature maps do not fit into the caches; EfficientNet-Lite2 at 64
pixels takes a seventh more in batches of 8 than of 32, and twice as much one by one. With OpenVINO, B3 takes a seventh
more in one batch of 64 than in batches of 8."""

MAX_PROGRAMS = 8
"""Maximum number of input shapes for which OpenVINO keeps a separately compiled program."""


def open_export(folder: Path | str, *, runtime: str | None = None) -> Answer:
    """Check an export folder and return its inference function.

    Args:
        folder: written by `dlfer export`.
        runtime: one of OTHER_RUNTIMES for the folder's format; None: the format's own.

    Raises:
        ModelError: see `read_export`; or the runtime cannot open the file.
        EnvironmentProblem: the runtime is not installed.
    """
    record = read_export(folder)
    return _open(Path(folder) / record.file, record.format, runtime, mend="Export the model again")


def open_artifact(folder: Path, record: ArtifactRecord, *, runtime: str | None = None) -> Answer:
    """Return the inference function of an artifact's ONNX file, after verifying its checksum.

    Raises:
        ModelError: the file is missing or was changed, or the runtime cannot open it.
        EnvironmentProblem: the runtime is not installed.
    """
    folder, has_trees = Path(folder), record.onnx.output == "features"
    needed = [record.onnx.file, *((TREES_FILE, SCALE_FILE) if has_trees else ())]
    digests = {name: record.sha256[name] for name in needed if name in record.sha256}
    check_manifest(folder, digests, file=folder / record.FILE, needed=needed, mend=MEND)
    answer = _open(folder / record.onnx.file, "onnx", runtime, mend=MEND)
    return combine_trees(answer, *read_trees(folder, record)) if has_trees else answer


def combine_trees(compute_features: Answer, scale: FeatureScale, booster: xgboost.Booster) -> Answer:
    """Return the inference function of boosted trees on the features, float32 [N, F], that a network computes."""

    def answer(images: np.ndarray) -> np.ndarray:
        features = round_features(compute_features(images), scale.levels)
        return predict_trees(booster, scale.apply(features))

    return answer


def _open(file: Path, form: str, runtime: str | None, *, mend: str) -> Answer:
    try:
        return (RUNTIMES[form] if runtime is None else OTHER_RUNTIMES[form][runtime])(file)
    except (EnvironmentProblem, ModelError):
        raise
    except Exception as error:  # runtimes raise almost any exception for an invalid file
        raise ModelError(f"{file}: the runtime cannot open it ({shorten(error, file)}). {mend}.") from error


def import_extra(module: str) -> Any:
    """Import a module that only some engines and exports need.

    Raises:
        EnvironmentProblem: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module]
        extra = EXTRAS.get(package)
        kind = "an extra" if extra else "one of dlfer's requirements"
        clone = f"make {f'extra-{extra}' if extra else 'install'}"
        raise EnvironmentProblem(
            f"The package {package} is {kind} that cannot be imported here ({error}). In a clone: {clone}; "
            f"in another environment: pip install {package}."
        ) from error


def open_savedmodel(path: Path) -> Answer:
    """Return the inference function of a SavedModel."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]
    for variable in signature.variables:
        if variable.dtype.is_floating:
            check_weights(variable.name, variable.numpy(), path)

    def answer(images: np.ndarray) -> np.ndarray:
        return signature(images=tf.constant(images))["probabilities"].numpy()

    # The signature does not keep the model alive that owns its weights.
    answer.model = loaded
    return answer


def open_onnx(path: Path) -> Answer:
    """Return the inference function of an ONNX file with ONNX Runtime on the CPU."""
    check_onnx(path)
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    if count_cores() < (os.cpu_count() or 1):
        # The default is one thread for each core of the machine, including those that this process may not use.
        options.intra_op_num_threads = count_cores()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def open_openvino(path: Path) -> Answer:
    """Return the inference function of an ONNX file with OpenVINO, on the CPU in float32.

    Programs compiled for one input shape are faster than the one for dynamic shapes. Batches of `FACES_AT_A_TIME`
    images and single images use the former; other remainders, and shapes beyond `MAX_PROGRAMS`, use the latter. The
    function is thread-safe; calls are serialised.
    """
    check_onnx(path)
    # Importing openvino sends telemetry over the network unless this package cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)
    openvino = import_extra("openvino")
    core = openvino.Core()
    network = core.read_model(path)
    # The default is bfloat16 if the processor supports it.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": count_cores(),
    }
    programs: dict[tuple[int, ...] | None, Any] = {}
    lock = threading.Lock()

    def find_program(shape: tuple[int, ...]) -> Any:
        is_own = shape[0] in (1, FACES_AT_A_TIME) and (
            shape in programs or len(programs.keys() - {None}) < MAX_PROGRAMS
        )
        key = shape if is_own else None
        if key not in programs:
            model = network.clone()
            if key is not None:
                model.reshape(key)
            programs[key] = core.compile_model(model, "CPU", settings).create_infer_request()
        return programs[key]

    def answer(images: np.ndarray) -> np.ndarray:
        with lock:
            starts = range(0, len(images), FACES_AT_A_TIME)
            few = [np.ascontiguousarray(images[start : start + FACES_AT_A_TIME]) for start in starts]
            return np.concatenate([find_program(part.shape).infer({0: part})[0].copy() for part in few])

    return answer


def open_litert(path: Path) -> Answer:
    """Return the inference function of a LiteRT file on all cores; it is thread-safe, and calls are serialised."""
    litert = import_extra("ai_edge_litert.interpreter")
    # The default is one thread.
    with keep_back_stderr():
        interpreter = litert.Interpreter(model_path=str(path), num_threads=count_cores())
        _check_litert(interpreter, path)
        interpreter.allocate_tensors()
    images_index, answer_index = (
        details()[0]["index"] for details in (interpreter.get_input_details, interpreter.get_output_details)
    )
    lock, shape = threading.Lock(), None

    def answer_few(images: np.ndarray) -> np.ndarray:
        nonlocal shape
        if images.shape != shape:
            interpreter.resize_tensor_input(images_index, images.shape, strict=True)
            interpreter.allocate_tensors()
            shape = images.shape
        interpreter.set_tensor(images_index, images)
        interpreter.invoke()
        return interpreter.get_tensor(answer_index)

    def answer(images: np.ndarray) -> np.ndarray:
        with lock:
            starts = range(0, len(images), FACES_AT_A_TIME)
            return np.concatenate([answer_few(images[start : start + FACES_AT_A_TIME]) for start in starts])

    return answer


def check_onnx(path: Path) -> None:
    """Raise ModelError if an ONNX file stores weights in another file, or if weights are NaN or infinite."""
    contents = path.read_bytes()
    if _ONNX_ELSEWHERE in contents:
        raise ModelError(
            f"{path}: its weights are in another file, which has no sha256 to compare with. Export the model again."
        )
    for name, values in _iterate_onnx_weights(contents):
        check_weights(name, values, path)


_ONNX_ELSEWHERE = b"\x0a\x08location\x12"
"""Protobuf encoding of the key "location" in TensorProto.external_data, which names another file with the tensor."""


def check_weights(name: str, values: np.ndarray, path: Path) -> None:
    """Raise ModelError unless all weights of an array are finite; a later ReLU may mask NaN in the outputs."""
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ModelError(
            f"{path}: found {wrong:,} weights that are NaN or infinite in {name}, expected finite numbers. The training "
            "diverged or the file was changed: get the model again, or train it again."
        )


def _check_litert(interpreter: Any, path: Path) -> None:
    """Raise ModelError if constants of a LiteRT file, or its quantisation scales, are not finite.

    Tensors are not allocated yet, so only constants have values.
    """
    for detail in interpreter.get_tensor_details():
        if np.issubdtype(detail["dtype"], np.floating):
            with contextlib.suppress(ValueError):
                check_weights(detail["name"], interpreter.get_tensor(detail["index"]), path)
        check_weights(detail["name"], detail["quantization_parameters"]["scales"], path)


def _iterate_onnx_weights(contents: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of each float tensor in an ONNX file: the initializers, and the constants of nodes."""
    for graph in _get_fields(memoryview(contents), 7):
        tensors = _get_fields(graph, 5)
        for node in _get_fields(graph, 1):
            tensors += [tensor for attribute in _get_fields(node, 5) for tensor in _get_fields(attribute, 5)]
        for tensor in tensors:
            found = dict(_iterate_fields(tensor))
            dtype = _ONNX_FLOATS.get(found.get(2))
            if dtype is not None:
                values = found.get(9) or found.get(4) or found.get(10) or b""  # raw_data, float_data or double_data
                yield str(found.get(8, b"a constant")[:200], "utf-8", "replace"), np.frombuffer(values, dtype)


_ONNX_FLOATS = {1: "<f4", 10: "<f2", 11: "<f8"}
"""TensorProto.data_type -> NumPy dtype."""


def _get_fields(message: memoryview, number: int) -> list[Any]:
    return [value for found, value in _iterate_fields(message) if found == number]


def _iterate_fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value, an int or a memoryview, of each field of a protobuf message."""
    position = 0

    def read_number() -> int:
        nonlocal position
        number = shift = 0
        while shift < 70:
            if position >= len(message):
                raise ValueError("a number is cut short")
            byte = message[position]
            position += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
        raise ValueError("a number of more than 64 bits")

    while position < len(message):
        key = read_number()
        if key & 7 == 0:
            yield key >> 3, read_number()
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"a field of the unknown type {key & 7}")
        size = read_number() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[position : position + size]
        position += size


RUNTIMES: dict[str, Callable[[Path], Answer]] = {
    "savedmodel": open_savedmodel,
    "litert": open_litert,
    "litert-int8": open_litert,
    "onnx": open_onnx,
    "onnx-int8": open_onnx,
}
"""Format -> the function that opens a file with the format's own runtime."""

OTHER_RUNTIMES: dict[str, dict[str, Callable[[Path], Answer]]] = {
    "onnx": {"openvino": open_openvino},
    "onnx-int8": {"openvino": open_openvino},
}
"""Format -> the other runtimes that support it, by name."""
