"""The subprocess that trains a member of a study: worker slots, the parent's side of the process, and its main program.

It executes a run directory that its parent has created:

    python -m dlfer.study.child RUN --parent PID --hint "dlfer sweep --resume ..." --events FD [--ask] [--stay] [--require-gpu] [--accept-changes]

A separate process frees its memory when it ends, can have a GPU of its own, and affects nothing else if it is killed.
It writes one JSON object per line to the file descriptor FD: {"event": "start", "stage", "epochs"} when a stage begins,
{"event": "epoch", "stage", "epoch", "epochs", "row"} after each epoch, and {"event": "end", "status", "error", "kind",
"is_users"} last. With --ask it waits, after each epoch of EF-FER2, for one line on stdin: "on" or "stop". With --stay a
process whose run has finished waits for another one, {"run": path, "log": path or null}, until stdin is closed, so that
framework and data are loaded once. It stops at a checkpoint on SIGTERM, if stdin is closed instead of answered, and if
its parent is gone. If several run in parallel, each has a slot with a GPU or a share of the CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.quiet import hush_libraries
from dlfer.runs.listeners import RunOptions
from dlfer.runs.run import Run
from dlfer.train.progress import StopControl, TrainingListener

if TYPE_CHECKING:
    from dlfer.config.schema import ExperimentConfig


@dataclass(frozen=True, eq=False)
class WorkerSlot:
    """A slot in which one training process runs at a time, with the devices that it may use.

    Attributes:
        name: display name, such as "GPU 1" or "worker 2"; "" if there is only one slot.
        environment: environment variables to set for its process.
    """

    name: str
    environment: dict[str, str]


def list_gpu_ids() -> list[str]:
    """Return the GPU ids in CUDA_VISIBLE_DEVICES if it is set, else those that nvidia-smi lists; load no framework."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def find_slots(num_workers: int | None, config: ExperimentConfig) -> list[WorkerSlot]:
    """Return the worker slots of this machine for an experiment; with `experiment.device: cpu`, without GPUs."""
    return make_slots(num_workers, [] if config.experiment.device == "cpu" else list_gpu_ids())


def make_slots(num_workers: int | None, gpu_ids: Sequence[str]) -> list[WorkerSlot]:
    """Return the worker slots of this machine.

    A single slot sets no variables and may use every device. Of several, each gets one GPU, in turn; slots that share a
    GPU allocate its memory as they need it, and slots without a GPU share the CPU cores.

    Args:
        num_workers: number of members that train at a time; None: one for each GPU, or one without GPUs.
        gpu_ids: ids as returned by `list_gpu_ids`.
    """
    count = num_workers or max(1, len(gpu_ids))
    if count == 1:
        return [WorkerSlot("", {})]
    if not gpu_ids:
        threads = str(max(1, (os.cpu_count() or 1) // count))
        names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
        shared = {name: os.environ.get(name, threads) for name in names}
        return [WorkerSlot(f"worker {number + 1}", shared) for number in range(count)]
    slots = []
    for number in range(count):
        gpu = gpu_ids[number % len(gpu_ids)]
        environment = {"CUDA_VISIBLE_DEVICES": gpu}
        if count > len(gpu_ids):
            environment |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        slots.append(WorkerSlot(f"GPU {gpu}", environment))
    return slots


GO_ON, STOP = "on", "stop"
ANSWER_REASON = "its study"
CHILD_COMMAND = (sys.executable, "-m", "dlfer.study.child")
_STDERR = 2


class ChildProcess(subprocess.Popen):
    """The parent's handle of a member's process, with the file descriptor from which its events are read.

    Args:
        run: directory of the run that it executes.
        slot: worker slot in which it runs.
        hint: command that continues after a stop.
        flags: optional flags of dlfer.study.child.
        log: file to which its output is appended; None: the stderr of the parent.
    """

    def __init__(self, run: Path, slot: WorkerSlot, *, hint: str, flags: Sequence[str], log: Path | None) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.events, theirs = os.pipe()
        self._pending = b""
        command = [*CHILD_COMMAND, str(run), "--parent", str(os.getpid()), "--hint", hint, "--events", str(theirs)]
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, theirs)
            talk = _STDERR if log is None else stack.enter_context(log.open("ab")).fileno()
            super().__init__(
                [*command, *flags],
                stdin=subprocess.PIPE,
                # Stdout is reserved for the results of the study itself.
                stdout=talk,
                stderr=talk,
                pass_fds=(theirs,),
                # Ctrl-C must reach only the study, which then asks its members to stop.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, **slot.environment},
            )

    def tell(self, line: str) -> None:
        """Write a line to the stdin of the process; if it has exited, polling notices that."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(f"{line}\n".encode())
            self.stdin.flush()

    def hear(self) -> list[dict[str, Any]] | None:
        """Wait for output and return the complete events in it; return None at the end of the stream."""
        chunk = os.read(self.events, 65536)
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        return [json.loads(line) for line in lines] if chunk else None

    def hear_rest(self) -> Iterator[dict[str, Any]]:
        """Yield the remaining events of a process that has ended."""
        os.set_blocking(self.events, False)
        with contextlib.suppress(BlockingIOError):
            while (events := self.hear()) is not None:
                yield from events

    def close(self) -> None:
        """Close the pipes to the process."""
        os.close(self.events)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()


def describe_exit(code: int) -> str:
    """Return a description of how a process ended that did not report its own ending."""
    if code == 143:
        return "its process was asked to stop by SIGTERM from outside"
    if code >= 0:
        return f"its process ended with exit code {code} and no message"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}{'; it may have run out of memory' if name == 'SIGKILL' else ''}"


class Channel:
    """The connection of a member's process to its parent.

    Args:
        events: stream to which JSON lines are written.
        answers: stream from which one word is read after each epoch of EF-FER2; None: the parent is not asked.
        control: stop control that the training polls.
    """

    def __init__(self, events: TextIO, answers: TextIO | None, control: StopControl) -> None:
        self.events, self.answers, self.control = events, answers, control

    def send(self, event: str, **fields: Any) -> None:
        """Send an event to the parent; if the parent is gone, request a stop."""
        try:
            print(json.dumps({"event": event, **fields}), file=self.events, flush=True)
        except BrokenPipeError:
            self.control.request(ANSWER_REASON)

    def finish_epoch(self, stage: str, row: dict[str, Any], *, epochs: int) -> None:
        """Send the row of an epoch to the parent; after one of EF-FER2, wait for its answer if it is asked."""
        self.send("epoch", stage=stage, epoch=int(row["epoch"]), epochs=epochs, row=row)
        if self.answers is not None and stage == "finetune" and self.answers.readline().strip() != GO_ON:
            self.control.request(ANSWER_REASON)


def main(argv: list[str]) -> int:
    """Execute the run, and with --stay further ones; return the same exit codes as `dlfer run`."""
    parser = argparse.ArgumentParser(prog="dlfer.study.child")
    parser.add_argument("run", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--hint", required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--require-gpu", action="store_true")
    parser.add_argument("--accept-changes", action="store_true")
    given = parser.parse_args(argv)
    hush_libraries()
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
    """Execute the run, then with --stay those that the parent sends."""
    # Imported here, where signals are already handled, because loading the framework takes long.
    import keras

    from dlfer.experiment.run import execute_run
    from dlfer.experiment.session import Session

    run = Run(given.run)
    # The folder of runs, which also holds the cache of EF-FER1.
    options = RunOptions(
        out=run.path.parent.parent,
        smoke=run.is_smoke,
        require_gpu=given.require_gpu,
        accept_changes=given.accept_changes,
    )
    session = Session(options, channel.control, make_listener(channel), resume_hint=given.hint)
    while True:
        execute_run(run, run.config(), session)
        channel.send("end", status="finished", error="", kind="", is_users=False)
        line = sys.stdin.readline() if given.stay else ""
        if not line:
            return
        job = json.loads(line)
        if job["log"] is not None:
            _redirect_output(Path(job["log"]))
        run, session.listener = Run(Path(job["run"])), make_listener(channel)
        keras.backend.clear_session()


def make_listener(channel: Channel) -> TrainingListener:
    """Return a listener that prints to the console and sends stages and epochs to the parent."""
    from dlfer.train.progress import ConsoleListener

    class TellingParent(ConsoleListener):
        def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            if stage != self.stage or self.progress is None:
                channel.send("start", stage=stage, epochs=epochs)
            super().start_epoch(stage, epoch, epochs, step, steps)

        def finish_epoch(self, stage: str, row: dict[str, Any], *, is_best: bool) -> None:
            epochs = self.position[1]
            super().finish_epoch(stage, row, is_best=is_best)
            channel.finish_epoch(stage, row, epochs=epochs)

    return TellingParent()


def _redirect_output(log: Path) -> None:
    """Redirect stdout and stderr of this process to another file, in append mode."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
