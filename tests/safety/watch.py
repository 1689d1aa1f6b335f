"""Watches a server from outside: python watch.py PORT PID, until stdin ends; then one line of JSON on stdout.

A process of its own, so that nothing that a test does slows it. Tells the memory (MB, resident, all of the
server's processes together) at the beginning and at most, how long /healthz took at most, and by how much
this process itself woke up late at most, which is what a busy machine adds to every answer.
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


def ask_health(port: int) -> float:
    """Return the seconds until /healthz has answered, on a connection of its own."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return time.monotonic() - start if answer.status == 200 else float("inf")


def main() -> None:
    port, parent = int(sys.argv[1]), int(sys.argv[2])
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    rest, slowest = measure(parent), ask_health(port)
    most, asked = rest, time.monotonic()
    print(json.dumps(rest), flush=True)
    lag, woken = 0.0, time.monotonic()
    while not is_over.wait(0.02):
        lag = max(lag, time.monotonic() - woken - 0.02)
        most = max(most, measure(parent))
        if time.monotonic() > asked + 0.2:
            try:
                slowest = max(slowest, ask_health(port))
            except OSError:
                slowest = float("inf")
            asked = time.monotonic()
        woken = time.monotonic()
    print(json.dumps({"rest": rest, "most": most, "slowest": slowest, "lag": lag}))


if __name__ == "__main__":
    main()
