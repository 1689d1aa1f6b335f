"""Options and listeners of a run.

Listeners are objects whose methods are called at a run's start, after each step and epoch, and at its end.

`dlfer.run(..., callbacks=[...])` takes them. A listener observes a training; it cannot change or end it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlfer.config.schema import ExperimentConfig
    from dlfer.runs.metrics_record import Metrics


@dataclass(frozen=True)
class RunOptions:
    """The options of `dlfer run` and `dlfer ablate` besides the experiment.

    Attributes:
        overrides: dotted key -> value, from --set.
        out: the folder of runs; None for saved_models/runs.
        smoke: use two batches of at most eight images in every phase.
        dry_run: explain what would be done, and stop.
        require_gpu: refuse to run without a GPU.
        max_hours: stop at a checkpoint after this number of hours.
        use_cache: read EF-FER1 from the cache if it was trained before.
        judge_test: evaluate the model on the test split at the end; False for the trials of a search.
        accept_changes: resume a run even if its data, experiment or software has changed since it started.
        argv: the command line, recorded in run.json.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    smoke: bool = False
    dry_run: bool = False
    require_gpu: bool = False
    max_hours: float | None = None
    use_cache: bool = True
    judge_test: bool = True
    accept_changes: bool = False
    argv: tuple[str, ...] = ()


class Listener:
    """A base class for observers of a run; its methods do nothing, so that a subclass overrides those that it needs.

    The order of the calls is `start`, then `step` and `epoch` for each stage, then `finish` or `fail`. A resumed run
    calls `start` again with the same folder and continues with the remaining epochs. Stages that were read from the
    cache have no epochs. The members of an ensemble are runs of their own: all their calls, from `start` to `finish`,
    come between the `start` and the `finish` of the ensemble.

    An exception in a method does not end the training: the first one of a listener is shown as a warning, later ones
    are not shown, and the listener's methods are still called.

    Example:
        >>> class Printer(Listener):
        ...     def epoch(self, stage, epoch, values):
        ...         print(f"{stage} {epoch}: {values['validation_accuracy']:.1%}")
        >>> Printer().epoch("finetune", 1, {"validation_accuracy": 0.625})
        finetune 1: 62.5%
    """

    def start(self, run_folder: Path, config: ExperimentConfig) -> None:
        """Called when the run in `run_folder` starts or is resumed.

        Args:
            run_folder: the run directory, with run.json and config.yaml and everything that the run writes.
            config: the experiment, with all overrides.
        """

    def step(self, stage: str, epoch: int, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Called after each training step, a batch or a boosting round; it should be fast, since training waits for it.

        Args:
            stage: "pretrain" or "finetune".
            epoch: counts from 1.
            step: counts from 1.
            steps: the number of steps in the epoch.
            values: the means over the epoch so far: loss (nats) and accuracy (0 to 1) on training images.
        """

    def epoch(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        """Called after each epoch and its validation.

        Args:
            stage: "pretrain" or "finetune".
            epoch: counts from 1.
            values: its row of history.csv: train_loss, train_accuracy, validation_loss, validation_accuracy,
                validation_macro_f1, learning_rate, seconds and images_per_second.
        """

    def finish(self, metrics: Metrics | None, folder: Path) -> None:
        """Called when the run has finished and written its model, metrics.json, report.html and the model card.

        Args:
            metrics: the contents of metrics.json; None for a run without metrics.
            folder: the run directory.
        """

    def fail(self, error: BaseException) -> None:
        """Called when the run ended before it had finished.

        Args:
            error: the exception that ended it; after `TrainingStopped` and `KeyboardInterrupt` the run can be resumed.
        """


def _print_warning(text: str) -> None:
    print(text, file=sys.stderr)


class Listeners(Listener):
    """A composite of listeners, which turns an exception in one into a warning without affecting the others or the run.

    Args:
        listeners: the listeners, which are called in this order.
        warn: called with the text of a warning.
    """

    def __init__(self, listeners: Iterable[Listener] = (), warn: Callable[[str], None] = _print_warning) -> None:
        self.listeners = tuple(listeners)
        self.warn = warn
        self._reported: set[int] = set()

    def start(self, run_folder: Path, config: ExperimentConfig) -> None:
        self._tell("start", run_folder, config)

    def step(self, stage: str, epoch: int, step: int, steps: int, values: Mapping[str, float]) -> None:
        self._tell("step", stage, epoch, step, steps, values)

    def epoch(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        self._tell("epoch", stage, epoch, values)

    def finish(self, metrics: Metrics | None, folder: Path) -> None:
        self._tell("finish", metrics, folder)

    def fail(self, error: BaseException) -> None:
        self._tell("fail", error)

    def _tell(self, method: str, *arguments: Any) -> None:
        for listener in self.listeners:
            try:
                getattr(listener, method)(*arguments)
            except Exception as error:
                if id(listener) not in self._reported:
                    self._reported.add(id(listener))
                    self.warn(_describe_failure(listener, method, error))


def _describe_failure(listener: Listener, method: str, error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"The listener {type(listener).__name__} failed in {method}(): {type(error).__name__}: {error} "
        f"({place.filename}, line {place.lineno}). The run continues; further errors of this listener are not shown."
    )
