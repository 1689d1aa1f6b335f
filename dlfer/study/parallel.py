"""Running the members of a comparison in processes of their own, as many at a time as there are places."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.experiment.smoke import make_smoke_config
from dlfer.report.page import format_percent
from dlfer.runs.run import RUN_FILE, create_run
from dlfer.study.execute import Comparison
from dlfer.study.members import Member
from dlfer.study.workers import Place, describe_exit, start_child, stop_children
from dlfer.train.control import StopControl

POLL_SECONDS = 0.2
LOG_FILE = "console.txt"
"""What a member says when several train at a time; one alone talks to the terminal."""


@dataclass
class _Pool:
    """The members that wait, and those that train now.

    Attributes:
        active: place -> (member, its process).
        waiting: in the order in which they begin.
        started: when each that trains now began.
        seconds: what each that finished took.
        has_said: titles of members for whose end in another process we wait.
    """

    comparison: Comparison
    places: list[Place]
    require_gpu: bool
    waiting: list[Member]
    active: dict[Place, tuple[Member, subprocess.Popen]] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    has_said: set[str] = field(default_factory=set)


def run_in_processes(
    comparison: Comparison, places: list[Place], control: StopControl, *, require_gpu: bool = False
) -> None:
    """Run every member that is not finished; one that fails is noted, and the others are run.

    Raises:
        TrainingStopped: all that trained have stopped at a checkpoint.
        UserError: before any member finished, two were refused for the very same reason: it is the
            experiment's, and the others would fail alike.
    """
    waiting = [member for member in comparison.members if member.status != "finished"]
    pool = _Pool(comparison, places, require_gpu, waiting)
    try:
        while pool.waiting or pool.active:
            reason = control.get_reason()
            if reason is not None:
                raise TrainingStopped(f"stopped by {reason}", reason=reason)
            _fill(pool)
            _collect(pool)
            time.sleep(POLL_SECONDS)
    except (TrainingStopped, KeyboardInterrupt) as stop:
        _stop(pool, stop.reason if isinstance(stop, TrainingStopped) else "Ctrl-C")
        comparison.say(f"Go on with: {_get_hint(comparison)}")
        raise
    except BaseException as error:
        _stop(pool, type(error).__name__)
        raise


def _fill(pool: _Pool) -> None:
    """Begin as many members as there are free places."""
    for place in pool.places:
        if place in pool.active:
            continue
        member = next((member for member in pool.waiting if not _is_elsewhere(pool, member)), None)
        if member is None:
            return
        pool.waiting.remove(member)
        _begin(pool, member, place)


def _is_elsewhere(pool: _Pool, member: Member) -> bool:
    """Tell whether another process works on a member: that of a sweep that was killed stops by itself soon."""
    if not member.path or not member.run.is_held():
        return False
    if member.title not in pool.has_said:
        pool.has_said.add(member.title)
        pool.comparison.say(f"{member.title}: another process works on it ({member.path}); waiting for its end")
    return True


def _begin(pool: _Pool, member: Member, place: Place) -> None:
    comparison = pool.comparison
    where = f" ({place.name})" if place.name else ""
    comparison.say(f"\n{comparison.get_position(member)} {member.title}{where}")
    try:
        if not member.path:
            _create_member_run(comparison, member)
        elif member.run.status == "finished":
            _note_end(pool, member)
            return
    except DlferError as error:
        member.fail(error)
        comparison.say(f"{member.title} failed: {error}")
        comparison.save()
        return
    member.status = "running"
    pool.started[member.title] = time.monotonic()
    path = Path(member.path)
    process = start_child(
        path,
        place,
        hint=_get_hint(comparison),
        require_gpu=pool.require_gpu,
        log=path / LOG_FILE if len(pool.places) > 1 else None,
    )
    pool.active[place] = (member, process)
    comparison.save()


def _create_member_run(comparison: Comparison, member: Member) -> None:
    """Make the member's run directory beside the comparison's, small where that is a smoke run."""
    values = comparison.run.read_json(RUN_FILE)
    config, warnings = member.make_config(comparison.config), []
    if comparison.run.is_smoke:
        config, warnings = make_smoke_config(config)
    run = create_run(comparison.run.path.parent.parent, config, argv=values["argv"])
    run.update(smoke=comparison.run.is_smoke, use_cache=values["use_cache"], judge_test=True, warnings=warnings)
    member.path = str(run.path.resolve())


def _collect(pool: _Pool) -> None:
    """Note how the members ended whose processes are gone."""
    for place, (member, process) in list(pool.active.items()):
        if process.poll() is None:
            continue
        del pool.active[place]
        if process.returncode != 0 and member.run.is_held():
            pool.waiting.append(member)  # somebody else took it up in between
            continue
        _note_end(pool, member, process.returncode)
        _refuse_hopeless(pool, process.returncode)


def _note_end(pool: _Pool, member: Member, code: int = 0) -> None:
    """Take over from a run how it ended, tell it, and write members.csv."""
    comparison, run = pool.comparison, member.run
    status = run.status
    if status in ("running", "interrupted"):
        error = DlferError(describe_exit(code))
        run.fail(error)
        member.fail(error)
    elif status == "failed":
        member.fail(run.read_json(RUN_FILE)["error"] or "no reason given")
    else:
        member.status, member.error = status, ""
    if member.status == "finished":
        if member.title in pool.started:
            pool.seconds.append(time.monotonic() - pool.started[member.title])
        comparison.say(f"{comparison.get_position(member)} {member.title}: {_describe_figures(pool, member)}")
    elif member.status == "failed":
        comparison.say(f"{comparison.get_position(member)} {member.title} failed: {member.error}")
    comparison.save()


def _describe_figures(pool: _Pool, member: Member) -> str:
    """Return a finished member's accuracy on validation, and how long the others will take."""
    text = f"validation {format_percent(member.metrics.validation.accuracy.value)}"
    num_left = len(pool.waiting) + len(pool.active)
    if num_left and pool.seconds:
        seconds = sum(pool.seconds) / len(pool.seconds) * num_left / len(pool.places)
        text += f"; about {_describe_seconds(seconds)} left for {num_left} more"
    return text


def _describe_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _refuse_hopeless(pool: _Pool, code: int) -> None:
    members = pool.comparison.members
    if code != UserError.exit_code or any(member.status == "finished" for member in members):
        return
    errors = [member.error for member in members if member.status == "failed"]
    repeated = next((error for error in errors if errors.count(error) > 1), None)
    if repeated is not None:
        raise UserError(f"Two members were refused for the same reason, so the others were not begun: {repeated}")


def _stop(pool: _Pool, reason: str) -> None:
    """Stop what trains now at a checkpoint, and note it; one that had not come to its first step is killed."""
    stop_children([process for _, process in pool.active.values()])
    for member, process in pool.active.values():
        if process.returncode < 0:
            member.run.stop(reason)
        _note_end(pool, member, process.returncode)
    pool.active.clear()


def _get_hint(comparison: Comparison) -> str:
    return f"dlfer {comparison.plan.kind} --resume {comparison.run.path}"
