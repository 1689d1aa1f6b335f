"""Checks that an experiment can run on this machine, made before anything is loaded or trained.

Only certain failures are reported: image sizes too small for a backbone, missing data, weights or packages, folders
that cannot be written, and numbers that exceed the memory or the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlfer.config.keys import list_problems
from dlfer.config.load import resolve_path, with_overrides
from dlfer.config.schema import ExperimentConfig, StageConfig
from dlfer.config.sections import DataConfig
from dlfer.config.variations import list_cells
from dlfer.data.sources import SOURCES, is_present
from dlfer.data.tfds_stream import IMAGE_FOLDER, check_imagenet2012, find_data_dir
from dlfer.errors import ConfigError, DataError, DlferError, EnvironmentProblem, ModelError, UserError
from dlfer.model.backbones import BACKBONES, list_levels
from dlfer.model.vggface2 import read_face_weights
from dlfer.runs.artifact import find_network_model
from dlfer.runs.files import check_writable
from dlfer.runs.find import default_runs_folder, find_model
from dlfer.runs.machine import get_memory_bytes

MAX_EPOCHS = 1_000_000
_HOST = ("storage.googleapis.com", 443)
"""Host and port that Keras downloads published weights from."""
_NETWORK_SECONDS = 3.0
_MAX_CELLS, _MAX_NAMED = 200, 3
_WEIGHTS_SUFFIXES, _BACKBONE_FILE = (".h5", ".keras"), "backbone.json"
_DRAWN_BYTES = {"synthetic_faces": 48 * 48, "synthetic_scenes": 64 * 64 * 3}
"""Source of synthetic images -> bytes of one image in memory."""
_COPIES = 4
"""Copies of the weights in memory and in a checkpoint: the weights, Adam's two moments, and the best weights so far."""
_ENGINES = {"optuna": "optuna", None: "keras_tuner"}
_DETECTORS = {
    "centerface": ("onnxruntime", "onnxruntime"),
    "mtcnn": ("mtcnn", "mtcnn==1.0.0"),
    "opencv": ("cv2", "opencv-python-headless<5"),
}


def find_obstacles(
    config: ExperimentConfig, *, kind: str = "run", smoke: bool = False, out: Path | None = None
) -> list[str]:
    """Return all that would certainly fail here, as "key: what was found, what is expected", after the names of cells.

    Args:
        kind: run, ablation, sweep, search or cross_validation; checks the cells of a sweep, both arms of an ablation,
            and the cells of a cross-validation with a sweep, otherwise the experiment itself.
        smoke: whether it is a smoke run, which needs neither data nor published weights.
        out: the folder of runs; None: the default folder.
    """
    runs_folder = default_runs_folder() if out is None else out
    variants = list(_list_variants(config, kind))
    found: dict[str, list[str]] = {}
    for name, variant in variants:
        problem = _find_disk_problem(variant, runs_folder)
        problems = [*_examine(variant, smoke=smoke), *([problem] if problem else []), *_examine_packages(variant, kind)]
        for line in dict.fromkeys(problems):
            found.setdefault(line, []).append(name)
    lines = [
        *_examine_members(config),
        *_examine_folds(config, kind),
        *_examine_folder(runs_folder),
    ]
    for line, names in found.items():
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        is_everywhere = "" in names or len(names) == len(variants)
        lines.append(line if is_everywhere else f"{', '.join(names[:_MAX_NAMED])}{more}: {line}")
    return list(dict.fromkeys(lines))


def refuse_obstacles(
    config: ExperimentConfig, where: object, *, kind: str = "run", smoke: bool = False, out: Path | None = None
) -> None:
    """Raise EnvironmentProblem if an experiment would certainly fail here.

    Args:
        config, kind, smoke, out: as for `find_obstacles`.
        where: the file of the experiment, for the message.

    Raises:
        EnvironmentProblem: listing every obstacle.
    """
    lines = find_obstacles(config, kind=kind, smoke=smoke, out=out)
    if lines:
        raise EnvironmentProblem(describe_obstacles(where, lines))


def describe_obstacles(where: object, lines: list[str]) -> str:
    """Return one message that lists all obstacles of an experiment."""
    count = f"{len(lines)} thing{'s' if len(lines) != 1 else ''}"
    return f"{where}: cannot run here, for {count}:\n{list_problems(lines, indent='  ')}"


def _list_variants(config: ExperimentConfig, kind: str) -> Iterator[tuple[str, ExperimentConfig]]:
    """Yield the (name, config) of everything to train: the experiment, or its study's cells or arms, and members."""
    variants: list[tuple[str, Mapping[str, Any]]] = [("", {})]
    if kind in ("sweep", "cross_validation") and config.sweep is not None:
        variants = [(f"sweep cell {cell.name}", cell.overrides) for cell in list_cells(config)[:_MAX_CELLS]]
    elif kind == "ablation":
        of_without = {"pretrain": None, **config.ablation.without}
        name_of_with = "ablation.with" if config.ablation.with_keys else ""
        variants = [(name_of_with, config.ablation.with_keys), ("ablation.without", of_without)]
    for name, overrides in variants:
        try:
            variant = with_overrides(config, overrides) if overrides else config
        except ConfigError:  # the study itself reports it
            continue
        yield name, variant
        for member in variant.ensemble.members if variant.ensemble is not None else ():
            if member.set is None:
                continue
            own = {"model.family": "transfer", "ensemble": None, **member.set}
            try:
                yield f"{name}{', ' if name else ''}ensemble.members {member.name}", with_overrides(variant, own)
            except ConfigError:  # `_examine_members` reports it
                continue


def _examine_members(config: ExperimentConfig) -> Iterator[str]:
    """Yield problems of ensemble members whose keys are unknown or invalid."""
    for member in config.ensemble.members if config.ensemble is not None else ():
        try:
            with_overrides(config, {"model.family": "transfer", "ensemble": None, **(member.set or {})})
        except ConfigError as error:
            yield f"ensemble.members {member.name}: {' '.join(str(error).split())}"


def _examine_folds(config: ExperimentConfig, kind: str) -> Iterator[str]:
    data = config.finetune.data
    if kind != "cross_validation" and data.protocol == "cross_validation" and data.fold is None:
        yield (
            "finetune.data.fold: found null, expected the one fold that is the test, e.g. --set finetune.data.fold=0. "
            "dlfer crossval trains a model for each fold."
        )


def _examine(config: ExperimentConfig, *, smoke: bool) -> Iterator[str]:
    names = () if config.model.family == "ensemble" else config.model.branches or (config.model.backbone,)
    for stage in ("pretrain", "finetune"):
        section = getattr(config, stage)
        if section is None:
            continue
        yield from _examine_sizes(stage, section, names)
        if section.data is not None and not (stage == "pretrain" and config.pretrain.weights is not None):
            yield from _examine_numbers(stage, section, smoke=smoke)
            yield from _examine_source(stage, section, smoke=smoke)
    if config.model.feature_level is not None and config.model.family != "ensemble":
        try:
            list_levels(config.model.backbone, config.model.feature_level)
        except ModelError as error:
            yield str(error)
    yield from _check_memory(names)
    if smoke:
        return
    if config.pretrain is not None and config.pretrain.weights is not None:
        yield from _examine_weights(config, names)
    yield from _examine_given_models(config)
    if (
        config.finetune.distill is not None and config.model.family != "ensemble"
    ):  # the members of an ensemble are checked as variants of their own
        from dlfer.experiment.distill import examine_teachers

        yield from examine_teachers(config)
    if config.evaluate.attributes is not None:
        yield from _examine_path("evaluate.attributes", config.evaluate.attributes, is_file=True)


def _examine_sizes(stage: str, section: StageConfig, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        least = BACKBONES[name].min_image_size
        if section.image_size < least:
            fit = [other for other, spec in BACKBONES.items() if spec.min_image_size <= section.image_size][:3]
            yield (
                f"{stage}.image_size: found {section.image_size}, expected at least {least}, below which {name} leaves no "
                f"feature map. Set it higher, or take another backbone, e.g. {', '.join(fit)} (dlfer show backbones)."
            )


def _examine_numbers(stage: str, section: StageConfig, *, smoke: bool) -> Iterator[str]:
    """Yield problems of numbers that are too large to train with, except in smoke runs, which reduce them."""
    if smoke:
        return
    if section.epochs > MAX_EPOCHS:
        yield f"{stage}.epochs: found {section.epochs:,}, expected at most {MAX_EPOCHS:,}; such a training never ends."
    memory = get_memory_bytes()
    if memory is None:
        return
    numbers = [getattr(section.data.num_images, split) or 0 for split in ("train", "validation", "test")]
    taken = sum(numbers) * _DRAWN_BYTES.get(section.data.source, 0)
    if taken > memory:
        yield (
            f"{stage}.data.num_images: found {sum(numbers):,} images, which take {taken / 1e9:,.0f} GB of memory; here are "
            f"{memory / 1e9:,.1f} GB. Set fewer."
        )
    # A batch is in memory as uint8 and at least once as float32, which makes five bytes per value.
    batch = section.batch_size * section.image_size**2 * 3 * 5
    if batch > memory and (section.data.num_images.train or 0) not in range(1, section.batch_size):
        yield (
            f"{stage}.batch_size: found {section.batch_size:,}, whose images of {section.image_size} pixels take "
            f"{batch / 1e9:,.0f} GB; here are {memory / 1e9:,.1f} GB of memory. Set it lower."
        )


def _examine_source(stage: str, section: StageConfig, *, smoke: bool) -> Iterator[str]:
    data, key = section.data, f"{stage}.data"
    if smoke:
        return
    if data.source == "tfds":
        yield from _examine_tfds(key, data)
    elif not data.source.startswith("synthetic"):
        needs = SOURCES[data.source].needs
        yield from _examine_path(f"{key}.path", data.path, is_file=data.source == "arrays", needs=needs)
    if data.votes is not None:
        yield from _examine_path(f"{key}.votes", data.votes, is_file=True)
    if data.subjects is not None and data.subjects.file is not None:
        yield from _examine_path(f"{key}.subjects.file", data.subjects.file, is_file=True)


def _examine_path(key: str, text: str | None, *, is_file: bool, needs: str = "") -> Iterator[str]:
    """Yield problems of a file or folder to read."""
    if text is None:
        return  # the schema reports it
    advice = f" It takes: {needs}." if needs else ""
    try:
        path = resolve_path(text)
        if not path.exists():
            yield f"{key}: {path} is not there.{advice}"
        elif is_file and not path.is_file():
            yield f"{key}: {path} is a folder, expected a file.{advice}"
        elif not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            yield f"{key}: {path} cannot be read; its permissions forbid it."
        elif path.is_dir() and not any(path.iterdir()):
            yield f"{key}: {path} is an empty folder.{advice}"
    except (ConfigError, OSError) as error:
        yield f"{key}: {error}"


def _examine_tfds(key: str, data: DataConfig) -> Iterator[str]:
    if data.name == IMAGE_FOLDER:
        yield from _examine_path(f"{key}.path", data.path, is_file=False, needs="train/<class>/<image>")
        return
    try:
        root = find_data_dir(None if data.path is None else resolve_path(data.path))
    except ConfigError as error:
        yield f"{key}.path: {error}"
        return
    if is_present(data):
        return
    base = data.name.replace(":", "/").split("/")[0]
    existing = _find_existing(root)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield (
            f"{key}.name: the data set {data.name} is not prepared in {root}, and {existing} cannot be written, so that it "
            "cannot be prepared there. Set data.path to a folder that can be written, or copy the prepared data set there."
        )
    if base == "imagenet2012":
        try:
            check_imagenet2012(root)
        except DataError as error:
            yield f"{key}: {error}".replace("\n", "\n    ")
        return
    downloads = root / "downloads"
    if base == "fer2013":
        file = downloads / "manual" / "fer2013.csv"
        if not file.is_file():
            yield (
                f"{key}.name: the data set fer2013 is not prepared in {root}, and {file}, from which it is prepared, is not there. "
                "Put it there, or use source: fer2013 with its path."
            )
        return
    if any(path.is_file() for path in downloads.rglob("*")):
        return  # files that were downloaded earlier or manually may suffice
    problem = find_network_problem()
    if problem is not None:
        yield (
            f"{key}.name: the data set {data.name} is not prepared in {root}, and nothing can be downloaded from here "
            f"({problem}). Prepare it elsewhere and copy {base}/ there, or set data.path."
        )


def _examine_weights(config: ExperimentConfig, names: tuple[str, ...]) -> Iterator[str]:
    """Yield problems of the weights in `pretrain.weights`, for a hybrid those of each branch."""
    pretrain, weights = config.pretrain, config.pretrain.weights
    if weights == "vggface2":
        try:
            read_face_weights(resolve_path(pretrain.weights_file))
        except UserError as error:
            yield f"pretrain.weights_file: {error}"
        return
    if not isinstance(weights, dict) and weights != "imagenet":
        yield from _examine_given_weights("pretrain.weights", weights)
        return
    folder = pretrain.weights_file
    if folder is not None:
        problems = list(_examine_path("pretrain.weights_file", folder, is_file=not config.model.branches))
        yield from problems
        if problems or not config.model.branches:
            return
    sources = {name: "imagenet" for name in names}
    if isinstance(weights, dict):
        branches = config.model.name_branches()
        sources = {branch: weights.get(branch, weights.get(name)) for branch, name in branches.items()}
    for branch, source in sources.items():
        name = config.model.name_branches().get(branch, branch)
        if source != "imagenet":
            yield from _examine_given_weights(f"pretrain.weights of {branch}", source)
        elif folder is None or not _holds_weights(resolve_path(folder), name):
            yield from _examine_published_weights(name)


def _holds_weights(folder: Path, name: str) -> bool:
    return any((folder / f"{name}{suffix}").is_file() for suffix in (".weights.h5", *_WEIGHTS_SUFFIXES))


def _examine_given_weights(key: str, source: str) -> Iterator[str]:
    """Yield problems of a weights file, of the backbone saved by an EF-FER1 training, or of a model."""
    try:
        path = resolve_path(source)
        if path.suffix in _WEIGHTS_SUFFIXES:
            yield from _examine_path(key, source, is_file=True)
        elif not (path / _BACKBONE_FILE).is_file():
            find_network_model(path if path.exists() else source)
    except UserError as error:
        yield f"{key}: {error}"


def _examine_published_weights(name: str) -> Iterator[str]:
    key, spec = "pretrain.weights", BACKBONES[name]
    if spec.is_packaged:
        return
    packaged = [other for other, record in BACKBONES.items() if record.is_packaged]
    advice = (
        f"Packaged with dlfer are the weights of {', '.join(packaged)}; others can be given by pretrain.weights_file, or "
        "EF-FER1 can be trained (pretrain.data)."
    )
    if "imagenet" not in spec.weights:
        yield f"{key}: found imagenet, but no ImageNet weights of {name} can be downloaded. {advice}"
    elif not _is_downloaded(name) and (problem := find_network_problem()) is not None:
        yield f"{key}: the ImageNet weights of {name} cannot be downloaded from here ({problem}). {advice}"


def _is_downloaded(name: str) -> bool:
    """Return whether Keras has cached a file with the published weights of a backbone."""
    home = Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"))
    wanted = name.replace("_", "")
    try:
        files = [path.name.lower().replace("-", "").replace("_", "") for path in (home / "models").iterdir()]
    except OSError:
        return False
    # The name must not continue with a version: mobilenet is not mobilenetv2.
    return any(re.match(rf"{wanted}(?!v\d)", file) and "notop" in file for file in files)


@cache
def find_network_problem() -> str | None:
    """Return why nothing can be downloaded here, or None if a download may succeed, e.g. through a proxy."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return None
    try:
        socket.create_connection(_HOST, timeout=_NETWORK_SECONDS).close()
    except OSError as error:
        return f"{_HOST[0]}: {error.strerror or error}"
    return None


def _examine_given_models(config: ExperimentConfig) -> Iterator[str]:
    """Yield problems of ensemble members that are trained models and cannot be found."""
    for member in config.ensemble.members if config.ensemble is not None else ():
        if member.model is not None:
            try:
                find_model(member.model)
            except DlferError as error:
                yield f"ensemble.members {member.name}: {error}"


def _examine_packages(config: ExperimentConfig, kind: str) -> Iterator[str]:
    """Yield problems of optional packages that the experiment needs but that are not installed."""
    wanted = []
    if config.model.family == "boosted":
        wanted.append(("model.family: boosted", "xgboost", "xgboost-cpu"))
    if kind == "search" and config.search is not None:
        engine = config.search.engine
        package = _ENGINES.get(engine, "keras_tuner")
        wanted.append((f"search.engine: {engine}", package, package.replace("_", "-")))
    for stage in ("pretrain", "finetune"):
        data = getattr(getattr(config, stage), "data", None)
        if data is None:
            continue
        if data.source == "tfds":
            wanted.append((f"{stage}.data.source: tfds", "tensorflow_datasets", "tensorflow-datasets"))
        if data.faces is not None and data.faces.detect in _DETECTORS:
            wanted.append((f"{stage}.data.faces.detect: {data.faces.detect}", *_DETECTORS[data.faces.detect]))
        if data.faces is not None and data.faces.equalize != "none":
            wanted.append((f"{stage}.data.faces.equalize: {data.faces.equalize}", *_DETECTORS["opencv"]))
    wanted += [(f"experiment.track: {name}", name, f"dlfer[{name}]") for name in config.experiment.track]
    for key, module, package in wanted:
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # no origin: a folder of the same name, such as W&B's wandb/
            yield f"{key}: needs a package that is not installed: pip install '{package}'."


def _examine_folder(out: Path) -> Iterator[str]:
    """Yield problems of the folder that runs are written to."""
    try:
        check_writable(out, "--out")
    except ConfigError as error:
        yield str(error)
    except OSError as error:
        yield f"--out: {out} cannot be used ({error.strerror or error}); choose another folder of runs by --out."


def _find_existing(path: Path) -> Path:
    """Return the path if it exists, otherwise its nearest existing parent folder."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _check_memory(names: tuple[str, ...]) -> Iterator[str]:
    """Yield a problem if the weights and the optimiser state of a network do not fit in memory."""
    memory = get_memory_bytes()
    taken = sum(BACKBONES[name].num_parameters_without_top for name in names) * 4 * _COPIES
    if memory is not None and taken > memory:
        yield (
            f"model: the weights of {', '.join(names)} and their optimiser take {taken / 1e9:,.1f} GB; here are "
            f"{memory / 1e9:,.1f} GB of memory. Take a smaller backbone."
        )


def _find_disk_problem(config: ExperimentConfig, out: Path) -> str | None:
    """Return why the weights and checkpoints of a run do not fit on the disk of a folder, or None if they do."""
    names = () if config.model.family == "ensemble" else config.model.branches or (config.model.backbone,)
    count = _COPIES + 2 + len(config.finetune.milestones)
    wanted = sum(BACKBONES[name].num_parameters_without_top for name in names) * 4 * count
    try:
        free = shutil.disk_usage(_find_existing(out)).free
    except OSError:
        return None
    if wanted <= free:
        return None
    return (
        f"--out: a run of {', '.join(names)} takes about {wanted / 1e9:,.1f} GB for its weights and checkpoints; found "
        f"{free / 1e9:,.1f} GB free in {_find_existing(out)}. Choose a folder of runs on a larger disk by --out."
    )
