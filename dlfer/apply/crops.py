"""Faces cut out of pictures in the way that the classifier's training images were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from dlfer.config.schema import FacesConfig
from dlfer.data.equalize import equalize
from dlfer.data.face_crops import prepare_face
from dlfer.data.faces import Face, align_face, crop_face, detect_faces_of_each
from dlfer.data.images import resize_square, to_channels
from dlfer.errors import EnvironmentProblem, UserError

FACES = ("auto", "mtcnn", "opencv", "whole")

MARGIN = 0.0
"""Of a box's longer side, added on each edge of it for a model of ready crops. FER2013's are as tight as the boxes
themselves: the longer side of OpenCV's is 0.98 of the crop's, of MTCNN's 1.00 (medians, n = 166 and 181)."""

MIN_EYE_DISTANCE = 0.28
"""Of the box's longer side; of 95 % of FER2013's faces it is above 0.33. Below it a head is turned to the side, and the
distance of its eyes no measure of its size."""

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
    faces: str, *, about: Mapping[str, Any], channels: int, image_size: int
) -> Callable[[Sequence[np.ndarray]], list[list[Crop]]]:
    """Return what turns pictures, uint8 [H, W, 3], into the faces in each, the largest first.

    A model whose training images were found by a detector, aligned or evened out (its artifact says so) gets
    the faces in the same way. Another one was trained on ready crops: with mtcnn the eyes are put where those
    of FER2013 are, with opencv the square of the box is cut out.

    Args:
        faces: "auto": the detector of the training, else mtcnn, else opencv, what is installed; "mtcnn";
            "opencv"; or "whole": every picture is the crop of one face.
        about: what the artifact tells of the training.
        channels: that the classifier takes, 1 or 3.
        image_size: side of a crop in pixels where the training images' own is not told.

    Raises:
        UserError: another value of `faces`.
        EnvironmentProblem: no detector is installed.
    """
    if faces not in FACES:
        raise UserError(f"faces: found {faces!r}, expected one of {', '.join(FACES)}.")
    trained = FacesConfig.model_validate(about["faces"]) if about.get("faces") else None
    size = int(about.get("face_size") or image_size)
    if faces == "whole":
        return lambda images: [[_take_whole(image, trained, channels, size)] for image in images]
    detector = choose_detector(faces, trained)
    # Faces are aligned as in training; of ready crops nobody knows, and FER2013's places of the eyes are taken.
    by_eyes = trained.align if trained is not None and trained.detect != "none" else True
    light = trained.equalize if trained is not None else "none"

    def crop(images: Sequence[np.ndarray]) -> list[list[Crop]]:
        found = detect_faces_of_each(images, detector=detector)
        return [
            [_cut(image, face, by_eyes=by_eyes, size=size, channels=channels, light=light) for face in in_image]
            for image, in_image in zip(images, found, strict=True)
        ]

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


def _cut(image: np.ndarray, face: Face, *, by_eyes: bool, size: int, channels: int, light: str) -> Crop:
    left, top, width, height = face.box
    eyes = face.eyes
    if by_eyes and eyes is not None and np.hypot(*(eyes[1] - eyes[0])) >= MIN_EYE_DISTANCE * max(width, height):
        pixels = align_face(image, eyes, size)
    else:
        more = MARGIN * max(width, height)
        pixels = crop_face(image, (left - more, top - more, width + 2 * more, height + 2 * more), size)
    pixels = equalize(to_channels(pixels, channels), light)
    return Crop((left, top, left + width, top + height), face.score, pixels)


def _take_whole(image: np.ndarray, trained: FacesConfig | None, channels: int, size: int) -> Crop:
    """Return the picture, its centred square, as the one face; small ones in their own size."""
    pixels = to_channels(image, channels)
    if trained is not None:
        pixels = prepare_face(pixels, trained)[0]
    return Crop(None, None, resize_square(pixels, min(size, *pixels.shape[:2])))
