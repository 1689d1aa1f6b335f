"""The teachers of a student: trained models by their names, and what of them can be checked before images are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlfer.config.load import resolve_path
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.sources import find_labels
from dlfer.errors import ConfigError, ModelError
from dlfer.report.page import try_experiment
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.find import find_model, read_about
from dlfer.runs.records import ArtifactRecord
from dlfer.runs.run import RUN_FILE


@dataclass(frozen=True)
class Teacher:
    """A trained model that a student learns from.

    Attributes:
        name: as the experiment names it.
        folder: of its artifact.
        artifact: its artifact.json.
        config: its experiment; None where that is not known here.
    """

    name: str
    folder: Path
    artifact: ArtifactRecord
    config: ExperimentConfig | None

    @property
    def home(self) -> Path:
        """The folder with its records: its run's, or its own where it was shipped."""
        return self.folder.parent if (self.folder.parent / RUN_FILE).is_file() else self.folder


def open_teacher(name: str) -> Teacher:
    """Return the teacher of a name: a model's, a run's, or a folder.

    Raises:
        ModelError: nothing of that name, or a damaged one.
    """
    path = resolve_path(name)
    folder = find_model(path if path.exists() else name).resolve()
    artifact = read_artifact_record(folder)
    teacher = Teacher(name, folder, artifact.model_copy(update={"about": read_about(folder, artifact)}), None)
    return replace(teacher, config=try_experiment(teacher.home)[0])


def check_labels(teacher: Teacher, labels: Sequence[str]) -> None:
    """Raise ConfigError unless a teacher has the labels, in any order."""
    found = teacher.artifact.labels
    if set(found) != set(labels):
        raise ConfigError(
            f"finetune.distill.teacher: {teacher.name} has the labels {', '.join(found)}; expected {', '.join(labels)}, those of "
            "finetune.data, in any order. Take another teacher, or bring the labels together by data.labels (aliases, drop)."
        )


def check_splits(teacher: Teacher, data: DataConfig) -> None:
    """Raise ConfigError where a teacher has certainly been trained on images of the test split that a protocol draws.

    That is so where it learned from the same files and divided them in another way.
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


def have_same_source(first: DataConfig, second: DataConfig) -> bool:
    """Tell whether an id of two sections of data means the same image; drawn images are told by their pixels."""
    if first.source != second.source or first.name != second.name or first.source.startswith("synthetic"):
        return False
    try:
        paths = {None if data.path is None else resolve_path(data.path).resolve() for data in (first, second)}
    except ConfigError:  # a variable that is not set here
        return False
    return len(paths) == 1


def examine_teachers(config: ExperimentConfig) -> Iterator[str]:
    """Yield what is wrong with the teachers of an experiment, as far as it is known without its images."""
    section, data = config.finetune.distill, config.finetune.data
    labels = None if section is None else find_labels(data)
    for name in () if section is None else section.names:
        try:
            teacher = open_teacher(name)
            if labels is not None:
                check_labels(teacher, sorted(labels))
            check_splits(teacher, data)
        except ModelError as error:
            yield f"finetune.distill.teacher: {error}"
        except ConfigError as error:
            yield str(error)
