"""`dlfer run`: one experiment from data to report."""

from __future__ import annotations

from dlfer.cli.options import OptionalFile, check_start, print_done, with_run_options
from dlfer.runs.options import RunOptions


@with_run_options
def run(file: OptionalFile = None, *, resume: str | None, options: RunOptions) -> None:
    """Run one experiment from data to report: EF-FER1, EF-FER2, evaluation."""
    resumed = check_start("run", file, resume, options)
    from dlfer.config.load import load_experiment
    from dlfer.experiment.hosts import lead_or_follow
    from dlfer.experiment.run import resume_run, run_experiment
    from dlfer.runs.find import open_run

    if resumed is None:
        work, config = lambda: run_experiment(file, options), lambda: load_experiment(file, options.overrides)
    else:
        work, config = lambda: resume_run(resumed, options), lambda: open_run(resumed).config()
    print_done(lead_or_follow(work, config, options))
