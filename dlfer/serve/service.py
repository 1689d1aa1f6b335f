"""The way of a request: admitted, read, decoded, predicted; and the end of all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np

from dlfer.errors import UserError
from dlfer.serve.batching import Batcher, FacesFound, Work
from dlfer.serve.explanation import explain_crop
from dlfer.serve.guard import Metrics
from dlfer.serve.inputs import Upload, count_pixels, decode_pictures
from dlfer.serve.limits import Budget, Limits, Refusal, estimate_wait
from dlfer.serve.models import ServedModel
from dlfer.serve.schemas import Explanation, Face, Picture

_DECODERS = 2
_COVERED_AT_ONCE = 32
"""Covered faces that are predicted together, so that an explanation never holds others up for long."""
_T = TypeVar("_T")


class Service:
    """What stands behind the routes.

    Args:
        models: by name; the first is the one that is asked where a request names none.
        limits: of requests.
        faces: what is done where a request does not say: "auto" or "whole".
        metrics: that count.
        window: seconds for which requests are collected.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        limits: Limits,
        faces: str,
        metrics: Metrics,
        window: float = 0.005,
    ) -> None:
        self.models = dict(models)
        self.limits = limits
        self.faces = faces
        self.metrics = metrics
        self.bytes = Budget(limits.all_bytes)
        self.num_requests = 0
        self.is_stopping = False
        self._pixels = Budget(limits.all_pixels)
        self._num_explanations = 0
        self._batcher = Batcher(window=window, observe=metrics.batch.observe)
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="dlfer-decode")
        self._explainers = ThreadPoolExecutor(1, thread_name_prefix="dlfer-explain")

    def start(self) -> None:
        """Begin, and predict once with each model, which makes the first request as fast as the others."""
        self._batcher.start()
        for model in self.models.values():
            blank = np.full((256, 256, 3), 127, np.uint8)
            for faces in dict.fromkeys((self.faces, "whole")):
                self._batcher.submit(Work(model, [blank], faces)).result()

    def stop(self) -> None:
        """Finish what was begun, and end."""
        self.is_stopping = True
        self._explainers.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
        if self._batcher.is_alive:
            self._batcher.stop()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken and can be answered."""
        return self._batcher.is_alive and not self.is_stopping

    @asynccontextmanager
    async def admit(self, *, explanation: bool = False) -> AsyncIterator[None]:
        """Let a request in, before its body is read.

        Raises:
            Refusal: 503 while too many are in, or after the server was told to stop.
        """
        if not self.is_ready:
            raise Refusal(503, "The server is stopping.", retry_after=5)
        if self.num_requests >= self.limits.requests:
            raise self._too_busy(self.num_requests)
        if explanation and self._num_explanations >= self.limits.explanations:
            raise self._too_busy(self.limits.requests)
        self.num_requests += 1
        self._num_explanations += explanation
        self.metrics.waiting.set(self.num_requests)
        try:
            yield
        finally:
            self.num_requests -= 1
            self._num_explanations -= explanation
            self.metrics.waiting.set(self.num_requests)

    @asynccontextmanager
    async def limit_time(self) -> AsyncIterator[None]:
        """Give up what takes too long.

        Raises:
            Refusal: 504.
        """
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError as error:
            raise Refusal(504, f"No answer within {self.limits.seconds:g} seconds.") from error

    def find_model(self, name: str | None) -> ServedModel:
        """Return a model by name, the first for None.

        Raises:
            Refusal: 404.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refusal(404, f"There is no model {name[:100]!r}; there are: {', '.join(self.models)}.")
        return self.models[name]

    async def predict(self, uploads: Sequence[Upload], model: ServedModel, faces: str | None) -> list[Picture]:
        """Return the pictures with the faces in them."""
        async with self._decode(uploads) as images:
            found = await self._ask(Work(model, images, faces or self.faces, self.limits.faces))
            sizes = [(image.shape[1], image.shape[0]) for image in images]
        self.metrics.faces.labels(model.name).inc(sum(len(one.crops) for one in found))
        return [
            _describe_picture(upload.name, size, one, model.labels)
            for upload, size, one in zip(uploads, sizes, found, strict=True)
        ]

    async def predict_crops(self, crops: Sequence[np.ndarray], model: ServedModel) -> np.ndarray:
        """Return float32 [N, C] of crops of the model's own size."""
        return await self._ask(Work(model, crops))

    async def explain(
        self, upload: Upload, model: ServedModel, *, faces: str | None, face: int, label: str | None
    ) -> Explanation:
        """Return the occlusion map of a face."""
        if label is not None and label not in model.labels:
            raise Refusal(400, f"label: found {label[:100]!r}, expected one of {', '.join(model.labels)}.")
        async with self._decode([upload]) as images:
            found = (await self._ask(Work(model, images, faces or self.faces, self.limits.faces)))[0]
        if face >= len(found.crops):
            raise Refusal(400, f"face: found {face}, but the picture has {len(found.crops)} (the first is 0).")

        is_given_up = threading.Event()

        def predict(covered: np.ndarray) -> np.ndarray:
            if is_given_up.is_set():
                raise CancelledError
            parts = [covered[start : start + _COVERED_AT_ONCE] for start in range(0, len(covered), _COVERED_AT_ONCE)]
            return np.concatenate(
                [self._batcher.submit(Work(model, part)).result(self.limits.seconds) for part in parts]
            )

        try:
            return await self.run(
                lambda: explain_crop(found.crops[face], label, model=model.name, labels=model.labels, predict=predict),
                self._explainers,
            )
        except asyncio.CancelledError:
            is_given_up.set()
            raise

    async def run(self, work: Callable[[], _T], pool: ThreadPoolExecutor | None = None) -> _T:
        """Return what a function gives, computed on a thread, by default one of those that decode."""
        return await asyncio.get_running_loop().run_in_executor(pool or self._decoders, work)

    @asynccontextmanager
    async def _decode(self, uploads: Sequence[Upload]) -> AsyncIterator[list[np.ndarray]]:
        pixels = await self.run(lambda: count_pixels(uploads, self.limits))
        await self._pixels.wait_for(pixels)
        try:
            yield await self.run(lambda: decode_pictures(uploads, self.limits))
        finally:
            self._pixels.give_back(pixels)

    async def _ask(self, work: Work) -> Any:
        try:
            return await asyncio.wrap_future(self._batcher.submit(work))
        except UserError as error:
            raise Refusal(400, str(error)) from error

    def _too_busy(self, num_waiting: int) -> Refusal:
        wait = estimate_wait(num_waiting, self._batcher.seconds_each)
        return Refusal(503, "The server has all the requests that it can take; try again.", retry_after=wait)


def _describe_picture(name: str, size: tuple[int, int], found: FacesFound, labels: tuple[str, ...]) -> Picture:
    faces = []
    for crop, row in zip(found.crops, found.probabilities, strict=True):
        best = int(row.argmax())
        faces.append(
            Face(
                box=crop.box,
                score=crop.score,
                label=labels[best],
                confidence=float(row[best]),
                probabilities={label: float(value) for label, value in zip(labels, row, strict=True)},
            )
        )
    return Picture(name=name, width=size[0], height=size[1], num_faces_found=found.num_found, faces=faces)
