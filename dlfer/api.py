"""The public functions for training, evaluation and comparison, and the runs and studies that they return.

Each function does the same as the command of its name. `dlfer/__init__.py` lists the public names.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from dlfer.config.load import check_overrides, find_override, load_experiment
from dlfer.config.names import STAGES, expand_home
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ModelError, TrainingStopped, UserError
from dlfer.quiet import hush_libraries
from dlfer.runs.comparison_record import ComparisonRecord, ModelComparison
from dlfer.runs.find import open_run as open_run_directory
from dlfer.runs.listeners import Listener, RunOptions
from dlfer.runs.member_rows import MemberRow, read_member_rows
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.run import Run
from dlfer.runs.run_records import Epoch, read_history, require_metrics
from dlfer.runs.text import format_html, format_interval, shorten

if TYPE_CHECKING:
    import numpy as np

    from dlfer.predict.engines import Engine
    from dlfer.runs.audit_record import AuditRecord

Experiment = str | os.PathLike | ExperimentConfig
"""The path of an experiment file, the name of a shipped experiment, or an experiment from `load_experiment`."""


class RunKeywords(TypedDict, total=False):
    """The keyword arguments that `run`, `ablate`, `sweep` and `search` have in common.

    Attributes:
        out: the folder of runs; by default saved_models/runs.
        smoke: make a smoke run: two batches of at most eight images in every phase, synthetic if the data is missing.
        max_hours: stop at a checkpoint after this number of hours.
        require_gpu: refuse to run without a GPU.
        use_cache: read EF-FER1 from the cache if it was trained before (the default).
    """

    out: str | os.PathLike | None
    smoke: bool
    max_hours: float | None
    require_gpu: bool
    use_cache: bool


class _Directory:
    """The base class of runs and studies, which read everything from a run directory."""

    def __init__(self, folder: Path | str) -> None:
        self._run = Run(Path(folder))

    @property
    def folder(self) -> Path:
        """The path of the run directory; the file reference describes its contents."""
        return self._run.path

    @property
    def report(self) -> Path:
        """The path of report.html, which is written at the end of the run or study."""
        return self.folder / "report.html"

    @property
    def status(self) -> str:
        """The status: "running", "interrupted" (its process no longer exists), "stopped", "failed" or "finished"."""
        return self._run.status

    @property
    def kind(self) -> str:
        """The kind: "run", "ablation", "sweep", "search" or "cross_validation"."""
        return self._run.kind

    @cached_property
    def config(self) -> ExperimentConfig:
        """The complete experiment, with all defaults and overrides."""
        return self._run.config()


class RunResult(_Directory):
    """A run, as returned by `run`, or by `open_run` for an earlier one; its properties are read from the run's folder.

    Example:
        >>> run = dlfer.run("experiments/quickstart.yaml")
        >>> run.metrics.test.accuracy.value
        0.5625
        >>> run.history["finetune"]["validation_accuracy"]
        [0.34, 0.41, 0.46, 0.5, 0.53]
        >>> run.classifier.predict(images).shape  # uint8 [2, 48, 48]
        (2, 7)
    """

    @property
    def metrics(self) -> Metrics:
        """The contents of metrics.json: `metrics.test`, `metrics.validation` and so on, each with 95 % intervals.

        Raises:
            ModelError: the run has no metrics, for example because it has not finished, or the file is damaged.
        """
        return require_metrics(self.folder)

    @property
    def history(self) -> dict[str, dict[str, list]]:
        """The learning curves of each trained stage: stage -> column of history.csv -> list with one value per epoch.

        The stages are "pretrain" and "finetune". Losses are in nats, accuracies in [0, 1]; missing and non-finite
        values are None. The history of an ensemble is empty; its members are runs with their own history.
        """
        found = {stage: read_history(self.folder / stage / "history.csv") for stage in STAGES}
        return {
            stage: {name: [getattr(epoch, name) for epoch in epochs] for name in Epoch.model_fields}
            for stage, epochs in found.items()
            if epochs
        }

    @cached_property
    def classifier(self) -> Engine:
        """The trained model, loaded on first access as by `load`.

        Raises:
            ModelError: the run has no model, for example because it has not finished, or its artifact is damaged.
        """
        from dlfer.predict.engines import load_model

        return load_model(self.folder)

    def resume(
        self,
        *,
        callbacks: Iterable[Listener] = (),
        progress: bool = True,
        max_hours: float | None = None,
        accept_changes: bool = False,
    ) -> RunResult:
        """Continue the run from its last checkpoint, and return it; a finished run is left unchanged.

        Args:
            callbacks, progress, max_hours: as for `run`.
            accept_changes: resume even if the data, the experiment or the software has changed; the report notes it.

        Raises:
            ResumeError: the data, the experiment or the software has changed, and `accept_changes` is false.
            TrainingStopped: by Ctrl-C or SIGTERM; the run can be resumed again.

        Example:
            >>> run = dlfer.run("experiments/quickstart.yaml", max_hours=0.01)
            >>> run.status
            'stopped'
            >>> run.resume().status
            'finished'
        """
        callbacks = _start("run", callbacks)
        from dlfer.experiment.run import resume_run

        options = RunOptions(max_hours=_check_hours(max_hours), accept_changes=accept_changes)
        try:
            resume_run(self.folder, options, callbacks=callbacks, progress=progress)
        except TrainingStopped as stop:
            _return_on_time(stop)
        return RunResult(self.folder)

    def __repr__(self) -> str:
        metrics = self._get_metrics()
        judged = None if metrics is None else metrics.judged
        accuracy = "" if judged is None else f", accuracy={shorten(judged.accuracy)}"
        return f"Run({str(self.folder)!r}, status={self.status!r}{accuracy})"

    def _repr_html_(self) -> str:
        metrics, notes = self._get_metrics(), []
        rows = [("status", self.status), ("folder", self.folder)]
        if self.report.is_file():
            rows.append(("report", self.report))
        if metrics is not None and metrics.judged is not None:
            judged = metrics.judged
            rows.append((f"{metrics.judged_split} accuracy", format_interval(judged.accuracy)))
            rows.append((f"{metrics.judged_split} macro F1", format_interval(judged.macro_f1)))
            rows.append(("images", f"{judged.n:,}"))
            notes = [metrics.banner, "In parentheses: 95 % intervals, in percent."]
        return format_html(f"Run of {self.config.experiment.name}", rows, notes=notes)

    def _get_metrics(self) -> Metrics | None:
        try:
            return self.metrics
        except ModelError:
            return None


class Study(_Directory):
    """An ablation, sweep or search, as returned by `ablate`, `sweep` and `search`, or by `open_run` for an earlier one.

    `open_run` also opens a cross-validation, which only the command `dlfer crossval` can start.

    Example:
        >>> study = dlfer.ablate("experiments/quickstart.yaml", seeds=[0, 1, 2])
        >>> print(study.comparison.paired[0].sentence)
        >>> [run.metrics.test.accuracy.value for run in study.runs]
    """

    @property
    def comparison(self) -> ComparisonRecord | None:
        """The contents of comparison.json: the table of arms or cells, and the verdicts; None if there is no file."""
        return ComparisonRecord.read(self.folder)

    @property
    def members(self) -> list[MemberRow]:
        """The rows of members.csv, one per member (of a search, per trial): arm, seed, status, accuracies, settings."""
        return read_member_rows(self.folder)

    @property
    def runs(self) -> list[RunResult]:
        """The runs of the members that have started, in the order of `members`."""
        folders = (row.find_folder(self.folder) for row in self.members)
        return [RunResult(folder) for folder in dict.fromkeys(folders) if folder is not None]

    @property
    def best(self) -> dict[str, ExperimentConfig]:
        """The experiments of a search's best trials on validation, ready for `run`; empty before a trial has a score.

        The key is "best", or "best-<arm>" for each arm of a search with `ablation=True`. Empty for other studies.
        """
        return {path.stem: load_experiment(path) for path in sorted(self.folder.glob("best*.yaml"))}

    def resume(
        self, *, workers: int | None = None, max_hours: float | None = None, accept_changes: bool = False
    ) -> Study:
        """Continue the study, and return it: finished members are kept, the others continue from their checkpoints.

        Args:
            workers, max_hours: as for `ablate`.
            accept_changes: resume even if the data, the experiment or the software has changed.

        Raises:
            ResumeError: the data, the experiment or the software has changed, and `accept_changes` is false.
            TrainingStopped: by Ctrl-C or SIGTERM; the study can be resumed again.

        Example:
            >>> study = dlfer.open_run("saved_models/runs/quickstart/20261121T101500Z-1a2b3c4d-ablation")
            >>> study.resume(workers=2).status
            'finished'
        """
        _start({"ablation": "ablate", "cross_validation": "crossval"}.get(self.kind, self.kind))
        options = RunOptions(max_hours=_check_hours(max_hours), accept_changes=accept_changes)
        workers = _check_count("workers", workers)
        try:
            if self.kind == "search":
                from dlfer.study.search.run import SearchOptions, resume_search

                resume_search(self.folder, options, SearchOptions(workers=workers))
            else:
                from dlfer.study.ablation import ABLATION
                from dlfer.study.crossval import CROSSVAL
                from dlfer.study.sweep import SWEEP

                rules = {"ablation": ABLATION, "sweep": SWEEP, "cross_validation": CROSSVAL}[self.kind]
                rules.resume(self.folder, options, workers=workers)
        except TrainingStopped as stop:
            _return_on_time(stop)
        return Study(self.folder)

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r}, kind={self.kind!r}, status={self.status!r}, members={len(self.members)})"

    def _repr_html_(self) -> str:
        # Only the trials of a search have a score.
        value = "score" if self.kind == "search" else "validation_accuracy"
        rows = [
            (
                row.arm if row.trial is None else f"{row.arm} {row.trial}",
                row.seed,
                row.status,
                None if getattr(row, value) is None else f"{getattr(row, value):.4f}",
                ", ".join(f"{key}: {setting}" for key, setting in row.settings.items()),
            )
            for row in sorted(self.members, key=lambda row: -(row.score or 0))
        ]
        header = ("member", "seed", "status", value.replace("_", " "), "settings")
        title = f"{self.kind.capitalize()} of {self.config.experiment.name}, {self.status}"
        notes = [f"Folder: {self.folder}", f"Report: {self.report}" if self.report.is_file() else None]
        found = self.comparison
        return format_html(title, rows, header=header, notes=notes) + ("" if found is None else found._repr_html_())


def run(
    experiment: Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    callbacks: Iterable[Listener] = (),
    progress: bool = True,
    **options: Unpack[RunKeywords],
) -> RunResult:
    """Run an experiment from data to report: train EF-FER1 and EF-FER2, and evaluate the model, as `dlfer run` does.

    Ctrl-C, or "interrupt" in a notebook, stops the run with a checkpoint after the current step.

    Args:
        experiment: the path of an experiment file, the name of a shipped experiment, or a result of `load_experiment`.
        overrides: dotted key -> value, as for `load_experiment`.
        callbacks: instances of subclasses of `Listener`; their methods are called at the start, steps, epochs and end
            of this run, and of the runs of an ensemble's members.
        progress: whether to report progress on stderr; warnings are always shown.
        **options: out, smoke, max_hours, require_gpu, use_cache; see `dlfer run --help`.

    Returns:
        The run. If `max_hours` ended it, its status is "stopped", and `run.resume()` continues it.

    Raises:
        UserError: the experiment, the data or the environment is invalid (ConfigError, DataError ...).
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` is that of the run, which can be resumed.
        NonFiniteError: the loss or a weight became NaN or infinite.

    Example:
        >>> run = dlfer.run("experiments/quickstart.yaml", {"finetune.epochs": 3}, out="runs")
        >>> run.metrics.test.accuracy.value, run.report
    """
    callbacks, given = _start("run", callbacks), _make_options("run", overrides, options)
    from dlfer.experiment.run import run_experiment

    try:
        return RunResult(run_experiment(_to_source(experiment), given, callbacks=callbacks, progress=progress))
    except TrainingStopped as stop:
        return RunResult(_return_on_time(stop))


def ablate(
    experiment: Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    **options: Unpack[RunKeywords],
) -> Study:
    """Run an experiment with and without EF-FER1 for several seeds, and compare the two arms, as `dlfer ablate` does.

    The members are trained in child processes, which do not import the calling script, so it needs no
    `if __name__ == "__main__":`.

    Args:
        experiment, overrides, **options: as for `run`.
        seeds: different integers from 0; they replace ablation.seeds of the experiment.
        workers: number of members that train at the same time; by default one per GPU, or one without GPUs.

    Raises:
        ConfigError: the experiment has no EF-FER1 that could be left out.
        DlferError: a member failed; the other members have run.
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` is that of the study, which can be resumed.

    Example:
        >>> study = dlfer.ablate("experiments/quickstart.yaml", seeds=[0, 1, 2], workers=2)
        >>> study.comparison  # in a notebook: the table and the verdict
    """
    return _compare_arms("ablate", experiment, overrides, seeds, workers, options)


def sweep(
    experiment: Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    **options: Unpack[RunKeywords],
) -> Study:
    """Run every cell of an experiment's `sweep` with each seed, and rank them on validation, as `dlfer sweep` does.

    Args:
        experiment, overrides, **options: as for `run`.
        seeds: different integers from 0; they replace sweep.seeds of the experiment.
        workers: as for `ablate`.

    Raises:
        ConfigError: the experiment has no section `sweep`.
        DlferError: a member failed; the other members have run.
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` is that of the study, which can be resumed.

    Example:
        >>> grid = {"sweep.grid": {"finetune.batch_size": [32, 64]}}
        >>> study = dlfer.sweep("experiments/quickstart.yaml", grid, seeds=[0, 1])
        >>> study.comparison.table[0].settings
        {'finetune.batch_size': '32'}
    """
    return _compare_arms("sweep", experiment, overrides, seeds, workers, options)


def search(
    experiment: Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    trials: int | None = None,
    workers: int | None = None,
    ablation: bool = False,
    **options: Unpack[RunKeywords],
) -> Study:
    """Search the space of an experiment for the settings that are best on validation, as `dlfer search` does.

    Trials are never evaluated on the test split.

    Args:
        experiment, overrides, **options: as for `run`.
        trials: the maximum number of trials per arm; it replaces search.trials of the experiment.
        workers: number of trials that run at the same time.
        ablation: search with and without EF-FER1 separately, and compare the best trials of the two on the test split.

    Raises:
        UserError: the experiment has no `search`, or its space or engine is invalid.
        DlferError: the first trials failed for the same reason.
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` is that of the study, which can be resumed.

    Example:
        >>> study = dlfer.search("experiments/search.yaml", trials=20)
        >>> run = dlfer.run(study.best["best"])
    """
    _start("search")
    given = _make_options("search", overrides, options)
    from dlfer.study.search.run import SearchOptions, run_search

    if trials is not None:
        _check_double("trials", "search.trials", given)
    settings = SearchOptions(_check_count("trials", trials), _check_count("workers", workers), ablation)
    try:
        return Study(run_search(_to_source(experiment), given, settings))
    except TrainingStopped as stop:
        return Study(_return_on_time(stop))


def open_run(name: str | os.PathLike, out: str | os.PathLike | None = None) -> RunResult | Study:
    """Open an earlier run, or an earlier ablation, sweep, search or cross-validation.

    Args:
        name: the path of its folder, or the beginning of its name in the folder of runs.
        out: the folder of runs; by default saved_models/runs.

    Raises:
        ModelError: no run has this name, or more than one.

    Example:
        >>> dlfer.open_run("quickstart/20261121T1015").metrics.test.n
        64
    """
    found = open_run_directory(os.fspath(name), None if out is None else Path(out))
    return (RunResult if found.kind == "run" else Study)(found.path)


def evaluate(
    model: str | os.PathLike | RunResult,
    data: str | os.PathLike | tuple[np.ndarray, Sequence] | None = None,
    *,
    split: str | None = None,
    views: Sequence[str] = (),
    corrupt: bool = False,
    attributes: str | os.PathLike | None = None,
) -> Metrics:
    """Evaluate a trained model on other data, or a run on a split of its own data, as `dlfer evaluate` does.

    Args:
        model: a run, the name of a model or run, or the folder of one.
        data: class folders, a csv in the layout of FER2013, a zip with either, an .npz of arrays or an experiment file;
            or (images, labels) in memory: uint8 [N, H, W] or [N, H, W, 1 or 3], and N label names or int indices of the
            model's labels. None: the run's own data.
        split: "test", "validation" or "train", or FER2013's name for it, e.g. "PrivateTest"; by default the first of
            these that exists.
        views: test-time augmentation, e.g. ["mirror", "ten_crop"]; each view has an entry in `metrics.views`.
        corrupt: whether to evaluate on noisy, blurred, dark and otherwise corrupted images as well, which is slow.
        attributes: a csv with the columns id,attribute,... for an additional evaluation by group.

    Returns:
        The metrics; `metrics.test` has those of the evaluated images, whichever split they are from.

    Raises:
        UserError: the model or the data is not found, or the data does not fit the model.

    Example:
        >>> dlfer.evaluate("lite2_96", "my_faces").test.accuracy.value
        0.625
        >>> dlfer.evaluate("lite2_96", (images, ["happy", "sad"])).test.n
        2
    """
    hush_libraries()
    from dlfer.experiment.evaluate import evaluate_model
    from dlfer.experiment.extras import Extras

    extras = Extras(views=tuple(views), corrupt=corrupt, attributes=_to_path(attributes))
    given = data if data is None or isinstance(data, tuple) else expand_home(data)
    return evaluate_model(_to_name(model), data=given, split=split, extras=extras)


def compare(
    *runs: str | os.PathLike | RunResult, split: str | None = None, data: str | os.PathLike | None = None
) -> ModelComparison:
    """Compare two or more finished runs or models on the same images, with paired tests of their accuracies.

    Args:
        *runs: runs, their folders or the beginnings of their names; names of shipped models; or predictions files.
        split: "test" or "validation"; by default test if all have it, else validation.
        data: labelled images that all of them are to predict: a path, as for `evaluate`. By default the stored
            predictions of runs are compared, and models without any predict the data of the first run.

    Raises:
        UserError: there are fewer than two, or their labels, targets or images do not match.

    Example:
        >>> for pair in dlfer.compare(run, "quickstart/20261121T1015").pairs:
        ...     print(pair.sentence)
    """
    from dlfer.study.compare import compare_runs

    return compare_runs([_to_name(run) for run in runs], split=split, data=_to_path(data))


def audit(
    images: np.ndarray,
    labels: Sequence,
    *,
    splits: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
) -> AuditRecord:
    """Find duplicates, conflicting labels, constant images and outliers in arrays, as `dlfer audit` does in files.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C] with C 1 (grey) or 3 (RGB), values 0 to 255.
        labels: N names or integers.
        splits: N names of splits, e.g. "train" and "test", between which duplicates are counted in `leaks`; by default
            all images are one split.
        ids: N different ids of the images, which the record uses; by default "0", "1" and so on.

    Returns:
        The audit record: counts such as `duplicate_groups`, `conflicting_groups` and `near_constant_images`, and the
        images that were found in `samples`, `flat` and `outliers`.

    Raises:
        DataError: an array has another shape or dtype, or the lengths differ.

    Example:
        >>> images = np.zeros((3, 48, 48), np.uint8)
        >>> found = dlfer.audit(images, ["happy", "happy", "sad"])
        >>> found.duplicate_groups, found.conflicting_groups, found.constant_images
        (1, 1, 3)
    """
    from dlfer.experiment.audit import audit_arrays

    return audit_arrays(images, labels, splits=splits, ids=ids)


def _compare_arms(
    verb: str,
    experiment: Experiment,
    overrides: Mapping[str, Any] | None,
    seeds: Sequence[int] | None,
    workers: int | None,
    options: Mapping[str, Any],
) -> Study:
    _start(verb)
    given, workers = _make_options(verb, overrides, options), _check_count("workers", workers)
    if seeds is not None:
        seeds = _check_seeds(seeds)
        _check_double("seeds", "ablation.seeds" if verb == "ablate" else "sweep.seeds", given)
    from dlfer.study.ablation import ABLATION
    from dlfer.study.sweep import SWEEP

    rules = ABLATION if verb == "ablate" else SWEEP
    try:
        return Study(rules.start(_to_source(experiment), given, seeds=seeds, workers=workers))
    except TrainingStopped as stop:
        return Study(_return_on_time(stop))


def _check_double(name: str, key: str, options: RunOptions) -> None:
    dotted = find_override(options.overrides, key)
    if dotted is not None:
        raise UserError(f"{name}: found with {dotted} in overrides, which gives {key}, too; leave one of them out.")


def _start(verb: str, callbacks: Iterable[Listener] = ()) -> tuple[Listener, ...]:
    """Prepare this process for a training, and return the callbacks as a tuple after checking that they are listeners.

    Raises:
        UserError: a callback is not an instance of `Listener`.
        EnvironmentProblem: this process belongs to a cluster of several hosts.
    """
    from dlfer.train.progress import check_alone

    hush_libraries()
    check_alone(f"{verb} (from Python)")
    callbacks = tuple(callbacks)
    for callback in callbacks:
        if not isinstance(callback, Listener):
            raise UserError(
                f"callbacks: found {callback!r:.80}, expected objects of classes derived from dlfer.Listener. Write "
                "class MyCallback(dlfer.Listener), and pass MyCallback(), not the class."
            )
    return callbacks


def _make_options(verb: str, overrides: Mapping[str, Any] | None, options: Mapping[str, Any]) -> RunOptions:
    unknown = [name for name in options if name not in RunKeywords.__annotations__]
    if unknown:
        raise TypeError(
            f"dlfer.{verb}() got unexpected keyword arguments: {', '.join(unknown)}; expected "
            f"{', '.join(RunKeywords.__annotations__)}, and keys of the experiment in overrides={{'finetune.epochs': 3}}."
        )
    check_overrides(overrides)
    given = {**options, "out": _to_path(options.get("out")), "max_hours": _check_hours(options.get("max_hours"))}
    return RunOptions(overrides={} if overrides is None else overrides, **given)


def _check_hours(hours: float | None) -> float | None:
    if hours is not None and not hours > 0:
        raise UserError(f"max_hours: found {hours!r}, expected more than 0.")
    return hours


def _check_count(name: str, count: int | None) -> int | None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise UserError(f"{name}: found {count!r}, expected a whole number from 1.")
    return count


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    """Return the seeds as ints.

    Raises:
        UserError: there are none, one is not an integer from 0, or one is repeated: its training would count twice.
    """
    expected = f"seeds: found {seeds!r}, expected different whole numbers from 0, e.g. [0, 1, 2]."
    try:
        found = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise UserError(expected) from error
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise UserError(expected)
    return found


def _return_on_time(stop: TrainingStopped) -> Path:
    """Return the folder of the run or study if `max_hours` stopped it, as requested; otherwise raise `stop`."""
    if stop.reason != "--max-hours" or stop.folder is None:
        raise stop
    return stop.folder


def _to_source(experiment: Experiment) -> Any:
    return Path(experiment) if isinstance(experiment, os.PathLike) else experiment


def _to_path(path: str | os.PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _to_name(model: str | os.PathLike | RunResult) -> str:
    return str(model.folder if isinstance(model, RunResult) else os.fspath(model))
