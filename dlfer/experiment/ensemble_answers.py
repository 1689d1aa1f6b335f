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
from dlfer.experiment.milestones import FOLDER as MILESTONES_FOLDER
from dlfer.metrics.combine import combine_average, combine_vote, fit_combination, predict_out_of_fold
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.metrics.scores import compute_scores
from dlfer.metrics.several import compare_several
from dlfer.model.ensemble import match_labels

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

    def get(self, part: str, view: str) -> np.ndarray:
        """Return float32 [M, N, C] in the order of the split and of the bundle's labels."""
        return np.stack([self._get_one(member, part, view) for member in self.members])

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
        judged = run.read_json("data.json")["splits"].get(part, {})
        if judged.get("fingerprint") != self._get_fingerprint(part):
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


def combine(answers: Answers, part: str, view: str, how: str, *, epoch: int | None = None) -> np.ndarray:
    """Return float [N, C]: a combination of the members on a part, at the end or after `epoch` epochs.

    The trained combination is fitted on validation; what it answers there is out of fold.
    """

    def get(name: str) -> np.ndarray:
        return answers.get(name, view) if epoch is None else answers.read_milestone(epoch, name)

    if how != "trained":
        return (combine_vote if how == "vote" else combine_average)(get(part))
    targets = answers.bundle.validation.targets
    if part == "validation":
        return predict_out_of_fold(get(part), targets)
    return fit_combination(get("validation"), targets).predict(get(part))


def compare_members(config: ExperimentConfig, answers: Answers, epochs: list[int]) -> dict[str, Any]:
    """Return what an ensemble adds to metrics.json: each member and each combination, and the pair that matters.

    Returns:
        {"members": [{"name", "path", "status", "note", "validation": figures, "test": figures or None}],
        "combinations": [{"name", "is_used", "validation", "test"}],
        "ensemble": {"combine", "view", "paired": the combination that is used against the member that is best on
        validation, as a pair of `compare_several`, on test or else on validation, "milestones":
        [{"epoch", "members": [...], "combinations": [...]}]}}. Figures are {"n", "accuracy", "macro_f1"}.
    """
    view, bundle = config.evaluate.headline, answers.bundle
    parts = ["validation"] + (["test"] if bundle.test is not None else [])
    used = config.ensemble.combine

    def judge(epoch: int | None) -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {"members": [], "combinations": []}
        for number, member in enumerate(answers.members):
            row = {"name": member.name, "path": member.path, "status": member.status, "note": member.note, "test": None}
            for part in parts:
                several = answers.get(part, view) if epoch is None else answers.read_milestone(epoch, part)
                row[part] = _score(answers.make(part, several[number]))
            rows["members"].append(row)
        for how in COMBINATIONS:
            row = {"name": how, "is_used": how == used, "test": None}
            for part in parts:
                row[part] = _score(answers.make(part, combine(answers, part, view, how, epoch=epoch)))
            rows["combinations"].append(row)
        return rows

    final = judge(None)
    best = max(range(len(answers.members)), key=lambda k: final["members"][k]["validation"]["accuracy"]["value"])
    part = parts[-1]
    pair = [answers.make(part, combine(answers, part, view, used)), answers.make(part, answers.get(part, view)[best])]
    names = [f"the ensemble ({used})", answers.members[best].name]
    paired = {**compare_several(pair, names)["pairs"][0], "part": part}
    milestones = [{"epoch": epoch, **judge(epoch)} for epoch in epochs]
    return {**final, "ensemble": {"combine": used, "view": view, "paired": paired, "milestones": milestones}}


def _score(predictions: Predictions) -> dict[str, Any]:
    scores = compute_scores(predictions)
    return {key: scores[key] for key in ("n", "accuracy", "macro_f1")}
