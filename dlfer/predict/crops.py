"""Faces cut out of pictures in the way that the classifier's training images were.

Faces of videos are searched for on some frames, followed on those between, numbered and smoothed over time.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    warp_fast,
)
from dlfer.data.images import compute_side, equalize, resize_square, to_channels
from dlfer.errors import UserError
from dlfer.predict.media import Frame
from dlfer.predict.video import load_opencv

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
    side = get_cut_side(classifier)

    def cut(image: np.ndarray, face: Face) -> Crop:
        if is_ready or (trained.align and face.eyes is None):
            pixels = cut_ready_crop(image, face, side, trained_side=size, margin=MARGINS[detector])
        else:
            pixels = align_face(image, face.eyes, size) if trained.align else crop_face(image, face.box, size)
        left, top, width, height = face.box
        pixels = equalize(to_channels(pixels, channels), light)
        return Crop((left, top, left + width, top + height), face.score, pixels)

    return Cropper(lambda images: detect_faces_of_each(images, detector=detector, size=detector_size), cut)


def get_cut_side(classifier: Engine) -> int:
    """Return the side in pixels of the faces that are cut out of photographs.

    It is that of the training images. For a model of ready crops as they are (`data.faces` not set) whose network enlarges these,
    it is the network's, so that each face is interpolated once.
    """
    about = classifier.about
    size = int(about.face_size or classifier.image_size)
    if about.faces or not classifier.takes_any_size:
        return size
    return max(size, math.ceil(classifier.image_size / (classifier.crop or 1)))


DETAIL = 4 / 3
"""To how many sides of a training image a larger face is shrunk before it is sampled at the network's size. Shrunk to one, it
would be blurrier than those images, which no grid of pixels was laid over a second time; much more detail they do not have."""


def cut_ready_crop(
    image: np.ndarray, face: Face, size: int, *, margin: float = 0.0, trained_side: int | None = None
) -> np.ndarray:
    """Return a face as data sets of ready crops have them: the square around its box, upright if it tilts much.

    Args:
        image: uint8 [H, W, C].
        face: in it.
        size: side of the result in pixels.
        margin: of the box's longer side, on each edge.
        trained_side: of the ready crops, where the network enlarges them bilinearly to `size`: then the face is sampled once, in
            that way; sampled at their size and enlarged after it, it would be blurred twice. None: they have `size` itself.

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
    is_enlarged = trained_side is not None and trained_side < size
    # Of ready crops that are not enlarged: twice the size, then halved, since an interpolation on the final pixels would blur them,
    # and a bilinear one does even so where a face is as small as the result (results/found_faces.md).
    fine = size if is_enlarged else 2 * size
    turn = fine / side * cmath.exp(-1j * math.radians(_get_roll(face)))
    move = complex(fine / 2 - 0.5, fine / 2 - 0.5) - turn * complex(x - first_x, y - first_y)
    matrix = np.array([[turn.real, -turn.imag, move.real], [turn.imag, turn.real, move.imag]])
    if is_enlarged:
        return warp_fast(near, matrix, size, kernel="bilinear", resolution=round(DETAIL * trained_side))
    pixels = warp_fast(near, matrix, fine).reshape(size, 2, size, 2, -1).mean(axis=(1, 3))
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


MIN_OVERLAP = 0.3
"""Intersection over union at which two boxes are those of one face; between frames 40 ms apart it is above 0.8."""

MAX_GAP = 1.0
"""Seconds for which a face that is not found, behind a hand or by a whim of the detector, keeps its number."""


@dataclass
class _Track:
    number: int
    box: Box | None
    probabilities: np.ndarray
    seconds: float


class FaceTracker:
    """Follows the faces of one video.

    Boxes of a frame are matched with the last ones of known faces, the greatest overlap first. The smoothed
    probabilities are p + (1 - exp(-t / smooth)) (q - p), where p are the last ones, q those of the frame, and
    t the time between: an exponential average that does not depend on the rate of frames.

    Args:
        smooth: its time constant in seconds; 0: no smoothing.
    """

    def __init__(self, *, smooth: float = 0.5) -> None:
        self.smooth = smooth
        self._tracks: list[_Track] = []
        self._num_tracks = 0

    def update(
        self, boxes: Sequence[Box | None], probabilities: np.ndarray, seconds: float
    ) -> tuple[list[int], np.ndarray]:
        """Take the faces of the next frame; return their numbers, from 1, and smoothed probabilities.

        Args:
            boxes: x0, y0, x1, y1 of each of N faces; None: the whole picture.
            probabilities: float [N, C].
            seconds: time of the frame, not before that of the last one.
        """
        self._tracks = [track for track in self._tracks if seconds - track.seconds <= MAX_GAP]
        known = list(self._tracks)
        matches = match_boxes(boxes, [track.box for track in known])
        numbers, smoothed = [], np.array(probabilities, np.float64)
        for row, box in enumerate(boxes):
            if row not in matches:
                self._num_tracks += 1
                track = _Track(self._num_tracks, box, smoothed[row].copy(), seconds)
                self._tracks.append(track)
                numbers.append(track.number)
                continue
            track = known[matches[row]]
            if self.smooth > 0:
                weight = 1 - math.exp(-max(0.0, seconds - track.seconds) / self.smooth)
                smoothed[row] = track.probabilities + weight * (smoothed[row] - track.probabilities)
            track.box, track.probabilities, track.seconds = box, smoothed[row].copy(), seconds
            numbers.append(track.number)
        return numbers, smoothed


def match_boxes(
    first: Sequence[Box | None], second: Sequence[Box | None], *, least: float = MIN_OVERLAP
) -> dict[int, int]:
    """Return row in `first` -> row in `second`, each at most once, the greatest overlap first, none below `least`."""
    pairs = [(compute_overlap(a, b), row, place) for row, a in enumerate(first) for place, b in enumerate(second)]
    matches: dict[int, int] = {}
    taken: set[int] = set()
    for overlap, row, place in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap >= least and row not in matches and place not in taken:
            matches[row] = place
            taken.add(place)
    return matches


def compute_overlap(first: Box | None, second: Box | None) -> float:
    """Return the intersection of two boxes (x0, y0, x1, y1) over their union, in 0..1; None is the whole picture."""
    if first is None or second is None:
        return float(first is second)
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - common
    return common / union if union > 0 else 0.0


DETECTIONS_A_SECOND = 7.0
"""About so often faces are searched for in a video, unless it is said how often."""

SAME_FACE = 0.5
"""Intersection over union from which a face that was found twice is taken to have moved evenly in between."""


def choose_interval(detect_every: int | None, rate: float) -> int:
    """Return the k of "every k-th frame": as it is given, or, for None, by the rate in frames a second, 4 at 25 and 30."""
    return detect_every or max(1, round(rate / DETECTIONS_A_SECOND))


class FaceFinder:
    """Finds the faces in frames, whose detector looks at some frames of a video alone.

    Between two of these in a file each face moves evenly from the one place to the other. Where they do not hold the same
    faces at nearly the same places, the frame in their middle is looked at, too, and so on: a face that comes, goes or
    moves fast, and a cut of the video, are found where they are. Of a camera, which cannot be looked ahead in, faces are
    followed by the optical flow of the pixels.

    Args:
        detect: pictures, uint8 [H, W, 3] -> the faces in each, the largest first.
    """

    def __init__(self, detect: Callable[[Sequence[np.ndarray]], list[list[Face]]]) -> None:
        self._detect = detect
        self._last: tuple[Frame, list[Face]] | None = None

    def find(self, frames: Sequence[Frame], keys: Sequence[bool]) -> list[list[Face]]:
        """Return the faces in each of several frames, the largest first.

        Args:
            frames: pictures, or frames of one video that follow each other and those of the last call; of a camera one.
            keys: whether the detector looks at each; it does at the last one in any case.
        """
        video = frames[-1].video
        is_next = video is not None and self._last is not None and self._last[0].video is video
        if is_next and video.is_live and not any(keys):
            found = [follow_faces(self._last[1], self._last[0].image, frames[0].image)]
        else:
            found = self._detect_and_fill(frames, keys, self._last if is_next and not video.is_live else None)
        self._last = (frames[-1], found[-1]) if video is not None else None
        return found

    def _detect_and_fill(
        self, frames: Sequence[Frame], keys: Sequence[bool], before: tuple[Frame, list[Face]] | None
    ) -> list[list[Face]]:
        """Return the faces of frames of which the last one before may be known."""
        frames = [*([before[0]] if before else []), *frames]
        rows = [row for row, key in enumerate(keys, start=len(frames) - len(keys)) if key or row == len(frames) - 1]
        known = {0: before[1]} if before else {}
        gaps = list(pairwise(sorted({*known, *rows})))
        while rows:
            known.update(zip(rows, self._detect([frames[row].image for row in rows]), strict=True))
            rows, halves = [], []
            for start, end in gaps:
                pairs = _pair_faces(known[start], known[end])
                if end - start > 1 and pairs is None:
                    middle = (start + end) // 2
                    rows.append(middle)
                    halves += [(start, middle), (middle, end)]
                for row in range(start + 1, end if pairs is not None else 0):
                    known[row] = _sort([_mix(*pair, _get_share(frames, start, row, end)) for pair in pairs])
            gaps = halves
        return [known[row] for row in range(bool(before), len(frames))]


def _get_share(frames: Sequence[Frame], start: int, row: int, end: int) -> float:
    """Return when a frame is between two others, 0 to 1."""
    first, now, last = (frames[place].seconds or 0.0 for place in (start, row, end))
    return min(1.0, max(0.0, (now - first) / (last - first))) if last > first else (row - start) / (end - start)


def _to_box(face: Face) -> Box:
    left, top, width, height = face.box
    return left, top, left + width, top + height


def _sort(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: -face.box[2] * face.box[3])


def _pair_faces(first: Sequence[Face], second: Sequence[Face]) -> list[tuple[Face, Face]] | None:
    """Return the two places of each face; None where a face has one alone, or the two are far apart."""
    matches = match_boxes([_to_box(face) for face in first], [_to_box(face) for face in second], least=SAME_FACE)
    if not len(matches) == len(first) == len(second):
        return None
    return [(first[row], second[place]) for row, place in matches.items()]


def _mix(first: Face, second: Face, share: float) -> Face:
    """Return a face on its way from one place to another."""
    mixed = np.add(np.multiply(1 - share, first.box), np.multiply(share, second.box))
    has_marks = first.landmarks is not None and second.landmarks is not None
    marks = (1 - share) * first.landmarks + share * second.landmarks if has_marks else None
    return Face(tuple(map(float, mixed)), None, marks)


MIN_SIDE = 8.0
"""Pixels: a face of which less is left in the picture has gone."""

_GRID = 6
_MIN_POINTS = 6


def follow_faces(faces: Sequence[Face], before: np.ndarray, now: np.ndarray) -> list[Face]:
    """Return the faces of one frame at their places in the next, the largest first; those that left it are left out.

    The similarity that takes a grid of points in the box to where the optical flow (Lucas and Kanade, on a pyramid) finds
    them moves box and landmarks. Where it finds too few points a face stays where it was.

    Args:
        faces: in the first frame.
        before: the first frame, uint8 [H, W, 3].
        now: the next one; of another size all faces stay.
    """
    if not faces or before.shape != now.shape:
        return list(faces)
    cv2 = load_opencv()
    greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (before, now)]
    moved = [_move(cv2, face, greys) for face in faces]
    return _sort([face for face in moved if min(face.box[2:]) >= MIN_SIDE])


def _move(cv2, face: Face, greys: Sequence[np.ndarray]) -> Face:
    """Return a face at its place in the second of two grey frames, its box within the frame."""
    left, top, width, height = face.box
    steps = np.linspace(0.15, 0.85, _GRID)
    grid = np.stack(np.meshgrid(left + width * steps, top + height * steps), axis=-1).reshape(-1, 1, 2)
    points = grid.astype(np.float32)
    found, is_found, _ = cv2.calcOpticalFlowPyrLK(*greys, points, None, winSize=(15, 15), maxLevel=3)
    kept = is_found.ravel() == 1
    matrix = cv2.estimateAffinePartial2D(points[kept], found[kept])[0] if kept.sum() >= _MIN_POINTS else None
    if matrix is None:
        return Face(face.box, None, face.landmarks)
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    middle = matrix @ (left + width / 2, top + height / 2, 1)
    half = np.array([width, height]) * scale / 2
    size = greys[1].shape[1::-1]
    first, last = np.clip([middle - half, middle + half], 0, size)
    marks = None if face.landmarks is None else face.landmarks @ matrix[:, :2].T + matrix[:, 2]
    return Face((*map(float, first), *map(float, last - first)), None, marks)
