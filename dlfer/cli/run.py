"""The `dlfer run` command: run one experiment from data to report."""

from __future__ import annotations

from typing import Annotated

import typer

from dlfer.cli.options import OptionalFile, check_start, print_done, with_run_options
from dlfer.errors import UserError
from dlfer.runs.listeners import RunOptions

Continue = Annotated[
    bool,
    typer.Option(
        "--continue",
        help="Continue the newest unfinished run of this very experiment in --out; start one if there is none.",
    ),
]


@with_run_options
def run(file: OptionalFile = None, go_on: Continue = False, *, resume: str | None, options: RunOptions) -> None:
    """Run one experiment from data to report: EF-FER1, EF-FER2, evaluation."""
    if go_on and (resume is not None or options.smoke or options.dry_run):
        raise UserError(
            "dlfer run --continue: goes with an experiment FILE, and without --resume, --smoke and --dry-run."
        )
    resumed = check_start("run", file, resume, options, shared=go_on)
    from dlfer.config.load import compute_digest, load_experiment
    from dlfer.experiment.run import resume_run, run_experiment
    from dlfer.experiment.session import run_as_chief_or_worker
    from dlfer.runs.find import find_unfinished_run, open_run
    from dlfer.study.members import run_ensemble_members
    from dlfer.train.progress import describes_cluster

    if go_on:
        wanted = load_experiment(file, options.overrides)
        resumed = find_unfinished_run(wanted.experiment.name, compute_digest(wanted), options.out)
    # A training over several hosts cannot start other processes, so it trains the members of an ensemble itself.
    run_members = None if describes_cluster() else run_ensemble_members
    if resumed is None:
        work = lambda: run_experiment(file, options, run_members=run_members)  # noqa: E731
        config = lambda: load_experiment(file, options.overrides)  # noqa: E731
    else:
        work = lambda: resume_run(resumed, options, run_members=run_members)  # noqa: E731
        config = lambda: open_run(resumed).config()  # noqa: E731
    print_done(run_as_chief_or_worker(work, config, options))
