"""comparison.json: the table of arms, their differences from one of them, and the notes that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlfer.metrics.learned import describe_no_conclusion, find_run_failure
from dlfer.metrics.paired import compare_seeds, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.seeds import compute_seed_summary
from dlfer.metrics.several import compute_holm
from dlfer.study.members import PARTS, Member

Finished = Mapping[str, Sequence[Member]]


def summarise_arm(arm: str, members: Sequence[Member]) -> dict[str, Any]:
    """Return a row of the table: {"arm", "seeds", "train", "validation", "test"}, a part without predictions None."""
    row: dict[str, Any] = {"arm": arm, "seeds": [member.seed for member in members]}
    for part in PARTS:
        several = [member.read_part(part) for member in members]
        row[part] = summarise_accuracy([predictions for predictions in several if predictions is not None])
    return row


def summarise_accuracy(several: Sequence[Predictions]) -> dict[str, Any] | None:
    """Return the mean accuracy over seeds with its 95 % interval: "value", "low", "high", "n", "per_seed".

    Of one seed the interval is Wilson's, over images. Of several it is over images and seeds: where the accuracy of
    the recipe lies, and not that of these trainings alone; "sd_over_seeds" is given as well.
    """
    if not several:
        return None
    by_id = [dict(zip(p.ids.tolist(), p.correct.tolist(), strict=True)) for p in several]
    summary = compute_seed_summary(np.array([[seed[key] for key in by_id[0]] for seed in by_id], dtype=float))
    low, high = summary["items_and_seeds"] or summary["items"]
    accuracy = {"value": summary["value"], "low": low, "high": high, "n": summary["n"], "per_seed": summary["per_seed"]}
    return accuracy if len(several) == 1 else accuracy | {"sd_over_seeds": summary["sd_over_seeds"]}


def compare_with(reference: str, finished: Finished, part: str) -> list[dict[str, Any]]:
    """Compare every other arm with one of them on a part, over the seeds that both finished.

    With several pairs Holm's correction holds over all of them, and its p value decides what is significant. Where a
    training of either arm did not learn, the pair supports no conclusion: "not_learned" has the reasons, the sentence
    says so, and nothing is called significant.
    """
    if reference not in finished:
        return []
    pairs = []
    for arm, members in finished.items():
        result = _compare_arms(finished[reference], members, part) if arm != reference else None
        if result is not None:
            pairs.append({"a": reference, "b": arm, "part": part, **result})
    failures = {arm: find_failures(members) for arm, members in finished.items()}
    for pair, p_holm in zip(pairs, compute_holm([pair["p_value"] for pair in pairs]), strict=True):
        if len(pairs) > 1:
            is_significant = pair["is_larger_than_chance"] and p_holm < 1 - pair["level"]
            pair |= {"p_holm": p_holm, "num_pairs": len(pairs), "is_larger_than_chance": is_significant}
        pair["not_learned"] = [*failures[pair["a"]], *failures[pair["b"]]]
        if pair["not_learned"]:
            pair["is_larger_than_chance"] = False
        pair["sentence"] = describe_pair(pair)
    return pairs


def find_failures(members: Sequence[Member]) -> list[str]:
    """Return a clause for each of these trainings that did not learn, e.g. "without EF-FER1, seed 0: its accuracy ..."."""
    found = {member.title: find_run_failure(member.run.path) for member in members}
    return [f"{title}: {why}" for title, why in found.items() if why is not None]


def describe_pair(pair: Mapping[str, Any]) -> str:
    """Return the verdict on a pair of arms in words; see `compare_with`."""
    if pair["not_learned"]:
        return describe_no_conclusion((pair["a"], pair["b"]), pair["not_learned"])
    return describe_difference(dict(pair))


def choose_part(finished: Finished) -> str:
    """Return the part that the arms are judged on: test, where every finished member has one, else validation."""
    has_test = all(member.read_record()["metrics"]["test"] for members in finished.values() for member in members)
    return "test" if has_test else "validation"


def describe_part(part: str, finished: Finished) -> str:
    """Return the part in words; validation says what it selected."""
    if part == "test":
        return "test"
    selected_on = sorted({str(m.read_record()["metrics"]["selected_on"]) for some in finished.values() for m in some})
    return f"validation ({', '.join(selected_on)}, used for selection)"


def collect_notes(finished: Finished, judged_on: str) -> list[str]:
    """Return what part and protocol the figures are of, the members' banners, and what one seed leaves open."""
    metrics = [member.read_record()["metrics"] for members in finished.values() for member in members]
    notes = [f"Judged on {judged_on}, protocol {', '.join(sorted({m['protocol'] for m in metrics}))}."]
    notes += dict.fromkeys(m["banner"] for m in metrics if m["banner"])
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


def _compare_arms(a: Sequence[Member], b: Sequence[Member], part: str) -> dict[str, Any] | None:
    of_b = {member.seed: member for member in b}
    pairs = [(m.read_part(part), of_b[m.seed].read_part(part)) for m in a if m.seed in of_b]
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    return compare_seeds(pairs, names=(a[0].arm, b[0].arm)) if pairs else None
