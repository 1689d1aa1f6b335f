"""The process of a member: it executes a run directory that its parent has made.

    python -m dlfer.study.child RUN --parent PID --hint "dlfer sweep --resume ..." --events FD [--ask] [--stay] [--require-gpu]

A process of its own frees its memory at its end, can have a GPU of its own, and takes nothing else along when it is killed.
It writes one JSON object a line to the file descriptor FD: {"event": "start", "stage", "epochs"} when a stage begins,
{"event": "epoch", "stage", "epoch", "epochs", "row"} after each epoch, and {"event": "end", "status", "error", "kind",
"is_users"} last. With --ask it waits, after each epoch of EF-FER2, for one line on stdin: "on" or "stop". With --stay a
process whose run has finished waits for another one, {"run": path, "log": path or null}, until stdin is closed: framework
and data are loaded once. It stops at a checkpoint on SIGTERM, when stdin is closed instead of answered, and when its parent
is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.runs.options import RunOptions
from dlfer.runs.run import Run
from dlfer.train.control import StopControl
from dlfer.train.watch import TrainingListener

GO_ON, STOP = "on", "stop"
ANSWER_REASON = "its study"


class Channel:
    """What connects a member's process with its parent.

    Args:
        events: JSON lines are written to it.
        answers: one word is read from it after each epoch of EF-FER2; None: nothing is asked.
        control: asked by the training whether to stop.
    """

    def __init__(self, events: TextIO, answers: TextIO | None, control: StopControl) -> None:
        self.events, self.answers, self.control = events, answers, control

    def send(self, event: str, **fields: Any) -> None:
        """Tell the parent; one that is gone is noticed by the control."""
        try:
            print(json.dumps({"event": event, **fields}), file=self.events, flush=True)
        except BrokenPipeError:
            self.control.request(ANSWER_REASON)

    def finish_epoch(self, stage: str, row: dict[str, Any], *, epochs: int) -> None:
        """Tell the parent about an epoch; after one of EF-FER2 wait for its answer, if it wants to give one."""
        self.send("epoch", stage=stage, epoch=int(row["epoch"]), epochs=epochs, row=row)
        if self.answers is not None and stage == "finetune" and self.answers.readline().strip() != GO_ON:
            self.control.request(ANSWER_REASON)


def main(argv: list[str]) -> int:
    """Execute the run, and with --stay others; return the exit code, as that of `dlfer run`."""
    parser = argparse.ArgumentParser(prog="dlfer.study.child")
    parser.add_argument("run", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--hint", required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--require-gpu", action="store_true")
    given = parser.parse_args(argv)
    control = StopControl(parent=given.parent)
    channel = Channel(os.fdopen(given.events, "w"), sys.stdin if given.ask else None, control)
    with control.watch_signals():
        try:
            _execute(given, channel)
        except TrainingStopped as stop:
            channel.send("end", status="stopped", error="", kind="", is_users=False)
            return stop.exit_code
        except BaseException as error:
            is_users = isinstance(error, UserError)
            text = str(error) or type(error).__name__
            channel.send("end", status="failed", error=text, kind=type(error).__name__, is_users=is_users)
            if not isinstance(error, DlferError | OSError):
                raise
            print(f"dlfer: {error}", file=sys.stderr, flush=True)
            return UserError.exit_code if is_users else 1
    return 0


def _execute(given: argparse.Namespace, channel: Channel) -> None:
    """Execute the run, then those that the parent hands over."""
    # A wish to stop is heard while the framework is loaded.
    import keras

    from dlfer.experiment.run import execute_run
    from dlfer.experiment.session import Session

    run = Run(given.run)
    # The cache of EF-FER1 is beside the members.
    options = RunOptions(out=run.path.parent.parent, smoke=run.is_smoke, require_gpu=given.require_gpu)
    session = Session(options, channel.control, make_listener(channel), resume_hint=given.hint)
    while True:
        execute_run(run, run.config(), session)
        channel.send("end", status="finished", error="", kind="", is_users=False)
        line = sys.stdin.readline() if given.stay else ""
        if not line:
            return
        job = json.loads(line)
        if job["log"] is not None:
            _talk_to(Path(job["log"]))
        run, session.listener = Run(Path(job["run"])), make_listener(channel)
        keras.backend.clear_session()


def make_listener(channel: Channel) -> TrainingListener:
    """Return a listener that talks to the console, and tells the parent about stages and epochs."""
    from dlfer.train.progress import ConsoleListener

    class Listener(ConsoleListener):
        def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            if stage != self.stage or self.progress is None:
                channel.send("start", stage=stage, epochs=epochs)
            super().start_epoch(stage, epoch, epochs, step, steps)

        def finish_epoch(self, stage: str, row: dict[str, Any], *, is_best: bool) -> None:
            epochs = self.position[1]
            super().finish_epoch(stage, row, is_best=is_best)
            channel.finish_epoch(stage, row, epochs=epochs)

    return Listener()


def _talk_to(log: Path) -> None:
    """Let stdout and stderr go on in another file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
