"""One experiment from config to report: the only module that sees every step.

ExperimentConfig -> DataBundle -> Classifier -> Artifact -> Predictions -> Scores -> report
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dlfer.config.load import load_experiment, resolve_path
from dlfer.config.schema import DataConfig, ExperimentConfig, StageConfig
from dlfer.data.audit import audit_data
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.pipeline import iterate_epoch
from dlfer.data.sources import load_data
from dlfer.errors import TrainingStopped
from dlfer.evaluate.predictions import Predictions
from dlfer.extras import choose_extras, judge_extras
from dlfer.judge import compute_run_metrics, describe_data, log_opening, predict_parts, sort_errors
from dlfer.model.artifact import FAMILIES, store_temperature
from dlfer.model.carry import TransferRecord, carry_backbone
from dlfer.model.transfer import TransferNetwork, build_transfer_network
from dlfer.report.card import write_card
from dlfer.report.html import write_report
from dlfer.report.pictures import write_augmented_page, write_confusion_page, write_error_page
from dlfer.runs import Run, RunOptions, create_run, default_runs_folder, open_run
from dlfer.smoke import NUM_BATCHES, make_smoke_config
from dlfer.train.cascade import Pretrained, obtain_backbone
from dlfer.train.control import StopControl
from dlfer.train.device import Device, choose_device, set_determinism
from dlfer.train.plan import describe_plan
from dlfer.train.progress import ConsoleListener, describe_seconds
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob, StageResult
from dlfer.train.watch import TrainingListener

__all__ = ["Session", "execute_run", "resume_run", "run_experiment", "start_run"]


@dataclass
class Session:
    """What several runs of one process share: device, stop requests, the listener, and loaded data.

    Attributes:
        options: of the command line.
        control: asked after each step whether to stop.
        listener: told about the progress.
        bundles: the data that has been loaded, by its config; arms and seeds share it.
        resume_hint: the command that goes on after a stop, where it is not that of the run itself.
    """

    options: RunOptions
    control: StopControl
    listener: TrainingListener
    bundles: dict[str, DataBundle] = field(default_factory=dict)
    resume_hint: str | None = None

    @classmethod
    def start(cls, options: RunOptions) -> Session:
        """Return a session that talks on stderr."""
        return cls(options, StopControl(options.max_hours), ConsoleListener())

    @property
    def runs_folder(self) -> Path:
        """Where runs of this session are put."""
        return self.options.out or default_runs_folder()

    def load_bundle(self, stage: StageConfig) -> DataBundle:
        """Return the stage's data, loaded once per session."""
        key = json.dumps([stage.data.model_dump(mode="json"), stage.image_size, stage.balance], sort_keys=True)
        if key not in self.bundles:
            start = time.monotonic()
            self.bundles[key] = load_data(stage.data, image_size=stage.image_size, balance=stage.balance)
            self.listener.say(describe_bundle(self.bundles[key], time.monotonic() - start))
        return self.bundles[key]


def run_experiment(file: Path | str, options: RunOptions) -> Path | None:
    """Run the experiment of a file from data to report; return the run's folder (None for a dry run).

    Raises:
        UserError: the file, the data or the environment is wrong; no run is left behind for a wrong file.
        TrainingStopped: by SIGTERM or --max-hours; the run can be resumed.
    """
    config = load_experiment(file, options.overrides)
    session = Session.start(options)
    if options.dry_run:
        explain_experiment(prepare_config(config, session)[0], session)
        return None
    with session.control.watch_signals():
        return start_run(config, session)


def resume_run(run: Path | str, options: RunOptions) -> Path:
    """Go on with a run that was interrupted, from its last checkpoint; a finished one is left as it is."""
    opened = open_run(run, options.out)
    # The cache of EF-FER1 stands beside the run, wherever that was put.
    session = Session.start(replace(options, out=opened.path.parent.parent))
    if opened.status == "finished":
        session.listener.say(f"{opened.path} is finished already.")
        return opened.path
    with session.control.watch_signals():
        return execute_run(opened, opened.config(), session)


def prepare_config(config: ExperimentConfig, session: Session) -> tuple[ExperimentConfig, list[str]]:
    """Return what is really run, and warnings: the experiment itself or its small form for --smoke."""
    return make_smoke_config(config) if session.options.smoke else (config, [])


def start_run(config: ExperimentConfig, session: Session, *, on_created: Callable[[Path], None] | None = None) -> Path:
    """Make a run directory for `config`, tell `on_created` its path, and execute it."""
    config, warnings = prepare_config(config, session)
    run = create_run(session.runs_folder, config, argv=list(session.options.argv))
    options = session.options
    run.update(smoke=options.smoke, use_cache=options.use_cache, judge_test=options.judge_test, warnings=warnings)
    if on_created is not None:
        on_created(run.path)
    for warning in warnings:
        session.listener.say(warning)
    return execute_run(run, config, session)


def execute_run(run: Run, config: ExperimentConfig, session: Session) -> Path:
    """Do every step of a run that is not done yet, and record how it ended.

    Raises:
        ModelError: another process works on this run.
    """
    with run.hold():
        try:
            _execute_steps(run, config, session)
        except TrainingStopped as stop:
            run.stop(stop.reason)
            hint = session.resume_hint or f"dlfer run --resume {run.path}"
            session.listener.say(f"{stop} Go on with: {hint}")
            raise
        except KeyboardInterrupt:
            # The second Ctrl-C, which does not wait for the end of a step: the last checkpoint stands.
            run.stop("Ctrl-C")
            raise
        except BaseException as error:
            run.fail(error)
            raise
        run.finish()
    return run.path


def _execute_steps(run: Run, config: ExperimentConfig, session: Session) -> None:
    say = session.listener.say
    device = choose_device(config.experiment, require_gpu=session.options.require_gpu)
    set_determinism(config.experiment)
    run.update(status="running", device=device.as_dict())
    bundle = session.load_bundle(config.finetune)
    if not run.read_json("run.json").get("judge_test", True):
        bundle = replace(bundle, test=None)
    run.write_json("data.json", describe_data(bundle))
    run.write_json("audit.json", _audit(run, config.finetune.data, bundle, session))
    extras = choose_extras(config.evaluate, bundle, smoke=run.is_smoke)
    pretrained = _pretrain(run, config, session, device) if config.pretrain else None
    network, record = _build_network(config, bundle, pretrained)
    if record is not None:
        run.write_json("transfer.json", record.as_dict())
        say(record.describe())
    result = _finetune(run, config, session, device, network, bundle)
    run.update(cost=_compute_cost(config, pretrained, result))
    classifier = FAMILIES[config.model.family](network, bundle.labels, config=config.model, channels=bundle.channels)
    about = {
        "experiment": config.experiment.name,
        "run": run.path.name,
        "protocol": bundle.protocol,
        "selected_on": bundle.selected_on,
    }
    classifier.save(run.path / "model", about=about)
    opened = log_opening(run, bundle.test) if bundle.test is not None else 0
    predictions = predict_parts(config, classifier, bundle, run.path / "predictions")
    metrics = compute_run_metrics(config, bundle, predictions, smoke=run.is_smoke, test_opened=opened)
    if metrics["temperature"] is not None:
        store_temperature(run.path / "model", **metrics["temperature"])
    splits = {"test": bundle.test, "validation": bundle.validation}
    metrics |= judge_extras(extras, classifier, splits, predictions, folder=run.path / "predictions" / "views")
    run.write_json("metrics.json", metrics)
    _draw_errors(run, bundle, predictions)
    say(describe_outcome(metrics))
    say(f"report: {write_report(run.path)}")
    say(f"model card: {write_card(run.path)}")


def _audit(run: Run, data: DataConfig, bundle: DataBundle, session: Session) -> dict:
    """Return the audit of the data as the run has it, made once for all runs on the very same data."""
    # Images that were drawn in place of absent files have no votes.
    votes = None if data.votes is None or data.source.startswith("synthetic") else resolve_path(data.votes)
    cache = session.runs_folder / ".cache" / "audit" if run.read_json("run.json")["use_cache"] else None
    return audit_data(bundle, cache=cache, votes=votes)


def describe_outcome(metrics: dict) -> str:
    """Return the headline of a run: the accuracy with its n, interval, part and protocol."""
    part = "test" if metrics["test"] else "validation"
    figure, n = metrics[part]["accuracy"], metrics[part]["n"]
    what = "test" if part == "test" else f"validation figure ({metrics['selected_on']}, used for selection)"
    view = metrics.get("headline", "single")
    if view != "single":
        figure, what = metrics["views"][view][part]["accuracy"], f"{what}, mean over views ({view.replace('_', ' ')})"
    banner = f"\n{metrics['banner']}" if metrics["banner"] else ""
    return (
        f"accuracy {figure['value']:.2%} (95 % {figure['low']:.2%} to {figure['high']:.2%}, n = {n:,}), {what}, "
        f"protocol {metrics['protocol']}{banner}"
    )


def _pretrain(run: Run, config: ExperimentConfig, session: Session, device: Device) -> Pretrained:
    """Obtain EF-FER1's backbone in the run's `pretrain/`."""
    job = _make_job("pretrain", config, config.pretrain.seed, run, session, device)
    run.log("pretrain_start")
    pretrained = obtain_backbone(
        config,
        job,
        load_bundle=lambda: session.load_bundle(config.pretrain),
        cache=session.runs_folder / ".cache" / "pretrain" if run.read_json("run.json")["use_cache"] else None,
        random_weights=run.is_smoke,
    )
    run.log("pretrain_end", digest=pretrained.digest, was_cached=pretrained.was_cached, **pretrained.cost)
    return pretrained


def _build_network(
    config: ExperimentConfig, bundle: DataBundle, pretrained: Pretrained | None
) -> tuple[TransferNetwork, TransferRecord | None]:
    """Build EF-FER2, the same initial head with and without EF-FER1, and carry the backbone over."""
    import keras

    # The head and the dropout seeds are drawn from the experiment's seed, whatever was trained before.
    keras.utils.set_random_seed(config.experiment.seed)
    network = build_transfer_network(
        config.model,
        num_labels=len(bundle.labels),
        image_size=config.finetune.image_size,
        channels=bundle.channels,
        precision=config.experiment.precision,
    )
    record = carry_backbone(pretrained.folder, network) if pretrained else None
    return network, record


def _finetune(
    run: Run, config: ExperimentConfig, session: Session, device: Device, network: TransferNetwork, bundle: DataBundle
) -> StageResult:
    job = _make_job("finetune", config, config.experiment.seed, run, session, device)
    for line in describe_plan("EF-FER2", job, network, bundle, precision=config.experiment.precision):
        session.listener.say(line)
        run.log("plan", text=line)
    _draw_augmented_page(run, config, network, bundle)
    run.log("finetune_start")
    result = train_stage(job, network, bundle)
    run.log("finetune_end", epochs=len(result.history), kept_epoch=result.kept_epoch + 1, seconds=result.seconds)
    return result


def _make_job(name: str, config: ExperimentConfig, seed: int, run: Run, session: Session, device: Device) -> StageJob:
    return StageJob(
        name=name,
        config=getattr(config, name),
        folder=run.path / name,
        seed=seed,
        device=device,
        checkpoint_minutes=config.experiment.checkpoint_minutes,
        control=session.control,
        listener=session.listener,
        max_steps=_limit_steps(run.is_smoke),
    )


def explain_experiment(config: ExperimentConfig, session: Session) -> None:
    """Say what a run would do: for each stage its steps, parameters, rates and memory; train nothing."""
    device = choose_device(config.experiment, require_gpu=session.options.require_gpu)
    session.listener.say(f"device: {device.kind} ({device.name}), {device.backend}, jit {device.jit}")
    for name, section in (("EF-FER1", config.pretrain), ("EF-FER2", config.finetune)):
        if section is None or (section is config.pretrain and section.weights is not None):
            session.listener.say(f"{name}: {'left out' if section is None else f'weights: {section.weights}'}")
            continue
        bundle = session.load_bundle(section)
        network = build_transfer_network(
            config.model,
            num_labels=len(bundle.labels),
            image_size=section.image_size,
            channels=bundle.channels,
            precision=config.experiment.precision,
        )
        stage = {"EF-FER1": "pretrain", "EF-FER2": "finetune"}[name]
        job = StageJob(
            stage,
            section,
            Path(),
            0,
            device,
            0.0,
            session.control,
            session.listener,
            _limit_steps(session.options.smoke),
        )
        for line in describe_plan(name, job, network, bundle, precision=config.experiment.precision):
            session.listener.say(line)


def _limit_steps(smoke: bool) -> int | None:
    return NUM_BATCHES if smoke else None


def describe_bundle(bundle: DataBundle, seconds: float) -> str:
    """Return what was loaded, with every note, for the terminal."""
    parts = [("train", bundle.train), ("validation", bundle.validation), ("test", bundle.test)]
    counts = ", ".join(f"{name} {len(split):,} ({split.name})" for name, split in parts if split is not None)
    notes = "".join(f"\n  note: {note}" for note in bundle.notes)
    return (
        f"data: {bundle.source}, {len(bundle.labels)} labels, protocol {bundle.protocol}: {counts}; "
        f"selected on {bundle.selected_on}; loaded in {describe_seconds(seconds)}{notes}"
    )


def _compute_cost(config: ExperimentConfig, pretrained: Pretrained | None, result: StageResult) -> dict:
    """Return what the run cost, EF-FER1 apart; its cost stands there also when it came from the cache."""
    before = pretrained.cost if pretrained else {}
    return {
        "finetune_seconds": result.seconds,
        "finetune_images": result.images,
        "finetune_image_size": config.finetune.image_size,
        "pretrain_seconds": before.get("seconds"),
        "pretrain_images": before.get("images"),
        "pretrain_image_size": before.get("image_size"),
        "pretrain_was_cached": pretrained.was_cached if pretrained else None,
    }


def _draw_augmented_page(run: Run, config: ExperimentConfig, network: TransferNetwork, bundle: DataBundle) -> None:
    """Write a page of training images as the network sees them in the first epoch."""
    inputs, targets, _ = next(
        iterate_epoch(
            bundle.train, config.finetune, num_labels=len(bundle.labels), seed=config.experiment.seed, epoch=0
        )
    )
    some = {name: values[:32] for name, values in inputs.items()}
    drawn = network.face_input.augment(some["image"], some, fill=config.finetune.augment.fill)
    images = np.asarray(drawn).round().clip(0, 255).astype(np.uint8)
    names = [bundle.labels[index] for index in targets[:32].argmax(axis=1)]
    write_augmented_page(run.path / "figures", images, names)


def _draw_errors(run: Run, bundle: DataBundle, predictions: dict[str, Predictions]) -> None:
    """Write pages of the most confident errors and commonest confusions on test, or on validation without a test."""
    part = "test" if "test" in predictions else "validation"
    split, predicted = getattr(bundle, part), predictions[part]
    if isinstance(split, Split):
        rows = sort_errors(predicted, 24)
        write_error_page(run.path / "figures", split.images[rows], predicted, rows)
        write_confusion_page(run.path / "figures", split.images, predicted)
