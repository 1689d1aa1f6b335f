"""Training of ensembles: members are trained as separate runs or loaded, and their predictions are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.load import with_overrides
from dlfer.config.names import PUBLISHED_WEIGHTS
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import MemberConfig
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint
from dlfer.errors import DataError, ProtocolError
from dlfer.experiment.extras import MILESTONES_FOLDER, predict_split_views
from dlfer.experiment.fit_network import Fitted
from dlfer.experiment.lineage import (
    PRETRAINED,
    TAUGHT,
    TRAINED,
    Found,
    History,
    LoadStage,
    have_same_source,
    trace_experiment,
    trace_model,
)
from dlfer.experiment.session import RunMembers, Session, create_member_run
from dlfer.metrics.predictions import (
    Predictions,
    combine_average,
    combine_vote,
    fit_combination,
    predict_out_of_fold,
    read_predictions,
)
from dlfer.metrics.scores import compute_scores
from dlfer.metrics.several import compare_several
from dlfer.model.classifier import Classifier
from dlfer.model.families import EnsembleClassifier, load_artifact, match_aspects, match_labels
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.files import hash_file
from dlfer.runs.find import ARTIFACT_FILE, find_model
from dlfer.runs.member_rows import MemberRow, is_run, read_member_rows, write_member_rows
from dlfer.runs.metrics_record import (
    CombinationMetrics,
    EnsembleGrowth,
    EnsembleMetrics,
    EnsembleMilestone,
    FinalLabel,
    FinalLabels,
    MemberMetrics,
    SplitSummary,
)
from dlfer.runs.records import Cost, DataRecord
from dlfer.runs.run import RUN_FILE, Run
from dlfer.train.cluster import Device

_LEARNERS = {TRAINED: "it", PRETRAINED: "its EF-FER1", TAUGHT: "its teacher"}


@dataclass
class Member:
    """A member of an ensemble, with the fields of members.csv and more.

    Attributes:
        name: as in the experiment.
        path: of its run, or of its artifact if it has no run; "" before the run is created.
        status: of its run; "given" for an already trained model, "pending" before the run is created.
        digest: sha256 of its artifact.json.
        note: remarks on its training data.
        leak: a sentence on the ensemble's test images that trained or selected it or its teachers, or "". Images that
            its EF-FER1 learned from are counted as duplicates of the ensemble instead.
        settings: the keys that it sets.
        classifier: the loaded model; None until it is loaded.
    """

    name: str
    path: str = ""
    status: str = "pending"
    digest: str = ""
    note: str = ""
    leak: str = ""
    settings: dict = field(default_factory=dict)
    classifier: Classifier | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """The folder of its artifact."""
        path = Path(self.path)
        return path / "model" if is_run(path) else path

    def find_run(self) -> Run | None:
        """Return its run, or None if it has only an artifact."""
        return Run(Path(self.path)) if self.path and is_run(Path(self.path)) else None


def obtain_members(
    run: Run, config: ExperimentConfig, session: Session, bundle: DataBundle, run_members: RunMembers
) -> list[Member]:
    """Train the members that are not trained yet and return all members; members.csv has their current status.

    Raises, before any member is trained:
        ModelError: a given member is missing or has other labels, or members turn images into squares differently.
        ProtocolError: a member was or would be trained on images of the test split.
    """
    members = _read_members(run, config)
    planned = {member.name: member for member in config.ensemble.members}
    configs = {name: make_member_config(config, one) for name, one in planned.items() if one.set is not None}
    # Checked here, to find errors before hours of training.
    match_aspects({name: _find_aspect(one, configs.get(name)) for name, one in planned.items()})
    for member in members:
        own = configs.get(member.name)
        if own is None:
            member.path, member.status = str(_find_given(planned[member.name].model)), "given"
            labels = tuple(read_artifact_record(member.folder).labels)
            match_labels(labels, bundle.labels, member.name)
        if member.status in ("given", "finished"):
            history = trace_model(member.folder, session.load_bundle)
        else:
            history = trace_experiment(own, session.load_bundle)
        check_training(member, history, config, bundle, smoke=run.is_smoke)
    record = run.record
    options = replace(session.options, smoke=run.is_smoke, use_cache=record.use_cache, judge_test=record.judge_test)
    for member in members:
        if not member.path:
            made = create_member_run(
                configs[member.name], options, session.runs_folder, siblings=[run.path], study=run.path
            )
            # A run is created as running; this one is not being executed yet.
            made.stop("not begun")
            member.path = str(made.path.resolve())

    def note() -> None:
        for member in members:
            found = member.find_run() if member.status != "given" else None
            member.status = found.status if found is not None else member.status
        write_members(run, members)

    note()
    hint = session.resume_hint
    # A stopped member is resumed by resuming the ensemble.
    session.resume_hint = session.describe_resume(run.path)
    try:
        unfinished = {m.name: Run(Path(m.path)) for m in members if m.status not in ("given", "finished")}
        run_members(unfinished, session, note)
    finally:
        session.resume_hint = hint
        note()
    return members


def make_member_config(config: ExperimentConfig, member: MemberConfig) -> ExperimentConfig:
    """Return the experiment of a member that is to be trained: the ensemble's own, with the keys that the member sets.

    Raises:
        ConfigError: a key is unknown or its value is invalid.
    """
    name = f"{config.experiment.name}-{member.name}"
    own = {"model.family": "transfer", "ensemble": None, "experiment.name": name}
    return with_overrides(config, {**own, **member.set})


def is_selected(config: ExperimentConfig) -> bool:
    """Return whether a validation metric selects a model's weights, or may have selected those that it starts from."""
    if config.model.family != "ensemble":
        return _decides(config) or _starts_selected(config)
    return config.ensemble.combine == "trained" or any(
        member.set is None or is_selected(make_member_config(config, member)) for member in config.ensemble.members
    )


def _decides(config: ExperimentConfig) -> bool:
    """Return whether a validation metric selects in fine-tuning itself; for trees the schedule does not apply."""
    stage = config.finetune
    is_tree = config.model.family == "boosted"
    return stage.keep == "best" or stage.early_stopping is not None if is_tree else stage.is_selected


def _starts_selected(config: ExperimentConfig) -> bool:
    """Return whether validation may have selected the earlier models, teachers or EF-FER1 that a model starts from."""
    pretrain, stage = config.pretrain, config.finetune
    if stage.distill is not None:
        return True
    if pretrain is None:
        return False
    if pretrain.data is not None and pretrain.weights is None:
        return pretrain.is_selected and have_same_source(pretrain.data, stage.data)
    return any(name not in PUBLISHED_WEIGHTS for name in pretrain.list_of_weights)


def trace_members(config: ExperimentConfig, load: LoadStage) -> History:
    """Return the history of an ensemble's members: the images that they learned from, or will once they are trained.

    Args:
        config: of the ensemble.
        load: as for `trace_model`.

    Raises:
        ModelError: a given member is missing.
    """
    histories = [
        trace_model(find_model(member.model), load)
        if member.set is None
        else trace_experiment(make_member_config(config, member), load)
        for member in config.ensemble.members
    ]
    return reduce(or_, histories)


def _find_aspect(member: MemberConfig, config: ExperimentConfig | None) -> str:
    """Return how a member turns images into squares, "crop" or "pad"; `config` is None for a given member."""
    if config is not None:
        return config.finetune.data.aspect
    return read_artifact_record(find_model(member.model)).input.aspect


def _find_given(name: str) -> Path:
    folder = find_model(name).resolve()
    return folder.parent if folder.name == "model" and (folder.parent / RUN_FILE).exists() else folder


def _read_members(run: Run, config: ExperimentConfig) -> list[Member]:
    """Return the planned members with their state from members.csv; one whose run was deleted is pending again."""
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


def check_training(
    member: Member, history: History, config: ExperimentConfig, bundle: DataBundle, *, smoke: bool = False
) -> None:
    """Set the note and leak of a member according to its training data; reject it if it was trained on the test split.

    Copies of test images that are also in the ensemble's own training split are not counted.

    Args:
        member: its note and leak are set.
        history: the images that it learned from.
        config: of the ensemble.
        bundle: the data of the ensemble.
        smoke: whether it is a smoke run, whose values are meaningless, so that no member is rejected.

    Raises:
        ProtocolError: the member, or a member of it, was trained on images of the test split or exact copies of them.
    """
    splits = {name: getattr(bundle, name) for name in ("test", "validation")}
    splits = {name: split for name, split in splits.items() if isinstance(split, Split)}
    data, notes, leaks = config.finetune.data, [], []
    for role, who in _LEARNERS.items():
        part = history.select(role)
        for name, split in splits.items():
            found = part.count(split, bundle.train, data)
            if (role, name) == (TRAINED, "test") and not smoke:
                _refuse_trained(member, found, len(split))
            said = _describe_seen(who, found, name, len(split))
            ending = ", and a trained combination trusts it too much" * ((role, name) == (TRAINED, "validation"))
            notes += [f"{text}, so that its figure there is too high{ending}" for text in said]
            # Images in the data of EF-FER1 are counted as duplicates of the ensemble.
            leaks += said if name == "test" and role != PRETRAINED and not smoke else []
        is_known = part.is_counted if role == PRETRAINED else part.is_known
        if not all(is_known(split, data) for split in splits.values()):
            notes.append(f"what {who} was trained on is not known here, so that the test images may be among it")
    member.note = "; ".join(notes)
    member.leak = f"Leak: the member {member.name}: {'; '.join(leaks)}. The accuracy may be too high." if leaks else ""


def _refuse_trained(member: Member, found: Found, num_test: int) -> None:
    num_trained = found.trained + found.copied
    if num_trained:
        raise ProtocolError(
            f"ensemble: the member {member.name} was trained on {num_trained:,} of the {num_test:,} "
            "images of this test split, so that no figure on it would hold. Leave the member out, or take one "
            "that was trained on this experiment's own training split."
        )


def _describe_seen(who: str, found: Found, name: str, number: int) -> list[str]:
    """Return clauses on how many images trained or, of test, selected a member, its EF-FER1 or its teacher."""
    counts = {"trained": found.trained + found.copied, "selected": found.selected if name == "test" else 0}
    return [f"{who} was {how} on {count:,} of the {number:,} {name} images" for how, count in counts.items() if count]


COMBINATIONS = ("average", "vote", "trained")
TOLERANCE = 1e-3
"""The largest allowed difference of a member's current and stored predictions; a larger one means another model."""


class Answers:
    """The members' predictions on each split and view, read from their files, or else computed once."""

    def __init__(self, members: list[Member], bundle: DataBundle, *, batch_size: int) -> None:
        self.members, self.bundle, self.batch_size = members, bundle, batch_size
        self._kept: dict[tuple[str, str, str], np.ndarray] = {}
        splits = {key: getattr(bundle, key) for key in ("validation", "test")}
        self._fingerprints = {key: compute_fingerprint(split) for key, split in splits.items() if split is not None}

    def get(self, split: str, view: str, *, epoch: int | None = None) -> np.ndarray:
        """Return the members' final probabilities, or those after an epoch (float32 [M, N, C], in split order)."""
        if epoch is not None:
            return self.read_milestone(epoch, split)
        return np.stack([self._get_one(member, split, view) for member in self.members])

    def combine(self, split: str, view: str, how: str, *, epoch: int | None = None) -> Predictions:
        """Return the combined predictions of the members, of the final weights or after an epoch.

        The trained combination is fitted on validation; its predictions there are out-of-fold.
        """
        of_members, targets = self.get(split, view, epoch=epoch), self.bundle.validation.targets
        if how == "trained" and split == "validation":
            combined = predict_out_of_fold(of_members, targets)
        elif how == "trained":
            combined = fit_combination(self.get("validation", view, epoch=epoch), targets).predict(of_members)
        else:
            combined = (combine_vote if how == "vote" else combine_average)(of_members)
        return self.make(split, combined)

    def list_milestones(self, epochs: Sequence[int], view: str) -> list[int]:
        """Return those of `epochs` after which every member was evaluated on the same images with this view."""
        splits = [split for split in ("validation", "test") if getattr(self.bundle, split) is not None]
        runs = [member.find_run() for member in self.members]
        if any(run is None or run.config().evaluate.headline != view for run in runs):
            return []
        return [epoch for epoch in epochs if all(self.read_milestone(epoch, split) is not None for split in splits)]

    def read_milestone(self, epoch: int, split: str) -> np.ndarray | None:
        """Return the members' probabilities after an epoch (float32 [M, N, C]); None if one was not evaluated then."""
        found = [self._read(member, MILESTONES_FOLDER / str(epoch) / f"{split}.npz", split) for member in self.members]
        return None if any(answers is None for answers in found) else np.stack(found)

    def make(self, key: str, answers: np.ndarray) -> Predictions:
        """Return the probabilities `answers` (float [N, C]) as `Predictions` of a split."""
        split = getattr(self.bundle, key)
        return Predictions(split.ids, self.bundle.labels, split.targets, answers)

    def _get_one(self, member: Member, split: str, view: str) -> np.ndarray:
        key = (member.name, split, view)
        if key not in self._kept:
            folder = Path("predictions") if view == "single" else Path("predictions") / "views" / view
            found = self._read(member, folder / f"{split}.npz", split)
            if found is not None and split == "validation" and view == "single":
                self._check(member, found)
            self._kept[key] = self._predict(member, split, view) if found is None else found
        return self._kept[key]

    def _predict(self, member: Member, key: str, view: str) -> np.ndarray:
        split = getattr(self.bundle, key)
        columns = match_labels(member.classifier.labels, self.bundle.labels, member.name)
        return predict_split_views(member.classifier, split, view, batch_size=self.batch_size)[:, columns]

    def _read(self, member: Member, file: Path, key: str) -> np.ndarray | None:
        """Return a member's stored predictions (float32 [N, C]); None if there are none or they are of other images."""
        run, path, split = member.find_run(), Path(member.path) / file, getattr(self.bundle, key)
        if run is None or not path.exists():
            return None
        judged = DataRecord.require(run.path).splits.get(key)
        if judged is None or judged.fingerprint != self._fingerprints[key]:
            return None
        kept = read_predictions(path)
        order = np.argsort(kept.ids)
        rows = order[np.searchsorted(kept.ids, split.ids, sorter=order)]
        columns = match_labels(kept.labels, self.bundle.labels, member.name)
        return kept.probabilities[rows][:, columns]

    def _check(self, member: Member, found: np.ndarray) -> None:
        """Raise DataError if the member's current predictions on a few images differ from the stored ones."""
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
    """Return the metrics specific to an ensemble: of each member, of each combination, and of ensemble against member.

    Returns:
        Fields of `Metrics`: members, combinations, and ensemble. Its `paired` compares the combination in use with the
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
        growth=_compute_growth(answers, members, names, view=view),
        final_labels=[
            *(
                find_final_labels(member.name, answers.make(names[-1], values))
                for member, values in zip(answers.members, answers.get(names[-1], view), strict=True)
            ),
            find_final_labels("ensemble", pair[0]),
        ],
    )
    return {"members": members, "combinations": combinations, "ensemble": ensemble}


def _compute_growth(
    answers: Answers, members: Sequence[MemberMetrics], names: Sequence[str], *, view: str
) -> list[EnsembleGrowth]:
    """Return metrics of the average of the best k members on validation, for k from 1 to all."""
    order = sorted(range(len(members)), key=lambda number: -members[number].validation.accuracy.value)
    several = {name: answers.get(name, view) for name in names}
    growth = []
    for count in range(1, len(order) + 1):
        found = {
            name: _summarise(answers.make(name, combine_average(values[order[:count]])))
            for name, values in several.items()
        }
        growth.append(EnsembleGrowth(**{"added": members[order[count - 1]].name, "test": None, **found}))
    return growth


def find_final_labels(name: str, predictions: Predictions) -> FinalLabels:
    """Return the most frequent prediction for each label's images; in a tie it is another label than their own."""
    labels, found = predictions.labels, {}
    for target, label in enumerate(labels):
        answered = predictions.predicted[predictions.targets == target]
        if not len(answered):
            continue
        counts = np.bincount(answered, minlength=len(labels)).astype(float)
        # As in the emotion detection rate, the label itself must be more frequent than any other.
        counts[target] -= 0.5
        final = int(counts.argmax())
        found[label] = FinalLabel(label=labels[final], share=float(np.mean(answered == final)), n=len(answered))
    return FinalLabels(name=name, labels=found)


def _summarise(predictions: Predictions) -> SplitSummary:
    scores = compute_scores(predictions)
    return SplitSummary(n=scores.n, accuracy=scores.accuracy, macro_f1=scores.macro_f1)


@dataclass(frozen=True)
class FittedEnsemble(Fitted):
    """A fitted ensemble with the predictions of its members."""

    answers: Answers = field(kw_only=True)


def fit_ensemble(
    run: Run,
    config: ExperimentConfig,
    session: Session,
    device: Device,
    bundle: DataBundle,
    *,
    run_members: RunMembers,
) -> FittedEnsemble:
    """Train the members that are not trained yet, and fit their combination on validation if it is a trained one.

    `run_members` executes the members' runs unless the session has a function for this. Finished members are not
    trained again; stopped ones continue from their checkpoints.

    Raises:
        ProtocolError: a member was trained on images of this test split, or the data is streamed.
        ModelError: a member is missing or has other labels.
    """
    if not isinstance(bundle.validation, Split):
        raise ProtocolError("ensemble: the data is streamed; expected images in memory to combine members on.")
    members = obtain_members(run, config, session, bundle, session.run_members or run_members)
    for member in members:
        member.classifier = load_artifact(member.folder)
        match_labels(member.classifier.labels, bundle.labels, member.name)
        check_training(member, trace_model(member.folder, session.load_bundle), config, bundle, smoke=run.is_smoke)
        member.digest = hash_file(member.folder / ARTIFACT_FILE)
        if member.note:
            session.listener.say(f"{member.name}: {member.note}")
        if member.leak:
            run.warn(member.leak)
            session.listener.warn(member.leak)
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
        classifier.set_member_folder(member.name, member.folder)

    return FittedEnsemble(classifier, _sum_costs(members), answers=answers)


def explain_ensemble(
    config: ExperimentConfig, session: Session, *, explain: Callable[[ExperimentConfig, Session], None]
) -> None:
    """Report what a run would do with each member, without training."""
    for member in config.ensemble.members:
        if member.set is None:
            session.listener.say(f"member {member.name}: trained already, {find_model(member.model)}")
            continue
        session.listener.say(f"member {member.name}: a run of its own")
        explain(make_member_config(config, member), session)
    session.listener.say(f"the members are combined by: {config.ensemble.combine}")


def _sum_costs(members: list[Member]) -> Cost:
    """Return the total cost of the members, as far as their runs recorded it."""
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
