"""Share of FER2013's face crops in which each detector finds a face, with and without the frame that dlfer adds.

    python benchmarks/crop_faces.py fer2013.csv --json results/faces/crop_faces.json

Before detection, dlfer enlarges an image of 48 pixels to `dlfer.data.faces.CROP_SIDE` and adds a frame, which is black
for centerface and repeats the image's edge for the other detectors. `data.faces` uses images without a found face
whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from timing import tell_row, write_figures

from dlfer.data import faces
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.metrics.intervals import compute_proportion

FRAMES = {"black": "constant", "edge": "edge", "none": None}


def count_found(images: np.ndarray, detector: str, mode: str | None) -> int:
    """Return how many images, uint8 [N, H, W, 1], have a found face; `mode` is np.pad's mode, or None for no frame."""
    width, usual = faces.FRAME, faces.DETECTORS[detector]
    try:
        faces.FRAME = width if mode else 0.0
        faces.DETECTORS[detector] = usual._replace(frame=mode or usual.frame)
        return sum(bool(found) for found in faces.detect_faces_of_each(images, detector=detector))
    finally:
        faces.FRAME, faces.DETECTORS[detector] = width, usual


def main() -> None:
    """Print one row for each combination of detector and frame."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="fer2013.csv")
    parser.add_argument("--usage", default="PublicTest", help="its rows (default: PublicTest)")
    parser.add_argument("--rows", type=int, help="the first of these only")
    parser.add_argument("--detectors", nargs="*", default=list(faces.DETECTORS), choices=list(faces.DETECTORS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    images = load_fer2013_usage(args.csv, args.usage).images[: args.rows]
    rows: list = []
    for detector in args.detectors:
        for name, mode in FRAMES.items():
            share = compute_proportion(count_found(images, detector, mode), len(images))
            shipped = mode == faces.DETECTORS[detector].frame
            tell_row(
                {
                    "detector": detector,
                    "frame": name,
                    "shipped": shipped,
                    "images": len(images),
                    "found": share,
                },
                rows,
            )
    write_figures(args.json, rows, "onnxruntime", "mtcnn", "opencv-python-headless", "numpy")


if __name__ == "__main__":
    main()
