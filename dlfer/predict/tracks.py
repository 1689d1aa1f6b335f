"""Faces of videos: searched for on some frames, followed on those between, numbered and smoothed over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dlfer.data.faces import Face
from dlfer.predict.crops import Box
from dlfer.predict.media import Frame, load_opencv

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
