"""The execution of a comparison: run its members here or as tasks of a job array, then write its table and report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlfer.config.load import compute_digest, load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, DlferError, ResumeError, TrainingStopped, UserError
from dlfer.experiment.limits import refuse_obstacles
from dlfer.experiment.session import create_member_run, make_smoke_config
from dlfer.metrics.learned import list_verdicts
from dlfer.report.comparison import write_comparison_report
from dlfer.report.page import format_percent
from dlfer.runs.changes import check_changes_since_start, flatten, list_unplanned, load_start
from dlfer.runs.comparison_record import ComparisonRecord
from dlfer.runs.find import default_runs_folder, open_run
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import is_run, write_member_rows
from dlfer.runs.run import Run, create_run, format_duration, format_utc_now
from dlfer.study.child import WorkerSlot, find_slots, make_slots
from dlfer.study.members import (
    Member,
    Plan,
    describe_pretraining,
    describe_process,
    explain_members,
    open_shared_run,
    read_member_index,
    read_members,
)
from dlfer.study.runner import Ending, Runner, Source, StudyConsole, Task
from dlfer.train.progress import StopControl

_SHARED = "shared-"
_MAX_KEYS = 5


@dataclass(frozen=True)
class Rules:
    """The rules of one kind of comparison.

    Attributes:
        section: section of the experiment with the seeds, "ablation" or "sweep"; "cross_validation", which has none.
        plan: function (experiment, its file, whether it is a smoke run) -> plan; raises ConfigError if impossible.
        conclude: function that returns the record for comparison.json.
        show: function that prints this record.
        prepare: function called before a member starts, which may set its late keys; returns whether the member can
            start now, and raises DlferError if it never can.
        shares_processes: whether one process trains several members in turn, which loads framework and data only once
            but accumulates leaked memory; for a few members that differ little.
    """

    section: str
    plan: Callable[[ExperimentConfig, object, bool], Plan]
    conclude: Callable[[Comparison], ComparisonRecord]
    show: Callable[[ComparisonRecord, StudyConsole], None]
    prepare: Callable[[Comparison, Member], bool] = lambda comparison, member: True
    shares_processes: bool = False

    def start(
        self,
        experiment: Path | str | ExperimentConfig,
        options: RunOptions,
        *,
        seeds: Sequence[int] | None = None,
        workers: int | None = None,
        array: ArrayTask | None = None,
    ) -> Path | None:
        """Start the comparison of an experiment, or execute one task of its job array.

        Args:
            experiment: a file, or an experiment that was loaded from one.
            seeds: seeds to use instead of those in the file.
            workers: number of members that train at a time; None: one for each GPU, or one without GPUs.
            array: run one member in a shared folder of runs, or collect the finished ones there; None: run all here.

        Returns:
            The folder of the comparison, or of the one member; None for a dry run.

        Raises:
            ConfigError: the experiment lacks what this kind of comparison needs.
            Others: those of `run_comparison`, `run_one_member` and `collect_comparison`.
        """
        own_seeds = {} if seeds is None else {f"{self.section}.seeds": list(seeds)}
        config = load_experiment(experiment, {**options.overrides, **own_seeds})
        refuse_obstacles(config, experiment, kind=self.section, smoke=options.smoke, out=options.out)
        plan = self.plan(config, experiment, options.smoke)
        if options.dry_run:
            explain_members(config, plan, options)
            return None
        folder = options.out or default_runs_folder()

        def create(folder: Path) -> Run:
            run = create_run(folder, config, argv=list(options.argv), kind=plan.kind)
            run.update(smoke=options.smoke, use_cache=options.use_cache)
            return run

        if array is None:
            run = create(folder)
            return run_comparison(Comparison(run, config, plan), options, workers=workers, rules=self)
        index = None if array.member is None else read_member_index(array.member, len(plan.make_members()))
        name = self._choose_shared_name(folder / config.experiment.name, config, plan, smoke=options.smoke)
        run = open_shared_run(folder, config.experiment.name, name, create)
        comparison = Comparison(run, config, plan)
        if index is None:
            return collect_comparison(comparison, rules=self)
        return run_one_member(comparison, index, options, rules=self)

    def _choose_shared_name(self, folder: Path, config: ExperimentConfig, plan: Plan, *, smoke: bool) -> str:
        """Return the name of the shared directory, derived from the plan so that all tasks use the same one.

        Earlier versions derived it from the experiment alone; such a directory is continued if its plan is the same.
        """
        digest, end = plan.compute_digest(config), f"{'-smoke' if smoke else ''}-{plan.kind}"
        former = folder / f"{_SHARED}{compute_digest(config)[:8]}{end}"
        if is_run(former):
            began = Run(former).config()
            if self.plan(began, former, smoke).compute_digest(began) == digest:
                return former.name
        return f"{_SHARED}{digest[:8]}{end}"

    def resume(self, run: Path | str, options: RunOptions, *, workers: int | None = None) -> Path:
        """Resume a comparison and return its folder: keep finished members, continue the others from their checkpoints.

        Raises:
            Those of `run_comparison`; ResumeError also if the experiment or the software has changed since it began.
        """
        opened = open_run(run, options.out)
        if opened.status != "finished":
            check_changes_since_start(opened, accept=options.accept_changes)
        plan = self.plan(opened.config(), opened.path, opened.is_smoke)
        return run_comparison(Comparison(opened, opened.config(), plan), options, workers=workers, rules=self)


@dataclass(frozen=True)
class ArrayTask:
    """The task of this process in a comparison whose members are run by a job array.

    Attributes:
        member: number of the member to run, or "auto" for the task index of the scheduler; None: run none, but collect
            those that have finished.
    """

    member: str | None


@dataclass
class Comparison:
    """A comparison in progress.

    Attributes:
        run: directory of the comparison itself.
        config: experiment that is varied.
        plan: plan of its members.
        console: console for messages and progress.
        members: members as recorded in members.csv, or in a shared comparison as found in their run directories.
    """

    run: Run
    config: ExperimentConfig
    plan: Plan
    console: StudyConsole = field(default_factory=StudyConsole)
    members: list[Member] = field(init=False)

    def __post_init__(self) -> None:
        self.members = self._find_members() if self.is_shared else read_members(self.run, self.plan)

    @property
    def is_shared(self) -> bool:
        """Whether the members are run by independent processes, the tasks of a job array."""
        return self.run.path.name.startswith(_SHARED)

    @property
    def hint(self) -> str:
        """The command that resumes the comparison after a stop."""
        return f"dlfer {self.plan.verb} --resume {shlex.quote(str(self.run.path))}"

    def save(self) -> None:
        """Write members.csv."""
        write_member_rows(self.run.path, [member.as_row() for member in self.members])

    def get_position(self, member: Member) -> str:
        """Return the position of a member among all, such as "[2/6]"."""
        return f"[{self.members.index(member) + 1}/{len(self.members)}]"

    def create_member_run(self, member: Member) -> None:
        """Create the member's run directory in the folder of runs of the comparison, as a smoke run if that is one."""
        record, config, folder = self.run.record, member.make_config(self.config), self.run.path.parent.parent
        options = RunOptions(smoke=self.run.is_smoke, use_cache=record.use_cache, argv=tuple(record.argv))
        siblings = [Path(other.path) for other in self.members if other.path]
        if self.is_shared:
            name = self._get_shared_name(member)
            create = lambda draft: create_member_run(config, options, draft, siblings=siblings, study=self.run.path)  # noqa: E731
            run = open_shared_run(folder, config.experiment.name, name, create)
            self._refuse_foreign(member, run)  # another process may have created it
        else:
            run = create_member_run(config, options, folder, siblings=siblings, study=self.run.path)
        member.path = str(run.path.resolve())

    def _get_shared_name(self, member: Member) -> str:
        return f"{self.run.path.name}-{self.members.index(member)}"

    def _find_members(self) -> list[Member]:
        self.members = self.plan.make_members()
        for member in self.members:
            name = member.make_config(self.config).experiment.name
            path = self.run.path.parent.parent / name / self._get_shared_name(member)
            if is_run(path):
                self._refuse_foreign(member, Run(path))
                member.path = str(path.resolve())
                member.status = member.run.status
                if member.status == "failed":
                    member.fail(member.run.record.error or "no reason given")
        return self.members

    def _refuse_foreign(self, member: Member, run: Run) -> None:
        """Copy the late keys of a run to its member, and raise UserError if the run is not as planned."""
        late, began = self.plan.late_keys.get(member.arm, ()), load_start(run)
        if late and began is not None:
            values = flatten(began.model_dump(mode="json"))
            member.overrides |= {key: values[key] for key in late}
        planned = member.make_config(self.config)
        if self.run.is_smoke:
            planned, _ = make_smoke_config(planned)
        found = list_unplanned(run, planned, study=self.run)
        if found:
            shown = "; ".join(found[:_MAX_KEYS]) + (f"; and {len(found) - _MAX_KEYS} more" if found[_MAX_KEYS:] else "")
            raise UserError(
                f"{run.path}: found a run of another comparison where member {self.members.index(member)} ({member.title}) "
                f"of {self.run.path.name} is expected; planned -> found: {shown}. Move this folder away, or choose "
                "another folder of runs by --out."
            )


class MemberSource(Source):
    """A source of the members of a comparison for the runner.

    Args:
        comparison: the comparison.
        members: members to run.
        rules: rules of this kind of comparison.
        num_slots: number of members that train at a time.
        save: whether to keep members.csv up to date; only one process at a time may do so.
    """

    def __init__(
        self, comparison: Comparison, members: Sequence[Member], *, rules: Rules, num_slots: int, save: bool = True
    ) -> None:
        self.comparison, self.rules, self.num_slots, self.is_saved = comparison, rules, num_slots, save
        self.waiting = list(members)
        self.active: dict[Task, Member] = {}
        self.seconds: list[float] = []
        self.is_users_fault = False

    def take(self, slot: WorkerSlot) -> Task | None:
        """Return a task for the next member; those that need an EF-FER1 which another member is training come last."""
        ready = [member for member in list(self.waiting) if self._is_ready(member)]
        ready.sort(key=self._waits_for_pretraining)
        for member in ready:
            self.waiting.remove(member)
            try:
                if not member.path:
                    self.comparison.create_member_run(member)
            except DlferError as error:
                self.is_users_fault = isinstance(error, UserError)
                self._fail(member, str(error))
                continue
            return self._make_task(member, slot)
        return None

    def end(self, task: Task, ending: Ending) -> None:
        """Record how a member ended, print it, and write members.csv."""
        comparison, member = self.comparison, self.active.pop(task)
        if ending.status == "failed":
            self.is_users_fault = ending.is_users
            self._fail(member, ending.error if ending.kind in ("", "Killed") else f"{ending.kind}: {ending.error}")
            return
        member.status, member.error = ending.status, ""
        if ending.status == "finished":
            self.seconds += [ending.seconds] if ending.seconds else []
            value = format_percent(member.metrics.validation.accuracy.value)
            comparison.console.say(f"{task.title}: validation {value}{self._describe_left()}")
        self._save()

    def _make_task(self, member: Member, slot: WorkerSlot) -> Task:
        comparison, title = self.comparison, f"{self.comparison.get_position(member)} {member.title}"
        comparison.console.say(f"\n{title}{f' ({slot.name})' if slot.name else ''}")
        member.status = "running"
        self._save()

        process_key = describe_process(member.run.config()) if self.rules.shares_processes else ""
        task = Task(title, member.run, process_key=process_key)
        self.active[task] = member
        return task

    def _is_ready(self, member: Member) -> bool:
        try:
            return bool(member.path) or self.rules.prepare(self.comparison, member)
        except DlferError as error:
            self.waiting.remove(member)
            self._fail(member, str(error))
            return False

    def _waits_for_pretraining(self, member: Member) -> bool:
        under_way = [
            describe_pretraining(m.run.config()) for task, m in self.active.items() if task.stage != "finetune"
        ]
        wanted = describe_pretraining(member.make_config(self.comparison.config)) if under_way else None
        return wanted is not None and wanted in under_way

    def _fail(self, member: Member, error: str) -> None:
        member.fail(error)
        self.comparison.console.say(f"{self.comparison.get_position(member)} {member.title} failed: {error}")
        self._save()

    def _save(self) -> None:
        if self.is_saved:
            self.comparison.save()

    def _describe_left(self) -> str:
        num_left = len(self.waiting) + len(self.active)
        if not num_left or not self.seconds:
            return ""
        seconds = sum(self.seconds) / len(self.seconds) * num_left / self.num_slots
        return f"; about {format_duration(seconds)} left for {num_left} more"


def run_one_member(comparison: Comparison, index: int, options: RunOptions, *, rules: Rules) -> Path:
    """Run one member of a shared comparison, as a task of a job array; return the member's directory.

    A finished member is left unchanged, and an interrupted one continues from its checkpoint.

    Raises:
        ConfigError: the member depends on others that have not finished.
        TrainingStopped: a stop was requested, as in `dlfer run`.
        DlferError: it failed; a UserError if the user has to correct something.
    """
    member, control = comparison.members[index], StopControl(options.max_hours)
    if not member.path and not rules.prepare(comparison, member):
        raise ConfigError(
            f"--member {index}: {member.title} needs a finished member of another arm, which is not there yet. Run it when "
            "the others are done."
        )
    source = MemberSource(comparison, [member], rules=rules, num_slots=1, save=False)
    hint = f"the same command: dlfer {comparison.plan.verb} ... --member {index}"
    with control.watch_signals():
        Runner(
            make_slots(1, []),
            control,
            comparison.console,
            hint,
            options.require_gpu,
            accept_changes=options.accept_changes,
        ).run(source)
    if member.status == "failed":
        kind = UserError if source.is_users_fault else DlferError
        raise kind(f"{member.title} failed: {member.error}")
    comparison.console.say("When all members are done, on any machine: the command without --member, with --collect.")
    return Path(member.path)


def run_comparison(comparison: Comparison, options: RunOptions, *, workers: int | None, rules: Rules) -> Path:
    """Run the unfinished members, write comparison.json and the report, and print the table; return the folder.

    The arguments are those of `Rules.start`.

    Raises:
        ModelError: another process works on this comparison.
        TrainingStopped: a stop was requested; the report has the members finished so far, and the rest can be resumed.
        DlferError: members failed; the others were run.
    """
    run, control, started = comparison.run, StopControl(options.max_hours), time.monotonic()
    slots = find_slots(workers, comparison.config)
    unfinished = [member for member in comparison.members if member.status != "finished"]
    source = MemberSource(comparison, unfinished, rules=rules, num_slots=len(slots))
    with run.hold(), control.watch_signals():
        comparison.save()
        run.update(status="running")
        try:
            is_proven = len(unfinished) < len(comparison.members)
            Runner(
                slots,
                control,
                comparison.console,
                comparison.hint,
                options.require_gpu,
                accept_changes=options.accept_changes,
                is_proven=is_proven,
            ).run(source)
            report, ended = _write_results(comparison, rules, _tell_status(comparison))
        except ResumeError:
            run.stop("changes since it began")
            raise
        except (TrainingStopped, KeyboardInterrupt) as stop:
            ended = None
            if any(member.status == "finished" for member in comparison.members):
                _, ended = _write_results(comparison, rules, "stopped")
            run.stop(stop.reason if isinstance(stop, TrainingStopped) else "Ctrl-C", at=ended)
            if isinstance(stop, TrainingStopped):
                stop.folder = run.path
            comparison.console.say(f"Continue with: {comparison.hint}")
            raise
        except BaseException as error:
            run.fail(error)
            raise
        comparison.console.say(f"report: {report}")
        run.log(f"{comparison.plan.kind}_end", seconds=time.monotonic() - started, workers=len(slots))
        _raise_failures(comparison, ended)
        run.finish(at=ended)
    return run.path


def collect_comparison(comparison: Comparison, *, rules: Rules) -> Path:
    """Write comparison.json and the report of the members finished so far, without waiting; print which are missing.

    Raises:
        ModelError: another process works on this comparison.
        DlferError: members failed.
    """
    run, say = comparison.run, comparison.console.say
    with run.hold():
        comparison.save()
        report, ended = _write_results(comparison, rules, _tell_status(comparison))
        missing = [member for member in comparison.members if member.status not in ("finished", "failed")]
        if missing:
            say(f"{len(missing)} of {len(comparison.members)} members are not finished:")
        for member in missing:
            command = f"dlfer {comparison.plan.verb} ... --member {comparison.members.index(member)}"
            say(f"  {command}    {member.title}: {member.status}")
        say(f"report: {report}")
        _raise_failures(comparison, ended)
        if missing:
            run.stop("members that are missing", at=ended)
        else:
            run.finish(at=ended)
    return run.path


def _tell_status(comparison: Comparison) -> str:
    """Return the status of the comparison that follows from its members: "failed", "finished" or "stopped"."""
    statuses = {member.status for member in comparison.members}
    if "failed" in statuses:
        return "failed"
    return "finished" if statuses == {"finished"} else "stopped"


def _write_results(comparison: Comparison, rules: Rules, status: str) -> tuple[Path, str]:
    """Write and print the results; return the path of the report, and the time to record as the end.

    The report shows the new status but is written before its record, so that no comparison finishes without a report.
    """
    found, ended = rules.conclude(comparison), format_utc_now()
    found.write(comparison.run.path)
    report = write_comparison_report(comparison.run.path, ending={"status": status, "finished": ended})
    comparison.console.say("")
    rules.show(found, comparison.console)
    return report, ended


def show_verdicts(found: ComparisonRecord, console: StudyConsole, *, most: int, style: str | None = "bold") -> None:
    """Print the first `most` verdicts (in red where a training did not learn) and the notes of a comparison."""
    for text, is_failed in list_verdicts(found.paired[:most]):
        console.say(text, style="bold red" if is_failed else style)
    if len(found.paired) > most:
        console.say(f"... and {len(found.paired) - most} more comparisons in the report.")
    for note in found.notes:
        console.say(note)


def _raise_failures(comparison: Comparison, ended: str) -> None:
    failed: Sequence[Member] = [member for member in comparison.members if member.status == "failed"]
    if failed:
        listed = "; ".join(f"{member.title}: {member.error.rstrip('.')}" for member in failed)
        error = DlferError(
            f"{len(failed)} of {len(comparison.members)} members failed: {listed}. Run them again: {comparison.hint}"
        )
        comparison.run.fail(error, at=ended)
        raise error
