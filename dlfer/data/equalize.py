"""The light of an image evened out: its grey levels spread over the whole range, everywhere or tile by tile."""

from __future__ import annotations

import numpy as np

from dlfer.data.images import to_channels
from dlfer.errors import DataError

CLIP_LIMIT = 2.0
TILES = 4
"""CLAHE: a tile's grey level may hold this many times its even share; tiles a side, 12 pixels each of 48."""


def equalize(image: np.ndarray, method: str) -> np.ndarray:
    """Return an image with its light evened out; in colour the luma is, and the chroma stays.

    Args:
        image: uint8 [H, W, 1 or 3].
        method: "histogram" (over the whole image), "clahe" (in 4x4 tiles, contrast limited) or "none".

    Raises:
        DataError: another method.
    """
    if method not in _METHODS:
        raise DataError(f"faces.equalize: found {method!r}, expected one of {', '.join(_METHODS)}.")
    grey = to_channels(image, 1)[..., 0]
    evened = _METHODS[method](grey)
    if image.shape[-1] == 1:
        return evened[..., None]
    change = evened.astype(np.int16) - grey
    return (image + change[..., None]).clip(0, 255).astype(np.uint8)


def equalize_histogram(grey: np.ndarray) -> np.ndarray:
    """Return uint8 [H, W] whose grey levels are about equally frequent; a flat image stays as it is."""
    counts = np.bincount(grey.ravel(), minlength=256)
    first = counts[np.flatnonzero(counts)[0]]
    if first == grey.size:
        return grey
    table = (np.cumsum(counts) - first) * (255 / (grey.size - first))
    return table.clip(0, 255).round().astype(np.uint8)[grey]


def equalize_tiles(grey: np.ndarray, *, clip_limit: float = CLIP_LIMIT, tiles: int = TILES) -> np.ndarray:
    """Return uint8 [H, W], equalised tile by tile with limited contrast (CLAHE).

    What a tile's histogram has above the limit is shared out over all its grey levels; between the
    centres of tiles their tables are interpolated. Where the tiles do not divide the image, it is
    mirrored at its right and lower edge for the histograms.

    Source: Zuiderveld, Contrast Limited Adaptive Histogram Equalization, Graphics Gems IV (1994) 474; in its
    rounding as OpenCV does it.
    """
    height, width = grey.shape
    fill = [(-n) % tiles for n in (height, width)]
    if any(fill):
        # OpenCV, too, adds a whole row of tiles' remainder on both axes as soon as one does not divide.
        fill = [tiles - n % tiles for n in (height, width)]
    padded = np.pad(grey, ((0, fill[0]), (0, fill[1])), mode="reflect") if any(fill) else grey
    tall, wide = padded.shape[0] // tiles, padded.shape[1] // tiles
    blocks = padded.reshape(tiles, tall, tiles, wide).swapaxes(1, 2).reshape(tiles * tiles, -1)
    tables = np.stack([_make_table(block, clip_limit) for block in blocks]).reshape(tiles, tiles, 256)
    y0, y1, below = _find_tiles(height, tall, tiles)
    x0, x1, right = _find_tiles(width, wide, tiles)
    below, right = below[:, None], right[None, :]
    above, left = 1 - below, 1 - right

    def look_up(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return tables[y[:, None], x[None, :], grey].astype(np.float32)

    top = look_up(y0, x0) * left + look_up(y0, x1) * right
    bottom = look_up(y1, x0) * left + look_up(y1, x1) * right
    return (top * above + bottom * below).round().clip(0, 255).astype(np.uint8)


def _make_table(block: np.ndarray, clip_limit: float) -> np.ndarray:
    """Return uint8 [256], what becomes of each grey level of a tile."""
    counts = np.bincount(block, minlength=256)
    limit = max(1, int(clip_limit * block.size / 256))
    above = int(np.maximum(counts - limit, 0).sum())
    counts = np.minimum(counts, limit) + above // 256
    rest = above % 256
    if rest:
        counts[: rest * max(256 // rest, 1) : max(256 // rest, 1)] += 1
    return (np.cumsum(counts) * np.float32(255 / block.size)).round().clip(0, 255).astype(np.uint8)


def _find_tiles(length: int, tile: int, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each pixel of a line the tile before its place, the one after, and the weight of the latter."""
    place = np.arange(length, dtype=np.float32) * np.float32(1 / tile) - np.float32(0.5)
    before = np.floor(place).astype(int)
    return before.clip(0, tiles - 1), (before + 1).clip(0, tiles - 1), place - before


_METHODS = {"none": lambda grey: grey, "histogram": equalize_histogram, "clahe": equalize_tiles}
