"""The `dlfer report` command: rewrite the reports of runs from their records."""

from __future__ import annotations

from typing import Annotated

import typer

from dlfer.cli.options import Runs, complete_runs, print_text, say
from dlfer.errors import DlferError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Runs, or beginnings of their names.", autocompletion=complete_runs),
    ],
    folder: Runs = None,
) -> None:
    """Rewrite the reports of runs from their files, and the model card of each run that has a model."""
    from dlfer.report.card import write_card
    from dlfer.report.comparison import write_comparison_report
    from dlfer.report.html import write_report
    from dlfer.report.search import write_search_report
    from dlfer.runs.files import check_writable
    from dlfer.runs.find import ARTIFACT_FILE, open_run

    writers = {"run": write_report, "search": write_search_report}
    num_failed = 0
    for opened in [open_run(name, folder) for name in runs]:
        try:
            check_writable(opened.path, "report")
            print_text(writers.get(opened.kind, write_comparison_report)(opened.path))
            if (opened.path / "model" / ARTIFACT_FILE).is_file():
                write_card(opened.path)
        except (DlferError, OSError) as error:
            if len(runs) == 1:
                raise
            num_failed += 1
            say(f"not written: {opened.path}: {error}")
    if num_failed:
        say(f"{num_failed} of the {len(runs)} reports could not be written.")
        raise typer.Exit(1)
