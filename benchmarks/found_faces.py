"""Comparison of predictions for detected faces with those for FER2013's own crops, and the effect of the cropping.

    python benchmarks/found_faces.py --csv fer2013.csv --photos FOLDER --json found_faces.json

Three measurements of a model of ready crops (`lite2_96`):

- Geometry: the positions of the eyes and the mouth in FER2013's own crops ("ready crops") and in the crops that dlfer
  makes of detected faces, from CenterFace's landmarks. Those in ready crops are relative to the whole image, not a box.
- Predictions: the images of PublicTest are enlarged by 2 and framed in black, the face is detected, and cropped from
  the original image with several scales and vertical offsets of the box. The even rows select the best, the odd ones
  are reported. For comparison, on the same rows: the ready crops; the ready crops resampled with their own edges as the
  box, which shows the effect of interpolation alone; and the current crop on images enlarged up to 3 times, as larger
  faces.
- Photographs: the predictions for faces with a closed mouth that do not smile (`detector_photos.csv`, judged by eye).

The model's epoch and temperature were selected on PublicTest, so these are validation results, and the calibration of
the ready crops is too good. Confidences are calibrated with the model's temperature, as in `dlfer predict`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from detectors import TABLE, find_photos, match_boxes, read_table
from PIL import Image
from timing import tell_row, write_figures

from dlfer.data.bundle import Split
from dlfer.data.faces import Face, detect_faces, detect_faces_of_each
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.images import to_channels
from dlfer.metrics.confidence import compute_calibration
from dlfer.metrics.intervals import compute_proportion
from dlfer.metrics.paired import compare_paired
from dlfer.metrics.predictions import Predictions
from dlfer.predict.crops import MARGINS, crop_face_square
from dlfer.predict.engines import Engine, get_crop_size, load_model

SCALES = (0.85, 0.95, 1.0, 1.05, 1.15, 1.3)
"""Sides of the cropped square, as multiples of the longer side of the detected box."""

OFFSETS = (-0.1, -0.05, 0.0, 0.05, 0.1)
"""Vertical shifts of the square, as fractions of the longer side of the box; positive is downward."""

ENLARGED, FRAME, BATCH = 2, 48, 64
"""Factor by which an image is enlarged before framing, width of the frame in pixels, number of images per batch."""

SIDE = 48
"""Side of FER2013's images in pixels."""

FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Factors by which images are enlarged in the measurement of larger faces."""

CURRENT = (1 + 2 * MARGINS["centerface"], 0.0)


def frame_image(image: np.ndarray) -> np.ndarray:
    """Return a grey crop, uint8 [H, W, 1], enlarged and with a black frame, so that a detector can find the face."""
    size = (image.shape[1] * ENLARGED, image.shape[0] * ENLARGED)
    large = np.asarray(Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BICUBIC))
    return np.pad(large, FRAME)[..., None]


def unframe_face(face: Face) -> Face:
    """Convert a face in a framed image to pixels of the original image; its box may extend beyond the image."""
    left, top, width, height = face.box
    box = ((left - FRAME) / ENLARGED, (top - FRAME) / ENLARGED, width / ENLARGED, height / ENLARGED)
    return replace(face, box=box, landmarks=(face.landmarks + 0.5 - FRAME) / ENLARGED - 0.5)


def find_faces(images: np.ndarray) -> list[Face | None]:
    """Return the largest face of each image, uint8 [N, H, W, 1], detected with a frame, in pixels of the image."""
    found: list[Face | None] = []
    for start in range(0, len(images), BATCH):
        framed = [frame_image(image) for image in images[start : start + BATCH]]
        found += [unframe_face(faces[0]) if faces else None for faces in detect_faces_of_each(framed)]
    return found


def move_face(face: Face, offset: float) -> Face:
    """Return a face with its box moved down by a fraction of its longer side."""
    left, top, width, height = face.box
    return replace(face, box=(left, top + offset * max(width, height), width, height))


def cut_face(image: np.ndarray, face: Face, scale: float, offset: float, size: int) -> np.ndarray:
    """Return the crop of `dlfer predict` for another scale and offset of the box; `size` is now 96, formerly 48."""
    return crop_face_square(image, move_face(face, offset), size, margin=(scale - 1) / 2, trained_side=SIDE)


def describe_geometry(box: Sequence[float], landmarks: np.ndarray) -> tuple[float, float, float, float]:
    """Return the position of a face in the square around a box, as fractions of the square's side.

    Returns:
        distance between the eyes; distance from the midpoint of the eyes to that of the corners of the mouth; distances
        of these two midpoints from the upper edge.
    """
    _, top, width, height = box
    side = max(width, height)
    eyes, mouth = landmarks[:2].mean(axis=0), landmarks[3:].mean(axis=0)
    upper = top + height / 2 - side / 2 - 0.5
    across, down = np.linalg.norm(landmarks[1] - landmarks[0]), np.linalg.norm(mouth - eyes)
    return float(across / side), float(down / side), float((eyes[1] - upper) / side), float((mouth[1] - upper) / side)


def summarise_geometry(name: str, rows: Sequence[tuple[float, ...]]) -> dict:
    """Return the median and the quartiles of each measure."""
    names = ("eye_distance", "eyes_to_mouth", "height_of_eyes", "height_of_mouth")
    quartiles = np.quantile(np.array(rows), [0.5, 0.25, 0.75], axis=0).T
    return {
        "geometry": name,
        "n": len(rows),
        **{key: np.round(q, 3).tolist() for key, q in zip(names, quartiles, strict=True)},
    }


def get_cut_box(face: Face, scale: float, offset: float) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the square that `cut_face` crops for an upright face."""
    left, top, width, height = move_face(face, offset).box
    side = max(width, height) * scale
    return left + (width - side) / 2, top + (height - side) / 2, side, side


def judge(predictions: Predictions) -> dict:
    """Return accuracy, mean confidence, ECE, and the share of Neutral and Sad faces that are predicted as Happy."""
    index = {label: predictions.labels.index(label) for label in ("Neutral", "Sad", "Happy")}
    calm = np.isin(predictions.targets, [index["Neutral"], index["Sad"]])
    happy = predictions.predicted == index["Happy"]
    confidences = predictions.probabilities.max(axis=1)
    calibration = compute_calibration(predictions)["raw"]
    return {
        "n": len(predictions),
        "accuracy": compute_proportion(int(predictions.correct.sum()), len(predictions)),
        "confidence": float(confidences.mean()),
        "ece": calibration["ece_equal_mass"],
        "ece_if_calibrated": calibration["ece_if_calibrated"],
        "calm_called_happy": {"n": int(calm.sum()), **compute_proportion(int((happy & calm).sum()), int(calm.sum()))},
        "called_happy": float(happy.mean()),
    }


def answer(model: Engine, images: Sequence[np.ndarray], split: Split, rows: np.ndarray) -> Predictions:
    """Return calibrated predictions for crops, uint8 [S, S, 1] each, of the given rows of a split."""
    probabilities = model.predict(np.stack(images), calibrated=True)
    return Predictions(split.ids[rows], model.labels, split.targets[rows], probabilities)


def answer_cut(
    model: Engine,
    split: Split,
    faces: Sequence[Face | None],
    rows: np.ndarray,
    place: tuple[float, float],
    size: int | None = None,
) -> Predictions:
    """Return predictions for detected faces of some rows, cropped at `place` (scale, offset) to `size` pixels."""
    side = size or get_crop_size(model)
    return answer(model, [cut_face(split.images[row], faces[row], *place, side) for row in rows], split, rows)


def choose_place(model: Engine, split: Split, faces: Sequence[Face | None], rows: np.ndarray, told: list) -> tuple:
    """Return the scale and offset with the most correct predictions on the selection rows; print the whole grid."""
    right = {}
    for scale in SCALES:
        for offset in OFFSETS:
            found = answer_cut(model, split, faces, rows, (scale, offset))
            right[scale, offset] = int(found.correct.sum())
            tell_row({"part": "choosing", "scale": scale, "offset": offset, **judge(found)}, told)
    return max(right, key=right.get)


def report_places(
    model: Engine, split: Split, faces: Sequence[Face | None], rows: np.ndarray, best: tuple, told: list
) -> None:
    """Print the results of the ready crops, their resampling, the current crop and others on the reported rows."""
    height, width = split.images.shape[1:3]
    own = [Face((0.0, 0.0, float(width), float(height)), 1.0)] * len(split)
    former, now = f"the present cut at {SIDE} pixels (before)", "the present cut"
    ways = {"the ready crops": answer(model, split.images[rows], split, rows)}
    for name, found, place, size in (
        (f"ready crops cut by their own edges at {SIDE} pixels (before)", own, (1.0, 0.0), SIDE),
        ("ready crops cut by their own edges", own, (1.0, 0.0), None),
        (former, faces, CURRENT, SIDE),
        (now, faces, CURRENT, None),
        ("the chosen cut", faces, best, None),
    ):
        ways[name] = answer_cut(model, split, found, rows, place, size)
    for name, found in ways.items():
        tell_row({"part": "reported", "crops": name, **judge(found)}, told)
    for first, second in ((now, former), ("the ready crops", now), ("the chosen cut", now)):
        test = compare_paired(ways[first], ways[second], names=(first, second))
        points = {key: getattr(test.difference, key) for key in ("value", "low", "high")}
        tell_row({"part": "reported", "compared": [first, second], "points": points, "p": test.p_value}, told)


def report_sizes(model: Engine, split: Split, faces: Sequence[Face | None], rows: np.ndarray, told: list) -> None:
    """Print the results for faces of several sizes: images enlarged bicubically, with their boxes scaled."""
    ready = answer(model, split.images[rows], split, rows)
    for factor in FACTORS:
        side = round(SIDE * factor)
        large = [
            np.asarray(Image.fromarray(split.images[row][..., 0]).resize((side, side), Image.Resampling.BICUBIC))
            for row in rows
        ]
        found = [enlarge_face(faces[row], side / SIDE) for row in rows]
        for name, size in (("the present cut", get_crop_size(model)), (f"at {SIDE} pixels (before)", SIDE)):
            cut = [cut_face(image[..., None], face, *CURRENT, size) for image, face in zip(large, found, strict=True)]
            judged = answer(model, cut, split, rows)
            test = compare_paired(judged, ready, names=(name, "the ready crops"))
            points = {key: getattr(test.difference, key) for key in ("value", "low", "high")}
            row = {
                "part": "sizes",
                "side": side,
                "crops": name,
                "n": len(rows),
                "accuracy": float(judged.correct.mean()),
            }
            tell_row({**row, "points": points, "p": test.p_value}, told)


def enlarge_face(face: Face, factor: float) -> Face:
    """Return a face with its coordinates in an image that is enlarged by a factor."""
    return replace(
        face, box=tuple(factor * value for value in face.box), landmarks=(face.landmarks + 0.5) * factor - 0.5
    )


def judge_photos(model: Engine, folder: Path, ways: dict[str, tuple], told: list) -> None:
    """Print the geometry of the faces detected in the photographs, and the predictions for those that do not smile."""
    geometry, closed = [], []
    for photo, image in find_photos(read_table(TABLE), folder):
        faces = detect_faces(image)
        for row, place in match_boxes(photo.faces, [face.box for face in faces], photo.ignored).pairs:
            face = faces[place]
            geometry.append(describe_geometry(get_cut_box(face, *CURRENT), face.landmarks))
            if row in photo.closed:
                closed.append((f"{photo.file} {row + 1}", image, face))
    tell_row(summarise_geometry("photographs, the present cut", geometry), told)
    for name, (place, size) in ways.items():
        crops = [to_channels(cut_face(image, face, *place, size), model.channels) for _, image, face in closed]
        given = model.predict(np.stack(crops), calibrated=True)
        labels = [model.labels[column] for column in given.argmax(axis=1)]
        shares = {label: labels.count(label) for label in sorted(set(labels))}
        tell_row({"photographs": name, "place": place, "n": len(closed), "labels": shares}, told)
        for (file, _, _), label, confidence in zip(closed, labels, given.max(axis=1), strict=True):
            row = {"photographs": name, "face": file, "label": label, "confidence": round(float(confidence), 3)}
            tell_row(row, told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="fer2013.csv")
    parser.add_argument("--photos", type=Path, help="the folder of benchmarks/detectors.py")
    parser.add_argument("--model", default="lite2_96", help="a model of ready crops (default: lite2_96)")
    parser.add_argument("--rows", type=int, nargs=2, default=(0, 3589), help="of PublicTest, from and up to before")
    parser.add_argument("--no-grid", action="store_true", help="choose nothing, report the present cut on all the rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    model = load_model(given.model)
    split = load_fer2013_usage(given.csv, "PublicTest", labels=model.labels)
    split = split.take(np.arange(*given.rows))
    faces = find_faces(split.images)
    rows = np.array([row for row, face in enumerate(faces) if face is not None])
    told: list[dict] = []
    tell_row({"images": len(faces), "found": compute_proportion(len(rows), len(faces))}, told)
    own = (0.0, 0.0, *map(float, split.images.shape[2:0:-1]))
    tell_row(summarise_geometry("ready crops", [describe_geometry(own, faces[row].landmarks) for row in rows]), told)
    cut = [describe_geometry(get_cut_box(faces[row], *CURRENT), faces[row].landmarks) for row in rows]
    tell_row(summarise_geometry("ready crops found again, the present cut", cut), told)
    best, reported = CURRENT, rows
    if not given.no_grid:
        best, reported = choose_place(model, split, faces, rows[rows % 2 == 0], told), rows[rows % 2 == 1]
    report_places(model, split, faces, reported, best, told)
    report_sizes(model, split, faces, reported, told)
    if given.photos:
        side = get_crop_size(model)
        cuts = {"before": (CURRENT, SIDE), "now": (CURRENT, side), "chosen": (best, side)}
        judge_photos(model, given.photos, cuts, told)
    write_figures(given.json, told, "onnxruntime", "numpy")


if __name__ == "__main__":
    main()
