"""All families of classifiers, and the one call that loads a trained one by its name."""

from __future__ import annotations

from pathlib import Path

from dlfer.model import boosted, ensemble
from dlfer.model.classifier import Classifier, list_families, load_classifier
from dlfer.runs.find import find_model

FAMILY_MODULES = (boosted, ensemble)
"""What is imported so that the families enter themselves."""

FAMILIES: dict[str, type[Classifier]] = list_families()


def load_artifact(name: str | Path) -> Classifier:
    """Load a classifier by the name of a shipped model, a run, or an artifact folder.

    Raises:
        ModelError: nothing of that name, or a damaged artifact.
    """
    return load_classifier(find_model(name))
