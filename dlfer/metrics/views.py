"""What test-time augmentation changes: its figures beside those of the single view."""

from __future__ import annotations

from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_scores
from dlfer.metrics.several import compare_several
from dlfer.runs.metrics_record import ViewMetrics


def compute_view_scores(viewed: Predictions, single: Predictions, *, view: str) -> ViewMetrics:
    """Return the metrics of predictions averaged over views, and their difference to the single view's.

    Args:
        viewed: averaged over views.
        single: of the same images as they are.
        view: the name of the views.

    Raises:
        DataError: the two are not about the same images.
    """
    scores = compute_scores(viewed)
    pair = compare_several([viewed, single], [view, "single view"]).pairs[0]
    return ViewMetrics(n=scores.n, accuracy=scores.accuracy, macro_f1=scores.macro_f1, paired=pair)
