"""What a search leaves: members.csv, the best experiments, the comparison of the winners, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dlfer.config.load import dump_experiment, load_recorded_experiment, with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import DlferError
from dlfer.experiment.session import create_member_run
from dlfer.report.page import format_overrides, format_value
from dlfer.report.search import write_search_report
from dlfer.runs.comparison_record import ComparisonRecord, WinnerRun
from dlfer.runs.files import write_atomically
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import MemberRow, is_run, read_member_rows, write_member_rows
from dlfer.runs.run import CONFIG_FILE, Run
from dlfer.study.ablation import WITH, WITHOUT, compare_arms, show_comparison
from dlfer.study.child import WorkerSlot
from dlfer.study.members import Member, group_finished
from dlfer.study.runner import Ending, Runner, Source, StudyConsole, Task
from dlfer.study.search.engine import check_same_experiment, find_best
from dlfer.study.search.trials import Arm, find_trial_run

ORIGINAL_FILE = "engine/experiment.yaml"
Trials = Mapping[str, tuple[Arm, Sequence[MemberRow]]]
"""Name of an arm -> the arm and its trials."""


def write_results(run: Run, config: ExperimentConfig, trials: Trials) -> None:
    """Write members.csv and the best experiments; rows of winners, which are no trials, are kept."""
    winners = [row for row in read_member_rows(run.path) if row.trial is None]
    write_member_rows(run.path, [*(row for _, rows in trials.values() for row in rows), *winners])
    for arm, rows in trials.values():
        best = find_best(rows, config.search.objective)
        if best is not None:
            write_atomically(run.path / arm.best_file, format_best(run, config, arm, best))


def format_best(run: Run, config: ExperimentConfig, arm: Arm, best: MemberRow) -> str:
    """Return the experiment of the best trial as a file that runs as it is."""
    keys = "".join(f"#   {key}: {format_value(value)}\n" for key, value in best.settings.items())
    header = (
        f"# The best trial of the search {run.path.parent.name}/{run.path.name}: "
        f"validation {config.search.objective} {best.score:.4f}.\n{keys}"
        "# The value is too high, because the trial was selected by it. Evaluate it on test: dlfer run THIS_FILE\n"
    )
    best_config = with_overrides(config, {**arm.base, **best.settings, "search": None})
    return header + dump_experiment(best_config)


def conclude(run: Run, config: ExperimentConfig, trials: Trials, console: StudyConsole) -> None:
    """Say what was the best of each arm, and write the page."""
    for arm, rows in trials.values():
        best = find_best(rows, config.search.objective)
        if best is None:
            console.say(f"{arm.name}: no trial has a score yet.")
            continue
        interval = "" if best.low is None else f" (95 % {best.low:.4f} to {best.high:.4f} over the images)"
        console.say(
            f"{arm.name}: best validation {config.search.objective} {best.score:.4f}{interval} with "
            f"{format_overrides(best.settings)}\n  dlfer run {run.path / arm.best_file}"
        )
    console.say(f"report: {write_search_report(run.path)}")


def keep_original(run: Run) -> None:
    """Keep the experiment as the search began with it."""
    write_atomically(run.path / ORIGINAL_FILE, (run.path / CONFIG_FILE).read_text())


def check_same(run: Run, other: ExperimentConfig | None) -> ExperimentConfig:
    """Return the search's experiment, after seeing that neither its copy nor the file that was given differs.

    Raises:
        ConfigError: with every key that differs.
    """
    original = load_recorded_experiment(run.path / ORIGINAL_FILE)
    for name, config in ((CONFIG_FILE, run.config()), ("the experiment file", other)):
        if config is not None:
            advice = "Start a new search, or set them back."
            check_same_experiment(f"{run.path}: {name}", original, config, advice=advice)
    return original


class WinnerSource(Source):
    """Hands the winners of both arms to the runner: trained with every seed, and judged on test."""

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
        """Return the next winner; its run of the search is gone on with, so that its seed is not trained again."""
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
        """Note how a winner ended."""
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
    """Run the best trial of each arm with every seed of `ablation.seeds`, open test once for each, and compare.

    A winner of Hyperband that ended with its rung is trained to the end.

    Raises:
        TrainingStopped: the search was asked to stop.
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
            member = Member(arm.name, seed, {**arm.base, **best.settings})
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
    found = compare_arms(WITH, finished)
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
