"""Generator of synthetic faces: seven expressions, 48x48 grey, meant to be as difficult as FER2013.

Their difficulties are those of FER2013: expressions of varying strength that share facial actions,
ambiguous labels, very unequal classes, and varied face shapes, poses, lighting, hair and occlusions
in small noisy images. Nothing is downloaded, and image i of a split depends only on (seed, split, i),
so that a smaller data set is the beginning of a larger one.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.synthetic.drawing import (
    SUPERSAMPLE,
    Person,
    Sketch,
    add_back_hair,
    add_beard,
    add_brows,
    add_eyes,
    add_folds,
    add_front_hair,
    add_glasses,
    add_head,
    add_mouth,
    add_nose,
    add_occlusion,
    compute_blur,
    compute_jpeg,
    compute_soft_noise,
    draw_person,
    reduce_canvas,
    round_pixels,
)
from dlfer.errors import DataError

ACTIONS = {
    1: "inner brow raiser",
    2: "outer brow raiser",
    4: "brow lowerer",
    5: "upper lid raiser",
    6: "cheek raiser",
    7: "lid tightener",
    9: "nose wrinkler",
    10: "upper lip raiser",
    12: "lip corner puller",
    15: "lip corner depressor",
    16: "lower lip depressor",
    17: "chin raiser",
    20: "lip stretcher",
    23: "lip tightener",
    24: "lip pressor",
    25: "lips part",
    26: "jaw drop",
    43: "eyes closed",
}

# Expression -> its variants, each of which maps actions to intensities (0: absent, 1: strongest).
PROTOTYPES: dict[str, tuple[dict[int, float], ...]] = {
    "Angry": (
        {4: 1.0, 5: 0.6, 7: 0.7, 23: 0.9, 24: 0.5},
        {4: 1.0, 5: 0.4, 7: 0.7, 17: 0.5, 24: 0.9},
        {4: 1.0, 5: 0.5, 7: 0.6, 10: 0.6, 16: 0.6, 25: 0.8, 26: 0.5},
    ),
    "Disgust": (
        {4: 0.4, 9: 1.0, 15: 0.7, 16: 0.5},
        {7: 0.6, 9: 0.9, 10: 0.9, 17: 0.7},
        {4: 0.4, 7: 0.8, 9: 1.0, 10: 1.0, 25: 0.5, 26: 0.3},
    ),
    "Fear": (
        {1: 1.0, 2: 0.6, 4: 0.6, 5: 0.9, 7: 0.2, 20: 1.0, 26: 0.4},
        {1: 1.0, 4: 0.6, 5: 0.9, 20: 0.9, 25: 0.7},
        {1: 0.9, 2: 0.5, 4: 0.5, 5: 1.0, 16: 0.4, 20: 0.8, 25: 0.4, 26: 0.6},
    ),
    "Happy": (
        {6: 0.8, 12: 1.0},
        {6: 0.8, 12: 1.0, 25: 0.9},
        {6: 1.0, 12: 1.0, 25: 0.7, 26: 0.5},
    ),
    "Sad": (
        {1: 1.0, 4: 0.6, 15: 1.0, 43: 0.2},
        {1: 0.8, 4: 0.6, 15: 0.9, 17: 0.8, 43: 0.3},
        {1: 0.9, 4: 0.7, 6: 0.4, 7: 0.5, 15: 0.9, 25: 0.5},
    ),
    "Surprise": (
        {1: 1.0, 2: 1.0, 5: 0.7, 26: 1.0},
        {1: 1.0, 2: 1.0, 5: 0.9, 25: 0.4, 26: 0.6},
    ),
    "Neutral": ({}, {25: 0.25}, {43: 0.2}),
}

# Probability that an action is nearly absent, since real faces show expressions only in part.
MISSING = 0.08


def draw_intensities(expression: str, *, rng: np.random.Generator) -> dict[int, float]:
    """Draw the intensity of each facial action in one face with `expression`.

    A variant is drawn, its actions are scaled by one strength of the whole face and by individual factors,
    a few are nearly dropped, and every action may be slightly active at rest, so that weak expressions
    resemble others.

    Args:
        expression: a key of PROTOTYPES.
        rng: the only source of randomness.

    Returns:
        action number -> intensity in [0, 1.3], with every key of ACTIONS.

    Raises:
        DataError: the expression is not one of PROTOTYPES.
    """
    if expression not in PROTOTYPES:
        raise DataError(f"expression {expression!r}: expected one of {', '.join(PROTOTYPES)}.")
    variants = PROTOTYPES[expression]
    prototype = variants[rng.integers(len(variants))]
    strength = rng.uniform(0.5, 1.15)
    factors = np.exp(rng.normal(0, 0.22, len(ACTIONS)))
    factors[rng.random(len(ACTIONS)) < MISSING] = 0.2
    rest = np.maximum(rng.normal(-0.08, 0.12, len(ACTIONS)), 0)
    return {
        action: min(1.3, prototype.get(action, 0.0) * strength * factor + idle)
        for action, factor, idle in zip(ACTIONS, factors.tolist(), rest.tolist(), strict=True)
    }


FACE_SIZE = 48
NUM_FACES = {"train": 6000, "validation": 1000, "test": 1000}

# Images per class in FER2013's Training split (I. Goodfellow et al., 2013), in the order of the labels.
FER2013_COUNTS = (3995, 436, 4097, 7215, 4830, 3171, 4965)

# Probability that a face shows an expression that people confuse with its label. FER2013's labels are
# even less reliable: people agree with them on about 65 % of the images.
LABEL_NOISE = 0.12
CONFUSABLE = {
    "Angry": ("Sad", "Disgust", "Neutral"),
    "Disgust": ("Angry", "Sad"),
    "Fear": ("Surprise", "Sad"),
    "Happy": ("Neutral", "Surprise"),
    "Sad": ("Neutral", "Fear", "Angry"),
    "Surprise": ("Fear", "Happy"),
    "Neutral": ("Sad", "Angry", "Happy"),
}

_SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}
_SHARES = np.cumsum(FER2013_COUNTS) / sum(FER2013_COUNTS)
_GRID = np.arange(FACE_SIZE, dtype=np.float32) - (FACE_SIZE - 1) / 2
_DEPTH = 13.0


def load_synthetic_faces(config: DataConfig) -> DataBundle:
    """Generate the faces of an experiment, with FER2013's labels and class shares, in about 1 ms per image.

    Args:
        config: `num_images` is the number of each split (null: 6000, 1000 and 1000), `seed` selects the images.

    Returns:
        A bundle whose splits hold uint8 [N, 48, 48, 1] and ids such as "synthetic_faces/train/17", with
        the seed in them unless it is 0.
    """
    splits = {
        name: _draw_split(name, getattr(config.num_images, name) or number, seed=config.seed)
        for name, number in NUM_FACES.items()
    }
    note = "synthetic_faces: the faces are drawn by dlfer, not photographed; no metric here says anything about real faces."
    return DataBundle(source="synthetic_faces", labels=FER2013_LABELS, notes=(note,), **splits)


def _draw_split(name: str, num_images: int, *, seed: int) -> Split:
    """Generate one split of `num_images` faces."""
    images = np.empty((num_images, FACE_SIZE, FACE_SIZE, 1), dtype=np.uint8)
    targets = np.empty(num_images, dtype=np.int64)
    for index in range(num_images):
        rng = np.random.default_rng([seed, _SPLIT_CODES[name], index])
        targets[index] = np.searchsorted(_SHARES, rng.random(), side="right")
        images[index, :, :, 0] = draw_face(_draw_shown(FER2013_LABELS[targets[index]], rng=rng), rng=rng)
    which = f"{name}/seed {seed}" if seed else name
    ids = np.array([f"synthetic_faces/{which}/{index}" for index in range(num_images)])
    return Split(name, images, targets, ids)


def _draw_shown(label: str, *, rng: np.random.Generator) -> str:
    """Draw the expression that a face with this label shows: the label's, or one that is confused with it."""
    others = CONFUSABLE[label]
    choice = int(rng.integers(len(others)))
    return others[choice] if rng.random() < LABEL_NOISE else label


def draw_face(expression: str, *, rng: np.random.Generator) -> np.ndarray:
    """Generate an image of a face that shows `expression`, with a random person, pose, light and camera.

    Args:
        expression: one of FER2013's labels, e.g. "Happy".
        rng: the only source of randomness.

    Returns:
        uint8 [48, 48], grey.

    Raises:
        DataError: the expression is unknown.
    """
    actions = draw_intensities(expression, rng=rng)
    person = draw_person(rng)
    pose = _Pose(rng)
    light = float(rng.uniform(-1, 1))
    background = float(rng.uniform(15, 240))
    canvas = Image.new("L", (FACE_SIZE * SUPERSAMPLE, FACE_SIZE * SUPERSAMPLE), round(background))
    sketch = Sketch()
    _add_face(sketch, person, actions, light=light, rng=rng)
    sketch.paint(canvas, pose.project, zoom=pose.zoom)
    return _expose(reduce_canvas(canvas), pose, light=light, rng=rng)


def _add_face(
    sketch: Sketch, person: Person, actions: dict[int, float], *, light: float, rng: np.random.Generator
) -> None:
    """Add all parts from back to front, from the hair behind the head to the hand in front of it."""
    hairstyle = add_back_hair(sketch, person, rng=rng)
    asymmetry = rng.uniform(-1, 1, 2)
    add_head(sketch, person, actions)
    add_beard(sketch, person, actions, rng=rng)
    add_folds(sketch, person, actions)
    add_eyes(sketch, person, actions)
    add_brows(sketch, person, actions, asymmetry=asymmetry[0])
    add_nose(sketch, person, actions, light=light)
    add_mouth(sketch, person, actions, asymmetry=asymmetry[1])
    add_front_hair(sketch, person, hairstyle, rng=rng)
    add_glasses(sketch, person, rng=rng)
    add_occlusion(sketch, person, rng=rng)


class _Pose:
    """The pose of the head in the image: yaw, pitch and roll (radians), zoom, and shift (pixels)."""

    def __init__(self, rng: np.random.Generator) -> None:
        yaw, pitch, roll, right, down = np.clip(rng.standard_normal(5), -2.2, 2.2).tolist()
        self.yaw, self.pitch, self.roll = 0.22 * yaw, 0.11 * pitch, 0.13 * roll
        self.zoom = float(rng.uniform(0.94, 1.24))
        self.shift = np.array([1.2 * right, 1.0 + 1.2 * down])
        cos, sin = np.cos(self.roll) * self.zoom, np.sin(self.roll) * self.zoom
        self.turn = np.array([(cos, sin), (-sin, cos)])

    def project(self, points: np.ndarray, lifts: np.ndarray) -> np.ndarray:
        """Project points of the frontal face (float [N, 2]) to pixels of the image.

        The face is half an ellipsoid, from which the points protrude by `lifts` (float [N]).
        """
        inside = 1 - (points[:, 0] / 18) ** 2 - (points[:, 1] / 24) ** 2
        depth = _DEPTH * np.sqrt(np.maximum(inside, 0)) + lifts
        turned = points * (np.cos(self.yaw), np.cos(self.pitch))
        turned += depth[:, None] * (np.sin(self.yaw) * 0.8, np.sin(self.pitch) * 0.8)
        return turned @ self.turn + self.shift + FACE_SIZE / 2


def _expose(image: np.ndarray, pose: _Pose, *, light: float, rng: np.random.Generator) -> np.ndarray:
    """Add lighting, camera effects and JPEG compression to a drawn face, float32 [48, 48]; return uint8."""
    x, y = (_GRID - pose.shift[0])[None, :], (_GRID - pose.shift[1])[:, None]
    cos, sin = np.cos(pose.roll) / pose.zoom, np.sin(pose.roll) / pose.zoom
    across, along = (x * cos + y * sin) / 19, (y * cos - x * sin) / 25
    radius = across**2 + along**2
    facing = np.sqrt(np.maximum(1 - radius, 0.05))
    height = rng.uniform(-0.9, 0.25)
    # Lambert's law on an ellipsoid, with ambient light so that neither half becomes black.
    lit = np.maximum(across * light + along * height + facing, 0) / np.sqrt(1 + light**2 + height**2)
    ambient = rng.uniform(0.3, 0.8)
    shade = ambient + (1 - ambient) * 1.15 * lit
    head = np.clip((1.3 - radius) * 4, 0, 1)
    image = image * (1 + (shade - 1) * head)
    image = image + compute_soft_noise(FACE_SIZE, cells=6, rng=rng) * (3 + 11 * (1 - head))
    gain, level, blur, grain, quality = rng.random(5).tolist()
    # Match FER2013's brightness (mean 129) and contrast (standard deviation of an image mostly 40 to 70).
    contrast = min(1.9, (38 + 34 * gain) / (float(image.std()) + 1))
    image = (image - image.mean()) * contrast + 85 + 85 * level
    if blur > 0.4:
        image = compute_blur(image, sigma=0.3 + 0.6 * (blur - 0.4) / 0.6)
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * (1 + 7 * grain**2)
    if quality < 0.6:
        image = compute_jpeg(image, quality=35 + 90 * quality)
    return round_pixels(image)
