"""Verbs that train: run, ablate, sweep."""

from __future__ import annotations

from typing import Annotated

import typer

from dlfer.cli.options import OptionalFile, check_start, parse_seeds, print_done, with_run_options
from dlfer.errors import UserError
from dlfer.runs.options import RunOptions


@with_run_options
def run(file: OptionalFile = None, *, resume: str | None, options: RunOptions) -> None:
    """Run one experiment from data to report: EF-FER1, EF-FER2, evaluation."""
    resumed = check_start("run", file, resume, options)
    from dlfer.config.load import load_experiment
    from dlfer.experiment import resume_run, run_experiment
    from dlfer.runs.find import open_run
    from dlfer.verbs.hosts import lead_or_follow

    if resumed is None:
        work, config = lambda: run_experiment(file, options), lambda: load_experiment(file, options.overrides)
    else:
        work, config = lambda: resume_run(resumed, options), lambda: open_run(resumed).config()
    print_done(lead_or_follow(work, config, options))


@with_run_options
def ablate(
    file: OptionalFile = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of ablation.seeds.")] = None,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Run an experiment with and without EF-FER1 over seeds, and compare the two."""
    numbers = None if seeds is None else parse_seeds(seeds)
    if resume is not None and numbers is not None:
        raise UserError("dlfer ablate --resume: an ablation goes on with its own seeds; leave --seeds out.")
    resumed = check_start("ablate", file, resume, options)
    from dlfer.compare.ablation import resume_ablation, run_ablation

    if resumed is None:
        print_done(run_ablation(file, options, seeds=numbers))
    else:
        print_done(resume_ablation(resumed, options))


@with_run_options
def sweep(
    file: OptionalFile = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of sweep.seeds.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train so many at a time; one for each GPU if left out.")
    ] = None,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Run every cell of an experiment's grid over seeds, rank them on validation, and compare them."""
    numbers = None if seeds is None else parse_seeds(seeds)
    if resume is not None and numbers is not None:
        raise UserError("dlfer sweep --resume: a sweep goes on with its own seeds; leave --seeds out.")
    resumed = check_start("sweep", file, resume, options)
    from dlfer.compare.sweep import resume_sweep, run_sweep

    if resumed is None:
        print_done(run_sweep(file, options, seeds=numbers, workers=workers))
    else:
        print_done(resume_sweep(resumed, options, workers=workers))
