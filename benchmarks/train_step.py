"""Speed of a training step on prepared tensors: Keras' network and optimiser compared with dlfer's.

    python benchmarks/train_step.py                                     # the table of results/
    python benchmarks/train_step.py efficientnet_b3:224:32 --rounds 3   # NAME:SIZE:BATCH
    python benchmarks/train_step.py efficientnet_lite2:64:64 --xla      # dlfer's step compiled by XLA, too

Both have the same weights and images, and Adam with the same learning rate. They differ in the kernel of BatchNorm and
the gradient of a 5x5 depthwise filter (dlfer/model/training_kernels.py), and in the update of variables by the
optimiser (dlfer/train/objective.py). The largest difference between the losses of the first steps is also reported;
Adam's first steps follow the signs of the gradients, so rounding errors are visible there. The time up to the end of
the first step (building the network, tracing and rewriting its graph, the step itself) is reported separately, in CPU
seconds, since it occurs only once in this process.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from timing import add_options, describe_ratio, tell_row, time_by_turns, write_figures

from dlfer.config.schema import OptimizerConfig
from dlfer.model.backbones import build_backbone, find_backbone
from dlfer.train.objective import build_optimizer

CASES = (
    "efficientnet_lite2:64:64",
    "efficientnet_b3:96:32",
    "efficientnet_b3:224:16",
    "mobilenet_v2:48:64",
    "resnet18:40:128",
    "resnet50:48:64",
    "vgg19_bn:40:128",
)
RATE = 1e-4


def build_as_keras(name: str) -> tuple[keras.Model, keras.optimizers.Optimizer]:
    """Return Keras' own backbone and optimiser."""
    return find_backbone(name).build("imagenet"), keras.optimizers.Adam(RATE)


def build_ours(name: str) -> tuple[keras.Model, keras.optimizers.Optimizer]:
    """Return dlfer's backbone and optimiser."""
    return build_backbone(name), build_optimizer(OptimizerConfig(name="adam"), RATE, clip=None, ema=None)


def make_step(
    build: Callable, name: str, images: tf.Tensor, targets: tf.Tensor, *, jit: bool = False
) -> Callable[[], float]:
    """Return a function that runs one training step, compiled by XLA if `jit`, and returns the loss."""
    keras.utils.set_random_seed(0)
    backbone, optimizer = build(name)
    pixels = keras.Input(images.shape[1:])
    logits = keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(backbone(pixels)))
    model = keras.Model(pixels, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit)
    return lambda: float(model.train_on_batch(images, targets))


def measure(case: str, rounds: int, *, xla: bool = False) -> dict:
    """Return the images per second of each variant and the ratios to dlfer's time, for a case NAME:SIZE:BATCH."""
    name, size, batch = case.split(":")[0], *map(int, case.split(":")[1:])
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(batch, size, size, 3)).astype("float32"))
    targets = tf.constant(rng.integers(0, 7, batch))
    steps, first, losses = {}, {}, {}
    ways = (("keras", build_as_keras), ("dlfer", build_ours), *((("xla", build_ours),) if xla else ()))
    for way, build in ways:
        start = time.process_time()
        steps[way] = make_step(build, name, images, targets, jit=way == "xla")
        losses[way] = [steps[way]()]
        first[way] = time.process_time() - start
    for way, step in steps.items():
        losses[way].append(step())
    times = time_by_turns(steps, rounds=rounds)
    return {
        "case": case,
        **{f"{way}_images_per_second": round(batch / times[way].median, 1) for way in steps},
        **describe_ratio(times["dlfer"], times["keras"]),
        **({"xla": describe_ratio(times["dlfer"], times["xla"])} if xla else {}),
        "cpu_ratio": round(times["keras"].median_cpu / times["dlfer"].median_cpu, 3),
        **{f"{way}_cpu_seconds_to_first_step": round(first[way], 1) for way in steps},
        "rounds": rounds,
        "largest_difference_of_losses": float(np.abs(np.subtract(losses["keras"], losses["dlfer"])).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="NAME:SIZE:BATCH")
    parser.add_argument("--xla", action="store_true", help="also time dlfer's step compiled by XLA")
    add_options(parser, rounds=7)
    given = parser.parse_args()
    rows: list[dict] = []
    # TensorFlow's own initialisation is not to be counted for the first variant.
    measure("resnet_nano:32:2", rounds=1)
    for case in given.cases:
        tell_row(measure(case, given.rounds, xla=given.xla), rows)
        keras.backend.clear_session()
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy")


if __name__ == "__main__":
    main()
