"""Figures of explanation maps, the page that shows them, and a figure of the preprocessing steps of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from dlfer.data.images import to_channels
from dlfer.explain.gradcam import FEWEST_CELLS
from dlfer.metrics.predictions import Predictions
from dlfer.model.backbones import find_backbone
from dlfer.model.classifier import NetworkClassifier
from dlfer.report.figures import COLOURS, INK, PALE, figure_style, new_canvas, new_figure, place_image, write_figure
from dlfer.report.page import load_figures, render_page
from dlfer.runs.text import count_noun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dlfer.explain.explanation import AverageMaps, Explanation
    from dlfer.explain.occlusion import Occlusion


OCCLUSION_NOTE = (
    "Occlusion: a square of {squares} in the face's mean grey slides over the face. Red: covering the region lowers "
    "the probability of {label}; blue: raises it. Orange: some square there changes the predicted label. The map "
    "shows what the model reacts to when it is hidden, not why. Covered faces differ from all training images, and "
    "regions with the same evidence show nothing when only one of them is covered."
)
GRADCAM_NOTE = (
    "Grad-CAM: the evidence for {label} in the feature map of {layers}, {grids} cells, interpolated and divided by "
    "its largest value. The map is no finer than these cells, and each cell depends on far more of the image than its own area. "
    "It leaves out evidence against the label and does not show the model's confidence."
)
COARSE_NOTE = (
    "So few cells cannot distinguish the eyes from the mouth; --feature-level selects an earlier, finer level."
)
NEITHER_NOTE = "A map shows neither what a person feels nor that the model is right."

_MAX_BARS = 12
_COLUMNS = 2
"""Panels in a row of a figure, so that its text is legible on a phone without scrolling sideways."""
_PLACES = (("upper", "middle", "lower"), ("left", "middle", "right"))
_ORANGE = (0.835, 0.369, 0.0)


def write_explanation(
    path: Path, image: np.ndarray, explanation: Explanation, *, labels: Sequence[str], name: str
) -> Path:
    """Write the figure (.png) of one face with its maps; the caption says how they are made and what they do not show.

    Args:
        image: uint8 [H, W, 1 or 3], the classifier's input.
        name: of the picture, for the caption.
    """
    answer, label = labels[explanation.predicted], labels[explanation.target]
    shares = explanation.probabilities
    about = "" if answer == label else f", of {label} {100 * shares[explanation.target]:.0f} %"
    title = f"{name}: predicted {answer}, {100 * shares.max():.0f} %{about}. Explained: {label}"
    return write_figure(
        draw_explanation(image, explanation, labels=labels, title=title),
        path,
        title=" ".join([f"{title}.", *describe_maps([explanation], label)]),
        description=_describe_numbers(title, explanation),
    )


def draw_explanation(image: np.ndarray, explanation: Explanation, *, labels: Sequence[str], title: str) -> Figure:
    """Draw a face (uint8 [H, W, 1 or 3]), its probabilities, and its maps laid over the face, below a title."""
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _show_face(axes, image, "the face"),
        lambda axes: _draw_bars(axes, explanation, labels),
    ]
    occlusion = explanation.occlusion
    if occlusion is not None:
        panels.append(lambda axes: show_sensitivity(axes, image, occlusion.sensitivity))
        panels.append(lambda axes: show_flips(axes, image, occlusion.flips.astype(float)))
    for cam in explanation.cams:
        heading = f"Grad-CAM {cam.network}".strip()
        panels.append(lambda axes, cam=cam, heading=heading: show_cam(axes, image, cam.scaled, heading))
    return _draw_panels(panels, title)


def draw_averages(averages: AverageMaps) -> Figure:
    """Draw the average face of a label, and the average maps laid over it."""
    image = averages.image
    panels: list[Callable[[Axes], None]] = [lambda axes: _show_face(axes, image, "average face")]
    for name, values in averages.maps.items():
        if name == "occlusion":
            panels.append(lambda axes, values=values: show_sensitivity(axes, image, values))
            if averages.flips is not None:
                panels.append(lambda axes: show_flips(axes, image, averages.flips))
        else:
            heading = name.replace("gradcam", "Grad-CAM")
            panels.append(lambda axes, values=values, heading=heading: show_cam(axes, image, values, heading))
    return _draw_panels(panels, describe_average(averages))


def write_averages(path: Path, averages: AverageMaps, *, note: str) -> Path:
    """Write the figure of one label's averages; `note` (how maps are made, what they do not show) ends its caption."""
    halves = "; ".join(
        f"{name}: the averages of two halves have the rank correlation {format_correlation(value)}"
        for name, value in averages.halves.items()
    )
    return write_figure(
        draw_averages(averages),
        path,
        title=f"{describe_average(averages)}. {halves}. {note}",
        description=f"{describe_average(averages)}. {halves}. "
        + " ".join(f"{name}: {describe_place(values)}." for name, values in averages.maps.items()),
    )


def describe_average(averages: AverageMaps) -> str:
    """Return a phrase with the label, the number of its faces, and how many of them were predicted correctly."""
    return f"{averages.label}: mean of {averages.num_images:,} faces, {averages.num_correct:,} of them predicted so"


def describe_maps(explanations: Sequence[Explanation], label: str | None) -> list[str]:
    """Return a text for each method on how the maps of faces are made, and one on what they do not show.

    Args:
        explanations: of the faces, from one explainer.
        label: the label that the maps explain; None: each face's own.
    """
    label, texts = "its label" if label is None else f"“{label}”", []
    squares = dict.fromkeys(
        f"{one.occlusion.size}x{one.occlusion.size} pixels in steps of {one.occlusion.stride}"
        for one in explanations
        if one.occlusion is not None
    )
    if squares:
        texts.append(OCCLUSION_NOTE.format(label=label, squares=" or ".join(squares)))
    cams = explanations[0].cams
    if cams:
        layers = ", ".join(dict.fromkeys(cam.layer for cam in cams))
        grids = ", ".join(dict.fromkeys(f"{cam.grid[1]}x{cam.grid[0]}" for cam in cams))
        coarse = f" {COARSE_NOTE}" if min(min(cam.grid) for cam in cams) < FEWEST_CELLS else ""
        texts.append(GRADCAM_NOTE.format(label=label, layers=layers, grids=grids) + coarse)
    return [*texts, NEITHER_NOTE]


def describe_place(values: np.ndarray) -> str:
    """Return in words where a map [H, W] has its maximum, e.g. "greatest in the lower middle"."""
    if float(values.max()) <= 0:
        return "nowhere above 0"
    # The mean position of all pixels with the maximum, because an occluding square leaves plateaus.
    places = np.argwhere(values == values.max()).mean(axis=0) / values.shape
    down, across = (names[min(2, int(3 * place))] for names, place in zip(_PLACES, places, strict=True))
    return "greatest in the middle" if down == across else f"greatest in the {down} {across}"


def format_correlation(value: float | None) -> str:
    """Format a rank correlation: "0.83", or "none" for None, if a map is constant."""
    # Adding 0.0 turns -0.0 into 0.0.
    return "none" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def show_sensitivity(axes: Axes, image: np.ndarray, sensitivity: np.ndarray) -> None:
    """Overlay the drop of the probability (float [H, W], -1..1) on a face, with colours symmetric around zero."""
    most = 100 * max(float(np.abs(sensitivity).max()), 0.01)
    _show_face(axes, image, "fall if covered", dimmed=True)
    shown = axes.imshow(100 * sensitivity, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.65)
    _add_bar(axes, shown, "percentage points")


def show_flips(axes: Axes, image: np.ndarray, flips: np.ndarray) -> None:
    """Overlay orange on a face by how often (float [H, W], 0..1) squares change the label, relative to the maximum."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    _show_face(axes, image, "answer changes", dimmed=True)
    wash = np.zeros((*flips.shape, 4))
    wash[..., :3], wash[..., 3] = _ORANGE, 0.75 * flips / max(float(flips.max()), 0.01)
    axes.imshow(wash)
    if set(np.unique(flips)) <= {0.0, 1.0}:
        share = f"{100 * flips.mean():.0f} % of the image"
        axes.legend(
            handles=[Patch(color=(*_ORANGE, 0.75), label=share)],
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            fontsize=8,
        )
        return
    scale = LinearSegmentedColormap.from_list("orange", [(0.9, 0.9, 0.9), _ORANGE])
    mappable = ScalarMappable(cmap=scale)
    most = max(float(flips.max()), 0.01)
    mappable.set_clim(0, 100 * most)
    _add_bar(axes, mappable, "% of faces")


def show_cam(axes: Axes, image: np.ndarray, values: np.ndarray, heading: str) -> None:
    """Overlay Grad-CAM, or an average of it (float [H, W] in 0..1), on a face."""
    _show_face(axes, image, "\n".join(textwrap.wrap(heading, 20)), dimmed=True)
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(float(values.max()), 0.01), alpha=0.6)
    _add_bar(axes, shown, "of its greatest")


def _draw_panels(panels: Sequence[Callable[[Axes], None]], title: str) -> Figure:
    columns = min(_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    width = 2.1 * columns + 0.4
    with figure_style():
        figure = new_figure(width, 2.5 * num_rows + 0.55)
        figure.get_layout_engine().set(h_pad=0.08)
        grid = figure.subplots(num_rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, draw in zip(grid, panels, strict=False):
            draw(axes)
        figure.suptitle(
            "\n".join(textwrap.wrap(title, int(width * 10))), x=0.01, ha="left", fontsize=10.5, fontweight="bold"
        )
    return figure


def _draw_bars(axes: Axes, explanation: Explanation, labels: Sequence[str]) -> None:
    """Draw the probabilities of at most 12 labels as bars, the largest on top."""
    rows = np.argsort(-explanation.probabilities, kind="stable")[:_MAX_BARS]
    shares = 100 * explanation.probabilities[rows]
    colours = [COLOURS[0] if row == explanation.target else PALE for row in rows]
    axes.barh(range(len(rows)), shares, color=colours, height=0.7)
    axes.set_yticks(range(len(rows)), [labels[row] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 128)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for place, share in enumerate(shares):
        axes.text(share + 2, place, f"{share:.0f} %", va="center", fontsize=8, color=INK)
    _head(axes, "probability (blue: explained)")


def _show_face(axes: Axes, image: np.ndarray, heading: str, *, dimmed: bool = False) -> None:
    show_image(axes, image, dimmed=dimmed)
    _head(axes, heading)


def show_image(axes: Axes, image: np.ndarray, *, dimmed: bool = False) -> None:
    """Show an image (uint8 [H, W, 1 or 3]) without axes; `dimmed` makes it the background of a map."""
    colour = image.repeat(3, axis=-1) if image.shape[-1] == 1 else image
    axes.imshow((colour // 2 + 110).astype(np.uint8) if dimmed else colour, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _head(axes: Axes, heading: str) -> None:
    axes.set_title(heading, fontsize=8.5, fontweight="normal", loc="center", pad=4)


def _add_bar(axes: Axes, shown: Any, label: str) -> None:
    bar = axes.figure.colorbar(shown, ax=axes, orientation="horizontal", shrink=0.85, pad=0.03, aspect=16)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label(label, fontsize=8)


def _describe_numbers(title: str, explanation: Explanation) -> str:
    texts = [title]
    occlusion = explanation.occlusion
    if occlusion is not None:
        texts.append(
            f"Covering a square lowers the probability by up to {count_noun(round(100 * occlusion.sensitivity.max()), 'percentage point')} on average, "
            f"{describe_place(occlusion.sensitivity)}, and changes the answer on {100 * occlusion.flips.mean():.0f} % of the image"
        )
    texts += [f"Grad-CAM {cam.network} is {describe_place(cam.values)}".replace("  ", " ") for cam in explanation.cams]
    return ". ".join(texts) + "."


UNCHANGED = 0.5
"""Mean rank correlation before and after re-initialisation above which a map hardly depends on the weights."""


def write_explanation_report(folder: Path, names: Sequence[str], context: Mapping[str, Any]) -> Path:
    """Write index.html with the figures of a folder; return its path.

    Args:
        folder: contains `<name>.png` for each of the names.
        names: of the figures, in order.
        context: "title", "subtitle", "notice", "reading" and "failed" (texts), "sanity" (from `list_sanity_rows`, or
            empty) and "verdicts" (from `describe_sanity`).
    """
    figures = load_figures(Path(folder), names)
    return render_page("explain.html.j2", Path(folder) / "index.html", {**context, "figures": figures, "names": names})


def list_sanity_rows(sanity: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """Return the table rows for a result of `check_maps`: what was compared, the map, and the rank correlations."""
    words = {
        "head": "head re-initialised",
        "all": "all weights re-initialised",
        "other_face": "other face, same weights",
    }
    rows = []
    for part, maps in sanity.items():
        for name, found in maps.items():
            if not found["n"]:
                continue
            ends = (
                ""
                if found["mean"] is None
                else f"{format_correlation(found['low'])} to {format_correlation(found['high'])}"
            )
            flat = f", {found['flat']} flat" if found["flat"] else ""
            rows.append(
                {
                    "what": words[part],
                    "map": name,
                    "mean": format_correlation(found["mean"]),
                    "range": ends,
                    "n": f"{found['n']}{flat}",
                }
            )
    return rows


def describe_sanity(sanity: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each map on whether it depends on the learned weights and on the face."""
    texts = []
    for name, found in sanity["all"].items():
        mean, n = found["mean"], found["n"] - found["flat"]
        if mean is None:
            texts.append(
                f"{name}: no verdict; with re-initialised weights the map is flat for all of {found['n']} faces."
            )
            continue
        depends = abs(mean) <= UNCHANGED
        text = (
            f"{name}: with all weights re-initialised the rank correlation between the maps before and after is "
            f"{format_correlation(mean)} on average (n = {n}, {format_correlation(found['low'])} to "
            f"{format_correlation(found['high'])}): it {'depends on' if depends else 'hardly depends on'} what was learned"
        )
        alike = sanity["other_face"][name]["mean"]
        if alike is not None and alike > UNCHANGED:
            text += (
                f"; but the maps of different faces are similar, too ({format_correlation(alike)}): the map says little about a "
                "single face"
            )
        texts.append(f"{text}.")
    return texts


@dataclass(frozen=True)
class Preparation:
    """The preprocessing steps and feature maps of N images.

    Attributes:
        resized: uint8 [N, S, S, C], at the network's input size.
        grey: uint8 [N, S, S].
        binary: bool [N, S, S], brighter than Otsu's threshold; for comparison only, it is not given to the network.
        features: (title, float32 [N, h, w]) of feature maps, the mean absolute values over all channels.
    """

    resized: np.ndarray
    grey: np.ndarray
    binary: np.ndarray
    features: tuple[tuple[str, np.ndarray], ...]


def compute_preparation(classifier: NetworkClassifier, images: np.ndarray) -> Preparation:
    """Return the preprocessing steps of uint8 images [N, H, W, channels], and their feature maps in a network."""
    face_input = classifier.parts.face_input
    resized = keras.ops.convert_to_numpy(face_input.resize(images)).round().clip(0, 255).astype(np.uint8)
    grey = np.stack([to_channels(image, 1)[..., 0] for image in resized])
    binary = np.stack([image > compute_otsu_threshold(image) for image in grey])
    return Preparation(resized, grey, binary, tuple(_compute_features(classifier, images)))


def compute_otsu_threshold(grey: np.ndarray) -> int:
    """Return Otsu's threshold of uint8 [H, W]: pixels up to this grey level are dark, the others bright.

    It maximises the variance between the two classes; if several levels do, it is the lowest.

    Source: Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Trans. SMC 9 (1979) 62.
    """
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    dark = np.cumsum(shares)
    mean = np.cumsum(shares * np.arange(256))
    spread = dark * (1 - dark)
    between = np.divide((mean[-1] * dark - mean) ** 2, spread, out=np.zeros(256), where=spread > 1e-12)
    return int(between.argmax())


def _compute_features(classifier: NetworkClassifier, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return titles and mean absolute values of the first and last feature map of the backbone or of each branch."""
    parts, config = classifier.parts, classifier.config
    found = []
    for branch, name, network, prepared in _list_networks(classifier, parts.face_input(images)):
        # The map of the first feature level, at full or half resolution, and the final map of the backbone.
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
    """Return (layer prefix, name of the backbone, network, its input) for the one network or for each branch."""
    backbone, config = classifier.parts.backbone, classifier.config
    if not config.branches:
        return [("", config.backbone, backbone, pixels)]
    return [
        (branch, name, backbone.get_layer(branch), backbone.get_layer(f"{branch}_input")(pixels))
        for branch, name in config.name_branches().items()
    ]


MAX_EXAMPLES = 7


def choose_examples(predictions: Predictions, *, limit: int = MAX_EXAMPLES) -> np.ndarray:
    """Return int [<=limit] rows: the first image of each label, in the order of the labels, right or wrong.

    The first image is taken instead of the best one, so that the figures do not flatter the model.
    """
    firsts = [np.flatnonzero(predictions.targets == target)[:1] for target in range(len(predictions.labels))]
    return np.concatenate([np.zeros(0, np.int64), *firsts])[:limit].astype(np.int64)


def draw_occlusion(images: np.ndarray, occlusions: Sequence[Occlusion], captions: Sequence[str]) -> Figure:
    """Draw each image (uint8 [N, H, W, 1 or 3]), its sensitivity map, and the pixels that flip the prediction.

    All maps share one colour scale, symmetric around zero. There is one occlusion and one caption for each image.
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
    """Write occlusion.png; return None if there are no images.

    `images` are uint8 [M, H, W, C], one per `rows` (int [M]) of the predictions; `occlusions` explain the targets.
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
            f"lowers that by up to {count_noun(round(100 * occlusion.sensitivity.max()), 'percentage point')} on average and changes "
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
    """Draw a row for each image: as stored, resized, grey, binary, and its feature maps."""
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
    """Write preprocessing.png with images (uint8 [M, H, W, C]), their preprocessing steps and labels (`names`)."""
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
