"""Fitting an ensemble: members that are trained as runs of their own or are trained already, and their combination."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.catalog import find_model
from dlfer.config.ensemble import MemberConfig
from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.twins import hash_images
from dlfer.errors import DataError, MissingDataError, ProtocolError
from dlfer.evaluate.combine import combine_average, combine_vote, fit_combination, predict_out_of_fold
from dlfer.evaluate.predictions import Predictions, read_predictions
from dlfer.evaluate.scores import compute_scores
from dlfer.evaluate.several import compare_several
from dlfer.extras import predict_split_views
from dlfer.fit_network import Fitted
from dlfer.milestones import FOLDER as MILESTONES_FOLDER
from dlfer.milestones import Judged
from dlfer.model.artifact import load_artifact
from dlfer.model.classifier import Classifier, hash_file
from dlfer.model.ensemble import EnsembleClassifier, match_labels
from dlfer.runs import RUN_FILE, Run
from dlfer.session import Session
from dlfer.train.device import Device

MEMBERS_FILE = "members.json"
COMBINATIONS = ("average", "vote", "trained")
TOLERANCE = 1e-3
"""How far a member's answers now may be from those in its files: it is then not the model that gave them."""

TrainMember = Callable[[ExperimentConfig, Session, Path | None, Callable[[Path], None]], None]
"""(config, session, the run that was begun or None, who is told a new run's folder): trains until it is finished."""


@dataclass
class Member:
    """A member of an ensemble, as members.json has it.

    Attributes:
        name: as in the experiment.
        path: of its run, or of its artifact where it has no run; "" before it has begun.
        status: "pending", "running" or "finished"; "given" for one that was trained before.
        digest: sha256 of its artifact.json.
        note: what is to be known about its training data.
        classifier: once it is loaded.
    """

    name: str
    path: str = ""
    status: str = "pending"
    digest: str = ""
    note: str = ""
    classifier: Classifier | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Of its artifact."""
        path = Path(self.path)
        return path / "model" if (path / RUN_FILE).exists() else path

    def find_run(self) -> Run | None:
        """Return its run; None for an artifact alone."""
        return Run(Path(self.path)) if (Path(self.path) / RUN_FILE).exists() else None


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

    def get(self, part: str, view: str) -> np.ndarray:
        """Return float32 [M, N, C] in the order of the split and of the bundle's labels."""
        return np.stack([self._get_one(member, part, view) for member in self.members])

    def read_milestone(self, epoch: int, part: str) -> np.ndarray:
        """Return likewise what the members answered at the end of an epoch, by the headline's view."""
        found = [self._read(member, MILESTONES_FOLDER / str(epoch) / f"{part}.npz", part) for member in self.members]
        missing = [member.name for member, answers in zip(self.members, found, strict=True) if answers is None]
        if missing:
            raise DataError(
                f"milestones: {', '.join(missing)} has no predictions of {part} after {epoch} epochs on the images "
                "of this experiment; expected all members to be judged on the same ones."
            )
        return np.stack(found)

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
        """Return what a member's run kept of these images; None where it has no such file or not all of them."""
        path, split = Path(member.path) / file, getattr(self.bundle, part)
        if member.find_run() is None or not path.exists():
            return None
        kept = read_predictions(path)
        if not np.isin(split.ids, kept.ids).all():
            return None
        order = np.argsort(kept.ids)
        rows = order[np.searchsorted(kept.ids, split.ids, sorter=order)]
        columns = match_labels(kept.labels, self.bundle.labels, member.name)
        if not np.array_equal(np.asarray(columns)[split.targets], kept.targets[rows]):
            return None
        return kept.probabilities[rows][:, columns]

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


def fit_ensemble(
    run: Run,
    config: ExperimentConfig,
    session: Session,
    device: Device,
    bundle: DataBundle,
    *,
    train: TrainMember,
) -> Fitted:
    """Train the members that are not trained yet, and fit what combines them on validation.

    A member that is finished is not trained again; one that was stopped goes on where it stands.

    Raises:
        ProtocolError: a member was trained on images of this test part; or the data is streamed.
        ModelError: a member has other labels.
    """
    if not isinstance(bundle.validation, Split):
        raise ProtocolError("ensemble: the data is streamed; expected images in memory to combine members on.")
    members = _obtain_members(run, config, session, train)
    for member in members:
        member.classifier = load_artifact(member.folder)
        match_labels(member.classifier.labels, bundle.labels, member.name)
        member.note = _check_training(member, session, bundle)
        member.digest = hash_file(member.folder / "artifact.json")
        if member.note:
            session.listener.say(f"{member.name}: {member.note}")
    _write_members(run, members)
    answers = Answers(members, bundle, batch_size=config.evaluate.batch_size)
    views = ("single", *config.evaluate.views)
    trained = {
        view: fit_combination(answers.get("validation", view), bundle.validation.targets)
        for view in (views if config.ensemble.combine == "trained" else ())
    }
    classifier = EnsembleClassifier(
        {member.name: member.classifier for member in members},
        bundle.labels,
        config=config.model,
        combine=config.ensemble.combine,
        trained=trained,
    )
    for member in members:
        classifier.keep_folder(member.name, member.folder)

    def know(part: str, view: str) -> Predictions | None:
        return answers.make(part, combine(answers, part, view, config.ensemble.combine))

    def compute_figures() -> dict[str, Any]:
        return compare_members(config, answers, _list_milestones(config, members))

    return Fitted(classifier, _sum_costs(members), _make_milestones(config, answers), know, compute_figures)


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
    used, bootstrap = config.ensemble.combine, config.evaluate.bootstrap

    def judge(epoch: int | None) -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {"members": [], "combinations": []}
        for number, member in enumerate(answers.members):
            row = {"name": member.name, "path": member.path, "status": member.status, "note": member.note, "test": None}
            for part in parts:
                several = answers.get(part, view) if epoch is None else answers.read_milestone(epoch, part)
                row[part] = _score(answers.make(part, several[number]), bootstrap)
            rows["members"].append(row)
        for how in COMBINATIONS:
            row = {"name": how, "is_used": how == used, "test": None}
            for part in parts:
                row[part] = _score(answers.make(part, combine(answers, part, view, how, epoch=epoch)), bootstrap)
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


def explain_ensemble(
    config: ExperimentConfig, session: Session, *, explain: Callable[[ExperimentConfig, Session], None]
) -> None:
    """Say what a run would do with each member; train nothing."""
    for member in config.ensemble.members:
        if member.set is None:
            session.listener.say(f"member {member.name}: trained already, {find_model(member.model)}")
            continue
        session.listener.say(f"member {member.name}: a run of its own")
        explain(make_member_config(config, member), session)
    session.listener.say(f"the members are combined by: {config.ensemble.combine}")


def make_member_config(config: ExperimentConfig, member: MemberConfig) -> ExperimentConfig:
    """Return the experiment that a member with keys of its own is: this one without the ensemble, and with its keys.

    Raises:
        ConfigError: a key is unknown or does not fit.
    """
    name = f"{config.experiment.name}-{member.name}"
    own = {"model.family": "transfer", "ensemble": None, "experiment.name": name}
    return with_overrides(config, {**own, **member.set})


def _obtain_members(run: Run, config: ExperimentConfig, session: Session, train: TrainMember) -> list[Member]:
    """Return the members, all trained; members.json always says how far they are."""
    members = _read_members(run, config)
    planned = {member.name: member for member in config.ensemble.members}
    configs = {name: make_member_config(config, one) for name, one in planned.items() if one.set is not None}
    hint = session.resume_hint
    # A member that is stopped goes on with the ensemble, not by itself.
    session.resume_hint = hint or f"dlfer run --resume {run.path}"
    try:
        for number, member in enumerate(members, 1):
            if member.name not in configs:
                member.path, member.status = str(_find_given(planned[member.name].model)), "given"
                continue
            if member.status != "finished":
                session.listener.say(f"[{number}/{len(members)}] member {member.name}")
                _train_one(run, members, member, train=partial(train, configs[member.name], session))
    finally:
        session.resume_hint = hint
    return members


def _train_one(run: Run, members: list[Member], member: Member, *, train: Callable[..., None]) -> None:
    def note(path: Path) -> None:
        member.path = str(path.resolve())
        _write_members(run, members)

    member.status = "running"
    train(Path(member.path) if member.path else None, note)
    member.status = "finished"
    _write_members(run, members)


def _find_given(name: str) -> Path:
    folder = find_model(name).resolve()
    return folder.parent if folder.name == "model" and (folder.parent / RUN_FILE).exists() else folder


def _read_members(run: Run, config: ExperimentConfig) -> list[Member]:
    """Return the planned members with what members.json says; one whose run is gone is begun anew."""
    path = run.path / MEMBERS_FILE
    known = {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    members = []
    for planned in config.ensemble.members:
        row = known.get(planned.name, {})
        place = next(
            (
                str(folder)
                for folder in (Path(row.get("path", "")), _find_beside(run, row.get("path", "")))
                if row.get("path") and (folder / RUN_FILE).exists()
            ),
            "",
        )
        status = "finished" if place and Run(Path(place)).status == "finished" else "pending"
        members.append(Member(planned.name, place, status))
    return members


def _find_beside(run: Run, path: str) -> Path:
    """Return where the run of a member stands if the folder of runs was moved as a whole."""
    return run.path.parent.parent.joinpath(*Path(path).parts[-2:])


def _write_members(run: Run, members: list[Member]) -> None:
    keys = ("name", "path", "digest", "status", "note")
    run.write_json(MEMBERS_FILE, [{key: getattr(member, key) for key in keys} for member in members])


def _check_training(member: Member, session: Session, bundle: DataBundle) -> str:
    """Return what is to be known about a member's training data; refuse a member that was trained on the test part.

    Copies of test images that the ensemble's own data has in training anyway are not the member's fault.
    """
    run, found = member.find_run(), None
    if run is not None:
        try:
            found = session.load_bundle(run.config().finetune)
        except MissingDataError:
            found = None
    if found is None or not isinstance(found.train, Split):
        return "what it was trained on is not known here, so that the test images may be among it"
    seen = hash_images(found.train.images)
    if bundle.test is not None and isinstance(bundle.train, Split):
        leaked = np.isin(hash_images(bundle.test.images), seen)
        leaked &= ~np.isin(hash_images(bundle.test.images), hash_images(bundle.train.images))
        if leaked.any():
            raise ProtocolError(
                f"ensemble: the member {member.name} was trained on {int(leaked.sum()):,} of the {len(bundle.test):,} "
                "images of this test part, so that no figure on it would hold. Leave the member out, or take one "
                "that was trained on this experiment's own training part."
            )
    own = hash_images(bundle.validation.images)
    shared = np.isin(own, seen) & ~np.isin(own, hash_images(bundle.train.images))
    if shared.any():
        return (
            f"it was trained on {int(shared.sum()):,} of the {len(own):,} validation images, so that its figure there "
            "is too high, and a trained combination trusts it too much"
        )
    return ""


def _list_milestones(config: ExperimentConfig, members: list[Member]) -> list[int]:
    """Return the epochs after which every member was judged."""
    return [
        epoch
        for epoch in config.finetune.milestones
        if all((Path(member.path) / MILESTONES_FOLDER / str(epoch) / "validation.npz").exists() for member in members)
    ]


def _make_milestones(config: ExperimentConfig, answers: Answers) -> Mapping[int, Judged]:
    """Return epoch -> what combines the members as they were then."""
    how, view = config.ensemble.combine, config.evaluate.headline

    def judge_at(epoch: int) -> Judged:
        return lambda part, split: answers.make(part, combine(answers, part, view, how, epoch=epoch))

    return {epoch: judge_at(epoch) for epoch in _list_milestones(config, answers.members)}


def _sum_costs(members: list[Member]) -> dict[str, Any]:
    """Return what the members cost together, as far as their runs tell it."""
    costs = [run.read_json(RUN_FILE).get("cost") or {} for run in (member.find_run() for member in members) if run]
    if not costs:
        return {}
    keys = ("finetune_seconds", "finetune_images")
    return {key: sum(cost.get(key) or 0 for cost in costs) for key in keys} | {
        "finetune_image_size": costs[0].get("finetune_image_size"),
        "pretrain_seconds": None,
        "pretrain_images": None,
    }


def _score(predictions: Predictions, bootstrap: int) -> dict[str, Any]:
    scores = compute_scores(predictions, bootstrap=bootstrap)
    return {key: scores[key] for key in ("n", "accuracy", "macro_f1")}
