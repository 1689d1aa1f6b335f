"""Shared code of all report pages: templates, embedded figures, formatting of values, and facts of a run."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlfer.config.load import load_recorded_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.config.variations import shorten_axis
from dlfer.errors import ConfigError, ModelError, shorten
from dlfer.metrics.paired import format_points
from dlfer.report.figures import describe_damaged_figure
from dlfer.runs.files import parse_json, write_atomically
from dlfer.runs.member_rows import MEMBERS_FILE, read_member_rows
from dlfer.runs.metrics_record import CountedEstimate, Estimate, is_missing
from dlfer.runs.records import RunRecord
from dlfer.runs.run import CONFIG_FILE, format_duration
from dlfer.runs.text import escape_text, to_markdown, to_plain_markdown

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, path: Path, context: dict[str, Any]) -> Path:
    """Render a template of this package with `context` to the file `path`; return the path."""
    write_atomically(path, render_text(template, context))
    return path


def render_text(template: str, context: dict[str, Any]) -> str:
    """Return a template of this package rendered with `context`.

    HTML templates escape all values; Markdown templates use the filters `markdown` (a name) and `plain` (a sentence).
    Both show control and bidirectional formatting characters of values as escapes, e.g. \\x1b.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        finalize=_show_hidden,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "points": format_points,
        "p_value": format_p_value,
        "count": format_count,
        "interval": format_interval,
        "uncertainty": format_uncertainty,
        "fraction": format_fraction,
        "duration": format_duration,
        "markdown": to_markdown,
        "plain": to_plain_markdown,
    }
    return environment.get_template(template).render(context)


def _show_hidden(value: Any) -> Any:
    """Return text or `Markup` with control characters but newlines and tabs escaped; return other values unchanged."""
    return type(value)(escape_text(str(value), keep="\n\t")) if isinstance(value, str) else value


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the contents of a JSON file of a run; None if there is no file.

    Raises:
        ModelError: the file is not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(
            f"{path}: not JSON ({shorten(error, path)}). The run is damaged; run the experiment again."
        ) from error


class EmbeddedFigure(NamedTuple):
    """A figure encoded for an HTML page.

    Attributes:
        uri: the PNG as a base64 data URI.
        title: the caption.
        description: the alternative text.
        width: in CSS pixels at 96 dots per inch.
        is_chart: whether it has no photographs, so that its colours can be inverted in dark mode.
        legend: the meaning of numbers that replace names for which no font has the characters; "" if there are none.
    """

    uri: str
    title: str
    description: str
    width: int
    is_chart: bool = False
    legend: str = ""


def load_figures(folder: Path, names: Sequence[str]) -> dict[str, EmbeddedFigure | None]:
    """Return figures by name (without .png), encoded for a page; None for an absent file."""
    from PIL import Image

    figures: dict[str, EmbeddedFigure | None] = dict.fromkeys(names)
    for name in names:
        path = folder / f"{name}.png"
        if not path.exists():
            continue
        try:
            with Image.open(path) as image:
                text, width, dpi = image.info, image.width, image.info.get("dpi", (96, 96))[0]
        except (OSError, ValueError, SyntaxError) as error:
            raise describe_damaged_figure(path) from error
        title = text.get("Title", name)
        figures[name] = EmbeddedFigure(
            uri=f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
            title=title,
            description=text.get("Description", title),
            width=round(width / dpi * 96),
            is_chart=text.get("Kind") == "chart",
            legend=text.get("Legend", ""),
        )
    return figures


def format_percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction as percent: 0.7031 -> "70.3 %"; "–" if it is missing."""
    return "–" if is_missing(value) else f"{100 * value:.{digits}f} %"


def format_fraction(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` digits after the decimal point; "–" if it is missing."""
    return "–" if is_missing(value) else f"{value:.{digits}f}"


def format_p_value(value: float | None) -> str:
    """Format a p value with four digits after the decimal point: "0.0123", "< 0.0001"."""
    return "< 0.0001" if not is_missing(value) and value < 0.00005 else format_fraction(value, 4)


def format_count(value: float | None) -> str:
    """Format a number as an integer with thousands separators: 3589 -> "3,589"; "–" if it is missing."""
    return "–" if is_missing(value) else f"{value:,.0f}"


def format_interval(estimate: Estimate | Sequence[float | None], scale: str = "percent") -> str:
    """Format the interval of an estimate, or (low, high): "68.8 to 71.8"; "" if it is undefined."""
    low, high = (estimate.low, estimate.high) if isinstance(estimate, Estimate) else estimate
    if is_missing(low) or is_missing(high):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}" if scale == "percent" else f"{low:.3f} to {high:.3f}"


def format_uncertainty(estimate: Estimate | Sequence[float | None], scale: str = "percent") -> str:
    """Format an interval, or why there is none: "95 % 68.8 to 71.8", "no 95 % interval: only one image"."""
    interval = format_interval(estimate, scale)
    if interval:
        return f"95 % {interval}"
    reason = getattr(estimate, "reason", None)
    return f"no 95 % interval: {reason}" if reason else "no 95 % interval"


def format_overrides(overrides: Mapping[str, Any]) -> str:
    """Return the settings of a trial on one line, with keys shortened as far as they stay unambiguous.

    Example:
        >>> format_overrides({"finetune.optimizer.learning_rate": 0.001, "model.dropout": 0.2})
        'learning_rate 0.001, dropout 0.2'
    """
    return ", ".join(f"{shorten_key(key, overrides)} {format_value(value)}" for key, value in overrides.items())


def shorten_key(key: str, others: Collection[str]) -> str:
    """Return the shortest end of a dotted key that no other key has; at least two parts if the last is "name"."""
    short = shorten_axis(key, others)
    return short if short != "name" else ".".join(key.split(".")[-2:])


def format_value(value: Any) -> str:
    """Return a setting's value as it is written in an experiment file: 0.001, null, true, [0, 1]."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def read_text(path: Path) -> str | None:
    """Return the text of a file; None if there is no file.

    Raises:
        ModelError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: not text in UTF-8 ({error}). The run is damaged; run the experiment again."
        ) from error


def read_experiment(folder: Path) -> ExperimentConfig | None:
    """Return the experiment recorded in the folder of a run or of a shipped model; None if there is no config.yaml.

    Raises:
        ConfigError: the config.yaml is not a valid experiment.
    """
    path = folder / CONFIG_FILE
    return load_recorded_experiment(path) if path.exists() else None


def try_experiment(folder: Path) -> tuple[ExperimentConfig | None, str | None]:
    """Return (recorded experiment or None, None), or (None, the reason) if this version of dlfer cannot read it."""
    try:
        return read_experiment(folder), None
    except ConfigError as error:
        return None, str(error)


def get_name(run_path: Path, run: RunRecord) -> str:
    """Return the experiment's name or, if that is not recorded, the name of the run's parent folder."""
    return run.experiment or run_path.resolve().parent.name


def describe_run(run_path: Path, run: RunRecord) -> str:
    """Return a report's subtitle: the run, its start and end, and its status if it failed or was ended early."""
    words = [run_path.resolve().name]
    for word, time in (("started", run.started), ("finished", run.finished)):
        if time:
            words.append(f"{word} {time[:16].replace('T', ' ')} UTC")
    if run.present_status in ("failed", "stopped", "interrupted"):
        words.append(run.present_status)
    return " · ".join(words)


def format_command(run: RunRecord) -> str | None:
    """Return the command line that started a run; None if it was not recorded."""
    if not run.argv:
        return None
    first, *rest = run.argv
    return "dlfer " + shlex.join(rest if Path(first).name in ("dlfer", "__main__.py") else run.argv)


def describe_environment(run: RunRecord) -> list[tuple[str, str]]:
    """Return what is needed to reproduce a run (seed, commit, device, versions), as (name, value) pairs."""
    commit = run.git and f"{run.git.commit}{' with uncommitted changes' if run.git.dirty else ''}"
    device = run.device
    computed = [device.kind, device.name, device.backend, "XLA" if device.jit else None] if device else []
    software = {"dlfer": run.dlfer, "Python": run.python, **run.packages}
    facts = {
        "seed": run.seed,
        "config digest": run.config_digest,
        "git commit": commit,
        "device": ", ".join(word for word in computed if word),
        "platform": run.platform,
        "software": ", ".join(f"{name} {version}" for name, version in software.items() if version),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


class Link(NamedTuple):
    """The name of a report, and its address relative to the page that links to it."""

    name: str
    link: str


def find_comparisons(run_path: Path) -> list[Link]:
    """Return links to the comparisons in a run's parent folder that the run is a member of."""
    run_path, found = run_path.resolve(), []
    for members in sorted(run_path.parent.glob(f"*/{MEMBERS_FILE}")):
        # A damaged file of a comparison must not prevent the run's own report.
        with contextlib.suppress(ModelError):
            if run_path.name in {Path(row.path).name for row in read_member_rows(members.parent) if row.path}:
                found.append(Link(members.parent.name, f"../{members.parent.name}/report.html"))
    return found


def format_cell(estimate: CountedEstimate | None) -> str:
    """Return a value, its interval and its n on three lines; a dash without an estimate."""
    if estimate is None:
        return "–"
    return f"{format_percent(estimate.value)}\n{format_interval(estimate)}\nn = {format_count(estimate.n)}"
