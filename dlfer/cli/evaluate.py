"""`dlfer evaluate`: the metrics of a trained model on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Force, print_text, say
from dlfer.errors import UserError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model's name, its folder, or a run.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A csv in the layout of FER2013.")] = None,
    usage: Annotated[str | None, typer.Option(metavar="NAME", help="With --csv: its Usage, e.g. PrivateTest.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Class folders, an .npz, or an experiment file.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the metrics to this file.")
    ] = None,
    corrupt: Annotated[
        bool, typer.Option("--corrupt", help="Also evaluate on noisy, blurred, dark and other corrupted images; slow.")
    ] = False,
    views: Annotated[
        str | None, typer.Option(metavar="mirror,ten_crop", help="Test-time augmentation, each in a row of its own.")
    ] = None,
    headline: Annotated[
        str | None, typer.Option(metavar="VIEW", help="Report the accuracy with this one of --views as the headline.")
    ] = None,
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A csv with id,attribute,...: also report accuracy and recall by group."),
    ] = None,
    force: Force = False,
) -> None:
    """Evaluate a trained model on other data or, for a run without --csv and --data, on its own test or validation split."""
    import json

    from dlfer.report.terminal import format_metrics
    from dlfer.runs.files import write_atomically
    from dlfer.runs.find import find_model
    from dlfer.runs.outputs import check_outputs
    from dlfer.runs.records import SCHEMA

    if csv is not None and data is not None:
        raise UserError("dlfer evaluate: found both --csv and --data, expected one of them.")
    if usage is not None and csv is None:
        raise UserError("dlfer evaluate: --usage goes with --csv FILE.")
    # A wrong name and a place that cannot be written are told before TensorFlow is loaded.
    check_outputs({"--json": json_out}, [find_model(model), model, csv, data, attributes], force=force)
    from dlfer.experiment.evaluate import evaluate_model
    from dlfer.experiment.extras import Extras

    asked = Extras(
        corrupt=corrupt,
        views=tuple(views.split(",")) if views else (),
        headline=headline or "single",
        attributes=attributes,
    )
    metrics = evaluate_model(model, csv=csv, usage=usage, data=data, extras=asked, say=say)
    print_text(format_metrics(metrics))
    if json_out is not None:
        write_atomically(json_out, json.dumps({"schema": SCHEMA, **metrics.as_json()}, indent=2) + "\n")
