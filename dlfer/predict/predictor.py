"""Prediction of the expression labels that annotators would give to the faces in pictures and videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dlfer.data.images import to_channels
from dlfer.data.pictures import check_batch_size, predict_by_size, to_pictures
from dlfer.errors import UserError
from dlfer.predict.crops import DETECTIONS_A_SECOND, Box, Crop, FaceFinder, FaceTracker, build_cropper, choose_interval
from dlfer.predict.engines import Engine
from dlfer.predict.media import Frame, ReadAhead, UnreadableInput, read_image

UNCERTAIN = "uncertain"
"""The label of a face whose confidence is below the threshold `abstain`."""

NOTICE = (
    "Predicts which of the expression labels annotators would give to a picture of a face. It does not detect what "
    "a person feels. In the EU, inferring emotions at work and in education is prohibited (AI Act, Art. 5(1)(f))."
)
SMOKE = (
    "This is the model of a smoke run, trained on two batches of at most eight images: its predictions are meaningless."
)
RESEARCH_ONLY = "The model is for research only: its weights come from data with that restriction."

_LONG = 0.5
"""Seconds to wait for the next input before the pictures read so far are predicted."""
_BATCH_FRAMES, _BATCH_PIXELS = 32, 16_000_000
"""Number of pictures, and of their pixels, at which a batch is complete; a batch of video frames continues to the next
frame with detection, unless it reaches twice the pixels."""


@dataclass(frozen=True)
class FacePrediction:
    """A face and its probabilities.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the upright picture; None: the whole picture is the face.
        score: the detector's (centerface, mtcnn: a probability; opencv: a positive weight); None without a detector,
            and if the face was followed from other frames of a video.
        label: the most probable label, or "uncertain".
        confidence: the probability of the most probable label.
        probabilities: of each label, in the classifier's order; they sum to one.
        abstained: whether the confidence is below the requested threshold.
        track: in a video, the number that the face keeps from frame to frame; else None.
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
    """A picture, or a frame of a video, and the faces found in it, the largest first."""

    frame: Frame
    faces: list[FacePrediction]


class FacePredictor:
    """A predictor that finds the faces in pictures and predicts their expression labels.

    Args:
        classifier: from `dlfer.load` or `load_engine`.
        faces: "auto", "centerface", "mtcnn", "opencv" or "whole", see `build_cropper`.
        detector_size: longest side in pixels to which pictures are shrunk for detection, see `build_cropper`.
        abstain: confidence in 0..1 below which the label is "uncertain"; None: never.
        mirror: whether probabilities are averaged over a face and its horizontal flip, which takes twice the time.
        batch_size: number of faces per batch.

    Raises:
        UserError: an argument is invalid.

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
        self.cropper = build_cropper(faces, classifier, detector_size=detector_size)

    def predict(self, images: Any) -> list[list[FacePrediction]]:
        """Return a list of the faces in each picture, the largest first; for a single picture, it has one item.

        The probabilities are calibrated if the model has a temperature.

        Args:
            images: a list of pictures, each uint8 [H, W] or [H, W, C] with C 1 (grey), 3 (RGB) or 4 (RGBA, composited
                on white), a Pillow image, or a path; a single picture; or several of one size, uint8
                [N, H, W] or [N, H, W, C].

        Raises:
            DataError: `images` is something else, or a file cannot be read.
            ModelError: the outputs of the model are not finite.
        """
        pictures = [to_channels(picture, 3) for picture in to_pictures(images, read=read_image)]
        return self.predict_crops(self.cropper(pictures))

    def predict_crops(self, crops: Sequence[Sequence[Crop]]) -> list[list[FacePrediction]]:
        """Return the predictions for the face crops that `cropper` returned for each of several pictures."""
        pixels = [crop.pixels for in_image in crops for crop in in_image]
        answers = iter(predict_by_size(self._predict_images, pixels, len(self.labels)))
        return [[self.judge(next(answers), crop.box, score=crop.score) for crop in in_image] for in_image in crops]

    def judge(
        self, probabilities: np.ndarray, box: Box | None, *, score: float | None, track: int | None = None
    ) -> FacePrediction:
        """Return the prediction of a face with the given probabilities, float [C]."""
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

    def _predict_images(self, images: np.ndarray) -> np.ndarray:
        predict = partial(self.classifier.predict, batch_size=self.batch_size, calibrated=True)
        answers = predict(images)
        return (answers + predict(np.ascontiguousarray(images[:, :, ::-1]))) / 2 if self.mirror else answers


def predict_inputs(
    predictor: FacePredictor,
    inputs: Iterable[Frame | UnreadableInput],
    *,
    smooth: float = 0.5,
    detect_every: int | None = None,
    every: int = 1,
) -> Iterator[FramePrediction | UnreadableInput]:
    """Yield the predictions of pictures and frames in order; the faces of several files are predicted as one batch.

    While a batch is predicted, a thread finds and crops the faces of the next one. Faces in a video keep their number,
    and their probabilities are smoothed over time.

    Args:
        predictor: finds and predicts the faces.
        inputs: from `open_inputs`.
        smooth: time constant of the smoothing in seconds; 0: none.
        detect_every: K, to run the detector on every Kth frame of a video, see `FaceFinder`; None: about 7 times a
            second.
        every: the value passed to `open_inputs`.
    """
    tracker, video = FaceTracker(smooth=smooth), None
    cropped = _find_crops(predictor, inputs, detect_every=detect_every, every=every)
    found = ReadAhead(cropped, 1, patience=None, source=inputs)
    with closing(found):
        for batch, crops in found:
            predicted = iter(predictor.predict_crops(crops))
            for item in batch.items:
                if isinstance(item, UnreadableInput):
                    yield item
                    continue
                faces = next(predicted)
                if item.video is not None:
                    if item.video is not video:
                        tracker, video = FaceTracker(smooth=smooth), item.video
                    faces = _follow(predictor, tracker, faces, item.seconds or 0.0)
                yield FramePrediction(item, faces)


def make_notice(*, is_smoke: bool, research_only: bool) -> str:
    """Return the notice shown with all predictions of a model; the warning about a smoke run comes first."""
    return " ".join([*([SMOKE] if is_smoke else []), NOTICE, *([RESEARCH_ONLY] if research_only else [])])


def describe_predictions(
    predictor: FacePredictor, *, faces: str, smooth: float | None, detect_every: int | None = 1
) -> dict[str, Any]:
    """Return the facts that a reader of predictions needs: the notice, the model, and how probabilities were computed.

    `smooth` and `detect_every`, for videos, are those of `predict_inputs`; `smooth` None or 0: nothing is smoothed.
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
            f"calibrated with the temperature {fit.value:.3f}, which was fitted on {fit.fitted_on or 'validation'}"
            if fit
            else "not calibrated: no temperature was fitted"
        ),
        "mirror": (
            "probabilities are averaged over each face and its horizontal flip"
            + ("; the temperature was fitted without the flip" if fit else "")
            if predictor.mirror
            else None
        ),
        "smoothing": (
            f"probabilities in videos are an exponential average over time, time constant {smooth:g} s"
            if smooth
            else None
        ),
        "detection": (
            None
            if detect_every == 1 or predictor.cropper.detect is None
            else "faces in videos are detected "
            + (f"on one frame in {detect_every}" if detect_every else f"about {DETECTIONS_A_SECOND:g} times a second")
            + " and followed in between (--detect-every 1 detects on every frame)"
        ),
        "abstain_below": predictor.abstain,
    }


@dataclass
class _Batch:
    """Inputs that are predicted together: pictures, or consecutive frames of one video.

    Attributes:
        items: all inputs in order.
        frames: the items that are not a `UnreadableInput`.
        keys: for each frame, whether the detector runs on it.
        pixels: total number in all frames.
    """

    items: list[Frame | UnreadableInput] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    pixels: int = 0

    def add(self, item: Frame | UnreadableInput, *, is_key: bool = True) -> None:
        self.items.append(item)
        if isinstance(item, Frame):
            self.frames.append(item)
            self.keys.append(is_key)
            self.pixels += item.image.shape[0] * item.image.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the batch is complete; a camera frame is a batch of its own, since the next one is not there yet."""
        if self.frames and self.frames[-1].video is not None and self.frames[-1].video.is_live:
            return True
        is_enough = len(self.items) >= _BATCH_FRAMES or self.pixels >= _BATCH_PIXELS
        return is_enough and (not self.keys or self.keys[-1] or self.pixels >= 2 * _BATCH_PIXELS)


def _gather(inputs: Iterable[Frame | UnreadableInput], *, detect_every: int | None, every: int) -> Iterator[_Batch]:
    """Yield the inputs in batches; `detect_every` and `every` are those of `predict_inputs`."""
    batch, video, place, interval = _Batch(), None, 0, 1
    for item in inputs:
        if isinstance(item, Frame):
            if item.video is not video:
                if batch.items:
                    yield batch
                batch, video, place = _Batch(), item.video, 0
                interval = choose_interval(detect_every, video.rate / every) if video is not None else 1
            batch.add(item, is_key=place % interval == 0)
            place += 1
        else:
            batch.add(item)
        # If the next input is slow to arrive, as in a list written by another program, predict what has been read.
        if batch.is_full or (video is None and isinstance(inputs, ReadAhead) and not inputs.wait(_LONG)):
            yield batch
            batch = _Batch()
    if batch.items:
        yield batch


def _find_crops(
    predictor: FacePredictor, inputs: Iterable[Frame | UnreadableInput], *, detect_every: int | None, every: int
) -> Iterator[tuple[_Batch, list[list[Crop]]]]:
    """Yield batches of the inputs with the face crops of each of their frames."""
    cropper = predictor.cropper
    finder = FaceFinder(cropper.detect) if cropper.detect is not None else None
    for batch in _gather(inputs, detect_every=detect_every, every=every):
        images = [frame.image for frame in batch.frames]
        if finder is None or not images:
            yield batch, cropper(images)
            continue
        found = finder.find(batch.frames, batch.keys)
        yield batch, [[cropper.cut(image, face) for face in faces] for image, faces in zip(images, found, strict=True)]


def _follow(
    predictor: FacePredictor, tracker: FaceTracker, faces: list[FacePrediction], seconds: float
) -> list[FacePrediction]:
    """Return the faces of the next frame of a video with track numbers and smoothed probabilities."""
    values = np.array([list(face.probabilities.values()) for face in faces]).reshape(len(faces), len(predictor.labels))
    tracks, smoothed = tracker.update([face.box for face in faces], values, seconds)
    return [
        predictor.judge(row, face.box, score=face.score, track=track)
        for face, track, row in zip(faces, tracks, smoothed, strict=True)
    ]
