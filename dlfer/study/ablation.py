"""The ablation: a comparison of an experiment with EF-FER1 and without it (`pretrain: null`).

`ablation.with` and `ablation.without` set further keys of one arm, because training from random weights often needs
another learning rate than training from pretrained ones. All arms have the same data, order of images and seeds, and
all members with EF-FER1 share one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, DlferError
from dlfer.report.comparison import format_comparison_table
from dlfer.runs.changes import flatten
from dlfer.runs.comparison_record import ArmKey, ComparisonRecord
from dlfer.runs.run_records import read_history
from dlfer.study.compare import (
    Finished,
    choose_split,
    collect_notes,
    compare_with,
    describe_left_out,
    describe_missing,
    describe_split,
    list_unfinished,
    summarise_arm,
)
from dlfer.study.comparison import Comparison, Rules, show_verdicts
from dlfer.study.members import Member, Plan, average_seconds, group_finished, refuse_fixed_members
from dlfer.study.runner import StudyConsole

WITH, WITHOUT, EQUAL_COMPUTE = "with EF-FER1", "without EF-FER1", "without, equal compute"


def _plan(config: ExperimentConfig, file: object, smoke: bool) -> Plan:
    """Return the plan of the arms, the one with EF-FER1 first because equal compute depends on its cost."""
    if config.pretrain is None:
        raise ConfigError(
            f"{file}: pretrain is null, so there is no EF-FER1 to leave out. "
            "The ablation needs an experiment with a pretrain section, e.g. experiments/quickstart.yaml."
        )
    of_with, of_without = config.ablation.with_keys, config.ablation.without
    arms: dict[str, dict] = {WITH: dict(of_with), WITHOUT: {"pretrain": None, **of_without}}
    if config.ablation.equal_compute:
        if config.pretrain.weights is not None:
            raise ConfigError(
                "ablation.equal_compute: the cost of EF-FER1 is not known for pretrain.weights "
                f"{config.pretrain.describe_weights()}; set it to false, or train EF-FER1 (pretrain.weights: null)."
            )
        if config.model.family == "ensemble":
            raise ConfigError(
                "ablation.equal_compute: found true; what EF-FER1 cost the members of an ensemble is not added up. Set it to "
                "false, or compare equal compute for each member's own experiment."
            )
        arms[EQUAL_COMPUTE] = dict(arms[WITHOUT])
    seeds = config.ablation.seeds[:1] if smoke else config.ablation.seeds
    refuse_fixed_members(config, num_seeds=len(seeds), drops_pretrain=True)
    # The number of epochs for equal compute is known only once EF-FER1 has been trained.
    return Plan("ablation", arms, seeds, reference=WITH, late_keys={EQUAL_COMPUTE: ["finetune.epochs"]})


def _prepare(comparison: Comparison, member: Member) -> bool:
    """Set the epochs of an equal-compute member; return False if that has to wait for finished members of other arms.

    Raises:
        DlferError: all members of an arm that it needs failed, or the finished one does not record the cost.
    """
    if member.arm != EQUAL_COMPUTE:
        return True
    for arm in dict.fromkeys([WITH, _choose_measured_arm(comparison.config)]):
        of_arm = [other for other in comparison.members if other.arm == arm]
        if any(other.status == "finished" for other in of_arm):
            continue
        if any(other.status != "failed" for other in of_arm):
            return False
        shown = "whose EF-FER1 shows the cost" if arm == WITH else "which shows the number of images in an epoch"
        raise DlferError(f"the arm {EQUAL_COMPUTE!r} needs a finished arm {arm!r}, {shown}.")
    epochs = _count_equal_epochs(comparison.config, comparison.members)
    member.overrides = {"pretrain": None, **comparison.config.ablation.without, "finetune.epochs": epochs}
    return True


def _choose_measured_arm(config: ExperimentConfig) -> str:
    """Return the arm whose epochs have as many images as those of equal compute: either, if both are fine-tuned alike."""
    of_with, without = (
        with_overrides(config, keys).finetune.model_dump(exclude={"epochs", "optimizer"})
        for keys in (config.ablation.with_keys, config.ablation.without)
    )
    return WITH if of_with == without else WITHOUT


def show_comparison(found: ComparisonRecord, console: StudyConsole) -> None:
    """Print the table of arms, the verdicts (in red where a training did not learn) and the notes of a comparison."""
    console.console.print(format_comparison_table(found))
    show_verdicts(found, console, most=len(found.paired))


def _count_equal_epochs(config: ExperimentConfig, members: Sequence[Member]) -> int:
    """Return the fine-tuning epochs that cost as much as EF-FER1 and the epochs of the arm without it together.

    Cost is measured in pixels seen in training, images x image_size^2, which ignores that a wider head or a slower
    input costs more. The keys of `ablation.without` may change the number of images in an epoch.
    """
    finished = group_finished(members)
    done, measured = finished[WITH][0], finished[_choose_measured_arm(config)][0]
    cost, num_images = done.cost, measured.cost.finetune_images
    if cost.pretrain_images is None or cost.pretrain_image_size is None or not num_images:
        unknown = (measured, "how many images it saw") if not num_images else (done, "what EF-FER1 cost")
        raise DlferError(
            f"the arm {EQUAL_COMPUTE!r}: {unknown[0].path} does not say {unknown[1]}. Set ablation.equal_compute: false."
        )
    pixels = cost.pretrain_images * cost.pretrain_image_size**2
    without = with_overrides(config, {"pretrain": None, **config.ablation.without})
    images_an_epoch = num_images / len(read_history(Path(measured.path) / "finetune" / "history.csv"))
    return without.finetune.epochs + math.ceil(pixels / (images_an_epoch * without.finetune.image_size**2))


def _conclude(comparison: Comparison) -> ComparisonRecord:
    """Return the table of arms, their differences with a sentence for each, and notes on fairness and cost."""
    finished = group_finished(comparison.members)
    if not finished:
        return ComparisonRecord(notes=["No member finished."], unfinished=list_unfinished(comparison.members))
    found = compare_arms(WITH, comparison.members)
    notes = [*_describe_fairness(comparison, found.arm_keys), *_describe_costs(finished)]
    return found.model_copy(update={"notes": found.notes + notes})


def list_arm_keys(finished: Finished) -> list[ArmKey]:
    """Return the keys that can change the result and differ between the arms, with their value in each arm.

    EF-FER1 is a single key, `pretrain`, whose value describes its weights or data in words.
    """
    configs = {arm: _flatten(members[0].run.config()) for arm, members in finished.items()}
    keys = dict.fromkeys(key for values in configs.values() for key in values)
    rows = []
    for key in keys:
        values = {arm: found.get(key) for arm, found in configs.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            rows.append(ArmKey(key=key, values=values))
    return rows


def _flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Return the dotted keys of an experiment that can change its result; `pretrain` is a single key."""
    start = config.pretrain
    if start is not None:
        start = start.describe_weights() if start.weights else f"trained on {start.data.source}"
    skipped = {"experiment", "pretrain", "ablation", "search", "sweep", "expected"}
    return {"pretrain": start, **flatten(config.model_dump(mode="json", exclude=skipped))}


def _describe_fairness(comparison: Comparison, arm_keys: Sequence[ArmKey]) -> list[str]:
    """Return notes on the limits of the comparison: a shared or differing recipe, and one shared EF-FER1."""
    notes = []
    other = [row.key for row in arm_keys if row.key != "pretrain"]
    if not other:
        notes.append(
            "Both arms share one recipe. If it was tuned with pretrained weights, that favours the arm with EF-FER1: "
            "dlfer search FILE --ablation tunes both arms with the same budget, and ablation.without sets keys of "
            "the other arm only."
        )
    else:
        notes.append(f"The arms also differ in {', '.join(other)}.")
    if len(comparison.plan.seeds) > 1 and comparison.config.pretrain.weights is None:
        notes.append("All seeds share one EF-FER1, so the intervals do not include the variation over pretrainings.")
    return notes


def _describe_costs(finished: Finished) -> list[str]:
    """Return a note for each arm on its fine-tuning time, and on the additional time of EF-FER1."""
    notes = []
    for arm, members in finished.items():
        seconds = average_seconds(members)
        if seconds is None:
            continue
        text = f"{arm}: fine-tuning took {seconds / 60:.1f} min a seed"
        if arm == WITH:
            before = members[0].cost.pretrain_seconds
            text += (
                f"; EF-FER1 took {before / 60:.1f} min besides, once"
                if before
                else "; the cost of EF-FER1 is not known"
            )
        notes.append(text + ".")
    return notes


def compare_arms(reference: str, members: Sequence[Member]) -> ComparisonRecord:
    """Compare the arms that have finished members with the arm `reference`; note what is missing and which keys differ.

    At least one of the members must have finished.
    """
    finished = group_finished(members)
    split = choose_split(finished)
    judged_on = describe_split(split, finished)
    pairs = compare_with(reference, finished, split)
    notes = [*describe_missing(members), *describe_left_out(reference, finished, pairs)]
    return ComparisonRecord(
        table=[summarise_arm(arm, several) for arm, several in finished.items()],
        paired=pairs,
        notes=[*collect_notes(finished, judged_on, pairs), *notes],
        judged_on=judged_on,
        arm_keys=list_arm_keys(finished),
        unfinished=list_unfinished(members),
    )


ABLATION = Rules("ablation", _plan, _conclude, show_comparison, _prepare, shares_processes=True)
