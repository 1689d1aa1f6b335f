"""The work of `dlfer predict`: inputs to a table, with pictures and films in which the faces are marked."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape

from dlfer.errors import DataError, UserError
from dlfer.predict.engines import AUTO, Engine, choose_engine, load_engine
from dlfer.predict.media import BadInput, is_film, list_inputs, load_opencv, open_inputs
from dlfer.predict.predictor import FacePrediction, FacePredictor, FramePrediction, describe_predictions, predict_inputs
from dlfer.predict.tables import Table, open_table
from dlfer.runs.find import find_default_model
from dlfer.train.progress import ConsoleListener

INK, PAPER, UNSURE = (255, 255, 255), (0, 92, 168), (96, 96, 96)
"""White on blue, 6.9 to 1; white on grey, 6.2 to 1, where the classifier abstains."""

MIN_SIDE = 240
"""Pictures with a shorter side are enlarged to it, so that a label can be read."""


def draw_faces(image: np.ndarray, faces: list[FacePrediction], *, enlarge: bool = True) -> np.ndarray:
    """Return uint8 [H, W, 3] of a picture with its faces marked.

    Args:
        image: uint8 [H, W, 3].
        faces: in it, as predicted.
        enlarge: small pictures, such as crops of faces, to 240 pixels on the shorter side.
    """
    scale = max(1, -(-MIN_SIDE // min(image.shape[:2]))) if enlarge else 1
    picture = Image.fromarray(image)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    font = _load_font(max(12, min(picture.size) // 28))
    for face in faces:
        colour = UNSURE if face.abstained else PAPER
        number = "" if face.track is None else f"#{face.track} "
        text = f"{number}{face.label} {face.confidence:.0%}"
        x, y = 0.0, 0.0
        if face.box is not None:
            x0, y0, x1, y1 = (value * scale for value in face.box)
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=max(2, min(picture.size) // 250))
            x, y = x0, y0
        _write_text(pen, text, (x, y), font=font, colour=colour, size=picture.size)
    return np.array(picture)


class FilmWriter:
    """An mp4 film of `rate` frames a second, written frame by frame."""

    def __init__(self, path: Path, *, rate: float) -> None:
        self.path = path
        self._rate = rate
        self._writer: Any = None
        self._shape: tuple[int, ...] | None = None

    def write(self, frame: np.ndarray) -> None:
        """Add uint8 [H, W, 3] RGB; every frame has the size of the first.

        Raises:
            DataError: another size, or the film cannot be written.
        """
        cv2 = load_opencv()
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter_fourcc(*"mp4v"), self._rate, size)
            self._shape = frame.shape
            if not self._writer.isOpened():
                raise DataError(f"{self.path}: OpenCV cannot write a film of {size[0]} x {size[1]} pixels there.")
        if frame.shape != self._shape:
            raise DataError(f"{self.path}: found a frame of shape {frame.shape}, expected {self._shape} as the first.")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def close(self) -> None:
        """End the film; without a frame nothing was written."""
        if self._writer is not None:
            self._writer.release()


class Sketches:
    """A folder of marked pictures (.jpg) and films (.mp4), named after the inputs; -2, -3 ... where names meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._taken: set[str] = set()
        self._film: object = None
        self._writer: FilmWriter | None = None

    def add(self, prediction: FramePrediction, *, every: int = 1) -> None:
        """Write a picture, or the next frame of a film of which every so many-th is looked at."""
        frame = prediction.frame
        if frame.film is None:
            self._save(draw_faces(frame.image, prediction.faces), self._choose_path(frame.name, ".jpg"))
            return
        if frame.film is not self._film:
            self.close()
            self._film = frame.film
            self._writer = FilmWriter(self._choose_path(frame.name, ".mp4"), rate=frame.film.rate / every)
        self._writer.write(draw_faces(frame.image, prediction.faces, enlarge=False))

    def close(self) -> None:
        """End the film that is being written."""
        if self._writer is not None:
            self._writer.close()
        self._film, self._writer = None, None

    def _choose_path(self, name: str, suffix: str) -> Path:
        stem = Path(name.replace(":", "-")).stem
        chosen, number = stem, 1
        while chosen + suffix in self._taken:
            number += 1
            chosen = f"{stem}-{number}"
        self._taken.add(chosen + suffix)
        return self.folder / (chosen + suffix)

    def _save(self, image: np.ndarray, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        Image.fromarray(image).save(temporary, "JPEG", quality=92)
        temporary.replace(path)


@cache
def _load_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _write_text(
    pen: ImageDraw.ImageDraw, text: str, place: tuple[float, float], *, font, colour, size: tuple[int, int]
) -> None:
    """Write on a coloured ground above a place; below or left of it where the picture ends."""
    right, bottom = font.getbbox(text)[2:]
    width, height = right + 6, bottom + 6
    x = max(0.0, min(place[0], size[0] - width))
    y = place[1] - height if place[1] >= height else place[1]
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3, y + 3), text, fill=INK, font=font)


_MOST_FAILURES = 20


@dataclass(frozen=True)
class PredictionJob:
    """What is asked for.

    Attributes:
        model: a model's name, a run, or a folder; None: the default model.
        out: the table; None: stdout.
        draw: folder of marked pictures and films, or None.
        faces, detector_size: see `build_cropper`.
        engine: see `load_engine`; "auto": see `choose_engine`.
        abstain, mirror: see `FacePredictor`.
        smooth: see `predict_inputs`.
        every, seconds: see `read_film`.
    """

    model: str | None = None
    out: Path | None = None
    draw: Path | None = None
    faces: str = "auto"
    detector_size: int | None = None
    engine: str | None = None
    abstain: float | None = None
    mirror: bool = False
    smooth: float = 0.5
    every: int = 1
    seconds: float | None = None


def predict_files(names: Sequence[str], job: PredictionJob, *, say: Callable[[str], None]) -> int:
    """Predict files, write the table and the marked pictures; return how many inputs could not be read.

    `names` are as of `list_inputs`; `say` is told what a reader of the results has to know, and what failed.

    Raises:
        UserError, ModelError, EnvironmentProblem: the job cannot begin.
    """
    # A list on stdin may be endless; what is named is counted first, for the time left.
    listed = list_inputs(names, stdin=sys.stdin)
    files = listed if "-" in names else list(listed)
    num_pictures, has_films = None, False
    if "-" not in names:
        num_pictures = sum(isinstance(name, str) and not is_film(name) for name in files)
        has_films = job.smooth > 0 and any(isinstance(name, str) and is_film(name) for name in files)
    classifier = _open_engine(job, num_pictures, say=say)
    predictor = FacePredictor(
        classifier, faces=job.faces, detector_size=job.detector_size, abstain=job.abstain, mirror=job.mirror
    )
    about = describe_predictions(predictor, faces=job.faces, smooth=job.smooth)
    for key in ("notice", "probabilities", *(["mirror"] if job.mirror else []), *(["smoothing"] if has_films else [])):
        say(f"{key}: {about[key]}")
    inputs = open_inputs(files, every=job.every, seconds=job.seconds)
    results = predict_inputs(predictor, inputs, smooth=job.smooth)
    table = open_table(job.out, labels=predictor.labels, about=about)
    sketches = Sketches(job.draw) if job.draw is not None else None
    failed = _write_all(_report_progress(results, num_pictures), table, sketches, every=job.every)
    for failure in failed[:_MOST_FAILURES]:
        say(f"not read: {failure['error']}")
    if failed:
        say(f"{len(failed):,} of the inputs could not be read.")
    if job.out is not None:
        say(f"written: {job.out}")
    return len(failed)


def _open_engine(job: PredictionJob, num_pictures: int | None, *, say: Callable[[str], None]) -> Engine:
    """Return what computes; of films and lists the number of pictures is not known, and they are many."""
    name = str(job.model or find_default_model())
    if job.engine == AUTO:
        return choose_engine(name, num_faces=num_pictures or 64, any_size=job.faces == "whole", say=say)
    if job.model is None and job.engine == "litert":
        raise UserError("--engine litert: name an export by --model FOLDER; dlfer export MODEL --to litert makes one.")
    return load_engine(name, job.engine)


def _write_all(
    results: Iterator[FramePrediction | BadInput], table: Table, sketches: Sketches | None, *, every: int
) -> list[dict[str, str]]:
    """Write every result; return what failed. Ctrl-C ends the table where it is, and goes on to the caller."""
    failed: list[dict[str, str]] = []
    try:
        for result in results:
            if isinstance(result, BadInput):
                failed.append({"file": result.name, "error": result.error})
                continue
            table.write(result)
            if sketches is not None:
                sketches.add(result, every=every)
    except KeyboardInterrupt:
        table.close(failed)
        raise
    except BaseException:
        table.discard()
        raise
    finally:
        if sketches is not None:
            sketches.close()
    table.close(failed)
    return failed


def _report_progress(
    results: Iterator[FramePrediction | BadInput], num_pictures: int | None
) -> Iterator[FramePrediction | BadInput]:
    """Yield the results, and show how far it is; the number of pictures on a list that is being read is not known."""
    progress = ConsoleListener()
    num_done = 0
    try:
        for result in results:
            frame = result.frame if isinstance(result, FramePrediction) else None
            if frame is not None and frame.film is not None:
                progress.finish_part(escape(Path(frame.name).name), (frame.index or 0) + 1, frame.film.num_frames)
            elif frame is not None:
                num_done += 1
                progress.finish_part("pictures", num_done, num_pictures)
            yield result
    finally:
        progress.close()
