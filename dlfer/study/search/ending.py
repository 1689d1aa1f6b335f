"""What a person is told when a search ends or is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlfer.report.keys import format_overrides
from dlfer.report.search import write_search_report
from dlfer.study.search.board import find_best
from dlfer.study.search.files import get_best_name
from dlfer.study.search.objective import compute_scores_so_far
from dlfer.study.search.trials import TrialRunner, read_history_rows

if TYPE_CHECKING:
    from dlfer.study.search.run import Search


def conclude(search: Search) -> None:
    """Say what was the best of each arm, and write the page."""
    for arm, records in search.arms.values():
        best = find_best(records, search.config.search.objective)
        if best is None:
            search.view.say(f"{arm.name}: no trial has a score yet.")
            continue
        file = search.run.path / get_best_name(arm)
        interval = "" if best.low is None else f" (95 % {best.low:.4f} to {best.high:.4f} over the images)"
        search.view.say(
            f"{arm.name}: best validation {search.config.search.objective} {best.score:.4f}{interval} with "
            f"{format_overrides(best.overrides)}\n  dlfer run {file}"
        )
    search.view.say(f"report: {write_search_report(search.run.path)}")


def say_unfinished(search: Search) -> None:
    """Say where the trials stand that were interrupted: theirs may be the best so far."""
    runner, figure = TrialRunner(search.make_settings(), search.control), search.config.search.objective
    for arm, records in search.arms.values():
        for number, record in enumerate(records, start=1):
            run = runner.find_run({**arm.base, **record.overrides})
            if run is None or record.status not in ("running", "waiting"):
                continue
            scores = compute_scores_so_far(read_history_rows(run.path), figure, search.config.finetune)
            so_far = f"{figure} {scores[-1]:.4f} after {len(scores)} epochs" if scores else "before its first epoch"
            search.view.say(f"trial {number} interrupted at {so_far}: {format_overrides(record.overrides)}")
