"""`dlfer ship`: the model of a run, made small and named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.completion import complete_runs
from dlfer.cli.options import print_text, say


def ship(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A finished run, or the beginning of its name.", autocompletion=complete_runs
        ),
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the shipped model.")],
    default: Annotated[
        bool, typer.Option("--default", help="Make it the default model, which is used when none is named.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of shipped models.")] = Path("saved_models"),
) -> None:
    """Write a run's model as a named model to ship, with large kernels in float16 and its card, after comparing it with the run's."""
    from dlfer.export.ship import ship_model
    from dlfer.predict.predictor import SMOKE
    from dlfer.runs.records import ArtifactRecord

    path = ship_model(run, out, name=name, default=default)
    if ArtifactRecord.require(path).about.smoke:
        say(SMOKE)
    print_text(path)
