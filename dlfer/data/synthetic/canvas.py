"""The drawing board of the synthetic sources: outlines on a fine canvas, then camera and video.

Outlines are collected in a `Sketch`, painted by Pillow on a canvas of SUPERSAMPLE times the side
and averaged down, which smooths every edge. What a camera adds (blur, noise, the blocks of JPEG)
is numpy on the small image. All randomness comes from the generator that the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 3

_BLOCK = 8
_FREQUENCY = np.arange(_BLOCK)[:, None] * (2 * np.arange(_BLOCK)[None, :] + 1) * np.pi / (2 * _BLOCK)
_DCT = np.cos(_FREQUENCY) * np.sqrt(2 / _BLOCK)
_DCT[0] /= np.sqrt(2)
# Luminance quantisation of JPEG at quality 50 (ITU-T T.81, table K.1), approximated by a plane.
_QUANTISATION = 8.0 + 7.0 * (np.arange(_BLOCK)[:, None] + np.arange(_BLOCK)[None, :])

Tone = float | tuple[float, float, float]


class Sketch:
    """Outlines in the order of painting, in the units and axes of the thing drawn.

    Coordinates stay in the thing's own frame until `paint`, which sends all of them through one
    call of a projection: a hundred small projections would take longer than the painting.
    """

    def __init__(self) -> None:
        self._points: list[np.ndarray] = []
        self._lifts: list[float] = []
        self._strokes: list[tuple[int, Tone, float]] = []

    def fill(self, points: np.ndarray, tone: Tone, *, lift: float = 0.0) -> None:
        """Add a filled polygon.

        Args:
            points: float [N, 2], x to the right and y downwards.
            tone: grey value, or (red, green, blue), of 0..255; values outside are clipped.
            lift: how far the polygon stands out of the surface, towards the viewer.
        """
        self._points.append(points)
        self._lifts.append(lift)
        self._strokes.append((len(points), tone, 0.0))

    def line(self, points: np.ndarray, tone: Tone, *, width: float, lift: float = 0.0) -> None:
        """Add an open line through `points` (float [N, 2]), `width` in pixels of the small image."""
        self._points.append(points)
        self._lifts.append(lift)
        self._strokes.append((len(points), tone, width))

    def paint(
        self, canvas: Image.Image, project: Callable[[np.ndarray, np.ndarray], np.ndarray], *, zoom: float = 1.0
    ) -> None:
        """Paint all outlines on `canvas`.

        Args:
            canvas: an image SUPERSAMPLE times as wide as the small one, of mode "L" or "RGB".
            project: maps points float [N, 2] and their lifts float [N] to pixels of the small image.
            zoom: factor on the widths of lines.
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
    """Return a tone as Pillow takes it."""
    if isinstance(tone, tuple):
        return tuple(min(255, max(0, round(value))) for value in tone)
    return min(255, max(0, round(tone)))


def reduce_canvas(canvas: Image.Image) -> np.ndarray:
    """Return the canvas averaged down to its small size, float32 [S, S] or [S, S, 3] of 0..255."""
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
        center, radii: x and y, in the caller's units.
        start: where to begin, in turns clockwise from the right-hand side (y points down).
        turn: how much of the ellipse, 1 is all of it.
    """
    angles = 2 * np.pi * (start + turn * np.arange(num_points) / (num_points - (turn < 1)))
    return np.stack([center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles)], axis=1)


def compute_soft_noise(size: int, *, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise, float32 [size, size] of about zero mean and unit variance at the nodes.

    Args:
        cells: number of independent nodes along a side; few give large blotches.
    """
    nodes = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(nodes.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def compute_blur(image: np.ndarray, *, sigma: float) -> np.ndarray:
    """Return `image` (float [S, S] or [S, S, 3]) blurred by a Gaussian of `sigma` pixels, edges repeated."""
    radius = max(1, int(np.ceil(2.5 * sigma)))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    side = len(image)
    # A blur along one axis is a matrix product; folding the edge weights in repeats the border.
    columns = np.clip(np.arange(side)[:, None] + np.arange(-radius, radius + 1)[None, :], 0, side - 1)
    matrix = np.zeros((side, side), dtype=np.float32)
    np.add.at(matrix, (np.arange(side)[:, None], columns), (weights / weights.sum()).astype(np.float32))
    rows = np.tensordot(matrix, image, axes=(1, 0))
    return np.moveaxis(np.tensordot(matrix, rows, axes=(1, 1)), 0, 1)


def compute_jpeg(image: np.ndarray, *, quality: float) -> np.ndarray:
    """Return `image` with its 8x8 cosine blocks quantised as JPEG does, so that blocks and ringing show.

    Done here and not by a codec, so that the same seed gives the same pixels whatever libjpeg is installed.

    Args:
        image: float [S, S] of 0..255, S a multiple of 8.
        quality: 50 takes JPEG's own table; 100 hardly changes the image, 15 is coarse.

    Returns:
        float [S, S], possibly a little outside 0..255.
    """
    num_blocks = len(image) // _BLOCK
    step = _QUANTISATION * (50 / quality if quality < 50 else max(0.02, 2 - quality / 50))
    blocks = image.reshape(num_blocks, _BLOCK, num_blocks, _BLOCK).transpose(0, 2, 1, 3) - 128
    coefficients = np.round(_DCT @ blocks @ _DCT.T / step) * step
    return (_DCT.T @ coefficients @ _DCT).transpose(0, 2, 1, 3).reshape(image.shape) + 128


def round_pixels(image: np.ndarray) -> np.ndarray:
    """Return a float image rounded and clipped to uint8."""
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
