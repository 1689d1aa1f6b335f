"""The images that a model has learned from, to detect test and validation images among them.

These are not only those of its own training split, but also of EF-FER1's data, of the run that its weights are from, of
an ensemble's members and of teachers, recursively. `trace_model` collects them from the image lists that runs keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from pathlib import Path

import numpy as np

from dlfer.config.load import resolve_path
from dlfer.config.names import PUBLISHED_WEIGHTS
from dlfer.config.schema import ExperimentConfig, PretrainConfig, StageConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit, compute_fingerprint
from dlfer.data.duplicates import Duplicates, find_duplicates, hash_images, shorten_digests
from dlfer.data.sources import is_prepared, is_present
from dlfer.errors import ConfigError, DlferError, ModelError
from dlfer.report.page import try_experiment
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.changes import IMAGES_FILE, PRETRAIN_IMAGES_FILE
from dlfer.runs.files import read_npz
from dlfer.runs.find import ARTIFACT_FILE, find_model, is_hub_name
from dlfer.runs.member_rows import read_member_rows
from dlfer.runs.records import DataRecord, RunRecord, SplitRecord
from dlfer.runs.run import RUN_FILE

TRAINED, PRETRAINED, TAUGHT = "trained", "pretrained", "taught"
"""Roles of images: they trained the model or a member of it; the weights that it started from; a teacher of it."""

_BACKBONE_FILE, _MEMBERS = "backbone.json", "members"
LoadStage = Callable[[StageConfig], DataBundle]


def index_images(bundle: DataBundle) -> dict[str, np.ndarray]:
    """Return the list of a bundle's images that a run keeps to compare on resume (`runs.changes.compare_images`)."""
    found = {"labels": np.array(bundle.labels)}
    for key, split in bundle.splits.items():
        if not isinstance(split, Split):
            found[f"{key}_stream"] = np.array([split.name, f"with {len(split):,} images"])
            continue
        found |= {f"{key}_ids": split.ids, f"{key}_targets": split.targets}
        found |= {
            f"{key}_digests": hash_images(split.images),
            f"{key}_fingerprint": np.array(compute_fingerprint(split)),
            f"{key}_shape": np.array(split.images.shape[1:]),
        }
        if split.soft_targets is not None:
            found[f"{key}_soft"] = hash_images(split.soft_targets)
    if bundle.test_groups is not None:
        found["test_groups"] = bundle.test_groups
    return found


def have_same_source(first: DataConfig, second: DataConfig) -> bool:
    """Return whether ids of two data sections mean the same images; synthetic images are only compared by pixels."""
    if first.source != second.source or first.name != second.name or first.source.startswith("synthetic"):
        return False
    try:
        paths = {None if data.path is None else resolve_path(data.path).resolve() for data in (first, second)}
    except ConfigError:  # a variable that is not set here
        return False
    return len(paths) == 1


@dataclass(frozen=True)
class Found:
    """Numbers of images of a split that trained a model, that have an exact copy that did, and that selected it."""

    trained: int = 0
    copied: int = 0
    selected: int = 0


@dataclass(frozen=True)
class LearnedImages:
    """The images of one stage that a model has learned from, from the list made by `index_images`.

    Attributes:
        role: TRAINED, PRETRAINED or TAUGHT.
        data: the data section that they come from; None: unknown.
        digests: bytes [N], 64 bits per training image (`shorten_digests`).
        ids: of the training images; None if they were not kept.
        selected, selected_ids: digests and ids of the images that selected the model.
        shape: (height, width, channels) of the images; None: unknown.
        load: returns the data with the images themselves, or None if it is not available or has changed.
    """

    role: str
    data: DataConfig | None
    digests: np.ndarray
    ids: frozenset[str] | None
    selected: np.ndarray
    selected_ids: frozenset[str]
    shape: tuple[int, ...] | None
    load: Callable[[], DataBundle | None]

    @classmethod
    def from_lists(
        cls,
        role: str,
        data: DataConfig | None,
        lists: Mapping[str, np.ndarray],
        load: Callable[[], DataBundle | None],
        *,
        shape: Sequence[int] | None = None,
    ) -> LearnedImages:
        """Return an instance from a list of images; `shape` is that of the images if the list lacks it."""
        none = np.zeros(0, "S16")
        found = lists["train_shape"].tolist() if "train_shape" in lists else shape
        return cls(
            role,
            data,
            shorten_digests(lists["train_digests"]),
            frozenset(lists["train_ids"].tolist()) if "train_ids" in lists else None,
            shorten_digests(lists.get("validation_digests", none)),
            frozenset(lists.get("validation_ids", np.zeros(0, str)).tolist()),
            None if found is None else tuple(found),
            load,
        )

    def is_same(self, data: DataConfig | None) -> bool:
        """Return whether its ids mean the same images as those of a data section."""
        return None not in (self.ids, self.data, data) and have_same_source(self.data, data)

    def is_comparable(self, split: Split, data: DataConfig | None) -> bool:
        """Return whether images of a split can be found among these, by ids or by digests of the same shape."""
        return self.is_same(data) or self.shape in (None, split.images.shape[1:])

    def mark(self, split: Split, is_own: np.ndarray, data: DataConfig | None) -> tuple[np.ndarray, ...]:
        """Return which images of a split trained, have an exact copy that trained, and selected (bool [N] each).

        Args:
            split: the N images.
            is_own: bool [N], images with a copy in the evaluated model's own training split, which are no leak.
            data: the data section of the split. If ids are comparable, they decide which images trained and selected,
                otherwise exact copies count as the images themselves.
        """
        digests = shorten_digests(hash_images(split.images))
        copied = np.isin(digests, self.digests) & ~is_own
        if not self.is_same(data):
            return copied, copied, np.isin(digests, self.selected) & ~is_own
        trained, selected = (_are_among(split.ids, ids) for ids in (self.ids, self.selected_ids))
        return trained, copied, selected

    def find(self, judged: Split, data: DataConfig | None, *, with_selection: bool) -> Duplicates | None:
        """Return the duplicates of `judged` among these images, only exact ones if these are absent; None: unknown."""
        bundle = self.load()
        if bundle is None and not self.is_comparable(judged, data):
            return None
        lists = [(self.digests, self.ids), (self.selected, self.selected_ids)][: 1 + with_selection]
        digests, none = shorten_digests(hash_images(judged.images)), np.zeros(len(judged), bool)
        found = Duplicates(none, none, none)
        for listed, ids in lists:
            exact = np.isin(digests, listed)
            by_id = _are_among(judged.ids, ids) if self.is_same(data) else none
            found |= Duplicates(exact, none, exact | by_id)
        splits = () if bundle is None else (bundle.train, bundle.validation)[: 1 + with_selection]
        for split in splits:
            if isinstance(split, Split):
                # No ids, since in other data the same id may mean another image.
                found |= find_duplicates(judged.images, split.images)
        return found


def _are_among(ids: np.ndarray, others: frozenset[str]) -> np.ndarray:
    return np.array([name in others for name in ids.tolist()], bool)


@dataclass(frozen=True)
class History:
    """The images that a model has learned from, as far as they are known.

    Attributes:
        seen: the images of each stage.
        unknown: the roles in which the model has also learned from unknown images.
    """

    seen: tuple[LearnedImages, ...] = ()
    unknown: frozenset[str] = frozenset()

    def __or__(self, other: History) -> History:
        """Return the union of both histories."""
        return History(self.seen + other.seen, self.unknown | other.unknown)

    def select(self, *roles: str) -> History:
        """Return the part of the history with the given roles."""
        return History(tuple(seen for seen in self.seen if seen.role in roles), self.unknown.intersection(roles))

    def is_known(self, split: Split, data: DataConfig | None) -> bool:
        """Return whether the image lists suffice to tell which images of a split the model learned from."""
        return not self.unknown and all(seen.is_comparable(split, data) for seen in self.seen)

    def is_counted(self, split: Split, data: DataConfig | None) -> bool:
        """Return whether lists or available images suffice to tell which images of a split the model learned from."""
        return not self.unknown and all(
            seen.is_comparable(split, data) or seen.load() is not None for seen in self.seen
        )

    def count(self, split: Split, own: Split | StreamedSplit, data: DataConfig | None) -> Found:
        """Return how many images of a split the model learned from, ignoring copies of images in `own`, its train."""
        is_own = np.zeros(len(split), bool)
        if isinstance(own, Split):
            is_own = np.isin(hash_images(split.images), hash_images(own.images))
        trained, copied, selected = (np.zeros(len(split), bool) for _ in range(3))
        for seen in self.seen:
            found = seen.mark(split, is_own, data)
            trained, copied, selected = trained | found[0], copied | found[1], selected | found[2]
        return Found(int(trained.sum()), int((copied & ~trained).sum()), int(selected.sum()))

    def find_in_pretraining(self, judged: Split, data: DataConfig | None, *, with_selection: bool) -> Duplicates | None:
        """Return the duplicates of `judged` in the data of EF-FER1; None if there is no such data or it is unknown.

        Args:
            judged: the split to find duplicates of.
            data: its data section; None: its ids are not comparable with others.
            with_selection: whether to count images that selected EF-FER1 as well.
        """
        stages = {(seen.digests.tobytes(), seen.selected.tobytes()): seen for seen in self.select(PRETRAINED).seen}
        found = [seen.find(judged, data, with_selection=with_selection) for seen in stages.values()]
        known = [duplicates for duplicates in found if duplicates is not None]
        return reduce(or_, known) if known else None


def trace_model(folder: Path, load: LoadStage) -> History:
    """Return the history of a trained model: its own data and that of its EF-FER1, its members and its teachers.

    Args:
        folder: of its run or its artifact.
        load: loads the data of a stage; called only for available data that has no list or whose pixels are compared.
    """
    tracer = _Tracer(load)
    tracer.follow_model(Path(folder), TRAINED)
    return tracer.get()


def trace_pretraining(config: ExperimentConfig, load: LoadStage) -> History:
    """Return the history of an experiment's EF-FER1, or of the run that its weights are from."""
    tracer = _Tracer(load)
    tracer.follow_pretraining(config.pretrain, PRETRAINED)
    return tracer.get()


def trace_experiment(config: ExperimentConfig, load: LoadStage) -> History:
    """Return the history that a network to be trained will have: its data and that of its EF-FER1 and teachers."""
    tracer = _Tracer(load)
    tracer.add_stage(TRAINED, config.finetune, IMAGES_FILE)
    tracer.follow_pretraining(config.pretrain, PRETRAINED)
    for name in () if config.finetune.distill is None else config.finetune.distill.names:
        tracer.follow_name(name, TAUGHT)
    return tracer.get()


class _Tracer:
    """Collects a model's history from run to run; each run is visited once per role, so cycles end."""

    def __init__(self, load: LoadStage) -> None:
        self._load, self._seen, self._unknown = load, [], set()
        self._done: set[tuple[Path, str, str]] = set()

    def get(self) -> History:
        return History(tuple(self._seen), frozenset(self._unknown))

    def follow_model(self, folder: Path, role: str) -> None:
        """Add the history of a run or an artifact, whose own images have the given role."""
        folder = folder.resolve()
        home = _find_home(folder)
        if self._is_done(home, "model", role):
            return
        config = try_experiment(home)[0]
        self.add_stage(role, None if config is None else config.finetune, IMAGES_FILE, home)
        try:
            members, record = _list_members(folder, home), RunRecord.read(home)
        except ModelError:  # damaged
            members, record = [None], None
        for member in members:
            if member is None:
                self._unknown.add(role)
            else:
                self.follow_model(member, role)
        if not members:
            self._follow_earlier(home, config, record, role)

    def _follow_earlier(self, home: Path, config: ExperimentConfig | None, record: RunRecord | None, role: str) -> None:
        """Add the history of a run's pretraining and teachers, which for a shipped model its experiment names."""
        before, taught = (PRETRAINED, TAUGHT) if role == TRAINED else (role, role)
        if config is not None:
            self.follow_pretraining(config.pretrain, before, home)
        else:
            self._unknown.add(before)
            if (home / PRETRAIN_IMAGES_FILE).exists():
                self.add_stage(before, None, PRETRAIN_IMAGES_FILE, home)
        if record is not None:
            for teacher in record.teachers:
                self.follow_name(teacher.name, taught, teacher.sha256)
        elif config is not None and config.finetune.distill is not None:
            for name in config.finetune.distill.names:
                self.follow_name(name, taught)

    def follow_pretraining(self, section: PretrainConfig | None, role: str, home: Path | None = None) -> None:
        """Add the history of an experiment's EF-FER1; `home` is the folder of its run, None if not trained yet."""
        if section is not None and section.weights is None:
            self.add_stage(role, section, PRETRAIN_IMAGES_FILE, home)
        for name in () if section is None else section.list_of_weights:
            if name not in PUBLISHED_WEIGHTS:
                self._follow_weights(name, role)

    def _follow_weights(self, name: str, role: str) -> None:
        """Add the history of the model or EF-FER1 that weights are from; other files count as published weights."""
        try:
            path = resolve_path(name)
        except ConfigError:  # a variable that is not set here
            self._unknown.add(role)
            return
        folder = path.parent if path.is_file() else path
        is_model, is_backbone = ((folder / file).is_file() for file in (ARTIFACT_FILE, _BACKBONE_FILE))
        if is_backbone and not is_model:
            home = _find_home(folder.resolve())
            config = try_experiment(home)[0]
            if config is None:
                self._unknown.add(role)
            elif not self._is_done(home, "pretrain", role):
                self.follow_pretraining(config.pretrain, role, home)
        elif is_model or not path.is_file():
            self.follow_name(str(folder) if path.is_file() else name, role)

    def follow_name(self, name: str, role: str, sha256: Mapping[str, str] | None = None) -> None:
        """Add the history of a named model, unknown if missing, changed (`sha256`), or on the hub (not downloaded)."""
        folder = None
        with contextlib.suppress(DlferError):  # missing or damaged
            path = resolve_path(name)
            found = None if is_hub_name(name) else find_model(path if path.exists() else name)
            is_it = found is not None and (not sha256 or read_artifact_record(found).sha256 == sha256)
            folder = found if is_it else None
        if folder is None:
            self._unknown.add(role)
        else:
            self.follow_model(folder, role)

    def add_stage(self, role: str, stage: StageConfig | None, file: str, home: Path | None = None) -> None:
        """Add the images of a stage from the list in a run, or else from its data, if available and unchanged."""
        is_recorded = home is not None and file == IMAGES_FILE
        train = _read_train(home) if is_recorded else SplitRecord()
        lists = {} if home is None else _read_lists(home / file)
        fingerprint = str(lists["train_fingerprint"]) if "train_fingerprint" in lists else train.fingerprint
        load = partial(self._load_stage, stage, fingerprint)
        if "train_ids" not in lists:  # shipped models keep only digests
            bundle = None if is_recorded and fingerprint is None else load()
            lists = lists if bundle is None else index_images(bundle)
        if "train_digests" in lists:
            data = None if stage is None else stage.data
            self._seen.append(LearnedImages.from_lists(role, data, lists, load, shape=train.shape))
        else:
            self._unknown.add(role)

    def _load_stage(self, stage: StageConfig | None, fingerprint: str | None) -> DataBundle | None:
        try:
            if stage is None or stage.data is None or not (is_present(stage.data) and is_prepared(stage.data)):
                return None
            bundle = self._load(stage)
        except (DlferError, OSError):  # missing or damaged
            return None
        if not isinstance(bundle.train, Split):
            return None
        return bundle if fingerprint in (None, compute_fingerprint(bundle.train)) else None

    def _is_done(self, *key: Path | str) -> bool:
        """Return whether a folder was visited in a role before, and mark it as visited."""
        was_done = key in self._done
        self._done.add(key)
        return was_done


def _find_home(folder: Path) -> Path:
    """Return the folder with the records of a run, an artifact or EF-FER1: the run's, or that of the shipped model."""
    return folder.parent if (folder.parent / RUN_FILE).is_file() else folder


def _list_members(folder: Path, home: Path) -> list[Path | None]:
    """Return the folders of an ensemble's members, None for a missing one; [] if the model is not an ensemble.

    Raises:
        ModelError: a record is damaged.
    """
    artifact = find_model(folder)
    record = read_artifact_record(artifact)
    if record.family != "ensemble":
        return []
    members = [row.find_folder(home) for row in read_member_rows(home)]
    names = (record.ensemble or {}).get("members") or ()
    return members or [artifact / _MEMBERS / name for name in names] or [None]


def _read_lists(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except (OSError, ValueError):  # absent or damaged
        return {}


def _read_train(home: Path) -> SplitRecord:
    try:
        splits = (DataRecord.read(home) or DataRecord()).splits
    except ModelError:  # damaged
        return SplitRecord()
    return splits.get("train", SplitRecord())
