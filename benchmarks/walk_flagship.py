"""Short real run of experiments/dlfer.yaml: EfficientNet-B3 at 224 px, both stages with a few hundred steps each.

    python benchmarks/walk_flagship.py --images tiny_imagenet/train --csv fer2013.csv --out build/walk --steps 200

EF-FER1 streams a small prepared tfds data set (made here from class folders, with the feature and split names of
imagenet2012); EF-FER2 trains on FER2013. All settings are those of the file, except the data, the number of images, the
epochs (one), the batch size and the warm-up. The result, printed and written as JSON, has the images/s of each stage,
peak memory, and the accuracies, which after so few steps only show that the network learns. A stage takes about 15
minutes on two cores with 200 steps of 32 images.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

NAME = "walk_images"
FLAGSHIP = Path(__file__).parents[1] / "experiments" / "dlfer.yaml"


def prepare_tfds(images: Path, data_dir: Path, *, num_train: int, num_validation: int) -> None:
    """Write a prepared tfds data set from class folders of JPEG files, unless it exists.

    Args:
        images: folder with one folder of .JPEG files for each class.
        data_dir: the data folder of tfds.
        num_train, num_validation: number of images of each split, spread evenly over the classes.
    """
    if (data_dir / NAME).exists():
        return
    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image

    classes = sorted(path for path in images.iterdir() if path.is_dir())
    files = [
        sorted((folder / "images" if (folder / "images").is_dir() else folder).glob("*.JPEG")) for folder in classes
    ]
    rounds = -(-(num_train + num_validation) // len(classes))
    order = [(names[turn], label) for turn in range(rounds) for label, names in enumerate(files)]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=[c.name for c in classes]),
        }
    )

    def read(rows):
        for number, (path, label) in enumerate(rows):
            yield number, {"image": np.asarray(Image.open(path).convert("RGB")), "label": label}

    tfds.dataset_builders.store_as_tfds_dataset(
        name=NAME,
        version="1.0.0",
        features=features,
        split_datasets={
            "train": list(read(order[:num_train])),
            "validation": list(read(order[num_train : num_train + num_validation])),
        },
        data_dir=data_dir,
    )


def run_flagship(given: argparse.Namespace) -> Path:
    """Run the experiment with the overrides for a short run, and return the run's folder."""
    num_train = given.steps * given.batch
    overrides = {
        "experiment.name": "walk",
        "pretrain.data.name": NAME,
        "pretrain.data.path": given.out / "tfds",
        "pretrain.epochs": 1,
        "pretrain.batch_size": given.batch,
        "pretrain.schedule.warmup_epochs": 0.2,
        "finetune.data.path": given.csv,
        "finetune.data.num_images.train": num_train,
        "finetune.data.num_images.validation": given.validation,
        "finetune.epochs": 1,
        "finetune.batch_size": given.batch,
        "finetune.schedule.warmup_epochs": 0.2,
        "evaluate.num_train": 320,
    }
    command = [sys.executable, "-m", "dlfer", "run", str(FLAGSHIP), "--out", str(given.out / "runs")]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(FLAGSHIP.parents[1])})
    return max((given.out / "runs" / "walk").iterdir(), key=lambda path: path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--validation", type=int, default=320)
    given = parser.parse_args()
    prepare_tfds(given.images, given.out / "tfds", num_train=given.steps * given.batch, num_validation=given.validation)
    run = run_flagship(given)
    walked = {"steps": given.steps, "batch": given.batch}
    for stage in ("pretrain", "finetune"):
        with open(run / stage / "history.csv", newline="") as file:
            row = list(csv.DictReader(file))[-1]
        walked[stage] = {
            key: float(row[key]) for key in ("images_per_second", "train_loss", "train_accuracy", "seconds")
        }
    walked["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    (given.out / "walk.json").write_text(json.dumps(walked, indent=1) + "\n")
    print(json.dumps(walked, indent=1))


if __name__ == "__main__":
    main()
