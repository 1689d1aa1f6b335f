"""The families of classifiers, and the one call that loads a trained one."""

from __future__ import annotations

from pathlib import Path

from dlfer.model.boosted import BoostedClassifier
from dlfer.model.classifier import Classifier, read_artifact_record
from dlfer.model.ensemble import EnsembleClassifier
from dlfer.model.network_classifier import HybridClassifier, TransferClassifier
from dlfer.runs.find_model import find_model

FAMILIES: dict[str, type[Classifier]] = {
    "transfer": TransferClassifier,
    "hybrid": HybridClassifier,
    "boosted": BoostedClassifier,
    "ensemble": EnsembleClassifier,
}


def load_artifact(name: str | Path) -> Classifier:
    """Load a classifier by the name of a shipped model, a run, or an artifact folder.

    Raises:
        ModelError: nothing of that name, or a damaged artifact.
    """
    folder = find_model(str(name))
    return FAMILIES[read_artifact_record(folder)["family"]].load(folder)
