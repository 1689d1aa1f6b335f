"""Execution of one experiment from config to report; the only module that is concerned with every step.

ExperimentConfig -> DataBundle -> Classifier -> Predictions -> Metrics -> report
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np

from dlfer.config.load import load_experiment, resolve_path
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.audit import audit_data
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.images import compute_side, match_channels
from dlfer.errors import ResumeError, TrainingStopped, shorten
from dlfer.experiment.distill import distill
from dlfer.experiment.extras import Extras, choose_extras, compute_extra_metrics, judge_milestones
from dlfer.experiment.fit_boosted import explain_boosted, fit_boosted
from dlfer.experiment.fit_ensemble import (
    FittedEnsemble,
    compare_members,
    explain_ensemble,
    fit_ensemble,
    is_selected,
    trace_members,
)
from dlfer.experiment.fit_network import Fitted, explain_network, fit_network, judge_network_milestones
from dlfer.experiment.limits import refuse_obstacles
from dlfer.experiment.lineage import History, index_images, trace_pretraining
from dlfer.experiment.session import RunMembers, Session, create_member_run, make_smoke_config
from dlfer.experiment.splits import (
    EvaluationDuplicates,
    compute_run_metrics,
    describe_data,
    find_run_duplicates,
    predict_splits,
    sort_errors,
)
from dlfer.explain.figures import MAX_EXAMPLES, choose_examples, write_occlusion_page, write_preparation_page
from dlfer.metrics.confidence import describe_temperature
from dlfer.metrics.learned import DID_NOT_LEARN, find_learning_failure
from dlfer.metrics.predictions import Known, Predictions
from dlfer.model.classifier import Classifier, NetworkClassifier
from dlfer.model.families import EnsembleClassifier
from dlfer.report.card import write_card
from dlfer.report.headline import describe_duplicates, format_accuracy, get_metrics_without_duplicates
from dlfer.report.html import write_report
from dlfer.report.page import format_percent
from dlfer.report.pictures import write_confusion_page, write_error_page
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.changes import check_changed_images, check_changes_since_start
from dlfer.runs.find import open_run
from dlfer.runs.listeners import Listener, Listeners, RunOptions
from dlfer.runs.metrics_record import LAST_EPOCH, Metrics
from dlfer.runs.records import About, DataRecord, OnnxRecord, RunRecord, WeightsOrigin
from dlfer.runs.run import Run, format_utc_now
from dlfer.runs.run_records import TransferRecord, count_openings, log_opening
from dlfer.runs.trackers import make_trackers
from dlfer.train.cluster import Device, choose_device, set_determinism

__all__ = ["execute_run", "resume_run", "run_experiment", "start_run"]


def run_members_here(runs: Mapping[str, Run], session: Session, on_change: Callable[[], None]) -> None:
    """Execute the runs of an ensemble's members sequentially in this process."""
    for number, (name, run) in enumerate(runs.items(), start=1):
        session.listener.say(f"[{number}/{len(runs)}] member {name}")
        try:
            execute_run(run, run.config(), session)
        finally:
            on_change()


def explain_experiment(config: ExperimentConfig, session: Session) -> None:
    """Report what a run, or the smoke run of the reduced experiment, would do, without training."""
    if session.options.smoke:
        config, _ = make_smoke_config(config)
    EXPLAINERS[config.model.family](config, session)


FITTERS: dict[str, Callable[[Run, ExperimentConfig, Session, Device, DataBundle], Fitted]] = {
    "transfer": fit_network,
    "hybrid": fit_network,
    "boosted": fit_boosted,
    "ensemble": partial(fit_ensemble, run_members=run_members_here),
}
EXPLAINERS: dict[str, Callable[[ExperimentConfig, Session], None]] = {
    "transfer": explain_network,
    "hybrid": explain_network,
    "boosted": explain_boosted,
    "ensemble": partial(explain_ensemble, explain=explain_experiment),
}


def run_experiment(
    experiment: Path | str | ExperimentConfig,
    options: RunOptions,
    *,
    run_members: RunMembers | None = None,
    callbacks: Iterable[Listener] = (),
    progress: bool = True,
) -> Path | None:
    """Run an experiment from data to report and return the run's folder (None for a dry run).

    Args:
        experiment: a file, or an experiment that was loaded from one.
        run_members: trains the members of an ensemble; None: they are trained sequentially in this process.
        callbacks: listeners of the run, and of the runs of an ensemble's members that are trained in this process.
        progress: whether to report progress on stderr; warnings are always shown.

    Raises:
        UserError: the file, the data or the environment is invalid; no run is created for an invalid file.
        TrainingStopped: by Ctrl-C, SIGTERM or --max-hours; the run can be resumed.
    """
    config = load_experiment(experiment, options.overrides)
    refuse_obstacles(config, experiment, smoke=options.smoke, out=options.out)
    session = Session.start(options, run_members=run_members, callbacks=callbacks, progress=progress)
    if options.dry_run:
        explain_experiment(config, session)
        return None
    with session.control.watch_signals():
        return start_run(config, session)


def resume_run(
    run: Path | str,
    options: RunOptions,
    *,
    run_members: RunMembers | None = None,
    callbacks: Iterable[Listener] = (),
    progress: bool = True,
) -> Path:
    """Resume an interrupted run from its last checkpoint and return its folder; a finished run is left unchanged.

    The other arguments are those of `run_experiment`.
    """
    opened = open_run(run, options.out)
    # The cache of EF-FER1 is in the folder of runs that this run was created in.
    options = replace(options, out=opened.path.parent.parent)
    session = Session.start(options, run_members=run_members, callbacks=callbacks, progress=progress)
    if opened.status == "finished":
        session.listener.say(f"{opened.path} is finished already.")
        return opened.path
    with session.control.watch_signals():
        return execute_run(opened, opened.config(), session)


def start_run(config: ExperimentConfig, session: Session) -> Path:
    """Create a run directory for `config`, execute the run, and return the directory."""
    run = create_member_run(config, session.options, session.runs_folder)
    for warning in run.record.warnings:
        session.listener.say(warning)
    return execute_run(run, run.config(), session)


def execute_run(run: Run, config: ExperimentConfig, session: Session) -> Path:
    """Execute the steps of a run that are not done yet, record how it ended, and return its folder.

    Raises:
        ModelError: another process is executing this run.
        ResumeError: the run's data, experiment or software has changed since it began, and the session rejects that.
    """
    with run.hold():
        listeners = Listeners((*session.callbacks, *make_trackers(config.experiment.track)), session.listener.warn)
        listeners.start(run.path, config)
        try:
            metrics = _execute_and_record(run, config, replace(session, run_listeners=listeners))
        except BaseException as error:
            listeners.fail(error)
            raise
        listeners.finish(metrics, run.path)
    return run.path


def _execute_and_record(run: Run, config: ExperimentConfig, session: Session) -> Metrics:
    try:
        metrics = _execute_steps(run, config, session)
    except TrainingStopped as stop:
        run.stop(stop.reason)
        stop.folder = run.path
        hint = session.describe_resume(run.path)
        session.listener.say(f"{stop} Continue with: {hint}")
        raise
    except KeyboardInterrupt:
        # The second Ctrl-C interrupts in the middle of a step; the last checkpoint remains valid.
        run.stop("Ctrl-C")
        raise
    except ResumeError:
        run.stop("changes since it began")
        raise
    except BaseException as error:
        run.fail(error)
        if isinstance(error, OSError):
            hint = session.describe_resume(run.path)
            session.listener.say(f"{run.path}: what was written last is kept. When the cause is removed: {hint}")
        raise
    return metrics


def _execute_steps(run: Run, config: ExperimentConfig, session: Session) -> Metrics:
    say = session.listener.say
    accept = session.options.accept_changes
    check_changes_since_start(run, accept=accept, backend=keras.backend.backend())
    device = choose_device(config.experiment, require_gpu=session.options.require_gpu)
    set_determinism(config.experiment)
    run.update(status="running", device=device.as_dict())

    bundle = session.load_bundle(config.finetune)
    check_changed_images(run, index_images(bundle), accept=accept)
    bundle = distill(run, config, session, bundle)
    if not run.record.judge_test:
        bundle = replace(bundle, test=None)
    history = _trace_pretraining(run, config, session)
    duplicates = find_run_duplicates(bundle, history, config.finetune.data)
    _warn_of_leak(run, duplicates, session)
    _warn_of_weights(run, config, history, bundle, session)
    data = describe_data(bundle, duplicates)
    data.write(run.path)
    _audit(run, config.finetune.data, bundle, session).write(run.path)
    extras = choose_extras(config.evaluate, bundle, smoke=run.is_smoke)

    fitted = FITTERS[config.model.family](run, config, session, device, bundle)
    run.update(cost=fitted.cost)

    predictions = _predict(run, config, bundle, data, fitted, say)
    metrics = _compute_metrics(run, config, bundle, duplicates, fitted, predictions, extras)
    metrics.write(run.path)

    _draw_errors(run, bundle, predictions)
    _draw_explanations(run, fitted.classifier, bundle, predictions)
    say(describe_outcome(metrics))
    _warn_of_learning(run, predictions.get("train"), session)
    card, ended = write_card(run.path), format_utc_now()
    say(f"report: {write_report(run.path, ending={'status': 'finished', 'finished': ended})}")
    say(f"model card: {card}")
    run.finish(at=ended)
    return metrics


def _trace_pretraining(run: Run, config: ExperimentConfig, session: Session) -> History:
    """Return the history of EF-FER1, or of an ensemble's members: the images that they were or will be trained on.

    Raises:
        DataError: the training data of EF-FER1 cannot be read.
    """
    section = config.pretrain
    if section is not None and section.data is not None and section.weights is None:
        session.load_bundle(section)
    elif run.is_smoke:  # the weights are random
        return History()
    if config.model.family == "ensemble":
        return History() if run.is_smoke else trace_members(config, session.load_bundle)
    return trace_pretraining(config, session.load_bundle)


def _warn_of_leak(run: Run, duplicates: EvaluationDuplicates | None, session: Session) -> None:
    """Warn on the terminal and in run.json, for report and card, of evaluated images that leak from EF-FER1's data."""
    text = None if duplicates is None else duplicates.describe_leak()
    if text is not None and not run.is_smoke:
        run.warn(text)
        session.listener.warn(text)


def _warn_of_weights(
    run: Run, config: ExperimentConfig, history: History, bundle: DataBundle, session: Session
) -> None:
    """Report and record if the training images of `pretrain.weights` are unknown; members of ensembles have notes."""
    judged = bundle.validation if bundle.test is None else bundle.test
    is_needed = config.model.family != "ensemble" and config.pretrain is not None and config.pretrain.list_of_weights
    if is_needed and isinstance(judged, Split) and not history.is_counted(judged, config.finetune.data):
        text = (
            f"What the weights of pretrain.weights {config.pretrain.describe_weights()} were trained on is not known here"
            f"{' in full' if history.seen else ''}. That must not contain images of the {judged.name} split, or the accuracy is "
            "too high."
        )
        run.warn(text)
        session.listener.say(text)


def _predict(
    run: Run,
    config: ExperimentConfig,
    bundle: DataBundle,
    data: DataRecord,
    fitted: Fitted,
    say: Callable[[str], None],
) -> dict[str, Predictions]:
    """Return the predictions on each split; the model is saved, with its temperature, before test is predicted."""
    classifier, folder = fitted.classifier, run.path / "predictions"
    known = _collect_known(config, fitted, ("validation",))
    predictions = predict_splits(config, classifier, bundle, folder, names=("validation", "train"), known=known)
    classifier.temperature_fit = describe_temperature(predictions["validation"], bundle.selected_on)
    about = _describe_training(run, config, bundle, data, classifier)
    classifier.save(run.path / "model", about=about, write_onnx=partial(_write_onnx, bundle=bundle, say=say))
    if bundle.test is not None:
        log_opening(run, bundle.test.name, len(bundle.test))
        known = _collect_known(config, fitted, ("test",))
        predictions |= predict_splits(config, classifier, bundle, folder, names=("test",), known=known)
    return predictions


def _write_onnx(
    classifier: Classifier, folder: Path, *, bundle: DataBundle, say: Callable[[str], None]
) -> OnnxRecord | str:
    """Write a model's ONNX file, checked on validation images; return its record, or why there is no file."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        absent = (
            f"It was trained on {backend}, and TensorFlow writes ONNX: KERAS_BACKEND=tensorflow dlfer ship adds one."
        )
        say(f"The model has no ONNX file, so that predictions load Keras. {absent}")
        return absent
    from dlfer.export.ship import write_embedded_onnx

    split = bundle.validation
    images = split.images if isinstance(split, Split) else np.zeros((0, 1, 1, classifier.channels), np.uint8)
    source = f"validation images ({split.name})"
    try:
        found = write_embedded_onnx(
            classifier, folder, images=match_channels(images, classifier.channels), source=source
        )
    except Exception as error:  # converters raise anything, and an optional file must not make the run fail
        found = f"It could not be written ({type(error).__name__}: {shorten(error)})."
    if isinstance(found, str):
        say(f"The model has no ONNX file, so that predictions load Keras. {found}")
    return found


def _collect_known(config: ExperimentConfig, fitted: Fitted, names: tuple[str, ...]) -> Known:
    """Return an ensemble's predictions for each split and view, combined from those of its members; else {}."""
    if not isinstance(fitted, FittedEnsemble):
        return {}
    views = ("single", *config.evaluate.views)
    how = config.ensemble.combine
    return {(name, view): fitted.answers.combine(name, view, how) for name in names for view in views}


def _describe_training(
    run: Run, config: ExperimentConfig, bundle: DataBundle, data: DataRecord, classifier: Classifier
) -> About:
    """Return the description of the training that is saved in the artifact."""
    faces, shape = config.finetune.data.faces, data.splits["train"].shape
    return About(
        experiment=config.experiment.name,
        run=run.path.name,
        protocol=bundle.protocol,
        selected_on=bundle.selected_on if is_selected(config) else LAST_EPOCH,
        smoke=run.is_smoke,
        faces=faces.model_dump(mode="json") if faces else None,
        # Faces in photos are cropped at the resolution of the training images, whatever the network's input size is.
        face_size=compute_side(*shape[:2], classifier.aspect) if shape else None,
        origins=list_origins(run, classifier),
    )


def list_origins(run: Run, classifier: Classifier) -> list[WeightsOrigin]:
    """Return the origins of the published weights and teachers of a classifier and its members, without repetitions."""
    transfer, record = TransferRecord.read(run.path), RunRecord.read(run.path)
    found = [] if transfer is None else list(transfer.origins)
    found += [] if record is None else [origin for teacher in record.teachers for origin in teacher.origins]
    for member in classifier.members.values() if isinstance(classifier, EnsembleClassifier) else ():
        found += member.about.origins
    return [origin for number, origin in enumerate(found) if origin not in found[:number]]


def _compute_metrics(
    run: Run,
    config: ExperimentConfig,
    bundle: DataBundle,
    duplicates: EvaluationDuplicates | None,
    fitted: Fitted,
    predictions: dict[str, Predictions],
    extras: Extras,
) -> Metrics:
    """Return the contents of metrics.json: splits, milestones, views, groups, and metrics specific to the family."""
    evaluate = config.evaluate
    names = tuple(name for name in ("validation", "test") if name in predictions)
    found = compute_extra_metrics(
        extras,
        fitted.classifier,
        {"test": bundle.test, "validation": bundle.validation},
        predictions,
        folder=run.path / "predictions" / "views",
        known=_collect_known(config, fitted, names),
    )
    more: dict[str, object] = {
        "views": found.views,
        "groups": found.groups,
        "headline": extras.headline,
        "is_selected": is_selected(config),
    }
    if not isinstance(fitted, FittedEnsemble):
        milestones = judge_network_milestones(
            run, bundle, fitted, view=evaluate.headline, batch_size=evaluate.batch_size
        )
    else:
        answers = fitted.answers
        epochs = answers.list_milestones(config.finetune.milestones, evaluate.headline)
        how = config.ensemble.combine
        milestones = judge_milestones(
            run,
            bundle,
            epochs,
            lambda epoch, name: answers.combine(name, evaluate.headline, how, epoch=epoch),
        )
        more |= compare_members(config, answers, epochs)
    if milestones:
        more["milestones"] = milestones
    metrics = compute_run_metrics(
        config,
        bundle,
        predictions,
        duplicates=duplicates,
        temperature=fitted.classifier.temperature_fit,
        smoke=run.is_smoke,
        test_opened=count_openings(run.path),
    )
    learners = fitted.answers.members if isinstance(fitted, FittedEnsemble) else run.record.teachers
    leaks = [learner.leak for learner in learners if learner.leak]
    if leaks:
        more["banner"] = " ".join(filter(None, (metrics.banner, *leaks)))
    return metrics.model_copy(update=more)


def _warn_of_learning(run: Run, train: Predictions | None, session: Session) -> None:
    """Warn, on the terminal and in run.json for the report and the card, if the training did not learn."""
    why = find_learning_failure(train)
    if why is not None and not run.is_smoke:
        text = f"{DID_NOT_LEARN}: {why}. {advise_training(run.config())}"
        run.warn(text)
        session.listener.warn(text)


def advise_training(config: ExperimentConfig) -> str:
    """Return advice on an experiment whose training did not learn, without the settings that it already has."""
    stage = config.finetune
    ways = ["more epochs", "another finetune.optimizer.learning_rate"]
    if stage.clip is None:
        ways.append("finetune.clip: 1.0")
    if not stage.schedule.warmup_epochs:
        ways.append("a warm-up (finetune.schedule.warmup_epochs)")
    if config.pretrain is None:
        ways.append("a backbone whose initialisation suits a start from random weights")
    return f"Try {', '.join(ways[:-1])} or {ways[-1]}."


def _audit(run: Run, data: DataConfig, bundle: DataBundle, session: Session) -> AuditRecord:
    """Return the audit of the run's data, from the cache if an earlier run had the same data."""
    # Synthetic images that replace absent files in a smoke run have no votes.
    votes = None if data.votes is None or data.source.startswith("synthetic") else resolve_path(data.votes)
    cache = session.runs_folder / ".cache" / "audit" if run.record.use_cache else None
    return audit_data(bundle, cache=cache, votes=votes, aliases=data.labels.aliases)


def describe_outcome(metrics: Metrics) -> str:
    """Return a run's headline: accuracy with interval, n, split, protocol, averages, and values without duplicates."""
    name, judged, view = metrics.judged_split, metrics.judged, metrics.headline
    accuracy = judged.accuracy
    what = "test" if name == "test" else metrics.describe_validation()
    if view != "single":
        accuracy = metrics.views[view][name].accuracy
        what = f"{what}, mean over views ({view.replace('_', ' ')})"
    banner = f"\n{metrics.banner}" if metrics.banner else ""
    means = {key: judged.get(f"macro_{key}") for key in ("precision", "recall", "specificity")}
    listed = ", ".join(f"{key} {format_percent(mean.value if mean else None)}" for key, mean in means.items())
    return (
        f"accuracy {accuracy.value:.2%} (95 % {accuracy.low:.2%} to {accuracy.high:.2%}, n = {judged.n:,}), {what}, "
        f"protocol {metrics.protocol}; means over the labels: {listed}{_describe_duplicates(metrics)}{banner}"
    )


def _describe_duplicates(metrics: Metrics) -> str:
    """Return the lines of the headline about duplicates, each preceded by a line break."""
    without, described = get_metrics_without_duplicates(metrics), describe_duplicates(metrics)
    lines = [f"without duplicates: accuracy {format_accuracy(without)}"] if without else []
    return "".join(f"\n{line}" for line in [*lines, *([described] if described else [])])


def _draw_errors(run: Run, bundle: DataBundle, predictions: dict[str, Predictions]) -> None:
    """Write pages of the most confident errors and the most frequent confusions on test, else on validation."""
    name = "test" if "test" in predictions else "validation"
    split, predicted = getattr(bundle, name), predictions[name]
    if isinstance(split, Split):
        rows = sort_errors(predicted, 24)
        write_error_page(run.path / "figures", split.images[rows], predicted, rows)
        write_confusion_page(run.path / "figures", split.images, predicted)


def _draw_explanations(
    run: Run, classifier: Classifier, bundle: DataBundle, predictions: dict[str, Predictions]
) -> None:
    """Write occlusion maps of example images, and for a network the preprocessing steps of the first three."""
    from dlfer.explain.figures import compute_preparation
    from dlfer.explain.occlusion import compute_occlusion

    name = "test" if "test" in predictions else "validation"
    split, predicted, folder = getattr(bundle, name), predictions[name], run.path / "figures"
    if not isinstance(split, Split):
        return
    rows = choose_examples(predicted, limit=1 if run.is_smoke else MAX_EXAMPLES)
    images = split.images[rows]
    targets = predicted.targets[rows].tolist()
    maps = [compute_occlusion(classifier.predict, *pair) for pair in zip(images, targets, strict=True)]
    write_occlusion_page(folder, images, maps, predictions=predicted, rows=rows)
    if isinstance(classifier, NetworkClassifier) and len(rows):
        names = [predicted.labels[target] for target in targets[:3]]
        write_preparation_page(folder, images[:3], compute_preparation(classifier, images[:3]), names)
