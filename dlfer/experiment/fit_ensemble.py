"""Fitting an ensemble: members that are trained as runs of their own or are trained already, and their combination."""

from __future__ import annotations

from collections.abc import Callable

from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.errors import ProtocolError
from dlfer.experiment.ensemble_answers import Answers
from dlfer.experiment.ensemble_members import (
    Member,
    check_training,
    make_member_config,
    obtain_members,
    write_members,
)
from dlfer.experiment.fit_network import Fitted
from dlfer.experiment.session import RunMembers, Session
from dlfer.metrics.combine import fit_combination
from dlfer.model.artifact import load_artifact
from dlfer.model.ensemble import EnsembleClassifier, match_labels
from dlfer.runs.files import hash_file
from dlfer.runs.find import ARTIFACT_FILE, find_model
from dlfer.runs.records import Cost
from dlfer.runs.run import Run
from dlfer.train.cluster import Device


def fit_ensemble(
    run: Run,
    config: ExperimentConfig,
    session: Session,
    device: Device,
    bundle: DataBundle,
    *,
    run_members: RunMembers,
) -> Fitted:
    """Train the members that are not trained yet, and fit what combines them on validation.

    `run_members` executes the members' runs where the session names nobody else for it. A member that is finished is not trained again; one that was stopped goes on where it stands.

    Raises:
        ProtocolError: a member was trained on images of this test part; or the data is streamed.
        ModelError: a member has other labels.
    """
    if not isinstance(bundle.validation, Split):
        raise ProtocolError("ensemble: the data is streamed; expected images in memory to combine members on.")
    members = obtain_members(run, config, session, session.run_members or run_members)
    for member in members:
        member.classifier = load_artifact(member.folder)
        match_labels(member.classifier.labels, bundle.labels, member.name)
        member.note = check_training(member, session, bundle)
        member.digest = hash_file(member.folder / ARTIFACT_FILE)
        if member.note:
            session.listener.say(f"{member.name}: {member.note}")
    write_members(run, members)
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

    return Fitted(classifier, _sum_costs(members), answers=answers)


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


def _sum_costs(members: list[Member]) -> Cost:
    """Return what the members cost together, as far as their runs say."""
    runs = [run for run in (member.find_run() for member in members) if run is not None]
    costs = [run.record.cost or Cost() for run in runs]
    if not costs:
        return Cost()
    return Cost(
        finetune_seconds=sum(cost.finetune_seconds or 0 for cost in costs),
        finetune_images=sum(cost.finetune_images or 0 for cost in costs),
        finetune_image_size=costs[0].finetune_image_size,
        pretrain_seconds=None,
        pretrain_images=None,
    )
