"""Drawing functions of the synthetic sources: antialiased outlines, camera effects, and the parts of a face.

Outlines are collected in a `Sketch`, painted by Pillow on a canvas with SUPERSAMPLE times the side,
and averaged down, which smooths all edges. Camera effects (blur, noise, JPEG blocks) are computed by
NumPy on the small image. All randomness comes from the generator that the caller passes.

The outlines of a face depend on the person's appearance, accessories and facial actions. Their coordinates are
pixels of a 48-pixel image of a frontal face, relative to its centre, with y pointing downwards. The numbers of
the actions are those of `dlfer.data.synthetic.faces.ACTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 3

_BLOCK = 8
_FREQUENCY = np.arange(_BLOCK)[:, None] * (2 * np.arange(_BLOCK)[None, :] + 1) * np.pi / (2 * _BLOCK)
_DCT = np.cos(_FREQUENCY) * np.sqrt(2 / _BLOCK)
_DCT[0] /= np.sqrt(2)
# JPEG's luminance quantisation table at quality 50 (ITU-T T.81, table K.1), approximated by a plane.
_QUANTISATION = 8.0 + 7.0 * (np.arange(_BLOCK)[:, None] + np.arange(_BLOCK)[None, :])

Tone = float | tuple[float, float, float]


class Sketch:
    """A list of outlines in painting order, in the coordinates of the drawn object.

    `paint` projects the coordinates of all outlines in one call, because a hundred small projections
    would take longer than the painting.
    """

    def __init__(self) -> None:
        self._points: list[np.ndarray] = []
        self._lifts: list[float] = []
        self._strokes: list[tuple[int, Tone, float]] = []

    def fill(self, points: np.ndarray, tone: Tone, *, lift: float = 0.0) -> None:
        """Add a filled polygon.

        Args:
            points: float [N, 2], x to the right and y downwards.
            tone: grey value, or (red, green, blue), in 0..255; values outside are clipped.
            lift: height of the polygon above the surface, towards the viewer.
        """
        self._points.append(points)
        self._lifts.append(lift)
        self._strokes.append((len(points), tone, 0.0))

    def line(self, points: np.ndarray, tone: Tone, *, width: float, lift: float = 0.0) -> None:
        """Add an open polyline through `points` (float [N, 2]); `width` is in pixels of the small image."""
        self._points.append(points)
        self._lifts.append(lift)
        self._strokes.append((len(points), tone, width))

    def paint(
        self, canvas: Image.Image, project: Callable[[np.ndarray, np.ndarray], np.ndarray], *, zoom: float = 1.0
    ) -> None:
        """Paint all outlines on `canvas`.

        Args:
            canvas: an image SUPERSAMPLE times as wide as the small one, of mode "L", "RGB" or "RGBX".
            project: maps points float [N, 2] and their lifts float [N] to pixels of the small image.
            zoom: factor of the line widths.
        """
        counts = [count for count, _, _ in self._strokes]
        placed = project(np.concatenate(self._points), np.repeat(self._lifts, counts)) * SUPERSAMPLE
        flat = placed.ravel().tolist()
        draw = ImageDraw.Draw(canvas)
        start = 0
        for count, tone, width in self._strokes:
            stop = start + 2 * count
            fill = _round_tone(tone)
            if width:
                draw.line(flat[start:stop], fill=fill, width=max(1, round(width * zoom * SUPERSAMPLE)), joint=None)
            else:
                draw.polygon(flat[start:stop], fill=fill)
            start = stop


def _round_tone(tone: Tone) -> int | tuple[int, ...]:
    """Round and clip a tone to the integers that Pillow expects."""
    if isinstance(tone, tuple):
        return tuple(min(255, max(0, round(value))) for value in tone)
    return min(255, max(0, round(tone)))


def reduce_canvas(canvas: Image.Image) -> np.ndarray:
    """Average the canvas down to the small size, float32 [S, S] or [S, S, 3 or 4] in 0..255."""
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)


def compute_ellipse(
    center: tuple[float, float],
    radii: tuple[float, float],
    *,
    num_points: int = 16,
    start: float = 0.0,
    turn: float = 1.0,
) -> np.ndarray:
    """Return points on an ellipse, float [num_points, 2].

    Args:
        center, radii: x and y, in any unit.
        num_points: number of points.
        start: start angle in full turns, clockwise from the right-hand side (y points down).
        turn: fraction of the ellipse; 1 is all of it.
    """
    angles = 2 * np.pi * (start + turn * np.arange(num_points) / (num_points - (turn < 1)))
    return np.stack([center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles)], axis=1)


def compute_soft_noise(size: int, *, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise, float32 [size, size], with about zero mean, and unit variance at the nodes.

    Args:
        cells: number of independent nodes per side; a small number gives large blotches.
    """
    nodes = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(nodes.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def compute_blur(image: np.ndarray, *, sigma: float) -> np.ndarray:
    """Blur `image` (float [S, S] or [S, S, 3]) by a Gaussian of `sigma` pixels, with edge pixels repeated."""
    radius = max(1, int(np.ceil(2.5 * sigma)))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    side = len(image)
    # A blur along one axis is a matrix product; adding outside weights to the edge columns repeats the edge.
    columns = np.clip(np.arange(side)[:, None] + np.arange(-radius, radius + 1)[None, :], 0, side - 1)
    matrix = np.zeros((side, side), dtype=np.float32)
    np.add.at(matrix, (np.arange(side)[:, None], columns), (weights / weights.sum()).astype(np.float32))
    rows = np.tensordot(matrix, image, axes=(1, 0))
    return np.moveaxis(np.tensordot(matrix, rows, axes=(1, 1)), 0, 1)


def compute_jpeg(image: np.ndarray, *, quality: float) -> np.ndarray:
    """Quantise the 8x8 DCT blocks of `image` as JPEG does, which gives block and ringing artifacts.

    It uses no codec, so that the same seed gives the same pixels with every version of libjpeg.

    Args:
        image: float [S, S] in 0..255, S a multiple of 8.
        quality: 50 uses `_QUANTISATION` as it is; 100 hardly changes the image, 15 is coarse.

    Returns:
        float [S, S], possibly slightly outside 0..255.
    """
    num_blocks = len(image) // _BLOCK
    step = _QUANTISATION * (50 / quality if quality < 50 else max(0.02, 2 - quality / 50))
    blocks = image.reshape(num_blocks, _BLOCK, num_blocks, _BLOCK).transpose(0, 2, 1, 3) - 128
    coefficients = np.round(_DCT @ blocks @ _DCT.T / step) * step
    return (_DCT.T @ coefficients @ _DCT).transpose(0, 2, 1, 3).reshape(image.shape) + 128


def round_pixels(image: np.ndarray) -> np.ndarray:
    """Round a float image and clip it to uint8."""
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


_T = np.linspace(-1, 1, 9)
_ARC = 1 - _T**2
_S = np.linspace(0, 1, 6)
_BEZIER = np.stack([(1 - _S) ** 2, 2 * _S * (1 - _S), _S**2], axis=1)
_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_COS, _SIN = np.cos(_ANGLES), np.sin(_ANGLES)
_IRIS = compute_ellipse((0, 0), (1, 1), num_points=10)
_SIDES = (-1, 1)


@dataclass(frozen=True)
class Person:
    """The appearance of a face at rest, with lengths in pixels, tones in 0..255, and other values as fractions."""

    half_width: float
    crown: float
    chin: float
    taper: float
    eye_distance: float
    eye_height: float
    eye_width: float
    eye_opening: float
    eye_slant: float
    brow_height: float
    brow_width: float
    brow_slant: float
    nose_length: float
    nose_width: float
    mouth_height: float
    mouth_width: float
    mouth_curve: float
    lips: float
    age: float
    skin: float
    hair: float
    lip_tone: float
    brow_tone: float
    gaze: tuple[float, float]


def draw_person(rng: np.random.Generator) -> Person:
    """Draw a random person."""
    u = rng.uniform(0, 1, 12).tolist()
    n = np.clip(rng.standard_normal(14), -2, 2).tolist()
    skin = 95 + 110 * u[0] ** 0.7
    hair = 25 + 150 * u[1] ** 2.2
    age = u[2]
    if age > 0.75 and u[3] < 0.5:
        hair = 150 + 70 * u[4]
    return Person(
        half_width=17.2 + 1.1 * n[0],
        crown=23 + 1.2 * n[1],
        chin=20.5 + 1.2 * n[2],
        taper=0.16 + 0.18 * u[5],
        eye_distance=8.0 + 0.5 * n[3],
        eye_height=-4.6 + 0.6 * n[4],
        eye_width=3.9 + 0.35 * n[5],
        eye_opening=1.0 + 0.16 * n[6],
        eye_slant=0.35 * n[7],
        brow_height=5.6 + 0.5 * n[8],
        brow_width=1.1 + 0.9 * u[6],
        brow_slant=0.4 * n[9],
        nose_length=9.2 + 0.7 * n[10],
        nose_width=3.3 + 0.8 * u[7],
        mouth_height=11.6 + 0.6 * n[11],
        mouth_width=6.1 + 0.5 * n[12],
        mouth_curve=0.45 * n[13],
        lips=0.7 + 0.7 * u[8],
        age=age,
        skin=skin,
        hair=hair,
        lip_tone=skin * (0.56 + 0.3 * u[9]),
        brow_tone=min(skin * 0.62, 0.7 * hair + 0.3 * skin * u[10]),
        gaze=((u[11] - 0.5) * 2.2, 0.25 * n[0]),
    )


def _curve(start: tuple[float, float], middle: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Return points of a quadratic Bezier curve, float [6, 2]; `middle` is its control point."""
    return _BEZIER @ np.array((start, middle, end))


def add_head(sketch: Sketch, person: Person, actions: dict[int, float]) -> None:
    """Add neck, ears and the outline of the face."""
    chin = person.chin + 2.6 * actions[26] - 0.6 * actions[17]
    width = person.half_width
    shade = person.skin * 0.62
    sketch.fill(np.array([(-9.5, 8), (9.5, 8), (11, 40), (-11, 40)]), shade, lift=-6)
    for side in _SIDES:
        sketch.fill(compute_ellipse((side * (width + 0.3), -1), (2.1, 4.4), num_points=10), person.skin * 0.78, lift=-3)
    below = np.maximum(_SIN, 0)
    x = width * _COS * (1 - person.taper * below**2) * (1 + 0.1 * below * np.abs(_COS))
    y = np.where(_SIN > 0, chin, person.crown) * _SIN
    sketch.fill(np.stack([x, y], axis=1), person.skin)


def add_folds(sketch: Sketch, person: Person, actions: dict[int, float]) -> None:
    """Add the wrinkles that actions and age cause: forehead, glabella, nose, cheeks, crow's feet, chin."""
    skin, age = person.skin, person.age

    def crease(strength: float) -> float:
        return skin * (1 - min(0.5, strength))

    brow = person.eye_height - person.brow_height
    raised = (actions[1] + actions[2]) / 2 * (0.5 + age) + 0.15 * age
    if raised > 0.25:
        for offset in (-3.2, -5.4):
            half = 6.5 if actions[2] > 0.4 else 4.0
            line = _curve((-half, brow + offset), (0, brow + offset - 0.8 + 1.4 * actions[4]), (half, brow + offset))
            sketch.line(line, crease(0.3 * raised), width=0.6)
    if actions[4] > 0.2 or actions[9] > 0.2:
        strength = 0.45 * max(actions[4], actions[9])
        for side in _SIDES:
            sketch.line(
                _curve((side * 1.3, brow + 3.2), (side * 0.9, brow + 1), (side * 1.5, brow - 1.4)),
                crease(strength),
                width=0.6,
            )
    if actions[9] > 0.15:
        for offset in (1.0, 2.6):
            y = person.eye_height + offset
            sketch.line(_curve((-2.4, y + 1), (0, y - 1), (2.4, y + 1)), crease(0.45 * actions[9]), width=0.6)
    _add_cheeks(sketch, person, actions, crease)


def _add_cheeks(sketch: Sketch, person: Person, actions: dict[int, float], crease) -> None:
    """Add raised cheeks, bags under the eyes, nasolabial folds, crow's feet and the crease of the chin."""
    fold = 0.18 * person.age + 0.3 * max(actions[12], 0.9 * actions[9], 0.8 * actions[10], 0.4 * actions[20])
    wing = person.eye_height + person.nose_length - 1 - 1.2 * actions[9]
    corner_x = person.mouth_width + 2.6 + 2.2 * actions[12] + 1.5 * actions[20]
    corner_y = person.mouth_height - 1.2 * actions[12] + 1.0 * actions[15]
    bag = 0.1 * person.age + 0.28 * max(actions[6], 0.6 * actions[7]) + 0.1 * actions[1]
    for side in _SIDES:
        eye_x = side * person.eye_distance
        if actions[6] > 0.2:
            cheek = compute_ellipse((side * 9.6, 4.0 - 1.2 * actions[6]), (4.2, 3.2), num_points=12)
            sketch.fill(cheek, person.skin * (1 + 0.09 * actions[6]), lift=1)
        low = person.eye_height + 3.4 - 0.5 * actions[6]
        sketch.line(_curve((eye_x - 3, low), (eye_x, low + 1.6), (eye_x + 3, low)), crease(bag), width=0.7)
        if fold > 0.1:
            start = (side * (person.nose_width + 0.7), wing)
            middle = (side * (corner_x - 0.6), wing + 1.5)
            sketch.line(_curve(start, middle, (side * corner_x, corner_y)), crease(fold), width=0.8, lift=1)
        if actions[6] > 0.3:
            outer = side * (person.eye_distance + person.eye_width + 0.8)
            for rise in (-1.2, 0.6):
                feet = np.array(
                    [(outer, person.eye_height + 0.2 * rise), (outer + side * 2.4, person.eye_height + rise)]
                )
                sketch.line(feet, crease(0.25 * actions[6] * (0.6 + person.age)), width=0.4)
    boss = 0.1 + 0.3 * actions[17]
    y = person.mouth_height + 4.6 + 1.8 * actions[26]
    sketch.line(_curve((-2.6, y + 0.6), (0, y - 0.8 - actions[17]), (2.6, y + 0.6)), crease(boss), width=0.8, lift=1)


def add_eyes(sketch: Sketch, person: Person, actions: dict[int, float]) -> None:
    """Add both eyes with their sockets, lids and irises."""
    upper = 1.75 * person.eye_opening + 1.25 * actions[5] - 0.75 * actions[7] - 0.35 * actions[6] - 0.3 * actions[9]
    lower = 1.05 * person.eye_opening + 0.25 * actions[5] - 0.75 * actions[7] - 0.75 * actions[6] - 0.5 * actions[9]
    shut = max(0.0, 1 - 1.4 * actions[43])
    upper, lower = max(0.15, upper * (0.2 + 0.8 * shut)), max(0.05, lower)
    white = 150 + 0.4 * person.skin
    for side in _SIDES:
        x = side * person.eye_distance + person.eye_width * _T
        slant = person.eye_slant - 0.5 * actions[1] * (actions[15] > 0.3)
        base = person.eye_height - side * slant * _T
        top, bottom = base - upper * _ARC, base + lower * _ARC
        socket = compute_ellipse((side * person.eye_distance, person.eye_height - 0.9), (5.2, 3.5), num_points=12)
        sketch.fill(socket, person.skin * 0.88)
        if upper + lower > 0.7:
            sketch.fill(np.stack([np.append(x, x[::-1]), np.append(top, bottom[::-1])], axis=1), white)
            iris = _IRIS * 1.95 + (
                side * person.eye_distance + person.gaze[0],
                person.eye_height - 0.2 + person.gaze[1],
            )
            iris[:, 1] = np.clip(iris[:, 1], np.interp(iris[:, 0], x, top), np.interp(iris[:, 0], x, bottom))
            sketch.fill(iris, 22 + 0.25 * person.hair)
        lid = np.stack([x, top - 0.15], axis=1)
        sketch.line(lid, person.skin * 0.3, width=0.75)
        sketch.line(np.stack([x, bottom], axis=1), person.skin * 0.6, width=0.35)
        crease = np.stack([x, top - 1.1 - 0.3 * actions[5]], axis=1)
        sketch.line(crease, person.skin * 0.7, width=0.4)


def add_brows(sketch: Sketch, person: Person, actions: dict[int, float], *, asymmetry: float) -> None:
    """Add the brows; `asymmetry` in -1..1 raises one and lowers the other a little."""
    base = person.eye_height - person.brow_height
    inner = base + 0.4 + person.brow_slant - 2.5 * actions[1] + 2.3 * actions[4] + 1.3 * actions[9] + 0.2 * actions[7]
    middle = base - 1.0 - 1.6 * actions[1] - 1.8 * actions[2] + 1.5 * actions[4] + 0.8 * actions[9]
    outer = base + 0.9 - person.brow_slant - 2.3 * actions[2] + 0.5 * actions[4] + 0.3 * actions[9]
    if actions[1] > actions[2]:
        outer += 0.5 * (actions[1] - actions[2])
    near = 3.6 - 1.2 * actions[4]
    half = person.brow_width / 2
    for side in _SIDES:
        lift = -0.6 * side * asymmetry
        line = _curve(
            (side * near, inner + lift),
            (side * 8.2, 2 * middle + lift - (inner + outer) / 2),
            (side * 13.2, outer + lift),
        )
        thick = half * (1.15 - 0.75 * _S[:, None] ** 2) * np.array([(0.0, 1.0)])
        sketch.fill(np.concatenate([line - thick, (line + thick)[::-1]]), person.brow_tone, lift=1)


def add_nose(sketch: Sketch, person: Person, actions: dict[int, float], *, light: float) -> None:
    """Add the nose, shaded on the side away from `light` (-1: from the left, 1: from the right)."""
    tip = person.eye_height + person.nose_length - 1.1 * actions[9] - 0.4 * actions[10]
    width = person.nose_width * (1 + 0.18 * actions[9] + 0.12 * actions[12])
    skin, side = person.skin, -1 if light > 0 else 1
    dark = skin * (0.86 - 0.12 * abs(light))
    bridge = np.array(
        [
            (side * 1.4, person.eye_height - 1),
            (side * 2.2, tip - 3),
            (side * width, tip),
            (side * 0.4, tip - 0.5),
            (side * 0.6, person.eye_height),
        ]
    )
    sketch.fill(bridge, dark, lift=3)
    sketch.line(np.array([(-side * 0.4, person.eye_height), (-side * 0.3, tip - 1.6)]), skin * 1.1, width=1.1, lift=4)
    for turn in _SIDES:
        wing = _curve((turn * (width - 0.3), tip - 2.2), (turn * (width + 0.9), tip - 0.2), (turn * 1.6, tip + 0.3))
        sketch.line(wing, skin * (0.68 - 0.15 * actions[9]), width=0.6, lift=3)
        sketch.fill(compute_ellipse((turn * 1.7, tip + 0.1), (0.95, 0.5), num_points=8), skin * 0.35, lift=4)


def add_mouth(sketch: Sketch, person: Person, actions: dict[int, float], *, asymmetry: float) -> None:
    """Add the lips, and for an open mouth the dark inside and the teeth."""
    pull, drop = actions[12], actions[15]
    half = (
        person.mouth_width + 2.3 * pull + 1.9 * actions[20] - 0.9 * actions[26] * (1 - min(1, pull)) - 0.5 * actions[23]
    )
    half -= 0.6 * actions[17]
    gap = 1.5 * actions[25] + 5.6 * actions[26] + 0.5 * actions[10]
    gap = 0.0 if gap < 0.35 or actions[24] > 0.5 else gap
    middle = person.mouth_height - 0.9 * actions[17]
    corner = middle + person.mouth_curve - 2.3 * pull + 2.1 * drop + 0.6 * actions[20] + 0.28 * gap
    corners = corner + 0.5 * asymmetry * _T
    square = np.where(max(actions[20], actions[10], actions[16]) > 0.35, 1 - _T**4, _ARC)
    x = half * _T
    top = corners + (middle - 0.1 * gap - 1.3 * actions[10] - 0.4 * actions[9] - corner) * square
    bottom = top + gap * square + (0.9 * actions[16] * square if gap else 0)
    press = max(0.2, 1 - 0.6 * actions[23] - 0.7 * actions[24])
    thin = press * person.lips
    bow = _ARC * (1 - 0.25 * np.exp(-((_T / 0.2) ** 2)))
    over = top - 1.35 * thin * bow * (1 - 0.25 * pull) - 0.15
    under = bottom + (1.75 * thin + 0.5 * actions[16]) * _ARC + 0.15
    outline = np.stack([np.append(x, x[::-1]), np.append(over, under[::-1])], axis=1)
    sketch.fill(outline, person.lip_tone, lift=1.5)
    if not gap:
        line = np.stack([x, (top + bottom) / 2], axis=1)
        sketch.line(line, person.lip_tone * 0.45, width=0.55 + 0.2 * press, lift=1.5)
    else:
        _add_teeth(sketch, x, top, bottom, actions)
    shadow = _curve((-half * 0.5, under.max() + 0.7), (0, under.max() + 1.1), (half * 0.5, under.max() + 0.7))
    sketch.line(shadow, person.skin * 0.82, width=0.8, lift=1)
    if drop > 0.3:
        for side in _SIDES:
            end = (side * (half + 1.0), corner + 2.2)
            sketch.line(
                _curve((side * half, corner), (side * (half + 0.5), corner + 0.5), end),
                person.skin * 0.68,
                width=0.6,
                lift=1,
            )


def _add_teeth(sketch: Sketch, x: np.ndarray, top: np.ndarray, bottom: np.ndarray, actions: dict[int, float]) -> None:
    """Fill an open mouth with a dark tone, upper teeth, and lower teeth if the lower lip is depressed."""
    back = x[::-1]
    sketch.fill(np.stack([np.append(x, back), np.append(top, bottom[::-1])], axis=1), 28, lift=1.5)
    gap = bottom - top
    upper = min(2.4, 0.5 + 1.6 * max(actions[12], actions[10], 0.5 * actions[20], 0.4 * actions[25]))
    edge = top + np.minimum(gap * 0.85, upper)
    inner = slice(1, -1)
    rim = np.stack([np.append(x[inner], x[inner][::-1]), np.append(top[inner], edge[inner][::-1])], axis=1)
    sketch.fill(rim, 222, lift=1.5)
    if actions[16] > 0.3:
        edge = bottom - np.minimum(gap * 0.4, 1.3)
        rim = np.stack([np.append(x[inner], x[inner][::-1]), np.append(bottom[inner], edge[inner][::-1])], axis=1)
        sketch.fill(rim, 200, lift=1.5)


HAIRSTYLES = ("bald", "short", "fringe", "long", "parted", "hat")
_HAIRSTYLE_SHARES = np.cumsum((0.1, 0.34, 0.14, 0.2, 0.16, 0.06))


def add_back_hair(sketch: Sketch, person: Person, *, rng: np.random.Generator) -> str:
    """Add the shoulders and the hair behind the head; return the drawn hairstyle, one of HAIRSTYLES."""
    style = HAIRSTYLES[int(np.searchsorted(_HAIRSTYLE_SHARES, rng.random(), side="right"))]
    clothes = float(rng.uniform(10, 230))
    sketch.fill(np.array([(-26, 26), (-12, 22), (12, 22), (26, 26), (30, 60), (-30, 60)]), clothes, lift=-8)
    width = person.half_width
    if style in ("long", "parted"):
        length = rng.uniform(16, 34)
        sketch.fill(compute_ellipse((0, -5), (width * 1.22, person.crown - 1), num_points=20), person.hair * 0.85)
        side = np.array([(-width * 1.22, -6), (width * 1.22, -6), (width * 1.3, length), (-width * 1.3, length)])
        sketch.fill(side, person.hair * 0.8, lift=-8)
    elif style in ("short", "fringe"):
        sketch.fill(compute_ellipse((0, -6), (width * 1.1, person.crown - 3.5), num_points=20), person.hair * 0.85)
    return style


def add_front_hair(sketch: Sketch, person: Person, style: str, *, rng: np.random.Generator) -> None:
    """Add the hair around and over the forehead, or a hat."""
    if style == "bald":
        return
    width, crown = person.half_width, person.crown
    line = {"short": -15.5, "fringe": -10.5, "long": -14.5, "parted": -15.0, "hat": -12.0}[style] + rng.normal(0, 0.9)
    tone = float(rng.uniform(20, 220)) if style == "hat" else person.hair
    over = compute_ellipse((0, -2), (width * 1.09, crown), num_points=13, start=0.5, turn=0.499)
    x = np.linspace(width * 1.07, -width * 1.07, 9)
    lean = float(rng.uniform(-1, 1))
    bend = {"short": 3.0, "fringe": 2.0, "long": 6.0, "parted": 9.0, "hat": -1.0}[style]
    y = line + bend * np.abs(x / width - (0.5 * lean if style == "parted" else 0)) ** 1.7
    if style == "fringe":
        y = y + rng.uniform(-1.5, 1.0, len(x))
    sketch.fill(np.concatenate([over, np.stack([x, y], axis=1)]), tone, lift=2)
    if style == "hat":
        sketch.line(np.stack([x * 1.1, y], axis=1), tone * 0.6, width=1.6, lift=5)
        return
    for start in rng.uniform(-0.85, 0.85, 5).tolist():
        strand = np.array([(start * width * 0.5, -crown - 1), (start * width, line + bend * abs(start) ** 1.7)])
        sketch.line(strand, tone * (1.25 if start > lean else 0.75), width=0.7, lift=2)


def add_beard(sketch: Sketch, person: Person, actions: dict[int, float], *, rng: np.random.Generator) -> None:
    """Add a beard, a moustache or stubble to some faces."""
    kind, share = rng.random(), float(rng.uniform(0.25, 0.9))
    if kind > 0.2:
        return
    tone = share * person.hair * 0.9 + (1 - share) * person.skin * 0.85
    mouth, chin = person.mouth_height, person.chin + 2.6 * actions[26]
    if kind < 0.13:
        width = person.half_width
        outer = compute_ellipse((0, 0), (width * 0.96, chin * 0.99), num_points=14, start=0.02, turn=0.46)
        inner = np.array([(-width * 0.75, 3), (-8.5, mouth - 4), (0, mouth - 4.5), (8.5, mouth - 4), (width * 0.75, 3)])
        narrow = np.where(outer[:, 1] > 0, 1 - person.taper * (outer[:, 1] / chin) ** 2, 1)
        sketch.fill(np.concatenate([outer * np.stack([narrow, np.ones_like(narrow)], axis=1), inner]), tone)
    if kind > 0.08:
        raised = 1.3 * actions[10] + 0.5 * actions[12]
        patch = np.array(
            [(-6.5, mouth - 0.5), (-4, mouth - 3.6), (0, mouth - 3.9), (4, mouth - 3.6), (6.5, mouth - 0.5)]
        )
        sketch.fill(patch - (0, raised), tone * 0.9, lift=1.5)


def add_glasses(sketch: Sketch, person: Person, *, rng: np.random.Generator) -> None:
    """Add glasses with probability 0.16; some of them are sunglasses."""
    worn, tone, width = rng.random(3).tolist()
    if worn > 0.16:
        return
    y, x = person.eye_height + 0.4, person.eye_distance + 0.3
    frame = 20 + 90 * tone**2
    for side in (-1, 1):
        rim = compute_ellipse((side * x, y), (5.4, 4.0 + 0.8 * tone), num_points=16)
        if worn < 0.018:
            sketch.fill(rim, 25, lift=4)
        sketch.line(np.concatenate([rim, rim[:1]]), frame, width=0.5 + 0.7 * width, lift=4)
        sketch.line(
            np.array([(side * (x + 5.4), y - 0.8), (side * person.half_width, y - 1.5)]), frame, width=0.7, lift=2
        )
    sketch.line(np.array([(5.4 - x, y), (0.0, y - 0.9), (x - 5.4, y)]), frame, width=0.8, lift=5)


def add_occlusion(sketch: Sketch, person: Person, *, rng: np.random.Generator) -> None:
    """Occlude a part of some faces by a hand, a scarf or a strand of hair."""
    kind, side, place, tone = rng.random(4).tolist()
    side = 1 if side < 0.5 else -1
    if kind < 0.055:
        _add_hand(sketch, person.skin * (0.85 + 0.2 * tone), side=side, height=4 + 14 * place)
    elif kind < 0.075:
        y = person.mouth_height - 5 + 9 * place
        scarf = np.array([(-22, y), (0, y + 2), (22, y), (26, 40), (-26, 40)])
        sketch.fill(scarf, 20 + 210 * tone, lift=6)
        sketch.line(scarf[:3] + np.array((0, 3)), 10 + 170 * tone, width=1.2, lift=6)
    elif kind < 0.13:
        x = side * (6 + 7 * place)
        strand = np.array([(x, -22), (x + side * 5, -20), (x + side * 7, 4), (x + side * 5, 20), (x + side * 3, 4)])
        sketch.fill(strand, person.hair, lift=4)


def _add_hand(sketch: Sketch, tone: float, *, side: int, height: float) -> None:
    """Add a hand at one side of the face, from below, with its fingers up."""
    palm = np.array([(5, 14), (17, 12), (24, 34), (8, 34)]) * (side, 1) + (0, height - 8)
    sketch.fill(palm, tone, lift=7)
    for finger in range(4):
        x, top = 6.2 + 3.1 * finger, height - (3, 5, 4.2, 2)[finger]
        line = np.array([(side * x, top), (side * (x + 0.6), height + 8)])
        sketch.line(line, tone * 0.6, width=3.2, lift=7)
        sketch.line(line, tone, width=2.5, lift=7)
