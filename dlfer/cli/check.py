"""`dlfer check`: every problem of experiment files at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlfer.cli.options import Overrides, parse_overrides, print_text, say
from dlfer.errors import ConfigError


def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Experiment files.", show_default=False)],
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--print", help="Print each experiment in full, as YAML.")] = False,
) -> None:
    """Check experiment files, and name every problem at once; nothing is trained, no data is read."""
    from dlfer.config.load import compute_digest, dump_experiment, load_experiment

    values = parse_overrides(overrides)
    errors = []
    for file in files:
        try:
            config = load_experiment(file, values)
        except ConfigError as error:
            errors.append(str(error))
            continue
        say(f"ok  {file}  {config.experiment.name}  {compute_digest(config)[:8]}")
        for note in _list_absent(config):
            say(f"    {note}")
        if show:
            print_text(dump_experiment(config).rstrip("\n"))
    if errors:
        raise ConfigError("\n".join(errors))


def _list_absent(config: Any) -> list[str]:
    """Return notes on data that the experiment names and that is not here."""
    from dlfer.config.load import resolve_path

    notes = []
    for stage in ("pretrain", "finetune"):
        data = getattr(getattr(config, stage), "data", None)
        if data is None or data.path is None:
            continue
        try:
            if not resolve_path(data.path).exists():
                notes.append(f"{stage}.data.path: {resolve_path(data.path)} is not there yet")
        except ConfigError as error:
            notes.append(f"{stage}.data.path: {error}")
    return notes
