"""The `dlfer audit` command: find duplicates, leaks and contradicting labels in data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import DATA, STDOUT, Force, Html, Json, complete_data, find_file, print_text, say


def audit(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help=f"Images and labels: {DATA}.", show_default=False, autocompletion=complete_data
        ),
    ],
    votes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="FER+ votes: fer2013new.csv, or a csv of votes.")
    ] = None,
    json_out: Json = None,
    html_out: Html = None,
    groups_out: Annotated[
        Path | None,
        typer.Option("--write-groups", metavar="FILE", help="Write the group of duplicates of each image (csv)."),
    ] = None,
    split_out: Annotated[
        Path | None,
        typer.Option("--write-split", metavar="FILE", help="Write a split that keeps duplicates together (csv)."),
    ] = None,
    force: Force = False,
) -> None:
    """Audit data: duplicates and leaks, contradicting labels, empty images, outliers, annotators' votes."""
    from dlfer.experiment.audit import AuditFiles, inspect_data
    from dlfer.report.audit import describe_audit
    from dlfer.runs.audit_record import AuditRecord

    def show(found: AuditRecord) -> None:
        text = "\n".join([*describe_audit(found), *found.notes])
        print_text(found.dump().rstrip("\n") if json_out == STDOUT else text)

    files = AuditFiles(find_file(json_out), html_out, groups_out, split_out, force=force)
    inspect_data(data, votes=votes, files=files, show=show, say=say)
