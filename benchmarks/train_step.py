"""What a training step costs: the backbone as Keras builds it against ours, on ready tensors.

    python benchmarks/train_step.py                                     # the table of results/
    python benchmarks/train_step.py efficientnet_b3:224:32 --rounds 3   # NAME:SIZE:BATCH

Both have the same weights, optimiser and images; the only difference is BatchNorm's kernel (dlfer/model/batch_norm.py).
The largest difference of the losses of the first steps is printed beside the speed.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from timing import describe_machine, time_by_turns

from dlfer.model.backbones import build_backbone, find_backbone

CASES = (
    "efficientnet_lite2:64:64",
    "efficientnet_b3:96:32",
    "mobilenet_v2:48:64",
    "resnet18:40:128",
    "resnet50:48:64",
    "vgg19_bn:40:128",
)


def make_step(backbone: keras.Model, images: tf.Tensor, targets: tf.Tensor):
    """Return a call that trains one step and returns its loss."""
    keras.utils.set_random_seed(1)
    pixels = keras.Input(images.shape[1:])
    logits = keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(backbone(pixels)))
    model = keras.Model(pixels, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=False)
    return lambda: float(model.train_on_batch(images, targets))


def measure(case: str, rounds: int) -> dict:
    """Return images a second both ways and their ratio, for NAME:SIZE:BATCH."""
    name, size, batch = case.split(":")[0], *map(int, case.split(":")[1:])
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(batch, size, size, 3)).astype("float32"))
    targets = tf.constant(rng.integers(0, 7, batch))
    steps = {}
    for way, build in (
        ("keras", lambda: find_backbone(name).build("imagenet")),
        ("dlfer", lambda: build_backbone(name)),
    ):
        keras.utils.set_random_seed(0)
        steps[way] = make_step(build(), images, targets)
    losses = np.array([[step() for step in steps.values()] for _ in range(2)])
    times = time_by_turns(steps, rounds=rounds)
    ratio, low, high = times["dlfer"].compute_ratio(times["keras"])
    return {
        "case": case,
        **{f"{way}_images_per_second": round(batch / times[way].median, 1) for way in steps},
        "ratio": round(ratio, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "rounds": rounds,
        "largest_difference_of_losses": float(np.abs(losses[:, 0] - losses[:, 1]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="NAME:SIZE:BATCH")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    rows = []
    for case in given.cases:
        rows.append(measure(case, given.rounds))
        print(json.dumps(rows[-1]), flush=True)
        keras.backend.clear_session()
    if given.json:
        machine = describe_machine("tensorflow-cpu", "keras", "numpy")
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
