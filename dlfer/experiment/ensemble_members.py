"""The members of an ensemble: runs of their own, trained once and resumed, or classifiers that are trained already."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import MemberConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import hash_images
from dlfer.errors import MissingDataError, ProtocolError
from dlfer.experiment.session import RunMembers, Session
from dlfer.experiment.smoke import make_smoke_config
from dlfer.model.classifier import Classifier, read_artifact_record
from dlfer.model.ensemble import match_aspects
from dlfer.runs.find import find_model
from dlfer.runs.member_rows import MemberRow, is_run, read_member_rows, write_member_rows
from dlfer.runs.run import RUN_FILE, Run, create_run


@dataclass
class Member:
    """A member of an ensemble, as members.csv has it.

    Attributes:
        name: as in the experiment.
        path: of its run, or of its artifact where it has no run; "" before it has begun.
        status: of its run; "given" for one that was trained before, "pending" before it has begun.
        digest: sha256 of its artifact.json.
        note: what is to be known about its training data.
        settings: the keys that it sets.
        classifier: once it is loaded.
    """

    name: str
    path: str = ""
    status: str = "pending"
    digest: str = ""
    note: str = ""
    settings: dict = field(default_factory=dict)
    classifier: Classifier | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Of its artifact."""
        path = Path(self.path)
        return path / "model" if is_run(path) else path

    def find_run(self) -> Run | None:
        """Return its run; None for an artifact alone."""
        return Run(Path(self.path)) if self.path and is_run(Path(self.path)) else None


def obtain_members(run: Run, config: ExperimentConfig, session: Session, run_members: RunMembers) -> list[Member]:
    """Return the members, all trained; members.csv always says how far they are.

    Raises:
        ModelError: a member that was trained before is not there, or they do not make squares of images alike.
    """
    members = _read_members(run, config)
    planned = {member.name: member for member in config.ensemble.members}
    configs = {name: make_member_config(config, one) for name, one in planned.items() if one.set is not None}
    # Before hours of training, not after them.
    match_aspects({name: _find_aspect(one, configs.get(name)) for name, one in planned.items()})
    for member in members:
        if member.name not in configs:
            member.path, member.status = str(_find_given(planned[member.name].model)), "given"
        elif not member.path:
            member.path = str(_create_member_run(configs[member.name], session).resolve())

    def note() -> None:
        for member in members:
            found = member.find_run() if member.status != "given" else None
            member.status = found.status if found is not None else member.status
        write_members(run, members)

    note()
    hint = session.resume_hint
    # A member that is stopped goes on with the ensemble, not by itself.
    session.resume_hint = hint or f"dlfer run --resume {run.path}"
    try:
        unfinished = {m.name: Run(Path(m.path)) for m in members if m.status not in ("given", "finished")}
        run_members(unfinished, session, note)
    finally:
        session.resume_hint = hint
        note()
    return members


def _create_member_run(config: ExperimentConfig, session: Session) -> Path:
    """Make the run directory of a member, which waits there until it is executed."""
    options, warnings = session.options, []
    if options.smoke:
        config, warnings = make_smoke_config(config)
    made = create_run(session.runs_folder, config, argv=list(options.argv))
    made.update(smoke=options.smoke, use_cache=options.use_cache, judge_test=options.judge_test, warnings=warnings)
    made.stop("not begun")
    return made.path


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


def _find_given(name: str) -> Path:
    folder = find_model(name).resolve()
    return folder.parent if folder.name == "model" and (folder.parent / RUN_FILE).exists() else folder


def _read_members(run: Run, config: ExperimentConfig) -> list[Member]:
    """Return the planned members with what members.csv says; one whose run is gone is begun anew."""
    known = {row.arm: row for row in read_member_rows(run.path)}
    members = []
    for planned in config.ensemble.members:
        row = known.get(planned.name)
        folder = row.find_folder(run.path) if row is not None else None
        path = str(folder) if is_run(folder) else ""
        status = Run(folder).status if path else "pending"
        members.append(Member(planned.name, path, status, settings=dict(planned.set or {})))
    return members


def write_members(run: Run, members: list[Member]) -> None:
    """Write members.csv of an ensemble."""
    keys = ("path", "status", "digest", "note", "settings")
    write_member_rows(run.path, [MemberRow(arm=m.name, **{key: getattr(m, key) for key in keys}) for m in members])


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
