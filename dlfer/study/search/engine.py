"""What a search asks of an engine, and the records that it keeps of its trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError

DEFAULT_TRIALS = 10


@dataclass(frozen=True)
class Proposal:
    """A trial to be run.

    Attributes:
        trial: its id in the engine.
        overrides: the keys that it sets.
        epochs: stop after so many (a rung of Hyperband); None: all of the experiment.
    """

    trial: str
    overrides: dict[str, Any]
    epochs: int | None = None


@dataclass(frozen=True)
class TrialRecord:
    """A trial as it stands in trials.json.

    Attributes:
        trial: its id in the engine.
        overrides: the keys that it sets.
        status: "waiting", "running", "finished", "rung" (stopped after the epochs of its rung), "pruned" or "failed".
        score: its validation figure, None before there is one.
        low, high: the 95 % interval of the score over the images, where it has been computed.
        epochs: done so far.
        rung: epochs after which it was to stop; None: all.
        run: name of its run directory, beside that of the search.
        seconds: that it took, in this rung.
        error: what went wrong.
        kind: the class of the error.
        is_users: whether the error is of the kind that the user must mend.
        worker: that ran it.
        ended: UTC, ISO 8601.
    """

    trial: str
    overrides: dict[str, Any]
    status: str
    score: float | None = None
    low: float | None = None
    high: float | None = None
    epochs: int = 0
    rung: int | None = None
    run: str | None = None
    seconds: float | None = None
    error: str | None = None
    kind: str | None = None
    is_users: bool = False
    worker: str | None = None
    ended: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass
class Answer:
    """What an engine says when asked for a trial.

    Attributes:
        proposal: None: there is none now.
        exhausted: none will come either.
    """

    proposal: Proposal | None = None
    exhausted: bool = False


class Engine(Protocol):
    """Proposes trials and learns from their scores; keeps both on disk, so that it can be opened again."""

    def ask(self, worker: str) -> Answer:
        """Return a trial to be run by `worker`; those that were interrupted come first."""
        ...

    def report(self, proposal: Proposal, epochs: int, score: float) -> bool:
        """Hear the score after an epoch; return whether the trial goes on."""
        ...

    def tell(self, record: TrialRecord) -> None:
        """Hear how a trial ended."""
        ...

    def list_records(self) -> list[TrialRecord]:
        """Return all trials in the order in which they were proposed."""
        ...

    def count_trials(self) -> int | None:
        """Return how many trials there will be at most; None where that is not known."""
        ...

    def count_epochs(self) -> int | None:
        """Return the epochs of all trials together where those have different ones; None elsewhere."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made from.

    Attributes:
        config: the experiment with its `search` section; of its arm.
        epochs: of a whole trial.
        trials: at most so many; None as the engine has it.
        options: of the engine's own, for tests.
    """

    config: ExperimentConfig
    epochs: int
    trials: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def open_engine(folder: Any, settings: EngineSettings) -> Engine:
    """Return the engine that `search.engine` names, with what it left in `folder` if it was there before.

    Raises:
        ConfigError: the engine cannot search this space.
        EnvironmentProblem: its package is not installed.
    """
    search = settings.config.search
    if search.engine == "hyperband" and any(key.endswith(".epochs") for key in search.space):
        raise ConfigError(
            "search.space: hyperband chooses the epochs of EF-FER2 itself; take the key that ends in .epochs out."
        )
    if search.engine == "optuna":
        from dlfer.study.search.optuna import OptunaEngine

        return OptunaEngine(folder, settings)
    from dlfer.study.search.keras_tuner import KerasTunerEngine

    return KerasTunerEngine(folder, settings)
