"""`dlfer prepare`: data sets of tensorflow_datasets, brought into their records once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.completion import complete_experiments
from dlfer.cli.options import Overrides, parse_overrides, say


def prepare(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Experiment file (YAML).", show_default=False, autocompletion=complete_experiments
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Prepare the data of an experiment once (source tfds), and say where it lies; training then only reads it."""
    from dlfer.config.load import load_experiment
    from dlfer.data.sources import prepare_data

    config = load_experiment(file, parse_overrides(overrides))
    for stage in ("pretrain", "finetune"):
        data = getattr(getattr(config, stage), "data", None)
        if data is None:
            say(f"{stage}: no data of its own, nothing to prepare")
            continue
        found = prepare_data(data, say=say)
        if found is None:
            say(f"{stage}: source {data.source} is read as it is, nothing to prepare")
        else:
            print(f"{stage}: {found}")
