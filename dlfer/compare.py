"""Arms x seeds of one experiment: the ablation, with and without EF-FER1.

An arm is the experiment with some keys set; a member is an arm with one seed, and an ordinary run. All
members share the data, the order of images and the seeds; all arms with EF-FER1 share one EF-FER1.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dlfer.config.load import compute_digest, load_experiment, with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, DlferError, TrainingStopped, UserError
from dlfer.evaluate.intervals import compute_mean_interval, compute_wilson_interval
from dlfer.evaluate.paired import compare_seeds, describe_difference
from dlfer.evaluate.predictions import Predictions, read_predictions
from dlfer.experiment import Session, execute_run, explain_experiment, prepare_config, start_run
from dlfer.report.comparison import format_comparison_table, write_comparison_report
from dlfer.runs import Run, RunOptions, create_run, open_run, write_atomically

WITH, WITHOUT, EQUAL_COMPUTE = "with EF-FER1", "without EF-FER1", "without, equal compute"
MEMBERS_FILE = "members.csv"
COLUMNS = (
    "arm",
    "seed",
    "digest",
    "path",
    "status",
    "train_accuracy",
    "validation_accuracy",
    "test_accuracy",
    "macro_f1",
    "seconds",
    "pretrain_seconds",
)


@dataclass
class Member:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of EF-FER2.
        overrides: the keys that it sets.
        path: of its run directory, once it has begun.
        status: "pending", "running", "finished", "stopped" or "failed".
    """

    arm: str
    seed: int
    overrides: dict
    path: str = ""
    status: str = "pending"


def run_ablation(file: Path | str, options: RunOptions, seeds: Sequence[int] | None = None) -> Path | None:
    """Run an experiment with and without EF-FER1 and compare the two; return the comparison's folder.

    Args:
        file: an experiment with a `pretrain` section.
        options: of the command line.
        seeds: instead of `ablation.seeds`.

    Raises:
        ConfigError: the experiment has no EF-FER1 to leave out.
        TrainingStopped: by SIGTERM or --max-hours; the ablation can be resumed.
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
    members = _plan_members(config, smoke=options.smoke)
    if options.dry_run:
        explain_experiment(prepare_config(config, session)[0], session)
        for member in members:
            session.listener.say(f"member: {member.arm}, seed {member.seed}")
        return None
    run = create_run(session.runs_folder, config, argv=list(options.argv), kind="ablation")
    run.update(smoke=options.smoke, use_cache=options.use_cache)
    with session.control.watch_signals():
        return _execute(run, config, session)


def resume_ablation(run: Path | str, options: RunOptions) -> Path:
    """Go on with an ablation: finished members stay, an interrupted one continues from its checkpoint."""
    opened = open_run(run, options.out)
    # Members go beside the comparison, wherever it was put.
    session = Session.start(replace(options, out=opened.path.parent.parent, smoke=opened.is_smoke))
    with session.control.watch_signals():
        return _execute(opened, opened.config(), session)


def _execute(run: Run, config: ExperimentConfig, session: Session) -> Path:
    members = _read_members(run, config) or _plan_members(config, smoke=run.is_smoke)
    run.update(status="running")
    session.resume_hint = f"dlfer ablate --resume {run.path}"
    failures = []
    try:
        for number, member in enumerate(members, start=1):
            if member.status == "finished":
                continue
            session.listener.say(f"\n[{number}/{len(members)}] {member.arm}, seed {member.seed}")
            _run_member(run, config, member, members, session)
            if member.status == "failed":
                failures.append(f"{member.arm}, seed {member.seed}")
        comparison = _compare(config, members, run)
        run.write_json("comparison.json", comparison)
        report = write_comparison_report(run.path)
    except TrainingStopped as stop:
        run.stop(stop.reason)
        raise
    except BaseException as error:
        run.fail(error)
        raise
    session.listener.say("")
    session.listener.console.print(format_comparison_table(comparison))
    for pair in comparison["paired"]:
        session.listener.say(pair["sentence"])
    for note in comparison["notes"]:
        session.listener.say(note)
    session.listener.say(f"report: {report}")
    if failures:
        error = DlferError(
            f"{len(failures)} of {len(members)} members failed: {'; '.join(failures)}. See their run.json."
        )
        run.fail(error)
        raise error
    run.finish()
    return run.path


def _plan_members(config: ExperimentConfig, *, smoke: bool) -> list[Member]:
    """Return the members, seed by seed, EF-FER1 first so that its cost is known."""
    arms: dict[str, dict] = {WITH: {}, WITHOUT: {"pretrain": None}}
    if config.ablation.equal_compute:
        if config.pretrain.weights is not None:
            raise ConfigError(
                "ablation.equal_compute: what EF-FER1 cost is not known for pretrain.weights "
                f"{config.pretrain.weights}; set it to false, or train EF-FER1 (pretrain.weights: null)."
            )
        arms[EQUAL_COMPUTE] = {}
    seeds = config.ablation.seeds[:1] if smoke else config.ablation.seeds
    return [Member(arm, seed, dict(overrides)) for seed in seeds for arm, overrides in arms.items()]


def _run_member(run: Run, config: ExperimentConfig, member: Member, members: list[Member], session: Session) -> None:
    """Run or resume one member; a failure in training is recorded, the user's errors and stops go on."""
    import keras

    keras.backend.clear_session()

    def record(path: Path) -> None:
        member.path, member.status = str(path.resolve()), "running"
        _write_members(run, members, config)

    try:
        if member.path:
            opened = open_run(member.path)
            execute_run(opened, opened.config(), session)
        else:
            if member.arm == EQUAL_COMPUTE:
                member.overrides = {"pretrain": None, "finetune.epochs": _equal_epochs(config, members)}
            member_config = with_overrides(config, {**member.overrides, "experiment.seed": member.seed})
            start_run(member_config, session, on_created=record)
        member.status = "finished"
    except TrainingStopped:
        member.status = "stopped"
        raise
    except UserError:
        member.status = "failed"
        raise
    except DlferError as error:
        member.status = "failed"
        session.listener.say(f"{member.arm}, seed {member.seed} failed: {error}")
    finally:
        _write_members(run, members, config)


def _equal_epochs(config: ExperimentConfig, members: list[Member]) -> int:
    """Return the epochs of fine-tuning that cost what EF-FER1 and the experiment's epochs cost together.

    Cost is counted in pixels seen in training: images x image_size^2; it leaves out that a wider head
    or a slower input costs more.
    """
    done = next((m for m in members if m.arm == WITH and m.status == "finished"), None)
    if done is None:
        raise DlferError(f"the arm {EQUAL_COMPUTE!r} needs a finished arm {WITH!r}, whose EF-FER1 tells the cost.")
    cost = open_run(done.path).read_json("run.json")["cost"]
    pixels = cost["pretrain_images"] * cost["pretrain_image_size"] ** 2
    epochs_done = len(read_epochs(Path(done.path)))
    pixels_an_epoch = cost["finetune_images"] / epochs_done * cost["finetune_image_size"] ** 2
    return config.finetune.epochs + math.ceil(pixels / pixels_an_epoch)


def read_epochs(path: Path) -> list[dict]:
    """Return the rows of a run's fine-tuning history."""
    with open(path / "finetune" / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def _compare(config: ExperimentConfig, members: list[Member], run: Run) -> dict:
    """Return comparison.json: the paper's table, paired differences, and one sentence for each."""
    finished: dict[str, list[Member]] = {}
    for member in members:
        if member.status == "finished":
            finished.setdefault(member.arm, []).append(member)
    if not finished:
        return {"table": [], "paired": [], "notes": ["No member finished."], "judged_on": None}
    first = next(iter(finished.values()))[0]
    metrics = open_run(first.path).read_json("metrics.json")
    part = "test" if metrics["test"] else "validation"
    judged_on = "test" if part == "test" else f"validation ({metrics['selected_on']}, used for selection)"
    notes = [f"Judged on {judged_on}, protocol {metrics['protocol']}."]
    if metrics["banner"]:
        notes.append(metrics["banner"])
    if max(len(members_of_arm) for members_of_arm in finished.values()) == 1:
        notes.append(
            "One seed an arm: the intervals are over images; what another training would change is not in them."
        )
    notes += _describe_costs(finished)
    paired = [
        _compare_arms(finished[WITH], finished[arm], part)
        for arm in (WITHOUT, EQUAL_COMPUTE)
        if WITH in finished and arm in finished
    ]
    return {
        "table": [_summarise_arm(arm, some) for arm, some in finished.items()],
        "paired": [pair for pair in paired if pair is not None],
        "notes": notes,
        "judged_on": judged_on,
    }


def _summarise_arm(arm: str, members: list[Member]) -> dict:
    row: dict = {"arm": arm, "seeds": [member.seed for member in members]}
    for part in ("train", "validation", "test"):
        several = [_read_part(member, part) for member in members]
        row[part] = _average_accuracy([p for p in several if p is not None])
    return row


def _average_accuracy(several: list[Predictions]) -> dict | None:
    """Return the mean accuracy over seeds; its interval is over the images (one seed: Wilson's)."""
    if not several:
        return None
    n = len(several[0])
    by_id = [dict(zip(p.ids.tolist(), p.correct.tolist(), strict=True)) for p in several]
    correct = np.array([[seed[key] for key in by_id[0]] for seed in by_id], dtype=float)
    per_seed = correct.mean(axis=1)
    value = float(per_seed.mean())
    if len(several) == 1:
        low, high = compute_wilson_interval(int(correct.sum()), n)
    else:
        low, high = compute_mean_interval(correct.mean(axis=0))
    figure = {"value": value, "low": float(low), "high": float(high), "n": n, "per_seed": per_seed.tolist()}
    return figure | ({"sd_over_seeds": float(per_seed.std(ddof=1))} if len(several) > 1 else {})


def _compare_arms(a: list[Member], b: list[Member], part: str) -> dict | None:
    """Compare two arms over the seeds that both finished."""
    of_b = {member.seed: member for member in b}
    pairs = [(_read_part(m, part), _read_part(of_b[m.seed], part)) for m in a if m.seed in of_b]
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not pairs:
        return None
    result = compare_seeds(pairs, names=(a[0].arm, b[0].arm))
    return {"a": a[0].arm, "b": b[0].arm, "part": part, "sentence": describe_difference(result), **result}


def _describe_costs(finished: Mapping[str, list[Member]]) -> list[str]:
    """Return what each arm's fine-tuning took, and what EF-FER1 cost besides."""
    notes = []
    for arm, members in finished.items():
        costs = [open_run(m.path).read_json("run.json")["cost"] for m in members]
        seconds = np.mean([cost["finetune_seconds"] for cost in costs])
        text = f"{arm}: fine-tuning took {seconds / 60:.1f} min a seed"
        if arm == WITH:
            before = costs[0].get("pretrain_seconds")
            text += (
                f"; EF-FER1 took {before / 60:.1f} min besides, once" if before else "; what EF-FER1 cost is not known"
            )
        notes.append(text + ".")
    return notes


def _read_part(member: Member, part: str) -> Predictions | None:
    path = Path(member.path) / "predictions" / f"{part}.npz"
    return read_predictions(path) if path.exists() else None


def _write_members(run: Run, members: list[Member], config: ExperimentConfig) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for member in members:
        row = {"arm": member.arm, "seed": member.seed, "path": member.path, "status": member.status}
        if member.path:
            row["digest"] = compute_digest(open_run(member.path).config())[:8]
        if member.status == "finished":
            row |= _read_figures(Path(member.path))
        writer.writerow(row)
    write_atomically(run.path / MEMBERS_FILE, text.getvalue())


def _read_figures(path: Path) -> dict:
    member = open_run(path)
    metrics, cost = member.read_json("metrics.json"), member.read_json("run.json")["cost"]
    judged = metrics["test"] or metrics["validation"]
    figures = {
        f"{part}_accuracy": metrics[part]["accuracy"]["value"]
        for part in ("train", "validation", "test")
        if metrics[part]
    }
    return figures | {
        "macro_f1": judged["macro_f1"]["value"],
        "seconds": cost["finetune_seconds"],
        "pretrain_seconds": cost["pretrain_seconds"],
    }


def _find_member(run: Run, path: str) -> str:
    """Return where a member stands now: as recorded, or beside the comparison if the folder was moved."""
    beside = run.path.parent / Path(path).name
    return str(beside) if path and not Path(path).exists() and beside.exists() else path


def _read_members(run: Run, config: ExperimentConfig) -> list[Member]:
    """Return the members as they were recorded; none if the comparison had not begun."""
    path = run.path / MEMBERS_FILE
    if not path.exists():
        return []
    planned = {(m.arm, m.seed): m for m in _plan_members(config, smoke=run.is_smoke)}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            member = planned[(row["arm"], int(row["seed"]))]
            member.path, member.status = _find_member(run, row["path"]), row["status"]
    return list(planned.values())
