"""Watches a server from outside: python watch.py PORT PID, until stdin ends; then one line of JSON on stdout.

A process of its own, so that nothing that a test does slows it. Reports the memory (MB, resident, all of the server's
processes together) at the beginning and at most, and the longest time that /healthz took (seconds): as measured, and
without the time in which a thread of the server was ready to run and the processors were busy with other programs.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def measure(parent: int) -> float:
    """Return the resident megabytes of a process and its children."""
    total = 0
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for process in (str(parent), *children):
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
        except OSError:  # it ended
            continue
    return total / 1e6


def read_waits(process: int) -> dict[str, float]:
    """Return, for each thread of a process, the seconds that it was ready to run and waited for a processor."""
    waits = {}
    for thread in Path(f"/proc/{process}/task").iterdir():
        try:
            waits[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):  # it ended; a kernel without this statistic
            continue
    return waits


def ask_health(port: int, process: int) -> tuple[float, float]:
    """Return the seconds until /healthz has answered, on a connection of its own, and without waits for a processor."""
    before, start = read_waits(process), time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    connection.close()
    seconds = time.monotonic() - start if answer.status == 200 else float("inf")
    waited = max((wait - before.get(name, 0.0) for name, wait in read_waits(process).items()), default=0.0)
    return seconds, max(0.0, seconds - waited)


def watch_memory(parent: int, peaks: list[float], is_over: threading.Event) -> None:
    """Keep the largest measurement in `peaks[0]`, every 2 ms: the peak of a picture lasts a few milliseconds."""
    while not is_over.wait(0.002):
        peaks[0] = max(peaks[0], measure(parent))


def main() -> None:
    port, parent = int(sys.argv[1]), int(sys.argv[2])
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    rest = measure(parent)
    peaks = [rest]
    watcher = threading.Thread(target=watch_memory, args=(parent, peaks, is_over))
    watcher.start()
    answers = [ask_health(port, parent)]
    print(json.dumps(rest), flush=True)
    asked = time.monotonic()
    while not is_over.wait(0.02):
        if time.monotonic() > asked + 0.2:
            try:
                answers.append(ask_health(port, parent))
            except OSError:
                answers.append((float("inf"), float("inf")))
            asked = time.monotonic()
    watcher.join()
    measured, slowest = (max(column) for column in zip(*answers, strict=True))
    print(json.dumps({"rest": rest, "most": peaks[0], "measured": measured, "slowest": slowest}))


if __name__ == "__main__":
    main()
