"""The `dlfer export` command: convert a model to SavedModel, LiteRT or ONNX for use by other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import DATA, Force, complete_models, print_text, say
from dlfer.errors import UserError

FORMATS = "savedmodel,litert,litert-int8,onnx,onnx-int8"


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model's name, its folder, or a run.", autocompletion=complete_models),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMATS", help=f"Some of {FORMATS}.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of exports, instead of exports/MODEL.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DATA", help=f"Images to compare on, instead of the run's own: {DATA}.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIDE|HxW", help="Image size of LiteRT exports, instead of the training images' size."),
    ] = None,
    force: Force = False,
) -> None:
    """Export a model to SavedModel, LiteRT or ONNX; an export is kept only if it agrees with the original."""
    from dlfer.predict.runtimes import parse_formats
    from dlfer.runs.find import find_model

    # Report wrong arguments before TensorFlow is loaded.
    formats, sides = parse_formats(to), _parse_size(size)
    find_model(model)
    from dlfer.export.contract import describe_export
    from dlfer.export.exporters import export_model

    done = export_model(model, formats, out=out, data=data, size=sides, force=force, say=say)
    for folder, record in done.values():
        print_text(folder)
        for line in describe_export(record):
            print_text(f"  {line}")


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if not all(side.isdecimal() and 8 <= int(side) <= 4096 for side in sides) or len(sides) > 2:
        raise UserError(f"--size {text}: expected pixels from 8 to 4096, a side (48) or height and width (48x64).")
    return int(sides[0]), int(sides[-1])
