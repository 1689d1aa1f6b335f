"""Do faces that are found and cut out get other labels and confidences than ready crops, and is the cut at fault?

    python benchmarks/found_faces.py --csv fer2013.csv --photos FOLDER --json found_faces.json

Three measurements of a model of ready crops (`lite2_96`):

- Geometry: where the eyes and the mouth stand in FER2013's ready crops, and where in the crops that dlfer cuts of found
  faces, by CenterFace's landmarks. It needs no frame around the crops of FER2013 that would change the boxes.
- Answers: the images of PublicTest are enlarged twice, framed in black, found again, and cut out of the image itself at several
  scales and heights of the box. Half of the rows (the even ones) chooses, the other half is reported. Beside them, on the same
  rows: the ready crops, and these cut out by their own edges, which tells what the cut's interpolation does alone; and the
  present cut on images enlarged up to three times, for larger faces.
- Photographs: what the model says of faces whose mouth is closed and who do not smile (`detector_photos.csv`, by eye).

PublicTest chose the model's epoch and its temperature: figures on it are validation figures, and the calibration of the
ready crops is flattered by it. Confidences are calibrated by the model's temperature, as `dlfer predict` gives them.
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
from dlfer.predict.crops import MARGINS, crop_face_square, get_crop_size
from dlfer.predict.engines import Engine, load_model

SCALES = (0.85, 0.95, 1.0, 1.05, 1.15, 1.3)
"""Sides of the cut square in longer sides of the found box."""

OFFSETS = (-0.1, -0.05, 0.0, 0.05, 0.1)
"""By how many longer sides of the box the square is moved; positive: downward."""

ENLARGED, FRAME, BATCH = 2, 48, 64
"""How often an image is enlarged before it is framed, the width of the frame in pixels, framed images at a time."""

SIDE = 48
"""Of FER2013's images, in pixels."""

FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)
"""How often the images are enlarged for the measurement of larger faces."""

CURRENT = (1 + 2 * MARGINS["centerface"], 0.0)


def frame_image(image: np.ndarray) -> np.ndarray:
    """Return a grey crop, uint8 [H, W, 1], enlarged, within a black frame: a picture with a face in it, for a detector."""
    size = (image.shape[1] * ENLARGED, image.shape[0] * ENLARGED)
    large = np.asarray(Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BICUBIC))
    return np.pad(large, FRAME)[..., None]


def unframe_face(face: Face) -> Face:
    """Return a face found in a framed image in pixels of the image itself; its box may reach out."""
    left, top, width, height = face.box
    box = ((left - FRAME) / ENLARGED, (top - FRAME) / ENLARGED, width / ENLARGED, height / ENLARGED)
    return replace(face, box=box, landmarks=(face.landmarks + 0.5 - FRAME) / ENLARGED - 0.5)


def find_faces(images: np.ndarray) -> list[Face | None]:
    """Return the largest face of each framed image, uint8 [N, H, W, 1], in the image's own pixels."""
    found: list[Face | None] = []
    for start in range(0, len(images), BATCH):
        framed = [frame_image(image) for image in images[start : start + BATCH]]
        found += [unframe_face(faces[0]) if faces else None for faces in detect_faces_of_each(framed)]
    return found


def move_face(face: Face, offset: float) -> Face:
    """Return a face whose box is moved down by a fraction of its longer side."""
    left, top, width, height = face.box
    return replace(face, box=(left, top + offset * max(width, height), width, height))


def cut_face(image: np.ndarray, face: Face, scale: float, offset: float, size: int) -> np.ndarray:
    """Return what `dlfer predict` cuts out, with another scale and height of the box; `size` is 96 now, and was 48."""
    return crop_face_square(image, move_face(face, offset), size, margin=(scale - 1) / 2, trained_side=SIDE)


def describe_geometry(box: Sequence[float], landmarks: np.ndarray) -> tuple[float, float, float, float]:
    """Return the position of a face in the square around a box, as fractions of the square's side.

    Returns:
        distance of the eyes; from the middle of the eyes to that of the mouth's corners; height of the eyes and of the
        mouth below the upper edge.
    """
    _, top, width, height = box
    side = max(width, height)
    eyes, mouth = landmarks[:2].mean(axis=0), landmarks[3:].mean(axis=0)
    upper = top + height / 2 - side / 2 - 0.5
    across, down = np.linalg.norm(landmarks[1] - landmarks[0]), np.linalg.norm(mouth - eyes)
    return float(across / side), float(down / side), float((eyes[1] - upper) / side), float((mouth[1] - upper) / side)


def summarise_geometry(name: str, rows: Sequence[tuple[float, ...]]) -> dict:
    """Return the median of each measure with its quartiles."""
    names = ("eye_distance", "eyes_to_mouth", "height_of_eyes", "height_of_mouth")
    quartiles = np.quantile(np.array(rows), [0.5, 0.25, 0.75], axis=0).T
    return {
        "geometry": name,
        "n": len(rows),
        **{key: np.round(q, 3).tolist() for key, q in zip(names, quartiles, strict=True)},
    }


def get_cut_box(face: Face, scale: float, offset: float) -> tuple[float, float, float, float]:
    """Return left, top, width, height of the square that `cut_face` cuts out of an upright face."""
    left, top, width, height = move_face(face, offset).box
    side = max(width, height) * scale
    return left + (width - side) / 2, top + (height - side) / 2, side, side


def judge(predictions: Predictions) -> dict:
    """Return accuracy, mean confidence, ECE, and the share of Neutral and of Sad faces that are called Happy."""
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
    """Return calibrated predictions of crops, uint8 [S, S, 1] each, of the rows of a split."""
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
    """Return predictions of the found faces of some rows, cut out at a scale and an offset; size: None is that of `predict`."""
    side = size or get_crop_size(model)
    return answer(model, [cut_face(split.images[row], faces[row], *place, side) for row in rows], split, rows)


def choose_place(model: Engine, split: Split, faces: Sequence[Face | None], rows: np.ndarray, told: list) -> tuple:
    """Return the scale and the offset with the most right answers on the rows that choose; tell all of the grid."""
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
    """Tell what the ready crops, their resampling, the present cut and others give on the rows that report."""
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
    """Tell how the cut does on faces of several sizes: the images, and their boxes, enlarged bicubically."""
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
    """Return a face in an image that is enlarged by a factor."""
    return replace(
        face, box=tuple(factor * value for value in face.box), landmarks=(face.landmarks + 0.5) * factor - 0.5
    )


def judge_photos(model: Engine, folder: Path, ways: dict[str, tuple], told: list) -> None:
    """Tell the geometry of the faces found in the photographs, and what the model says of those that do not smile."""
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
