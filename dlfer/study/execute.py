"""Carrying a comparison out: its members one after the other or side by side, then table and page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlfer.config.schema import ExperimentConfig
from dlfer.errors import DlferError, TrainingStopped
from dlfer.report.comparison import write_comparison_report
from dlfer.runs.comparison_record import ComparisonRecord
from dlfer.runs.find import default_runs_folder
from dlfer.runs.options import RunOptions
from dlfer.runs.run import Run, create_run
from dlfer.study.members import Member, Plan, read_members, write_members


@dataclass
class Comparison:
    """A comparison under way.

    Attributes:
        run: its own directory.
        config: the experiment.
        plan: what it runs.
        say: tells a sentence to the person who watches.
        members: as members.csv has them.
    """

    run: Run
    config: ExperimentConfig
    plan: Plan
    say: Callable[[str], None]
    members: list[Member] = field(init=False)

    def __post_init__(self) -> None:
        self.members = read_members(self.run, self.plan)

    def save(self) -> None:
        """Write members.csv."""
        write_members(self.run, self.members)

    def get_position(self, member: Member) -> str:
        """Return "[2/6]", the place of a member among all."""
        return f"[{self.members.index(member) + 1}/{len(self.members)}]"


def create_comparison_run(config: ExperimentConfig, plan: Plan, options: RunOptions) -> Run:
    """Make the directory of a comparison beside its members-to-be."""
    run = create_run(options.out or default_runs_folder(), config, argv=list(options.argv), kind=plan.kind)
    run.update(smoke=options.smoke, use_cache=options.use_cache)
    return run


def carry_out(
    comparison: Comparison,
    run_members: Callable[[Comparison], None],
    conclude: Callable[[Comparison], ComparisonRecord],
    show: Callable[[ComparisonRecord], None],
) -> Path:
    """Run what is not finished, write comparison.json and the page, show the table; return the folder.

    Args:
        run_members: runs the unfinished members; one that fails is noted, and the others are run.
        conclude: gives comparison.json.
        show: prints it.

    Raises:
        ModelError: another process works on this comparison.
        TrainingStopped: what has finished by then is in the page; the comparison can be resumed.
        DlferError: members failed; the others were run.
    """
    run = comparison.run
    with run.hold():
        comparison.save()
        run.update(status="running")
        try:
            run_members(comparison)
            report = _write_results(comparison, conclude, show)
        except (TrainingStopped, KeyboardInterrupt) as stop:
            if any(member.status == "finished" for member in comparison.members):
                _write_results(comparison, conclude, show)
            run.stop(stop.reason if isinstance(stop, TrainingStopped) else "Ctrl-C")
            raise
        except BaseException as error:
            run.fail(error)
            raise
        comparison.say(f"report: {report}")
        _raise_failures(comparison)
        run.finish()
    return run.path


def _write_results(
    comparison: Comparison, conclude: Callable[[Comparison], ComparisonRecord], show: Callable[[ComparisonRecord], None]
) -> Path:
    found = conclude(comparison)
    found.write(comparison.run.path)
    report = write_comparison_report(comparison.run.path)
    comparison.say("")
    show(found)
    return report


def _raise_failures(comparison: Comparison) -> None:
    failed: Sequence[Member] = [member for member in comparison.members if member.status == "failed"]
    if failed:
        listed = "; ".join(f"{member.title}: {member.error.rstrip('.')}" for member in failed)
        error = DlferError(
            f"{len(failed)} of {len(comparison.members)} members failed: {listed}. "
            f"Run them again with --resume {comparison.run.path}"
        )
        comparison.run.fail(error)
        raise error
