"""The end of `dlfer search --ablation`: the winners of both arms, trained with the same seeds, judged on test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlfer.errors import DlferError
from dlfer.runs.comparison_record import ComparisonRecord, WinnerRun
from dlfer.study.ablation import WITH, WITHOUT, compare_arms, show_comparison
from dlfer.study.members import Member, group_finished
from dlfer.study.search.board import find_best
from dlfer.study.search.objective import TrialFailed
from dlfer.study.search.trials import TrialRunner

if TYPE_CHECKING:
    from dlfer.study.search.run import Search


def compare_winners(search: Search) -> None:
    """Run the best trial of each arm with every seed of `ablation.seeds`, open test once for each, and compare.

    A winner's own run is gone on with, so that its seed is not trained again; a winner of Hyperband that
    ended with its rung is trained to the end.

    Raises:
        TrainingStopped: the search was asked to stop.
        DlferError: an arm has no winner, or a winner fails.
    """
    members = _plan_members(search)
    runner = TrialRunner(search.make_settings(judge_test=True), search.control)
    for member in members:
        run = runner.find_run(member.overrides)
        what = "judged" if run is not None and run.status == "finished" else "trained and judged"
        search.view.say(f"winner {member.title}: {what} on test")
        try:
            runner(member.overrides, lambda epochs, score: True)
        except TrialFailed as failure:
            raise DlferError(f"The winner {member.title} failed: {failure}") from None
        member.path, member.status = str(runner.find_run(member.overrides).path.resolve()), "finished"
    comparison = _conclude(search, members)
    comparison.write(search.run.path)
    show_comparison(comparison, search.view.console)


def _plan_members(search: Search) -> list[Member]:
    config = search.config
    seeds = config.ablation.seeds[:1] if search.options.smoke else config.ablation.seeds
    winners = {}
    for arm, records in search.arms.values():
        best = find_best(records, config.search.objective)
        if best is None:
            raise DlferError(f"The arm {arm.name!r} has no trial with a score, so there is nothing to compare.")
        winners[arm.name] = {**arm.base, **best.overrides}
    members = []
    for seed in seeds:
        for arm, overrides in winners.items():
            own = {} if seed == config.experiment.seed else {"experiment.seed": seed}
            members.append(Member(arm, seed, {**overrides, **own}))
    return members


def _conclude(search: Search, members: list[Member]) -> ComparisonRecord:
    finished = group_finished(members)
    counts = {arm.name: len(records) for arm, records in search.arms.values()}
    tuned = (
        f"Each arm stands for the best of its own search on validation, of {counts[WITH]} trials {WITH} and of "
        f"{counts[WITHOUT]} {WITHOUT}, with the same engine, seed and ranges."
    )
    found = compare_arms(WITH, finished)
    runs = [WinnerRun(arm=member.arm, seed=member.seed, run=member.run.path.name) for member in members]
    winners = {arm: some[0].overrides for arm, some in finished.items()}
    return found.model_copy(update={"notes": [tuned, *found.notes], "winners": winners, "runs": runs})
