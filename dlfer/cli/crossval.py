"""The `dlfer crossval` command: train and evaluate an experiment, or each cell of its sweep, once per fold."""

from __future__ import annotations

import dataclasses
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
    print_done,
    with_run_options,
)
from dlfer.errors import UserError
from dlfer.runs.listeners import RunOptions


@with_run_options
def crossval(
    file: OptionalFile = None,
    folds: Annotated[
        int | None,
        typer.Option(metavar="K", help="Number of folds; sets finetune.data.folds and protocol: cross_validation."),
    ] = None,
    workers: Workers = None,
    member: MemberNumber = None,
    collect: Collect = False,
    *,
    resume: str | None,
    options: RunOptions,
) -> None:
    """Cross-validate an experiment or the cells of its sweep: one training per fold, evaluated on that fold."""
    if folds is not None:
        if resume is not None:
            raise UserError(
                "dlfer crossval --resume: a cross-validation continues with its own folds; leave --folds out."
            )
        own = {"finetune.data.protocol": "cross_validation", "finetune.data.folds": folds}
        is_same = options.overrides.get("finetune.data.protocol") == "cross_validation"
        check_double("crossval", f"--folds {folds}", list(own)[is_same:], options)
        options = dataclasses.replace(options, overrides={**options.overrides, **own})
    is_array = check_array("crossval", member, resume=resume, collect=collect, workers=workers, options=options)
    keys = [] if folds is None else ["finetune.data.protocol", "finetune.data.folds"]
    with name_option(f"--folds {folds}", keys):
        resumed = check_start("crossval", file, resume, options, shared=is_array)
    from dlfer.study.comparison import ArrayTask
    from dlfer.study.crossval import CROSSVAL

    if resumed is None:
        array = ArrayTask(member) if is_array else None
        print_done(CROSSVAL.start(file, options, workers=workers, array=array))
    else:
        print_done(CROSSVAL.resume(resumed, options, workers=workers))
