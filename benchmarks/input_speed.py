"""Speed of the input pipeline alone, without a network, in images per second: the table of docs/scale.md.

    python benchmarks/input_speed.py                           both paths, about 20 seconds each
    python benchmarks/input_speed.py --seconds 60 --batch-size 256

The array path is that of FER2013: 48 x 48 grey images in memory, in random order, one warp to the network's size. The
streamed path is that of ImageNet: JPEG files of 500 x 375 pixels (synthetic, see streaming_memory.py) are read, decoded
within a random crop, resized, then mirrored and mixed. Images per second depend on the current load of the machine; CPU
seconds per thousand images are the cost even if other programs share the cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from streaming_memory import write_folders
from timing import tell_row, write_figures

from dlfer.config.schema import StageConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import Split, StreamedSplit
from dlfer.data.pipeline import iterate_epoch
from dlfer.data.tfds_stream import load_tfds
from dlfer.model.backbones import BACKBONES
from dlfer.model.face_input import FaceInput

ARRAY = {"rotation": 15.0, "zoom": 0.1, "shift": 0.1, "mirror": 0.5, "mixup": 0.2}
STREAM = {"mirror": 0.5, "mixup": 0.2, "erasing": 0.1}


def make_arrays() -> Split:
    """Return as many images of noise as FER2013 has for training."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (28_709, 48, 48, 1), dtype=np.uint8)
    return Split("Training", images, np.arange(len(images)) % 7, np.arange(len(images)).astype(str))


def build_augment(image_size: int):
    """Return the compiled first part of a network in training: augmentation and preprocessing."""
    layer = FaceInput(image_size, BACKBONES["efficientnet_b3"].preprocessing.as_dict())
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda inputs: layer.prepare(inputs["image"], inputs, fill="nearest"))
    return lambda inputs: layer.prepare(inputs["image"], inputs, fill="nearest")


def measure(split: Split | StreamedSplit, config: StageConfig, *, seconds: float, with_augment: bool) -> dict:
    """Read and augment batches for `seconds`; return the number of images, images/s, and CPU time per 1,000 images."""
    augment = build_augment(config.image_size) if with_augment else lambda inputs: inputs["image"]
    num_images, start, cpu = 0, None, 0.0
    epoch = 0
    while start is None or time.monotonic() - start < seconds:
        for inputs, targets in iterate_epoch(split, config, num_labels=10, seed=0, epoch=epoch):
            # The conversion waits until the values are computed.
            np.asarray(augment(inputs))
            if start is None:
                # The first batch is excluded, since it includes tracing and the filling of buffers.
                start, cpu = time.monotonic(), time.process_time()
                continue
            num_images += len(targets)
            if time.monotonic() - start >= seconds:
                break
        epoch += 1
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    return {
        "images": num_images,
        "images_per_second": round(num_images / wall, 1),
        "cpu_seconds_per_1000_images": round(1000 * cpu / num_images, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    rows: list[dict] = []
    common = {"batch_size": options.batch_size, "image_size": options.image_size}
    with tempfile.TemporaryDirectory() as name:
        write_folders(Path(name), 5_000)
        data = {"source": "tfds", "name": "image_folder", "path": str(Path(name) / "images")}
        stream = load_tfds(DataConfig.model_validate(data), options.image_size).train
        arrays = make_arrays()
        for what, split, augment in (("array path", arrays, ARRAY), ("streamed path", stream, STREAM)):
            config = StageConfig.model_validate({"data": {"source": "synthetic_faces"}, "augment": augment, **common})
            for with_augment in (False, True):
                row = measure(split, config, seconds=options.seconds, with_augment=with_augment)
                step = "read, crop and augment" if with_augment else "read and crop alone"
                tell_row({"path": what, "step": step, **common, **row}, rows)
    write_figures(options.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy")


if __name__ == "__main__":
    main()
