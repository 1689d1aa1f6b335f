"""The `dlfer sweep` command: train every cell of a grid over several seeds."""

from __future__ import annotations

from typing import Annotated

import typer

from dlfer.cli.options import (
    Collect,
    MemberNumber,
    OptionalFile,
    Workers,
    check_array,
    check_double,
    check_start,
    name_option,
    parse_seeds,
    print_done,
    with_run_options,
)
from dlfer.errors import UserError
from dlfer.runs.listeners import RunOptions


@with_run_options
def sweep(
    file: OptionalFile = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of sweep.seeds.")] = None,
    workers: Workers = None,
    member: MemberNumber = None,
    collect: Collect = False,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Train every cell of an experiment's grid over seeds, rank the cells on validation, and compare them."""
    numbers = None if seeds is None else parse_seeds(seeds)
    if resume is not None and numbers is not None:
        raise UserError("dlfer sweep --resume: a sweep continues with its own seeds; leave --seeds out.")
    if numbers is not None:
        check_double("sweep", f"--seeds {seeds}", ["sweep.seeds"], options)
    is_array = check_array("sweep", member, resume=resume, collect=collect, workers=workers, options=options)
    resumed = check_start("sweep", file, resume, options, shared=is_array)
    from dlfer.study.comparison import ArrayTask
    from dlfer.study.sweep import SWEEP

    if resumed is None:
        array = ArrayTask(member) if is_array else None
        with name_option(f"--seeds {seeds}", ["sweep.seeds"]):
            done = SWEEP.start(file, options, seeds=numbers, workers=workers, array=array)
        print_done(done)
    else:
        print_done(SWEEP.resume(resumed, options, workers=workers))
