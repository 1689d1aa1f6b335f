"""The family ensemble: several trained classifiers, of any families, whose answers are combined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from dlfer.config.sections import ModelConfig
from dlfer.errors import ModelError
from dlfer.metrics.predictions import TrainedCombination, combine_average, combine_vote
from dlfer.model.classifier import Classifier, load_classifier, read_model_config
from dlfer.model.predict import predict_views
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.files import link_file
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.runs.records import ArtifactRecord, Temperature

MEMBERS = "members"
MOST_MEMBERS = 1000


class EnsembleClassifier(Classifier):
    """Several classifiers as one.

    Args:
        members: name -> a classifier of the same set of labels, in any order.
        labels, config, temperature_fit: as `Classifier` has them.
        combine: "average", "vote" or "trained".
        trained: by view ("single" and the names of views), what was fitted on validation; the combination
            "trained" needs "single", the others none.

    Raises:
        ModelError: a member has other labels, or makes squares of images in another way; or the trained combination
            is missing.
    """

    family = "ensemble"

    def __init__(
        self,
        members: Mapping[str, Classifier],
        labels: tuple[str, ...],
        *,
        config: ModelConfig,
        combine: str = "average",
        trained: Mapping[str, TrainedCombination] | None = None,
        temperature_fit: Temperature | None = None,
    ) -> None:
        super().__init__(
            labels,
            config=config,
            channels=max(member.channels for member in members.values()),
            image_size=max(member.image_size for member in members.values()),
            temperature_fit=temperature_fit,
        )
        self.members = dict(members)
        self.aspect = match_aspects({name: member.aspect for name, member in members.items()})
        self.combine_by = combine
        self.trained = dict(trained or {})
        if combine == "trained" and "single" not in self.trained:
            raise ModelError("ensemble: the combination is trained, but none was fitted; fit it on validation.")
        self._columns = {name: match_labels(member.labels, self.labels, name) for name, member in members.items()}
        self._folders: dict[str, Path] = {}

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return float32 [N, C], rows sum to one."""
        answers = [
            member.predict(images, batch_size=batch_size)[:, self._columns[name]]
            for name, member in self.members.items()
        ]
        return self.combine(np.stack(answers), "single")

    def predict_view(self, images: np.ndarray, view: str, *, batch_size: int) -> np.ndarray:
        """Return the combination, float32 [N, C], of what each member answers on the average over its own views."""
        answers = [
            predict_views(member, images, view, batch_size=batch_size)[:, self._columns[name]]
            for name, member in self.members.items()
        ]
        return self.combine(np.stack(answers), view)

    def combine(self, probabilities: np.ndarray, view: str) -> np.ndarray:
        """Return float32 [N, C] of the members' float [M, N, C], with columns as `labels`, averaged over `view`."""
        if self.combine_by == "trained":
            return self.trained.get(view, self.trained["single"]).predict(probabilities).astype(np.float32)
        combined = combine_vote if self.combine_by == "vote" else combine_average
        return combined(probabilities).astype(np.float32)

    def describe(self) -> dict:
        """Return who the members are and what was fitted."""
        trained = {view: fitted.as_dict() for view, fitted in self.trained.items()}
        return {"ensemble": {"combine": self.combine_by, "members": list(self.members), "trained": trained}}

    def keep_folder(self, name: str, folder: Path) -> None:
        """Say where the artifact of a member stands, so that its files can be linked instead of written again."""
        self._folders[name] = Path(folder)

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Put the artifact of each member into `members/<name>/`; on the same disk its files are linked."""
        files: list[str] = []
        for name, member in self.members.items():
            target = folder / MEMBERS / name
            if name in self._folders:
                _share_artifact(self._folders[name], target)
            else:
                member.save(target)
            self._folders[name] = target
            listed = (*read_artifact_record(target).sha256, ARTIFACT_FILE)
            files += [f"{MEMBERS}/{name}/{file}" for file in listed]
        return tuple(files)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the names of the members' artifact.json, which name their own files.

        Raises:
            ModelError: the record names no members, or one that is no folder of its own.
        """
        given = record.ensemble
        members = given.get("members") if isinstance(given, dict) else None
        known = ("average", "vote", "trained")
        is_whole = isinstance(members, list) and members and isinstance(given.get("trained"), dict)
        if not is_whole or given.get("combine") not in known:
            raise ModelError(
                f"{ARTIFACT_FILE}: ensemble: expected members, how they are combined ({', '.join(known)}) and what was "
                "fitted; copy the artifact again, or train it again."
            )
        wrong = [name for name in members if not isinstance(name, str) or "/" in name]
        if wrong or len(set(members)) < len(members) or len(members) > MOST_MEMBERS:
            raise ModelError(
                f"{ARTIFACT_FILE}: ensemble.members: found {str(wrong or members)[:200]}, expected at most {MOST_MEMBERS} "
                f"different names of folders in {MEMBERS}/."
            )
        return tuple(f"{MEMBERS}/{name}/{ARTIFACT_FILE}" for name in members)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Load the members, and what was fitted."""
        given = record.ensemble
        ensemble = cls(
            {name: load_classifier(folder / MEMBERS / name) for name in given["members"]},
            tuple(record.labels),
            config=read_model_config(record),
            combine=given["combine"],
            trained={view: _read_combination(values, folder) for view, values in given["trained"].items()},
            temperature_fit=record.temperature,
        )
        for name in ensemble.members:
            ensemble.keep_folder(name, folder / MEMBERS / name)
        return ensemble


def _read_combination(values: dict, folder: Path) -> TrainedCombination:
    try:
        return TrainedCombination.from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: ensemble.trained: {error}; copy the artifact again, or fit it again.") from error


def match_labels(found: tuple[str, ...], labels: tuple[str, ...], name: str) -> list[int]:
    """Return where each of `labels` stands among those of a member.

    Raises:
        ModelError: the two are not the same set.
    """
    if set(found) != set(labels):
        raise ModelError(
            f"ensemble: the member {name} has the labels {', '.join(found)}; expected {', '.join(labels)}, in any "
            "order. Members tell the same labels apart."
        )
    return [found.index(label) for label in labels]


def match_aspects(aspects: Mapping[str, str]) -> str:
    """Return how all members of an ensemble make squares of images, of the name and the aspect of each.

    Raises:
        ModelError: they differ, so that no one square could be cut out of a picture for all of them.
    """
    found = sorted(set(aspects.values()))
    if len(found) > 1:
        listed = ", ".join(f"{name}: {aspect}" for name, aspect in aspects.items())
        raise ModelError(
            f"ensemble: the members treat images that are not square differently ({listed}); expected one data.aspect. "
            "Train them with the same, or leave some out."
        )
    return found[0]


def _share_artifact(source: Path, target: Path) -> None:
    """Link (or copy) an artifact, and only what its artifact.json names."""
    if source.resolve() == target.resolve():
        return
    for file in (*read_artifact_record(source).sha256, ARTIFACT_FILE):
        link_file(source / file, target / file)
