"""The `dlfer prepare` command: convert data sets of tensorflow_datasets to their record files once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Overrides, complete_experiments, parse_overrides, say


def prepare(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Experiment file (YAML).", show_default=False, autocompletion=complete_experiments
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Convert the data sets of an experiment once (source tfds), and print their location; training only reads them."""
    from dlfer.config.load import load_experiment
    from dlfer.data.sources import prepare_data

    config = load_experiment(file, parse_overrides(overrides))
    for stage in ("pretrain", "finetune"):
        data = getattr(getattr(config, stage), "data", None)
        if data is None:
            say(f"{stage}: it has no data of its own, so there is nothing to prepare")
            continue
        found = prepare_data(data, say=say)
        if found is None:
            say(f"{stage}: source {data.source} is read without conversion, so there is nothing to prepare")
        else:
            print(f"{stage}: {found}")
