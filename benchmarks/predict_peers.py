"""Speed and memory of prediction for photographs, face crops and videos: this checkout, older ones and package `fer`.

    python benchmarks/predict_peers.py --photos FOLDER --json results/speed/predict_peers.json \\
        --other OLD_CHECKOUT=PYTHON --fer PYTHON [--rounds 5]

PYTHON is an interpreter with the dependencies of that system: for `fer` an environment of its own (`pip install
fer==25.10.3`), for an older checkout usually the interpreter of this one. The photographs (longest side 640 to 1024
pixels) are made from the images in FOLDER, the video from docs/astronaut.jpg; they are the same for all systems, which
take turns.

All measurements except those of face crops are of whole processes, as started by a user: the cost of a photograph is
the difference between a process with N + 1 photographs and one with a single photograph, divided by N; frames likewise.
The kernel measures wall time, CPU time over all threads, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from timing import Finished, add_options, run_process, tell_row, write_figures

ROOT = Path(__file__).resolve().parent.parent
MODEL = "lite2_96"
WHAT = ("start", "photos", "videos", "faces")

FER_PHOTOS = """
import sys
import cv2
from fer.fer import FER
detector = FER(mtcnn=sys.argv[1] == "mtcnn")
print(sum(len(detector.detect_emotions(cv2.imread(name))) for name in sys.argv[2:]))
"""
FER_VIDEO = """
import sys
import cv2
from fer.fer import FER
detector, capture, count = FER(mtcnn=sys.argv[1] == "mtcnn"), cv2.VideoCapture(sys.argv[2]), 0
while True:
    found, frame = capture.read()
    if not found:
        break
    count += len(detector.detect_emotions(frame))
print(count)
"""
FER_FACES = """
import json, time
import cv2, numpy as np
from fer.fer import FER
detector = FER()
sheet = np.tile(np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8), (8, 8, 1))
boxes = [(48 * x, 48 * y, 48, 48) for y in range(8) for x in range(8)]
def one(): [detector.detect_emotions(sheet[:48, :48], [boxes[0]]) for _ in range(16)]
def many(): detector.detect_emotions(sheet, boxes)
"""
DLFER_FACES = """
import json, sys, time
import dlfer, numpy as np
model = dlfer.load(sys.argv[1])
faces = np.random.default_rng(0).integers(0, 256, (64, 48, 48, 1)).astype(np.uint8)
def one(): [model.predict(faces[:1]) for _ in range(16)]
def many(): model.predict(faces)
"""
TIME_FACES = """
rows = {}
for name, way, number in (("1", one, 16), ("64", many, 64)):
    way(); way()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(4): way()
    rows[name] = [(time.perf_counter() - start) / 4 / number, (time.process_time() - cpu) / 4 / number]
print(json.dumps(rows))
"""


@dataclass(frozen=True)
class System:
    """A system to compare, with its commands for labelling photographs, a video, and face crops.

    Attributes:
        name: name in the table.
        photos: file names of photographs -> command.
        video: file name of a video -> command.
        faces: command that prints {"1": [wall, cpu], "64": [wall, cpu]}, in seconds per face; None: not measured.
        environment: variables that are added to the environment of this process.
        folder: working directory, from which Python imports first.
    """

    name: str
    photos: Callable[[Sequence[str]], list[str]]
    video: Callable[[str], list[str]]
    faces: list[str] | None
    environment: Mapping[str, str]
    folder: Path


def measure(command: Sequence[str], system: System) -> Finished:
    """Run a command of a system, and return its output and its cost."""
    return run_process(command, environment=system.environment, folder=system.folder)


def make_dlfer(name: str, folder: Path, python: str) -> System:
    """Return the system for a checkout of this project."""

    def label(names: Sequence[str]) -> list[str]:
        return [python, "-m", "dlfer", "predict", *names, "--model", MODEL]

    return System(
        name,
        label,
        lambda file: label([file]),
        [python, "-c", DLFER_FACES + TIME_FACES, MODEL],
        {"PYTHONPATH": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3"},
        folder,
    )


def make_fer(detector: str, python: str) -> System:
    """Return the system for the package `fer` with its detector "opencv" (the default) or "mtcnn"."""
    return System(
        f"fer, {detector}",
        lambda names: [python, "-c", FER_PHOTOS, detector, *names],
        lambda file: [python, "-c", FER_VIDEO, detector, file],
        [python, "-c", FER_FACES + TIME_FACES] if detector == "opencv" else None,
        {"TF_CPP_MIN_LOG_LEVEL": "3"},
        Path(tempfile.gettempdir()),
    )


def prepare_photos(source: Path, target: Path, number: int) -> list[str]:
    """Write `number` photographs, with a longest side of 640 to 1024 pixels, from `source`; return their names."""
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = []
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
            longest = max(image.size)
            scale = min(1024, max(640, longest)) / longest
            photos.append(image.resize((round(image.width * scale), round(image.height * scale))))
    names = [str(target / f"{index:03}.jpg") for index in range(number)]
    for index, name in enumerate(names):
        photos[index % len(photos)].save(name, quality=92)
    return names


def prepare_video(photo: Path, target: Path, number: int) -> str:
    """Write a 640 x 480 video of a moving photograph, with `number` frames at 25 per second; return its name."""
    import cv2

    image = cv2.resize(cv2.imread(str(photo)), (560, 560))
    writer = cv2.VideoWriter(str(target / f"{number}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (640, 480))
    for index in range(number):
        frame = np.full((480, 640, 3), 90, np.uint8)
        x = round(40 + 40 * np.sin(index / 20))
        frame[:, x : x + 560] = image[:480]
        writer.write(frame)
    writer.release()
    return str(target / f"{number}.mp4")


def divide(more: Finished, less: Finished, number: int) -> tuple[float, float]:
    """Return (wall, CPU) seconds per additional item, for `number` additional items; at least a millisecond."""
    return max(1e-3, (more.seconds - less.seconds) / number), max(1e-3, (more.cpu_seconds - less.cpu_seconds) / number)


def summarise(values: Sequence[float]) -> dict[str, object]:
    """Return the median and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": round(float(middle), 4), "quartiles": [round(float(low), 4), round(float(high), 4)]}


def tell(what: str, unit: str, taken: Mapping[str, Sequence[float]], rows: list) -> None:
    """Print a row for each system, with the ratio of its values to those of the first system in the same round."""
    first = np.array(next(iter(taken.values())))
    for name, values in taken.items():
        times = summarise(np.array(values) / first)
        tell_row({"what": what, "unit": unit, "system": name, **summarise(values), "times_ours": times}, rows)


def compare(systems: Sequence[System], folder: Path, given: argparse.Namespace, rows: list) -> None:
    """Measure all systems in turns, and print the results."""
    photos = prepare_photos(given.photos, folder, given.number + 1)
    short, long = (prepare_video(ROOT / "docs" / "astronaut.jpg", folder, number) for number in (25, 25 + given.frames))
    taken: dict[str, dict[str, list[float]]] = {}

    for round_number in range(given.rounds + 1):
        for system in systems:
            measured: list[tuple[str, float]] = []
            if "start" in given.what:
                one = measure(system.photos([str(ROOT / "docs" / "astronaut.jpg")]), system)
                measured += [
                    ("start to first answer, wall|s", one.seconds),
                    ("start to first answer, CPU|s", one.cpu_seconds),
                    ("one photograph, peak memory|MB", one.megabytes),
                ]
            if "photos" in given.what:
                first, many = measure(system.photos(photos[:1]), system), measure(system.photos(photos), system)
                wall, cpu = divide(many, first, given.number)
                measured += [
                    ("a photograph, wall|s", wall),
                    ("a photograph, CPU|s", cpu),
                    ("all photographs, peak memory|MB", many.megabytes),
                ]
            if "videos" in given.what:
                few, more = (measure(system.video(name), system) for name in (short, long))
                wall, cpu = divide(more, few, given.frames)
                measured += [("a video frame, wall|s", wall), ("a video frame, CPU|s", cpu)]
            if "faces" in given.what and system.faces is not None:
                for batch, (wall, cpu) in json.loads(measure(system.faces, system).output).items():
                    measured += [
                        (f"a ready face, batch {batch}, wall|s", wall),
                        (f"a ready face, batch {batch}, CPU|s", cpu),
                    ]
            if round_number:  # the first round is a warm-up, which reads the files from disk
                for what, value in measured:
                    taken.setdefault(what, {}).setdefault(system.name, []).append(value)
    for what, values in taken.items():
        tell(*what.split("|"), values, rows)


def main() -> None:
    """Run the benchmark, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--other", action="append", default=[], metavar="FOLDER=PYTHON", help="an older checkout")
    parser.add_argument("--fer", metavar="PYTHON", help="interpreter that has the package fer")
    parser.add_argument("--number", type=int, default=24, help="photographs after the first (default: 24)")
    parser.add_argument("--frames", type=int, default=100, help="frames after the first 25 (default: 100)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="what is measured (default: all)")
    add_options(parser, rounds=5)
    given = parser.parse_args()
    systems = [make_dlfer("this checkout", ROOT, sys.executable)]
    for other in given.other:
        folder, _, python = other.partition("=")
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        systems.append(make_dlfer(f"commit {commit}", Path(folder), python or sys.executable))
    if given.fer:
        systems += [make_fer(detector, given.fer) for detector in ("opencv", "mtcnn")]
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        compare(systems, Path(folder), given, rows)
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "onnxruntime", "numpy", "pillow")


if __name__ == "__main__":
    main()
