"""Films and cameras, frame by frame: read with their times, written with what was drawn on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.errors import DataError, EnvironmentProblem

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
CAMERA = "camera:"
DEFAULT_RATE = 25.0
"""Frames a second where a film or a camera does not tell."""


@dataclass(frozen=True)
class Film:
    """What is known of a film before its first frame.

    Attributes:
        rate: frames a second.
        num_frames: as its header says; None of a camera, or where it does not say.
        is_live: whether it is a camera.
    """

    rate: float
    num_frames: int | None
    is_live: bool


def is_film(name: str) -> bool:
    """Return whether a name is that of a film or of a camera."""
    return name.startswith(CAMERA) or name.lower().endswith(SUFFIXES)


def read_film(
    name: str, *, every: int = 1, seconds: float | None = None
) -> Iterator[tuple[Film, int, float, np.ndarray]]:
    """Yield (film, index of the frame, its time in seconds, uint8 [H, W, 3] RGB), upright, one frame in memory.

    Args:
        name: of a film, or "camera:0" for the first camera.
        every: give every so many-th frame; the others are not decoded into pixels.
        seconds: stop there; None: at the end, which a camera does not have.

    Raises:
        DataError: it cannot be opened, or holds no frame.
        EnvironmentProblem: OpenCV is not installed.
    """
    is_live = name.startswith(CAMERA)
    capture = _open_capture(name, is_live=is_live)
    try:
        film = _describe_film(capture, is_live=is_live)
        index, begin = -1, time.monotonic()
        while capture.grab():
            index += 1
            now = time.monotonic() - begin if is_live else _get_time(capture, index, film.rate)
            if seconds is not None and now > seconds:
                break
            if index % every:
                continue
            found, frame = capture.retrieve()
            if found:
                yield film, index, now, frame[..., ::-1].copy()
        if index < 0:
            raise DataError(f"{name}: no frame can be read; the file is no film, is damaged, or its codec is unknown.")
    finally:
        capture.release()


class FilmWriter:
    """An mp4 film, written frame by frame.

    Args:
        path: where it is written.
        rate: frames a second.
    """

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


def load_opencv() -> Any:
    """Return the module cv2.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise EnvironmentProblem(
            f"films and cameras need OpenCV ({error}): pip install 'opencv-python-headless<5'"
        ) from error
    return cv2


def _open_capture(name: str, *, is_live: bool) -> Any:
    cv2 = load_opencv()
    if is_live:
        number = name[len(CAMERA) :]
        if not number.isdecimal():
            raise DataError(f"{name}: expected the number of a camera, e.g. camera:0.")
        source: int | str = int(number)
    else:
        # OpenCV would take other names for addresses and patterns; only files are meant.
        if not Path(name).is_file():
            raise DataError(f"{name}: there is no such file.")
        source = str(Path(name).resolve())
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        what = "no such camera, or another program holds it" if is_live else "no film, damaged, or of an unknown codec"
        raise DataError(f"{name}: cannot be opened ({what}).")
    return capture


def _describe_film(capture: Any, *, is_live: bool) -> Film:
    cv2 = load_opencv()
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return Film(
        rate=float(rate) if 0 < rate < 1000 else DEFAULT_RATE,
        num_frames=int(count) if count > 0 and not is_live else None,
        is_live=is_live,
    )


def _get_time(capture: Any, index: int, rate: float) -> float:
    """Return the time of the frame that was grabbed: its own where the film tells (rates may vary), else by the rate."""
    stamp = capture.get(load_opencv().CAP_PROP_POS_MSEC) / 1000
    return stamp if stamp > 0 or index == 0 else index / rate
