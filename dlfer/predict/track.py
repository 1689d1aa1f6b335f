"""Faces followed through a film: each keeps its number, and its probabilities are smoothed over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlfer.predict.crops import Box

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
    """Follows the faces of one film.

    Boxes of a frame are matched with the last ones of known faces, the greatest overlap first. The smoothed
    probabilities are p + (1 - exp(-t / smooth)) (q - p), where p are the last ones, q those of the frame, and
    t the time between: an exponential average that does not depend on the rate of frames.

    Args:
        smooth: its time constant in seconds; 0: no smoothing.
        max_gap: seconds after which a face that was not seen is forgotten.
        min_overlap: intersection over union below which two boxes are of different faces.
    """

    def __init__(self, *, smooth: float = 0.5, max_gap: float = MAX_GAP, min_overlap: float = MIN_OVERLAP) -> None:
        self.smooth = smooth
        self.max_gap = max_gap
        self.min_overlap = min_overlap
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
        self._tracks = [track for track in self._tracks if seconds - track.seconds <= self.max_gap]
        matches = self._match(boxes)
        numbers, smoothed = [], np.array(probabilities, np.float64)
        for row, box in enumerate(boxes):
            track = matches.get(row)
            if track is None:
                self._num_tracks += 1
                track = _Track(self._num_tracks, box, smoothed[row], seconds)
                self._tracks.append(track)
            elif self.smooth > 0:
                weight = 1 - math.exp(-max(0.0, seconds - track.seconds) / self.smooth)
                smoothed[row] = track.probabilities + weight * (smoothed[row] - track.probabilities)
            track.box, track.probabilities, track.seconds = box, smoothed[row].copy(), seconds
            numbers.append(track.number)
        return numbers, smoothed

    def _match(self, boxes: Sequence[Box | None]) -> dict[int, _Track]:
        """Return row -> known face, each at most once."""
        pairs = [
            (compute_overlap(box, track.box), row, place)
            for row, box in enumerate(boxes)
            for place, track in enumerate(self._tracks)
        ]
        matches: dict[int, _Track] = {}
        taken: set[int] = set()
        for overlap, row, place in sorted(pairs, key=lambda pair: -pair[0]):
            if overlap >= self.min_overlap and row not in matches and place not in taken:
                matches[row] = self._tracks[place]
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
