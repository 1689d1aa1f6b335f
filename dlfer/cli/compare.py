"""The `dlfer compare` command: test paired differences between finished runs, shipped models and prediction files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import (
    STDOUT,
    Data,
    Force,
    Html,
    Json,
    Runs,
    SplitName,
    complete_models,
    find_file,
    print_result,
    say,
)
from dlfer.errors import UserError


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL",
            help="Two or more runs, names of models, or files of predictions (.npz).",
            show_default=False,
            autocompletion=complete_models,
        ),
    ],
    split: SplitName = None,
    data: Data = None,
    json_out: Json = None,
    html_out: Html = None,
    force: Force = False,
    folder: Runs = None,
) -> None:
    """Compare runs and models on the same images: paired differences, and which of them are significant.

    Images are matched by id. Models without stored predictions predict the images of the first run. With --data, all
    runs and models predict those images instead. A difference is the first minus the second.
    """
    from dlfer.report.terminal import format_comparison
    from dlfer.runs.files import check_outputs
    from dlfer.runs.records import SCHEMA
    from dlfer.study.compare import compare_runs, find_entry

    inputs = [data, *(find_entry(name, folder).path for name in names)]
    check_outputs({"--json": find_file(json_out), "--html": html_out}, inputs, force=force)
    _check_json_file(json_out, folder)
    comparison = compare_runs(names, split=split, data=data, folder=folder, say=say)
    print_result(format_comparison(comparison), {"schema": SCHEMA, **comparison.as_json()}, json_out)
    if html_out is not None:
        from dlfer.report.comparison import write_models_page

        write_models_page(html_out, comparison)
        say(f"written: {html_out}")


def _check_json_file(json_out: Path | None, folder: Path | None) -> None:
    """Raise UserError if --json names a run, a study or a model, which was probably meant to be compared."""
    from dlfer.runs.find import ARTIFACT_FILE, default_runs_folder, list_models, match_runs
    from dlfer.runs.run import RUN_FILE

    if json_out in (None, STDOUT) or json_out.suffix == ".json":
        return
    name = str(json_out)
    is_folder = any((json_out / file).is_file() for file in (RUN_FILE, ARTIFACT_FILE))
    if is_folder or name in list_models() or match_runs(name, folder or default_runs_folder()):
        raise UserError(
            f"--json {name}: found a run or model; expected a file to write, such as {name}.json. To print the result, "
            "put --json last."
        )
