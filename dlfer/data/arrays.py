"""Arrays of one .npz file, read without pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.errors import DataError, MissingDataError
from dlfer.runs.files import read_npz

PARTS = ("train", "validation", "test")
_MEND = "Write the file by numpy.savez(path, images=..., targets=..., labels=...)."


def load_arrays(config: DataConfig) -> DataBundle:
    """Return the splits of an .npz file that holds plain arrays.

    Either `images`, `targets` and perhaps `ids`, one part for the protocol to split; or
    `train_images`, `train_targets`, perhaps `train_ids`, and the same with `validation_` and
    `test_`. Images are uint8 [N, H, W] or [N, H, W, 1 or 3], targets whole numbers [N] from 0, ids
    text [N], by default "<part>/<row>". `labels`, text [C], names the targets; without it they are
    "0", "1" and so on.

    Raises:
        MissingDataError: the file is not there.
        DataError: the file is damaged or pickled, or an array is absent or not as above.
    """
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such file. Set data.path to an .npz file. {_MEND}")
    arrays = _read_arrays(path)
    prefixes = {part: f"{part}_" for part in PARTS if f"{part}_images" in arrays}
    if "images" in arrays:
        if prefixes:
            raise DataError(f"{path}: found both images and {', '.join(arrays)}; expected parts, or one part.")
        prefixes = {"train": ""}
    if "train" not in prefixes:
        raise DataError(
            f"{path}: found the arrays {', '.join(arrays) or '(none)'}, expected images and targets, "
            f"or train_images and train_targets. {_MEND}"
        )
    splits: dict[str, Split | None] = dict.fromkeys(PARTS)
    for part, prefix in prefixes.items():
        splits[part] = _to_split(path, arrays, part, prefix)
    most = max(int(split.targets.max()) for split in splits.values() if split is not None)
    labels = arrays.get("labels", np.array([str(target) for target in range(most + 1)]))
    if labels.dtype.kind != "U" or labels.ndim != 1 or len(labels) <= most or len(set(labels.tolist())) < len(labels):
        raise DataError(
            f"{path}: labels is {labels.dtype} {labels.shape}, expected distinct text names, at least {most + 1} "
            f"(the largest target is {most})."
        )
    return DataBundle("arrays", tuple(labels.tolist()), **splits)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as an .npz of plain arrays ({error}). Pickled (object) arrays are refused, "
            f"since reading one can run any code. {_MEND}"
        ) from error


def _to_split(path: Path, arrays: dict[str, np.ndarray], part: str, prefix: str) -> Split:
    if f"{prefix}targets" not in arrays:
        raise DataError(f"{path}: found {prefix}images without {prefix}targets. {_MEND}")
    images, targets = arrays[f"{prefix}images"], arrays[f"{prefix}targets"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{path}: {prefix}images is {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 1 or 3] "
            "with values 0..255."
        )
    if targets.dtype.kind not in "iu" or targets.ndim != 1:
        raise DataError(f"{path}: {prefix}targets is {targets.dtype} {targets.shape}, expected whole numbers [N].")
    if not len(targets):
        raise DataError(f"{path}: {prefix}targets is empty, expected at least one image.")
    ids = arrays.get(f"{prefix}ids", np.array([f"{part}/{row}" for row in range(len(targets))]))
    if ids.dtype.kind != "U":
        raise DataError(f"{path}: {prefix}ids is {ids.dtype}, expected text.")
    return Split(part, images[..., None] if images.ndim == 3 else images, targets.astype(np.int64), ids)
