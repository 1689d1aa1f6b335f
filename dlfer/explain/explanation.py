"""Maps of a face by each selected method, averages of the maps of many faces, and a sanity check of the methods.

Maps that show what a model has learned must change when its weights are re-initialised; a method that gives the same
map either way shows edges of the image instead. The check compares the maps before and after by their rank correlation.
Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from dlfer.data.images import to_channels
from dlfer.errors import ModelError, UserError
from dlfer.explain.gradcam import AUTO, Cam, GradCam, list_networks
from dlfer.explain.occlusion import Occlusion, compute_occlusion
from dlfer.metrics.curves import compute_midranks
from dlfer.model.classifier import Classifier
from dlfer.model.families import BoostedClassifier, EnsembleClassifier, build_level_features
from dlfer.model.stage_network import TransferNetwork, build_transfer_network
from dlfer.model.training_kernels import set_norm_momentum
from dlfer.model.transfer import draw_probe_images
from dlfer.predict.engines import ArtifactModel, Engine

OCCLUSION, GRADCAM = "occlusion", "gradcam"
METHODS = (OCCLUSION, GRADCAM)


@dataclass(frozen=True)
class MapOptions:
    """The methods that compute maps, and their settings.

    Attributes:
        methods: "occlusion", "gradcam", or both.
        size, stride: of the occluding square, see `compute_occlusion`.
        feature_level: see `GradCam`.
    """

    methods: tuple[str, ...] = METHODS
    size: int | None = None
    stride: int | None = None
    feature_level: str = AUTO


@dataclass(frozen=True)
class Explanation:
    """The maps of one face.

    Attributes:
        probabilities: float32 [C], calibrated where the model has a temperature.
        target: index of the explained label.
        occlusion: None if it was not requested.
        cams: one for each network of the classifier; empty if Grad-CAM was not requested.
    """

    probabilities: np.ndarray
    target: int
    occlusion: Occlusion | None = None
    cams: tuple[Cam, ...] = ()

    @property
    def predicted(self) -> int:
        """Index of the most probable label."""
        return int(self.probabilities.argmax())

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """Name -> float [H, W]: "occlusion" (drop of probability, -1..1), "gradcam" or "gradcam <network>" (0..1)."""
        found = {} if self.occlusion is None else {OCCLUSION: self.occlusion.sensitivity}
        return found | {f"{GRADCAM} {cam.network}".strip(): cam.scaled for cam in self.cams}

    def describe(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the explanation as JSON values, without the arrays of the maps."""
        return {
            "predicted": labels[self.predicted],
            "explained": labels[self.target],
            "probabilities": dict(zip(labels, self.probabilities.tolist(), strict=True)),
            "occlusion": None if self.occlusion is None else _describe_occlusion(self.occlusion),
            "gradcam": [
                {"network": cam.network, "layer": cam.layer, "grid": list(cam.grid), "most": float(cam.values.max())}
                for cam in self.cams
            ],
        }


class Explainer:
    """An explainer that computes maps of faces for one classifier.

    Args:
        classifier: the classifier whose predictions are explained.
        options: the methods and their settings; None: the defaults.
        engine: the engine that predicts, for probabilities and occlusion (for int8 it is another network than the
            classifier, which Grad-CAM needs); None: the classifier.

    Raises:
        UserError: no method, or an unknown one.
        ModelError: Grad-CAM is the only method, and the classifier has no network; or no such feature level.

    Example:
        >>> Explainer(dlfer.load("lite2_96")).explain(face).maps["occlusion"].shape
        (48, 48)
    """

    def __init__(
        self, classifier: Classifier, options: MapOptions | None = None, *, engine: Engine | None = None
    ) -> None:
        self.options = options or MapOptions()
        unknown = [method for method in self.options.methods if method not in METHODS]
        if unknown or not self.options.methods:
            raise UserError(
                f"explain: found the methods {list(self.options.methods)}, expected {' or '.join(METHODS)}."
            )
        self.classifier, self.engine = classifier, engine or classifier
        self._predict = partial(self.engine.predict, calibrated=True)
        wanted = GRADCAM in self.options.methods and (not self.lacks_gradcam or len(self.options.methods) == 1)
        self._gradcam = GradCam(classifier, feature_level=self.options.feature_level) if wanted else None

    @property
    def has_other_gradcam(self) -> bool:
        """Whether Grad-CAM is computed for a network that predicts otherwise than the engine, which is in int8."""
        return self._gradcam is not None and isinstance(self.engine, ArtifactModel) and self.engine.is_int8

    @property
    def lacks_gradcam(self) -> bool:
        """Whether Grad-CAM was requested, but the classifier has no network that it can be computed for."""
        return GRADCAM in self.options.methods and not list_networks(self.classifier)

    def explain(self, image: np.ndarray, target: int | None = None) -> Explanation:
        """Return the maps of one face.

        Args:
            image: uint8 [H, W] or [H, W, 1 or 3].
            target: index of the label to explain; None: the most probable one.

        Raises:
            ModelError: the shape or dtype of the image, the target or the square is invalid.
        """
        probabilities = self._predict(image[None])[0]
        target = int(probabilities.argmax()) if target is None else target
        occlusion, cams = None, ()
        if OCCLUSION in self.options.methods:
            square = {"size": self.options.size, "stride": self.options.stride}
            occlusion = compute_occlusion(self._predict, image, target, **square)
        if self._gradcam is not None:
            cams = self._gradcam.compute(image[None], np.array([target]))[0]
        return Explanation(probabilities, target, occlusion, cams)


def _describe_occlusion(occlusion: Occlusion) -> dict[str, Any]:
    return {
        "size": occlusion.size,
        "stride": occlusion.stride,
        "num_predictions": occlusion.num_predictions,
        "greatest_fall": float(occlusion.sensitivity.max()),
        "flips": float(occlusion.flips.mean()),
    }


@dataclass(frozen=True)
class AverageMaps:
    """The average maps of the faces of one label.

    Attributes:
        label: its name.
        num_images: number of faces.
        num_correct: number of faces for which the label was predicted.
        image: uint8 [H, W, 1], the average face, grey.
        maps: name -> float64 [H, W], with the names of `Explanation.maps`.
        flips: float64 [H, W] in 0..1, the share of the faces for which some square over a pixel changes the predicted
            label; None without occlusion.
        halves: map name -> rank correlation between the averages of two halves of the faces; near 1, other faces of
            the label would give a similar map. None if a half has no face or a map is constant.
    """

    label: str
    num_images: int
    num_correct: int
    image: np.ndarray
    maps: dict[str, np.ndarray]
    flips: np.ndarray | None
    halves: dict[str, float | None]


class MapAverage:
    """A running sum of the maps of the faces of one label; memory does not grow with the number of faces.

    Args:
        label: its name.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.num_images = self.num_correct = 0
        self._image: np.ndarray | float = 0.0
        self._flips: np.ndarray | float | None = 0.0
        self._halves: list[dict[str, np.ndarray]] = [{}, {}]

    def add(self, image: np.ndarray, explanation: Explanation) -> None:
        """Add a face (uint8 [H, W, C], of the same size for all faces) and its maps."""
        half = self._halves[self.num_images % 2]
        for name, values in explanation.maps.items():
            half[name] = half.get(name, 0.0) + np.asarray(values, np.float64)
        self._image = self._image + to_channels(image, 1).astype(np.float64)
        if explanation.occlusion is None:
            self._flips = None
        else:
            self._flips = self._flips + explanation.occlusion.flips
        self.num_images += 1
        self.num_correct += explanation.predicted == explanation.target

    def finish(self) -> AverageMaps:
        """Return the averages; at least one face must have been added."""
        first, second = self._halves
        return AverageMaps(
            label=self.label,
            num_images=self.num_images,
            num_correct=int(self.num_correct),
            image=(self._image / self.num_images).round().astype(np.uint8),
            maps={name: (values + second.get(name, 0.0)) / self.num_images for name, values in first.items()},
            flips=None if self._flips is None else self._flips / self.num_images,
            halves={
                name: compute_rank_correlation(values, second[name]) if name in second else None
                for name, values in first.items()
            },
        )


def compute_rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of two maps of equal shape, in -1..1; None if one of them is constant."""
    ranks = [compute_midranks(np.asarray(values, np.float64).ravel()) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else None


SEED = 104_729
"""Seed of the new weights, one that experiments are unlikely to use: a trained head is close to its initial weights;
re-initialised with the seed of its own training it gave the same maps (rank correlation 0.94, EfficientNet-Lite2)."""

HEAD, ALL = "head", "all"
OTHER = "other_face"
"""Key of the baseline for the comparison: the rank correlation between unchanged maps of different faces."""


def check_maps(
    explainer: Explainer,
    images: Sequence[np.ndarray],
    explanations: Sequence[Explanation],
    *,
    seed: int = SEED,
    say: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, dict]]:
    """Return the rank correlations between maps before and after the classifier's weights are re-initialised.

    Args:
        explainer: the explainer that computed the maps.
        images: the faces, uint8 [H, W, C].
        explanations: their maps; the re-initialised classifier explains the same labels.
        seed: of the new weights. It sets the global seeds of Keras, NumPy and Python.
        say: called with (maps done, maps in total), where each face counts once for each re-initialised part.

    Returns:
        {"head": only the head is new (not for trees), "all": the whole network is new, "other_face": unchanged maps of
        different faces} -> {name of the map: {"mean", "low", "high": rank correlations in -1..1, None if there are
        none; "n": number of pairs of maps; "flat": number of pairs left out because one map is constant}}.
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
    """Return a classifier of the same architecture with newly initialised weights.

    Args:
        classifier: is not changed.
        part: "all" weights of each network, or those of its "head". For a boosted model only "all" is allowed: it
            gets a new backbone and keeps its trees.
        seed: see `check_maps`.

    Raises:
        ModelError: an unknown part, or the head of a boosted model.
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
        _calibrate_batch_norms(network)
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


def _calibrate_batch_norms(network: TransferNetwork) -> None:
    """Set the moving statistics of every BatchNorm to those of one pass over generated images.

    In a new network the moving means are 0 and the variances 1. With small kernels, such as those that Glorot
    initialisation gives depthwise convolutions, each layer then shrinks its input, and the maps of the whole network
    would be constant, so that there would be nothing to compare.
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
    """Return a summary of the rank correlations of the maps of each name; "n" is 0 if there are no pairs of maps."""
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
