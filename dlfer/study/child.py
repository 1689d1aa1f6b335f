"""The process of one member of a sweep: it goes on with a run directory that the sweep has made.

    python -m dlfer.study.child RUN --parent PID --hint "dlfer sweep --resume ..." [--require-gpu]

A process of its own frees its memory at its end, can have a GPU of its own, and takes nothing else along
when it is killed. It stops at a checkpoint when the sweep is gone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.runs.options import RunOptions
from dlfer.runs.run import Run
from dlfer.train.control import StopControl


def main(argv: list[str]) -> int:
    """Execute the run; return the exit code, as that of `dlfer run`."""
    parser = argparse.ArgumentParser(prog="dlfer.study.child")
    parser.add_argument("run", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--hint", required=True)
    parser.add_argument("--require-gpu", action="store_true")
    given = parser.parse_args(argv)
    run, control = Run(given.run), StopControl(parent=given.parent)
    # The cache of EF-FER1 stands beside the members.
    options = RunOptions(out=run.path.parent.parent, smoke=run.is_smoke, require_gpu=given.require_gpu)
    try:
        with control.watch_signals():
            # A wish to stop is heard while the framework is loaded.
            from dlfer.experiment.run import execute_run
            from dlfer.experiment.session import Session
            from dlfer.train.progress import ConsoleListener

            session = Session(options, control, ConsoleListener(), resume_hint=given.hint)
            execute_run(run, run.config(), session)
    except TrainingStopped as stop:
        return stop.exit_code
    except (DlferError, OSError) as error:
        print(f"dlfer: {error}", file=sys.stderr, flush=True)
        return UserError.exit_code if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
