"""How accuracy falls when the images get worse: a classifier judged on corrupted copies of a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.corrupt import CORRUPTIONS, STRENGTHS, corrupt_images
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.several import compute_difference
from dlfer.model.classifier import Classifier
from dlfer.runs.metrics_record import CorruptionLevel, Corruptions, Estimate

_AT_ONCE = 1024
"""Images corrupted at a time: at 224 pixels and three channels 0.6 GB as float32."""


def evaluate_corruptions(
    classifier: Classifier,
    split: Split,
    *,
    seed: int = 0,
    batch_size: int = 64,
    say: Callable[[str], None] | None = None,
) -> Corruptions:
    """Return the accuracy on each corruption at each strength, beside that on the clean images.

    It predicts the split 31 times.

    Args:
        classifier: `labels` and `predict` are used.
        split: its targets are indices into the classifier's labels.
        seed: of noise and places.
        batch_size: images at a time.
        say: is told of each corruption when it begins.

    Returns:
        Accuracies, and differences corrupted - clean on the same images, as fractions. Intervals: Wilson, and Tango for
        pairs.

    Source: after Hendrycks & Dietterich, ICLR 2019; see dlfer.data.corrupt.
    """

    def judge(make: Callable[[Split], np.ndarray]) -> Predictions:
        parts = (split.take(np.arange(start, min(start + _AT_ONCE, len(split)))) for start in _starts(len(split)))
        probabilities = np.concatenate([classifier.predict(make(part), batch_size=batch_size) for part in parts])
        return Predictions(split.ids, classifier.labels, split.targets, probabilities)

    clean = judge(lambda part: part.images)
    found: dict[str, list[CorruptionLevel]] = {}
    for name, spec in CORRUPTIONS.items():
        if say is not None:
            say(f"corruption {name} ({len(found) + 1} of {len(CORRUPTIONS)})")
        found[name] = []
        for strength, parameter in zip(STRENGTHS, spec.parameters, strict=True):

            def worsen(part: Split, name: str = name, strength: int = strength) -> np.ndarray:
                return corrupt_images(part.images, part.ids, corruption=name, strength=strength, seed=seed)

            worse = judge(worsen)
            found[name].append(
                CorruptionLevel(
                    strength=strength,
                    parameter=parameter,
                    accuracy=_compute_accuracy(worse),
                    difference=compute_difference(worse, clean),
                )
            )
    return Corruptions(
        clean=_compute_accuracy(clean),
        corruptions=found,
        meanings={name: spec.meaning for name, spec in CORRUPTIONS.items()},
        n=len(split),
        seed=seed,
    )


def _starts(num_images: int) -> range:
    return range(0, num_images, _AT_ONCE)


def _compute_accuracy(predictions: Predictions) -> Estimate:
    low, high = compute_wilson_interval(int(predictions.correct.sum()), len(predictions))
    return Estimate(value=float(predictions.correct.mean()), low=low, high=high)
