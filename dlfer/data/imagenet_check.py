"""Whether ImageNet can be prepared here: its two archives, their sizes, and room on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dlfer.errors import MissingDataError

ARCHIVES = {
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
"""The files that are fetched by hand, with their sizes in bytes."""

MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
}
"""Told to the user, not computed: hashing 150 GB takes as long as reading them."""

FREE_BYTES = 300_000_000_000
"""What preparing takes besides the archives: the records, and as much again while they are shuffled."""


def check_imagenet2012(data_dir: str | Path | None) -> None:
    """Raise unless ImageNet is prepared under `data_dir`, or can be prepared from its archives there.

    tensorflow_datasets finds a missing or truncated archive only after hours; this takes no time
    and loads no TensorFlow.

    Args:
        data_dir: the folder of data sets; None is the default of tensorflow_datasets
            ($TFDS_DATA_DIR, or ~/tensorflow_datasets).

    Raises:
        MissingDataError: all that is wrong, and how ImageNet is obtained.
    """
    root = find_data_dir(data_dir)
    if any(root.glob("imagenet2012/5.*/dataset_info.json")):
        return
    manual = root / "downloads" / "manual"
    problems = [problem for name, size in ARCHIVES.items() if (problem := _describe_archive(manual / name, size))]
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES:
        problems.append(
            f"{root}: found {_show_gigabytes(free)} free on its disk, expected {_show_gigabytes(FREE_BYTES)} "
            "to prepare the data set"
        )
    if problems:
        raise MissingDataError("ImageNet cannot be prepared.\n  - " + "\n  - ".join(problems) + "\n" + _explain(manual))


def find_data_dir(data_dir: str | Path | None) -> Path:
    """Return the folder of data sets, as tensorflow_datasets finds it."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _describe_archive(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path}: not there, expected {size:,} bytes"
    found = path.stat().st_size
    if found != size:
        return f"{path}: found {found:,} bytes, expected {size:,}; fetch it again"
    return None


def _explain(manual: Path) -> str:
    sizes = " and ".join(f"{name} ({size:,} bytes, MD5 {MD5[name]})" for name, size in ARCHIVES.items())
    return (
        "Obtain ImageNet (ILSVRC 2012) from https://image-net.org: register, accept the terms (non-commercial research "
        f"and education), and put {sizes} into {manual}. "
        "The shortcut is the published weights: --set pretrain.weights=imagenet."
    )


def _show_gigabytes(size: int) -> str:
    return f"{size / 1e9:,.0f} GB"
