"""Faces cut out of pictures in the way that the classifier's training images were."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from dlfer.config.sections import FacesConfig
from dlfer.data.faces import Face, align_face, crop_face, detect_faces_of_each, prepare_face, warp_image
from dlfer.data.images import compute_side, equalize, resize_square, to_channels
from dlfer.errors import EnvironmentProblem, UserError
from dlfer.runs.records import About

FACES = ("auto", "mtcnn", "opencv", "whole")

MARGINS = {"mtcnn": -0.025, "opencv": 0.0}
"""Of a box's longer side, on each edge of it, for a model of ready crops: FER2013's end where the boxes end. The longer
side of MTCNN's is 1.05 of the crop's. On 530 faces of PublicTest in a wider frame, cut out so, a model that has 65.5 %
on the ready crops has 65.5 % again; with 0.0 it has 63.2 %, with the eyes put at FER2013's mean places 62.3 %."""

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


def build_cropper(
    faces: str, *, about: About, channels: int, image_size: int, aspect: str = "crop"
) -> Callable[[Sequence[np.ndarray]], list[list[Crop]]]:
    """Return what turns pictures, uint8 [H, W, 3], into the faces in each, the largest first.

    A model whose training images were found by a detector, aligned or evened out (its artifact says so) gets
    the faces in the same way. Another one was trained on ready crops, and gets such: see `cut_ready_crop`.

    Args:
        faces: "auto": the detector of the training, else mtcnn, else opencv, what is installed; "mtcnn";
            "opencv"; or "whole": every picture is the crop of one face.
        about: what the artifact tells of the training.
        channels: that the classifier takes, 1 or 3.
        image_size: side of a crop in pixels where the training images' own is not told.
        aspect: how the classifier makes squares of images; with "whole" pictures become squares in the same way.

    Raises:
        UserError: another value of `faces`.
        EnvironmentProblem: no detector is installed.
    """
    if faces not in FACES:
        raise UserError(f"faces: found {faces!r}, expected one of {', '.join(FACES)}.")
    trained = FacesConfig.model_validate(about.faces) if about.faces else None
    size = int(about.face_size or image_size)
    if faces == "whole":
        return lambda images: [[_take_whole(image, trained, channels, size, aspect)] for image in images]
    detector = choose_detector(faces, trained)
    is_ready = trained is None or trained.detect == "none"
    light = "none" if trained is None else trained.equalize

    def cut(image: np.ndarray, face: Face) -> Crop:
        if is_ready or (trained.align and face.eyes is None):
            pixels = cut_ready_crop(image, face, size, margin=MARGINS[detector])
        else:
            pixels = align_face(image, face.eyes, size) if trained.align else crop_face(image, face.box, size)
        left, top, width, height = face.box
        pixels = equalize(to_channels(pixels, channels), light)
        return Crop((left, top, left + width, top + height), face.score, pixels)

    def crop(images: Sequence[np.ndarray]) -> list[list[Crop]]:
        found = detect_faces_of_each(images, detector=detector)
        return [[cut(image, face) for face in in_image] for image, in_image in zip(images, found, strict=True)]

    return crop


def choose_detector(faces: str, trained: FacesConfig | None = None) -> str:
    """Return "mtcnn" or "opencv": the one named, that of the training, or the better one that is installed.

    Raises:
        EnvironmentProblem: with "auto" and neither installed.
    """
    if faces != "auto":
        return faces
    if trained is not None and trained.detect != "none":
        return trained.detect
    for detector, package in (("mtcnn", "mtcnn"), ("opencv", "cv2")):
        if find_spec(package) is not None:
            return detector
    raise EnvironmentProblem(
        "faces: no detector is installed. pip install mtcnn==1.0.0, or pip install 'opencv-python-headless<5'; "
        "or say --faces whole if every picture is the crop of one face."
    )


def cut_ready_crop(image: np.ndarray, face: Face, size: int, *, margin: float = 0.0) -> np.ndarray:
    """Return a face as data sets of ready crops have them: the square around its box, upright if it tilts much.

    Args:
        image: uint8 [H, W, C].
        face: in it.
        size: side of the result in pixels.
        margin: of the box's longer side, on each edge.

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
    # Twice the size, then halved: a bilinear step on the final pixels would blur them.
    fine = 2 * size
    turn = fine / side * cmath.exp(-1j * math.radians(_get_roll(face)))
    move = complex(fine / 2 - 0.5, fine / 2 - 0.5) - turn * complex(x - first_x, y - first_y)
    matrix = np.array([[turn.real, -turn.imag, move.real], [turn.imag, turn.real, move.imag]])
    pixels = warp_image(near, matrix, fine).reshape(size, 2, size, 2, -1).mean(axis=(1, 3))
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
