"""Training of networks (families transfer and hybrid): obtain EF-FER1, load its backbone into EF-FER2, fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import keras
import numpy as np

from dlfer.config.schema import ExperimentConfig, PretrainConfig, StageConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit
from dlfer.data.pipeline import iterate_epoch
from dlfer.experiment.extras import judge_milestones, predict_split_views
from dlfer.experiment.lineage import index_images
from dlfer.experiment.session import NUM_BATCHES, Session
from dlfer.metrics.predictions import Predictions
from dlfer.model.classifier import Classifier
from dlfer.model.families import FAMILIES
from dlfer.model.stage_network import TransferNetwork, build_stage_network
from dlfer.model.transfer import transfer_backbone
from dlfer.model.vggface2 import NUM_IMAGES
from dlfer.report.pictures import write_augmented_page
from dlfer.runs.changes import PRETRAIN_IMAGES_FILE, check_changed_images
from dlfer.runs.metrics_record import MilestoneMetrics
from dlfer.runs.records import Cost
from dlfer.runs.run import Run
from dlfer.runs.text import count_noun
from dlfer.train.cascade import Pretrained, describe_foreign_scaling, obtain_backbone
from dlfer.train.cluster import Device, choose_device
from dlfer.train.plan import describe_network, describe_plan, set_trainable, unfreeze_random_start
from dlfer.train.progress import TrainingListener
from dlfer.train.stage import MILESTONES, train_stage
from dlfer.train.state import StageJob, StageResult, restore_checkpoint


@dataclass(frozen=True)
class Fitted:
    """The result of fitting a run's classifier.

    Attributes:
        classifier: the trained classifier, ready to predict and to be saved.
        cost: time and images of the training.
        milestones: epoch -> file with the weights of that epoch.
    """

    classifier: Classifier
    cost: Cost
    milestones: Mapping[int, Path] = field(default_factory=dict)


def fit_network(run: Run, config: ExperimentConfig, session: Session, device: Device, bundle: DataBundle) -> Fitted:
    """Obtain EF-FER1 if there is one, load its backbone, and fine-tune EF-FER2; a stopped run is continued."""
    pretrained = pretrain(run, config, session, device) if config.pretrain else None
    network = build_finetune_network(run, config, session, bundle, pretrained)
    job = make_job("finetune", config, config.experiment.seed, run, session, device)
    if pretrained is None:
        job = _unfreeze(run, job)
    # Describe the network as it is trained after the head-only epochs.
    set_trainable(network.backbone, job.config.freeze, head_only=False)
    describe_network(network, config.model).write(run.path)
    result = _finetune(run, config, job, network, bundle)
    missed = [str(epoch) for epoch in config.finetune.milestones if epoch > len(result.history)]
    if missed and not run.is_smoke:
        _warn(
            run,
            session.listener,
            f"EF-FER2 ended after {count_noun(len(result.history), 'epoch')}, so that there is no row of the milestones "
            f"{', '.join(missed)}.",
        )
    if config.experiment.precision != "float32":
        network = _copy_in_float32(network, config, bundle)
    classifier = FAMILIES[config.model.family](network, bundle.labels, config=config.model, channels=bundle.channels)
    cost = compute_cost(config, pretrained, result)
    paths = sorted((run.path / "finetune" / MILESTONES).glob("*.npz"), key=lambda path: int(path.stem))
    return Fitted(classifier, cost, {int(path.stem): path for path in paths})


def _copy_in_float32(network: TransferNetwork, config: ExperimentConfig, bundle: DataBundle) -> TransferNetwork:
    """Return a copy, computing in float32, of a network that was trained in another precision.

    The copy is evaluated, calibrated and saved, since models are loaded in float32. Variables are float32 in both.
    """
    experiment = config.experiment.model_copy(update={"precision": "float32"})
    copy = build_stage_network(config.model_copy(update={"experiment": experiment}), config.finetune, bundle)
    for target, source in zip(copy.model.weights, network.model.weights, strict=True):
        target.assign(source.value)
    return copy


def pretrain(run: Run, config: ExperimentConfig, session: Session, device: Device) -> Pretrained:
    """Obtain EF-FER1's backbone in the run's folder `pretrain/` and log its cost."""
    job = make_job("pretrain", config, config.pretrain.seed, run, session, device)
    for note in _list_notes(config, smoke=run.is_smoke):
        _warn(run, session.listener, note)
    run.log("pretrain_start")
    pretrained = obtain_backbone(
        config,
        job,
        load_bundle=lambda: _load_pretraining_data(run, config, session),
        cache=session.runs_folder / ".cache" / "pretrain" if run.record.use_cache else None,
        load_images=lambda: draw_images(
            session.load_bundle(config.finetune).train, NUM_IMAGES, seed=config.pretrain.seed
        ),
        random_weights=run.is_smoke,
    )
    run.log("pretrain_end", digest=pretrained.digest, was_cached=pretrained.was_cached, **pretrained.cost)
    return pretrained


def _load_pretraining_data(run: Run, config: ExperimentConfig, session: Session) -> DataBundle:
    """Return EF-FER1's data after checking that it has not changed since the run began."""
    bundle = session.load_bundle(config.pretrain)
    accept = session.options.accept_changes
    check_changed_images(run, index_images(bundle), file=PRETRAIN_IMAGES_FILE, accept=accept)
    return bundle


def draw_images(split: Split | StreamedSplit, number: int, *, seed: int) -> np.ndarray:
    """Return at most `number` images of a split (uint8 [N, H, W, C]), sampled without replacement."""
    if isinstance(split, Split):
        drawn = np.random.default_rng(seed).permutation(len(split))[:number]
        return split.images[np.sort(drawn)]
    batches, found = split.batches(min(number, 50), seed=seed, epoch=0, training=True), []
    for images, _, _ in batches:
        found.append(images)
        if sum(map(len, found)) >= number:
            break
    return np.concatenate(found)[:number]


def build_finetune_network(
    run: Run, config: ExperimentConfig, session: Session, bundle: DataBundle, pretrained: Pretrained | None
) -> TransferNetwork:
    """Build EF-FER2, load the backbone of EF-FER1 if there is one, and record which weights were loaded."""
    # Seeded again, so that the initial head and the dropout seeds are the same with and without EF-FER1.
    keras.utils.set_random_seed(config.experiment.seed)
    network = build_stage_network(config, config.finetune, bundle)
    if pretrained is not None:
        record = transfer_backbone(pretrained.folder, network)
        record.write(run.path)
        if record.branches:
            run.update(branches=record.summarize_branches())
        for line in record.describe():
            session.listener.say(line)
    return network


def _list_notes(config: ExperimentConfig, *, smoke: bool) -> list[str]:
    """Return notes on EF-FER1: settings without effect, and published weights that expect another pixel scaling."""
    notes = [None if smoke else describe_foreign_scaling(config)]
    if config.pretrain.weights is not None:
        notes.append(_describe_unused(config.pretrain))
    else:
        notes.append(unfreeze_random_start("EF-FER1", config.pretrain)[1])
    return [note for note in notes if note is not None]


def _describe_unused(section: PretrainConfig) -> str | None:
    """Return a note on settings without effect in a section with `weights`, which are not trained further, or None."""
    unused = section.list_unused_keys()
    return f"EF-FER1: without effect: {', '.join(unused)}" if unused else None


def _unfreeze(run: Run, job: StageJob) -> StageJob:
    """Return EF-FER2's job for random weights, with nothing frozen; report and record the overridden settings."""
    stage, note = unfreeze_random_start("EF-FER2", job.config)
    if note is not None:
        _warn(run, job.listener, note)
    return replace(job, config=stage)


def _warn(run: Run, listener: TrainingListener, text: str) -> None:
    """Report a warning and record it in run.json for the reports, only once even if the run is resumed."""
    listener.say(text)
    run.warn(text)


def _finetune(
    run: Run, config: ExperimentConfig, job: StageJob, network: TransferNetwork, bundle: DataBundle
) -> StageResult:
    precision, is_random = config.experiment.precision, config.pretrain is None
    for line in describe_plan("EF-FER2", job, network, bundle, precision=precision, starts_at_random=is_random):
        job.listener.say(line)
        run.log("plan", text=line)
    _draw_augmented_page(run, config, network, bundle)
    run.log("finetune_start")
    result = train_stage(job, network, bundle)
    run.log("finetune_end", epochs=len(result.history), kept_epoch=result.kept_epoch + 1, seconds=result.seconds)
    return result


def judge_network_milestones(
    run: Run, bundle: DataBundle, fitted: Fitted, *, view: str, batch_size: int
) -> list[MilestoneMetrics]:
    """Evaluate the network with the weights of each milestone and restore its own weights afterwards."""
    classifier = fitted.classifier

    def predict(epoch: int, name: str) -> Predictions:
        split, weights = getattr(bundle, name), classifier.network.weights
        kept = [keras.ops.convert_to_numpy(variable.value) for variable in weights]
        restore_checkpoint(fitted.milestones[epoch], weights)
        try:
            probabilities = predict_split_views(classifier, split, view, batch_size=batch_size)
        finally:
            for variable, values in zip(weights, kept, strict=True):
                variable.assign(values)
        return Predictions(split.ids, classifier.labels, split.targets, probabilities)

    return judge_milestones(run, bundle, fitted.milestones, predict)


def make_job(name: str, config: ExperimentConfig, seed: int, run: Run, session: Session, device: Device) -> StageJob:
    """Return the job of a stage, "pretrain" or "finetune", in the run's folder of that name."""
    return StageJob(
        name=name,
        config=getattr(config, name),
        folder=run.path / name,
        seed=seed,
        device=device,
        checkpoint_minutes=config.experiment.checkpoint_minutes,
        control=session.control,
        listener=session.listener,
        max_steps=NUM_BATCHES if run.is_smoke else None,
        run_listeners=session.run_listeners,
    )


def explain_network(config: ExperimentConfig, session: Session) -> None:
    """Report what a run would do (steps, parameters, learning rates and memory of each stage), without training."""
    device = choose_device(config.experiment, require_gpu=session.options.require_gpu)
    session.listener.say(f"device: {device.kind} ({device.name}), {device.backend}, jit {device.jit}")
    for name, section in (("EF-FER1", config.pretrain), ("EF-FER2", config.finetune)):
        explain_stage(name, config, section, session, device)


def explain_stage(
    name: str, config: ExperimentConfig, section: StageConfig | None, session: Session, device: Device
) -> None:
    """Report how one stage of a network would be trained; `name` is "EF-FER1" or "EF-FER2", `section` its config."""
    if section is None or (section is config.pretrain and section.weights is not None):
        session.listener.say(f"{name}: {'left out' if section is None else f'weights: {section.describe_weights()}'}")
        notes = [] if section is None else [describe_foreign_scaling(config), _describe_unused(section)]
        for note in filter(None, notes):
            session.listener.say(note)
        return
    is_random = section is config.pretrain or config.pretrain is None
    if is_random:
        section, note = unfreeze_random_start(name, section)
        if note is not None:
            session.listener.say(note)
    bundle = session.load_bundle(section)
    network = build_stage_network(config, section, bundle)
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
        NUM_BATCHES if session.options.smoke else None,
    )
    precision = config.experiment.precision
    for line in describe_plan(name, job, network, bundle, precision=precision, starts_at_random=is_random):
        session.listener.say(line)


def compute_cost(config: ExperimentConfig, pretrained: Pretrained | None, result: StageResult) -> Cost:
    """Return the cost of the run, with that of EF-FER1 separate and included even if it came from the cache."""
    before = pretrained.cost if pretrained else {}
    return Cost(
        finetune_seconds=result.seconds,
        finetune_images=result.images,
        finetune_image_size=config.finetune.image_size,
        pretrain_seconds=before.get("seconds"),
        pretrain_images=before.get("images"),
        pretrain_image_size=before.get("image_size"),
        pretrain_was_cached=pretrained.was_cached if pretrained else None,
    )


def _draw_augmented_page(run: Run, config: ExperimentConfig, network: TransferNetwork, bundle: DataBundle) -> None:
    """Write a page of augmented training images, as the network gets them in the first epoch."""
    inputs, targets = next(
        iterate_epoch(
            bundle.train, config.finetune, num_labels=len(bundle.labels), seed=config.experiment.seed, epoch=0
        )
    )
    some = {name: values[:32] for name, values in inputs.items()}
    drawn = network.face_input.augment(some["image"], some, fill=config.finetune.augment.fill)
    images = np.asarray(drawn).round().clip(0, 255).astype(np.uint8)
    names = [bundle.labels[index] for index in targets[:32].argmax(axis=1)]
    write_augmented_page(run.path / "figures", images, names)
