"""Data whose faces are found, turned upright and evened out before anything else is done with it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from dlfer.config.sections import FacesConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.equalize import equalize
from dlfer.data.faces import align_face, crop_face, detect_faces_of_each
from dlfer.data.images import compute_side, resize_square
from dlfer.runs.files import read_npz

_CACHE_VERSION = 2
_PACKAGES = {"mtcnn": "mtcnn", "opencv": "opencv-python-headless", "none": None}
_CHUNK = 1024
"""Images that are kept together: what an interrupted preparation loses."""

_TALK_SECONDS = 20.0


def prepare_faces(
    bundle: DataBundle, config: FacesConfig, *, aspect: str = "crop", say: Callable[[str], None] | None = None
) -> DataBundle:
    """Return the bundle with the face of each image in its place, as a square of the images' shorter side.

    The face is the largest one found; aligned by the eyes, or the square around its box. Where none is
    found the image stays, made a square as `aspect` says, and how many these are is a note of the bundle.
    Under "pad" squares have the images' longer side.
    The step depends on each image's own pixels alone, so it can stand before any split; and it stands
    before one, so that duplicates are searched for in what is trained on: copies stay copies, and what the
    crop or the light made differ may become alike.

    What was done once is kept in $DLFER_CACHE, or ~/.cache/dlfer, for the very same images and section.
    It holds images: treat it like the data.

    Args:
        bundle: its splits in memory.
        config: what is done.
        aspect: what becomes of an image in which no face is found, see `dlfer.data.images.make_square`.
        say: told how far it is, every now and then.

    Raises:
        EnvironmentProblem: the detector's package is not installed.
    """
    notes, parts = list(bundle.notes), {}
    num_found = num_images = 0
    for part in ("train", "validation", "test"):
        split: Split | None = getattr(bundle, part)
        if split is None:
            parts[part] = None
            continue
        images, found, problem = _prepare_images(split.images, config, aspect=aspect, name=split.name, say=say)
        parts[part] = dataclasses.replace(split, images=images)
        num_found, num_images = num_found + int(found.sum()), num_images + len(found)
        if problem and problem not in notes:
            notes.append(problem)
    if config.detect != "none":
        done = "aligned by the eyes" if config.align else "cut out"
        notes.append(
            f"faces: found in {num_found:,} of {num_images:,} images ({num_found / max(1, num_images):.1%}) by "
            f"{config.detect} and {done}; of the others the whole image is used."
        )
    if config.equalize != "none":
        notes.append(f"faces: the light of every image is evened out ({config.equalize}).")
    return dataclasses.replace(bundle, **parts, notes=tuple(notes))


def prepare_split(
    split: Split, config: FacesConfig, *, aspect: str = "crop", say: Callable[[str], None] | None = None
) -> tuple[Split, np.ndarray]:
    """Return one split as `prepare_faces` prepares it, and bool [N], in which images a face was found."""
    images, found, _ = _prepare_images(split.images, config, aspect=aspect, name=split.name, say=say)
    return dataclasses.replace(split, images=images), found


def prepare_face(image: np.ndarray, config: FacesConfig, *, aspect: str = "crop") -> tuple[np.ndarray, bool]:
    """Return the face in one image, uint8 [H, W, C], as `prepare_faces` does it, and whether one was found."""
    images, found = _prepare_chunk(image[None], config, aspect)
    return images[0], bool(found[0])


def _prepare_images(
    images: np.ndarray, config: FacesConfig, *, aspect: str, name: str, say: Callable[[str], None] | None
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Return uint8 [N, S, S, C], bool [N] whether a face was found, and what hindered the cache, if anything did."""
    size = compute_side(*images.shape[1:3], aspect)
    prepared = np.zeros((len(images), size, size, images.shape[-1]), np.uint8)
    found, problem = np.zeros(len(images), bool), None
    start, last_said = time.monotonic(), time.monotonic()
    for first in range(0, len(images), _CHUNK):
        rows = slice(first, first + _CHUNK)
        path = _find_cache(images[rows], config, aspect)
        kept = _read_cache(path)
        if kept is None:
            kept = _prepare_chunk(images[rows], config, aspect)
            try:
                _write_cache(path, *kept)
            except OSError as error:
                problem = f"The prepared faces could not be kept for the next time in {path.parent} ({error.strerror})."
        prepared[rows], found[rows] = kept
        if say is not None and time.monotonic() - last_said > _TALK_SECONDS:
            last_said, done = time.monotonic(), min(first + _CHUNK, len(images))
            left = (last_said - start) / done * (len(images) - done) / 60
            say(f"faces: {name}, {done:,} of {len(images):,} images, about {left:.0f} min left")
    return prepared, found, problem


def _prepare_chunk(images: np.ndarray, config: FacesConfig, aspect: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [N, S, S, C] and bool [N], whether a face was found."""
    size = compute_side(*images.shape[1:3], aspect)
    nobody = [[] for _ in images]
    faces = nobody if config.detect == "none" else detect_faces_of_each(list(images), detector=config.detect)
    prepared = np.zeros((len(images), size, size, images.shape[-1]), np.uint8)
    for row, (image, in_image) in enumerate(zip(images, faces, strict=True)):
        if not in_image:
            pixels = resize_square(image, size, aspect)
        elif config.align:
            pixels = align_face(image, in_image[0].eyes, size)
        else:
            pixels = crop_face(image, in_image[0].box, size)
        prepared[row] = equalize(pixels, config.equalize)
    return prepared, np.array([bool(in_image) for in_image in faces])


def _find_cache(images: np.ndarray, config: FacesConfig, aspect: str) -> Path:
    """Return where the outcome for these images is kept; another version of the detector's package is another one."""
    package = _PACKAGES[config.detect]
    try:
        release = None if package is None else version(package)
    except PackageNotFoundError:
        release = "absent"
    key = repr((_CACHE_VERSION, config.model_dump(mode="json"), release, images.shape))
    # What was kept before there was a choice was cropped.
    digest = hashlib.sha256((key if aspect == "crop" else key + aspect).encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    folder = Path(os.environ.get("DLFER_CACHE") or "~/.cache/dlfer").expanduser()
    return folder / f"faces-{digest.hexdigest()[:16]}.npz"


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what `_write_cache` wrote, or None where there is nothing or it is damaged."""
    try:
        arrays = read_npz(path, names=("images", "found"))
    except (OSError, ValueError):  # written anew
        return None
    return arrays["images"], arrays["found"]


def _write_cache(path: Path, images: np.ndarray, found: np.ndarray) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, images=images, found=found)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
