"""The members of an ensemble, trained by the one runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dlfer.errors import DlferError, UserError
from dlfer.experiment.session import Session
from dlfer.runs.run import Run
from dlfer.study.progress import StudyConsole
from dlfer.study.runner import Ending, Runner, Task
from dlfer.study.slots import WorkerSlot, list_gpu_ids, make_slots


class _EnsembleSource:
    """Hands runs to the runner one after another; the first that fails ends the ensemble."""

    def __init__(self, runs: Mapping[str, Run], on_change: Callable[[], None]) -> None:
        self.waiting = [Task(f"member {name}", run, lambda run=run: _find_ending(run)) for name, run in runs.items()]
        self.on_change = on_change
        self.failure: tuple[str, Ending] | None = None

    def take(self, slot: WorkerSlot) -> Task | None:
        return self.waiting.pop(0) if self.waiting and self.failure is None else None

    def is_exhausted(self) -> bool:
        return not self.waiting or self.failure is not None

    def tick(self, tasks: Sequence[Task]) -> list[Task]:
        return []

    def end(self, task: Task, ending: Ending) -> None:
        if ending.status == "failed":
            self.failure = self.failure or (task.title, ending)
        self.on_change()


def run_ensemble_members(runs: Mapping[str, Run], session: Session, on_change: Callable[[], None]) -> None:
    """Execute the runs of an ensemble's members in processes of their own, one for each GPU at a time.

    Args:
        runs: name of the member -> its run directory.
        session: of the ensemble.
        on_change: called whenever a member has ended.

    Raises:
        TrainingStopped: the members stand at checkpoints.
        DlferError: a member failed; a UserError where the user has to correct it.
    """
    if not runs:
        return
    device = next(iter(runs.values())).config().experiment.device
    slots = make_slots(None, [] if device == "cpu" else list_gpu_ids())
    source = _EnsembleSource(runs, on_change)
    hint = session.resume_hint or ""
    Runner(slots, session.control, StudyConsole(), hint, session.options.require_gpu).run(source)
    if source.failure is not None:
        title, ending = source.failure
        raise (UserError if ending.is_users else DlferError)(f"{title} failed: {ending.kind}: {ending.error}")


def _find_ending(run: Run) -> Ending | None:
    return Ending("finished") if run.status == "finished" else None
