"""The verb that looks for better settings: search."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dlfer.cli.options import OptionalFile, check_start, print_done, with_run_options
from dlfer.errors import UserError
from dlfer.runs.options import RunOptions

CHIEF = "127.0.0.1:8765"


@with_run_options
def search(
    file: OptionalFile = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most N trials (an arm), instead of search.trials.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Trials at a time; one a GPU if left out.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Tune with EF-FER1 and without, and compare the winners on test.")
    ] = False,
    role: Annotated[
        str | None, typer.Option(metavar="chief|worker", help="Several machines: propose, or run trials.")
    ] = None,
    chief: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="With --role: where the chief listens. There is no password.")
    ] = CHIEF,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Search the space of an experiment for its best keys, on validation; test stays closed."""
    _check(file, role=role, chief=chief, ablation=ablation, resume=resume)
    resumed = None
    if resume is not None:
        # A file beside --resume is compared with what the search began with.
        checked = options if file is None else replace(options, overrides={})
        resumed = check_start("search", None, resume, checked)
    elif role != "worker" or file is not None:
        check_start("search", file, None, options)
    from dlfer.study.search.run import SearchOptions, resume_search, run_search

    settings = SearchOptions(trials=trials, workers=workers, ablation=ablation, role=role, chief=chief)
    if role == "worker":
        from dlfer.study.search.remote import run_remote_worker

        run_remote_worker(file, options, settings)
    elif resumed is not None:
        print_done(resume_search(resumed, options, settings, file=file))
    else:
        print_done(run_search(file, options, settings))


def _check(file: object, *, role: str | None, chief: str, ablation: bool, resume: str | None) -> None:
    if role not in (None, "chief", "worker"):
        raise UserError(f"dlfer search --role {role}: expected chief or worker.")
    if role is None and chief != CHIEF:
        raise UserError("dlfer search: --chief goes with --role chief or --role worker.")
    host, _, port = chief.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"dlfer search --chief {chief}: expected HOST:PORT, e.g. {CHIEF}.")
    if role == "worker" and (resume is not None or ablation):
        raise UserError("dlfer search --role worker: --resume and --ablation are for the chief; leave them out.")
    if resume is not None and ablation:
        raise UserError("dlfer search --resume: a search goes on as it began; leave --ablation out.")
