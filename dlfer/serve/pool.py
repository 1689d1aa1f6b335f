"""Worker processes that parse and decode untrusted input, and one thread that predicts in batches.

A worker that exceeds its limits is replaced. The thread batches the requests of all clients.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.predict.crops import Crop
from dlfer.serve.limits import Limits, Refusal
from dlfer.serve.models import ServedModel

_ROOT = str(Path(__file__).parents[2])
_SECRETS = ("DLFER_API_KEY",)

Parts = Sequence[bytes | memoryview]


class WorkerEnded(Exception):
    """A worker process ended before it replied.

    Attributes:
        is_late: whether it had used up its processor time.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"a worker process ended with {code}")
        self.is_late = code == -getattr(signal, "SIGPROF", 27)


class Worker:
    """One worker process, see `dlfer.serve.worker`."""

    def __init__(self, limits: Limits) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread each: numpy's thread pools would only take memory.
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # Let glibc return large blocks to the system as soon as they are free.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dlfer.serve.worker", json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C reaches the server alone, which lets its workers finish.
            start_new_session=True,
        )

    def ask(self, task: str, given: dict[str, Any], parts: Parts) -> tuple[Any, list[bytearray]]:
        """Send a request and return the value and the byte strings of the reply; this blocks, and runs on a thread.

        Raises:
            WorkerEnded: the process was killed or crashed.
        """
        head = {"task": task, "given": given, "sizes": [len(part) for part in parts]}
        stdin, stdout = self._process.stdin, self._process.stdout
        try:
            stdin.write(json.dumps(head).encode() + b"\n")
            for part in parts:
                stdin.write(part)
            stdin.flush()
            line = stdout.readline()
            if line:
                told = json.loads(line)
                return told["value"], [self._read(size) for size in told["sizes"]]
        except (OSError, ValueError, EOFError):
            self._process.kill()
        raise WorkerEnded(self._process.wait())

    def _read(self, size: int) -> bytearray:
        contents = bytearray(size)
        if self._process.stdout.readinto(contents) != size:
            raise EOFError
        return contents

    def end(self) -> None:
        """Kill the process; a call of `ask` that waits for its reply raises WorkerEnded."""
        self._process.kill()

    def close(self) -> None:
        """Kill the process and release its pipes."""
        self.end()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:  # buffered bytes cannot be sent any more
                continue


class Pool:
    """A pool of workers whose callers wait in a first-in, first-out queue.

    Args:
        size: number of processes.
        limits: of a request.
        name: prefix of the names of the threads that wait for replies.
    """

    def __init__(self, size: int, limits: Limits, *, name: str) -> None:
        self._size, self._limits = size, limits
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=name)
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        self._all: set[Worker] = set()
        self._is_over = False

    def start(self) -> None:
        """Start the processes."""
        for _ in range(self._size):
            self._add()

    def stop(self) -> None:
        """Kill the processes."""
        self._is_over = True
        for worker in self._all:
            worker.end()
        self._threads.shutdown()
        for worker in self._all:
            worker.close()

    async def ask(self, task: str, parts: Parts, **given: Any) -> tuple[Any, list[bytearray]]:
        """Return the value and the byte strings of a worker's reply.

        A worker whose caller was cancelled continues until it replies or the kernel ends it: a new process costs more.

        Raises:
            Refusal: as the worker raised it; 413 if it took too long; 400 if it crashed.
        """
        worker = await self._free.get()
        begun = asyncio.get_running_loop().run_in_executor(self._threads, worker.ask, task, given, parts)
        begun.add_done_callback(lambda ended: self._take_back(worker, ended))
        try:
            value, contents = await asyncio.shield(begun)
        except WorkerEnded as error:
            if error.is_late:
                raise Refusal(
                    413, f"Reading the request takes more than {self._limits.read_seconds:g} seconds of processor time."
                ) from error
            raise Refusal(400, "The request cannot be read; a picture in it may be damaged.") from error
        if isinstance(value, dict) and "status" in value:
            raise Refusal(value["status"], value["error"])
        return value, contents

    def _add(self) -> None:
        worker = Worker(self._limits)
        self._all.add(worker)
        self._free.put_nowait(worker)

    def _take_back(self, worker: Worker, ended: asyncio.Future) -> None:
        has_fallen = ended.cancelled() or ended.exception() is not None
        if self._is_over:
            return
        if not has_fallen:
            self._free.put_nowait(worker)
        else:
            self._all.discard(worker)
            worker.close()
            self._add()


BATCH_IMAGES, BATCH_PIXELS = 32, 16_000_000
"""Number of pictures, and of their pixels, from which on a batch takes no further request."""


@dataclass(frozen=True)
class FacesFound:
    """The faces in one picture.

    Attributes:
        num_found: number of faces found, including those beyond the limit.
        crops: the faces that were predicted, the largest first.
        probabilities: float32 [len(crops), C].
    """

    num_found: int
    crops: list[Crop]
    probabilities: np.ndarray


@dataclass
class PredictionTask:
    """The prediction work of one request.

    Attributes:
        model: the model to predict with.
        images: pictures, uint8 [H, W, 3] each; or, if `faces` is None, crops of the model's size, uint8 [S, S, C] each.
        faces: "auto" or "whole", see `build_cropper`; None: the images are crops.
        most_faces: maximum number of faces that are predicted per picture.
        done: the future result: for pictures a list of `FacesFound`, for crops probabilities float32 [N, C].
    """

    model: ServedModel
    images: Sequence[np.ndarray]
    faces: str | None = None
    most_faces: int = 32
    done: Future = field(default_factory=Future)


class Batcher:
    """A thread that collects the work of requests for a few milliseconds, and predicts it as one batch.

    Args:
        window: seconds for which the first request of a batch waits for others.
        observe: called with the number of images of each batch.
    """

    def __init__(self, *, window: float = 0.005, observe: Callable[[int], None] = lambda images: None) -> None:
        self.window = window
        self.seconds_each = 0.1
        """Running mean of the prediction time per request in seconds."""
        self._observe = observe
        self._waiting: queue.SimpleQueue[PredictionTask | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dlfer-inference", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, work: PredictionTask) -> Future:
        """Queue work and return its future; work whose future is cancelled before it begins is skipped."""
        self._waiting.put(work)
        return work.done

    def stop(self) -> None:
        """Finish the submitted work, and stop the thread."""
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

    def _collect(self, first: PredictionTask | None) -> tuple[list[PredictionTask], bool]:
        """Return the works of the next batch, and whether it is the last batch."""
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

    def _answer(self, works: list[PredictionTask]) -> None:
        """Set the results; if a batch fails, retry its works one by one, so that only the faulty ones fail."""
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


def predict_works(works: Sequence[PredictionTask]) -> list[list[FacesFound] | np.ndarray]:
    """Return the results of several works, calling each model once with all its crops."""
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


def _count(works: Sequence[PredictionTask]) -> tuple[int, int]:
    """Return the total number of images, and of their pixels."""
    images = [image for work in works for image in work.images]
    return len(images), sum(image.shape[0] * image.shape[1] for image in images)
