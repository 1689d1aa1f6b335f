"""Detection of changes to the experiment, software or images since a run started, which --accept-changes must accept.

A run is compared with its own start. The data of a member of a study that has not started are compared with those of
an earlier member, since a comparison of members with different data would be invalid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlfer._version import __version__
from dlfer.config.load import compute_digest, parse_recorded_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, ModelError, ResumeError
from dlfer.runs.files import read_npz, write_npz
from dlfer.runs.records import DataRecord, RunRecord
from dlfer.runs.run import CONFIG_FILE, RUN_FILE, Run, format_utc_now, list_packages

IMAGES_FILE, PRETRAIN_IMAGES_FILE = "images.npz", "pretrain_images.npz"
"""Lists of the images of a run's stages: the labels, and for each split ids, targets and a digest of each image."""

SPLITS = ("train", "validation", "test")
_MAX_IDS = 3
_STUDIES = ("ablation", "sweep", "search")
# These keys do not affect results: names, checkpoints, trackers, and paths of data, whose images are compared instead.
_NO_RESULT = (
    "experiment.name",
    "experiment.checkpoint_minutes",
    "experiment.track",
    "experiment.track_model",
    "pretrain.data.path",
    "finetune.data.path",
    "finetune.data.votes",
    "finetune.data.subjects.file",
    "expected",
)
_BACKENDS = {"jax": "jax", "torch": "torch"}


def list_differences(
    old: ExperimentConfig, new: ExperimentConfig, *, ignored: Iterable[str] = ("search.trials",)
) -> list[str]:
    """Return one line, "key: before -> after", for each key that differs between two experiments.

    Args:
        old, new: the experiments.
        ignored: keys and sections that may differ.
    """
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    left_out = tuple(ignored)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        is_ignored = any(key == name or key.startswith(f"{name}.") for name in left_out)
        if not is_ignored and before.get(key) != after.get(key):
            lines.append(f"{key}: {_show(before, key)} -> {_show(after, key)}")
    return lines


def find_changes(run: Run, *, backend: str | None = None) -> list[str]:
    """Return one line for each key of the experiment and each package that has changed since the run started.

    If `backend`, the Keras backend of this process, is given, a change of the backend is included.

    A search checks its experiment itself: scores of two experiments cannot be ranked together, even with acceptance.

    Raises:
        ConfigError: config.yaml cannot be read.
    """
    record = run.record
    keys = [] if record.kind == "search" else _find_changed_keys(run, record)
    return [*keys, *_find_changed_software(record), *_find_changed_backend(record, backend)]


def list_unplanned(run: Run, planned: ExperimentConfig, *, study: Run) -> list[str]:
    """Return one line, "key: planned -> found", for each key in which a study's member started otherwise than planned.

    Keys that do not affect results and keys whose change was accepted by --accept-changes, for the member or its study,
    are left out, except for the seed.
    """
    began, record = load_start(run), run.record
    if began is None:
        seed = record.seed
        return (
            [] if seed in (None, planned.experiment.seed) else [f"experiment.seed: {planned.experiment.seed} -> {seed}"]
        )
    start = f"{CONFIG_FILE}: "
    accepted = [
        line.removeprefix(start).split(": ")[0]
        for change in (*record.changes, *study.record.changes)
        for line in change.differences
        if line.startswith(start)
    ]
    ignored = [key for key in (*_NO_RESULT, *_STUDIES, *accepted) if key != "experiment.seed"]
    return list_differences(planned, began, ignored=ignored)


def load_start(run: Run) -> ExperimentConfig | None:
    """Return the experiment that a run started with; None if this version of dlfer cannot parse it.

    Raises:
        ConfigError: run.json does not record it, and config.yaml cannot be read.
    """
    settings = run.record.settings
    if settings is None:
        return run.config()
    try:
        return parse_recorded_experiment(json.dumps(settings), f"{run.path / RUN_FILE}: settings")
    except ConfigError:
        return None


def accept_or_refuse_changes(run: Run, changes: Sequence[str], *, accept: bool, since: str = "since it began") -> None:
    """Refuse to resume a run with changes, or record that they were accepted.

    Args:
        run: the run to resume.
        changes: one line for each change; may be empty.
        accept: whether --accept-changes is given.
        since: the start of the period in which the changes were made, in words.

    Raises:
        ResumeError: there are changes, and they are not accepted.
    """
    if not changes:
        return
    if not accept:
        listed = "\n".join(f"  {line}" for line in changes)
        raise ResumeError(
            f"{run.path}: {since}, this has changed:\n{listed}\nA result of both would be valid for neither. Restore "
            "what changed, or start a new run; or continue with --accept-changes, which run.json and the report then "
            "record."
        )
    now = format_utc_now()
    run.update(changes=[*run.record.changes, {"time": now, "differences": list(changes)}])
    run.log("changes_accepted", differences=list(changes))
    run.warn(f"Continued with --accept-changes ({now}): {since}, this has changed: {'; '.join(changes)}.")


def check_changes_since_start(run: Run, *, accept: bool, backend: str | None = None) -> None:
    """Compare a run's experiment and software with those it started with, and apply `accept_or_refuse_changes` to the changes.

    Args:
        run: the run to resume.
        accept: whether --accept-changes is given.
        backend: the Keras backend of this process; None if nothing is trained in it.

    Raises:
        ResumeError: there are changes, and they are not accepted.
        ConfigError: config.yaml cannot be read.
    """
    changes = find_changes(run, backend=backend)
    accept_or_refuse_changes(run, changes, accept=accept)
    if changes:
        config = run.config()
        run.update(
            settings=config.model_dump(mode="json"),
            config_digest=compute_digest(config),
            packages=list_packages(),
            dlfer=__version__,
        )


def check_changed_images(run: Run, images: Mapping[str, np.ndarray], *, file: str = IMAGES_FILE, accept: bool) -> None:
    """Compare a stage's images with those it started with, apply `accept_or_refuse_changes`, and write their list into the run.

    Args:
        run: the run to start or resume.
        images: the list of images, as for `compare_images`.
        file: the file of the list in the run, IMAGES_FILE or PRETRAIN_IMAGES_FILE.
        accept: whether --accept-changes is given.

    Raises:
        ResumeError: the images differ, and that is not accepted.
    """
    stage = "finetune" if file == IMAGES_FILE else "pretrain"
    before, since = _read_images(run.path / file), "since it began"
    sibling = run.record.data_like and run.path.parent.parent / run.record.data_like
    is_first = stage == "pretrain" or not (run.path / DataRecord.FILE).exists()
    if (
        before is None
        and sibling is not None
        and is_first
        and (stage == "finetune" or _have_same_pretraining(run, sibling))
    ):
        before, since = _read_images(sibling / file), f"since {sibling.name}, a member before it, began"
    if before is not None:
        in_other_fold = (
            since != "since it began" and stage == "finetune" and run.config().finetune.data.fold is not None
        )
        found = compare_images(before, images, same_splits=not in_other_fold)
    else:
        found = _compare_fingerprints(run, images) if file == IMAGES_FILE else []
    accept_or_refuse_changes(run, [f"{stage}.data: {line}" for line in found], accept=accept, since=since)
    write_npz(run.path / file, images)


def compare_images(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], *, same_splits: bool = True
) -> list[str]:
    """Return one line if the labels differ, and one for each split whose images differ.

    Args:
        old, new: "labels", text [C], and for each split "<split>_ids", text [N], "<split>_targets", int [N],
            "<split>_digests", bytes [N], of the pixels, and optionally "<split>_soft", bytes [N], of soft targets; for
            a streamed split only "<split>_stream", text: its name and number of images. Other arrays are not compared.
        same_splits: whether an image must be in the same split; False for members of a cross-validation.
    """
    labels = [found["labels"].tolist() for found in (old, new)]
    lines = []
    if labels[0] != labels[1]:
        lines.append(f"the labels were {', '.join(labels[0])}, and are {', '.join(labels[1])}")
    before, after = _list_images(old, same_splits=same_splits), _list_images(new, same_splits=same_splits)
    if not same_splits:
        found = _compare_split("data", before, after)
        return lines + (
            [f"the data had {len(before):,} images, and has {len(after):,}: {', '.join(found)}"] if found else []
        )
    for split in SPLITS:
        streams = [found.get(f"{split}_stream", np.array([])).tolist() for found in (old, new)]
        if streams[0] != streams[1]:
            lines.append(
                f"{split} was {' '.join(streams[0]) or 'in memory'}, and is {' '.join(streams[1]) or 'in memory'}"
            )
        found = _compare_split(split, before, after)
        if found:
            counts = [sum(image[0] == split for image in images.values()) for images in (before, after)]
            lines.append(f"{split} had {counts[0]:,} images, and has {counts[1]:,}: {', '.join(found)}")
    return lines


def find_sibling(settings: Mapping[str, Any], siblings: Iterable[Path]) -> str | None:
    """Return "<experiment>/<run>" of the first sibling with a list of images and the same data section, or None.

    The fold is ignored, since all members of a cross-validation have the same images.

    Args:
        settings: the full experiment of the run.
        siblings: run directories of the same study.
    """
    wanted = _describe_stage(settings)
    for sibling in siblings:
        if not (sibling / IMAGES_FILE).exists():
            continue
        record = RunRecord.read(sibling)
        if record is not None and record.settings is not None and _describe_stage(record.settings) == wanted:
            return f"{sibling.parent.name}/{sibling.name}"
    return None


def _describe_stage(settings: Mapping[str, Any]) -> list[Any]:
    stage = settings["finetune"]
    data = {key: value for key, value in stage["data"].items() if key != "fold"}
    return [data, stage["image_size"], stage.get("crop"), stage["balance"]]


def _have_same_pretraining(run: Run, sibling: Path) -> bool:
    """Return whether EF-FER1 of two runs of a study has the same data section, image size and balance."""
    sections = []
    for record in (run.record, RunRecord.read(sibling)):
        stage = ((record and record.settings) or {}).get("pretrain") or {}
        sections.append([stage.get("data"), stage.get("image_size"), stage.get("balance")])
    return sections[0][0] is not None and sections[0] == sections[1]


def _find_changed_keys(run: Run, record: RunRecord) -> list[str]:
    config = run.config()
    # A cross-validation trains the cells of the section `sweep`.
    own = "sweep" if record.kind == "cross_validation" else record.kind
    ignored = (*_NO_RESULT, *(name for name in _STUDIES if name != own))
    if record.settings is not None:
        began = load_start(run)
        if began is None:  # another version wrote it, which `_find_changed_software` reports
            return []
        return [f"{CONFIG_FILE}: {line}" for line in list_differences(began, config, ignored=ignored)]
    # A run of an earlier version has only a digest; another version may compute a different one for the same file.
    digest = compute_digest(config)
    if record.config_digest in (None, digest) or record.dlfer != __version__:
        return []
    return [f"{CONFIG_FILE}: its digest was {record.config_digest[:8]}, and is {digest[:8]}"]


def _find_changed_software(record: RunRecord) -> list[str]:
    before = {"dlfer": record.dlfer, **_name_frameworks(record.packages)}
    after = {"dlfer": __version__, **_name_frameworks(list_packages())}
    backend = _BACKENDS.get((record.device and record.device.backend) or "")
    names = ["dlfer", "tensorflow", "keras", *([backend] if backend else [])]
    if ((record.settings or {}).get("model") or {}).get("family") == "boosted":
        names.append("xgboost")
    pairs = [(name, before.get(name), after.get(name)) for name in names]
    return [
        f"software: {name} was {old}, and is {new or 'not installed'}"
        for name, old, new in pairs
        if old is not None and _cut_version(old) != _cut_version(new or "")
    ]


def _find_changed_backend(record: RunRecord, backend: str | None) -> list[str]:
    before = record.device and record.device.backend
    return (
        []
        if not before or backend in (None, before)
        else [f"software: the backend of Keras was {before}, and is {backend}"]
    )


def _name_frameworks(packages: Mapping[str, str]) -> dict[str, str]:
    """Return the versions by the names of the imported packages: tensorflow-cpu is imported as tensorflow."""
    return {name.removesuffix("-cpu"): version for name, version in packages.items()}


def _cut_version(version: str) -> list[str]:
    return version.split(".")[:2]


def _read_images(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return read_npz(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: the list of the run's images cannot be read ({error}), so that they cannot be compared; start a new run."
        ) from error


def _list_images(found: Mapping[str, np.ndarray], *, same_splits: bool) -> dict[str, tuple]:
    """Return id -> (split, digest of the pixels, name of the label, digest of soft targets) of the images in memory.

    If the splits need not be the same, each is called "data".
    """
    images: dict[str, tuple] = {}
    labels = found["labels"]
    for split in SPLITS:
        if f"{split}_ids" not in found:
            continue
        ids, names = found[f"{split}_ids"].tolist(), labels[found[f"{split}_targets"]].tolist()
        soft = found[f"{split}_soft"].tolist() if f"{split}_soft" in found else [None] * len(ids)
        rows = zip(ids, found[f"{split}_digests"].tolist(), names, soft, strict=True)
        where = split if same_splits else "data"
        images |= {name: (where, digest, label, own) for name, digest, label, own in rows}
    return images


def _compare_split(split: str, before: Mapping[str, tuple], after: Mapping[str, tuple]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, (where, digest, label, soft) in after.items():
        if where != split:
            continue
        old = before.get(name)
        if old is None:
            groups.setdefault("added", []).append(name)
        elif old[0] != split:
            groups.setdefault(f"moved here from {old[0]}", []).append(name)
        elif old[1] != digest:
            groups.setdefault("with other pixels", []).append(name)
        elif old[2] != label:
            groups.setdefault("with another label", []).append(name)
        elif old[3] != soft:
            groups.setdefault("with another soft target (data.votes, data.soft_targets)", []).append(name)
    gone = [name for name, image in before.items() if image[0] == split and name not in after]
    if gone:
        groups["removed"] = gone
    return [f"{len(names):,} {what} ({_list_first(names)})" for what, names in groups.items()]


def _list_first(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _MAX_IDS else ""
    return ", ".join(names[:_MAX_IDS]) + more


def _compare_fingerprints(run: Run, images: Mapping[str, np.ndarray]) -> list[str]:
    """Return the changes that data.json shows for a run of an earlier version, which wrote no list of its images."""
    record, lines = DataRecord.read(run.path), []
    for key, split in ({} if record is None else record.splits).items():
        now = str(images.get(f"{key}_fingerprint", ""))
        if split.fingerprint and now and split.fingerprint != now:
            lines.append(
                f"{key} had {split.n:,} images, and has {len(images[f'{key}_ids']):,}; ids, labels or pixels differ"
            )
    return lines


def _show(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"


def flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return dotted key -> value of the sections of an experiment."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{above}{name}"
        # A key of `search.space` and its range are compared as one value.
        if isinstance(value, Mapping) and above != "search.space.":
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat
