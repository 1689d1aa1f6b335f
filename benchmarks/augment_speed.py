"""From 48 x 48 grey faces to augmented 224 x 224 x 3 batches: ours against what others do, images a second.

    python benchmarks/augment_speed.py                                  # the table of results/
    python benchmarks/augment_speed.py --rounds 2 --batches 2 --image-size 96

All ways begin with the same images in the host's memory and end with float batches of the network's size, rotated,
zoomed, shifted and mirrored alike:

    ours              what training does: order and a few numbers an image are drawn on the host, one warp in the graph,
                      which is one kernel for TensorFlow on the CPU, and channels and preprocessing in another
    warp, then resize the same function at 48 x 48, and a resize after it: cheaper, with a second interpolation
    generator         Keras' ImageDataGenerator, on images that were resized to 224 x 224 x 3 before (not timed)
    layers            resize and four random layers of Keras at 224 x 224 x 3, in a tf.data pipeline
    prediction        what prediction does: resize, three channels, preprocessing; nothing is drawn
    resize            TensorFlow's resize of one channel alone: the floor

A round is a whole small epoch of each way, its start included, so that nothing that reads ahead works in another's time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from timing import add_options, describe_ratio, tell_row, time_by_turns, write_figures

from dlfer.config.schema import StageConfig
from dlfer.data.bundle import Split
from dlfer.data.pipeline import iterate_epoch
from dlfer.model.backbones import BACKBONES
from dlfer.model.face_input import FaceInput, resize_images
from dlfer.model.training_kernels import compute_fused

SIDE = 48
AUGMENT = {"rotation": 15.0, "zoom": 0.1, "shift": 0.1, "mirror": 0.5}

Epoch = Callable[[], Iterator[np.ndarray]]
"""Yields the batches of a small epoch, float32 [B, S, S, 3]."""


class Ours:
    """Training's own path, with the warp at one size or another.

    Args:
        split: the images.
        batch_size: B.
        image_size: S.
        warp_size: side at which the warp is sampled; unlike S, a resize follows.
    """

    def __init__(self, split: Split, *, batch_size: int, image_size: int, warp_size: int) -> None:
        data = {"source": "synthetic_faces"}
        given = {"data": data, "augment": AUGMENT, "batch_size": batch_size, "image_size": image_size}
        self.split, self.config = split, StageConfig.model_validate(given)
        layer = FaceInput(warp_size, BACKBONES["efficientnet_b3"].preprocessing.as_dict())

        last = FaceInput(image_size, BACKBONES["efficientnet_b3"].preprocessing.as_dict())

        def change(inputs):
            if warp_size == image_size:
                return layer.prepare(inputs["image"], inputs, fill="nearest")
            images = compute_fused(lambda *given: layer.augment(*given, fill="nearest"), inputs["image"], inputs)
            return compute_fused(last.preprocess, resize_images(images, image_size))

        self.change = tf.function(change)

    def __call__(self) -> Iterator[np.ndarray]:
        for inputs, _ in iterate_epoch(self.split, self.config, num_labels=7, seed=0, epoch=0):
            yield np.asarray(self.change(inputs))


def make_generator(images: np.ndarray, batch_size: int) -> Epoch:
    """Return ImageDataGenerator's epoch over uint8 [N, S, S, 3]."""
    generator = keras.src.legacy.preprocessing.image.ImageDataGenerator(
        rotation_range=AUGMENT["rotation"],
        zoom_range=AUGMENT["zoom"],
        width_shift_range=AUGMENT["shift"],
        height_shift_range=AUGMENT["shift"],
        horizontal_flip=True,
        fill_mode="nearest",
    )

    def iterate() -> Iterator[np.ndarray]:
        flow = generator.flow(images, batch_size=batch_size, seed=0)
        for _ in range(len(flow)):
            yield next(flow)

    return iterate


def make_layers(images: np.ndarray, batch_size: int, image_size: int) -> Epoch:
    """Return the epoch of four random layers in tf.data over uint8 [N, 48, 48, 1]."""
    given = {"fill_mode": "nearest", "interpolation": "bilinear"}
    layers = keras.Sequential(
        [
            keras.layers.RandomRotation(AUGMENT["rotation"] / 360, **given),
            keras.layers.RandomZoom(AUGMENT["zoom"], **given),
            keras.layers.RandomTranslation(AUGMENT["shift"], AUGMENT["shift"], **given),
            keras.layers.RandomFlip("horizontal"),
        ]
    )

    def change(batch):
        resized = tf.image.resize(batch, (image_size, image_size))
        return layers(tf.image.grayscale_to_rgb(resized), training=True)

    data = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images)).batch(batch_size)
    return data.map(change, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE).as_numpy_iterator


def normalise_for_tensorflow(images: np.ndarray, batch_size: int, compute: Callable) -> Epoch:
    """Return the epoch of a function without random changes over uint8 [N, 48, 48, 1]."""
    compiled = tf.function(compute)

    def iterate() -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield compiled(images[start : start + batch_size]).numpy()

    return iterate


def build_ways(images: np.ndarray, batch_size: int, image_size: int) -> dict[str, Epoch]:
    """Return each way's epoch over uint8 [N, 48, 48, 1]."""
    split = Split("Training", images, np.arange(len(images)) % 7, np.arange(len(images)).astype(str))
    sizes = {"batch_size": batch_size, "image_size": image_size}
    layer = FaceInput(image_size, BACKBONES["efficientnet_b3"].preprocessing.as_dict())
    large = tf.image.resize(np.repeat(images, 3, axis=-1), (image_size, image_size)).numpy().astype(np.uint8)

    def resize(batch):
        return ops.image.resize(ops.cast(batch, "float32"), (image_size, image_size), interpolation="bilinear")

    return {
        "ours": Ours(split, **sizes, warp_size=image_size),
        "warp, then resize": Ours(split, **sizes, warp_size=SIDE),
        "generator": make_generator(large, batch_size),
        "layers": make_layers(images, batch_size, image_size),
        "prediction": normalise_for_tensorflow(images, batch_size, layer),
        "resize": normalise_for_tensorflow(images, batch_size, resize),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="of a round (default: 6)")
    parser.add_argument("--image-size", type=int, default=224)
    add_options(parser, rounds=7)
    given = parser.parse_args()
    num_images = given.batches * given.batch_size
    images = np.random.default_rng(0).integers(0, 256, (num_images, SIDE, SIDE, 1), dtype=np.uint8)
    ways = build_ways(images, given.batch_size, given.image_size)
    for name, way in ways.items():
        shapes = {batch.shape for batch in way()}
        if shapes != {(given.batch_size, given.image_size, given.image_size, 1 if name == "resize" else 3)}:
            raise ValueError(f"{name}: found batches of {shapes}.")
    # Nothing is kept of a batch, as in training.
    times = time_by_turns(
        {name: lambda way=way: [None for _ in way()] for name, way in ways.items()}, rounds=given.rounds
    )
    rows: list[dict] = []
    for name, taken in times.items():
        row = {
            "way": name,
            "images_per_second": round(num_images / taken.median, 1),
            "cpu_seconds_per_1000_images": round(1000 * taken.median_cpu / num_images, 3),
        }
        # How many times as fast as the way is ours.
        tell_row(
            row | {f"ours_to_it_{key}": value for key, value in describe_ratio(times["ours"], taken).items()}, rows
        )
    sizes = {"batch_size": given.batch_size, "image_size": given.image_size, "batches": given.batches}
    rows = [row | sizes | {"rounds": given.rounds} for row in rows]
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy", "scipy")


if __name__ == "__main__":
    main()
