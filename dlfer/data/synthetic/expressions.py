"""Which facial actions make which expression, and how strongly they show in one draw.

Actions are numbered as in the Facial Action Coding System (P. Ekman, W. V. Friesen, J. C. Hager,
2002); the combinations are the prototypes of EMFACS (W. V. Friesen, P. Ekman, 1983) and their
common variants.
"""

from __future__ import annotations

import numpy as np

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

# Expression -> its variants, each action -> intensity (0 absent, 1 as strong as it gets).
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

# An action of the prototype is missing from a face with this probability: real faces show parts.
MISSING = 0.08


def draw_intensities(expression: str, *, rng: np.random.Generator) -> dict[int, float]:
    """Return how strongly each action shows in one face of `expression`.

    A variant is chosen, its actions are scaled by one strength of the whole face and by a factor of
    their own, a few drop out, and each action of the table may be a little active at rest; so that a
    weak expression looks much like another one.

    Args:
        expression: a key of PROTOTYPES.
        rng: the source of all randomness.

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
