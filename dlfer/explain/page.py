"""The page of `dlfer explain`: the figures, and whether maps show what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlfer.explain.figures import format_correlation
from dlfer.report.page import load_figures, render_page

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
        "head": "head drawn anew",
        "all": "all weights drawn anew",
        "other_face": "other face, same weights",
    }
    rows = []
    for part, maps in sanity.items():
        for name, found in maps.items():
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
            texts.append(f"{name}: no verdict; with new weights the map is flat in all of {found['n']} faces.")
            continue
        depends = abs(mean) <= UNCHANGED
        text = (
            f"{name}: with all weights drawn anew the rank correlation of the maps before and after is "
            f"{format_correlation(mean)} on average (n = {n}, {format_correlation(found['low'])} to "
            f"{format_correlation(found['high'])}): it {'depends on' if depends else 'hardly depends on'} what was learned"
        )
        alike = sanity["other_face"][name]["mean"]
        if alike is not None and alike > UNCHANGED:
            text += (
                f"; but the maps of different faces are alike, too ({format_correlation(alike)}): it says little of a "
                "single face"
            )
        texts.append(f"{text}.")
    return texts
