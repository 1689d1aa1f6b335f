"""The ablation, with and without EF-FER1: a sweep of two cells, one of which sets `pretrain: null`.

All members share the data, the order of images and the seeds, and train in this one process; all arms with
EF-FER1 share one EF-FER1.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.compare.execute import Comparison, carry_out, create_comparison_run
from dlfer.compare.members import Member, Plan, group_finished
from dlfer.compare.summary import Finished, choose_part, collect_notes, compare_with, describe_part, summarise_arm
from dlfer.config.load import load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, DlferError, TrainingStopped, UserError
from dlfer.experiment import execute_run, explain_experiment, prepare_config, start_run
from dlfer.fit.session import Session
from dlfer.report.comparison import format_comparison_table
from dlfer.runs.find import open_run
from dlfer.runs.options import RunOptions

WITH, WITHOUT, EQUAL_COMPUTE = "with EF-FER1", "without EF-FER1", "without, equal compute"


def run_ablation(file: Path | str, options: RunOptions, seeds: Sequence[int] | None = None) -> Path | None:
    """Run an experiment with and without EF-FER1 and compare the two; return the comparison's folder.

    Args:
        file: an experiment with a `pretrain` section.
        options: of the command line.
        seeds: instead of `ablation.seeds`.

    Raises:
        ConfigError: the experiment has no EF-FER1 to leave out.
        TrainingStopped: by Ctrl-C, SIGTERM or --max-hours; the ablation can be resumed.
        DlferError: a member failed; the others were run.
    """
    overrides = dict(options.overrides)
    if seeds is not None:
        overrides["ablation.seeds"] = list(seeds)
    config = load_experiment(file, overrides)
    if config.pretrain is None:
        raise ConfigError(
            f"{file}: pretrain is null, so there is no EF-FER1 to leave out. "
            "The ablation needs an experiment with a pretrain section, e.g. experiments/quickstart.yaml."
        )
    session = Session.start(options)
    plan = _plan(config, smoke=options.smoke)
    if options.dry_run:
        explain_experiment(prepare_config(config, session)[0], session)
        for member in plan.make_members():
            session.listener.say(f"member: {member.title}")
        return None
    run = create_comparison_run(config, plan, options)
    return _carry_out(Comparison(run, config, plan, session.listener.say), session)


def resume_ablation(run: Path | str, options: RunOptions) -> Path:
    """Go on with an ablation: finished members stay, an interrupted one continues from its checkpoint."""
    opened = open_run(run, options.out)
    # Members go beside the comparison, wherever it was put.
    session = Session.start(replace(options, out=opened.path.parent.parent, smoke=opened.is_smoke))
    config = opened.config()
    plan = _plan(config, smoke=opened.is_smoke)
    return _carry_out(Comparison(opened, config, plan, session.listener.say), session)


def _plan(config: ExperimentConfig, *, smoke: bool) -> Plan:
    """Return the arms, EF-FER1 first so that its cost is known."""
    arms: dict[str, dict] = {WITH: {}, WITHOUT: {"pretrain": None}}
    if config.ablation.equal_compute:
        if config.pretrain.weights is not None:
            raise ConfigError(
                "ablation.equal_compute: what EF-FER1 cost is not known for pretrain.weights "
                f"{config.pretrain.weights}; set it to false, or train EF-FER1 (pretrain.weights: null)."
            )
        # How many epochs make it equal is known once EF-FER1 has been trained.
        arms[EQUAL_COMPUTE] = {}
    return Plan("ablation", arms, config.ablation.seeds[:1] if smoke else config.ablation.seeds, reference=WITH)


def _carry_out(comparison: Comparison, session: Session) -> Path:
    session.resume_hint = f"dlfer ablate --resume {comparison.run.path}"

    def run_members(comparison: Comparison) -> None:
        for member in comparison.members:
            if member.status != "finished":
                session.listener.say(f"\n{comparison.get_position(member)} {member.title}")
                _run_member(comparison, member, session)

    def show(values: dict[str, Any]) -> None:
        session.listener.console.print(format_comparison_table(values))
        for line in (*(pair["sentence"] for pair in values["paired"]), *values["notes"]):
            session.listener.say(line)

    with session.control.watch_signals():
        return carry_out(comparison, run_members, _conclude, show)


def _run_member(comparison: Comparison, member: Member, session: Session) -> None:
    """Run or resume one member; a failure in training is recorded, the user's errors and stops go on."""
    import keras

    keras.backend.clear_session()

    def record(path: Path) -> None:
        member.path, member.status = str(path.resolve()), "running"
        comparison.save()

    try:
        if member.path:
            member.status = "running"
            execute_run(member.run, member.run.config(), session)
        else:
            if member.arm == EQUAL_COMPUTE:
                epochs = _count_equal_epochs(comparison.config, comparison.members)
                member.overrides = {"pretrain": None, "finetune.epochs": epochs}
            start_run(member.make_config(comparison.config), session, on_created=record)
        member.status, member.error = "finished", ""
    except (TrainingStopped, KeyboardInterrupt):
        member.status = "stopped"
        raise
    except UserError as error:
        member.fail(error)
        raise
    except DlferError as error:
        member.fail(error)
        session.listener.say(f"{member.title} failed: {error}")
    finally:
        comparison.save()


def _count_equal_epochs(config: ExperimentConfig, members: Sequence[Member]) -> int:
    """Return the epochs of fine-tuning that cost what EF-FER1 and the experiment's epochs cost together.

    Cost is counted in pixels seen in training: images x image_size^2; it leaves out that a wider head
    or a slower input costs more.
    """
    done = next((m for m in members if m.arm == WITH and m.status == "finished"), None)
    if done is None:
        raise DlferError(f"the arm {EQUAL_COMPUTE!r} needs a finished arm {WITH!r}, whose EF-FER1 tells the cost.")
    cost = done.read_record()["cost"]
    pixels = cost["pretrain_images"] * cost["pretrain_image_size"] ** 2
    with open(Path(done.path) / "finetune" / "history.csv", newline="") as file:
        epochs_done = len(list(csv.DictReader(file)))
    pixels_an_epoch = cost["finetune_images"] / epochs_done * cost["finetune_image_size"] ** 2
    return config.finetune.epochs + math.ceil(pixels / pixels_an_epoch)


def _conclude(comparison: Comparison) -> dict[str, Any]:
    """Return comparison.json: the paper's table, paired differences, and one sentence for each."""
    finished = group_finished(comparison.members)
    if not finished:
        return {"table": [], "paired": [], "notes": ["No member finished."], "judged_on": None}
    part = choose_part(finished)
    judged_on = describe_part(part, finished)
    return {
        "table": [summarise_arm(arm, some) for arm, some in finished.items()],
        "paired": compare_with(WITH, finished, part),
        "notes": [*collect_notes(finished, judged_on), *_describe_costs(finished)],
        "judged_on": judged_on,
    }


def _describe_costs(finished: Finished) -> list[str]:
    """Return what each arm's fine-tuning took, and what EF-FER1 cost besides."""
    notes = []
    for arm, members in finished.items():
        costs = [member.read_record()["cost"] for member in members]
        seconds = np.mean([cost["finetune_seconds"] for cost in costs])
        text = f"{arm}: fine-tuning took {seconds / 60:.1f} min a seed"
        if arm == WITH:
            before = costs[0].get("pretrain_seconds")
            text += (
                f"; EF-FER1 took {before / 60:.1f} min besides, once" if before else "; what EF-FER1 cost is not known"
            )
        notes.append(text + ".")
    return notes
