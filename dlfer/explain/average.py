"""The maps of many faces of one label, averaged: what a classifier looks at by and large."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlfer.data.images import to_channels
from dlfer.explain.explanation import Explanation
from dlfer.explain.sanity import compute_rank_correlation


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
