"""The functions of `import dlfer` that train, evaluate and compare, and the runs and studies that they return.

They do what the commands of the same names do. `dlfer/__init__.py` says which names are public.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from dlfer.config.load import check_overrides, find_override, load_experiment
from dlfer.config.names import STAGES
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
"""A file, or what `load_experiment` returned."""


class RunKeywords(TypedDict, total=False):
    """Keywords that `run`, `ablate`, `sweep` and `search` share.

    Attributes:
        out: the folder of runs; by default saved_models/runs.
        smoke: do everything on two small batches; the data need not be there.
        max_hours: stop at a checkpoint after so many hours.
        require_gpu: refuse to run without a GPU.
        use_cache: take EF-FER1 from the cache if it was trained before (the default).
    """

    out: str | os.PathLike | None
    smoke: bool
    max_hours: float | None
    require_gpu: bool
    use_cache: bool


class _Directory:
    """What runs and studies have in common: the directory that they are read from."""

    def __init__(self, folder: Path | str) -> None:
        self._run = Run(Path(folder))

    @property
    def folder(self) -> Path:
        """The run directory; see the reference of files for what is in it."""
        return self._run.path

    @property
    def report(self) -> Path:
        """The path of report.html, which is written at the end."""
        return self.folder / "report.html"

    @property
    def status(self) -> str:
        """running, interrupted (its process is gone), stopped, failed or finished."""
        return self._run.status

    @property
    def kind(self) -> str:
        """run, ablation, sweep, search or cross_validation."""
        return self._run.kind

    @cached_property
    def config(self) -> ExperimentConfig:
        """The experiment in full, as it was run."""
        return self._run.config()


class RunResult(_Directory):
    """A run: what `run` returns, and `open_run` for an earlier one. Everything is read from its folder when it is asked for.

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
            ModelError: the run was not finished, so that there are none.
        """
        return require_metrics(self.folder)

    @property
    def history(self) -> dict[str, dict[str, list]]:
        """The epochs of each stage that was trained: stage -> column of history.csv -> one value an epoch.

        The stages are "pretrain" and "finetune". A loss is in nats, an accuracy in 0..1, and a value that is not finite is
        None. An ensemble has no history of its own: its members are runs with one.
        """
        found = {stage: read_history(self.folder / stage / "history.csv") for stage in STAGES}
        return {
            stage: {name: [getattr(epoch, name) for epoch in epochs] for name in Epoch.model_fields}
            for stage, epochs in found.items()
            if epochs
        }

    @cached_property
    def classifier(self) -> Engine:
        """The trained model, loaded when it is first asked for; as `load` gives it.

        Raises:
            ModelError: the run was not finished, so that there is none.
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
        """Go on from the last checkpoint; a finished run stays as it is.

        Args:
            callbacks, progress, max_hours: as `run` takes them.
            accept_changes: go on although data, experiment or software has changed; the report says so.

        Raises:
            ResumeError: something has changed, and `accept_changes` is false.

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
    """An ablation, a sweep or a search, as `ablate`, `sweep` and `search` return it; `open_run` also opens a cross-validation.

    Example:
        >>> study = dlfer.ablate("experiments/quickstart.yaml", seeds=[0, 1, 2])
        >>> print(study.comparison.paired[0].sentence)
        >>> [run.metrics.test.accuracy.value for run in study.runs]
    """

    @property
    def comparison(self) -> ComparisonRecord | None:
        """The contents of comparison.json: the table of arms or cells and the verdicts; None for a search without any."""
        return ComparisonRecord.read(self.folder)

    @property
    def members(self) -> list[MemberRow]:
        """The rows of members.csv: arm, seed, status, accuracies, settings; the trials of a search."""
        return read_member_rows(self.folder)

    @property
    def runs(self) -> list[RunResult]:
        """The runs of the members that have begun, in the order of `members`."""
        folders = (row.find_folder(self.folder) for row in self.members)
        return [RunResult(folder) for folder in dict.fromkeys(folders) if folder is not None]

    @property
    def best(self) -> dict[str, ExperimentConfig]:
        """The best experiment of each arm of a search on validation, ready for `run`; empty before a trial has a score.

        The keys are "best", or "best-<arm>" for each arm of a search with `ablation=True`. A sweep and an ablation have none.
        """
        return {path.stem: load_experiment(path) for path in sorted(self.folder.glob("best*.yaml"))}

    def resume(
        self, *, workers: int | None = None, max_hours: float | None = None, accept_changes: bool = False
    ) -> Study:
        """Go on: finished members stay, the others continue from their checkpoints. The arguments are those of `ablate`.

        Raises:
            ResumeError: data, experiment or software has changed, and `accept_changes` is false.

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
        # The trials of a search are ranked by their score, an ablation's and a sweep's members have none.
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
    """Run an experiment from data to report: EF-FER1, EF-FER2, evaluation; as the command `dlfer run` does.

    Ctrl-C, or "interrupt" in a notebook, stops at a checkpoint after the present step.

    Args:
        experiment: a file, or what `load_experiment` returned.
        overrides: dotted key -> value, as `load_experiment` takes them.
        callbacks: objects of classes derived from `Listener`; told of steps and epochs. For an ensemble, also of its members.
        progress: whether to say on stderr how it goes; warnings are shown in any case.
        **options: out, smoke, max_hours, require_gpu, use_cache; see `dlfer run --help`.

    Returns:
        The run; with `max_hours` its status may be "stopped": `run.resume()` goes on.

    Raises:
        UserError: the experiment, the data or the environment is wrong (ConfigError, DataError ...).
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` can be resumed.
        NonFiniteError: the loss became NaN or infinite.

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
    """Run an experiment with and without EF-FER1 over seeds, and compare the two; as `dlfer ablate` does.

    The members are trained in child processes that import nothing of the calling script, so that no
    `if __name__ == "__main__":` is needed.

    Args:
        experiment, overrides, **options: as `run` takes them.
        seeds: instead of ablation.seeds.
        workers: how many members train at a time; by default one for each GPU, or one.

    Raises:
        ConfigError: the experiment has no EF-FER1 to leave out.
        DlferError: a member failed; the others were run.
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` can be resumed.

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
    """Run every cell of an experiment's `sweep` over seeds, and rank them on validation; as `dlfer sweep` does.

    Args:
        experiment, overrides, **options: as `run` takes them.
        seeds: instead of sweep.seeds.
        workers: as `ablate` takes it.

    Raises:
        ConfigError: the experiment has no section `sweep`.
        DlferError: a member failed; the others were run.
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` can be resumed.

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
    """Search the space of an experiment for its best keys on validation; as `dlfer search` does. Test stays closed.

    Args:
        experiment, overrides, **options: as `run` takes them.
        trials: at most so many for each arm, instead of search.trials.
        workers: how many trials run at a time.
        ablation: tune with EF-FER1 and without, and compare the winners on test.

    Raises:
        UserError: the experiment has no `search`, or its space or engine is wrong.
        DlferError: the first trials fail alike.
        TrainingStopped: by Ctrl-C or SIGTERM; its `folder` can be resumed.

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
    """Return an earlier run, ablation, sweep, search or cross-validation.

    Args:
        name: its folder, or the beginning of its name in the folder of runs.
        out: the folder of runs; by default saved_models/runs.

    Raises:
        ModelError: there is none, or more than one.

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
    """Evaluate a trained model on other data, or a run on its own test or validation split; as `dlfer evaluate` does.

    Args:
        model: a run, the name of a model, or a folder.
        data: class folders, a csv in the layout of FER2013, a zip with either, an .npz of arrays or an experiment file; or
            (images, labels) in memory: uint8 [N, H, W] or [N, H, W, 1 or 3], and N names of the model's labels or int
            indices of them.
        split: "test", "validation" or "train", or FER2013's name of it, e.g. "PrivateTest"; by default the first of these that
            there is.
        views: test-time augmentation, e.g. ["mirror", "ten_crop"]; each in an entry of `metrics.views`.
        corrupt: also evaluate on noisy, blurred, dark and other corrupted images; slow.
        attributes: a csv with id,attribute,...: also evaluate by group.

    Returns:
        The metrics; `metrics.test` is about the images given.

    Raises:
        UserError: model or data is not found, or they do not fit.

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
    given = data if data is None or isinstance(data, tuple) else Path(data)
    return evaluate_model(_to_name(model), data=given, split=split, extras=extras)


def compare(
    *runs: str | os.PathLike | RunResult, split: str | None = None, data: str | os.PathLike | None = None
) -> ModelComparison:
    """Compare two or more finished runs and models on the same images: paired differences, and which are significant.

    Args:
        *runs: runs, their folders or the beginnings of their names; shipped models by name; or files of predictions (.npz).
        split: "test" or "validation"; by default test if all have it.
        data: labelled images that all of them predict now, as `evaluate` takes it. By default runs have their predictions,
            and models predict the data of the first run.

    Raises:
        UserError: fewer than two, or labels, targets or images do not match.

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
    """Look for duplicates, contradicting labels, empty images and outliers in arrays; as `dlfer audit` does with files.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C] with C 1 (grey) or 3 (RGB), values 0 to 255.
        labels: N names or whole numbers.
        splits: N names, e.g. "train" and "test": also look for duplicates across them (`leaks`); by default one split.
        ids: N different names of the images, by which the record names them; by default "0", "1" and so on.

    Returns:
        The record: counts such as `duplicate_groups`, `conflicting_groups` and `near_constant_images`, and the images
        themselves in `samples`, `flat` and `outliers`.

    Raises:
        DataError: the arrays are not of that form, or their lengths differ.

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
    """Do what precedes every training; return the callbacks, which must be listeners.

    Raises:
        UserError: one of the callbacks is no listener.
        EnvironmentProblem: this process is one of several hosts.
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
        UserError: there are none, one is no whole number from 0, or one stands twice: one training would pass for two.
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
    """Return the folder of what max_hours stopped, which was asked for; raise what else stopped it."""
    if stop.reason != "--max-hours" or stop.folder is None:
        raise stop
    return stop.folder


def _to_source(experiment: Experiment) -> Any:
    return Path(experiment) if isinstance(experiment, os.PathLike) else experiment


def _to_path(path: str | os.PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _to_name(model: str | os.PathLike | RunResult) -> str:
    return str(model.folder if isinstance(model, RunResult) else os.fspath(model))
