"""The `dlfer ablate` command: train an experiment with and without EF-FER1 over several seeds."""

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
def ablate(
    file: OptionalFile = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of ablation.seeds.")] = None,
    workers: Workers = None,
    member: MemberNumber = None,
    collect: Collect = False,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Train an experiment with and without EF-FER1 over several seeds, and test the difference."""
    numbers = None if seeds is None else parse_seeds(seeds)
    if resume is not None and numbers is not None:
        raise UserError("dlfer ablate --resume: an ablation continues with its own seeds; leave --seeds out.")
    if numbers is not None:
        check_double("ablate", f"--seeds {seeds}", ["ablation.seeds"], options)
    is_array = check_array("ablate", member, resume=resume, collect=collect, workers=workers, options=options)
    resumed = check_start("ablate", file, resume, options, shared=is_array)
    from dlfer.study.ablation import ABLATION
    from dlfer.study.comparison import ArrayTask

    if resumed is None:
        array = ArrayTask(member) if is_array else None
        with name_option(f"--seeds {seeds}", ["ablation.seeds"]):
            done = ABLATION.start(file, options, seeds=numbers, workers=workers, array=array)
        print_done(done)
    else:
        print_done(ABLATION.resume(resumed, options, workers=workers))
