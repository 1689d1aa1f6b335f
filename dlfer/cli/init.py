"""`dlfer init`: a first experiment for a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Force, print_text, say


def init(
    folder: Annotated[Path, typer.Argument(help="Class folders, or train/validation/test with them.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The file to write.")] = None,
    force: Force = False,
) -> None:
    """Write a first experiment for a folder of your own images."""
    from dlfer.data.starter import write_starter

    path = write_starter(folder, out, force=force)
    say(f"Next: dlfer run {path} --smoke, then dlfer run {path}")
    print_text(path)
