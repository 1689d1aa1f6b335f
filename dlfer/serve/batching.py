"""One thread that predicts, for all clients together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from dlfer.predict.crops import Crop
from dlfer.serve.models import ServedModel

BATCH_IMAGES, BATCH_PIXELS = 32, 16_000_000
"""What is predicted together: at most so many pictures, and as few as hold so many pixels."""


@dataclass(frozen=True)
class FacesFound:
    """The faces in one picture.

    Attributes:
        num_found: also those beyond the limit.
        crops: the faces that were predicted, the largest first.
        probabilities: float32 [len(crops), C].
    """

    num_found: int
    crops: list[Crop]
    probabilities: np.ndarray


@dataclass
class Work:
    """What one request asks of a model.

    Attributes:
        model: that is asked.
        images: pictures, uint8 [H, W, 3] each; or, where `faces` is None, crops of its size, uint8 [S, S, C] each.
        faces: "auto" or "whole", see `build_cropper`; None: they are crops.
        most_faces: of a picture that are predicted.
        done: of pictures a list of `FacesFound`, of crops float32 [N, C].
    """

    model: ServedModel
    images: Sequence[np.ndarray]
    faces: str | None = None
    most_faces: int = 32
    done: Future = field(default_factory=Future)


class Batcher:
    """Collects what requests ask for a few milliseconds, and predicts it together in one thread.

    Args:
        window: seconds for which the first request of a batch waits for others.
        observe: is told the number of images of each batch.
    """

    def __init__(self, *, window: float = 0.005, observe: Callable[[int], None] = lambda images: None) -> None:
        self.window = window
        self.seconds_each = 0.1
        """Running mean of the seconds that a request took."""
        self._observe = observe
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dlfer-inference", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, work: Work) -> Future:
        """Hand work over; whoever waits no longer cancels the future, and what has not begun is left out."""
        self._waiting.put(work)
        return work.done

    def stop(self) -> None:
        """Finish the requests that were submitted, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            first = self._waiting.get()
            works, is_over = self._collect(first)
            begun = [work for work in works if work.done.set_running_or_notify_cancel()]
            if not begun:
                continue
            start = time.monotonic()
            self._observe(sum(len(work.images) for work in begun))
            self._answer(begun)
            self.seconds_each += 0.1 * ((time.monotonic() - start) / len(begun) - self.seconds_each)

    def _collect(self, first: Work | None) -> tuple[list[Work], bool]:
        """Return what is predicted together, and whether it is the last."""
        if first is None:
            return [], True
        works, end = [first], time.monotonic() + self.window
        images, pixels = _count([first])
        while images < BATCH_IMAGES and pixels < BATCH_PIXELS:
            try:
                work = self._waiting.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if work is None:
                return works, True
            works.append(work)
            images, pixels = _count(works)
        return works, False

    def _answer(self, works: list[Work]) -> None:
        """Set the results; what fails together is tried one by one, so that it fails alone."""
        try:
            results = predict_works(works)
        except Exception as error:
            if len(works) == 1:
                works[0].done.set_exception(error)
                return
            for work in works:
                self._answer([work])
            return
        for work, result in zip(works, results, strict=True):
            work.done.set_result(result)


def predict_works(works: Sequence[Work]) -> list[list[FacesFound] | np.ndarray]:
    """Return the results of works, each model called once with all its crops."""
    found: dict[int, list[list[Crop]]] = {}
    for key in {(id(work.model), work.faces) for work in works if work.faces is not None}:
        same = [row for row, work in enumerate(works) if (id(work.model), work.faces) == key]
        in_images = iter(
            works[same[0]].model.crop([i for row in same for i in works[row].images], works[same[0]].faces)
        )
        for row in same:
            found[row] = [next(in_images) for _ in works[row].images]
    crops = [
        [crop.pixels for crops in found[row] for crop in crops[: work.most_faces]]
        if row in found
        else list(work.images)
        for row, work in enumerate(works)
    ]
    answers: dict[int, np.ndarray] = {}
    for model in {id(work.model): work.model for work in works}.values():
        same = [row for row, work in enumerate(works) if work.model is model]
        together = model.predict([crop for row in same for crop in crops[row]])
        ends = np.cumsum([len(crops[row]) for row in same])[:-1]
        answers |= dict(zip(same, np.split(together, ends), strict=True))
    return [
        _share_out(found[row], answers[row], work.most_faces) if row in found else answers[row]
        for row, work in enumerate(works)
    ]


def _share_out(in_images: list[list[Crop]], answers: np.ndarray, most: int) -> list[FacesFound]:
    results, start = [], 0
    for crops in in_images:
        kept = crops[:most]
        results.append(FacesFound(len(crops), kept, answers[start : start + len(kept)]))
        start += len(kept)
    return results


def _count(works: Sequence[Work]) -> tuple[int, int]:
    """Return the number of images, and of their pixels."""
    images = [image for work in works for image in work.images]
    return len(images), sum(image.shape[0] * image.shape[1] for image in images)
