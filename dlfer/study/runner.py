"""The runner of all studies: it executes members in separate processes, as many at a time as there are worker slots.

Ablations, sweeps, searches and ensembles are sources of tasks. Whenever a slot is free, the runner takes a task, starts
`dlfer.study.child` on its run directory, passes on its epochs, and tells the source how it ended. A child that is
killed from outside is restarted once from its checkpoint. The runner uses no threads: everything happens in
`Runner.run`. Messages go to stderr, with a progress bar for each member if several train at a time.
"""

from __future__ import annotations

import abc
import json
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dlfer.config.names import STAGES
from dlfer.errors import DlferError, HeldError, ResumeError, TrainingStopped, UserError
from dlfer.runs.run import Run
from dlfer.study.child import GO_ON, STOP, ChildProcess, WorkerSlot, describe_exit
from dlfer.train.progress import StopControl


class StudyConsole:
    """A console that prints messages to stderr and can show progress bars below them on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def say(self, text: str, *, style: str | None = None) -> None:
        """Print a message above the progress bars."""
        self.console.print(text, markup=False, style=style)

    def show_bars(self) -> None:
        """Start to show progress bars, if stderr is a terminal."""
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[value]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._progress.start()

    def hide_bars(self) -> None:
        """Remove the progress bars."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._bars = None, {}

    def start(self, title: str) -> None:
        """Add a progress bar for a member that starts."""
        if self._progress is not None:
            self._bars[title] = self._progress.add_task(title, total=None, value="starting")

    def update(self, title: str, event: Mapping[str, Any]) -> None:
        """Update the bar of a member from `event`, which its process sent about a stage or an epoch."""
        if self._progress is None or title not in self._bars:
            return
        row = event.get("row") or {}
        accuracy = row.get("validation_accuracy")
        value = STAGES[event["stage"]] + ("" if accuracy is None else f", validation {accuracy:.1%}")
        self._progress.update(self._bars[title], total=event["epochs"], completed=event.get("epoch", 0), value=value)

    def stop(self, title: str) -> None:
        """Remove the bar of a member that has ended."""
        if self._progress is not None and title in self._bars:
            self._progress.remove_task(self._bars.pop(title))


POLL_SECONDS = 0.2
STOP_SECONDS = 120.0
"""Seconds after which a child that was asked to stop but reached no checkpoint is killed; its last checkpoint remains.
The first step of a large network takes 40 s, because it includes compilation."""
LOG_FILE = "console.txt"
"""File for the output of a member if several train at a time; a single one writes to the terminal."""
SAME_FAILURES = 3
"""Number of first members whose failure for the same reason means that the experiment itself is wrong."""


@dataclass(frozen=True)
class Ending:
    """How a member ended.

    Attributes:
        status: "finished"; "failed"; "cut" (the source stopped it after an epoch); "stopped" (everything stops).
        error: error message.
        kind: name of the error's class.
        is_users: whether the user has to correct the error.
        seconds: time that its process took.
    """

    status: str
    error: str = ""
    kind: str = ""
    is_users: bool = False
    seconds: float = 0.0


@dataclass(eq=False)
class Task:
    """A run to execute.

    Attributes:
        title: title for display.
        run: run directory.
        find_ending: called before the task starts, when no other process works on it; returns an ending if nothing is
            left to do. None: that is the case if the run is finished.
        on_epoch: called with the row of each epoch of EF-FER2; returns whether to continue. None: it always continues.
        process_key: tasks with equal values may be executed by one process in turn; "": a separate process.
        stage: stage that is being trained, "pretrain" or "finetune"; "" before the first one begins.
    """

    title: str
    run: Run
    find_ending: Callable[[], Ending | None] | None = None
    on_epoch: Callable[[dict[str, Any]], bool] | None = None
    process_key: str = ""
    stage: str = ""

    def get_ending(self) -> Ending | None:
        """Return the ending of a task with nothing left to do, or None if it has to be executed."""
        if self.find_ending is not None:
            return self.find_ending()
        return Ending("finished") if self.run.status == "finished" else None


class Source(abc.ABC):
    """A source of tasks for the runner; one whose tasks are fixed beforehand keeps the remaining ones in `waiting`."""

    waiting: list[Any]

    @abc.abstractmethod
    def take(self, slot: WorkerSlot) -> Task | None:
        """Return the next task, or None if there is none now."""

    @abc.abstractmethod
    def end(self, task: Task, ending: Ending) -> None:
        """Handle the ending of a task."""

    def is_exhausted(self) -> bool:
        """Return whether there will be no more tasks, unless tasks that are still running lead to new ones."""
        return not self.waiting

    def tick(self) -> list[Task]:
        """Do periodic work, several times a second; return the running tasks that are no longer wanted."""
        return []


@dataclass(eq=False)
class _Child:
    """A process that executes a task, or with `task` None waits for the next one of the same process key."""

    task: Task | None
    slot: WorkerSlot
    process: ChildProcess
    started: float
    process_key: str
    restarts: int = 0
    reported_ending: Ending | None = None
    is_cut: bool = False
    is_unwanted: bool = False
    stopping_since: float | None = None


@dataclass
class Runner:
    """A runner that executes the tasks of a source.

    Attributes:
        slots: worker slots of this machine.
        control: stop control that is polled.
        console: console for messages and progress bars.
        hint: command that continues after a stop.
        require_gpu: whether children refuse to run without a GPU.
        accept_changes: whether children continue although data, experiment or software changed since a member began.
        is_proven: whether the experiment is known to work, because not all members have failed for the same reason.
    """

    slots: Sequence[WorkerSlot]
    control: StopControl
    console: StudyConsole
    hint: str
    require_gpu: bool = False
    accept_changes: bool = False
    is_proven: bool = False
    _select: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector, init=False)
    _children: list[_Child] = field(default_factory=list, init=False)
    _held: list[Task] = field(default_factory=list, init=False)
    _said: set[Path] = field(default_factory=set, init=False)
    _failures: list[Ending] = field(default_factory=list, init=False)
    _is_stopping: bool = field(default=False, init=False)

    def run(self, source: Source) -> None:
        """Execute tasks until the source is exhausted; a task that fails does not stop the others.

        Raises:
            TrainingStopped: the control asked for it; every child has stopped at a checkpoint.
            ResumeError: data, experiment or software has changed since a member, or one before it, began.
            UserError, DlferError: the first members failed for the same reason, so the others would as well.
        """
        if len(self.slots) > 1:
            self.console.show_bars()
        try:
            while True:
                reason = self.control.get_reason()
                if reason is not None:
                    raise TrainingStopped(f"Stopped by {reason}.", reason=reason)
                self._fill(source)
                if not self._list_busy() and not self._held and source.is_exhausted():
                    break
                self._poll(source)
            self._dismiss(self._children)
        except BaseException:
            self._stop_all(source)
            raise
        finally:
            self.console.hide_bars()

    def _list_busy(self) -> list[_Child]:
        return [child for child in self._children if child.task is not None]

    def _fill(self, source: Source) -> None:
        """Start a task in each free slot, as long as there are tasks."""
        used = {child.slot for child in self._list_busy()}
        for slot in [slot for slot in self.slots if slot not in used]:
            while True:
                task = self._choose(source, slot)
                if task is None:
                    return
                ending = task.get_ending()
                if ending is None:
                    self._start(task, slot)
                    break
                self._end(source, task, ending)

    def _choose(self, source: Source, slot: WorkerSlot) -> Task | None:
        """Return a task on which no other process works; the child of a killed study, e.g., takes a while to stop."""
        for task in self._held:
            if not self._is_busy(task.run):
                self._held.remove(task)
                return task
        while len(self._held) < len(self.slots):
            task = source.take(slot)
            if task is None or not self._is_busy(task.run):
                return task
            self._defer(task)
        return None

    def _defer(self, task: Task) -> None:
        """Keep a task on which another process works until that has ended."""
        self._held.append(task)
        if task.run.path not in self._said:
            self._said.add(task.run.path)
            self.console.say(f"{task.title}: another process works on it ({task.run.path}); waiting for its end")

    def _is_busy(self, run: Run) -> bool:
        # A child of this runner locks its run only after it has loaded the framework.
        return run.is_held() or any(child.task.run.path == run.path for child in self._list_busy())

    def _start(self, task: Task, slot: WorkerSlot, *, restarts: int = 0) -> None:
        """Start a task in the process that waits in this slot if they share a process key, else in a new process."""
        log = task.run.path / LOG_FILE if len(self.slots) > 1 else None
        self.console.start(task.title)
        for child in [child for child in self._children if child.slot is slot]:
            if task.process_key and child.process_key == task.process_key and child.process.poll() is None:
                child.task, child.started, child.reported_ending, child.restarts = (
                    task,
                    time.monotonic(),
                    None,
                    restarts,
                )
                child.process.tell(json.dumps({"run": str(task.run.path), "log": None if log is None else str(log)}))
                return
            # Its GPU must be free before another process takes it.
            self._dismiss([child])
        flags = {
            "--ask": task.on_epoch is not None,
            "--stay": bool(task.process_key),
            "--require-gpu": self.require_gpu,
        }
        flags["--accept-changes"] = self.accept_changes
        given = [flag for flag, is_set in flags.items() if is_set]
        process = ChildProcess(task.run.path, slot, hint=self.hint, flags=given, log=log)
        child = _Child(task, slot, process, time.monotonic(), task.process_key, restarts)
        self._children.append(child)
        self._select.register(process.events, selectors.EVENT_READ, child)

    def _dismiss(self, children: Sequence[_Child]) -> None:
        """End processes that wait for a task, by closing their stdin."""
        for child in children:
            child.process.stdin.close()
        for child in list(children):
            try:
                child.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self._drain(child)
            self._children.remove(child)

    def _poll(self, source: Source) -> None:
        """Handle the events of the children and the ends of their processes, and let the source do periodic work."""
        for key, _ in self._select.select(POLL_SECONDS):
            events = key.data.process.hear()
            if events is None:
                # Its process is ending; poll() will return the exit code.
                self._select.unregister(key.fileobj)
            for event in events or ():
                self._handle_event(key.data, event)
        unwanted = source.tick()
        self._held = [task for task in self._held if task not in unwanted]
        for child in self._children:
            if child.task in unwanted:
                child.is_unwanted = True
                self._ask_to_stop(child)
            if child.stopping_since is not None and time.monotonic() - child.stopping_since > STOP_SECONDS:
                child.process.kill()
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._collect(child, source)
        for child in self._list_busy():
            if child.process_key and child.reported_ending is not None and child.reported_ending.status == "finished":
                task, reported_ending, child.task = child.task, child.reported_ending, None
                self.console.stop(task.title)
                self._end(source, task, reported_ending)

    def _handle_event(self, child: _Child, event: dict[str, Any]) -> None:
        name = event.pop("event")
        if name == "end":
            child.reported_ending = Ending(**event, seconds=time.monotonic() - child.started)
            return
        child.task.stage = event["stage"]
        self.console.update(child.task.title, event)
        if name == "epoch" and event["stage"] == "finetune" and child.task.on_epoch is not None:
            goes_on = child.stopping_since is None and child.task.on_epoch(event["row"])
            child.is_cut = child.is_cut or (child.stopping_since is None and not goes_on)
            child.process.tell(GO_ON if goes_on else STOP)

    def _collect(self, child: _Child, source: Source) -> None:
        """Report the ending of a child to the source, or restart a child that was killed from outside."""
        self._drain(child)
        self._children.remove(child)
        if child.task is None:
            return
        self.console.stop(child.task.title)
        reported_ending = child.reported_ending
        if child.is_unwanted:
            return
        if reported_ending is not None and reported_ending.status == "stopped" and child.is_cut:
            reported_ending = Ending("cut", seconds=reported_ending.seconds)
        if reported_ending is not None and reported_ending.kind == HeldError.__name__:
            # The child of a killed study locked the run while this child loaded the framework.
            self._defer(child.task)
        elif reported_ending is not None and reported_ending.status != "stopped":
            self._end(source, child.task, reported_ending)
        elif child.stopping_since is not None:
            self._end(source, child.task, Ending("stopped"))
        elif child.restarts == 0:
            self.console.say(
                f"{child.task.title}: {describe_exit(child.process.returncode)}; it continues from its last checkpoint"
            )
            self._start(child.task, child.slot, restarts=1)
        else:
            text = f"{describe_exit(child.process.returncode)}, twice"
            self._end(source, child.task, Ending("failed", text, "Killed", seconds=time.monotonic() - child.started))

    def _drain(self, child: _Child) -> None:
        """Handle the remaining events of a child that has ended, and close its pipes."""
        if child.process.events in self._select.get_map():
            self._select.unregister(child.process.events)
        for event in child.process.hear_rest():
            self._handle_event(child, event)
        child.process.close()

    def _end(self, source: Source, task: Task, ending: Ending) -> None:
        if ending.kind == ResumeError.__name__ and self._is_stopping:
            source.end(task, Ending("stopped"))
            return
        if ending.kind == ResumeError.__name__:
            # The change concerns all members, so it does not count as a failure of this one.
            source.end(task, Ending("stopped"))
            raise ResumeError(f"{task.title}: {ending.error}")
        if ending.status == "failed" and task.run.status in ("running", "interrupted"):
            task.run.fail(DlferError(ending.error))
        if ending.status == "stopped" and task.run.status in ("running", "interrupted"):
            task.run.stop(self.control.get_reason() or "its study")
        source.end(task, ending)
        self._raise_on_common_failure(ending)

    def _raise_on_common_failure(self, ending: Ending) -> None:
        """Raise an error if all members so far have failed for the same reason, which is then the experiment's."""
        if self.is_proven or ending.status == "stopped":
            return
        self._failures.append(ending)
        # Failures with the same cause share the error class, and the message apart from numbers.
        firsts = [(failure.kind, (failure.error.splitlines() or [""])[0]) for failure in self._failures]
        alike = {(kind, re.sub(r"[0-9a-fA-F]*\d[\w.+-]*", "N", text)) for kind, text in firsts}
        if ending.status != "failed" or len(alike) > 1:
            self.is_proven = True
            return
        # A ConfigError may be due to the keys of one member, so it takes as many failures as other errors.
        needed = 2 if ending.is_users and ending.kind != "ConfigError" else SAME_FAILURES
        if len(self._failures) < needed:
            return
        text = f"The first {needed} members failed for the same reason, so the others were not begun: {ending.error}"
        raise (UserError if ending.is_users else DlferError)(f"{text} When that is corrected: {self.hint}")

    def _ask_to_stop(self, child: _Child) -> None:
        if child.stopping_since is None:
            child.stopping_since = time.monotonic()
            child.process.send_signal(signal.SIGTERM)
            if child.task is None:
                child.process.stdin.close()

    def _stop_all(self, source: Source) -> None:
        """Stop every child at a checkpoint; a second Ctrl-C kills them."""
        for child in self._children:
            self._ask_to_stop(child)
        self.is_proven = self._is_stopping = True
        try:
            while self._children:
                self._poll(source)
        except KeyboardInterrupt:
            for child in list(self._children):
                child.process.kill()
                child.process.wait()
                self._collect(child, source)
        for task in self._held:
            source.end(task, Ending("stopped"))
        self._held = []
