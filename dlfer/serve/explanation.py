"""Where a face was covered and the answer changed: a map as a picture, and in words."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from dlfer.explain.occlusion import Occlusion, compute_occlusion
from dlfer.predict.crops import Crop
from dlfer.serve.schemas import Explanation

_SHOWN_SIDE = 384
_FALL, _RISE = (214, 69, 0), (0, 90, 181)
"""Orange and blue, which the common kinds of colour blindness tell apart; the text says the same in words."""


def explain_crop(
    crop: Crop, label: str | None, *, model: str, labels: tuple[str, ...], predict: Callable[[np.ndarray], np.ndarray]
) -> Explanation:
    """Return what covering parts of a face does to the probability of a label.

    Args:
        crop: the face as the model is given it.
        label: one of `labels`; None: the most probable one.
        model: its name.
        labels: the model's.
        predict: uint8 [N, S, S, C] -> float [N, number of labels].
    """
    if label is None:
        label = labels[int(predict(crop.pixels[None])[0].argmax())]
    found = compute_occlusion(predict, crop.pixels, labels.index(label))
    return Explanation(
        model=model,
        label=label,
        probability=found.probability,
        predicted=labels[found.predicted],
        box=crop.box,
        square=found.size,
        stride=found.stride,
        description=describe_occlusion(found, label),
        crop_png=_encode(_enlarge(crop.pixels)),
        map_png=_encode(draw_map(crop.pixels, found)),
        largest_fall=float(max(0.0, found.sensitivity.max())),
        largest_rise=float(max(0.0, -found.sensitivity.min())),
        flips=float(found.flips.mean()),
    )


def describe_occlusion(found: Occlusion, label: str) -> str:
    """Return the map in a few sentences."""
    fall, rise = found.sensitivity.max(), -found.sensitivity.min()
    words = [f"Nothing covered, the probability of {label} is {found.probability:.0%}."]
    if fall >= 0.005:
        words.append(
            f"It falls most, by {100 * fall:.0f} points, where the {_name_place(found.sensitivity)} of the face is covered."
        )
    else:
        words.append("Covering no part makes it fall by half a point or more.")
    if rise >= 0.005:
        words.append(f"It rises most, by {100 * rise:.0f} points, with the {_name_place(-found.sensitivity)} covered.")
    flips = found.flips.mean()
    words.append(
        f"On {flips:.0%} of the face a square of {found.size} pixels can change the most probable label."
        if flips
        else f"No square of {found.size} pixels changes the most probable label."
    )
    return " ".join(words)


def draw_map(crop: np.ndarray, found: Occlusion) -> Image.Image:
    """Return the face in grey under orange, where covering lowers the probability, and blue, where it raises it.

    The place where it falls most has a frame, for those who do not see the colours.
    """
    sensitivity = found.sensitivity
    grey = crop.astype(np.float64).mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    strength = np.abs(sensitivity) / max(1e-9, np.abs(sensitivity).max()) * 0.85
    colour = np.where((sensitivity >= 0)[..., None], np.array(_FALL), np.array(_RISE))
    mixed = grey * (1 - strength[..., None]) + colour * strength[..., None]
    image = _enlarge(mixed.round().clip(0, 255).astype(np.uint8))
    if sensitivity.max() > 0:
        y, x = np.unravel_index(int(sensitivity.argmax()), sensitivity.shape)
        scale, half = _SHOWN_SIDE / len(sensitivity), found.size / 2
        x0, y0 = (min(max(0.0, place + 0.5 - half), len(sensitivity) - found.size) for place in (x, y))
        frame = [round(scale * value) for value in (x0, y0, x0 + found.size, y0 + found.size)]
        pen = ImageDraw.Draw(image)
        pen.rectangle(frame, outline=(0, 0, 0), width=6)
        pen.rectangle([frame[0] + 2, frame[1] + 2, frame[2] - 2, frame[3] - 2], outline=(255, 255, 255), width=2)
    return image


def _name_place(values: np.ndarray) -> str:
    """Return in which ninth of the face the largest value stands, as it is seen."""
    y, x = np.unravel_index(int(values.argmax()), values.shape)
    rows, columns = ("upper", "middle", "lower"), ("left", "middle", "right")
    row = rows[min(2, 3 * int(y) // values.shape[0])]
    column = columns[min(2, 3 * int(x) // values.shape[1])]
    return "middle" if row == column == "middle" else f"{row} {column}"


def _enlarge(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return image.resize((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.BICUBIC)


def _encode(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
