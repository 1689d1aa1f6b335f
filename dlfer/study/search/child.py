"""The process of one trial: `python -m dlfer.study.search.child JOB`, begun by `dlfer search`.

It tells what happens as JSON lines on stdout and, after each epoch of EF-FER2, waits for one word on stdin:
"on" or "stop". When stdin is closed (the search was stopped, or killed) it stops at a checkpoint.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from dlfer.config.load import load_recorded_experiment, with_overrides
from dlfer.errors import TrainingStopped, UserError
from dlfer.runs.files import write_atomically
from dlfer.runs.find import open_run
from dlfer.runs.options import RunOptions

STOP, ON = "stop", "on"
GRACE_SECONDS = 120.0
"""A trial that does not reach its next step in so long after the search is gone ends by itself; its last checkpoint
stands. The first step of a large network, which is compiled in it, takes 40 s."""


class Channel:
    """The two pipes to the search.

    Args:
        out: where the JSON lines go.
        source: where the words come from.
        control: asked by the training whether to stop.
    """

    def __init__(self, out: TextIO, source: TextIO, control: Any) -> None:
        self.out, self.source, self.control = out, source, control
        self.words: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, event: str, **fields: Any) -> None:
        """Tell the search; where it is gone, that is noticed at the other pipe."""
        try:
            print(json.dumps({"event": event, **fields}), file=self.out, flush=True)
        except BrokenPipeError:
            self.control.request("the search")

    def heed(self) -> None:
        """Wait for the search's word on whether to go on."""
        if self.words.get() != ON:
            self.control.request("the search")

    def _listen(self) -> None:
        for line in self.source:
            self.words.put(line.strip())
        self.control.request("the search")
        self.words.put(None)
        timer = threading.Timer(GRACE_SECONDS, os._exit, args=(1,))
        timer.daemon = True
        timer.start()


def main(argv: list[str]) -> int:
    """Run the trial that a job file describes; return the exit code."""
    job = json.loads(Path(argv[0]).read_text())
    out = os.fdopen(os.dup(1), "w")
    # Whatever a library prints is talk, and goes to the trial's log.
    os.dup2(2, 1)
    from dlfer.train.control import StopControl

    control = StopControl()
    channel = Channel(out, sys.stdin, control)
    try:
        path = _execute(job, control, channel)
    except TrainingStopped as stop:
        channel.send("stopped", reason=stop.reason)
        return 0
    except BaseException as error:
        channel.send(
            "failed",
            kind=type(error).__name__,
            error=str(error) or type(error).__name__,
            is_users=isinstance(error, UserError),
        )
        raise
    channel.send("finished", run=path.name)
    return 0


def _execute(job: dict[str, Any], control: Any, channel: Channel) -> Path:
    from dlfer.experiment.run import execute_run, start_run
    from dlfer.experiment.session import Session
    from dlfer.train.watch import TrainingListener

    class Teller(TrainingListener):
        """Tells the search about epochs, and the log about the rest."""

        def say(self, text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        def finish_epoch(self, stage: str, row: dict, *, is_best: bool) -> None:
            channel.send("epoch", stage=stage, row=row)
            if stage == "finetune":
                channel.heed()

    given = job["options"]
    options = RunOptions(
        out=Path(given["out"]),
        smoke=given["smoke"],
        require_gpu=given["require_gpu"],
        use_cache=given["use_cache"],
        judge_test=given["judge_test"],
        argv=tuple(given["argv"]),
    )
    session = Session(options, control, Teller(), resume_hint=job["resume_hint"])
    record = Path(job["record"])

    def remember(path: Path) -> None:
        write_atomically(record, json.dumps({"overrides": job["overrides"], "run": path.name}) + "\n")
        channel.send("created", run=path.name)

    with control.watch_signals():
        if job["run"] is not None:
            run = open_run(job["run"])
            run.update(judge_test=options.judge_test)
            return execute_run(run, run.config(), session)
        config = load_recorded_experiment(job["config"])
        return start_run(with_overrides(config, job["overrides"]), session, on_created=remember)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
