"""Memory during an epoch in which a large data set is streamed: the table of docs/scale.md.

    python benchmarks/streaming_memory.py                      100,000 images in class folders, and as records
    python benchmarks/streaming_memory.py --images 1281167     as many as in ImageNet: hours on two cores

The images are synthetic: 200 different JPEG files of 500 x 375 pixels, smooth patterns with noise, which are repeated
to the required number by hard links, or in the records. The resident memory of the process is read from /proc after
every twentieth of the epoch, so this needs Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dlfer.config.sections import DataConfig, NumImages
from dlfer.data.bundle import StreamedSplit
from dlfer.data.tfds_stream import load_tfds

NUM_FILES, NUM_CLASSES, WIDTH, HEIGHT = 200, 10, 500, 375
POINTS = 20
NUM_SHARDS = 32


def encode_image(number: int) -> bytes:
    """Return a JPEG of a smooth random pattern with noise, about as large as a photograph of ImageNet (110 kB)."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(image + rng.normal(0, 14, image.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_folders(folder: Path, num_images: int) -> None:
    """Write class folders in train/ and validation/, with `num_images` images and one percent of that number."""
    originals = folder / "originals"
    originals.mkdir(parents=True)
    for number in range(NUM_FILES):
        (originals / f"{number}.jpg").write_bytes(encode_image(number))
    for part, count in (("train", num_images), ("validation", max(NUM_CLASSES, num_images // 100))):
        for label in range(NUM_CLASSES):
            (folder / "images" / part / f"class{label}").mkdir(parents=True)
        for number in range(count):
            name = folder / "images" / part / f"class{number % NUM_CLASSES}" / f"{number:07d}.jpg"
            os.link(originals / f"{number % NUM_FILES}.jpg", name)


def write_records(folder: Path, num_images: int) -> None:
    """Write a prepared data set of tensorflow_datasets, "fake_photos", to `folder`."""
    import tensorflow_datasets as tfds

    encoded = [encode_image(number) for number in range(NUM_FILES)]

    class FakePhotos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        MODULE_NAME = "benchmarks"

        def _info(self):
            labels = tfds.features.ClassLabel(names=[f"class{label}" for label in range(NUM_CLASSES)])
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": labels})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            validation = max(NUM_SHARDS, num_images // 100)
            return {"train": self._generate_examples(num_images), "validation": self._generate_examples(validation)}

        def _generate_examples(self, count):
            for number in range(count):
                image = io.BytesIO(encoded[number % NUM_FILES])
                yield number, {"image": image, "label": number % NUM_CLASSES}

    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=NUM_SHARDS)
    FakePhotos(data_dir=str(folder)).download_and_prepare(download_config=config)


def read_resident() -> float:
    """Return the resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(split: StreamedSplit, batch_size: int) -> list[float]:
    """Stream one epoch; return the resident megabytes after each twentieth of it."""
    steps = len(split) // batch_size
    marks = set(np.linspace(steps / POINTS, steps, min(steps, POINTS)).astype(int).tolist())
    found = []
    for step, _ in enumerate(split.batches(batch_size, seed=0, epoch=0, training=True), start=1):
        if step in marks:
            found.append(read_resident())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--records", type=int, default=10_000, help="images in records, each written in full")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder, removed at the end)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for kind, count in (("image_folder", options.images), ("fake_photos", options.records)):
            if not count:
                continue
            folder = Path(name) / kind
            write = write_folders if kind == "image_folder" else write_records
            write(folder, count)
            path = folder / "images" if kind == "image_folder" else folder
            given = DataConfig(source="tfds", name=kind, path=str(path), num_images=NumImages())
            split = load_tfds(given, options.image_size).train
            before = read_resident()
            found = measure(split, options.batch_size)
            row = {
                "kind": "class folders" if kind == "image_folder" else "records",
                "images": len(split),
                "before": round(before),
                "after_each_twentieth": [round(value) for value in found],
                "growth_in_the_second_half": round(found[-1] - found[len(found) // 2]),
            }
            print(json.dumps(row), flush=True)
    print("megabytes resident; memory is bounded if the second half adds nothing", file=sys.stderr)


if __name__ == "__main__":
    main()
