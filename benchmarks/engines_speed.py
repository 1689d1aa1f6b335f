"""Time per face of one model with each engine and with several ways to call Keras, relative to the machine's peak.

    python benchmarks/engines_speed.py                              # EfficientNet-B3 at 224 pixels, the table of results/
    python benchmarks/engines_speed.py --backbone efficientnet_lite0 --image-size 64 --batches 1,8 --rounds 2
    python benchmarks/engines_speed.py --model lite2_96                # a shipped model, a run or an artifact folder
    python benchmarks/engines_speed.py --model lite2_96 --exports exports/lite2_96    # with the files of dlfer export

Without --model the weights are random, with BatchNorm statistics and a head scale that make the predictions differ. All
variants get the same drawn faces of 48 pixels (--face-size) and resize them themselves. The runtimes have dlfer's
number of threads, one per core; the CPU time over all threads shows how many were busy. The limit is the time of the
model's floating-point operations (as counted by TensorFlow) at the speed of numpy's multiplication of large float32
matrices on all cores, which is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from timing import Timing, add_options, describe_ratio, tell_row, time_by_turns, write_figures

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import ModelConfig
from dlfer.data.images import resize_all
from dlfer.data.synthetic.faces import FACE_SIZE, draw_face
from dlfer.errors import EnvironmentProblem
from dlfer.export.contract import Sample
from dlfer.export.exporters import EXPORTERS
from dlfer.export.graph import OUTPUT, build_function
from dlfer.model.classifier import NetworkClassifier, TransferClassifier
from dlfer.model.families import load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.training_kernels import set_norm_momentum
from dlfer.predict.runtimes import EXPORT_FILE, OTHER_RUNTIMES, RUNTIMES, open_export, read_export

MATRIX = 2048
"""Side of the matrices with which the peak is measured: 17 GFLOP per product."""
LIMIT = "matrix product"
SPREAD = 2.0
"""Standard deviation of the logits of the model with random weights."""

Answer = Callable[[np.ndarray], np.ndarray]


def draw_faces(num_faces: int, channels: int, side: int = FACE_SIZE) -> np.ndarray:
    """Return drawn faces, uint8 [N, side, side, channels]; the 32 different ones are repeated."""
    rng = np.random.default_rng(0)
    drawn = np.stack(
        [draw_face(FER2013_LABELS[number % 7], rng=rng).reshape(FACE_SIZE, FACE_SIZE, 1) for number in range(32)]
    )
    return np.repeat(resize_all(drawn, (side, side))[np.arange(num_faces) % len(drawn)], channels, axis=-1)


def build_random(backbone: str, image_size: int) -> TransferClassifier:
    """Return a classifier with random weights whose predictions differ between faces."""
    keras.utils.set_random_seed(0)
    config = ModelConfig(backbone=backbone)
    network = build_transfer_network(config, num_labels=7, image_size=image_size, channels=1)
    faces = draw_faces(32, 1)
    # With BatchNorm's initial statistics, the prediction would be the same for all faces.
    set_norm_momentum(network.backbone, 0.0)
    network.backbone(network.face_input(faces), training=True)
    logits = keras.Model(network.model.inputs, network.model.get_layer("head").output).predict(faces, verbose=0)
    scale = SPREAD / logits.std(axis=0).mean()
    network.head.kernel.assign(network.head.kernel * scale)
    network.head.bias.assign(-scale * logits.mean(axis=0))
    return TransferClassifier(network, FER2013_LABELS, config=config, channels=1)


def open_exports(
    classifier: NetworkClassifier, folder: Path, formats: tuple[str, ...], *, side: int
) -> dict[str, tuple[Answer, float]]:
    """Return the prediction function and the file's size in megabytes for each runtime.

    The exported models are those in `folder`, if there are any, or else are written into it.
    """
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{EXPORT_FILE}"))}
    if found:
        files = {name: path / read_export(path)["file"] for name, path in found.items()}
        opened = {name: (open_export(path), count_megabytes(files[name])) for name, path in found.items()}
        return opened | open_others(files)
    faces = draw_faces(8, classifier.channels, side)
    sample = Sample(faces, "drawn", faces, "drawn")
    opened, files = {}, {}
    for name in formats:
        path = folder / name / EXPORTERS[name].file
        path.parent.mkdir()
        size = None if EXPORTERS[name].any_size else (side, side)
        EXPORTERS[name].write(classifier, path, size=size, sample=sample)
        opened[name], files[name] = (RUNTIMES[name](path), count_megabytes(path)), path
    return opened | open_others(files)


def open_others(files: dict[str, Path]) -> dict[str, tuple[Answer, float]]:
    """Return the same for additional runtimes of the formats that are installed."""
    opened = {}
    for form, path in files.items():
        for name, open_file in OTHER_RUNTIMES.get(form, {}).items():
            with contextlib.suppress(EnvironmentProblem):
                opened[name] = open_file(path), count_megabytes(path)
    return opened


def count_megabytes(path: Path) -> float:
    """Return the size in megabytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6, 2)


def list_keras_ways(classifier: NetworkClassifier) -> dict[str, Answer]:
    """Return the different ways to call the Keras model, by name."""
    network = classifier.network
    compiled = tf.function(lambda images: network(images, training=False), autograph=False, reduce_retracing=False)
    module, _ = build_function(classifier)
    return {
        "keras, eager call": lambda faces: np.asarray(network(faces, training=False)),
        "keras.Model.predict": lambda faces: network.predict(faces, batch_size=len(faces), verbose=0),
        "classifier.predict": lambda faces: classifier.predict(faces, batch_size=len(faces)),
        "compiled function": lambda faces: compiled(tf.constant(faces)).numpy(),
        "compiled export": lambda faces: module.predict(tf.constant(faces))[OUTPUT].numpy(),
    }


def count_operations(classifier: NetworkClassifier, side: int) -> int:
    """Return the number of floating-point operations per face."""
    from tensorflow.python.profiler.model_analyzer import profile
    from tensorflow.python.profiler.option_builder import ProfileOptionBuilder

    given = tf.TensorSpec((1, side, side, classifier.channels), tf.uint8)
    module, _ = build_function(classifier, size=(side, side))
    graph = tf.function(lambda images: module.predict.python_function(images), autograph=False)
    options = ProfileOptionBuilder(ProfileOptionBuilder.float_operation()).with_empty_output().build()
    with contextlib.redirect_stdout(io.StringIO()):
        return profile(graph.get_concrete_function(given).graph, options=options).total_float_ops


def measure(ways: dict[str, Answer], faces: np.ndarray, *, rounds: int, calls: int) -> dict[str, Timing]:
    """Return the times of `calls` calls of each variant, and of one matrix product, measured in turns."""
    rng = np.random.default_rng(0)
    left, right = (rng.random((MATRIX, MATRIX), np.float32) for _ in range(2))
    repeated = {name: lambda answer=answer: [answer(faces) for _ in range(calls)] for name, answer in ways.items()}
    return time_by_turns(repeated | {LIMIT: lambda: left @ right}, rounds=rounds, warm_up=2)


def describe(times: dict[str, Timing], name: str, *, faces: int, operations: int) -> dict:
    """Return the row of one variant; `faces` is the number of faces in each measured time."""
    taken, peak = times[name], times[LIMIT]
    limit = Timing(peak.seconds * operations * faces / (2 * MATRIX**3))
    return {
        "ms_per_face": round(1000 * taken.median / faces, 3),
        "cpu_ms_per_face": round(1000 * taken.median_cpu / faces, 3),
        "times_the_limit": round(limit.compute_ratio(taken)[0], 2),
        **{
            f"keras_predict_to_it_{key}": value
            for key, value in describe_ratio(taken, times["keras.Model.predict"]).items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a shipped model, a run or an artifact folder")
    parser.add_argument("--backbone", default="efficientnet_b3", help="of a model with random weights")
    parser.add_argument("--image-size", type=int, default=224, help="of a model with random weights")
    parser.add_argument("--exports", type=Path, help="folder of exports of --model (default: made and removed)")
    parser.add_argument("--formats", default="onnx,litert", help="that are made (default: onnx,litert)")
    parser.add_argument("--face-size", type=int, default=FACE_SIZE, help="of the images that come in (default: 48)")
    parser.add_argument("--batches", default="1,64", help="faces at a time (default: 1,64)")
    add_options(parser, rounds=7)
    given = parser.parse_args()
    classifier = load_artifact(given.model) if given.model else build_random(given.backbone, given.image_size)
    operations = count_operations(classifier, given.face_size)
    rows: list[dict] = []
    about = {"model": given.model or f"{given.backbone}, random weights", "image_size": classifier.image_size}
    with tempfile.TemporaryDirectory() as folder:
        opened = open_exports(
            classifier, given.exports or Path(folder), tuple(given.formats.split(",")), side=given.face_size
        )
        ways = list_keras_ways(classifier) | {name: answer for name, (answer, _) in opened.items()}
        for batch in map(int, given.batches.split(",")):
            faces = draw_faces(batch, classifier.channels, given.face_size)
            answers = {name: answer(faces).astype(np.float64) for name, answer in ways.items()}
            calls = max(1, 8 // batch)
            times = measure(ways, faces, rounds=given.rounds, calls=calls)
            peak = 2 * MATRIX**3 / times[LIMIT].median / 1e9
            for name in ways:
                row = {**about, "batch": batch, "way": name, "rounds": given.rounds}
                row |= describe(times, name, faces=calls * batch, operations=operations)
                row["largest_probability"] = round(float(np.median(answers[name].max(axis=1))), 3)
                row["largest_difference"] = float(np.abs(answers[name] - answers["keras.Model.predict"]).max())
                if name in opened:
                    row["megabytes"] = opened[name][1]
                row |= {"gflop_per_face": round(operations / 1e9, 3), "peak_gflops": round(peak, 1)}
                tell_row(row, rows)
    packages = ("tensorflow-cpu", "tensorflow", "keras", "numpy", "onnxruntime", "openvino", "ai-edge-litert")
    write_figures(given.json, rows, *packages)


if __name__ == "__main__":
    main()
