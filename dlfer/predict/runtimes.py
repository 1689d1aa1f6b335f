"""Exported models answering, each by a runtime of its format; TensorFlow is loaded for a SavedModel alone."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.predict.export_folder import read_export

Answer = Callable[[np.ndarray], np.ndarray]
"""uint8 [N, H, W, C], N at least 1, to probabilities float32 [N, number of labels]."""

PACKAGES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "ai_edge_litert.interpreter": "ai-edge-litert",
    "tf2onnx": "tf2onnx",
}
"""What is imported -> the package that holds it."""

EXTRAS = {"openvino": "openvino"}
"""Package -> the extra that has it, where that is not `export`."""

FACES_AT_A_TIME = 8
"""Images that LiteRT and OpenVINO are given at a time. CPU time of a face by LiteRT: in batches of 32 EfficientNet-B3 at
224 pixels takes a seventh more than in small ones, for its feature maps leave the caches; EfficientNet-Lite2 at 64 pixels
takes a seventh more in batches of 8 than of 32, and twice as much one by one. By OpenVINO: B3 a seventh more in one
batch of 64 than by eights."""

MOST_PROGRAMS = 8
"""That OpenVINO keeps compiled, each for one shape."""


def open_export(folder: Path | str, *, runtime: str | None = None) -> Answer:
    """Return the function by which a checked export folder answers.

    Args:
        folder: that `dlfer export` wrote.
        runtime: one of OTHER_RUNTIMES for the folder's format; None: the format's own.

    Raises:
        ModelError: as `read_export`, or the runtime does not take the file.
        EnvironmentProblem: the runtime of its format is not installed.
    """
    record = read_export(folder)
    file = Path(folder) / record.file
    try:
        form = record.format
        return (RUNTIMES[form] if runtime is None else OTHER_RUNTIMES[form][runtime])(file)
    except (EnvironmentProblem, ModelError):
        raise
    except Exception as error:  # runtimes raise nearly anything at a file that they do not know
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"{file}: the runtime cannot open it ({reason}). Export the model anew.") from error


def import_extra(module: str) -> Any:
    """Return a module of the extra `export`, or of one of its own.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module]
        raise EnvironmentProblem(
            f"export: the package {package} is an extra that cannot be imported here ({error}). In a clone: "
            f"make extra-{EXTRAS.get(package, 'export')}; in another environment: pip install {package}."
        ) from error


def count_cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_savedmodel(path: Path) -> Answer:
    """Return the function by which a SavedModel answers."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]

    def answer(images: np.ndarray) -> np.ndarray:
        return signature(images=tf.constant(images))["probabilities"].numpy()

    # A signature does not hold the model that owns its weights.
    answer.model = loaded
    return answer


def open_onnx(path: Path) -> Answer:
    """Return the function by which an ONNX file answers, on the CPU."""
    _check_is_whole(path)
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    if count_cores() < (os.cpu_count() or 1):
        # By itself it takes a thread for each core of the machine, also for those that this process may not use.
        options.intra_op_num_threads = count_cores()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def open_openvino(path: Path) -> Answer:
    """Return the function by which OpenVINO answers with an ONNX file, on the CPU in float32.

    Programs for one shape are faster than the one for all, so that images go in by eights and a single one by itself,
    each by such a program; what is left of a batch, and sizes beyond `MOST_PROGRAMS`, by the one for all. Several
    threads may call it, one by one.
    """
    _check_is_whole(path)
    # Its import reports itself to its maker over the network, unless this package cannot be found.
    sys.modules.setdefault("openvino_telemetry", None)
    openvino = import_extra("openvino")
    core = openvino.Core()
    network = core.read_model(path)
    # By itself it computes in bfloat16 where the processor can.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": count_cores(),
    }
    programs: dict[tuple[int, ...] | None, Any] = {}
    lock = threading.Lock()

    def find_program(shape: tuple[int, ...]) -> Any:
        is_own = shape[0] in (1, FACES_AT_A_TIME) and (shape in programs or len(programs) < MOST_PROGRAMS)
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
    """Return the function by which a LiteRT file answers, on all cores; several threads may call it, one by one."""
    litert = import_extra("ai_edge_litert.interpreter")
    # Without a number it takes one thread.
    interpreter = litert.Interpreter(model_path=str(path), num_threads=count_cores())
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


def _check_is_whole(path: Path) -> None:
    if _ONNX_ELSEWHERE in path.read_bytes():
        raise ModelError(
            f"{path}: keeps weights in another file, which nothing holds against a sha256. Export the model anew."
        )


_ONNX_ELSEWHERE = b"\x0a\x08location\x12"
"""How protobuf writes the name of the file in which an ONNX keeps a tensor: TensorProto.external_data, key location."""

RUNTIMES: dict[str, Callable[[Path], Answer]] = {
    "savedmodel": open_savedmodel,
    "litert": open_litert,
    "litert-int8": open_litert,
    "onnx": open_onnx,
}
"""Format -> how its own runtime opens it."""

OTHER_RUNTIMES: dict[str, dict[str, Callable[[Path], Answer]]] = {"onnx": {"openvino": open_openvino}}
"""Format -> the runtimes that take it besides its own, by name."""
