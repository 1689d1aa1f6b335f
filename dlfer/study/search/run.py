"""The work of `dlfer search`: arms of trials, run by workers, shown while they run, reported at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dlfer.config.load import load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.report.keys import format_overrides
from dlfer.runs.find import default_runs_folder, open_run
from dlfer.runs.options import RunOptions
from dlfer.runs.run import Run, create_run
from dlfer.study.search.arms import Arm, list_arms
from dlfer.study.search.board import Board
from dlfer.study.search.dimensions import list_dimensions
from dlfer.study.search.ending import conclude, say_unfinished
from dlfer.study.search.engine import TrialRecord
from dlfer.study.search.files import check_same, keep_original, write_files
from dlfer.study.search.live import SearchView
from dlfer.study.search.trials import TrialRunner, TrialSettings
from dlfer.study.search.worker import Source, Worker, make_worker_name
from dlfer.study.workers import list_gpu_ids, make_places
from dlfer.train.control import StopControl

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SearchOptions:
    """What `dlfer search` takes besides the options of a run.

    Attributes:
        trials: at most so many an arm, instead of search.trials.
        workers: trials at a time; None: one a GPU, or one.
        ablation: tune with EF-FER1 and without, and compare the winners.
        role: None: all on this machine; "chief" or "worker" of several.
        chief: "HOST:PORT" of the chief.
    """

    trials: int | None = None
    workers: int | None = None
    ablation: bool = False
    role: str | None = None
    chief: str = "127.0.0.1:8765"


@dataclass
class Search:
    """A search under way.

    Attributes:
        run: its directory.
        config: the experiment with its section `search`.
        options: of the run and of the search.
        control: asked whether to stop.
        view: shows it.
        arms: those that have begun, with their records.
    """

    run: Run
    config: ExperimentConfig
    options: RunOptions
    search_options: SearchOptions
    control: StopControl
    view: SearchView
    arms: dict[str, tuple[Arm, list[TrialRecord]]]

    def write(self) -> None:
        """Write all files of the search but the page."""
        write_files(self.run, self.config, self.arms)

    def make_settings(self, *, judge_test: bool = False) -> TrialSettings:
        """Return what its trials have in common."""
        return TrialSettings(
            self.run.path,
            self.config,
            self.config.search.objective,
            smoke=self.options.smoke,
            require_gpu=self.options.require_gpu,
            use_cache=self.options.use_cache,
            judge_test=judge_test,
            argv=self.options.argv,
        )


def run_search(file: Path | str, options: RunOptions, search_options: SearchOptions) -> Path | None:
    """Search the space of an experiment file; return the search's folder (None for a dry run).

    Raises:
        UserError: the file, the space or the environment is wrong, or every trial fails for such a reason.
        TrainingStopped: by Ctrl-C, SIGTERM or --max-hours; the best so far is told, the search can be resumed.
        DlferError: the first trials fail alike.
    """
    config = load_experiment(file, options.overrides)
    arms = list_arms(config, ablation=search_options.ablation)
    view = SearchView(config.search.objective)
    if options.dry_run:
        explain_search(config, arms, options, search_options, view)
        return None
    run = create_run(options.out or default_runs_folder(), config, argv=list(options.argv), kind="search")
    keep_original(run)
    run.update(
        smoke=options.smoke,
        use_cache=options.use_cache,
        search={"ablation": search_options.ablation, "trials": search_options.trials},
    )
    return _execute(run, config, options, search_options, view)


def resume_search(
    folder: Path | str, options: RunOptions, search_options: SearchOptions, *, file: Path | str | None = None
) -> Path:
    """Go on with a search: trials that ended stay, those that were interrupted continue from their checkpoints.

    Args:
        file: the experiment file again; it must not have changed.

    Raises:
        ConfigError: the experiment or its space is not what the search began with; with the differences.
    """
    run = open_run(folder, options.out)
    other = None if file is None else load_experiment(file, options.overrides)
    config = check_same(run, other)
    began = run.read_json("run.json")["search"]
    options = replace(
        options,
        out=run.path.parent.parent,
        smoke=run.is_smoke,
        use_cache=run.read_json("run.json")["use_cache"],
        overrides={},
    )
    trials = search_options.trials if search_options.trials is not None else began["trials"]
    search_options = replace(search_options, ablation=began["ablation"], trials=trials)
    return _execute(run, config, options, search_options, SearchView(config.search.objective))


def _execute(
    run: Run, config: ExperimentConfig, options: RunOptions, search_options: SearchOptions, view: SearchView
) -> Path:
    control = StopControl(options.max_hours)
    search = Search(run, config, options, search_options, control, view, {})
    with run.hold(), control.watch_signals():
        run.update(status="running", search={"ablation": search_options.ablation, "trials": search_options.trials})
        try:
            for arm in list_arms(config, ablation=search_options.ablation):
                run_arm(search, arm)
                _check_stopped(search)
            if search_options.ablation:
                from dlfer.study.search.winners import compare_winners

                compare_winners(search)
        except TrainingStopped as stop:
            run.stop(stop.reason)
            conclude(search)
            say_unfinished(search)
            view.say(f"Stopped by {stop.reason}. Go on with: dlfer search --resume {run.path}")
            raise
        except BaseException as error:
            run.fail(error)
            raise
        run.finish()
        conclude(search)
    return run.path


def run_arm(search: Search, arm: Arm) -> None:
    """Run the trials of one arm."""
    engine = arm.open_engine(search.run.path, trials=search.search_options.trials, smoke=search.options.smoke)

    def record(records: list[TrialRecord]) -> None:
        search.arms[arm.name] = (arm, records)
        search.write()
        search.view.update(records)

    board = Board(engine, search.config.search.objective, record)
    search.arms[arm.name] = (arm, board.list_records())

    def read() -> list[TrialRecord]:
        # Not from the board: a thread that has its lock may be waiting for that of the terminal, which is held here.
        return search.arms[arm.name][1]

    total, search.view.total_epochs = engine.count_trials(), engine.count_epochs()
    if search.search_options.ablation:
        search.view.say(f"{arm.name}:")
    if search.search_options.role == "chief":
        from dlfer.study.search.chief import serve

        search.view.start(arm.name, total, 1, lambda: (read(), []))
        work: Callable[[], None] = lambda: serve(search, arm, board)  # noqa: E731
    else:
        workers = make_workers(search, arm, board)
        search.view.start(arm.name, total, len(workers), lambda: (read(), [worker.progress for worker in workers]))
        work = lambda: run_workers(workers)  # noqa: E731
    try:
        work()
    finally:
        search.view.stop()
        board.close()
    check_bug(board, search)


def check_bug(board: Board, search: Search) -> None:
    """Raise the failure that is taken for a bug in the experiment.

    Raises:
        UserError: the user can mend it.
        DlferError: else.
    """
    bug = board.bug
    if bug is None:
        return
    kind = UserError if bug.is_users else DlferError
    where = f" See {search.run.path / 'trials'}/*.log." if not bug.is_users else ""
    raise kind(
        f"The experiment itself fails, with these keys or others ({format_overrides(bug.overrides)}): "
        f"{bug.error}{where} When it is mended: dlfer search --resume {search.run.path}"
    )


def make_workers(search: Search, arm: Arm, source: Source) -> list[Worker]:
    """Return the workers of this process, each with its GPU or its share of the cores."""
    places = make_places(search.search_options.workers, list_gpu_ids())
    runners = [TrialRunner(search.make_settings(), search.control, place.environment) for place in places]
    name = make_worker_name()
    return [
        Worker(f"{name}-{index}", source, runner, arm.base, search.view.say) for index, runner in enumerate(runners)
    ]


def run_workers(workers: list[Worker]) -> None:
    """Let the workers run in threads until all have ended; the first error of one stops all and is raised."""
    errors: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            worker.work()
        except BaseException as error:
            errors.append(error)
            worker.runner.control.request("an error")

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(POLL_SECONDS)
    if errors:
        raise errors[0]


def explain_search(
    config: ExperimentConfig,
    arms: list[Arm],
    options: RunOptions,
    search_options: SearchOptions,
    view: SearchView,
) -> None:
    """Say what a search would do; train nothing."""
    import tempfile

    search = config.search
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            engine = arm.open_engine(Path(folder), trials=search_options.trials, smoke=options.smoke)
            count = engine.count_trials()
            first = engine.ask("plan").proposal
        view.say(f"{arm.name}: {search.engine}, {count or '?'} trials at most, {search.objective} on validation")
        for dimension in list_dimensions(arm.config.search):
            view.say(f"  {dimension}")
        if first is not None:
            view.say(f"  first trial: {format_overrides(first.overrides)}")
        retrained = [key for key in arm.config.search.space if key.split(".")[0] in ("model", "pretrain")]
        if arm.config.pretrain is not None and arm.config.pretrain.weights is None and retrained:
            view.say(f"  EF-FER1 is trained anew for each setting of {', '.join(retrained)}.")


def _check_stopped(search: Search) -> None:
    reason = search.control.get_reason()
    if reason is not None:
        raise TrainingStopped(f"The search was stopped by {reason}.", reason=reason)
