"""Speed, in images per second, of turning 48 x 48 grey faces into augmented 224 x 224 x 3 batches: dlfer and others.

    python benchmarks/augment_speed.py                                  # the table of results/
    python benchmarks/augment_speed.py --rounds 2 --batches 2 --image-size 96

Each variant starts with the same images in host memory and ends with float batches of the network's input size, with
the same ranges of rotation, zoom, shift and mirroring:

    ours              as in training: the order and a few numbers per image are drawn on the host; the graph has one
                      warp, a single kernel with TensorFlow on the CPU, and another kernel for channels and
                      preprocessing
    warp, then resize the same warp at 48 x 48, followed by a resize: cheaper, but with a second interpolation
    generator         Keras' ImageDataGenerator, on images that are resized to 224 x 224 x 3 beforehand (not timed)
    layers            a resize and four random layers of Keras at 224 x 224 x 3, in a tf.data pipeline
    prediction        as in prediction: resize, three channels and preprocessing, without random changes
    resize            only TensorFlow's resize of one channel, as a lower bound

A round is a complete small epoch of each variant including its start, so that no variant prefetches during another's
time.
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
"""A function that returns an iterator over the batches of a small epoch, float32 [B, S, S, 3]."""


class Ours:
    """The augmentation of dlfer's training, with a warp of selectable size.

    Args:
        split: the images.
        batch_size: B.
        image_size: S.
        warp_size: side at which the warp is sampled; if it differs from S, a resize follows.
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
    """Return an epoch of ImageDataGenerator over images, uint8 [N, S, S, 3]."""
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
    """Return an epoch of four random Keras layers in tf.data over images, uint8 [N, 48, 48, 1]."""
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
    """Return an epoch of a function without random changes over images, uint8 [N, 48, 48, 1]."""
    compiled = tf.function(compute)

    def iterate() -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield compiled(images[start : start + batch_size]).numpy()

    return iterate


def build_ways(images: np.ndarray, batch_size: int, image_size: int) -> dict[str, Epoch]:
    """Return the epoch of each variant over images, uint8 [N, 48, 48, 1]."""
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
    # The values in the lists are None: no batch is kept, as in training.
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
        # The time of this variant divided by that of ours.
        tell_row(
            row | {f"ours_to_it_{key}": value for key, value in describe_ratio(times["ours"], taken).items()}, rows
        )
    sizes = {"batch_size": given.batch_size, "image_size": given.image_size, "batches": given.batches}
    rows = [row | sizes | {"rounds": given.rounds} for row in rows]
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy", "scipy")


if __name__ == "__main__":
    main()
