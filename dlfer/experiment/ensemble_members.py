"""The members of an ensemble: runs of their own, trained once and resumed, or classifiers that are trained already."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import MemberConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import hash_images
from dlfer.errors import MissingDataError, ProtocolError
from dlfer.experiment.session import Session
from dlfer.model.classifier import Classifier, read_artifact_record
from dlfer.model.ensemble import match_aspects
from dlfer.runs.find import find_model
from dlfer.runs.run import RUN_FILE, Run

MEMBERS_FILE = "members.json"

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


def obtain_members(run: Run, config: ExperimentConfig, session: Session, train: TrainMember) -> list[Member]:
    """Return the members, all trained; members.json always says how far they are.

    Raises:
        ModelError: a member that was trained before is not there, or they do not make squares of images alike.
    """
    members = _read_members(run, config)
    planned = {member.name: member for member in config.ensemble.members}
    configs = {name: make_member_config(config, one) for name, one in planned.items() if one.set is not None}
    # Before hours of training, not after them.
    match_aspects({name: _find_aspect(one, configs.get(name)) for name, one in planned.items()})
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


def make_member_config(config: ExperimentConfig, member: MemberConfig) -> ExperimentConfig:
    """Return the experiment that a member with keys of its own is: this one without the ensemble, and with its keys.

    Raises:
        ConfigError: a key is unknown or does not fit.
    """
    name = f"{config.experiment.name}-{member.name}"
    own = {"model.family": "transfer", "ensemble": None, "experiment.name": name}
    return with_overrides(config, {**own, **member.set})


def _find_aspect(member: MemberConfig, config: ExperimentConfig | None) -> str:
    """Return how a member makes squares of images; `config` is None where it was trained before."""
    if config is not None:
        return config.finetune.data.aspect
    return read_artifact_record(find_model(member.model)).input.aspect


def _train_one(run: Run, members: list[Member], member: Member, *, train: Callable[..., None]) -> None:
    def note(path: Path) -> None:
        member.path = str(path.resolve())
        write_members(run, members)

    member.status = "running"
    train(Path(member.path) if member.path else None, note)
    member.status = "finished"
    write_members(run, members)


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


def write_members(run: Run, members: list[Member]) -> None:
    keys = ("name", "path", "digest", "status", "note")
    run.write_json(MEMBERS_FILE, [{key: getattr(member, key) for key in keys} for member in members])


def check_training(member: Member, session: Session, bundle: DataBundle) -> str:
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
