"""Experiment trackers (MLflow, Weights & Biases) as listeners of runs, which `experiment.track` selects.

Each tracker is configured by its own environment variables (MLFLOW_TRACKING_URI, WANDB_PROJECT, ...). A run stores its
trackers' ids in trackers.json, so that it continues with them when it is resumed. Members of a study are grouped.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dlfer._version import __version__
from dlfer.errors import EnvironmentProblem, ResumeError, TrainingStopped
from dlfer.runs.changes import flatten
from dlfer.runs.files import read_json, write_atomically
from dlfer.runs.listeners import Listener
from dlfer.runs.metrics_record import Estimate, Metrics
from dlfer.runs.records import RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from dlfer.config.schema import ExperimentConfig

IDS_FILE = "trackers.json"
SPLITS = ("test", "test_without_duplicates", "validation", "validation_without_duplicates", "train")
_REPORTS = ("report.html", "metrics.json", "model/MODEL_CARD.md")
_NO_PARAMETERS = {"expected", "search", "sweep", "ablation"}
"""Sections of the experiment that do not describe a single training."""


@dataclass(frozen=True)
class TrackedRun:
    """The description of a run that a tracker receives at its start.

    Attributes:
        folder: the run directory.
        name: "<experiment>/<run>".
        experiment: name of the experiment.
        study: the folder of the ablation, sweep, search, cross-validation or ensemble that it is a member of, or None.
        parameters: dotted key of the experiment -> value; values other than text as JSON.
        tags: values that identify the training: digest, commit, seed, protocol and so on.
    """

    folder: Path
    name: str
    experiment: str
    study: Path | None
    parameters: dict[str, str]
    tags: dict[str, str]


def describe_run(folder: Path, config: ExperimentConfig) -> TrackedRun:
    """Return the description of a run for trackers."""
    folder = Path(folder).resolve()
    record = RunRecord.require(folder)
    name = f"{folder.parent.name}/{folder.name}"
    study = None if record.study is None else folder.parent.parent / record.study
    values = flatten(config.model_dump(mode="json", exclude=_NO_PARAMETERS))
    tags = {
        "digest": (record.config_digest or "")[:8],
        "commit": record.git.commit if record.git else None,
        "seed": config.experiment.seed,
        "protocol": config.finetune.data.protocol,
        "version": __version__,
        "run": name,
        "study": record.study,
        "smoke": "true" if record.smoke else None,
    }
    return TrackedRun(
        folder=folder,
        name=name,
        experiment=config.experiment.name,
        study=study,
        parameters={
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in values.items()
            if not key.startswith("experiment.track")
        },
        tags={key: str(value) for key, value in tags.items() if value is not None},
    )


def list_metrics(metrics: Metrics | None) -> dict[str, float]:
    """Return the metrics of every split, e.g. "test/accuracy", its interval ("..._low", "..._high"), and "test/n"."""
    found: dict[str, float] = {}
    for split in SPLITS:
        scores = None if metrics is None else metrics.get(split)
        if scores is None:
            continue
        found[f"{split}/n"] = float(scores.n)
        for name in type(scores).model_fields:
            found |= _list_ends(f"{split}/{name}", getattr(scores, name))
        if scores.calibration is not None:
            found |= _list_ends(f"{split}/ece", scores.calibration.raw.ece_equal_mass)
            found |= _list_ends(f"{split}/brier", scores.calibration.raw.brier)
    return found


def _list_ends(key: str, estimate: Any) -> dict[str, float]:
    if not isinstance(estimate, Estimate):
        return {}
    values = {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    return {name: float(value) for name, value in values.items() if value is not None}


def list_artifacts(folder: Path) -> list[Path]:
    """Return the files of a finished run that trackers store: its report, its metrics and its model card."""
    return [path for name in _REPORTS if (path := folder / name).is_file()]


def read_id(folder: Path, tracker: str) -> str | None:
    """Return a tracker's id of the run in a folder; None if there is none or trackers.json is damaged."""
    with suppress(OSError, ValueError):
        found = read_json(folder / IDS_FILE)
        value = found.get(tracker) if isinstance(found, dict) else None
        return value if isinstance(value, str) else None
    return None


def write_id(folder: Path, tracker: str, value: str) -> None:
    """Add a tracker's id of the run in a folder to its trackers.json."""
    found: Any = {}
    with suppress(OSError, ValueError):
        found = read_json(folder / IDS_FILE)
    found = {**(found if isinstance(found, dict) else {}), tracker: value}
    write_atomically(folder / IDS_FILE, json.dumps(found, indent=2) + "\n")


class Tracker(Listener, ABC):
    """A base class that sends one run to one tracker.

    If the run could not be opened, nothing is sent. After an error in an epoch, no further epochs are sent, since each
    call could wait for a timeout; the end of the run is still sent.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.is_open = self.has_failed = self.stores_model = False

    def start(self, run_folder: Path, config: ExperimentConfig) -> None:
        self.stores_model = config.experiment.track_model
        run = describe_run(run_folder, config)
        found = self.open(run, read_id(run.folder, self.name))
        self.is_open = True
        write_id(run.folder, self.name, found)

    def epoch(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        if not self.is_open or self.has_failed:
            return
        self.has_failed = True
        self.log_epoch(stage, epoch, {f"{stage}/{name}": float(value) for name, value in values.items()})
        self.has_failed = False

    def finish(self, metrics: Metrics | None, folder: Path) -> None:
        if self.is_open:
            model = Path(folder) / "model" if self.stores_model else None
            banner = None if metrics is None else metrics.banner
            self.close(list_metrics(metrics), banner, list_artifacts(Path(folder)), model)

    def fail(self, error: BaseException) -> None:
        if self.is_open:
            self.abandon(is_stopped=isinstance(error, TrainingStopped | ResumeError | KeyboardInterrupt))

    @abstractmethod
    def open(self, run: TrackedRun, known: str | None) -> str:
        """Create the run, or continue the one whose id is `known` if the tracker still has it; return its id."""

    @abstractmethod
    def log_epoch(self, stage: str, epoch: int, values: dict[str, float]) -> None:
        """Send the values of an epoch."""

    @abstractmethod
    def close(self, values: dict[str, float], banner: str | None, files: Sequence[Path], model: Path | None) -> None:
        """Send the final metrics, the files and, unless it is None, the folder of the model; end the run."""

    @abstractmethod
    def abandon(self, *, is_stopped: bool) -> None:
        """End a run that has not finished; `is_stopped` means that it can be resumed."""


class MlflowTracker(Tracker):
    """A run in MLflow, in the store of MLFLOW_TRACKING_URI and the experiment MLFLOW_EXPERIMENT_NAME or that of dlfer.

    MLflow's client is used with run ids, not its active run, since an ensemble's run is open while its members' are.
    """

    name = "mlflow"
    client: MlflowClient

    def open(self, run: TrackedRun, known: str | None) -> str:
        # Give up on an unreachable server after half a minute; MLflow's default is several minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if known is not None and self._has(known):
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return known
        experiment = self._find_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.experiment)
        tags = {f"dlfer.{key}": value for key, value in run.tags.items()} | {"mlflow.source.name": "dlfer"}
        if "commit" in run.tags:
            tags["mlflow.source.git.commit"] = run.tags["commit"]
        if run.study is not None:
            tags["mlflow.parentRunId"] = self._find_parent(run.study, experiment)
        self.id = self.client.create_run(experiment, tags=tags, run_name=run.folder.name).info.run_id
        self._log_parameters(run.parameters)
        return self.id

    def log_epoch(self, stage: str, epoch: int, values: dict[str, float]) -> None:
        self._log_metrics(values, step=epoch)

    def close(self, values: dict[str, float], banner: str | None, files: Sequence[Path], model: Path | None) -> None:
        self._log_metrics(values, step=0)
        if banner:
            self.client.set_tag(self.id, "dlfer.banner", banner)
        for path in files:
            self.client.log_artifact(self.id, str(path))
        if model is not None:
            self.client.log_artifacts(self.id, str(model), artifact_path="model")
        self.client.set_terminated(self.id, "FINISHED")

    def abandon(self, *, is_stopped: bool) -> None:
        self.client.set_terminated(self.id, "KILLED" if is_stopped else "FAILED")

    def _has(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False  # another store, or the run was deleted from it
            raise

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another member has just created it
                    raise
                found = self.client.get_experiment_by_name(name)
        return found.experiment_id

    def _find_parent(self, study: Path, experiment: str) -> str:
        """Return the id of the parent run that represents a study; its first member creates it."""
        from filelock import FileLock

        with FileLock(study / f".{IDS_FILE}.lock", timeout=60):
            known = read_id(study, self.name)
            if known is None or not self._has(known):
                tags = {"dlfer.run": f"{study.parent.name}/{study.name}", "mlflow.source.name": "dlfer"}
                known = self.client.create_run(experiment, tags=tags, run_name=study.name).info.run_id
                self.client.set_terminated(known, "FINISHED")
                write_id(study, self.name, known)
        return known

    def _log_parameters(self, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for chunk in _divide([Param(key[:250], value[:6000]) for key, value in parameters.items()], 100):
            self.client.log_batch(self.id, params=chunk)

    def _log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for chunk in _divide([Metric(key, value, now, step) for key, value in values.items()], 1000):
            self.client.log_batch(self.id, metrics=chunk)


def _divide(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class WandbTracker(Tracker):
    """A run in Weights & Biases, in project WANDB_PROJECT or "dlfer"; local files in WANDB_DIR or the run folder."""

    name = "wandb"

    def open(self, run: TrackedRun, known: str | None) -> str:
        import wandb

        if wandb.setup().settings.mode in (None, "online", "shared") and not wandb.login(prompt=False):
            raise EnvironmentProblem(
                "W&B has no key on this machine; run `wandb login`, or set WANDB_MODE=offline and send the run later by `wandb sync`."
            )
        shown = ("digest", "commit", "seed", "protocol", "smoke")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "dlfer",
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            id=known,
            resume=None if known is None else "allow",
            name=run.name,
            group=None if run.study is None else f"{run.study.parent.name}/{run.study.name}",
            job_type="run" if run.study is None else run.study.name.rpartition("-")[2],
            config={**run.parameters, **{f"dlfer/{key}": value for key, value in run.tags.items()}},
            tags=[f"{key}: {value}"[:64] for key, value in run.tags.items() if key in shown],
            allow_val_change=True,
            reinit="create_new",  # an ensemble's run is open while its members' are
            # Files not uploaded within five minutes of the end stay in the run folder, for `wandb sync`.
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=60,
                finish_timeout=300,
                finish_timeout_raises=True,
                x_disable_stats=True,
            ),
        )
        for stage in ("pretrain", "finetune"):
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/epoch")
        return self.run.id

    def log_epoch(self, stage: str, epoch: int, values: dict[str, float]) -> None:
        self.run.log({f"{stage}/epoch": epoch, **values})

    def close(self, values: dict[str, float], banner: str | None, files: Sequence[Path], model: Path | None) -> None:
        import wandb

        self.run.summary.update(values)
        if banner:
            self.run.summary["banner"] = banner
            self.run.tags = (*(self.run.tags or ()), "not a clean test")
        reports = wandb.Artifact(f"reports-{self.run.id}", type="reports")
        for path in files:
            reports.add_file(str(path))
        self.run.log_artifact(reports)
        if model is not None:
            trained = wandb.Artifact(f"model-{self.run.id}", type="model")
            trained.add_dir(str(model))
            self.run.log_artifact(trained)
        self.run.finish()

    def abandon(self, *, is_stopped: bool) -> None:
        self.run.summary["status"] = "stopped" if is_stopped else "failed"
        self.run.finish(exit_code=130 if is_stopped else 1)


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (MlflowTracker, WandbTracker)}


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """Return a new tracker for each distinct name."""
    return [TRACKERS[name]() for name in dict.fromkeys(names)]
