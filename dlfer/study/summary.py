"""The table of arms of a comparison, their differences from one of them, and the notes that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dlfer.metrics.learned import describe_no_conclusion, find_run_failure
from dlfer.metrics.paired import compare_seeds, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.seeds import compute_seed_summary
from dlfer.metrics.several import compute_holm
from dlfer.runs.comparison_record import ArmPair, ArmRow, PairedTest, SeedEstimate
from dlfer.study.members import Member

Finished = Mapping[str, Sequence[Member]]
"""Arm -> its finished members, at least one."""


def summarise_arm(arm: str, members: Sequence[Member]) -> ArmRow:
    """Return the accuracy of an arm on each split, None where it has no predictions."""
    return ArmRow(
        arm=arm,
        seeds=[member.seed for member in members],
        train=_summarise_split(members, "train"),
        validation=_summarise_split(members, "validation"),
        test=_summarise_split(members, "test"),
    )


def summarise_accuracy(several: Sequence[Predictions]) -> SeedEstimate | None:
    """Return the mean accuracy over seeds with its 95 % interval; None without any predictions.

    Of one seed the interval is Wilson's, over images. Of several it is over images and seeds: where the accuracy of
    the recipe lies, and not that of these trainings alone.
    """
    if not several:
        return None
    by_id = [dict(zip(p.ids.tolist(), p.correct.tolist(), strict=True)) for p in several]
    summary = compute_seed_summary(np.array([[seed[key] for key in by_id[0]] for seed in by_id], dtype=float))
    low, high = summary.items_and_seeds or summary.items
    accuracy = SeedEstimate(value=summary.value, low=low, high=high, n=summary.n, per_seed=summary.per_seed)
    return accuracy if len(several) == 1 else accuracy.model_copy(update={"sd_over_seeds": summary.sd_over_seeds})


def compare_with(reference: str, finished: Finished, split: str) -> list[ArmPair]:
    """Compare every other arm with one of them on a split, over the seeds that both finished.

    With several pairs Holm's correction holds over all of them, and its p value decides what is significant. Where a
    training of either arm did not learn, the pair supports no conclusion: `not_learned` has the reasons, the sentence
    says so, and nothing is called significant.
    """
    if reference not in finished:
        return []
    tests = {
        arm: _compare_arms(finished[reference], members, split) for arm, members in finished.items() if arm != reference
    }
    pairs = [ArmPair.of(test, part=split) for test in tests.values() if test is not None]
    failures = {arm: find_failures(members) for arm, members in finished.items()}
    return [conclude_pair(pair, [*failures[pair.a], *failures[pair.b]]) for pair in correct_pairs(pairs)]


def correct_pairs(pairs: Sequence[ArmPair]) -> list[ArmPair]:
    """Return the pairs of one table with p values by Holm, which decide what is significant; one pair stays as it is."""
    if len(pairs) < 2:
        return list(pairs)
    corrected = []
    for pair, p_holm in zip(pairs, compute_holm([pair.p_value for pair in pairs]), strict=True):
        is_significant = pair.is_significant and p_holm < 1 - pair.level
        changes = {"p_holm": p_holm, "num_pairs": len(pairs), "is_significant": is_significant}
        corrected.append(pair.model_copy(update=changes))
    return corrected


def conclude_pair(pair: ArmPair, not_learned: Sequence[str]) -> ArmPair:
    """Return a pair with its verdict in words; where a training did not learn, nothing is significant.

    Args:
        pair: corrected for the others of its table.
        not_learned: a clause for each training of either arm that did not learn.
    """
    changes = {"not_learned": list(not_learned), "is_significant": pair.is_significant and not not_learned}
    changes["sentence"] = describe_difference(pair)
    if not_learned:
        changes["sentence"] = describe_no_conclusion((pair.a, pair.b), not_learned)
    return pair.model_copy(update=changes)


def find_failures(members: Sequence[Member]) -> list[str]:
    """Return a clause for each of these trainings that did not learn, e.g. "without EF-FER1, seed 0: its accuracy ..."."""
    found = {member.title: find_run_failure(member.run.path) for member in members}
    return [f"{title}: {why}" for title, why in found.items() if why is not None]


def choose_split(finished: Finished) -> str:
    """Return the split that the arms are judged on: test, where every finished member has one, else validation."""
    has_test = all(member.metrics.test for members in finished.values() for member in members)
    return "test" if has_test else "validation"


def describe_split(split: str, finished: Finished) -> str:
    """Return the split in words; that of validation says what selected the models."""
    if split == "test":
        return "test"
    selected_on = sorted({str(member.metrics.selected_on) for members in finished.values() for member in members})
    return f"validation ({', '.join(selected_on)}, used for selection)"


def collect_notes(finished: Finished, judged_on: str) -> list[str]:
    """Return the judged split and the protocol, the members' banners, and what the number of seeds leaves open."""
    metrics = [member.metrics for members in finished.values() for member in members]
    notes = [f"Judged on {judged_on}, protocol {', '.join(sorted({str(m.protocol) for m in metrics}))}."]
    notes += dict.fromkeys(m.banner for m in metrics if m.banner)
    if max(len(members) for members in finished.values()) == 1:
        notes.append(
            "One seed in each arm: the intervals are over images. How much another training would differ is not known, so "
            "that nothing here is a statement about the recipes; run several seeds, e.g. --seeds 0,1,2."
        )
    else:
        notes.append(
            "Intervals of several seeds are over images and seeds, with Student's t: they are wide for two or three seeds, "
            "whose variance is poorly known."
        )
    return notes


def _summarise_split(members: Sequence[Member], split: str) -> SeedEstimate | None:
    several = [member.read_part(split) for member in members]
    return summarise_accuracy([predictions for predictions in several if predictions is not None])


def _compare_arms(a: Sequence[Member], b: Sequence[Member], split: str) -> PairedTest | None:
    of_b = {member.seed: member for member in b}
    pairs = [(member.read_part(split), of_b[member.seed].read_part(split)) for member in a if member.seed in of_b]
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    return compare_seeds(pairs, names=(a[0].arm, b[0].arm)) if pairs else None
