"""Everything that pixels come from: pictures, folders, globs, films, cameras, a list on stdin; decoded ahead."""

from __future__ import annotations

import glob
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

from dlfer.data.images import SUFFIXES
from dlfer.errors import DataError, EnvironmentProblem
from dlfer.predict import video as films
from dlfer.predict.read_image import read_image
from dlfer.predict.video import Film, read_film

AHEAD = 4
"""Pictures that are decoded ahead; each is at most 150 MB."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Frame:
    """A picture, or one of a film.

    Attributes:
        name: as it was given, or the file's path in the folder that was given.
        image: uint8 [H, W, 3], RGB, upright.
        index: of the frame in its film, from 0; None of a picture.
        seconds: its time in the film; None of a picture.
        film: the film; None of a picture.
    """

    name: str
    image: np.ndarray
    index: int | None = None
    seconds: float | None = None
    film: Film | None = None


@dataclass(frozen=True)
class BadInput:
    """What was asked for and cannot be had.

    Attributes:
        name: as in `Frame`.
        error: what is wrong, with the name, in a sentence.
    """

    name: str
    error: str


def list_inputs(names: Iterable[str], *, stdin: TextIO | None = None) -> Iterator[str | BadInput]:
    """Yield the files (and cameras) that are meant by names, in order.

    Args:
        names: files; folders, in which pictures and films are searched for at any depth, hidden ones left
            out, sorted by path; globs (** for any depth); "camera:N"; "-" for a list on stdin, one name a line.
        stdin: where "-" reads.
    """
    for name in names:
        if name == "-":
            lines = (line.rstrip("\r\n") for line in stdin or ())
            yield from list_inputs(line for line in lines if line and line != "-")
        elif name.startswith(films.CAMERA):
            yield name
        elif os.path.isdir(name):
            found = sorted(_walk(name))
            yield from found or [BadInput(name, f"{name}: the folder holds no picture and no film.")]
        elif not os.path.lexists(name) and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            yield from list_inputs(matches) if matches else [BadInput(name, f"{name}: nothing matches.")]
        else:
            yield name


def open_inputs(
    names: Iterable[str | BadInput], *, every: int = 1, seconds: float | None = None
) -> Iterator[Frame | BadInput]:
    """Yield the pictures and the frames of files, decoded one after the other on a thread of their own.

    What cannot be read takes its place in the order as a `BadInput`, and stops nothing.

    Args:
        names: from `list_inputs`.
        every: of films, every so many-th frame.
        seconds: where films and cameras are left.

    Raises:
        EnvironmentProblem: a package that a film needs is not installed.
    """
    yield from read_ahead(_decode(names, every=every, seconds=seconds), AHEAD)


def read_ahead(items: Iterable[_T], size: int) -> Iterator[_T]:
    """Yield items that a thread draws from an iterable, at most `size` of them ahead; its exception comes in its place."""
    waiting: queue.Queue = queue.Queue(size)
    is_over = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not is_over.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over to whoever reads
            put("error", error)
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=work, name="dlfer-decode", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        is_over.set()
        thread.join(timeout=5)


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith((*SUFFIXES, *films.SUFFIXES)):
                yield os.path.join(parent, name)


def _decode(names: Iterable[str | BadInput], *, every: int, seconds: float | None) -> Iterator[Frame | BadInput]:
    for name in names:
        if isinstance(name, BadInput):
            yield name
            continue
        try:
            if films.is_film(name):
                for film, index, time, image in read_film(name, every=every, seconds=seconds):
                    yield Frame(name, image, index, time, film)
            else:
                yield Frame(name, read_image(Path(name)))
        except EnvironmentProblem:
            raise
        except DataError as error:
            yield BadInput(name, str(error))
        except OSError as error:
            yield BadInput(name, f"{name}: {error}")
