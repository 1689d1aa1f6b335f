"""The `dlfer ship` command: save a small, named copy of a run's model, and publish it on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import complete_runs, print_text, say
from dlfer.errors import UserError


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
    weights: Annotated[
        str,
        typer.Option(
            metavar="float16|int8",
            help="What the ONNX file computes with: float32 from large kernels in float16, or eight bits.",
        ),
    ] = "float16",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of shipped models.")] = Path("saved_models"),
    to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Push it to this repository of the Hugging Face hub as well.")
    ] = None,
    hub_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the repository's folder here, instead of exports/NAME-hub; without --to-hub nothing is pushed.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --to-hub creates is private.")] = False,
) -> None:
    """Save a run's model as a named model, with large kernels in float16 and a card, if it agrees with the run's."""
    from dlfer.runs.find import check_hub, list_model_places, open_run_of_model

    if private and to_hub is None:
        raise UserError("dlfer ship --private: applies to the repository of --to-hub; add --to-hub ORG/NAME.")
    if to_hub is not None:
        check_hub(to_hub)
        hub_folder = hub_folder or Path("exports") / f"{name}-hub"
    if hub_folder is not None and hub_folder.resolve().is_relative_to((out / name).resolve()):
        raise UserError(
            f"--hub-folder {hub_folder}: is the folder of the shipped model, or lies in it; choose another one."
        )
    open_run_of_model(run)  # report a wrong name before TensorFlow is loaded

    from dlfer.export.ship import check_hub_folder, describe_int8, describe_speed, ship_model, write_hub_folder
    from dlfer.predict.predictor import RESEARCH_ONLY, SMOKE
    from dlfer.runs.find import push_folder
    from dlfer.runs.records import ArtifactRecord

    if hub_folder is not None:
        check_hub_folder(hub_folder)
    path = ship_model(run, out, name=name, default=default, weights=weights, say=say)
    record = ArtifactRecord.require(path)
    about = record.about
    if record.onnx is not None and record.onnx.labels_agree is not None:
        say(describe_int8(record.onnx))
    say(describe_speed(about.shipped.speed))
    if about.smoke:
        say(SMOKE)
    if default and not any(path.parent.samefile(place) for place in list_model_places() if place.is_dir()):
        say(
            f"It will be the default only where DLFER_HOME names a folder whose saved_models is {out}; no model is looked up there now."
        )
    print_text(path)
    if hub_folder is None:
        return
    print_text(write_hub_folder(path, hub_folder, to_hub))
    if about.research_only:
        say(f"{RESEARCH_ONLY} The card says so.")
    if to_hub is not None:
        print_text(push_folder(hub_folder, to_hub, private=private))
