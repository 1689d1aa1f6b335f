"""The pool of worker processes that parse and decode untrusted input; a worker that exceeds its limits is replaced."""

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
    """Several workers that share a queue, first in, first out.

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

        A worker whose caller was cancelled goes on until it replies or the kernel ends it: starting a process costs more.

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
