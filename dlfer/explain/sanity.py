"""Do maps show what was learned? They must change when it is taken away.

Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018: the parameters are re-initialised, and the maps before
and after are compared by their rank correlation. A method that gives the same map either way draws edges of the
image, not what the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np

from dlfer.errors import ModelError
from dlfer.explain.explanation import Explainer, Explanation, compute_rank_correlation
from dlfer.model.boosted import BoostedClassifier, build_level_features
from dlfer.model.classifier import Classifier
from dlfer.model.ensemble import EnsembleClassifier
from dlfer.model.stage_network import TransferNetwork, build_transfer_network
from dlfer.model.training_kernels import set_norm_momentum
from dlfer.model.transfer import draw_probe_images

SEED = 104_729
"""Of the new weights; none that an experiment is likely to have. A trained head is still close to the one that it began
with: re-initialised with the seed of its own training it gave the same maps (rank correlation 0.94, EfficientNet-Lite2)."""

HEAD, ALL = "head", "all"
OTHER = "other_face"
"""With what the changed maps are compared: how alike the maps of different faces are to begin with."""


def check_maps(
    explainer: Explainer,
    images: Sequence[np.ndarray],
    explanations: Sequence[Explanation],
    *,
    seed: int = SEED,
    say: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, dict]]:
    """Return how alike maps are before and after the classifier's weights are re-initialised.

    Args:
        explainer: that made the maps.
        images: the faces.
        explanations: their maps; the changed classifier's are of the same labels.
        seed: of the new weights. It sets the global seeds of Keras, NumPy and Python.
        say: told (faces done, faces in all).

    Returns:
        {"head": the head alone is new (not of trees), "all": the whole network, "other_face": the unchanged maps of
        different faces} -> {name of the map: {"mean", "low", "high": rank correlation in -1..1, None where there
        is none; "n": pairs of maps, "flat": pairs of which one had the same value everywhere, left out}}.
    """
    classifier, before = explainer.classifier, [explanation.maps for explanation in explanations]
    parts = (ALL,) if isinstance(classifier, BoostedClassifier) else (HEAD, ALL)
    found, done = {}, 0
    for part in parts:
        changed = Explainer(randomise(classifier, part=part, seed=seed), explainer.options)
        after = []
        for image, explanation in zip(images, explanations, strict=True):
            after.append(changed.explain(image, explanation.target).maps)
            done += 1
            if say is not None:
                say(done, len(parts) * len(images))
        found[part] = _compare(before, after, names=before[0])
    return found | {OTHER: _compare(before[:-1], before[1:], names=before[0])}


def randomise(classifier: Classifier, *, part: str = ALL, seed: int = SEED) -> Classifier:
    """Return a classifier of the same form with weights as before any training.

    Args:
        classifier: stays as it is.
        part: "all" weights of each network, or those of its "head". Of a boosted model it is the backbone ("all"
            alone), below the same trees.
        seed: see `check_maps`.

    Raises:
        ModelError: another part, or a boosted model's head.
    """
    if part not in (HEAD, ALL) or (part == HEAD and isinstance(classifier, BoostedClassifier)):
        raise ModelError(
            f"randomise: found part {part!r} for family {classifier.family}, expected head (not of trees) or all."
        )
    if isinstance(classifier, EnsembleClassifier):
        return _randomise_members(classifier, part, seed)
    keras.utils.set_random_seed(seed)
    old = classifier.parts
    network = build_transfer_network(
        classifier.config,
        num_labels=len(classifier.labels),
        image_size=classifier.image_size,
        channels=classifier.channels,
        crop=classifier.crop,
        aspect=classifier.aspect,
    )
    if part == ALL:
        _settle_norms(network)
    given = {
        "config": classifier.config,
        "channels": classifier.channels,
        "temperature_fit": classifier.temperature_fit,
    }
    if isinstance(classifier, BoostedClassifier):
        features = build_level_features(network, classifier.config, classifier.boosting)
        given |= {"boosting": classifier.boosting, "trees": (features, classifier.scale, classifier.booster)}
        return type(classifier)(network, classifier.labels, **given)
    if part == HEAD:
        network.backbone.set_weights(old.backbone.get_weights())
    return type(classifier)(network, classifier.labels, **given)


def _settle_norms(network: TransferNetwork) -> None:
    """Set the moving statistics of every BatchNorm to those of one pass over drawn images.

    A network with new weights has the statistics 0 and 1. Where its kernels are small, as Glorot's rule makes those of a
    depthwise convolution, each layer then passes on a fraction of what it gets, and the maps of the whole network would
    be flat: there would be nothing to compare with.
    """
    set_norm_momentum(network.backbone, 0.0)
    images = draw_probe_images(network.face_input.image_size, network.model.input_shape[-1])
    network.model(images, training=True)


def _randomise_members(ensemble: EnsembleClassifier, part: str, seed: int) -> EnsembleClassifier:
    members = {}
    for number, (name, member) in enumerate(ensemble.members.items()):
        own = ALL if isinstance(member, BoostedClassifier) else part
        members[name] = randomise(member, part=own, seed=seed + number)
    return EnsembleClassifier(
        members,
        ensemble.labels,
        config=ensemble.config,
        combine=ensemble.combine_by,
        trained=ensemble.trained,
        temperature_fit=ensemble.temperature_fit,
    )


def _compare(
    before: Sequence[dict[str, np.ndarray]], after: Sequence[dict[str, np.ndarray]], *, names: Iterable[str]
) -> dict[str, dict]:
    """Return the rank correlations of maps, summed up by name; of a single face there are no maps of others."""
    found = {}
    for name in names:
        pairs = [(one[name], other[name]) for one, other in zip(before, after, strict=True)]
        known = [compute_rank_correlation(*pair) for pair in pairs if pair[0].shape == pair[1].shape]
        values = [value for value in known if value is not None]
        found[name] = {
            "mean": float(np.mean(values)) if values else None,
            "low": min(values, default=None),
            "high": max(values, default=None),
            "n": len(known),
            "flat": len(known) - len(values),
        }
    return found
