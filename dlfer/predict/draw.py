"""Pictures and films with the faces marked: boxes, labels and their probabilities."""

from __future__ import annotations

import os
import secrets
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dlfer.predict.predictor import FacePrediction, FramePrediction
from dlfer.predict.video import FilmWriter

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
