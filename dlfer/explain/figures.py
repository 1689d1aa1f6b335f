"""Figures of maps, and the page that shows them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.explain.gradcam import FEWEST_CELLS
from dlfer.report.figures import COLOURS, INK, PALE, figure_style, new_figure, write_figure
from dlfer.report.page import load_figures, render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dlfer.explain.explanation import AverageMaps, Explanation


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

_MOST_BARS = 12
_COLUMNS = 5
_PLACES = (("upper", "middle", "lower"), ("left", "middle", "right"))
_ORANGE = (0.835, 0.369, 0.0)


def write_explanation(
    path: Path, image: np.ndarray, explanation: Explanation, *, labels: Sequence[str], name: str
) -> Path:
    """Write the figure (.png) of one face with its maps; how they are made and what they do not show is in the file's caption.

    Args:
        image: uint8 [H, W, 1 or 3], as the classifier got it.
        name: of the picture.
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
    """Draw a face (uint8 [H, W, 1 or 3]), its probabilities, and its maps with the face beneath; the title stands above."""
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
    """Draw the average face of a label and the average maps over it."""
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
    """Write the figure of one label's averages; `note`, how the maps are made and what they do not show, is in its caption."""
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
    """Return what the averages are of, in words."""
    return f"{averages.label}: mean of {averages.num_images:,} faces, {averages.num_correct:,} of them predicted so"


def describe_maps(explanations: Sequence[Explanation], label: str | None) -> list[str]:
    """Return how the maps of faces are made, a text for each method, and what they do not show.

    Args:
        explanations: of the faces, made by one explainer.
        label: that the maps are of; None: each face's own.
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
    """Return in words where a map [H, W] is greatest: "greatest in the lower middle"."""
    if float(values.max()) <= 0:
        return "nowhere above 0"
    # The middle of all places that share the greatest value: an occluding square leaves plateaus.
    places = np.argwhere(values == values.max()).mean(axis=0) / values.shape
    down, across = (names[min(2, int(3 * place))] for names, place in zip(_PLACES, places, strict=True))
    return "greatest in the middle" if down == across else f"greatest in the {down} {across}"


def format_correlation(value: float | None) -> str:
    """Write a rank correlation: "0.83", or "none" where a map is flat."""
    # Adding 0 takes the sign off what is rounded to 0.
    return "none" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def show_sensitivity(axes: Axes, image: np.ndarray, sensitivity: np.ndarray) -> None:
    """Lay the fall of the probability (float [H, W], -1..1) over a face, on a scale symmetric around zero."""
    most = 100 * max(float(np.abs(sensitivity).max()), 0.01)
    _show_face(axes, image, "fall if covered", dimmed=True)
    shown = axes.imshow(100 * sensitivity, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.65)
    _add_bar(axes, shown, "percentage points")


def show_flips(axes: Axes, image: np.ndarray, flips: np.ndarray) -> None:
    """Wash a face orange by how often (float [H, W], 0..1; full colour at the most) some square over a pixel changes the answer."""
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
    """Lay Grad-CAM, or an average of it (float [H, W] in 0..1), over a face."""
    _show_face(axes, image, "\n".join(textwrap.wrap(heading, 20)), dimmed=True)
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(float(values.max()), 0.01), alpha=0.6)
    _add_bar(axes, shown, "of its greatest")


def _draw_panels(panels: Sequence[Callable[[Axes], None]], title: str) -> Figure:
    columns = min(_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    width = 2.1 * columns + 0.4
    with figure_style():
        figure = new_figure(width, 2.5 * num_rows + 0.55)
        grid = figure.subplots(num_rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, draw in zip(grid, panels, strict=False):
            draw(axes)
        figure.suptitle(
            "\n".join(textwrap.wrap(title, int(width * 11))), x=0.01, ha="left", fontsize=10.5, fontweight="bold"
        )
    return figure


def _draw_bars(axes: Axes, explanation: Explanation, labels: Sequence[str]) -> None:
    """Draw the probabilities, the greatest on top; of many labels the first alone."""
    rows = np.argsort(-explanation.probabilities, kind="stable")[:_MOST_BARS]
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
    """Show uint8 [H, W, 1 or 3] without axes; dimmed it is the background of a map."""
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
            f"Covering a square lowers the probability by up to {100 * occlusion.sensitivity.max():.0f} percentage points on average, "
            f"{describe_place(occlusion.sensitivity)}, and changes the answer on {100 * occlusion.flips.mean():.0f} % of the image"
        )
    texts += [f"Grad-CAM {cam.network} is {describe_place(cam.values)}".replace("  ", " ") for cam in explanation.cams]
    return ". ".join(texts) + "."


UNCHANGED = 0.5
"""A mean rank correlation above this between maps before and after means that they hardly depend on the weights."""


def write_explanation_report(folder: Path, names: Sequence[str], context: Mapping[str, Any]) -> Path:
    """Write index.html with the figures of a folder; return its path.

    Args:
        folder: holds `<name>.png` for each of the names.
        names: of the figures, in order.
        context: "title", "subtitle", "notice", "reading" and "failed" (texts), "sanity" (from `list_sanity_rows`, or
            empty) and "verdicts" (from `describe_sanity`).
    """
    figures = load_figures(Path(folder), names)
    return render_page("explain.html.j2", Path(folder) / "index.html", {**context, "figures": figures, "names": names})


def list_sanity_rows(sanity: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """Return the rows of the table of `check_maps`: what was compared, of which map, and the rank correlations."""
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
    """Return for each map, in words, whether it depends on what the network learned, and on the face."""
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
