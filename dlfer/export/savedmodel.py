"""A classifier as a TensorFlow SavedModel."""

from __future__ import annotations

from pathlib import Path

from dlfer.export.compare import Sample
from dlfer.export.graph import build_function
from dlfer.model.classifier import Classifier


def write_savedmodel(classifier: Classifier, path: Path, *, size: tuple[int, int] | None, sample: Sample) -> dict:
    """Write a SavedModel with the signature `serving_default`.

    Args:
        classifier: a network, or an ensemble of such.
        path: the folder to make.
        size: (H, W) of all images; None leaves both free.
        sample: not used.

    Returns:
        Nothing to add to export.json.
    """
    import tensorflow as tf

    module, function = build_function(classifier, size=size)
    tf.saved_model.save(module, str(path), signatures={"serving_default": function})
    return {}
