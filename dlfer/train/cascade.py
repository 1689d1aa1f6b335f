"""EF-FER1: where the backbone's weights come from, before EF-FER2 is fine-tuned.

A pretraining is done once for whatever has the same digest: arms, seeds and trials share it through
`<runs folder>/.cache/pretrain/<digest>/`. While it trains, its checkpoints stand in `<digest>.partial/`,
from which any later run goes on; a file lock keeps two processes from training the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras

from dlfer.config.load import resolve_path
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit, compute_fingerprint
from dlfer.model.artifact import load_artifact
from dlfer.model.backbones import load_published_weights
from dlfer.model.hybrid import load_branch_weights
from dlfer.model.stage_network import build_stage_network, build_transfer_network
from dlfer.model.transfer import RECORD_FILE, write_backbone
from dlfer.runs.files import link_file, write_atomically
from dlfer.train.control import hold_lock
from dlfer.train.plan import describe_plan, unfreeze_random_start
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob

COST_FILE, DONE_FILE = "pretrain.json", "done.json"
# A .pth is among them to be refused by the reader of weights, which says what to do.
_PUBLISHED_FILES = (".h5", ".keras", ".pth")


@dataclass(frozen=True)
class Pretrained:
    """EF-FER1 on disk.

    Attributes:
        folder: holds backbone.weights.h5, backbone.json, pretrain.json and, where it was trained, history.csv.
        digest: of what determines it; None for weights that were not trained here.
        cost: {"seconds", "images", "image_size", "epochs", ...} of the training; {} where unknown.
        was_cached: whether an earlier run had trained it.
    """

    folder: Path
    digest: str | None
    cost: dict
    was_cached: bool


def obtain_backbone(
    config: ExperimentConfig,
    job: StageJob,
    *,
    load_bundle: Callable[[], DataBundle],
    cache: Path | None,
    random_weights: bool = False,
) -> Pretrained:
    """Train EF-FER1, or take it from the cache, published weights, a file or an earlier run.

    Args:
        config: with a `pretrain` section.
        job: of the stage; its folder is the run's own `pretrain/`, where the outcome is put in any case.
        load_bundle: gives the pretraining data, called only if it is needed.
        cache: `<runs folder>/.cache/pretrain`; None trains in the run's own folder.
        random_weights: instead of published weights, for --smoke.
    """
    if (job.folder / DONE_FILE).exists():
        return Pretrained(**json.loads((job.folder / DONE_FILE).read_text()) | {"folder": job.folder})
    if config.pretrain.weights is not None:
        pretrained = _take_weights(config, job.folder, random_weights=random_weights)
    else:
        pretrained = _train_or_share(config, job, load_bundle(), cache)
    # Written last: a resumed run that finds it has all of EF-FER1.
    done = {"digest": pretrained.digest, "cost": pretrained.cost, "was_cached": pretrained.was_cached}
    write_atomically(job.folder / DONE_FILE, json.dumps(done, indent=2) + "\n")
    return pretrained


def _train_or_share(config: ExperimentConfig, job: StageJob, bundle: DataBundle, cache: Path | None) -> Pretrained:
    digest = compute_pretrain_digest(config, bundle, max_steps=job.max_steps)
    if cache is None:
        return replace(_train(config, job, bundle), digest=digest)
    cache.mkdir(parents=True, exist_ok=True)
    final, partial = cache / digest, cache / f"{digest}.partial"
    with hold_lock(cache / f"{digest}.lock", "EF-FER1", job.control, job.listener):
        was_cached = (final / COST_FILE).exists()
        if was_cached:
            job.listener.say(f"EF-FER1: taken from the cache, {final}")
        else:
            if not (partial / COST_FILE).exists():
                _train(config, replace(job, folder=partial), bundle)
            for path in partial.glob("*.npz"):  # a finished pretraining needs no checkpoint
                path.unlink()
            partial.rename(final)
    _share_files(final, job.folder)
    return Pretrained(job.folder, digest, json.loads((job.folder / COST_FILE).read_text()), was_cached)


def compute_pretrain_digest(config: ExperimentConfig, bundle: DataBundle, *, max_steps: int | None = None) -> str:
    """Return 16 hex digits of what determines EF-FER1: its section, the backbone, arithmetic and the data."""
    determines = {
        "pretrain": config.pretrain.model_dump(mode="json", exclude={"data": {"path"}}),
        "model": config.model.model_dump(mode="json", exclude={"head": {"activation"}}),
        "precision": config.experiment.precision,
        "deterministic": config.experiment.deterministic,
        "backend": keras.backend.backend(),
        "labels": bundle.labels,
        "data": [_fingerprint(split, config.pretrain.data) for split in (bundle.train, bundle.validation)],
    }
    if max_steps is not None:
        determines["max_steps"] = max_steps
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:16]


def _train(config: ExperimentConfig, job: StageJob, bundle: DataBundle) -> Pretrained:
    """Train EF-FER1 in the job's folder and write its backbone there."""
    keras.utils.set_random_seed(job.seed)
    network = build_stage_network(config, job.config, bundle)
    job = replace(job, config=unfreeze_random_start("EF-FER1", job.config)[0])
    for line in describe_plan("EF-FER1", job, network, bundle, precision=config.experiment.precision):
        job.listener.say(line)
    result = train_stage(job, network, bundle)
    source = f"EF-FER1 trained on {bundle.source}, {len(bundle.train):,} images, {len(result.history)} epochs"
    write_backbone(network, job.folder, source=source)
    kept = result.history[result.kept_epoch]
    cost = {
        "source": source,
        "seconds": result.seconds,
        "images": result.images,
        "image_size": job.config.image_size,
        "epochs": len(result.history),
        "kept_epoch": result.kept_epoch + 1,
        "validation_accuracy": kept["validation_accuracy"],
        "num_validation": len(bundle.validation),
        "num_labels": len(bundle.labels),
    }
    write_atomically(job.folder / COST_FILE, json.dumps(cost, indent=2) + "\n")
    return Pretrained(job.folder, None, cost, was_cached=False)


def describe_foreign_scaling(config: ExperimentConfig) -> str | None:
    """Return a note where published weights get pixels of another scale than they were trained with; else None."""
    pretrain, scaling = config.pretrain, config.model.pixel_scaling
    if pretrain is None or pretrain.weights is None or scaling == "backbone":
        return None
    if pretrain.weights != "imagenet" and resolve_path(pretrain.weights).suffix not in _PUBLISHED_FILES:
        # A run's or an artifact's backbone has its scaling beside it, which must be the same.
        return None
    return (
        f"pretrain.weights: {pretrain.weights} with model.pixel_scaling: {scaling}: the published weights were trained with the "
        "backbone's own scaling of the pixels (model.pixel_scaling: backbone), so that their features are worth less here "
        "until fine-tuning adapts them."
    )


def _take_weights(config: ExperimentConfig, folder: Path, *, random_weights: bool) -> Pretrained:
    """Put a backbone that was not trained by this experiment into `folder`."""
    wanted, model = config.pretrain.weights, config.model
    if random_weights:
        parts = build_transfer_network(config.model, num_labels=1, image_size=config.pretrain.image_size, channels=3)
        write_backbone(parts, folder, source="random weights (--smoke)")
        return Pretrained(folder, None, {"source": "random weights (--smoke)"}, was_cached=True)
    path = resolve_path(wanted)
    if wanted != "imagenet" and (path / RECORD_FILE).exists():
        _share_files(path, folder)
        return Pretrained(folder, None, {}, was_cached=True)
    if wanted != "imagenet" and path.suffix not in _PUBLISHED_FILES:
        parts = load_artifact(path if path.exists() else wanted).parts
        write_backbone(parts, folder, source=f"the backbone of {wanted}")
        return Pretrained(folder, None, {}, was_cached=True)
    size = config.pretrain.image_size
    parts = build_transfer_network(config.model, num_labels=1, image_size=size, channels=3)
    file = config.pretrain.weights_file if wanted == "imagenet" else wanted
    file = None if file is None else str(resolve_path(file))
    if model.branches:
        source = load_branch_weights(model.branches, parts.backbone, file)
    else:
        source = load_published_weights(model.backbone, parts.backbone, file)
    write_backbone(parts, folder, source=source)
    return Pretrained(folder, None, {"source": source}, was_cached=True)


def _share_files(source: Path, target: Path) -> None:
    """Link (or copy) the files of a backbone into a run, so that the run can be moved as it is."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if not path.is_dir():
            link_file(path, target / path.relative_to(source))


def _fingerprint(split: Split | StreamedSplit, data: DataConfig) -> str:
    """What a split holds; of a streamed one, which is not read for this, its name, length and place."""
    if isinstance(split, Split):
        return compute_fingerprint(split)
    place = None if data.path is None else str(resolve_path(data.path).resolve())
    return f"{data.name} {place} {split.name} {len(split)}"
