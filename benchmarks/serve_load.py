"""Load test of `dlfer serve` with valid and invalid requests: the table in results/serving.md.

    python benchmarks/serve_load.py MODEL                          64 clients, a minute
    python benchmarks/serve_load.py MODEL --photo PHOTO.jpg        also with a photo in which faces are detected
    python benchmarks/serve_load.py MODEL --json results/serve/load.json

It starts the server as a separate process, sends the requests of `make_kinds`, and checks every response: each kind has
a set of allowed statuses, and 503 with Retry-After is allowed for all. The exit code is 1 if there was any other
response. The memory of all processes of the server is read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image


def make_form(contents: bytes, **fields: str) -> tuple[bytes, dict[str, str]]:
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (k.encode(), v.encode())
        for k, v in fields.items()
    ]
    parts.append(
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + contents + b"\r\n--b--\r\n"
    )
    return b"".join(parts), {"Content-Type": "multipart/form-data; boundary=b"}


def make_json(value: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def make_huge_png() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def make_kinds(
    model: str, photo: bytes | None
) -> dict[str, tuple[float, str, tuple[bytes, dict[str, str]], set[int | str]]]:
    """Return the kinds of requests by name: (weight, path, (body, headers), allowed statuses)."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 48)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    crop, infer = stream.getvalue(), f"/v2/models/{model}/infer"
    tensor = {"name": "images", "shape": [4, 48, 48], "datatype": "UINT8", "data": noise.ravel().tolist() * 4}
    odd = {**tensor, "shape": [1, 31, 57], "data": noise.ravel().tolist()[: 31 * 57]}
    # If the server does not read the whole body, the connection may be reset before the client has read the response.
    kinds = {
        "crop": (60, "/v1/predict", make_form(crop, faces="whole"), {200}),
        "tensor": (10, infer, make_json({"inputs": [tensor]}), {200}),
        "tensor of an odd size": (2, infer, make_json({"inputs": [odd]}), {200}),
        "text called .jpg": (4, "/v1/predict", make_form(b"only words\n" * 50), {415}),
        "200 megapixels": (4, "/v1/predict", make_form(make_huge_png()), {413}),
        "cut short": (4, "/v1/predict", make_form(crop[:-200], faces="whole"), {400}),
        "body too large": (2, "/v1/predict", make_form(bytes(21 * 2**20)), {413, "reset"}),
        "damaged JSON": (4, "/v1/predict", (b'{"images": [', {"Content-Type": "application/json"}), {400}),
        "unknown model": (2, "/v1/predict", make_form(crop, model="none"), {404}),
        "unknown path": (2, "/v1/nothing", make_json({}), {404}),
        "hangs up": (2, "", (b"", {}), {0}),
    }
    if photo is not None:
        kinds["photo"] = (4, "/v1/predict", make_form(photo), {200, 504})
    return kinds


class Load:
    """The clients of a load test, which send requests until the time is over, and the responses that they got."""

    def __init__(self, port: int, kinds: dict, seconds: float) -> None:
        self.port, self.kinds, self.end = port, kinds, time.monotonic() + seconds
        self.seen: Counter = Counter()
        self.wrong: Counter = Counter()
        self.seconds: dict[str, list[float]] = {name: [] for name in kinds}
        self._lock = threading.Lock()

    def run(self, seed: int) -> None:
        """Send requests as one client, until the time is over."""
        choice, names = random.Random(seed), list(self.kinds)
        weights = [self.kinds[name][0] for name in names]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while time.monotonic() < self.end:
            name = choice.choices(names, weights)[0]
            start = time.monotonic()
            status, wait = (self._hang_up(), 0.0) if name == "hangs up" else self._send(connection, name)
            with self._lock:
                self.seen[name, status] += 1
                if status == 200:
                    self.seconds[name].append(time.monotonic() - start)
                if status not in self.kinds[name][3] and not (status == 503 and wait):
                    self.wrong[name, status] += 1
            # A client waits after Retry-After, but less than requested, so that the queue stays full.
            time.sleep(min(wait, 1.0) * choice.random())
        connection.close()

    def _send(self, connection: http.client.HTTPConnection, name: str) -> tuple[int | str, float]:
        _, path, (body, headers), _ = self.kinds[name]
        try:
            connection.request("POST", path, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # rejected before the body was read, but there may still be a response
        except OSError as error:
            connection.close()
            return type(error).__name__, 0.0
        try:
            answer = connection.getresponse()
            answer.read()
            return answer.status, float(answer.headers.get("Retry-After") or 0)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return ("reset" if isinstance(error, ConnectionError) else type(error).__name__), 0.0

    def _hang_up(self) -> int:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n")
            connection.sendall(b"Content-Type: application/json\r\n\r\n{")
        return 0


def read_resident(process: int) -> float:
    """Return the memory of a process and its children in megabytes (PSS, in which shared pages count once)."""
    total = 0.0
    for number in (process, *Path(f"/proc/{process}/task/{process}/children").read_text().split()):
        try:
            rows = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        except OSError:  # the worker has just ended
            continue
        total += sum(int(row.split()[1]) for row in rows if row.startswith("Pss:")) * 1024 / 1e6
    return total


def start_server(model: str) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "dlfer", "serve", f"model={model}", "--port", "0", "--no-access-log"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if " at http://127.0.0.1:" in line:
            port = int(line.partition(" at http://127.0.0.1:")[2].partition("/")[0])
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, port
    raise SystemExit("the server did not start")


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server is not ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--photo", type=Path, help="a photo whose faces are searched for")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    server, port = start_server(options.model)
    try:
        wait_until_ready(port)
        kinds = make_kinds("model", options.photo.read_bytes() if options.photo else None)
        warm = Load(port, kinds, 5)
        _run(warm, options.clients)
        begin, load, resident = time.monotonic(), Load(port, kinds, options.seconds), []
        threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(options.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            resident.append(read_resident(server.pid))
            time.sleep(0.5)
        took = time.monotonic() - begin
    finally:
        server.terminate()
        code = server.wait(60)
    figures = summarise(load, took, resident) | {"exit_code_after_sigterm": code, "clients": options.clients}
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(1 if load.wrong or code else 0)


def _run(load: Load, clients: int) -> None:
    threads = [threading.Thread(target=load.run, args=(1000 + seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def summarise(load: Load, took: float, resident: list[float]) -> dict:
    """Return the results; latencies are those of responses with status 200."""

    def quantiles(values: list[float]) -> dict[str, float]:
        found = np.quantile(values, [0.5, 0.99]) * 1000
        return {"n": len(values), "p50_ms": round(found[0], 1), "p99_ms": round(found[1], 1)}

    every = [value for values in load.seconds.values() for value in values]
    return {
        "seconds": round(took, 1),
        "requests": sum(load.seen.values()),
        "requests_per_second": round(sum(load.seen.values()) / took, 1),
        "answered_200_per_second": round(len(every) / took, 1),
        "latency": {name: quantiles(values) for name, values in {"all": every, **load.seconds}.items() if values},
        "answers": {
            name: {str(s): n for (k, s), n in sorted(load.seen.items(), key=str) if k == name} for name in load.kinds
        },
        "not_stated": {f"{name}: {status}": count for (name, status), count in load.wrong.items()},
        "resident_mb": {
            "start": round(resident[0]),
            "mean_of_each_tenth": [round(float(part.mean())) for part in np.array_split(np.array(resident), 10)],
            "end": round(resident[-1]),
            "most": round(max(resident)),
        },
    }


if __name__ == "__main__":
    main()
