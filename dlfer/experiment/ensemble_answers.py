"""What the members of an ensemble answer, how that is combined, and how members and combinations compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, compute_fingerprint
from dlfer.errors import DataError
from dlfer.experiment.ensemble_members import Member
from dlfer.experiment.extras import predict_split_views
from dlfer.metrics.combine import combine_average, combine_vote, fit_combination, predict_out_of_fold
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.metrics.scores import compute_scores
from dlfer.metrics.several import compare_several
from dlfer.model.ensemble import match_labels
from dlfer.runs.metrics_record import (
    CombinationMetrics,
    EnsembleMetrics,
    EnsembleMilestone,
    MemberMetrics,
    SplitSummary,
)
from dlfer.runs.records import DataRecord

MILESTONES_FOLDER = Path("predictions") / "milestones"
COMBINATIONS = ("average", "vote", "trained")
TOLERANCE = 1e-3
"""How far a member's answers now may be from those in its files: it is then not the model that gave them."""


class Answers:
    """What the members answer on each part, averaged over each view: from their files, else predicted once.

    Args:
        members: with their classifiers.
        bundle: the ensemble's data.
        batch_size: images at a time.
    """

    def __init__(self, members: list[Member], bundle: DataBundle, *, batch_size: int) -> None:
        self.members, self.bundle, self.batch_size = members, bundle, batch_size
        self._kept: dict[tuple[str, str, str], np.ndarray] = {}
        self._fingerprints: dict[str, str] = {}

    def get(self, part: str, view: str, *, epoch: int | None = None) -> np.ndarray:
        """Return float32 [M, N, C] in the order of the split and of the bundle's labels; at the end or after an epoch."""
        if epoch is not None:
            return self.read_milestone(epoch, part)
        return np.stack([self._get_one(member, part, view) for member in self.members])

    def combine(self, part: str, view: str, how: str, *, epoch: int | None = None) -> Predictions:
        """Return the predictions of a combination of the members, at the end or after an epoch.

        The trained combination is fitted on validation; its predictions there are out of fold.
        """
        of_members, targets = self.get(part, view, epoch=epoch), self.bundle.validation.targets
        if how == "trained" and part == "validation":
            combined = predict_out_of_fold(of_members, targets)
        elif how == "trained":
            combined = fit_combination(self.get("validation", view, epoch=epoch), targets).predict(of_members)
        else:
            combined = (combine_vote if how == "vote" else combine_average)(of_members)
        return self.make(part, combined)

    def list_milestones(self, epochs: Sequence[int], view: str) -> list[int]:
        """Return those of `epochs` after which every member was judged, on these very images and by this view."""
        parts = [part for part in ("validation", "test") if getattr(self.bundle, part) is not None]
        runs = [member.find_run() for member in self.members]
        if any(run is None or run.config().evaluate.headline != view for run in runs):
            return []
        return [epoch for epoch in epochs if all(self.read_milestone(epoch, part) is not None for part in parts)]

    def read_milestone(self, epoch: int, part: str) -> np.ndarray | None:
        """Return likewise what the members answered at the end of an epoch; None where one was not judged then."""
        found = [self._read(member, MILESTONES_FOLDER / str(epoch) / f"{part}.npz", part) for member in self.members]
        return None if any(answers is None for answers in found) else np.stack(found)

    def make(self, part: str, answers: np.ndarray) -> Predictions:
        """Return answers [N, C] as predictions of a part."""
        split = getattr(self.bundle, part)
        return Predictions(split.ids, self.bundle.labels, split.targets, answers)

    def _get_one(self, member: Member, part: str, view: str) -> np.ndarray:
        key = (member.name, part, view)
        if key not in self._kept:
            folder = Path("predictions") if view == "single" else Path("predictions") / "views" / view
            found = self._read(member, folder / f"{part}.npz", part)
            if found is not None and part == "validation" and view == "single":
                self._check(member, found)
            self._kept[key] = self._predict(member, part, view) if found is None else found
        return self._kept[key]

    def _predict(self, member: Member, part: str, view: str) -> np.ndarray:
        split = getattr(self.bundle, part)
        columns = match_labels(member.classifier.labels, self.bundle.labels, member.name)
        return predict_split_views(member.classifier, split, view, batch_size=self.batch_size)[:, columns]

    def _read(self, member: Member, file: Path, part: str) -> np.ndarray | None:
        """Return what a member's run kept of these very images; None where it has no such file, or of others."""
        run, path, split = member.find_run(), Path(member.path) / file, getattr(self.bundle, part)
        if run is None or not path.exists():
            return None
        judged = DataRecord.require(run.path).splits.get(part)
        if judged is None or judged.fingerprint != self._get_fingerprint(part):
            return None
        kept = read_predictions(path)
        order = np.argsort(kept.ids)
        rows = order[np.searchsorted(kept.ids, split.ids, sorter=order)]
        columns = match_labels(kept.labels, self.bundle.labels, member.name)
        return kept.probabilities[rows][:, columns]

    def _get_fingerprint(self, part: str) -> str:
        if part not in self._fingerprints:
            self._fingerprints[part] = compute_fingerprint(getattr(self.bundle, part))
        return self._fingerprints[part]

    def _check(self, member: Member, found: np.ndarray) -> None:
        """Refuse kept predictions that the member, asked now, does not give."""
        images = self.bundle.validation.images[:8]
        columns = match_labels(member.classifier.labels, self.bundle.labels, member.name)
        now = member.classifier.predict(images)[:, columns]
        difference = float(np.abs(now - found[: len(now)]).max())
        if difference > TOLERANCE:
            raise DataError(
                f"{member.path}: the model answers otherwise than predictions/validation.npz has it (by "
                f"{difference:.3f}); the images have other pixels or the model was changed. Evaluate the run again."
            )


def compare_members(config: ExperimentConfig, answers: Answers, epochs: Sequence[int]) -> dict[str, Any]:
    """Return what an ensemble adds to its metrics: each member, each combination, and the pair that matters.

    Returns:
        Fields of `Metrics`: members, combinations, and ensemble, whose pair is the combination that is used against the
        member that is best on validation, on test or else on validation.
    """
    view, used, bundle = config.evaluate.headline, config.ensemble.combine, answers.bundle
    names = ["validation"] + (["test"] if bundle.test is not None else [])

    def judge(epoch: int | None) -> tuple[list[MemberMetrics], list[CombinationMetrics]]:
        members = []
        for number, member in enumerate(answers.members):
            several = {name: answers.get(name, view, epoch=epoch)[number] for name in names}
            found = {name: _summarise(answers.make(name, values)) for name, values in several.items()}
            about = {"name": member.name, "path": member.path, "status": member.status, "note": member.note}
            members.append(MemberMetrics(**{**about, "test": None, **found}))
        combinations = []
        for how in COMBINATIONS:
            found = {name: _summarise(answers.combine(name, view, how, epoch=epoch)) for name in names}
            combinations.append(CombinationMetrics(**{"name": how, "is_used": how == used, "test": None, **found}))
        return members, combinations

    members, combinations = judge(None)
    best = max(range(len(members)), key=lambda number: members[number].validation.accuracy.value)
    pair = [answers.combine(names[-1], view, used), answers.make(names[-1], answers.get(names[-1], view)[best])]
    compared = compare_several(pair, [f"the ensemble ({used})", answers.members[best].name]).pairs[0]
    milestones = []
    for epoch in epochs:
        of_members, of_combinations = judge(epoch)
        milestones.append(EnsembleMilestone(epoch=epoch, members=of_members, combinations=of_combinations))
    ensemble = EnsembleMetrics(
        combine=used,
        view=view,
        paired=compared.model_copy(update={"part": names[-1]}),
        milestones=milestones,
    )
    return {"members": members, "combinations": combinations, "ensemble": ensemble}


def _summarise(predictions: Predictions) -> SplitSummary:
    scores = compute_scores(predictions)
    return SplitSummary(n=scores.n, accuracy=scores.accuracy, macro_f1=scores.macro_f1)
