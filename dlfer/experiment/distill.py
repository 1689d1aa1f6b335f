"""Distillation: a student learns from the probabilities that its teachers, trained models, predict on its train split.

The target of an image is (1 - weight) times its label (or existing soft target) plus weight times the mean
probabilities of the teachers at a temperature: p^(1/T), normalised. Source: Hinton, Vinyals and Dean, "Distilling the
Knowledge in a Neural Network" (2015). There the temperature is applied to the student's probabilities as well; here it
is not, so training uses the ordinary loss with mixed targets.

A student learns from the predictions of its teachers, and so indirectly from the images that these were trained on. A
teacher that was trained on images of the student's test split is rejected; the report lists other overlaps of a
teacher's data with the images that the student is evaluated on. Images that a teacher's members, EF-FER1, initial
weights or own teachers learned from count as its own. `dlfer check`, which imports this module without a framework,
checks everything that can be checked without reading images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.config.load import resolve_path
from dlfer.config.schema import DistillConfig, ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint
from dlfer.data.sources import find_labels
from dlfer.errors import ConfigError, DataError, ModelError, ProtocolError, TrainingStopped
from dlfer.experiment.lineage import Found, have_same_source, trace_model
from dlfer.metrics.confidence import apply_temperature
from dlfer.predict.engines import load_engine
from dlfer.report.card import find_terms
from dlfer.report.page import try_experiment
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.changes import accept_or_refuse_changes
from dlfer.runs.files import link_file, read_npz, write_npz
from dlfer.runs.find import find_model, read_about
from dlfer.runs.records import ArtifactRecord, TeacherRecord, WeightsOrigin
from dlfer.runs.run import RUN_FILE, Run

if TYPE_CHECKING:
    from dlfer.experiment.session import Session

FILE = "teachers.npz"
"""The mean probabilities of a run's teachers on its training images, in the run's folder."""

_IMAGES_AT_A_TIME = 512


@dataclass(frozen=True)
class Teacher:
    """A trained model that a student learns from.

    Attributes:
        name: as the experiment names it.
        folder: of its artifact.
        artifact: its artifact.json.
        config: its experiment; None if unknown.
    """

    name: str
    folder: Path
    artifact: ArtifactRecord
    config: ExperimentConfig | None

    @property
    def home(self) -> Path:
        """The folder with its records: that of its run, or its own if it is a shipped model."""
        return self.folder.parent if (self.folder.parent / RUN_FILE).is_file() else self.folder


def open_teacher(name: str) -> Teacher:
    """Return the teacher with the name of a model or a run, or the path of a folder.

    Raises:
        ModelError: there is no such model, or it is damaged.
    """
    path = resolve_path(name)
    folder = find_model(path if path.exists() else name).resolve()
    artifact = read_artifact_record(folder)
    teacher = Teacher(name, folder, artifact.model_copy(update={"about": read_about(folder, artifact)}), None)
    return replace(teacher, config=try_experiment(teacher.home)[0])


def check_labels(teacher: Teacher, labels: Sequence[str]) -> None:
    """Raise ConfigError unless a teacher has exactly these labels, in any order."""
    found = teacher.artifact.labels
    if set(found) != set(labels):
        raise ConfigError(
            f"finetune.distill.teacher: {teacher.name} has the labels {', '.join(found)}; expected {', '.join(labels)}, those of "
            "finetune.data, in any order. Take another teacher, or bring the labels together by data.labels (aliases, drop)."
        )


def check_splits(teacher: Teacher, data: DataConfig) -> None:
    """Raise ConfigError if a teacher was certainly trained on images of the test split that a protocol draws.

    This is the case if it was trained on the same source with a different split.
    """
    own = None if teacher.config is None else teacher.config.finetune.data
    if own is None or data.protocol == "official" or not have_same_source(own, data):
        return
    keys = ("protocol", "split", "folds", "fold", "fraction", "seed", "subjects", "num_images")
    other = [key for key in keys if getattr(own, key) != getattr(data, key)]
    if other:
        values = ", ".join(f"{key}: {getattr(own, key)}" for key in other)
        raise ConfigError(
            f"finetune.distill.teacher: {teacher.name} was trained on the same images with {values}, and finetune.data has protocol "
            f"{data.protocol}: the teacher has seen images of the split that would judge its student. Take a teacher that was trained "
            "with the very same split (of a cross-validation: one for each fold, by dlfer run --set finetune.data.fold=N), or "
            "protocol: official for both."
        )


def examine_teachers(config: ExperimentConfig) -> Iterator[str]:
    """Yield the problems of the teachers of an experiment with distillation that can be found without its images."""
    data = config.finetune.data
    labels = find_labels(data)
    for name in config.finetune.distill.names:
        try:
            teacher = open_teacher(name)
            if labels is not None:
                check_labels(teacher, sorted(labels))
            check_splits(teacher, data)
        except ModelError as error:
            yield f"finetune.distill.teacher: {error}"
        except ConfigError as error:
            yield str(error)


def distill(run: Run, config: ExperimentConfig, session: Session, bundle: DataBundle) -> DataBundle:
    """Return the data of a run with its teachers' predictions mixed into the targets of train, and record the teachers.

    The teachers predict once: resumed runs and other runs on the same images reuse the predictions. Data of an ensemble
    is returned unchanged, since only its members are distilled.

    Raises:
        ConfigError, DataError: a teacher has other labels, images are streamed, or training uses several hosts.
        ProtocolError: a teacher was trained on images of the test split.
        ResumeError: a teacher has changed since the run began.
        TrainingStopped: a stop was requested while a teacher predicted.
    """
    section = config.finetune.distill
    if section is None or config.model.family == "ensemble":
        return bundle
    if not isinstance(bundle.train, Split):
        raise DataError(
            "finetune.distill: needs the training images in memory, and these are streamed. Leave it out, or set data.crop: "
            "{train: none}."
        )
    if run.record.device is not None and (run.record.device.workers or 1) > 1:
        raise ConfigError(
            "finetune.distill: found several hosts; a student is trained on one host. Leave out the others."
        )
    teachers = [open_teacher(name) for name in section.names]
    for teacher in teachers:
        check_labels(teacher, bundle.labels)
    _settle_teachers(run, teachers, session)
    records = [_describe(run, config, teacher, session, bundle) for teacher in teachers]
    run.update(teachers=records)
    for record in records:
        for text in filter(None, (record.leak, record.note)):
            run.warn(text)
            session.listener.warn(text)
    answers = _obtain_answers(run, teachers, session, bundle)
    return mix_targets(bundle, answers, section, records)


def mix_targets(
    bundle: DataBundle, answers: np.ndarray, section: DistillConfig, teachers: Sequence[TeacherRecord]
) -> DataBundle:
    """Return the bundle with soft targets in train and a note that describes them.

    Args:
        bundle: the data; if its train already has soft targets, these are used instead of the labels.
        answers: float [N, C], the teachers' mean probabilities on the N images of train, in the order of the labels.
        section: weight and temperature.
        teachers: for the note.
    """
    train, weight = bundle.train, section.weight
    own = np.eye(len(bundle.labels)) if train.soft_targets is None else None
    own = train.soft_targets.astype(np.float64) if own is None else own[train.targets]
    soft = apply_temperature(answers.astype(np.float64), section.temperature)
    mixed = (1 - weight) * own + weight * soft / soft.sum(axis=1, keepdims=True)
    named = ", ".join(f"{teacher.name} ({teacher.format_digests()})" for teacher in teachers)
    rest = "the label" if train.soft_targets is None else "the label and the votes"
    right = float((answers.argmax(axis=1) == train.targets).mean())
    note = (
        f"train: distillation: {weight:g} of each target is what the teacher{'s' * (len(teachers) > 1)} {named} answer"
        f"{'s' * (len(teachers) == 1)}, at temperature {section.temperature:g}; {rest} make{'s' * (train.soft_targets is None)} the "
        f"rest. {right:.1%} of these answers are the label (n = {len(train):,})."
    )
    found = replace(train, soft_targets=mixed.astype(np.float32))
    return replace(bundle, train=found, notes=(*bundle.notes, note))


def _settle_teachers(run: Run, teachers: Sequence[Teacher], session: Session) -> None:
    """Compare the teachers with those that the run began with, and reject or record changes by `accept_or_refuse_changes`."""
    changes = []
    for before, teacher in zip(run.record.teachers, teachers, strict=False):
        if before.sha256 != teacher.artifact.sha256:
            now = TeacherRecord(name=teacher.name, sha256=teacher.artifact.sha256).format_digests()
            changes.append(f"finetune.distill.teacher: {before.name} was {before.format_digests()}, and is {now}")
    accept_or_refuse_changes(run, changes, accept=session.options.accept_changes)


def _describe(
    run: Run, config: ExperimentConfig, teacher: Teacher, session: Session, bundle: DataBundle
) -> TeacherRecord:
    """Return the record of a teacher for run.json; raise ProtocolError if it was trained on the test split."""
    about, own = teacher.artifact.about, teacher.config
    terms = find_terms(own, about.origins)
    research_only = about.research_only or any(term.research_only for term in terms)
    learned = "; ".join(term.data for term in terms) or "it is not known from what"
    origin = WeightsOrigin(
        name=f"teacher {teacher.name}"[:1000],
        role="teacher",
        source=f"The model {teacher.name} (run {about.run or 'not known'})"[:1000],
        terms=f"The student was trained towards its answers. The terms of what it learned from hold here, too: {learned}."[
            :1000
        ],
        sha256=teacher.artifact.sha256,
        research_only=research_only,
    )
    leak, note = _judge(run, config, teacher, session, bundle)
    return TeacherRecord(
        name=teacher.name,
        run=about.run,
        sha256=teacher.artifact.sha256,
        origins=[*about.origins, origin],
        leak=leak,
        note=note,
    )


def _judge(
    run: Run, config: ExperimentConfig, teacher: Teacher, session: Session, bundle: DataBundle
) -> tuple[str | None, str | None]:
    """Return sentences on the evaluation images that a teacher learned from, and on unknown training data, or None.

    Raises:
        ProtocolError: the teacher was trained on images of the test split, except in a smoke run.
    """
    history, data = trace_model(teacher.folder, session.load_bundle), config.finetune.data
    splits = {name: split for name, split in bundle.splits.items() if name != "train" and isinstance(split, Split)}
    found = {name: history.count(split, bundle.train, data) for name, split in splits.items()}
    num_test, of_test = found.get("test", Found()), 0 if bundle.test is None else len(bundle.test)
    if num_test.trained and not run.is_smoke:
        raise ProtocolError(
            f"finetune.distill.teacher: {teacher.name} was trained on {num_test.trained:,} of the {of_test:,} images of this test "
            "split, so that no accuracy on it would hold. Take a teacher that was trained on this experiment's own training images."
        )
    parts = []
    for name, number in found.items():
        for count, what in (
            (number.trained, "was trained on"),
            (number.copied, "was trained on exact copies of"),
            (number.selected if name == "test" else 0, "was selected on"),
        ):
            if count:
                parts.append(f"{what} {count:,} of the {len(bundle.splits[name]):,} {name} images")
    leak = note = None
    if parts:
        leak = f"Leak: the teacher {teacher.name} {', and '.join(parts)}, so that the accuracy there may be too high."
    if not all(history.is_known(split, data) for split in splits.values()):
        note = (
            f"What the teacher {teacher.name} was trained on is not known here{' in full' if history.seen else ''}. Its training "
            "images must not contain images of the student's test split, or the accuracy is too high."
        )
    return leak, note


def _obtain_answers(run: Run, teachers: Sequence[Teacher], session: Session, bundle: DataBundle) -> np.ndarray:
    """Return the teachers' mean probabilities on train (float32 [N, C]), from this run, the cache, or predicted."""
    wanted = {
        "images": compute_fingerprint(bundle.train),
        "labels": list(bundle.labels),
        "teachers": [teacher.artifact.sha256 for teacher in teachers],
    }
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    own = run.path / FILE
    shared = session.runs_folder / ".cache" / "teachers" / f"{digest[:16]}.npz" if run.record.use_cache else own
    for file in (own, shared):
        found = _read_answers(file, digest, bundle.train.ids)
        if found is not None:
            if file != own:
                link_file(file, own)
            return found
    answers = np.mean([_predict(teacher, bundle, session) for teacher in teachers], axis=0).astype(np.float32)
    shared.parent.mkdir(parents=True, exist_ok=True)
    write_npz(shared, {"digest": np.array(digest), "ids": bundle.train.ids, "probabilities": answers})
    if shared != own:
        link_file(shared, own)
    run.log("teachers_end", n=len(answers))
    return answers


def _read_answers(file: Path, digest: str, ids: np.ndarray) -> np.ndarray | None:
    try:
        found = read_npz(file)
    except (OSError, ValueError):  # absent or damaged, so the teachers predict again
        return None
    if str(found.get("digest")) != digest or sorted(found["ids"].tolist()) != sorted(ids.tolist()):
        return None
    order = np.argsort(found["ids"])
    return found["probabilities"][order[np.searchsorted(found["ids"], ids, sorter=order)]]


def _predict(teacher: Teacher, bundle: DataBundle, session: Session) -> np.ndarray:
    """Return a teacher's probabilities on train (float32 [N, C]), in the order of the bundle's labels."""
    engine, images = load_engine(teacher.folder), bundle.train.images
    columns = [engine.labels.index(label) for label in bundle.labels]
    session.listener.say(f"teacher {teacher.name}: predicts {len(images):,} training images, once")
    found = []
    for start in range(0, len(images), _IMAGES_AT_A_TIME):
        reason = session.control.get_reason()
        if reason is not None:
            raise TrainingStopped(
                f"the teacher {teacher.name} stopped by {reason} after {start:,} of {len(images):,} images; it begins again.",
                reason=reason,
            )
        found.append(engine.predict(images[start : start + _IMAGES_AT_A_TIME]))
        session.listener.report_progress(
            f"answers of {teacher.name}", min(start + _IMAGES_AT_A_TIME, len(images)), len(images)
        )
    return np.concatenate(found)[:, columns]
