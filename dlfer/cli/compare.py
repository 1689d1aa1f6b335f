"""`dlfer compare`: paired differences between finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Force, Out, print_text


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Runs, or files of predictions (.npz).", show_default=False),
    ],
    part: Annotated[
        str | None,
        typer.Option(metavar="test|validation", help="Split to compare on; else test if all have it, or validation."),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the result to this file.")
    ] = None,
    force: Force = False,
    out: Out = None,
) -> None:
    """Compare finished runs on the same images: paired differences, and which of them are significant."""
    import json

    from dlfer.report.terminal import format_comparison
    from dlfer.runs.files import write_atomically
    from dlfer.runs.outputs import check_outputs
    from dlfer.runs.records import SCHEMA
    from dlfer.study.compare import compare_runs, find_entry

    check_outputs({"--json": json_out}, [find_entry(name, out).path for name in runs], force=force)
    comparison = compare_runs(runs, part=part, folder=out)
    print_text(format_comparison(comparison))
    if json_out is not None:
        write_atomically(json_out, json.dumps({"schema": SCHEMA, **comparison.as_json()}, indent=2) + "\n")
