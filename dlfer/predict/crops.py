"""Faces cut out of pictures in the way that the classifier's training images were."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dlfer.config.sections import FacesConfig
from dlfer.data.faces import (
    DETECTORS,
    Face,
    align_face,
    crop_face,
    detect_faces_of_each,
    prepare_face,
    warp_image_cubic,
)
from dlfer.data.images import compute_side, equalize, resize_square, to_channels
from dlfer.errors import UserError

if TYPE_CHECKING:
    from dlfer.predict.engines import Engine

FACES = ("auto", *DETECTORS, "whole")

MARGINS = {"centerface": -0.025, "mtcnn": -0.025, "opencv": 0.0}
"""Of a box's longer side, on each edge of it, for a model of ready crops: FER2013's end about where the boxes end. In
photographs eyes and mouth then stand as in FER2013's crops, to 1 % of the scale, with centerface; other scales and heights
are not better (results/found_faces.md). With a bilinear cut, 1,032 faces of PublicTest that both find: 66.7 % with
centerface and 66.1 % with mtcnn, where the ready crops have 69.2 %."""

MAX_ROLL = 15.0
"""Degrees: a head tilted by more is turned upright. FER2013's tilt by 9 (standard deviation), as a model of them knows."""

MIN_EYE_DISTANCE = 0.28
"""Of the box's longer side; of 95 % of FER2013's faces it is above 0.33. Below it a head is turned to the side, and the
line of its eyes no measure of its tilt."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Crop:
    """A face as the classifier gets it.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the picture; None: the picture is taken for a face.
        score: the detector's; None without one.
        pixels: uint8 [S, S, C].
    """

    box: Box | None
    score: float | None
    pixels: np.ndarray


@dataclass(frozen=True)
class Cropper:
    """Turns pictures, uint8 [H, W, 3], into the faces in each, the largest first.

    Attributes:
        detect: pictures -> the faces in each, the largest first; None: every picture is one.
        cut: a picture and a face in it -> the crop; the face is None where the picture is one.
    """

    detect: Callable[[Sequence[np.ndarray]], list[list[Face]]] | None
    cut: Callable[[np.ndarray, Face | None], Crop]

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Crop]]:
        found = [[None] for _ in images] if self.detect is None else self.detect(images)
        return [[self.cut(image, face) for face in in_image] for image, in_image in zip(images, found, strict=True)]


def build_cropper(faces: str, classifier: Engine, *, detector_size: int | None = None) -> Cropper:
    """Return what turns pictures into the faces in each.

    A model whose training images were found by a detector, aligned or evened out (its artifact says so) gets
    the faces in the same way. Another one was trained on ready crops, and gets such: see `cut_ready_crop`.

    Args:
        faces: "auto": the detector of the training, else centerface; "centerface", "mtcnn" or "opencv"; or "whole":
            every picture is the crop of one face.
        classifier: that gets the faces. Its artifact tells how those of its training were made; with "whole" pictures become
            squares as it makes them.
        detector_size: longest side in pixels to which larger pictures are shrunk before faces are searched for; None: that of
            the training, else the detector's own.

    Raises:
        UserError: another value of `faces` or `detector_size`.
        EnvironmentProblem: the detector's package is not installed; it is known when faces are searched for.
    """
    if faces not in FACES:
        raise UserError(f"faces: found {faces!r}, expected one of {', '.join(FACES)}.")
    is_number = isinstance(detector_size, int) and not isinstance(detector_size, bool)
    if detector_size is not None and not (is_number and 64 <= detector_size <= 4096):
        raise UserError(f"detector size: found {detector_size!r}, expected a whole number of pixels, 64 to 4096.")
    about, channels, aspect = classifier.about, classifier.channels, classifier.aspect
    trained = FacesConfig.model_validate(about.faces) if about.faces else None
    size = int(about.face_size or classifier.image_size)
    if faces == "whole":
        return Cropper(None, lambda image, _: _take_whole(image, trained, channels, size, aspect))
    is_ready = trained is None or trained.detect == "none"
    detector = faces if faces != "auto" else "centerface" if is_ready else trained.detect
    if detector_size is None and trained is not None and trained.detect == detector:
        detector_size = trained.size
    light = "none" if trained is None else trained.equalize

    def cut(image: np.ndarray, face: Face) -> Crop:
        if is_ready or (trained.align and face.eyes is None):
            pixels = cut_ready_crop(image, face, size, margin=MARGINS[detector])
        else:
            pixels = align_face(image, face.eyes, size) if trained.align else crop_face(image, face.box, size)
        left, top, width, height = face.box
        pixels = equalize(to_channels(pixels, channels), light)
        return Crop((left, top, left + width, top + height), face.score, pixels)

    return Cropper(lambda images: detect_faces_of_each(images, detector=detector, size=detector_size), cut)


def cut_ready_crop(
    image: np.ndarray,
    face: Face,
    size: int,
    *,
    margin: float = 0.0,
    warp: Callable[[np.ndarray, np.ndarray, int], np.ndarray] = warp_image_cubic,
) -> np.ndarray:
    """Return a face as data sets of ready crops have them: the square around its box, upright if it tilts much.

    Args:
        image: uint8 [H, W, C].
        face: in it.
        size: side of the result in pixels.
        margin: of the box's longer side, on each edge.
        warp: how pixels are interpolated, as `dlfer.data.faces.warp_image` does it or sharper.

    Returns:
        uint8 [size, size, C]; what lies outside of the image continues its edge.
    """
    left, top, width, height = face.box
    side = max(width, height) * (1 + 2 * margin)
    x, y = left + width / 2 - 0.5, top + height / 2 - 0.5
    # Only the neighbourhood is resized: half the diagonal of the square, and some.
    reach = math.ceil(0.75 * side) + 2
    first_x, first_y = max(0, int(x) - reach), max(0, int(y) - reach)
    near = image[first_y : int(y) + reach + 1, first_x : int(x) + reach + 1]
    # Twice the size, then halved: an interpolation on the final pixels would blur them, and a bilinear one does even so
    # where a face is as small as the result (results/found_faces.md).
    fine = 2 * size
    turn = fine / side * cmath.exp(-1j * math.radians(_get_roll(face)))
    move = complex(fine / 2 - 0.5, fine / 2 - 0.5) - turn * complex(x - first_x, y - first_y)
    matrix = np.array([[turn.real, -turn.imag, move.real], [turn.imag, turn.real, move.imag]])
    pixels = warp(near, matrix, fine).reshape(size, 2, size, 2, -1).mean(axis=(1, 3))
    return (pixels + 0.5).astype(np.uint8)


def _get_roll(face: Face) -> float:
    """Return by how many degrees a head tilts; 0 if it is little or not known."""
    if face.eyes is None:
        return 0.0
    across, down = face.eyes[1] - face.eyes[0]
    roll = math.degrees(math.atan2(down, across))
    is_frontal = math.hypot(across, down) >= MIN_EYE_DISTANCE * max(face.box[2:])
    return roll if is_frontal and abs(roll) > MAX_ROLL else 0.0


def _take_whole(image: np.ndarray, trained: FacesConfig | None, channels: int, size: int, aspect: str) -> Crop:
    """Return the picture, made a square as `aspect` says, as the one face; small ones in their own size."""
    pixels = to_channels(image, channels)
    if trained is not None:
        pixels = prepare_face(pixels, trained, aspect=aspect)[0]
    return Crop(None, None, resize_square(pixels, min(size, compute_side(*pixels.shape[:2], aspect)), aspect))
