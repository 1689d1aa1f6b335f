"""What every report page shares: the templates, how numbers are written, and how figures are embedded."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlfer.errors import ModelError
from dlfer.runs.files import parse_json, write_atomically
from dlfer.runs.metrics_record import Estimate

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, path: Path, context: dict[str, Any]) -> Path:
    """Render a template of this package with `context` into the file `path`, and return the path."""
    write_atomically(path, render_text(template, context))
    return path


def render_text(template: str, context: dict[str, Any]) -> str:
    """Return what a template of this package gives with `context`; in HTML, not in Markdown, values are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "count": format_count,
        "interval": format_interval,
        "uncertainty": format_uncertainty,
        "fraction": format_fraction,
        "duration": format_duration,
    }
    return environment.get_template(template).render(context)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file of a run; None where there is none.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}). The run is damaged; run the experiment again.") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a csv file of a run as dicts of text; empty where there is none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def load_figures(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Return figures ready to stand in a page: {name: {"uri", "title", "description", "width"}, or None if absent}.

    Args:
        folder: the run's figures.
        names: file names without .png.

    Returns:
        uri: the image itself, base64. width: in CSS pixels at 96 dots per inch.
    """
    from PIL import Image

    figures: dict[str, dict[str, Any] | None] = dict.fromkeys(names)
    for name in names:
        path = folder / f"{name}.png"
        if not path.exists():
            continue
        with Image.open(path) as image:
            text, width, dpi = image.info, image.width, image.info.get("dpi", (96, 96))[0]
        figures[name] = {
            "uri": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
            "title": text.get("Title", name),
            "description": text.get("Description", text.get("Title", name)),
            "width": round(width / dpi * 96),
        }
    return figures


def is_missing(value: float | None) -> bool:
    """Tell whether a figure is undefined: null in JSON."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as percent: 0.7031 -> "70.3 %"."""
    return "–" if is_missing(value) else f"{100 * value:.{digits}f} %"


def format_fraction(value: float | None, digits: int = 3) -> str:
    """Write a number with so many digits."""
    return "–" if is_missing(value) else f"{value:.{digits}f}"


def format_count(value: float | None) -> str:
    """Write a whole number in groups of three: 3589 -> "3,589"."""
    return "–" if is_missing(value) else f"{value:,.0f}"


def format_interval(estimate: Estimate | Sequence[float | None], scale: str = "percent") -> str:
    """Write the interval of an estimate, or (low, high): "68.8 to 71.8"; "" if undefined."""
    low, high = (estimate.low, estimate.high) if isinstance(estimate, Estimate) else estimate
    if is_missing(low) or is_missing(high):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}" if scale == "percent" else f"{low:.3f} to {high:.3f}"


def format_uncertainty(figure: dict[str, Any] | Sequence[float | None], scale: str = "percent") -> str:
    """Write the interval of a figure, or why it has none: "95 % 68.8 to 71.8", "no 95 % interval: only one image"."""
    interval = format_interval(figure, scale)
    if interval:
        return f"95 % {interval}"
    reason = figure.get("reason") if isinstance(figure, dict) else None
    return f"no 95 % interval: {reason}" if reason else "no 95 % interval"


def format_duration(seconds: float | None) -> str:
    """Write a time in the two largest units that matter: "4.2 s", "18 min 05 s", "3 h 07 min"."""
    if is_missing(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
