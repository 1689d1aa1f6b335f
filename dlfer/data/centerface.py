"""CenterFace, a network that finds faces, on ONNX Runtime; its file is in the package (weights/README.md).

For every cell of 4x4 pixels the network says how likely the centre of a face is in it, how large the face is, where in the
cell its centre is, and where the eyes, the nose and the corners of the mouth are.
Source: Xu et al. 2019, "CenterFace: Joint Face Detection and Alignment Using Face as Point", arXiv:1911.03599.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlfer.errors import EnvironmentProblem

FILE = Path(__file__).parent / "weights" / "centerface.onnx"
SHA256 = "5f9d0c07eee7d7daef429829ae7ad720f1662b21b18bc7fb8f6247de66fb34fe"

MAX_OVERLAP = 0.3
"""Of two boxes whose intersection is a larger share of their union, the one with the lower score is dropped."""

MIN_SIDE = 8.0
"""Faces with a shorter side, in pixels of the image that the network sees, are left out: there is no expression in them."""

_STRIDE, _MULTIPLE = 4, 32
_OUTPUTS = ("537", "538", "539", "540")


class Detections(NamedTuple):
    """The faces in one image, the most probable first.

    Attributes:
        boxes: float64 [N, 4], left, top, width, height in pixels of the image, within it.
        scores: float64 [N] in 0..1.
        landmarks: float64 [N, 5, 2], (x, y) of the left and right eye, the nose, the left and right corner of the
            mouth, as they are seen.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray


def detect(images: np.ndarray, *, min_score: float) -> list[Detections]:
    """Return the faces in each of several images of one size.

    Args:
        images: uint8 [B, H, W, 3], RGB.
        min_score: probability in 0..1 above which a cell holds the centre of a face.

    Raises:
        EnvironmentProblem: onnxruntime is not installed, or the network's file is damaged.
    """
    height, width = images.shape[1:3]
    # The network halves an image five times: its sides are filled up with black to multiples of 32.
    sides = [-(-side // _MULTIPLE) * _MULTIPLE for side in (height, width)]
    batch = np.zeros((len(images), 3, *sides), np.float32)
    batch[:, :, :height, :width] = images.transpose(0, 3, 1, 2)
    outputs = _load_session().run(_OUTPUTS, {"input.1": batch})
    return [_decode([output[row] for output in outputs], (height, width), min_score) for row in range(len(images))]


def _decode(outputs: Sequence[np.ndarray], size: tuple[int, int], min_score: float) -> Detections:
    """Return the faces from the outputs for one image: float32 [1, h, w], [2, h, w], [2, h, w], [10, h, w]; y before x."""
    heat, scale, offset, marks = outputs
    rows, columns = np.nonzero(heat[0] > min_score)
    scores = heat[0, rows, columns].astype(np.float64)
    cells = np.stack([rows, columns])
    sizes = np.exp(scale[:, rows, columns].astype(np.float64)) * _STRIDE
    first = (cells + offset[:, rows, columns] + 0.5) * _STRIDE - sizes / 2
    # [N, 5, (y, x)], as fractions of the box from its upper left corner.
    points = marks[:, rows, columns].T.reshape(-1, 5, 2) * sizes.T[:, None] + first.T[:, None]
    last = np.minimum(first + sizes, np.reshape(size, (2, 1)))
    first = np.maximum(first, 0)
    boxes = np.concatenate([first[::-1], (last - first)[::-1]]).T
    large = np.flatnonzero(boxes[:, 2:].min(axis=1, initial=np.inf) >= MIN_SIDE)
    kept = large[suppress(boxes[large], scores[large])]
    return Detections(boxes[kept], scores[kept], sort_sides(points[kept, :, ::-1]))


def suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the indices, int [K], of the boxes that no better one overlaps by more than `MAX_OVERLAP`, the best first.

    Args:
        boxes: float [N, 4], left, top, width, height.
        scores: float [N].
    """
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    areas = boxes[:, 2] * boxes[:, 3]
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(last[best], last[left]) - np.maximum(first[best], first[left])
        shared = np.prod(np.maximum(sides, 0), axis=1)
        left = left[shared <= MAX_OVERLAP * (areas[best] + areas[left] - shared)]
    return np.array(kept, np.int64)


def sort_sides(points: np.ndarray) -> np.ndarray:
    """Return landmarks, float [..., 5, 2], whose eyes and corners of the mouth are from left to right as they are seen."""
    points = np.array(points, np.float64)
    for first in (0, 3):
        pair = points[..., first : first + 2, :]
        order = np.argsort(pair[..., 0], axis=-1, kind="stable")[..., None]
        points[..., first : first + 2, :] = np.take_along_axis(pair, order, axis=-2)
    return points


@cache
def _load_session():
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(
            f"faces: centerface needs onnxruntime, which cannot be imported ({error}): pip install onnxruntime."
        ) from error
    contents = FILE.read_bytes() if FILE.is_file() else b""
    if hashlib.sha256(contents).hexdigest() != SHA256:
        raise EnvironmentProblem(
            f"{FILE}: the file of the face detector is missing or damaged ({len(contents):,} bytes with another sha256 "
            "than expected). Install dlfer again."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
