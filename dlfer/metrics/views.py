"""What test-time augmentation changes: its figures beside those of the single view."""

from __future__ import annotations

from typing import Any

from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_scores
from dlfer.metrics.several import compare_several


def compute_view_scores(viewed: Predictions, single: Predictions, *, view: str) -> dict[str, Any]:
    """Return the figures of predictions averaged over views, and their difference to the single view's.

    Args:
        viewed: averaged over views.
        single: of the same images as they are.
        view: the name of the views.

    Returns:
        {"n", "accuracy": figure, "macro_f1": figure, "paired": as a pair of `compare_several`, viewed - single}.

    Raises:
        DataError: the two are not about the same images.
    """
    scores = compute_scores(viewed)
    pair = compare_several([viewed, single], [view, "single view"])["pairs"][0]
    return {key: scores[key] for key in ("n", "accuracy", "macro_f1")} | {"paired": pair}
