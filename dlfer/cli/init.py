"""`dlfer init`: a first experiment for a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Force, print_text, say
from dlfer.errors import UserError


def init(
    folder: Annotated[Path, typer.Argument(help="Class folders, or train/validation/test with them.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="File to write.")] = None,
    folders: Annotated[
        list[str] | None,
        typer.Option(
            "--folder",
            metavar="NAME=PART",
            help="Role of a folder whose name does not say it: train, validation, test, class or ignore. Repeatable.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a first experiment for a folder of your own images."""
    from dlfer.data.starter import write_starter

    roles = {name.strip(): part.strip() for name, _, part in (item.rpartition("=") for item in folders or ())}
    wrong = [name for name, part in roles.items() if part not in ("train", "validation", "test", "class", "ignore")]
    if wrong or "" in roles:
        raise UserError("--folder: expected NAME=PART with a PART of train, validation, test, class or ignore.")
    path = write_starter(folder, out, roles, force=force, say=say)
    say(f"Next: dlfer run {path} --smoke, then dlfer run {path}")
    print_text(path)
