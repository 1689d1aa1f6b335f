"""From pictures to the faces in them and what annotators would call their expressions; in films each face is followed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dlfer.data.images import to_channels
from dlfer.data.pictures import check_batch_size, predict_by_size, to_pictures
from dlfer.errors import UserError
from dlfer.predict.crops import Box, build_cropper
from dlfer.predict.engines import Engine
from dlfer.predict.media import BadInput, Frame, read_image

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
            if overlap >= MIN_OVERLAP and row not in matches and place not in taken:
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


UNCERTAIN = "uncertain"
"""The label of a face whose most probable one is below the threshold."""

NOTICE = (
    "Predicts which of the expression labels annotators would give to a picture of a face. It does not detect what "
    "a person feels. In the EU, inferring emotions at work and in education is prohibited (AI Act, Art. 5(1)(f))."
)
SMOKE = "This is the model of a smoke run, trained on two batches of at most eight images: its answers mean nothing."
RESEARCH_ONLY = "The model is for research only: its weights come from data with that restriction."

_BATCH_FRAMES, _BATCH_PIXELS = 32, 16_000_000
"""Pictures whose faces are predicted together: at most so many, and as few as hold so many pixels."""


@dataclass(frozen=True)
class FacePrediction:
    """A face and its probabilities.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the upright picture; None: the picture was taken for a face.
        score: the detector's (centerface, mtcnn: a probability; opencv: a weight above 0, no probability); None without one.
        label: the most probable label, or "uncertain".
        confidence: the probability of the most probable label.
        probabilities: of each label, in the classifier's order; the sum is one.
        abstained: whether the confidence is below the threshold that was asked for.
        track: in a film, the number that the face keeps from frame to frame; else None.
    """

    box: Box | None
    score: float | None
    label: str
    confidence: float
    probabilities: dict[str, float]
    abstained: bool = False
    track: int | None = None


@dataclass(frozen=True)
class FramePrediction:
    """A picture, or a frame of a film, and the faces in it, the largest first; none where none was found."""

    frame: Frame
    faces: list[FacePrediction]


class FacePredictor:
    """Finds the faces in pictures and predicts them together.

    Args:
        classifier: from `dlfer.load` or `load_engine`.
        faces: "auto", "centerface", "mtcnn", "opencv" or "whole", see `build_cropper`.
        detector_size: longest side in pixels of what faces are searched for in, see `build_cropper`.
        abstain: in 0..1, below which confidence the label is "uncertain"; None: never.
        mirror: whether the probabilities are the mean over a face and its mirror image; it takes twice the time.
        batch_size: faces at a time.

    Raises:
        UserError: `faces`, `detector_size` or `abstain` is none of these.

    Example:
        >>> predictor = FacePredictor(dlfer.load("lite2_96"))
        >>> [face.label for face in predictor.predict([read_image("photo.jpg")])[0]]
        ['Happy', 'Neutral']
    """

    def __init__(
        self,
        classifier: Engine,
        *,
        faces: str = "auto",
        detector_size: int | None = None,
        abstain: float | None = None,
        mirror: bool = False,
        batch_size: int = 64,
    ) -> None:
        if abstain is not None and not (isinstance(abstain, int | float) and 0 <= abstain <= 1):
            raise UserError(f"abstain: found {abstain!r}, expected a confidence in 0..1.")
        if not hasattr(classifier, "predict") or not hasattr(classifier, "labels"):
            raise UserError(
                f"classifier: found {classifier!r:.80}, expected a loaded model: FacePredictor(dlfer.load('lite2_96'))."
            )
        check_batch_size(batch_size)
        self.classifier = classifier
        self.labels = tuple(classifier.labels)
        self.abstain = abstain
        self.mirror = mirror
        self.batch_size = batch_size
        self._crop = build_cropper(faces, classifier, detector_size=detector_size)

    def predict(self, images: Any) -> list[list[FacePrediction]]:
        """Return the faces in each of several pictures, the largest first; of one picture, a list of one.

        The probabilities are calibrated if the model has a temperature.

        Args:
            images: a list of pictures, each uint8 [H, W] or [H, W, C] with C 1 (grey), 3 (RGB) or 4 (RGBA, laid over
                white), one of Pillow's images, or a path; one picture alone; or several of one size, uint8 [N, H, W] or
                [N, H, W, C].

        Raises:
            DataError: they are none of these, or a file cannot be read.
            ModelError: the outputs of the model are not finite.
        """
        pictures = [to_channels(picture, 3) for picture in to_pictures(images, read=read_image)]
        crops = self._crop(pictures)
        answers = iter(self._predict_crops([crop.pixels for in_image in crops for crop in in_image]))
        return [[self.judge(next(answers), crop.box, score=crop.score) for crop in in_image] for in_image in crops]

    def judge(
        self, probabilities: np.ndarray, box: Box | None, *, score: float | None, track: int | None = None
    ) -> FacePrediction:
        """Return a face with the label that float [C] probabilities give it."""
        best = int(np.argmax(probabilities))
        confidence = float(probabilities[best])
        abstained = self.abstain is not None and confidence < self.abstain
        return FacePrediction(
            box=box,
            score=score,
            label=UNCERTAIN if abstained else self.labels[best],
            confidence=confidence,
            probabilities={name: float(value) for name, value in zip(self.labels, probabilities, strict=True)},
            abstained=abstained,
            track=track,
        )

    def _predict_crops(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [N, C] of uint8 [S, S, channels] crops, those of one size in one call."""
        return predict_by_size(self._predict_images, crops, len(self.labels))

    def _predict_images(self, images: np.ndarray) -> np.ndarray:
        predict = partial(self.classifier.predict, batch_size=self.batch_size, calibrated=True)
        answers = predict(images)
        return (answers + predict(np.ascontiguousarray(images[:, :, ::-1]))) / 2 if self.mirror else answers


def predict_inputs(
    predictor: FacePredictor, inputs: Iterable[Frame | BadInput], *, smooth: float = 0.5
) -> Iterator[FramePrediction | BadInput]:
    """Yield what is predicted for pictures and frames, in order; the faces of several files go to the network together.

    Faces of a film keep their number, and their probabilities are smoothed over time.

    Args:
        predictor: that finds and predicts them.
        inputs: from `open_inputs`.
        smooth: time constant of the smoothing in seconds; 0: none.
    """
    tracker, film = FaceTracker(smooth=smooth), None
    for batch in _gather(inputs):
        images = [item.image for item in batch if isinstance(item, Frame)]
        found = iter(predictor.predict(images) if images else ())
        for item in batch:
            if isinstance(item, BadInput):
                yield item
                continue
            faces = next(found)
            if item.film is not None:
                if item.film is not film:
                    tracker, film = FaceTracker(smooth=smooth), item.film
                faces = _follow(predictor, tracker, faces, item.seconds or 0.0)
            yield FramePrediction(item, faces)


def make_notice(*, is_smoke: bool, research_only: bool) -> str:
    """Return the notice beside every answer of a model; that it is of a smoke run comes first."""
    return " ".join([*([SMOKE] if is_smoke else []), NOTICE, *([RESEARCH_ONLY] if research_only else [])])


def describe_predictions(predictor: FacePredictor, *, faces: str, smooth: float | None) -> dict[str, Any]:
    """Return what a reader of predictions has to know: the notice, the model, how probabilities were made.

    `smooth`, of films, is in seconds; None or 0: nothing is smoothed.
    """
    classifier, fit = predictor.classifier, predictor.classifier.temperature_fit
    about = classifier.about
    return {
        "notice": make_notice(is_smoke=about.smoke, research_only=about.research_only is not False),
        "smoke": about.smoke or None,
        "model": about.model_dump(include={"name", "experiment", "run", "protocol", "selected_on"}, exclude_none=True),
        "labels": list(predictor.labels),
        "faces": faces,
        "probabilities": (
            f"calibrated by the temperature {fit.value:.3f}, which was fitted on {fit.fitted_on or 'validation'}"
            if fit
            else "as the network gives them, not calibrated: no temperature was fitted"
        ),
        "mirror": (
            "probabilities are the mean over each face and its mirror image"
            + ("; the temperature was fitted without the mirror image" if fit else "")
            if predictor.mirror
            else None
        ),
        "smoothing": (
            f"probabilities in films are an exponential average over time, time constant {smooth:g} s"
            if smooth
            else None
        ),
        "abstain_below": predictor.abstain,
    }


def _gather(inputs: Iterable[Frame | BadInput]) -> Iterator[list[Frame | BadInput]]:
    """Yield lists of inputs whose pictures are predicted together; those of a camera alone, which is waited for."""
    batch: list[Frame | BadInput] = []
    pixels = 0
    for item in inputs:
        batch.append(item)
        if isinstance(item, Frame):
            pixels += item.image.shape[0] * item.image.shape[1]
        is_live = isinstance(item, Frame) and item.film is not None and item.film.is_live
        if is_live or len(batch) >= _BATCH_FRAMES or pixels >= _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _follow(
    predictor: FacePredictor, tracker: FaceTracker, faces: list[FacePrediction], seconds: float
) -> list[FacePrediction]:
    """Return the faces of the next frame with their numbers and smoothed probabilities."""
    values = np.array([list(face.probabilities.values()) for face in faces]).reshape(len(faces), len(predictor.labels))
    tracks, smoothed = tracker.update([face.box for face in faces], values, seconds)
    return [
        predictor.judge(row, face.box, score=face.score, track=track)
        for face, track, row in zip(faces, tracks, smoothed, strict=True)
    ]
