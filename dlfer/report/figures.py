"""What all figures share: their style, and the PNG files that carry caption, description and banner.

`draw_*` returns a matplotlib figure; `write_figure` saves it as a PNG that carries its own caption and
its description for readers who do not see it. Colours are those of Okabe and Ito, which colour-blind
readers distinguish; curves differ by line and marker, too. Matplotlib is imported when the first figure
is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dlfer.runs.files import write_atomically
from dlfer.runs.text import escape_text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito, Color Universal Design (2008); the yellow is left out, since it vanishes on white."""

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (2, 1)))
"""Line styles that stand for the colours where there are none, as on a grey print."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

HATCHES = ("", "//", "..", "xx", "--", "oo", "++")

INK, SOFT, PALE = "#1c2430", "#5f6b76", "#b4bcc4"

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "text.color": INK,
    "xtick.color": "#3f4a55",
    "ytick.color": "#3f4a55",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a label or a file may hold a $
}

DOTS_PER_INCH = 160
MOST_LABELS = 12
"""With more labels than this, figures do not name them all and tables have no column for each."""

_BANNER_INK, _BANNER_WASH, _BANNER_EDGE = "#8a3b00", "#fff4e5", "#e9a23b"
_BANNER_POINTS = 8.5


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; use it within `figure_style()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def new_canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches and axes that cover it, in inches from its upper left corner.

    For pages of many images: the layout of 24 axes, one for each image, takes ten times as long as drawing them.
    Use it within `figure_style()`.
    """
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def place_image(axes: Axes, image: np.ndarray, *, left: float, top: float, side: float, **options) -> None:
    """Draw an image into a square of a canvas from `new_canvas`, centred, with its own proportions.

    Args:
        axes: of the canvas.
        image: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        left, top, side: of the square, in inches.
        options: of `Axes.imshow`, e.g. cmap.
    """
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image.repeat(3, axis=-1)
    height, width = (side * length / max(image.shape[:2]) for length in image.shape[:2])
    left, top = left + (side - width) / 2, top + (side - height) / 2
    extent = (left, left + width, top + height, top)
    axes.imshow(image, extent=extent, aspect="auto", **{"interpolation": "nearest", **options})


def figure_style():
    """Return the context in which figures are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def write_figure(figure: Figure, path: Path, *, title: str, description: str) -> Path:
    """Save `figure` as PNG under a temporary name first; the same figure gives the same bytes.

    The title is the caption; the description is what a reader who does not see the figure needs to know. Both are kept
    in the file.
    """
    buffer = io.BytesIO()
    metadata = {"Title": escape_text(title), "Description": escape_text(description), "Software": "dlfer"}
    with figure_style():
        _escape_names(figure)
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata=metadata)
    write_atomically(path, buffer.getvalue())
    return path


def _escape_names(figure: Figure) -> None:
    """Show control characters in labels and file names escaped; fonts have no glyphs for them, or draw them invisibly."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FuncFormatter):  # that of set_xticks and set_yticks with labels
                formatter.func = partial(_format_escaped, formatter.func)
    for text in figure.findobj(Text):
        text.set_text(escape_text(text.get_text(), keep="\n"))


def _format_escaped(form: Callable[[float, int], str], value: float, place: int) -> str:
    return escape_text(form(value, place), keep="\n")


class Drawn(NamedTuple):
    """A figure with its name, caption, and description for readers who do not see it."""

    name: str
    figure: Figure
    title: str
    description: str


def write_figures(folder: Path, drawn: Iterable[Drawn]) -> list[Path]:
    """Save figures as <name>.png in a folder; return the paths."""
    return [
        write_figure(one.figure, folder / f"{one.name}.png", title=one.title, description=one.description)
        for one in drawn
    ]


def name_rows(axes: Axes, names: Sequence[str], *, below: float = 0.4) -> None:
    """Name the rows of a figure from the top, with so much room below the last one and no lines between them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - below, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def stamp_banner(folder: Path, names: Sequence[str], banner: str | None) -> None:
    """Draw `banner`, the warning that every output of a run carries, above each <name>.png that is in a folder.

    It takes the place of an earlier one, and None takes that away: a run's banner is known only when the run is judged,
    and changes if it is judged again.
    """
    for path in (folder / f"{name}.png" for name in names):
        if path.exists():
            contents = path.read_bytes()
            stamped = _stamp(contents, banner)
            if stamped != contents:
                write_atomically(path, stamped)


def _stamp(contents: bytes, banner: str | None) -> bytes:
    """Return a PNG with `banner` in a strip on top; the text and the strip's height are kept in the file."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(io.BytesIO(contents)) as image:
        text, dpi = dict(image.text), image.info.get("dpi", (DOTS_PER_INCH, DOTS_PER_INCH))
        if text.get("Banner") == banner:
            return contents
        bare = image.convert("RGB").crop((0, int(text.pop("Banner height", 0)), image.width, image.height))
    text.pop("Banner", None)
    whole = bare
    if banner is not None:
        strip = _draw_banner(banner, bare.width, dpi[0])
        whole = Image.new("RGB", (bare.width, strip.height + bare.height))
        whole.paste(strip, (0, 0))
        whole.paste(bare, (0, strip.height))
        text |= {"Banner": banner, "Banner height": str(strip.height)}
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    whole.save(buffer, format="png", pnginfo=info, dpi=dpi)
    return buffer.getvalue()


def _draw_banner(banner: str, width: int, dpi: float) -> Image:
    """Return the strip: the text in as many lines as the width asks for, beside a bar of the page's banners."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    size = round(_BANNER_POINTS * dpi / 72)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size)
    bar, pad = size // 2, round(0.7 * size)
    lines = [""]
    for word in banner.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - bar - 2 * pad:
            lines.append(word)
        else:
            lines[-1] = longer
    step = round(1.35 * size)
    height = 2 * pad + step * len(lines)
    strip = Image.new("RGB", (width, height + size // 2), "white")
    draw = ImageDraw.Draw(strip)
    draw.rectangle((0, 0, width, height - 1), fill=_BANNER_WASH)
    draw.rectangle((0, 0, bar - 1, height - 1), fill=_BANNER_EDGE)
    for number, line in enumerate(lines):
        draw.text((bar + pad, pad + number * step), line, font=font, fill=_BANNER_INK)
    return strip
