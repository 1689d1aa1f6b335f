"""EF-FER1: training or loading of the backbone's weights from which EF-FER2 is fine-tuned.

Each pretraining is done once per digest of its settings and data: arms, seeds and trials share it through
`<runs folder>/.cache/pretrain/<digest>/`. During training, its checkpoints are in `<digest>.partial/`, from which any
later run resumes; a file lock keeps two processes from training the same one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np

from dlfer.config.load import resolve_path
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig, ModelConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit, compute_fingerprint
from dlfer.data.images import match_channels
from dlfer.errors import ModelError, TransferError
from dlfer.model.backbone_spec import PACKAGED_WEIGHTS, choose_preprocessing
from dlfer.model.backbones import find_backbone, list_levels, load_published_weights
from dlfer.model.families import load_artifact
from dlfer.model.stage_network import TransferNetwork, build_stage_network, build_transfer_network, find_branch_file
from dlfer.model.transfer import (
    RECORD_FILE,
    copy_levels,
    list_paths,
    read_backbone_record,
    transfer_backbone,
    transfer_branch,
    write_backbone,
)
from dlfer.model.vggface2 import SOURCE, describe_origin, read_face_weights, restore_statistics, set_face_weights
from dlfer.model.weights_file import load_weights
from dlfer.runs.artifact import find_network_model
from dlfer.runs.files import link_file, write_atomically
from dlfer.runs.text import count_noun
from dlfer.train.plan import describe_plan, unfreeze_random_start
from dlfer.train.progress import hold_lock
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob

PROBED_IMAGES, PROBED_SIDE = 64, 96
"""Batch size, at this image side, for computing BatchNorm's statistics, when all feature maps are in memory at once."""
COST_FILE, DONE_FILE = "pretrain.json", "done.json"
# Includes .pth, so that the reader of weights refuses it with advice.
_PUBLISHED_FILES = (".h5", ".keras", ".pth")


@dataclass(frozen=True)
class Pretrained:
    """EF-FER1 on disk.

    Attributes:
        folder: holds backbone.weights.h5 and backbone.json; pretrain.json and history.csv if it was trained.
        digest: digest of the settings and data that determine it; None for weights that were not trained here.
        cost: {"source", "seconds", "images", "image_size", "epochs", ...} of the training; less or {} if not trained.
        was_cached: whether this run did not train it, but took it from the cache or loaded other weights.
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
    load_images: Callable[[], np.ndarray] | None = None,
    random_weights: bool = False,
) -> Pretrained:
    """Train EF-FER1, or take it from the cache, published weights, a file or an earlier run.

    Args:
        config: an experiment with a section `pretrain`.
        job: the job of the stage; its folder is the run's `pretrain/`, which holds the result in every case.
        load_bundle: loads the pretraining data; called only if needed.
        cache: `<runs folder>/.cache/pretrain`; None trains in the run's own folder.
        load_images: loads training images of EF-FER2, uint8 [N, H, W, 1 or 3], on which BatchNorm's statistics are
            computed for weights that have none; called only if needed.
        random_weights: whether to use random weights instead of loaded ones, for --smoke.
    """
    done_file = job.folder / DONE_FILE
    if done_file.exists():
        try:
            return Pretrained(**json.loads(done_file.read_text(encoding="utf-8")) | {"folder": job.folder})
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{done_file}: damaged, or of another version of dlfer ({error}). Delete it to obtain EF-FER1 again."
            ) from error
    if config.pretrain.weights == "vggface2" and not random_weights:
        pretrained = _load_face_weights(config, job.folder, load_images)
    elif config.pretrain.weights is not None:
        pretrained = _load_given_weights(config, job.folder, random_weights=random_weights)
    else:
        pretrained = _train_or_share(config, job, load_bundle(), cache)
    # Written last, so that its presence means to a resumed run that EF-FER1 is complete.
    done = {"digest": pretrained.digest, "cost": pretrained.cost, "was_cached": pretrained.was_cached}
    write_atomically(done_file, json.dumps(done, indent=2) + "\n")
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
    return Pretrained(job.folder, digest, json.loads((job.folder / COST_FILE).read_text(encoding="utf-8")), was_cached)


def compute_pretrain_digest(config: ExperimentConfig, bundle: DataBundle, *, max_steps: int | None = None) -> str:
    """Return a digest, 16 hex digits, of what determines EF-FER1: its section, the model, precision and the data."""
    # Softmax is left out to keep the digests of earlier versions; sigmoid changes the validation loss.
    left_out = {"head": {"activation"}} if config.model.head.activation == "softmax" else None
    determines = {
        "pretrain": config.pretrain.model_dump(mode="json", exclude={"data": {"path"}}),
        "model": config.model.model_dump(mode="json", exclude=left_out),
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
    """Train EF-FER1 in the job's folder, and write its backbone and its cost there."""
    keras.utils.set_random_seed(job.seed)
    network = build_stage_network(config, job.config, bundle)
    job = replace(job, config=unfreeze_random_start("EF-FER1", job.config)[0])
    precision = config.experiment.precision
    for line in describe_plan("EF-FER1", job, network, bundle, precision=precision, starts_at_random=True):
        job.listener.say(line)
    result = train_stage(job, network, bundle)
    source = f"EF-FER1 trained on {bundle.source}, {count_noun(len(bundle.train), 'image')}, {count_noun(len(result.history), 'epoch')}"
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
    """Return a note if published weights are used with another pixel scaling than in their training, else None."""
    pretrain, scaling = config.pretrain, config.model.pixel_scaling
    own = [find_backbone(name).preprocessing for name in config.model.branches or (config.model.backbone,)]
    if pretrain is None or all(choose_preprocessing(each, scaling) == each for each in own):
        return None
    # The scaling of a run's or an artifact's backbone is recorded and must match, so it needs no note.
    published = [name for name in pretrain.list_of_weights if _is_published(name)]
    if not published:
        return None
    return (
        f"pretrain.weights: {', '.join(published)} with model.pixel_scaling: {scaling}: the published weights were trained with "
        "the backbone's own scaling of the pixels (model.pixel_scaling: backbone), so that their features are worth less here "
        "until fine-tuning adapts them."
    )


def _is_published(weights: str) -> bool:
    """Return whether a value of pretrain.weights is "imagenet" or a weights file, in contrast to a run or artifact."""
    return weights == "imagenet" or resolve_path(weights).suffix in _PUBLISHED_FILES


def _load_given_weights(config: ExperimentConfig, folder: Path, *, random_weights: bool) -> Pretrained:
    """Write a backbone that was not trained by this experiment to `folder`."""
    wanted, model = config.pretrain.weights, config.model
    if random_weights:
        source = "random weights (--smoke)"
        write_backbone(_build(config), folder, source=source)
        return Pretrained(folder, None, {"source": source}, was_cached=True)
    if isinstance(wanted, dict) or (wanted == "imagenet" and model.branches):
        return _load_branch_weights(config, folder)
    path = resolve_path(wanted)
    if wanted != "imagenet" and (path / RECORD_FILE).exists():
        _copy_backbone(config, path, folder)
        return Pretrained(folder, None, {}, was_cached=True)
    if not _is_published(wanted):
        classifier = load_artifact(find_network_model(path if path.exists() else wanted))
        parts, left_out = _end_at_level(classifier.parts, classifier.config, model)
        origins = classifier.about.origins
        write_backbone(parts, folder, source=f"the backbone of {wanted}", origins=origins, left_out=left_out)
        return Pretrained(folder, None, {}, was_cached=True)
    whole = model.model_copy(update={"feature_level": None})
    parts = _build(config, whole)
    file = config.pretrain.weights_file if wanted == "imagenet" else wanted
    file = None if file is None else str(resolve_path(file))
    if model.branches:
        load_weights(parts.backbone, file)
        source = f"weights of {', '.join(model.branches)} from {file}"
    else:
        source = load_published_weights(model.backbone, parts.backbone, file)
    parts, left_out = _end_at_level(parts, whole, model)
    write_backbone(parts, folder, source=source, left_out=left_out)
    return Pretrained(folder, None, {"source": source}, was_cached=True)


def _copy_backbone(config: ExperimentConfig, source: Path, folder: Path) -> None:
    """Copy a backbone that dlfer wrote to `folder`, cut off at `model.feature_level` if it extends beyond it.

    Raises:
        ModelError, TransferError: see `transfer_backbone`.
    """
    model, found = config.model, set(read_backbone_record(source)["variables"])
    if model.feature_level is not None:
        for level in range(len(list_levels(model.backbone)), model.feature_level, -1):
            longer = model.model_copy(update={"feature_level": level})
            parts = _build(config, longer)
            if set(list_paths(parts.backbone)) != found:
                continue
            record = transfer_backbone(source, parts)
            parts, left_out = _end_at_level(parts, longer, model)
            write_backbone(parts, folder, source=record.source, origins=record.origins, left_out=left_out)
            return
    _share_files(source, folder)


def _end_at_level(
    source: TransferNetwork, built_by: ModelConfig, model: ModelConfig
) -> tuple[TransferNetwork, list[str]]:
    """Return a network whose backbone ends at the feature level of `model`, and the paths of left-out variables.

    Args:
        source: the network with the weights; returned unchanged if it has another backbone, which is refused later
            when the weights are compared.
        built_by: the section `model` from which the source was built.
        model: the requested section `model`.
    """
    is_same = (built_by.branches, built_by.backbone, built_by.stem) == ((), model.backbone, model.stem)
    if not is_same or built_by.feature_level == model.feature_level or model.feature_level is None:
        return source, []
    shorter = built_by.model_copy(update={"feature_level": model.feature_level, "auxiliary_heads": False})
    image_size = source.face_input.image_size
    parts = build_transfer_network(shorter, num_labels=1, image_size=image_size, channels=3)
    return parts, copy_levels(source.backbone, parts.backbone)


def _load_face_weights(config: ExperimentConfig, folder: Path, load_images: Callable[[], np.ndarray]) -> Pretrained:
    """Write MobileNet's backbone from VGGFace2 to `folder`, with BatchNorm statistics on EF-FER2's training images."""
    file, stage = resolve_path(config.pretrain.weights_file), config.finetune
    tensors = read_face_weights(file)
    whole = _build(config, config.model.model_copy(update={"feature_level": None}))
    set_face_weights(whole.backbone, tensors)
    parts = build_transfer_network(
        config.model,
        num_labels=1,
        image_size=stage.image_size,
        channels=3,
        crop=stage.crop,
        aspect=stage.data.aspect,
    )
    left_out = copy_levels(whole.backbone, parts.backbone)
    images = match_channels(load_images(), 3)
    num_batches = max(1, round(len(images) * (stage.image_size / PROBED_SIDE) ** 2 / PROBED_IMAGES))
    batches = (parts.face_input(batch) for batch in np.array_split(images, num_batches) if len(batch))
    count = restore_statistics(parts.backbone, batches)
    source = f"{SOURCE}, from {file}; statistics of BatchNorm by {count:,} training images of EF-FER2"
    write_backbone(parts, folder, source=source, origins=[describe_origin(file)], left_out=left_out)
    return Pretrained(folder, None, {"source": source}, was_cached=True)


def _load_branch_weights(config: ExperimentConfig, folder: Path) -> Pretrained:
    """Write a hybrid's backbone to `folder`, with the weights of each branch from its own source."""
    # The layers that fuse the branches get random weights.
    keras.utils.set_random_seed(config.pretrain.seed)
    parts = _build(config)
    branches = {}
    for branch, own in divide_branches(config).items():
        with tempfile.TemporaryDirectory(prefix="dlfer-") as place:
            try:
                pretrained = _load_given_weights(own, Path(place), random_weights=False)
                source = _build(own)
                record = transfer_backbone(pretrained.folder, source)
            except (ModelError, TransferError) as error:
                raise type(error)(
                    f"branch {branch}, pretrain.weights {own.pretrain.weights}: {error} Nothing was loaded, since a network "
                    "that is pretrained in part would pass for a whole one."
                ) from error
        branches[branch] = transfer_branch(branch, source, parts, record=record)
    source = "; ".join(f"{branch}: {lists.source}" for branch, lists in branches.items())
    origins = [origin for lists in branches.values() for origin in lists.origins]
    write_backbone(parts, folder, source=source, branches=branches, origins=origins)
    return Pretrained(folder, None, {"source": source}, was_cached=True)


def divide_branches(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """Return, for each branch of a hybrid, an experiment with only its backbone and the source of its weights.

    Raises:
        ModelError: imagenet is requested for branches without ImageNet weights; the message lists all of them.
    """
    weights, folder = config.pretrain.weights, config.pretrain.weights_file
    found, without = {}, []
    for branch, name in config.model.name_branches().items():
        wanted = weights.get(branch, weights.get(name)) if isinstance(weights, dict) else weights
        file = None if folder is None else find_branch_file(str(resolve_path(folder)), name)
        if wanted == "imagenet" and file is None and not find_backbone(name).weights:
            without.append(name)
        model = {"family": "transfer", "backbone": name, "branches": (), "fusion": "concat"}
        update = {
            "model": config.model.model_copy(update=model),
            "pretrain": config.pretrain.model_copy(update={"weights": wanted, "weights_file": file}),
        }
        found[branch] = config.model_copy(update=update)
    if without:
        raise ModelError(
            f"pretrain.weights: found imagenet, but of the branches {', '.join(config.model.branches)} dlfer has no ImageNet "
            f"weights for {', '.join(dict.fromkeys(without))}; nothing was loaded, since half a pretrained network would pass "
            f"for a whole one. {PACKAGED_WEIGHTS} Give each branch a source, e.g. pretrain.weights: {{resnet50: imagenet, "
            "resnet34: FILE or the pretrain folder of a run}; leave weights null and train EF-FER1 of all branches on "
            "pretrain.data; or choose other branches (dlfer show backbones)."
        )
    return found


def _build(config: ExperimentConfig, model: ModelConfig | None = None) -> TransferNetwork:
    return build_transfer_network(
        model or config.model, num_labels=1, image_size=config.pretrain.image_size, channels=3
    )


def _share_files(source: Path, target: Path) -> None:
    """Link (or copy) the files of a backbone into the folder of a run, so that the run is self-contained."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if not path.is_dir():
            link_file(path, target / path.relative_to(source))


def _fingerprint(split: Split | StreamedSplit, data: DataConfig) -> str:
    """Return a fingerprint of a split's contents; streamed ones are not read but named by path and size."""
    if isinstance(split, Split):
        images = compute_fingerprint(split)
        if split.soft_targets is None:
            return images
        soft = np.ascontiguousarray(split.soft_targets[np.argsort(split.ids, kind="stable")])
        return f"{images} {hashlib.sha256(soft.tobytes()).hexdigest()}"
    place = None if data.path is None else str(resolve_path(data.path).resolve())
    return f"{data.name} {place} {split.name} {len(split)}"
