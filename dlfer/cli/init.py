"""The `dlfer init` command: write a first experiment file for your own data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Force, complete_data, print_text, say
from dlfer.errors import UserError


def init(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder of images, a csv in the layout of FER2013, or an .npz.",
            autocompletion=complete_data,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File to write, instead of NAME.yaml.")
    ] = None,
    folders: Annotated[
        list[str] | None,
        typer.Option(
            "--folder",
            metavar="NAME=ROLE",
            help="Role of a folder whose name does not say it: train, validation, test, class or ignore. Repeatable.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a first experiment for your own images, e.g. a folder with one folder of images per label."""
    from dlfer.data.starter import write_starter

    pairs = [(name.strip(), role.strip()) for name, _, role in (item.rpartition("=") for item in folders or ())]
    roles = dict(pairs)
    twice = next((name for name, role in pairs if roles[name] != role), None)
    if twice is not None:
        raise UserError(f"--folder {twice}: found two roles; leave one of them out.")
    wrong = [name for name, role in roles.items() if role not in ("train", "validation", "test", "class", "ignore")]
    if wrong or "" in roles:
        raise UserError("--folder: expected NAME=ROLE with a ROLE of train, validation, test, class or ignore.")
    path = write_starter(data, out, roles, force=force, say=say)
    file = shlex.quote(str(path))
    say(f"Next: dlfer check {file}, then: dlfer run {file} --smoke (a minute), then: dlfer run {file}")
    print_text(path)
