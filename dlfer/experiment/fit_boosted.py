"""Training of boosted trees on a backbone's features: obtain EF-FER1, load it, compute features, and grow trees."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig, StageConfig
from dlfer.config.sections import BoostingConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.pipeline import add_copies, balance_indices, compute_class_weights
from dlfer.errors import ConfigError, DataError
from dlfer.experiment.fit_network import Fitted, build_finetune_network, compute_cost, explain_stage, make_job, pretrain
from dlfer.experiment.session import NUM_BATCHES, Session
from dlfer.model.families import BoostedClassifier, LevelFeatures, build_level_features
from dlfer.model.stage_network import TransferNetwork, build_transfer_network
from dlfer.model.trees import FeatureScale, import_xgboost
from dlfer.runs.run import Run, format_duration
from dlfer.runs.run_records import BoostingRecord
from dlfer.runs.text import count_noun
from dlfer.train.boosting import Extraction, TreeData, compute_importance, extract_features, grow_trees
from dlfer.train.cluster import Device, choose_device
from dlfer.train.plan import describe_network
from dlfer.train.state import StageResult

SECONDS_PER_VISIT, SECONDS_PER_BIN = 0.8e-9, 11e-9
"""Seconds on one core for a row, a feature and a tree level; and for a bin of a sampled feature at a node. Fitted to
rounds of 2,000 to 28,700 rows by 1,488 features, with depths 3 and 6 and a fifth or all of the features."""


@dataclass(frozen=True)
class _Extracted:
    """The features for the trees, and the cost of computing them."""

    train: TreeData
    validation: TreeData
    labels: tuple[str, ...]
    scale: FeatureScale
    images: int
    seconds: float
    were_cached: bool


def fit_boosted(run: Run, config: ExperimentConfig, session: Session, device: Device, bundle: DataBundle) -> Fitted:
    """Obtain EF-FER1 if there is one, compute multi-level features, and grow trees on them.

    Features are float32 regardless of `experiment.precision`. A stopped run is continued and gives the same trees.

    Raises:
        EnvironmentProblem: xgboost is not installed.
        ConfigError: the experiment has a setting that trees do not support.
        DataError: the data is streamed.
    """
    import_xgboost()
    _check(config, bundle)
    config = with_overrides(config, {"experiment.precision": "float32"})
    pretrained = pretrain(run, config, session, device) if config.pretrain else None
    network = build_finetune_network(run, config, session, bundle, pretrained)
    features = build_level_features(network, config.model, config.boosting)
    network.backbone.trainable = False
    describe_network(network, config.model, has_head=False).write(run.path)
    for line in _describe_plan(config, features, bundle, smoke=run.is_smoke):
        session.listener.say(line)
        run.log("plan", text=line)
    extracted = _extract(run, config, session, bundle, (network, features))
    job = make_job("finetune", config, config.experiment.seed, run, session, device)
    run.log("finetune_start")
    booster, result = grow_trees(
        job, config.boosting, extracted.train, extracted.validation, num_labels=len(bundle.labels)
    )
    run.log("finetune_end", epochs=len(result.history), kept_epoch=result.kept_epoch + 1, seconds=result.seconds)
    _describe_trees(config.boosting, booster, features=features, extracted=extracted, result=result).write(run.path)
    classifier = BoostedClassifier(
        network,
        bundle.labels,
        config=config.model,
        channels=bundle.channels,
        boosting=config.boosting,
        trees=(features, extracted.scale, booster),
    )
    spent = replace(result, seconds=extracted.seconds + result.seconds, images=extracted.images)
    return Fitted(classifier, compute_cost(config, pretrained, spent))


def _describe_trees(
    boosting: BoostingConfig, booster: Any, *, features: LevelFeatures, extracted: _Extracted, result: StageResult
) -> BoostingRecord:
    """Return the contents of boosting.json: the grown trees, their feature importance, and timings."""
    rounds = booster.num_boosted_rounds()
    importance = compute_importance(booster, [level.size for level in features.levels])
    return BoostingRecord.build(
        {
            "rounds": rounds,
            "rounds_an_epoch": rounds // (result.kept_epoch + 1),
            "trees": rounds * len(extracted.labels),
            "levels": [{"name": level.name, **found} for level, found in zip(features.levels, importance, strict=True)],
            "normalize": boosting.normalize.model_dump(),
            "row_weights": _describe_weights(extracted.train, extracted.labels),
            "features_seconds": extracted.seconds,
            "features_were_cached": extracted.were_cached,
            "trees_seconds": result.seconds,
        }
    )


def _extract(
    run: Run,
    config: ExperimentConfig,
    session: Session,
    bundle: DataBundle,
    parts: tuple[TransferNetwork, LevelFeatures],
) -> _Extracted:
    """Compute the features of train and validation, and balance and normalise them."""
    network, features = parts
    extraction = Extraction(
        features,
        network,
        config.finetune.batch_size,
        session.runs_folder / ".cache" / "features" if run.record.use_cache else None,
        session.control,
        session.listener,
    )
    run.log("features_start")
    split, rows = balance_train(config.finetune, bundle.train, seed=config.experiment.seed)
    train = extract_features(extraction, split, split_name="train")
    validation = extract_features(extraction, bundle.validation, split_name="validation")
    seconds, were_cached = train.seconds + validation.seconds, train.was_cached and validation.was_cached
    run.log("features_end", seconds=seconds, were_cached=were_cached)
    values, targets = train.values[rows], split.targets[rows]
    scale = FeatureScale.fit(config.boosting.normalize.features, features.levels, values)
    return _Extracted(
        TreeData(scale.apply(values), targets, compute_row_weights(config, targets, len(bundle.labels))),
        TreeData(scale.apply(validation.values), bundle.validation.targets),
        bundle.labels,
        scale,
        len(split) + len(bundle.validation),
        seconds,
        were_cached,
    )


def balance_train(stage: StageConfig, split: Split, *, seed: int) -> tuple[Split, np.ndarray]:
    """Return the images whose features are computed, and the rows of them (int [M]) that trees are grown on.

    augment adds augmented copies once, until every class is as large as the largest, unless this was done before the
    split was drawn; undersample takes as many images of each class as the smallest class has; class_weight and sampler
    take every image, and balance the classes by row weights.
    """
    if stage.balance == "augment" and stage.data.split != "after_balance":
        split = add_copies(split, seed=seed)
    how = "undersample" if stage.balance == "undersample" else "none"
    return split, balance_indices(split.targets, how, seed=seed, epoch=0)


def compute_row_weights(config: ExperimentConfig, targets: np.ndarray, num_labels: int) -> np.ndarray | None:
    """Return row weights (float32 [N], mean 1) that make all classes count equally, or None if none are configured."""
    if config.boosting.normalize.rows or config.finetune.balance in ("class_weight", "sampler"):
        return compute_class_weights(np.bincount(targets, minlength=num_labels))[targets]
    return None


def explain_boosted(config: ExperimentConfig, session: Session) -> None:
    """Report what a run would do (EF-FER1, features, trees, memory, times), computing only two batches of features."""
    import_xgboost()
    device = choose_device(config.experiment, require_gpu=session.options.require_gpu)
    session.listener.say(f"device: {device.kind} ({device.name}), {device.backend}, jit {device.jit}; trees on the CPU")
    explain_stage("EF-FER1", config, config.pretrain, session, device)
    bundle = session.load_bundle(config.finetune)
    _check(config, bundle)
    network = build_transfer_network(
        config.model,
        num_labels=len(bundle.labels),
        image_size=config.finetune.image_size,
        crop=config.finetune.crop,
        aspect=config.finetune.data.aspect,
        channels=bundle.channels,
    )
    features = build_level_features(network, config.model, config.boosting)
    for line in _describe_plan(config, features, bundle, smoke=session.options.smoke):
        session.listener.say(line)


def _describe_plan(config: ExperimentConfig, features: LevelFeatures, bundle: DataBundle, *, smoke: bool) -> list[str]:
    """Return lines for the terminal and the run's log: features, memory, rounds, and estimated times."""
    stage, boosting = config.finetune, config.boosting
    num_images, num_rows = count_rows(stage, bundle)
    rounds = min(boosting.rounds_per_epoch, NUM_BATCHES) if smoke else boosting.rounds_per_epoch
    num_features, total = features.num_features, rounds * stage.epochs
    levels = ", ".join(f"{level.name} {level.size:,}" for level in features.levels)
    # Features are float16 on disk. The trees take scaled float32 features of both splits and a byte per bin index.
    disk = 2 * num_images * num_features
    memory = num_features * (4 * (num_rows + len(bundle.validation)) + 2 * num_rows)
    features_seconds = (num_images + len(bundle.validation)) * _time_an_image(features, bundle, stage.batch_size)
    trees_seconds = total * estimate_round(boosting, num_rows, num_features, len(bundle.labels))
    weighted = boosting.normalize.rows or stage.balance in ("class_weight", "sampler")
    return [
        f"features: {num_features:,} of {len(features.levels)} levels ({levels}); {num_images:,} + "
        f"{len(bundle.validation):,} images of {stage.image_size}x{stage.image_size}, {disk / 2**20:,.0f} MiB on disk, "
        f"about {format_duration(features_seconds, is_estimate=True)} unless they are in the cache",
        f"trees: {num_rows:,} rows, at most {total:,} rounds ({count_noun(stage.epochs, 'epoch')} of {rounds}) of {len(bundle.labels)} "
        f"trees of depth {boosting.max_depth}, rate {boosting.learning_rate:g}; expected memory about "
        f"{memory / 2**30:.1f} GiB; about {format_duration(trees_seconds, is_estimate=True)} for all rounds, at most",
        f"trees: rows {'weighted so that all classes count equally' if weighted else 'unweighted'}, features "
        f"{boosting.normalize.features}, leaves {'within -1..1' if boosting.normalize.leaves else 'as they are'}; the "
        f"{stage.keep} epoch by {stage.monitor} on validation is kept",
        "trees: optimizer, schedule, loss, augment, freeze, ema and clip of finetune, and model.dropout, head.hidden and "
        "head.activation, do not apply to trees and are not used",
    ]


def estimate_round(boosting: BoostingConfig, num_rows: int, num_features: int, num_labels: int) -> float:
    """Return the estimated seconds of a round, assuming that all cores of this machine are idle."""
    visits = num_rows * boosting.max_depth
    bins = boosting.colsample * boosting.max_bin * min(2**boosting.max_depth, num_rows)
    return num_labels * num_features * (SECONDS_PER_VISIT * visits + SECONDS_PER_BIN * bins) / (os.cpu_count() or 1)


def count_rows(stage: StageConfig, bundle: DataBundle) -> tuple[int, int]:
    """Return the number of training images to compute features for, and the number of rows that trees are grown on."""
    counts = np.bincount(bundle.train.targets)
    if stage.balance == "undersample":
        return len(bundle.train), int(counts[counts > 0].min() * (counts > 0).sum())
    if stage.balance == "augment" and stage.data.split != "after_balance":
        copied = int(counts.max() * (counts > 0).sum())
        return copied, copied
    return len(bundle.train), len(bundle.train)


def _time_an_image(features: LevelFeatures, bundle: DataBundle, batch_size: int) -> float:
    """Return the seconds per image of computing features, measured on the second of two batches."""
    images = bundle.train.images[:batch_size]
    features.compute(images, batch_size=batch_size)
    start = time.monotonic()
    features.compute(images, batch_size=batch_size)
    return (time.monotonic() - start) / len(images)


def _check(config: ExperimentConfig, bundle: DataBundle) -> None:
    """Raise DataError or ConfigError for data or settings that boosted trees do not support."""
    if not isinstance(bundle.train, Split) or not isinstance(bundle.validation, Split):
        raise DataError(
            f"finetune.data: found {bundle.source}, which is streamed; family boosted needs its images in memory. "
            "Take another source, or family transfer."
        )
    if config.finetune.milestones:
        raise ConfigError(
            f"finetune.milestones: found {list(config.finetune.milestones)}; family boosted keeps one set of trees. "
            "Leave it out."
        )
    if config.ablation.equal_compute:
        raise ConfigError(
            "ablation.equal_compute: found true; more epochs of trees do not cost what EF-FER1 costs. Set it to false."
        )


def _describe_weights(rows: TreeData, labels: tuple[str, ...]) -> dict[str, float] | None:
    """Return label -> weight of each of its rows, without the labels that have no rows; None without weights."""
    if rows.weights is None:
        return None
    found = {label: rows.weights[rows.targets == index] for index, label in enumerate(labels)}
    return {label: float(weights[0]) for label, weights in found.items() if len(weights)}
