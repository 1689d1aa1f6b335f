"""Face crops made in the same way as the classifier's training images, and face tracking in videos.

In videos the detector runs on some frames, and faces are followed in between, numbered, and smoothed over time.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
from dlfer.predict.engines import Engine, get_crop_size
from dlfer.predict.media import Frame
from dlfer.predict.video import load_opencv

FACES = ("auto", *DETECTORS, "whole")

MARGINS = {"centerface": -0.025, "mtcnn": -0.025, "opencv": 0.0}
"""Margin on each edge of a box relative to its longer side, for models trained on ready-made crops: FER2013's end about
where the boxes end. With centerface, eyes and mouth in photographs are then as in FER2013, to 1 % of the scale; other
scales and heights are not better (results/found_faces.md). Accuracy with bilinear crops of the 1,032 faces in
PublicTest that both detectors find: centerface 66.7 %, mtcnn 66.1 %, and 69.2 % with the ready-made crops."""

MAX_ROLL = 15.0
"""Roll in degrees above which a head is turned upright; models trained on FER2013 saw a standard deviation of 9."""

MIN_EYE_DISTANCE = 0.28
"""Distance of the eyes relative to the box's longer side; 95 % of FER2013's faces have more than 0.33. Below it the
head is turned to the side, and the line through the eyes does not measure its roll."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Crop:
    """A face crop as the classifier receives it.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the picture; None: the whole picture is the face.
        score: the detector's; None without a detector, and for a face followed from other frames of a video.
        pixels: uint8 [S, S, C].
    """

    box: Box | None
    score: float | None
    pixels: np.ndarray


@dataclass(frozen=True)
class Cropper:
    """A function of pictures, uint8 [H, W, 3], that returns the face crops of each, the largest first.

    Attributes:
        detect: pictures -> the faces in each, the largest first; None: every picture is one face.
        cut: a picture and a face in it -> the crop; the face is None if the whole picture is the face.
    """

    detect: Callable[[Sequence[np.ndarray]], list[list[Face]]] | None
    cut: Callable[[np.ndarray, Face | None], Crop]

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Crop]]:
        found = [[None] for _ in images] if self.detect is None else self.detect(images)
        return [[self.cut(image, face) for face in in_image] for image, in_image in zip(images, found, strict=True)]


def build_cropper(faces: str, classifier: Engine, *, detector_size: int | None = None) -> Cropper:
    """Build the cropper that prepares faces for a classifier.

    If the classifier's training images were detected, aligned or equalised according to its artifact, faces are treated
    in the same way. Otherwise it was trained on ready-made crops, and faces are cropped to match: see `crop_face_square`.

    Args:
        faces: "auto": the detector of the training, else centerface; "centerface", "mtcnn" or "opencv"; or "whole":
            every picture is the crop of one face.
        classifier: that receives the faces. Its artifact records how its training images were made; with "whole", its
            `aspect` decides how pictures are made square.
        detector_size: longest side in pixels to which larger pictures are shrunk for detection; None: the value used in
            training if that was with the same detector, else the detector's default.

    Raises:
        UserError: `faces` or `detector_size` is invalid.
        EnvironmentProblem: the detector's package is not installed; this is raised by the first detection.
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
        return Cropper(None, lambda image, _: _crop_whole_picture(image, trained, channels, size, aspect))
    is_ready = trained is None or trained.detect == "none"
    detector = faces if faces != "auto" else "centerface" if is_ready else trained.detect
    if detector_size is None and trained is not None and trained.detect == detector:
        detector_size = trained.size
    light = "none" if trained is None else trained.equalize
    side = get_crop_size(classifier)

    def cut(image: np.ndarray, face: Face) -> Crop:
        if is_ready or (trained.align and face.eyes is None):
            pixels = crop_face_square(image, face, side, trained_side=size, margin=MARGINS[detector])
        else:
            pixels = align_face(image, face.eyes, size) if trained.align else crop_face(image, face.box, size)
        left, top, width, height = face.box
        pixels = equalize(to_channels(pixels, channels), light)
        return Crop((left, top, left + width, top + height), face.score, pixels)

    return Cropper(lambda images: detect_faces_of_each(images, detector=detector, size=detector_size), cut)


DETAIL = 4 / 3
"""Multiple of a training image's side to which a larger face is shrunk before it is sampled at the network's size. At 1
it would be blurrier than the training images, which were resampled only once; they do not have much more detail."""


def crop_face_square(
    image: np.ndarray, face: Face, size: int, *, margin: float = 0.0, trained_side: int | None = None
) -> np.ndarray:
    """Return a face cropped as in data sets of ready-made crops: the square around its box, upright if it tilts much.

    Args:
        image: uint8 [H, W, C].
        face: a face in the image.
        size: side of the result in pixels.
        margin: added on each edge of the box, relative to its longer side.
        trained_side: side of the training crops if the network enlarges them bilinearly to `size`: the face is sampled
            once in the same way, since cropping at their size and enlarging would blur it twice. None: it is `size`.

    Returns:
        uint8 [size, size, C]; edge pixels are repeated outside of the image.
    """
    left, top, width, height = face.box
    side = max(width, height) * (1 + 2 * margin)
    x, y = left + width / 2 - 0.5, top + height / 2 - 0.5
    # Resample only the neighbourhood: half the diagonal of the square (0.71 of its side) and a margin.
    reach = math.ceil(0.75 * side) + 2
    first_x, first_y = max(0, int(x) - reach), max(0, int(y) - reach)
    near = image[first_y : int(y) + reach + 1, first_x : int(x) + reach + 1]
    is_enlarged = trained_side is not None and trained_side < size
    # Without enlargement, sample at twice the size and halve: interpolating at the final size would blur the face, and
    # bilinear interpolation would blur it even so if it is as small as the result (results/found_faces.md).
    fine = size if is_enlarged else 2 * size
    turn = fine / side * cmath.exp(-1j * math.radians(_get_roll(face)))
    move = complex(fine / 2 - 0.5, fine / 2 - 0.5) - turn * complex(x - first_x, y - first_y)
    matrix = np.array([[turn.real, -turn.imag, move.real], [turn.imag, turn.real, move.imag]])
    if is_enlarged:
        return warp_fast(near, matrix, size, kernel="bilinear", resolution=round(DETAIL * trained_side))
    pixels = warp_fast(near, matrix, fine).reshape(size, 2, size, 2, -1).mean(axis=(1, 3))
    return (pixels + 0.5).astype(np.uint8)


def _get_roll(face: Face) -> float:
    """Return the roll of a head in degrees; 0 if it is at most `MAX_ROLL` or cannot be measured."""
    if face.eyes is None:
        return 0.0
    across, down = face.eyes[1] - face.eyes[0]
    roll = math.degrees(math.atan2(down, across))
    is_frontal = math.hypot(across, down) >= MIN_EYE_DISTANCE * max(face.box[2:])
    return roll if is_frontal and abs(roll) > MAX_ROLL else 0.0


def _crop_whole_picture(image: np.ndarray, trained: FacesConfig | None, channels: int, size: int, aspect: str) -> Crop:
    """Return the whole picture as one face, made square according to `aspect`; small pictures are not enlarged."""
    pixels = to_channels(image, channels)
    if trained is not None:
        pixels = prepare_face(pixels, trained, aspect=aspect)[0]
    return Crop(None, None, resize_square(pixels, min(size, compute_side(*pixels.shape[:2], aspect)), aspect))


MIN_OVERLAP = 0.3
"""Intersection over union from which two boxes count as one face; between frames 40 ms apart it is above 0.8."""

MAX_GAP = 1.0
"""Seconds for which a face keeps its number while it is not found, e.g. covered by a hand or missed by the detector."""


@dataclass
class _Track:
    number: int
    box: Box | None
    probabilities: np.ndarray
    seconds: float


class FaceTracker:
    """A tracker that numbers the faces of one video and smooths their probabilities.

    Boxes of a frame are matched with the previous ones of known faces, the greatest overlap first. The smoothed
    probabilities are p + (1 - exp(-t / smooth)) (q - p), where p are the previous ones, q those of the frame, and
    t the time between: an exponential moving average that does not depend on the frame rate.

    Args:
        smooth: time constant of the average in seconds; 0: no smoothing.
    """

    def __init__(self, *, smooth: float = 0.5) -> None:
        self.smooth = smooth
        self._tracks: list[_Track] = []
        self._num_tracks = 0

    def update(
        self, boxes: Sequence[Box | None], probabilities: np.ndarray, seconds: float
    ) -> tuple[list[int], np.ndarray]:
        """Add the faces of the next frame; return their numbers, from 1, and smoothed probabilities float64 [N, C].

        Args:
            boxes: x0, y0, x1, y1 of each of N faces; None: the whole picture.
            probabilities: float [N, C].
            seconds: time of the frame, not before that of the previous one.
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
    """Match boxes greedily by overlap, at least `least`; return index in `first` -> index in `second`."""
    pairs = [(compute_overlap(a, b), row, place) for row, a in enumerate(first) for place, b in enumerate(second)]
    matches: dict[int, int] = {}
    taken: set[int] = set()
    for overlap, row, place in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap >= least and row not in matches and place not in taken:
            matches[row] = place
            taken.add(place)
    return matches


def compute_overlap(first: Box | None, second: Box | None) -> float:
    """Return the intersection over union of boxes (x0, y0, x1, y1); None is the whole picture: 1 with None, else 0."""
    if first is None or second is None:
        return float(first is second)
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - common
    return common / union if union > 0 else 0.0


DETECTIONS_A_SECOND = 7.0
"""Approximate number of detections per second of a video if `detect_every` is not given."""

SAME_FACE = 0.5
"""Intersection over union of two detections from which the face's positions in between are interpolated linearly."""


def choose_interval(detect_every: int | None, rate: float) -> int:
    """Return the frames per detection: `detect_every`, or if that is None one by the frame rate, 4 at 25 and 30 fps."""
    return detect_every or max(1, round(rate / DETECTIONS_A_SECOND))


class FaceFinder:
    """A face finder that runs the detector on only some frames of a video.

    Between two of these frames in a file, face positions are interpolated linearly. If the two do not have the same
    faces at nearly the same positions, the detector also runs on the frame in the middle, and so on recursively: this
    locates faces that appear, vanish or move fast, and cuts of the video. In a camera's frames, of which later ones are
    not yet known, faces are followed by optical flow.

    Args:
        detect: pictures, uint8 [H, W, 3] -> the faces in each, the largest first.
    """

    def __init__(self, detect: Callable[[Sequence[np.ndarray]], list[list[Face]]]) -> None:
        self._detect = detect
        self._last: tuple[Frame, list[Face]] | None = None

    def find(self, frames: Sequence[Frame], keys: Sequence[bool]) -> list[list[Face]]:
        """Return the faces in each of several frames, the largest first.

        Args:
            frames: pictures, or consecutive frames of one video that follow those of the last call; of a camera, one.
            keys: whether the detector runs on each frame; except for a camera, it always runs on the last one.
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
        """Return the faces of frames; `before` is the previous frame with its faces, if there is one."""
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
    """Return the relative time of a frame between two others, 0 to 1, or its relative index if no time has passed."""
    first, now, last = (frames[place].seconds or 0.0 for place in (start, row, end))
    return min(1.0, max(0.0, (now - first) / (last - first))) if last > first else (row - start) / (end - start)


def _to_box(face: Face) -> Box:
    left, top, width, height = face.box
    return left, top, left + width, top + height


def _sort(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: -face.box[2] * face.box[3])


def _pair_faces(first: Sequence[Face], second: Sequence[Face]) -> list[tuple[Face, Face]] | None:
    """Return pairs of the same face in two frames; None unless every face has a partner with enough overlap."""
    matches = match_boxes([_to_box(face) for face in first], [_to_box(face) for face in second], least=SAME_FACE)
    if not len(matches) == len(first) == len(second):
        return None
    return [(first[row], second[place]) for row, place in matches.items()]


def _mix(first: Face, second: Face, share: float) -> Face:
    """Return a face interpolated linearly between two positions."""
    mixed = np.add(np.multiply(1 - share, first.box), np.multiply(share, second.box))
    has_marks = first.landmarks is not None and second.landmarks is not None
    marks = (1 - share) * first.landmarks + share * second.landmarks if has_marks else None
    return Face(tuple(map(float, mixed)), None, marks)


MIN_SIDE = 8.0
"""Pixels; a tracked face whose box within the picture has a shorter side is dropped."""

_GRID = 6
_MIN_POINTS = 6


def follow_faces(faces: Sequence[Face], before: np.ndarray, now: np.ndarray) -> list[Face]:
    """Return the faces of one frame at their positions in the next, the largest first, without those that left it.

    Box and landmarks are moved by the similarity transform that fits the optical flow (pyramidal Lucas-Kanade) of a
    grid of points in the box. If too few points are found, a face keeps its position.

    Args:
        faces: in the first frame.
        before: the first frame, uint8 [H, W, 3].
        now: the next frame; if it has another size, all faces keep their positions.
    """
    if not faces or before.shape != now.shape:
        return list(faces)
    cv2 = load_opencv()
    greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (before, now)]
    moved = [_move(cv2, face, greys) for face in faces]
    return _sort([face for face in moved if min(face.box[2:]) >= MIN_SIDE])


def _move(cv2, face: Face, greys: Sequence[np.ndarray]) -> Face:
    """Return a face at its position in the second of two grey frames, with its box clipped to the frame."""
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
