"""Face detection, cropping and alignment by the eyes, and preparation of data by these steps.

There are three detectors: centerface (the default, whose weights come with dlfer), and two from optional packages that
are imported when used: mtcnn (needs TensorFlow) and opencv (a cascade of Haar features). centerface and mtcnn also find
the eyes. Coordinates are (x, y) in pixels of the given image; landmarks are relative to the centre of its first pixel,
boxes to that pixel's upper left corner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dlfer.config.sections import FacesConfig
from dlfer.data.bundle import DataBundle, Split, get_cache_path, read_cache, write_cache
from dlfer.data.images import compute_side, equalize, resize_square
from dlfer.errors import DataError, EnvironmentProblem

CROP_SIDE = 96
"""An image with a shorter side below this is treated as the crop of a face: enlarged to it, and framed."""

FRAME = 0.2
"""Width of the frame on each edge, as a fraction of the enlarged side; detectors need a margin around a face. In 3,589
images of FER2013, OpenCV's cascade finds a face in 77 % with and 61 % without the frame, MTCNN in 87 and 83 %,
centerface in 96 % with its black frame and 94 % without (benchmarks/crop_faces.py, results/found_faces.md)."""

MIN_SCORES = (0.5, 0.25)
"""centerface's score thresholds: in a photo, and in the crop of a face, which certainly contains one."""

EYES = ((0.33, 0.375), (0.67, 0.375))
"""Positions of the left and right eye in an aligned face, as fractions of its side: FER2013's means by MTCNN."""

STRIP_PIXELS = 2_000_000
"""Approximate number of pixels per strip when a large image is shrunk, which bounds the size of Pillow's copies."""

_BATCH_SIZE, _BATCH_PIXELS = 32, 1_300_000
"""Limits of a detector's batch: number of images, and pixels of all of them after scaling. centerface takes 0.1 GB for
an image of 640 x 480, and is hardly faster with 32 of them (3.5 GB) than with 4."""


CENTERFACE_FILE = Path(__file__).parent / "weights" / "centerface.onnx"
CENTERFACE_SHA256 = "5f9d0c07eee7d7daef429829ae7ad720f1662b21b18bc7fb8f6247de66fb34fe"

MAX_OVERLAP = 0.3
"""Largest intersection over union of two boxes that are kept; above it, the one with the lower score is dropped."""

MIN_SIDE = 8.0
"""Faces whose shorter side is below this, in pixels of the network's input, are dropped: they show no expression."""

_STRIDE, _MULTIPLE = 4, 32
_OUTPUTS = ("537", "538", "539", "540")


class Detections(NamedTuple):
    """The faces detected in one image, sorted by descending score.

    Attributes:
        boxes: float64 [N, 4], left, top, width, height in pixels, clipped to the image.
        scores: float64 [N] in 0..1.
        landmarks: float64 [N, 5, 2], (x, y) of the left and right eye, the nose, and the left and right corner of the
            mouth, as seen in the image, relative to the centre of its first pixel.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray


def detect(images: np.ndarray, *, min_score: float) -> list[Detections]:
    """Detect faces with CenterFace in a batch of images.

    Args:
        images: uint8 [B, H, W, 3], RGB.
        min_score: threshold in 0..1 on the probability that a cell holds the centre of a face.

    Raises:
        EnvironmentProblem: onnxruntime is not installed, or the network's file is damaged.
    """
    height, width = images.shape[1:3]
    # The network halves an image five times, so its sides are padded with black to multiples of 32.
    sides = [-(-side // _MULTIPLE) * _MULTIPLE for side in (height, width)]
    batch = np.zeros((len(images), 3, *sides), np.float32)
    batch[:, :, :height, :width] = images.transpose(0, 3, 1, 2)
    outputs = _load_centerface().run(_OUTPUTS, {"input.1": batch})
    return [
        _decode_centerface([output[row] for output in outputs], (height, width), min_score)
        for row in range(len(images))
    ]


def _decode_centerface(outputs: Sequence[np.ndarray], size: tuple[int, int], min_score: float) -> Detections:
    """Decode the outputs for one image, float32 [1, h, w], [2, h, w], [2, h, w], [10, h, w], with y before x."""
    heat, scale, offset, marks = outputs
    rows, columns = np.nonzero(heat[0] > min_score)
    scores = heat[0, rows, columns].astype(np.float64)
    cells = np.stack([rows, columns])
    sizes = np.exp(scale[:, rows, columns].astype(np.float64)) * _STRIDE
    first = (cells + offset[:, rows, columns] + 0.5) * _STRIDE - sizes / 2
    # The outputs are [N, 5, (y, x)], in fractions of the box from its upper left corner.
    points = marks[:, rows, columns].T.reshape(-1, 5, 2) * sizes.T[:, None] + first.T[:, None]
    last = np.minimum(first + sizes, np.reshape(size, (2, 1)))
    first = np.maximum(first, 0)
    boxes = np.concatenate([first[::-1], (last - first)[::-1]]).T
    large = np.flatnonzero(boxes[:, 2:].min(axis=1, initial=np.inf) >= MIN_SIDE)
    kept = large[suppress(boxes[large], scores[large])]
    # Boxes and landmarks of the network begin at the upper left corner of the first pixel, ours of a landmark at its centre.
    return Detections(boxes[kept], scores[kept], sort_left_right(points[kept, :, ::-1]) - 0.5)


def suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the indices, int [K], of the boxes kept by non-maximum suppression at `MAX_OVERLAP`, the best first.

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


def sort_left_right(points: np.ndarray) -> np.ndarray:
    """Return landmarks, float [..., 5, 2], with the eyes and the corners of the mouth sorted from left to right."""
    points = np.array(points, np.float64)
    for first in (0, 3):
        pair = points[..., first : first + 2, :]
        order = np.argsort(pair[..., 0], axis=-1, kind="stable")[..., None]
        points[..., first : first + 2, :] = np.take_along_axis(pair, order, axis=-2)
    return points


@cache
def _load_centerface():
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(
            f"faces: centerface needs onnxruntime, which cannot be imported ({error}): pip install onnxruntime."
        ) from error
    contents = CENTERFACE_FILE.read_bytes() if CENTERFACE_FILE.is_file() else b""
    if hashlib.sha256(contents).hexdigest() != CENTERFACE_SHA256:
        raise EnvironmentProblem(
            f"{CENTERFACE_FILE}: the file of the face detector is missing or damaged ({len(contents):,} bytes with another sha256 "
            "than expected). Install dlfer again."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Face:
    """A face in an image.

    Attributes:
        box: left, top, width, height in pixels, clipped to the image.
        score: for centerface and mtcnn the probability of a face, 0..1; for opencv the cascade's weight, above 0, not a
            probability; None: the face was tracked from other frames of a video.
        landmarks: float64 [5, 2], (x, y) of the left and right eye, the nose, and the left and right mouth corner, as
            seen in the image; None from opencv.
    """

    box: tuple[float, float, float, float]
    score: float | None
    landmarks: np.ndarray | None = None

    @property
    def eyes(self) -> np.ndarray | None:
        """The left and the right eye as seen in the image, float64 [2, 2]; None without landmarks."""
        return None if self.landmarks is None else self.landmarks[:2]


class Detector(NamedTuple):
    """A face detector.

    Attributes:
        find: (uint8 [H, W, 3] images of one size, whether they are crops of faces) -> the faces in each image.
        size: default of the longest side in pixels to which larger images are shrunk first.
        frame: NumPy padding mode that fills the frame around a crop.
        package: the package whose version is part of the cache key; None: the digest of the network's file is.
    """

    find: Callable[[Sequence[np.ndarray], bool], list[list[Face]]]
    size: int
    frame: str = "edge"
    package: str | None = None


def detect_faces(image: np.ndarray, *, detector: str = "centerface", size: int | None = None) -> list[Face]:
    """Return the faces in a photo, or in the crop of a face, the largest box first.

    Args:
        image: uint8 [H, W] or [H, W, 1 or 3].
        detector: "centerface", "mtcnn" or "opencv".
        size: longest side in pixels to which a larger photo is shrunk before the search; None: the detector's default.

    Raises:
        DataError: the image is of another form, or the detector does not exist.
        EnvironmentProblem: the detector's package is not installed.

    Example:
        >>> [face.box for face in detect_faces(read_image("class_photo.jpg"))]
    """
    return detect_faces_of_each([image], detector=detector, size=size)[0]


def detect_faces_of_each(
    images: Sequence[np.ndarray], *, detector: str = "centerface", size: int | None = None
) -> list[list[Face]]:
    """Return the faces in each of several images, as `detect_faces` does; images of one size are processed in batches.

    Raises:
        DataError, EnvironmentProblem: as `detect_faces`.
    """
    if detector not in DETECTORS:
        raise DataError(f"faces.detect: found {detector!r}, expected one of {', '.join(DETECTORS)}.")
    find, largest, frame, _ = DETECTORS[detector]
    framed = [_frame(_check_image(image), size or largest, frame) for image in images]
    found: list[list[Face]] = [[] for _ in images]
    kinds = [(pixels.shape, margin > 0) for pixels, _, margin in framed]
    for kind in dict.fromkeys(kinds):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        step = max(1, min(_BATCH_SIZE, _BATCH_PIXELS // (kind[0][0] * kind[0][1])))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            for row, faces in zip(some, find([framed[row][0] for row in some], kind[1]), strict=True):
                _, scale, margin = framed[row]
                moved = (_to_original_coordinates(face, scale, margin, images[row].shape[:2]) for face in faces)
                kept = [face for face in moved if face.box[2] > 0 and face.box[3] > 0]
                found[row] = sorted(kept, key=lambda face: -face.box[2] * face.box[3])
    return found


def crop_face(image: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Crop the square around a box, whose side is the box's longer one, and resize it to uint8 [size, size, C].

    Edge pixels are repeated outside of the image.

    Args:
        image: uint8 [H, W, C].
        box: left, top, width, height in pixels.
        size: side of the result in pixels.
    """
    left, top, width, height = box
    side = max(width, height)
    scale = size / side
    x, y = left + (width - side) / 2, top + (height - side) / 2
    return warp_image(image, np.array([[scale, 0, (0.5 - x) * scale - 0.5], [0, scale, (0.5 - y) * scale - 0.5]]), size)


def align_face(image: np.ndarray, eyes: np.ndarray, size: int) -> np.ndarray:
    """Rotate, scale and shift the image so that the eyes are at `EYES`; return uint8 [size, size, C].

    Args:
        image: uint8 [H, W, C].
        eyes: float [2, 2], (x, y) of the left and the right eye as seen in the image.
        size: side of the result in pixels.

    Raises:
        DataError: both eyes are at the same position.
    """
    return warp_image(image, compute_alignment(eyes, size), size)


def compute_alignment(eyes: np.ndarray, size: int) -> np.ndarray:
    """Return float64 [2, 3], the similarity from the image to a square of `size` pixels that maps the eyes to `EYES`.

    Two points determine a similarity, z -> a z + b in complex numbers.

    Raises:
        DataError: both eyes are at the same position.
    """
    first, second = (complex(x, y) for x, y in np.asarray(eyes, np.float64))
    to_first, to_second = (complex(x * size - 0.5, y * size - 0.5) for x, y in EYES)
    if first == second:
        raise DataError(f"align: found both eyes at {first.real:.1f}, {first.imag:.1f}; expected two different places.")
    a = (to_second - to_first) / (second - first)
    b = to_first - a * first
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def warp_image(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Warp an image by a similarity to uint8 [size, size, C], with bilinear interpolation, antialiased if it shrinks.

    Args:
        image: uint8 [H, W, C]; its edge pixels are repeated outside.
        matrix: float [2, 3], from (x, y) in the image to (x, y) in the result.
        size: side of the result in pixels.
    """
    image, matrix = _shrink_before(image, matrix)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    columns, rows = np.meshgrid(np.arange(size), np.arange(size))
    x, y = (inverse[axis, 0] * columns + inverse[axis, 1] * rows + inverse[axis, 2] for axis in (0, 1))
    x, y = x.clip(0, image.shape[1] - 1), y.clip(0, image.shape[0] - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, image.shape[1] - 1), np.minimum(y0 + 1, image.shape[0] - 1)
    right, below = (x - x0)[..., None], (y - y0)[..., None]
    top = image[y0, x0] * (1 - right) + image[y0, x1] * right
    bottom = image[y1, x0] * (1 - right) + image[y1, x1] * right
    return (top * (1 - below) + bottom * below).round().astype(np.uint8)


def warp_fast(
    image: np.ndarray, matrix: np.ndarray, size: int, *, kernel: str = "bicubic", resolution: int | None = None
) -> np.ndarray:
    """Warp an image like `warp_image`, but with Pillow, which is faster.

    Args:
        image, matrix, size: as for `warp_image`.
        kernel: "bilinear", or "bicubic", which is sharper if the face has about the size of the result.
        resolution: the image is shrunk first so that the result's square has at most this many pixels per side in
            it; None: at most `size` pixels.
    """
    image, matrix = _shrink_before(image, matrix, 1 if resolution is None else min(1, resolution / size))
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    corners = inverse[:2] @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]])
    # Pillow returns black outside of an image, so its edges are repeated as far as the result reaches.
    beyond = np.maximum(-corners, corners - np.reshape(image.shape[1::-1], (2, 1)))
    margin = max(0, int(np.ceil(beyond.max()))) + 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    # Pillow's origin is the corner of the first pixel, not its centre.
    inverse[:2, 2] += margin + 0.5 - inverse[:2, :2].sum(axis=1) / 2
    # For bytes Pillow's bilinear kernel truncates, whereas the bicubic one rounds.
    kind = np.float32 if kernel == "bilinear" else np.uint8
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(padded[..., channel], dtype=kind)).transform(
                (size, size),
                Image.Transform.AFFINE,
                tuple(inverse[:2].ravel()),
                resample=Image.Resampling[kernel.upper()],
            )
        )
        for channel in range(padded.shape[-1])
    ]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


def _shrink_before(image: np.ndarray, matrix: np.ndarray, share: float = 1) -> tuple[np.ndarray, np.ndarray]:
    """Shrink an image by `share` times a similarity's scale, if below 1; return it and the similarity from it."""
    scale = share * float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if scale >= 1:
        return image, matrix
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    across, down = width / image.shape[1], height / image.shape[0]
    # From the shrunk image to the given one, then on to the result.
    back = np.array([[1 / across, 0, 0.5 / across - 0.5], [0, 1 / down, 0.5 / down - 0.5], [0, 0, 1]])
    return _resize(image, width, height), matrix @ back


def _check_image(image: np.ndarray) -> np.ndarray:
    """Convert an image to uint8 [H, W, 3]; raise DataError if it is of another form."""
    image = np.asarray(image)
    plain = image[..., None] if image.ndim == 2 else image
    if plain.dtype != np.uint8 or plain.ndim != 3 or plain.shape[-1] not in (1, 3) or 0 in plain.shape:
        raise DataError(
            f"faces: found an image of dtype {image.dtype} and shape {image.shape}, "
            "expected uint8 [H, W] or [H, W, 1 or 3]."
        )
    return plain.repeat(3, axis=-1) if plain.shape[-1] == 1 else plain


def _frame(image: np.ndarray, size: int, mode: str) -> tuple[np.ndarray, float, int]:
    """Return a detector's input (the scaled image, framed if it is a small crop), its scale, and the frame's width."""
    height, width = image.shape[:2]
    is_crop = min(height, width) < CROP_SIDE
    scale = CROP_SIDE / min(height, width) if is_crop else min(1.0, size / max(height, width))
    margin = round(FRAME * CROP_SIDE) if is_crop else 0
    if scale != 1:
        image = _resize(image, round(width * scale), round(height * scale))
    return np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode=mode), scale, margin


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize an image to uint8 [height, width, C], antialiased if it shrinks.

    Pillow copies images with four bytes per pixel. To save memory, a large image is shrunk horizontally in strips and
    then vertically, which rounds some values differently than a single resize.
    """
    if image.shape[1] > width and image.shape[0] * image.shape[1] > STRIP_PIXELS:
        strips = np.array_split(image, -(-image.shape[0] * image.shape[1] // STRIP_PIXELS))
        image = np.concatenate([_resize_at_once(strip, width, len(strip)) for strip in strips])
    return _resize_at_once(image, width, height)


def _resize_at_once(image: np.ndarray, width: int, height: int) -> np.ndarray:
    grey = image.shape[-1] == 1
    fitted = Image.fromarray(image[..., 0] if grey else image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(fitted)[..., None] if grey else np.asarray(fitted)


def _to_original_coordinates(face: Face, scale: float, margin: int, shape: tuple[int, int]) -> Face:
    """Convert a face's coordinates from the framed and scaled image to the original one."""
    left, top, width, height = face.box
    x0, y0 = max(0.0, (left - margin) / scale), max(0.0, (top - margin) / scale)
    x1 = min(float(shape[1]), (left + width - margin) / scale)
    y1 = min(float(shape[0]), (top + height - margin) / scale)
    marks = face.landmarks
    return replace(
        face,
        box=(x0, y0, x1 - x0, y1 - y0),
        landmarks=None if marks is None else (marks - margin + 0.5) / scale - 0.5,
    )


def _detect_centerface(images: Sequence[np.ndarray], are_crops: bool) -> list[list[Face]]:
    """Return the faces in uint8 [H, W, 3] images of one size."""
    found = detect(np.stack(images), min_score=MIN_SCORES[are_crops])
    return [
        [Face(tuple(map(float, box)), float(score), marks) for box, score, marks in zip(*in_image, strict=True)]
        for in_image in found
    ]


def _detect_mtcnn(images: Sequence[np.ndarray], are_crops: bool) -> list[list[Face]]:
    """Return the faces in uint8 [H, W, 3] images of one size."""
    # min_face_size must remain 20: with other values mtcnn builds a wrong image pyramid and silently finds nothing.
    found = _load_mtcnn().detect_faces(list(images)) or [[] for _ in images]
    return [[_read_mtcnn(record) for record in image_faces] for image_faces in found]


def _read_mtcnn(record: dict) -> Face:
    marks = record["keypoints"]
    points = [marks[name] for name in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")]
    box = tuple(float(value) for value in record["box"])
    return Face(box, float(record["confidence"]), sort_left_right(points))


@cache
def _load_mtcnn():
    try:
        from mtcnn import MTCNN
    except ImportError as error:
        raise EnvironmentProblem(_describe_absence("mtcnn", "mtcnn==1.0.0", error)) from error
    return MTCNN()


def _detect_opencv(images: Sequence[np.ndarray], are_crops: bool) -> list[list[Face]]:
    """Return the faces in uint8 [H, W, 3] images."""
    cascade, faces = _load_cascade(), []
    for image in images:
        grey = np.asarray(Image.fromarray(image).convert("L"))
        boxes, _, weights = cascade.detectMultiScale3(
            grey, scaleFactor=1.1, minNeighbors=3, minSize=(20, 20), outputRejectLevels=True
        )
        faces.append(
            [Face(tuple(map(float, box)), float(weight)) for box, weight in zip(boxes, np.ravel(weights), strict=True)]
        )
    return faces


@cache
def _load_cascade():
    try:
        import cv2

        return cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    except (ImportError, AttributeError) as error:  # OpenCV 5 no longer has the cascades
        raise EnvironmentProblem(_describe_absence("opencv", "'opencv-python-headless<5'", error)) from error


def _describe_absence(detector: str, package: str, error: Exception) -> str:
    return f"faces.detect: {detector} needs a package that is missing or of another version ({error}): pip install {package}"


DETECTORS: dict[str, Detector] = {
    "centerface": Detector(_detect_centerface, 640, frame="constant"),
    "mtcnn": Detector(_detect_mtcnn, 1280, package="mtcnn"),
    "opencv": Detector(_detect_opencv, 1280, package="opencv-python-headless"),
}
"""`names.DETECTORS` except "none"; the smallest detectable face has 8 (centerface) or 20 pixels in the shrunk image."""


_CACHE_VERSION = 3
_CHUNK = 1024
"""Number of images per cache file, which is also the most that an interrupted preparation loses."""

_TALK_SECONDS = 20.0


def prepare_faces(
    bundle: DataBundle, config: FacesConfig, *, aspect: str = "crop", say: Callable[[str], None] | None = None
) -> DataBundle:
    """Replace each image of a bundle by its face, as a square with the images' shorter side (longer with "pad").

    The face is the largest one found, aligned by the eyes or cropped to the square around its box. An image
    without a detected face is made square as `aspect` says; a note states the number of faces found. The step
    depends only on each image's own pixels, so it can precede any split. It does so because duplicates must be
    searched for among the images that are trained on: copies remain copies, and images that differ only in
    framing or lighting may become duplicates.

    Results are cached in $DLFER_CACHE or ~/.cache/dlfer for the same images and section. The cache holds images
    and needs the same protection as the data.

    Args:
        aspect: how an image without a detected face is made square, see `dlfer.data.images.make_square`.
        say: receives messages on the progress.

    Raises:
        EnvironmentProblem: the detector's package is not installed.
    """
    notes, splits = list(bundle.notes), {}
    num_found = num_images = 0
    for key, split in bundle.splits.items():
        images, found, problem = _prepare_images(split.images, config, aspect=aspect, name=split.name, say=say)
        splits[key] = dataclasses.replace(split, images=images)
        num_found, num_images = num_found + int(found.sum()), num_images + len(found)
        if problem and problem not in notes:
            notes.append(problem)
    if config.detect != "none":
        done = "aligned by the eyes" if config.align else "cut out"
        notes.append(
            f"faces: found in {num_found:,} of {num_images:,} images ({num_found / max(1, num_images):.1%}) by "
            f"{config.detect} and {done}; the others are used whole."
        )
    if config.equalize != "none":
        notes.append(f"faces: the contrast of every image is equalised ({config.equalize}).")
    return dataclasses.replace(bundle, **splits, notes=tuple(notes))


def prepare_split(
    split: Split, config: FacesConfig, *, aspect: str = "crop", say: Callable[[str], None] | None = None
) -> tuple[Split, np.ndarray]:
    """Prepare one split like `prepare_faces`; return it and bool [N], whether a face was found in each image."""
    images, found, _ = _prepare_images(split.images, config, aspect=aspect, name=split.name, say=say)
    return dataclasses.replace(split, images=images), found


def prepare_face(image: np.ndarray, config: FacesConfig, *, aspect: str = "crop") -> tuple[np.ndarray, bool]:
    """Prepare one image, uint8 [H, W, C], like `prepare_faces`; return it and whether a face was found."""
    images, found = _prepare_chunk(image[None], config, aspect)
    return images[0], bool(found[0])


def _prepare_images(
    images: np.ndarray, config: FacesConfig, *, aspect: str, name: str, say: Callable[[str], None] | None
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Return the prepared images, uint8 [N, S, S, C], bool [N], whether a face was found, and a cache problem."""
    size = compute_side(*images.shape[1:3], aspect)
    prepared = np.zeros((len(images), size, size, images.shape[-1]), np.uint8)
    found, problem = np.zeros(len(images), bool), None
    start, last_said = time.monotonic(), time.monotonic()
    for first in range(0, len(images), _CHUNK):
        rows = slice(first, first + _CHUNK)
        path = get_cache_path("faces", _compute_digest(images[rows], config, aspect))
        kept = read_cache(path, ("images", "found"))
        if kept is None:
            kept = dict(zip(("images", "found"), _prepare_chunk(images[rows], config, aspect), strict=True))
            reason = write_cache(path, kept)
            if reason is not None:
                problem = f"The prepared faces could not be kept for the next time ({reason})."
        prepared[rows], found[rows] = kept["images"], kept["found"]
        if say is not None and time.monotonic() - last_said > _TALK_SECONDS:
            last_said, done = time.monotonic(), min(first + _CHUNK, len(images))
            left = (last_said - start) / done * (len(images) - done) / 60
            say(f"faces: {name}, {done:,} of {len(images):,} images, about {left:.0f} min left")
    return prepared, found, problem


def _prepare_chunk(images: np.ndarray, config: FacesConfig, aspect: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the prepared images, uint8 [N, S, S, C], and bool [N], whether a face was found; without the cache."""
    size = compute_side(*images.shape[1:3], aspect)
    nobody = [[] for _ in images]
    find = partial(detect_faces_of_each, detector=config.detect, size=config.size)
    faces = nobody if config.detect == "none" else find(list(images))
    prepared = np.zeros((len(images), size, size, images.shape[-1]), np.uint8)
    for row, (image, in_image) in enumerate(zip(images, faces, strict=True)):
        if not in_image:
            pixels = resize_square(image, size, aspect)
        elif config.align:
            pixels = align_face(image, in_image[0].eyes, size)
        else:
            pixels = crop_face(image, in_image[0].box, size)
        prepared[row] = equalize(pixels, config.equalize)
    return prepared, np.array([bool(in_image) for in_image in faces])


_OPENCV_BUILDS = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")


def _get_release(detector: str) -> str | None:
    """Return the version of the package of a detector, "absent" if it is not installed, and None without a detector."""
    package = None if detector == "none" else DETECTORS[detector].package
    if package is None:
        return None
    for build in _OPENCV_BUILDS if package in _OPENCV_BUILDS else (package,):
        with contextlib.suppress(PackageNotFoundError):
            return version(build)
    return "absent"


def _compute_digest(images: np.ndarray, config: FacesConfig, aspect: str) -> str:
    """Return the sha256 (hex) of everything that determines the prepared images, including the detector's version."""
    release = CENTERFACE_SHA256 if config.detect == "centerface" else _get_release(config.detect)
    key = repr((_CACHE_VERSION, config.model_dump(mode="json"), release, images.shape))
    # Without `aspect` the key of cropped images equals that of caches from before the setting existed.
    digest = hashlib.sha256((key if aspect == "crop" else key + aspect).encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
