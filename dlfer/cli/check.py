"""`dlfer check`: every problem of experiment files at once, and all that would certainly fail on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Overrides, parse_overrides, print_text, say
from dlfer.errors import ConfigError


def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Experiment files.", show_default=False)],
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--print", help="Print each experiment in full, as YAML.")] = False,
) -> None:
    """Check experiment files and report every problem in them and on this machine, without training or reading data."""
    from dlfer.config.load import compute_digest, dump_experiment, load_experiment
    from dlfer.experiment.limits import describe_obstacles, find_obstacles

    values = parse_overrides(overrides)
    errors = []
    for file in files:
        try:
            config = load_experiment(file, values)
        except ConfigError as error:
            errors.append(str(error))
            continue
        data = config.finetune.data
        if data.protocol == "cross_validation" and data.fold is None:
            kind = "cross_validation"
        else:
            kind = "sweep" if config.sweep is not None else "search" if config.search is not None else "run"
        obstacles = find_obstacles(config, kind=kind)
        if obstacles:
            errors.append(describe_obstacles(file, obstacles))
        else:
            say(f"ok  {file}  {config.experiment.name}  {compute_digest(config)[:8]}")
        if show:
            print_text(dump_experiment(config).rstrip("\n"))
    if errors:
        raise ConfigError("\n".join(errors))
