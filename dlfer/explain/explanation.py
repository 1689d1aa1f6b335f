"""The maps of a face by each method that was asked for, and the averages of the maps of many faces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dlfer.data.images import to_channels
from dlfer.errors import UserError
from dlfer.explain.gradcam import AUTO, Cam, GradCam, list_networks
from dlfer.explain.occlusion import Occlusion, compute_occlusion
from dlfer.metrics.curves import compute_midranks
from dlfer.model.classifier import Classifier

OCCLUSION, GRADCAM = "occlusion", "gradcam"
METHODS = (OCCLUSION, GRADCAM)


@dataclass(frozen=True)
class MapOptions:
    """How maps are made.

    Attributes:
        methods: of "occlusion" and "gradcam".
        size, stride: of the square, see `compute_occlusion`.
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
        target: index of the label that the maps are about.
        occlusion: None if it was not asked for.
        cams: one for each network of the classifier; none if they were not asked for.
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
        """float [H, W] by name: "occlusion" (fall of the probability, -1..1), "gradcam" or "gradcam <network>" (0..1)."""
        found = {} if self.occlusion is None else {OCCLUSION: self.occlusion.sensitivity}
        return found | {f"{GRADCAM} {cam.network}".strip(): cam.scaled for cam in self.cams}

    def describe(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return plain values, for JSON; the maps themselves are arrays and not among them."""
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
    """Makes the maps of faces.

    Args:
        classifier: whose answers are explained.
        options: by which methods.

    Raises:
        ModelError: Grad-CAM is the one method, and the classifier has no network; or no such feature level.

    Example:
        >>> Explainer(dlfer.load("lite2_96")).explain(face).maps["occlusion"].shape
        (48, 48)
    """

    def __init__(self, classifier: Classifier, options: MapOptions | None = None) -> None:
        self.options = options or MapOptions()
        unknown = [method for method in self.options.methods if method not in METHODS]
        if unknown or not self.options.methods:
            raise UserError(
                f"explain: found the methods {list(self.options.methods)}, expected {' or '.join(METHODS)}."
            )
        self.classifier = classifier
        self._predict = partial(classifier.predict, calibrated=True)
        wanted = GRADCAM in self.options.methods and (not self.lacks_gradcam or len(self.options.methods) == 1)
        self._gradcam = GradCam(classifier, feature_level=self.options.feature_level) if wanted else None

    @property
    def lacks_gradcam(self) -> bool:
        """Whether Grad-CAM was asked for and the classifier has no network to look into."""
        return GRADCAM in self.options.methods and not list_networks(self.classifier)

    def explain(self, image: np.ndarray, target: int | None = None) -> Explanation:
        """Return the maps of one face.

        Args:
            image: uint8 [H, W] or [H, W, 1 or 3].
            target: index of the label that the maps are about; None: the most probable one.

        Raises:
            ModelError: the image, the target or the square is not of the right form.
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
    """The averages over the faces of one label.

    Attributes:
        label: its name.
        num_images: number of faces.
        num_correct: how many of them got that label.
        image: uint8 [H, W, 1], the average face, grey.
        maps: float64 [H, W] by the names of `Explanation.maps`.
        flips: float64 [H, W] in 0..1, the share of the faces in which some square over a pixel changes the answer;
            None without occlusion.
        halves: by map, the rank correlation of the averages of two halves of the faces: near 1, and other faces of
            the label would give this map again; None where a half has no face or a map is flat.
    """

    label: str
    num_images: int
    num_correct: int
    image: np.ndarray
    maps: dict[str, np.ndarray]
    flips: np.ndarray | None
    halves: dict[str, float | None]


class MapAverage:
    """Adds up the maps of the faces of one label; memory does not grow with their number.

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
        """Add a face, uint8 [H, W, C], all of one size, and its maps."""
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
        """Return the averages; at least one face was added."""
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
    """Return Spearman's rank correlation of two maps of one shape, in -1..1; None where one of them is flat."""
    ranks = [compute_midranks(np.asarray(values, np.float64).ravel()) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else None
