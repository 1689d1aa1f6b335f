"""The `dlfer search` command: search for hyperparameters that are best on the validation split."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dlfer.cli.options import OptionalFile, Workers, check_double, check_start, print_done, with_run_options
from dlfer.errors import UserError
from dlfer.runs.listeners import RunOptions


@with_run_options
def search(
    file: OptionalFile = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most N trials per arm, instead of search.trials.")
    ] = None,
    workers: Workers = None,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation", help="Tune with EF-FER1 and without, and compare the best trials on the test split."
        ),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FILE",
            help="Several machines: the same command on each, with one database (postgresql://...) or journal file.",
        ),
    ] = None,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Search an experiment's search space for the best values on validation; the test split is not used."""
    if resume is not None and ablation:
        raise UserError("dlfer search --resume: a search continues as it began; leave --ablation out.")
    if resume is not None and storage is not None:
        raise UserError(
            "dlfer search --storage: the command that began the search also continues it; leave --resume out."
        )
    if trials is not None:
        check_double("search", f"--trials {trials}", ["search.trials"], options)
    # With --resume, FILE and its --set values are compared later with the experiment that the search began with.
    checked = options if resume is None or file is None else replace(options, overrides={})
    resumed = check_start("search", None if resume is not None else file, resume, checked, shared=storage is not None)
    from dlfer.study.search.run import SearchOptions, resume_search, run_search

    settings = SearchOptions(trials=trials, workers=workers, ablation=ablation, storage=storage)
    if resumed is not None:
        print_done(resume_search(resumed, options, settings, file=file))
    else:
        print_done(run_search(file, options, settings))
