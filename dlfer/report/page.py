"""What all report pages share: the templates, how numbers are written, and how figures are embedded."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlfer.errors import ModelError
from dlfer.runs.files import parse_json, write_atomically
from dlfer.runs.metrics_record import Estimate
from dlfer.runs.wording import format_duration, is_missing

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


class EmbeddedFigure(NamedTuple):
    """A figure ready to be placed in a page.

    Attributes:
        uri: the image itself, base64.
        title: the caption.
        description: for readers who do not see the figure.
        width: in CSS pixels at 96 dots per inch.
    """

    uri: str
    title: str
    description: str
    width: int


def load_figures(folder: Path, names: Sequence[str]) -> dict[str, EmbeddedFigure | None]:
    """Return figures by name, ready to be placed in a page; None for one that is absent.

    Args:
        folder: the run's figures.
        names: file names without .png.
    """
    from PIL import Image

    figures: dict[str, EmbeddedFigure | None] = dict.fromkeys(names)
    for name in names:
        path = folder / f"{name}.png"
        if not path.exists():
            continue
        with Image.open(path) as image:
            text, width, dpi = image.info, image.width, image.info.get("dpi", (96, 96))[0]
        title = text.get("Title", name)
        figures[name] = EmbeddedFigure(
            uri=f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
            title=title,
            description=text.get("Description", title),
            width=round(width / dpi * 96),
        )
    return figures


def format_percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as percent: 0.7031 -> "70.3 %"."""
    return "–" if is_missing(value) else f"{100 * value:.{digits}f} %"


def format_fraction(value: float | None, digits: int = 3) -> str:
    """Write a number with so many digits after the point."""
    return "–" if is_missing(value) else f"{value:.{digits}f}"


def format_count(value: float | None) -> str:
    """Write a whole number in groups of three digits: 3589 -> "3,589"."""
    return "–" if is_missing(value) else f"{value:,.0f}"


def format_interval(estimate: Estimate | Sequence[float | None], scale: str = "percent") -> str:
    """Write the interval of an estimate, or (low, high): "68.8 to 71.8"; "" if undefined."""
    low, high = (estimate.low, estimate.high) if isinstance(estimate, Estimate) else estimate
    if is_missing(low) or is_missing(high):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}" if scale == "percent" else f"{low:.3f} to {high:.3f}"


def format_uncertainty(estimate: Estimate | Sequence[float | None], scale: str = "percent") -> str:
    """Write an interval, or why there is none: "95 % 68.8 to 71.8", "no 95 % interval: only one image"."""
    interval = format_interval(estimate, scale)
    if interval:
        return f"95 % {interval}"
    reason = getattr(estimate, "reason", None)
    return f"no 95 % interval: {reason}" if reason else "no 95 % interval"
