"""The figures of a run's report that show occlusion maps, and what becomes of an image on its way into the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np

from dlfer.data.images import to_channels
from dlfer.explain.figures import show_image
from dlfer.metrics.predictions import Predictions
from dlfer.model.backbones import find_backbone
from dlfer.model.classifier import NetworkClassifier
from dlfer.report.figures import figure_style, new_canvas, new_figure, place_image, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlfer.explain.occlusion import Occlusion


@dataclass(frozen=True)
class Preparation:
    """The stations of N images.

    Attributes:
        resized: uint8 [N, S, S, C], at the size that the network sees.
        grey: uint8 [N, S, S].
        binary: bool [N, S, S], brighter than Otsu's threshold; shown for comparison, no network is given it.
        features: (what it is, float32 [N, h, w]) of feature maps, the mean of the magnitudes over all channels.
    """

    resized: np.ndarray
    grey: np.ndarray
    binary: np.ndarray
    features: tuple[tuple[str, np.ndarray], ...]


def compute_preparation(classifier: NetworkClassifier, images: np.ndarray) -> Preparation:
    """Return what becomes of uint8 images [N, H, W, channels] before and in a classifier's network."""
    face_input = classifier.parts.face_input
    resized = keras.ops.convert_to_numpy(face_input.resize(images)).round().clip(0, 255).astype(np.uint8)
    grey = np.stack([to_channels(image, 1)[..., 0] for image in resized])
    binary = np.stack([image > compute_otsu_threshold(image) for image in grey])
    return Preparation(resized, grey, binary, tuple(_compute_features(classifier, images)))


def compute_otsu_threshold(grey: np.ndarray) -> int:
    """Return the grey level that divides the pixels of uint8 [H, W] best into dark (up to it) and bright ones.

    Best is what leaves the greatest variance between the two; the lowest such level if several do.

    Source: Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Trans. SMC 9 (1979) 62.
    """
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    dark = np.cumsum(shares)
    mean = np.cumsum(shares * np.arange(256))
    spread = dark * (1 - dark)
    between = np.divide((mean[-1] * dark - mean) ** 2, spread, out=np.zeros(256), where=spread > 1e-12)
    return int(between.argmax())


def _compute_features(classifier: NetworkClassifier, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the first and the last feature map of the backbone, or of each branch."""
    parts, config = classifier.parts, classifier.config
    found = []
    for branch, name, network, prepared in _list_networks(classifier, parts.face_input(images)):
        # The first map in half the resolution or full, and the one that is pooled.
        first = network.get_layer(
            f"{branch}_{find_backbone(name).stages[0]}" if branch else find_backbone(name).stages[0]
        )
        maps = keras.Model(network.inputs, [first.output, network.outputs[0]])(prepared, training=False)
        for which, values in zip(("first", "last"), maps, strict=True):
            title = f"{name} {which}" if config.branches else f"{which} features"
            magnitudes = keras.ops.mean(keras.ops.abs(keras.ops.cast(values, "float32")), axis=-1)
            found.append((title, keras.ops.convert_to_numpy(magnitudes)))
    return found


def _list_networks(classifier: NetworkClassifier, pixels):
    """Return (prefix of its layers, backbone, network, its input) of the one network or of each branch."""
    backbone, config = classifier.parts.backbone, classifier.config
    if not config.branches:
        return [("", config.backbone, backbone, pixels)]
    return [
        (branch, name, backbone.get_layer(branch), backbone.get_layer(f"{branch}_input")(pixels))
        for branch, name in config.name_branches().items()
    ]


MOST_EXAMPLES = 7


def choose_examples(predictions: Predictions, *, limit: int = MOST_EXAMPLES) -> np.ndarray:
    """Return int [<=limit] rows: the first image of each label, in the order of the labels, right or wrong.

    The first and not the best, so that the figures flatter nobody.
    """
    firsts = [np.flatnonzero(predictions.targets == target)[:1] for target in range(len(predictions.labels))]
    return np.concatenate([np.zeros(0, np.int64), *firsts])[:limit].astype(np.int64)


def draw_occlusion(images: np.ndarray, occlusions: Sequence[Occlusion], captions: Sequence[str]) -> Figure:
    """Draw for each image (uint8 [N, H, W, 1 or 3]) itself, the sensitivity laid over it, and what flips the answer.

    All maps have one scale, symmetric around zero. Occlusions and captions are one for each image.
    """
    most = max(max(float(np.abs(occlusion.sensitivity).max()) for occlusion in occlusions), 0.01)
    rows = ("image", "fall of the\nprobability", "answer\nflips")
    with figure_style():
        figure = new_figure(1.25 * max(len(images), 3) + 1.4, 4.7)
        grid = figure.subplots(3, len(images), squeeze=False)
        for column, (image, occlusion, caption) in enumerate(zip(images, occlusions, captions, strict=True)):
            for row in range(3):
                show_image(grid[row, column], image, dimmed=row > 0)
            height, width = image.shape[:2]
            shown = grid[1, column].imshow(
                100 * occlusion.sensitivity, cmap="RdBu_r", vmin=-100 * most, vmax=100 * most, alpha=0.65
            )
            wash = np.zeros((height, width, 4))
            wash[occlusion.flips] = (0.835, 0.369, 0.0, 0.6)
            grid[2, column].imshow(wash)
            grid[0, column].set_title(caption, fontsize=8, fontweight="normal", loc="center", pad=3)
        for row, text in enumerate(rows):
            grid[row, 0].set_ylabel(text, fontsize=9)
        bar = figure.colorbar(shown, ax=grid[1, :].tolist(), shrink=0.9, label="percentage points", pad=0.01)
        bar.outline.set_visible(False)
    return figure


def write_occlusion_page(
    folder: Path, images: np.ndarray, occlusions: Sequence[Occlusion], *, predictions: Predictions, rows: np.ndarray
) -> Path | None:
    """Write occlusion.png; nothing if there are no images.

    images are uint8 [M, H, W, C] of `rows` (int [M]) of the predictions, with an occlusion of its target for each.
    """
    if not len(rows):
        return None
    labels, first = predictions.labels, occlusions[0]
    captions, texts = [], []
    for row, occlusion in zip(rows, occlusions, strict=True):
        target, answer = labels[predictions.targets[row]], labels[occlusion.predicted]
        captions.append(f"{target}\n→ {answer}")
        texts.append(
            f"{target} predicted as {answer}, {100 * occlusion.probability:.0f} % for {target}; covering a square "
            f"lowers that by up to {100 * occlusion.sensitivity.max():.0f} percentage points on average and changes "
            "the predicted label on "
            f"{100 * occlusion.flips.mean():.0f} % of the image"
        )
    return write_figure(
        draw_occlusion(images, occlusions, captions),
        Path(folder) / "occlusion.png",
        title=f"Occlusion: a square of {first.size}x{first.size} pixels in the image's mean grey slides over the first image "
        "of each label. Red: covering it lowers the probability of the true label; blue: raises it; orange: some "
        "square there changes the predicted label. The map shows what the model reacts to when it is hidden, not "
        "why; covered faces differ from all training images.",
        description=f"Occlusion maps of {len(rows)} images. {'. '.join(texts)}.",
    )


def draw_preparation(images: np.ndarray, preparation: Preparation, captions: Sequence[str]) -> Figure:
    """Draw a row for each image: as stored, resized, grey, black and white, and its feature maps."""
    columns = ["stored", "resized", "grey", "binary", *(title for title, _ in preparation.features)]
    step, top, left = 1.3, 0.45, 0.35
    with figure_style():
        figure, axes = new_canvas(left + step * len(columns), top + step * len(images))
        for column, title in enumerate(columns):
            centre = left + step * (column + 0.5)
            axes.text(centre, top - 0.07, title.replace(" ", "\n", 1), fontsize=8.5, ha="center", va="bottom")
        for row, caption in enumerate(captions):
            centre = top + step * (row + 0.5)
            axes.text(left - 0.07, centre, caption, fontsize=9, rotation=90, ha="right", va="center")
            shown = [
                images[row],
                preparation.resized[row],
                preparation.grey[row][..., None],
                preparation.binary[row][..., None].astype(np.uint8) * 255,
                *(maps[row] for _, maps in preparation.features),
            ]
            for column, image in enumerate(shown):
                place_image(axes, image, left=left + step * column, top=top + step * row, side=step - 0.07)
    return figure


def write_preparation_page(folder: Path, images: np.ndarray, preparation: Preparation, names: Sequence[str]) -> Path:
    """Write preprocessing.png of images (uint8 [M, H, W, C]), their stations, and the label of each."""
    stored, resized = images.shape[1:3], preparation.resized.shape[1:3]
    maps = "; ".join(f"{title}, {values.shape[2]}x{values.shape[1]}" for title, values in preparation.features)
    return write_figure(
        draw_preparation(images, preparation, names),
        Path(folder) / "preprocessing.png",
        title="Steps of the input: the image as stored (after data.faces, where that is set), resized, grey, "
        "binary (Otsu's threshold), and feature maps, the mean magnitude over their channels. The binary image is "
        "for comparison only: the network gets the resized image.",
        description=f"{len(names)} images of {', '.join(names)}: stored {stored[1]}x{stored[0]}, resized "
        f"{resized[1]}x{resized[0]}, grey, binary, and the feature maps {maps}.",
    )
