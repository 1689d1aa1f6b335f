"""Shared code of all figures: their style, and PNG files that contain caption, alternative text and banner.

`draw_*` returns a matplotlib figure; `write_figure` saves it as a PNG with its caption and alternative text in
the metadata. Colours are those of Okabe and Ito, which colour-blind readers can distinguish; curves also differ
by line style and marker. Matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dlfer.errors import ModelError
from dlfer.runs.files import write_atomically
from dlfer.runs.text import escape_text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito, Color Universal Design (2008), without yellow, which is hard to see on white."""

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (2, 1)))
"""Line styles that distinguish curves where colours cannot be seen, as in a greyscale print."""

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
    "text.parse_math": False,  # labels and file names may contain a $
}

DOTS_PER_INCH = 160
MAX_LABELS = 12
"""With more labels than this, figures do not name them all and tables have no column for each."""

_BANNER_INK, _BANNER_WASH, _BANNER_EDGE = "#8a3b00", "#fff4e5", "#e9a23b"
_BANNER_POINTS = 8.5


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches; use it within `figure_style()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def new_canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of the given size in inches, and axes that cover it, in inches from its upper left corner.

    It is meant for pages of many images: the layout of 24 axes, one for each image, takes ten times as long as drawing
    the images. Use it within `figure_style()`.
    """
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def place_image(axes: Axes, image: np.ndarray, *, left: float, top: float, side: float, **options) -> None:
    """Draw an image into a square on a canvas from `new_canvas`, centred and without changing its aspect ratio.

    Args:
        axes: of the canvas.
        image: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        left, top, side: of the square, in inches.
        options: keyword arguments of `Axes.imshow`, e.g. cmap.
    """
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image.repeat(3, axis=-1)
    height, width = (side * length / max(image.shape[:2]) for length in image.shape[:2])
    left, top = left + (side - width) / 2, top + (side - height) / 2
    extent = (left, left + width, top + height, top)
    axes.imshow(image, extent=extent, aspect="auto", **{"interpolation": "nearest", **options})


def figure_style():
    """Return the context manager that sets the style of all figures."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def write_figure(figure: Figure, path: Path, *, title: str, description: str) -> Path:
    """Save a figure as a PNG file, atomically; the same figure gives the same bytes.

    `title` is the caption and `description` the alternative text. The metadata contains both, "Kind": "chart" for a
    figure without photographs, whose colours a page may invert in dark mode, and "Legend" for names that are shown as
    numbers because no installed font has their characters.
    """
    buffer = io.BytesIO()
    metadata = {"Title": escape_text(title), "Description": escape_text(description), "Software": "dlfer"}
    if not _has_photographs(figure):
        metadata["Kind"] = "chart"
    with figure_style():
        # Fonts have no glyphs for control characters in labels and file names, or draw them invisibly.
        _change_texts(figure, partial(escape_text, keep="\n"))
        legend = _fit_fonts(figure)
        if legend:
            metadata["Legend"] = legend
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata=metadata)
    write_atomically(path, buffer.getvalue())
    return path


def _has_photographs(figure: Figure) -> bool:
    """Return whether a figure shows an image in its own colours, [H, W, 3 or 4], instead of through a colour map."""
    from matplotlib.image import AxesImage

    return any(image.get_array() is not None and image.get_array().ndim == 3 for image in figure.findobj(AxesImage))


def _change_texts(figure: Figure, change: Callable[[str], str]) -> None:
    """Apply `change` to each text of a figure, including its tick labels."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FuncFormatter):  # made by set_xticks and set_yticks with labels
                formatter.func = partial(_format_changed, formatter.func, change)
    for text in figure.findobj(Text):
        text.set_text(change(text.get_text()))


def _format_changed(form: Callable[[float, int], str], change: Callable[[str], str], value: float, place: int) -> str:
    return change(form(value, place))


_FONT = "DejaVu Sans"
"""Matplotlib's default font, which has Latin, Greek, Cyrillic, Arabic and mathematical characters."""


def _fit_fonts(figure: Figure) -> str:
    """Select installed fonts that have the characters of a figure, and replace names that no font has by numbers.

    Returns:
        The meaning of the numbers, a sentence; "" if there are none.
    """
    import matplotlib
    from matplotlib.text import Text

    texts = _list_texts(figure)
    wanted = {character for text in texts if not text.isascii() for character in text if _is_drawn(character)}
    lacking = {character for character in wanted if ord(character) not in _read_characters(_FONT)}
    if not lacking:
        return ""
    families, missing = _choose_fonts(frozenset(lacking))
    matplotlib.rcParams["font.family"] = [_FONT, *families]  # for texts that are created while the figure is drawn
    for text in figure.findobj(Text):
        text.set_fontfamily([_FONT, *families])
    if not missing:
        return ""
    pattern = _match_names(missing)
    names = dict.fromkeys(name for text in texts for name in pattern.findall(text))
    numbers = {name: f"[{number}]" for number, name in enumerate(names, 1)}
    _change_texts(figure, lambda text: pattern.sub(lambda found: numbers.get(found.group(), found.group()), text))
    meanings = ", ".join(f"{number} {name}" for name, number in numbers.items())
    return f"In the figure, since no font of the machine that drew it has these characters: {meanings}."


def _list_texts(figure: Figure) -> list[str]:
    """Return all texts of a figure, tick labels first."""
    from matplotlib.text import Text

    ticks = [
        label.get_text() for axes in figure.axes for axis in (axes.yaxis, axes.xaxis) for label in axis.get_ticklabels()
    ]
    return [*ticks, *(text.get_text() for text in figure.findobj(Text))]


def _is_drawn(character: str) -> bool:
    """Return whether a character needs a glyph: it is no space, control, format, surrogate or unassigned character."""
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn")


def _match_names(missing: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that matches words with any of the characters; several such words in a row are one name."""
    there = f"[{''.join(map(re.escape, sorted(missing)))}]"
    word = rf"(?:\w|{there})*{there}(?:\w|{there})*"
    return re.compile(f"{word}(?: {word})*")


@cache
def _read_characters(family: str) -> frozenset[int]:
    """Return the code points that a font family has glyphs for; none if matplotlib cannot draw with the font."""
    from matplotlib.ft2font import FaceFlags, FT2Font

    try:
        font = FT2Font(_list_families()[family])
        usable = FaceFlags.SCALABLE in font.face_flags and FaceFlags.COLOR not in font.face_flags
        # Last-resort fonts map every character to the picture of a box.
        return frozenset(font.get_charmap()) if usable and "resort" not in family.lower() else frozenset()
    except (ValueError, RuntimeError, OSError):
        return frozenset()


@cache
def _list_families() -> dict[str, str]:
    """Return the file of the regular font of each installed family, sans-serif families first."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):  # installed after matplotlib cached its list
        with contextlib.suppress(Exception):  # a broken font must not stop a figure that may not use it
            font_manager.fontManager.addfont(path)

    def rate(entry: font_manager.FontEntry) -> tuple:
        is_regular = (entry.style, entry.variant, entry.stretch) == ("normal", "normal", "normal")
        weight = font_manager.weight_dict.get(entry.weight, entry.weight)
        distance = abs(weight - 400) if isinstance(weight, int) else 400
        return not is_regular, distance, entry.fname

    files: dict[str, str] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=rate):
        files.setdefault(entry.name, entry.fname)
    return dict(sorted(files.items(), key=lambda item: ("Sans" not in item[0], "Mono" in item[0], item[0])))


@cache
def _choose_fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return font families that have the characters, few by greedy selection, and the characters that none has."""
    left, chosen = set(characters), []
    while left:
        counts = {family: sum(ord(one) in _read_characters(family) for one in left) for family in _list_families()}
        best = max(counts, key=counts.__getitem__, default=None)
        if best is None or not counts[best]:
            break
        chosen.append(best)
        left = {one for one in left if ord(one) not in _read_characters(best)}
    return tuple(chosen), frozenset(left)


def find_font(characters: Collection[str]) -> str | None:
    """Return the file of an installed font that has glyphs for all of the characters; None if there is none."""
    wanted = {ord(one) for one in characters if _is_drawn(one)}
    return next((file for family, file in _list_families().items() if wanted <= _read_characters(family)), None)


class NamedFigure(NamedTuple):
    """A figure with its name, its caption (`title`) and its alternative text (`description`)."""

    name: str
    figure: Figure
    title: str
    description: str


def write_figures(folder: Path, drawn: Iterable[NamedFigure]) -> list[Path]:
    """Save figures as <name>.png in a folder; return their paths."""
    return [
        write_figure(one.figure, folder / f"{one.name}.png", title=one.title, description=one.description)
        for one in drawn
    ]


def name_rows(axes: Axes, names: Sequence[str], *, below: float = 0.4) -> None:
    """Label the rows of a chart from the top, without grid lines; the axis ends 1 - `below` rows under the last."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - below, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def stamp_banner(folder: Path, names: Sequence[str], banner: str | None) -> None:
    """Add a run's warning `banner` at the top of each <name>.png in a folder, replacing an earlier banner.

    None removes the banner. A banner is known only once the run is evaluated, and another evaluation may change it, so
    it is added to figures that exist already.
    """
    for path in (folder / f"{name}.png" for name in names):
        if path.exists():
            contents = path.read_bytes()
            try:
                stamped = _add_banner(contents, banner)
            except (OSError, ValueError, SyntaxError) as error:
                raise describe_damaged_figure(path) from error
            if stamped != contents:
                write_atomically(path, stamped)


def describe_damaged_figure(path: Path) -> ModelError:
    """Return the error for a figure that cannot be read, with advice."""
    return ModelError(f"{path}: this figure cannot be read; delete it, and the page is written without it.")


def _add_banner(contents: bytes, banner: str | None) -> bytes:
    """Return a PNG with `banner` in a strip on top (none for None); its metadata contains the text and the height."""
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
    """Return the strip of a banner: text wrapped to the width, beside a bar as in the banners of the pages."""
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
