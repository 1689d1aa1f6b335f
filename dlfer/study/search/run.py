"""The work of `dlfer search`: run the trials of each arm, then the winners, on one machine or several with one storage.

Its output is members.csv, the best experiments, the comparison of the winners, and the report.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from dlfer.config.load import compute_digest, dump_experiment, load_experiment, load_recorded_experiment, with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.variations import sort_keys
from dlfer.errors import DlferError, ModelError, ResumeError, TrainingStopped, UserError
from dlfer.experiment.limits import refuse_obstacles
from dlfer.experiment.session import create_member_run
from dlfer.report.page import format_overrides, format_value
from dlfer.report.search import write_search_report
from dlfer.runs.changes import check_changes_since_start
from dlfer.runs.comparison_record import ComparisonRecord, WinnerRun
from dlfer.runs.files import write_atomically
from dlfer.runs.find import default_runs_folder, open_run
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import MemberRow, is_run, read_member_rows, write_member_rows
from dlfer.runs.records import SearchOptionsRecord
from dlfer.runs.run import CONFIG_FILE, Run, create_run
from dlfer.study.ablation import WITH, WITHOUT, compare_arms, show_comparison
from dlfer.study.child import WorkerSlot, find_slots
from dlfer.study.members import Member, group_finished, open_shared_run
from dlfer.study.runner import Ending, Runner, Source, StudyConsole, Task
from dlfer.study.search.engine import Engine, check_same_experiment, find_best, list_dimensions
from dlfer.study.search.trials import Arm, TrialSource, find_trial_run, list_arms
from dlfer.train.progress import StopControl

ORIGINAL_FILE = "engine/experiment.yaml"
"""Path, relative to the search's folder, of a copy of the experiment as the search began with it."""
_FILES_LOCK = ".results.lock"

Trials = Mapping[str, tuple[Arm, Sequence[MemberRow]]]
"""Name of an arm -> the arm and the rows of its trials."""


@dataclass(frozen=True)
class SearchOptions:
    """The options of `dlfer search` besides those of a run.

    Attributes:
        trials: maximum number of trials per arm on all machines together; None: search.trials.
        workers: number of trials run at a time; None: one for each GPU, or one without GPUs.
        ablation: whether to tune with EF-FER1 and without, and to compare the winners.
        storage: URL of a database, or journal file, that several machines share; None: only this process searches.
    """

    trials: int | None = None
    workers: int | None = None
    ablation: bool = False
    storage: str | None = None


@dataclass
class Search:
    """A search in progress.

    Attributes:
        run: directory of the search.
        config: experiment with its section `search`.
        options: options of the run.
        search_options: options of the search.
        control: stop control that is polled.
        console: console for messages and progress.
        engines: name of an arm that has begun -> the arm and its engine.
    """

    run: Run
    config: ExperimentConfig
    options: RunOptions
    search_options: SearchOptions
    control: StopControl
    console: StudyConsole
    engines: dict[str, tuple[Arm, Engine]] = field(default_factory=dict)

    @property
    def is_shared(self) -> bool:
        """Whether several machines may share this search."""
        return self.search_options.storage is not None

    @property
    def hint(self) -> str:
        """The command that resumes the search after a stop."""
        return "the same command" if self.is_shared else f"dlfer search --resume {shlex.quote(str(self.run.path))}"

    def list_trials(self) -> Trials:
        """Return the trials of all arms that have begun."""
        return {name: (arm, engine.list_records()) for name, (arm, engine) in self.engines.items()}

    def write(self) -> None:
        """Write members.csv and the best experiments; machines that share the search write one at a time."""
        with self._hold_files():
            write_results(self.run, self.config, self.list_trials())

    def conclude(self) -> None:
        """Write all files and the report, and print the best trials."""
        with self._hold_files():
            trials = self.list_trials()
            write_results(self.run, self.config, trials)
            conclude(self.run, self.config, trials, self.console)

    def count_elsewhere(self) -> int:
        """Return the number of running or waiting trials; once this process runs none, these belong to others."""
        rows = [row for _, rows in self.list_trials().values() for row in rows]
        return sum(row.status in ("running", "waiting") for row in rows)

    def make_runner(self) -> Runner:
        """Return the runner for this machine."""
        slots = find_slots(self.search_options.workers, self.config)
        options = self.options
        return Runner(
            slots, self.control, self.console, self.hint, options.require_gpu, accept_changes=options.accept_changes
        )

    def _hold_files(self) -> contextlib.AbstractContextManager:
        # The lock covers reading and writing, so the last process to write has the latest trials.
        return FileLock(self.run.path / _FILES_LOCK) if self.is_shared else contextlib.nullcontext()


def run_search(
    experiment: Path | str | ExperimentConfig, options: RunOptions, search_options: SearchOptions
) -> Path | None:
    """Search the space of an experiment; return the search's folder (None for a dry run).

    With a storage, every machine runs the same command, which ends when all trials have begun and its own have ended.
    The last process to end writes complete results; with `ablation` it also trains and evaluates the winners.

    Raises:
        UserError: the file, space, storage or environment is wrong, or the first trials fail for such a reason.
        TrainingStopped: Ctrl-C, SIGTERM or --max-hours; the best trials so far are printed, and the search can resume.
        DlferError: the first trials fail for the same reason.
    """
    config = load_experiment(experiment, options.overrides)
    refuse_obstacles(config, experiment, kind="search", smoke=options.smoke, out=options.out)
    arms = list_arms(config, ablation=search_options.ablation)
    console = StudyConsole()
    if options.dry_run:
        explain_search(config, arms, options, search_options, console)
        return None
    if search_options.storage is not None:
        return _run_shared(config, arms, options, search_options, console)
    with tempfile.TemporaryDirectory() as folder:
        arms[0].open_engine(Path(folder), trials=search_options.trials, smoke=options.smoke)
    run = _create_run(options.out or default_runs_folder(), config, options, search_options)
    write_atomically(run.path / ORIGINAL_FILE, (run.path / CONFIG_FILE).read_bytes())
    search = Search(run, config, options, search_options, StopControl(options.max_hours), console)
    return _execute(search, arms)


def resume_search(
    folder: Path | str, options: RunOptions, search_options: SearchOptions, *, file: Path | str | None = None
) -> Path:
    """Resume a search: keep trials that have ended, and continue interrupted ones from their checkpoints.

    `file` is the experiment file, if it is given again; it must not have changed.

    Raises:
        ConfigError: the experiment or its space differs from what the search began with; the message lists how.
    """
    run = open_run(folder, options.out)
    record = run.record
    began = record.search or SearchOptionsRecord()
    if began.storage or search_options.storage:
        raise UserError(f"{run.path}: several machines share this search; continue it with the command that began it.")
    if began.engine is None:
        raise ModelError(
            f"{run.path}: an earlier version of dlfer began this search and cannot be resumed; start a new one."
        )
    if run.status != "finished":
        check_changes_since_start(run, accept=options.accept_changes)
    config = check_same(run, None if file is None else load_experiment(file, options.overrides))
    options = replace(options, out=run.path.parent.parent, smoke=run.is_smoke, use_cache=record.use_cache, overrides={})
    trials = search_options.trials if search_options.trials is not None else began.trials
    search_options = replace(search_options, ablation=began.ablation, trials=trials)
    search = Search(run, config, options, search_options, StopControl(options.max_hours), StudyConsole())
    return _execute(search, list_arms(config, ablation=search_options.ablation))


def _run_shared(
    config: ExperimentConfig, arms: list[Arm], options: RunOptions, search_options: SearchOptions, console: StudyConsole
) -> Path:
    """Take part in a search with a shared storage; all processes with the same folder of runs share one directory."""
    # Before creating a directory, check that the storage is reachable and belongs to this experiment.
    for arm in arms:
        _open_engine(arm, Path(), options, search_options)
    digest = compute_digest(with_overrides(config, {"search.trials": None}))[:8]
    run = open_shared_run(
        options.out or default_runs_folder(),
        config.experiment.name,
        f"shared-{digest}{'-smoke' if options.smoke else ''}-search",
        lambda folder: _create_run(folder, config, options, search_options),
    )
    options = replace(options, out=run.path.parent.parent)
    search = Search(run, config, options, search_options, StopControl(options.max_hours), console)
    return _execute(search, arms)


def _execute(search: Search, arms: list[Arm]) -> Path:
    run = search.run
    # Processes that share a storage also share the directory, so it is not locked.
    with contextlib.nullcontext() if search.is_shared else run.hold(), search.control.watch_signals():
        run.update(status="running", search=_describe(search.config, search.search_options))
        try:
            for arm in arms:
                _run_arm(search, arm)
            elsewhere = search.count_elsewhere()
            if search.search_options.ablation and not elsewhere:
                _compare_winners(search)
        except TrainingStopped as stop:
            if not search.is_shared or not search.count_elsewhere():
                run.stop(stop.reason)
            stop.folder = run.path
            search.conclude()
            search.console.say(f"Stopped by {stop.reason}. Continue with: {search.hint}")
            raise
        except ResumeError:
            run.stop("changes since it began")
            raise
        except BaseException as error:
            run.fail(error)
            if isinstance(error, DlferError):
                search.conclude()  # the trials have results, even if a winner's training failed
            raise
        if elsewhere:
            search.console.say(
                f"Trials that are not finished elsewhere: {elsewhere}. The process that ends last completes the results, or the "
                "same command once more."
            )
        else:
            run.finish()
        search.conclude()
    return run.path


def _run_arm(search: Search, arm: Arm) -> None:
    """Run the trials of one arm."""
    engine = _open_engine(arm, search.run.path, search.options, search.search_options)
    search.engines[arm.name] = (arm, engine)
    if search.search_options.ablation:
        search.console.say(f"{arm.name}:")
    source = TrialSource(
        engine, arm, search.run.path, options=search.options, console=search.console, on_change=search.write
    )
    search.make_runner().run(source)


def _compare_winners(search: Search) -> None:
    """Train and evaluate the winners; if several machines end at the same time, only one does."""
    run, is_shared = search.run, search.is_shared
    try:
        with run.hold() if is_shared else contextlib.nullcontext():
            search.write()
            trials = search.list_trials()
            compare_winners(run, search.config, trials, options=search.options, runner=search.make_runner())
    except ModelError:
        if not is_shared or not run.is_held():
            raise
        search.console.say("Another process trains and evaluates the best trials.")


def _open_engine(arm: Arm, folder: Path, options: RunOptions, search_options: SearchOptions) -> Engine:
    return arm.open_engine(folder, trials=search_options.trials, smoke=options.smoke, storage=search_options.storage)


def _create_run(folder: Path, config: ExperimentConfig, options: RunOptions, search_options: SearchOptions) -> Run:
    run = create_run(folder, config, argv=list(options.argv), kind="search")
    run.update(smoke=options.smoke, use_cache=options.use_cache, search=_describe(config, search_options))
    return run


def _describe(config: ExperimentConfig, options: SearchOptions) -> SearchOptionsRecord:
    """Return the search options for run.json, without the URL of the storage because it may hold a password."""
    return SearchOptionsRecord(
        ablation=options.ablation,
        trials=options.trials,
        storage=options.storage is not None,
        engine=config.search.engine,
    )


def explain_search(
    config: ExperimentConfig, arms: list[Arm], options: RunOptions, search_options: SearchOptions, console: StudyConsole
) -> None:
    """Print what a search would do, without training."""
    search = config.search
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            engine = arm.open_engine(Path(folder), trials=search_options.trials, smoke=options.smoke)
            count = engine.count_trials()
            first = engine.ask("plan").proposal
        console.say(f"{arm.name}: {search.engine}, {count or '?'} trials at most, {search.objective} on validation")
        for dimension in list_dimensions(arm.config.search):
            console.say(f"  {dimension}")
        if first is not None:
            console.say(f"  first trial: {format_overrides(first.settings)}")
        retrained = [key for key in arm.config.search.space if key.split(".")[0] in ("model", "pretrain")]
        if arm.config.pretrain is not None and arm.config.pretrain.weights is None and retrained:
            console.say(f"  EF-FER1 is trained again for each setting of {', '.join(retrained)}.")


def write_results(run: Run, config: ExperimentConfig, trials: Trials) -> None:
    """Write members.csv and the best experiments; keep the rows of winners, which are not trials."""
    winners = [row for row in read_member_rows(run.path) if row.trial is None]
    write_member_rows(run.path, [*(row for _, rows in trials.values() for row in rows), *winners])
    for arm, rows in trials.values():
        best = find_best(rows, config.search.objective)
        if best is not None:
            write_atomically(run.path / arm.best_file, format_best(run, config, arm, best))


def format_best(run: Run, config: ExperimentConfig, arm: Arm, best: MemberRow) -> str:
    """Return the text of an experiment file that trains the best trial, ready to run."""
    keys = "".join(f"#   {key}: {format_value(value)}\n" for key, value in best.settings.items())
    header = (
        f"# The best trial of the search {run.path.parent.name}/{run.path.name}: "
        f"validation {config.search.objective} {best.score:.4f}.\n{keys}"
        "# The value is too high, because the trial was selected by it. Evaluate it on test: dlfer run THIS_FILE\n"
    )
    best_config = with_overrides(config, sort_keys({**arm.base, **best.settings, "search": None}))
    return header + dump_experiment(best_config)


def conclude(run: Run, config: ExperimentConfig, trials: Trials, console: StudyConsole) -> None:
    """Print the best trial of each arm, and write the report."""
    for arm, rows in trials.values():
        best = find_best(rows, config.search.objective)
        if best is None:
            console.say(f"{arm.name}: no trial has a score yet.")
            continue
        interval = "" if best.low is None else f" (95 % {best.low:.4f} to {best.high:.4f} over the images)"
        console.say(
            f"{arm.name}: best validation {config.search.objective} {best.score:.4f}{interval} with "
            f"{format_overrides(best.settings)}\n  dlfer run {shlex.quote(str(run.path / arm.best_file))}"
        )
    console.say(f"report: {write_search_report(run.path)}")


def check_same(run: Run, other: ExperimentConfig | None) -> ExperimentConfig:
    """Return the search's original experiment after checking that its config.yaml and `other` are the same.

    Raises:
        ConfigError: one of them differs; the message lists every such key.
    """
    original = load_recorded_experiment(run.path / ORIGINAL_FILE)
    for name, config in ((CONFIG_FILE, run.config()), ("the experiment file", other)):
        if config is not None:
            advice = "Start a new search, or set them back."
            check_same_experiment(f"{run.path}: {name}", original, config, advice=advice)
    return original


class WinnerSource(Source):
    """A source of the winners of both arms for the runner, to be trained with every seed and evaluated on test."""

    def __init__(
        self,
        run: Run,
        members: Sequence[Member],
        configs: Sequence[ExperimentConfig],
        *,
        options: RunOptions,
        console: StudyConsole,
    ) -> None:
        self.run, self.members, self.options, self.console = run, list(members), options, console
        self.waiting = list(zip(members, configs, strict=True))
        self.active: dict[Task, Member] = {}

    def take(self, slot: WorkerSlot) -> Task | None:
        """Return a task for the next winner, which reuses an existing run so that no seed is trained twice."""
        if not self.waiting:
            return None
        member, config = self.waiting.pop(0)
        if member.path:
            run = member.run
        else:
            found = (row.find_folder(self.run.path) for row in read_member_rows(self.run.path))
            siblings = [folder for folder in found if is_run(folder)]
            folder, study = self.run.path.parent.parent, self.run.path
            run = create_member_run(config, self.options, folder, siblings=siblings, study=study)
        member.path, member.status = str(run.path.resolve()), "running"
        self._save()
        is_judged = run.status == "finished" and run.record.judge_test
        self.console.say(
            f"winner {member.title}: {'is judged' if run.status == 'finished' else 'is trained and judged'} on test"
        )
        run.update(judge_test=True)
        task = Task(f"winner {member.title}", run, lambda: Ending("finished") if is_judged else None)
        self.active[task] = member
        return task

    def end(self, task: Task, ending: Ending) -> None:
        """Record how a winner ended."""
        member = self.active.pop(task)
        member.status = ending.status
        if ending.status == "failed":
            member.fail(f"{ending.kind}: {ending.error}")
        self._save()

    def _save(self) -> None:
        trials = [row for row in read_member_rows(self.run.path) if row.trial is not None]
        write_member_rows(self.run.path, [*trials, *(member.as_row() for member in self.members)])


def compare_winners(
    run: Run, config: ExperimentConfig, trials: Trials, *, options: RunOptions, runner: Runner
) -> ComparisonRecord:
    """Train the best trial of each arm with all `ablation.seeds`, evaluate each once on test, and compare the arms.

    A winner that ended at its rung of Hyperband is trained to the end.

    Raises:
        TrainingStopped: a stop was requested.
        DlferError: an arm has no winner, or a winner fails.
    """
    members = _plan_winners(run, config, trials, options)
    configs = [with_overrides(config, {**member.overrides, "experiment.seed": member.seed}) for member in members]
    runner.run(WinnerSource(run, members, configs, options=options, console=runner.console))
    failed = [member for member in members if member.status == "failed"]
    if failed:
        raise DlferError(f"The winner {failed[0].title} failed: {failed[0].error}")
    comparison = _compare(members, {arm.name: len(rows) for arm, rows in trials.values()})
    comparison.write(run.path)
    show_comparison(comparison, runner.console)
    return comparison


def _plan_winners(run: Run, config: ExperimentConfig, trials: Trials, options: RunOptions) -> list[Member]:
    seeds = config.ablation.seeds[:1] if options.smoke else config.ablation.seeds
    known = {(row.arm, row.seed): row for row in read_member_rows(run.path) if row.trial is None}
    members = []
    for seed in seeds:
        for arm, rows in trials.values():
            best = find_best(rows, config.search.objective)
            if best is None:
                raise DlferError(f"The arm {arm.name!r} has no trial with a score, so there is nothing to compare.")
            member = Member(arm.name, seed, sort_keys({**arm.base, **best.settings}))
            own = find_trial_run(rows, best.settings, run.path) if seed == config.experiment.seed else None
            row = known.get((arm.name, seed))
            begun: Path | None = own.path if own is not None else None
            if begun is None and row is not None and row.settings == member.overrides:
                begun = row.find_folder(run.path)
            member.path = str(begun) if is_run(begun) else ""
            members.append(member)
    return members


def _compare(members: list[Member], counts: Mapping[str, int]) -> ComparisonRecord:
    finished = group_finished(members)
    found = compare_arms(WITH, members)
    tuned = (
        f"Each arm stands for the best of its own search on validation, of {counts[WITH]} trials {WITH} and of "
        f"{counts[WITHOUT]} {WITHOUT}, with the same engine, seed and ranges."
    )
    changes = {
        "notes": [tuned, *found.notes],
        "winners": {arm: some[0].overrides for arm, some in finished.items()},
        "runs": [WinnerRun(arm=member.arm, seed=member.seed, run=member.run.path.name) for member in members],
    }
    return found.model_copy(update=changes)
