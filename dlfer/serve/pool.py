"""The processes that read what strangers sent, and what is asked of them; one that took too long has ended, and is replaced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlfer.serve.limits import Limits, Refusal

_ROOT = str(Path(__file__).parents[2])
_SECRETS = ("DLFER_API_KEY",)

Parts = Sequence[bytes | memoryview]


class WorkerEnded(Exception):
    """A worker ended before it answered.

    Attributes:
        is_late: it had used up its processor time.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"the process that reads requests ended with {code}")
        self.is_late = code == -getattr(signal, "SIGPROF", 27)


class Worker:
    """One process, see `dlfer.serve.worker`."""

    def __init__(self, limits: Limits) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread each: numpy's own would only take memory.
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # glibc gives large blocks back as soon as they are free.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dlfer.serve.worker", json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C is for the server, which lets it finish.
            start_new_session=True,
        )

    def ask(self, task: str, given: dict[str, Any], parts: Parts) -> tuple[Any, list[bytearray]]:
        """Return the value and the byte strings of an answer; this waits for it, on a thread.

        Raises:
            WorkerEnded: it was ended, or fell.
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
        """End the process at once; whoever waits for its answer is told."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and forget it."""
        self.end()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:  # what was not sent cannot be sent any more
                continue


class Pool:
    """Several workers that take what comes in the order in which it comes.

    Args:
        size: number of processes.
        limits: of a request.
        name: of the threads that wait for them.
    """

    def __init__(self, size: int, limits: Limits, *, name: str) -> None:
        self._size, self._limits = size, limits
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=name)
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        self._all: set[Worker] = set()
        self._is_over = False

    def start(self) -> None:
        """Begin the processes."""
        for _ in range(self._size):
            self._add()

    def stop(self) -> None:
        """End them."""
        self._is_over = True
        for worker in self._all:
            worker.end()
        self._threads.shutdown()
        for worker in self._all:
            worker.close()

    async def ask(self, task: str, parts: Parts, **given: Any) -> tuple[Any, list[bytearray]]:
        """Return the value and the byte strings that a worker answers with.

        Who gives up waiting leaves the worker to its end, which the kernel sets: to begin a process costs more.

        Raises:
            Refusal: what the worker refuses; 413 where it takes too long; 400 where the worker fell over it.
        """
        worker = await self._free.get()
        begun = asyncio.get_running_loop().run_in_executor(self._threads, worker.ask, task, given, parts)
        begun.add_done_callback(lambda ended: self._take_back(worker, ended))
        try:
            value, contents = await asyncio.shield(begun)
        except WorkerEnded as error:
            if error.is_late:
                raise Refusal(
                    413, f"To read the request takes more than {self._limits.read_seconds:g} seconds of processor time."
                ) from error
            raise Refusal(400, "The request cannot be read; its picture may be damaged.") from error
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
