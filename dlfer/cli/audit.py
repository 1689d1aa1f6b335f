"""`dlfer audit`: duplicates, leaks and contradictions in data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Force, print_text, say
from dlfer.errors import UserError


def audit(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (YAML) or arrays (.npz).", show_default=False)
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A csv in the layout of FER2013.")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Class folders, or train/validation/test with them.")
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="FER+ votes: fer2013new.csv, or a csv of votes.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the audit to this file.")
    ] = None,
    html_out: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page that shows the images concerned.")
    ] = None,
    groups_out: Annotated[
        Path | None,
        typer.Option("--write-groups", metavar="OUT", help="Write the group of duplicates of each image (csv)."),
    ] = None,
    split_out: Annotated[
        Path | None,
        typer.Option("--write-split", metavar="OUT", help="Write a split that keeps duplicates together (csv)."),
    ] = None,
    force: Force = False,
) -> None:
    """Audit data: duplicates and leaks, contradicting labels, empty images, outliers, votes of annotators."""
    if sum(given is not None for given in (file, csv, folder)) != 1:
        raise UserError("dlfer audit: give one of FILE, --csv FILE and --folder DIR.")
    from dlfer.experiment.audit import AuditFiles, inspect_data
    from dlfer.report.audit import describe_audit

    files = AuditFiles(json_out, html_out, groups_out, split_out, force=force)
    inspect_data(
        file,
        csv=csv,
        folder=folder,
        votes=votes,
        files=files,
        show=lambda found: print_text("\n".join([*describe_audit(found), *found.notes])),
        say=say,
    )
