"""Cross-validation: a recipe, or each cell of a sweep, is trained once per fold and evaluated on that fold.

Folds are stratified and keep duplicates and subjects together (`dlfer.data.split.assign_folds`). In each training, a
validation split of the other folds, which also keeps groups together, selects the epoch; the test fold is used once, at
the end, so every image is predicted once, by a model that did not see it. The pooled accuracy has two intervals, for
the trained models and for the recipe (`dlfer.metrics.several`). Each fold has its own seed, experiment.seed + fold, so
that the variance over folds includes that over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.variations import list_cells
from dlfer.errors import ConfigError, ModelError
from dlfer.metrics import classification as mt
from dlfer.metrics.intervals import compute_average_intervals
from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.metrics.several import compare_folds, compute_recipe_accuracy, compute_trained_accuracy
from dlfer.report.sweep import format_folds_tables
from dlfer.runs.changes import IMAGES_FILE
from dlfer.runs.comparison_record import (
    ArmPair,
    ArmRow,
    ComparisonRecord,
    CrossValidated,
    FoldResult,
    SeedEstimate,
)
from dlfer.runs.files import read_npz
from dlfer.runs.metrics_record import Estimate
from dlfer.study.ablation import list_arm_keys
from dlfer.study.compare import Finished, conclude_pair, correct_pairs, find_failures, list_unfinished
from dlfer.study.comparison import Comparison, Rules, show_verdicts
from dlfer.study.members import Member, Plan, average_seconds, group_finished
from dlfer.study.runner import StudyConsole

POOLED_FOLDER = "predictions"
SMOKE_FOLDS = 2
_SAME_IMAGES = ("select_on", "soft_targets", "soft_share", "votes")
"""Keys of finetune.data that a cell may set, because they change neither the images nor the folds."""
_SHOWN_PAIRS = 5
_SUBJECTS_REASON = "no interval of this metric is known to cover where subjects keep images together"


@dataclass(frozen=True)
class Pooled:
    """The predictions on several folds, pooled; all arrays have a row for each image.

    Attributes:
        predictions: predictions of the images, each by the model of its fold.
        folds: int [n], the fold of each image.
        groups: int [n], the group of each image: equal for images that are duplicates or show the same subject.
        members: fold -> the member that predicted it.
    """

    predictions: Predictions
    folds: np.ndarray
    groups: np.ndarray
    members: Mapping[int, Member]

    def take(self, folds: Sequence[int]) -> Pooled:
        """Return the images of the given folds, sorted by id."""
        rows = np.flatnonzero(np.isin(self.folds, folds))
        rows = rows[np.argsort(self.predictions.ids[rows], kind="stable")]
        old = self.predictions
        kept = Predictions(old.ids[rows], old.labels, old.targets[rows], old.probabilities[rows])
        return Pooled(kept, self.folds[rows], self.groups[rows], {fold: self.members[fold] for fold in folds})


def _plan(config: ExperimentConfig, file: object, smoke: bool) -> Plan:
    data = config.finetune.data
    if data.protocol != "cross_validation":
        raise ConfigError(
            f"{file}: finetune.data.protocol: found {data.protocol}, expected cross_validation. Give the number of folds by "
            "--folds 5, which sets both keys."
        )
    if data.fold is not None:
        raise ConfigError(
            f"{file}: finetune.data.fold: found {data.fold}; dlfer crossval trains a model for every fold. Set it to null, or train "
            "this one fold by dlfer run."
        )
    if config.sweep is not None and config.sweep.seeds is not None:
        raise ConfigError(
            f"{file}: sweep.seeds: found {list(config.sweep.seeds)}; a cross-validation trains each cell once for each fold, with "
            "the seed experiment.seed + fold. Leave it out."
        )
    unused = (
        {} if config.sweep is None else {"rank_by": config.sweep.rank_by != "accuracy", "best_of": config.sweep.best_of}
    )
    for key in [key for key, is_given in unused.items() if is_given]:
        raise ConfigError(
            f"{file}: sweep.{key}: found {getattr(config.sweep, key)}; a cross-validation ranks all cells by accuracy. Leave it out."
        )
    arms = {cell.name: cell.overrides for cell in list_cells(config)} or {config.experiment.name: {}}
    for arm, overrides in arms.items():
        cell = with_overrides(config, overrides).finetune.data
        wrong = next((key for key, value in data if getattr(cell, key) != value and key not in _SAME_IMAGES), None)
        if wrong is not None:
            raise ConfigError(
                f"{file}: sweep: the cell {arm!r} sets finetune.data.{wrong}; all cells of a cross-validation are judged on the "
                "same images in the same folds. Leave it out."
            )
    folds = range(SMOKE_FOLDS if smoke else data.folds)
    seeds = [config.experiment.seed + fold for fold in folds]
    return Plan("cross_validation", arms, seeds, None if config.sweep is None else config.sweep.reference, folds=folds)


def _conclude(comparison: Comparison) -> ComparisonRecord:
    """Return the arms ranked by validation accuracy, and write the pooled predictions of each."""
    members, finished = comparison.members, group_finished(comparison.members)
    unfinished = list_unfinished(members)
    if not finished:
        return ComparisonRecord(notes=["No member finished."], unfinished=unfinished)
    config = comparison.config
    pooled = {arm: pool_folds(several) for arm, several in finished.items()}
    rows = [_make_row(comparison, arm, one) for arm, one in pooled.items()]
    rows.sort(key=lambda row: -row.ranked_by)
    rows = [row.model_copy(update={"rank": number}) for number, row in enumerate(rows, start=1)]
    reference = comparison.plan.reference or rows[0].arm
    pairs = _compare_arms(reference, pooled, finished, num_folds=config.finetune.data.folds)
    order = [row.arm for row in rows]
    chosen = choose_by_fold(pooled)
    return ComparisonRecord(
        table=rows,
        paired=sorted(pairs, key=lambda pair: order.index(pair.b)),
        notes=_write_notes(comparison, rows, finished, pairs),
        judged_on="the fold that each model did not see",
        arm_keys=list_arm_keys({arm: finished[arm] for arm in order}) if len(rows) > 1 else [],
        rank_by="accuracy",
        reference=reference if pairs else None,
        unfinished=unfinished,
        chosen=None if chosen is None else describe_folds(config, chosen),
    )


def pool_folds(members: Sequence[Member]) -> Pooled:
    """Return the pooled predictions of the finished members of one arm on their folds, fold after fold.

    Raises:
        ModelError: a member lacks predictions or groups, an image is in two folds, or the folds have different labels.
    """
    several = {member.fold: member.read_split("test") for member in members}
    missing = next((member for member in members if several[member.fold] is None), None)
    if missing is not None:
        raise ModelError(
            f"{missing.path}: expected predictions of test (fold {missing.fold}), found none. Run it again."
        )
    first = next(iter(several.values()))
    if any(found.labels != first.labels for found in several.values()):
        raise ModelError(
            f"{members[0].path}: the folds have different labels; the data has changed. Start a new cross-validation."
        )
    ids = np.concatenate([found.ids for found in several.values()])
    if len(np.unique(ids)) < len(ids):
        names, counts = np.unique(ids, return_counts=True)
        raise ModelError(
            f"{members[0].path}: the image {str(names[counts > 1][0])!r} is in two folds; the data has changed. Start a new "
            "cross-validation."
        )
    targets = np.concatenate([found.targets for found in several.values()])
    probabilities = np.concatenate([found.probabilities for found in several.values()])
    folds = np.repeat(list(several), [len(found) for found in several.values()])
    groups = np.concatenate([_read_groups(member, several[member.fold].ids) for member in members])
    pooled = Predictions(ids, first.labels, targets, probabilities)
    return Pooled(pooled, folds, groups, {member.fold: member for member in members})


def choose_by_fold(pooled: Mapping[str, Pooled]) -> Pooled | None:
    """Return each fold's predictions by the arm that is best on its own validation split; None if there is no choice.

    This is nested selection: the choice is part of the evaluated recipe, and does not use the images that evaluate it.
    """
    common = sorted(set.intersection(*(set(one.members) for one in pooled.values())))
    if len(pooled) < 2 or not common or not _have_same_folds([one.take(common) for one in pooled.values()]):
        return None
    best = {
        fold: max(pooled, key=lambda arm, fold=fold: pooled[arm].members[fold].metrics.validation.accuracy.value)
        for fold in common
    }
    parts = [pooled[arm].take([fold]) for fold, arm in best.items()]
    probabilities = np.concatenate([part.predictions.probabilities for part in parts])
    ids, targets = (np.concatenate([getattr(part.predictions, name) for part in parts]) for name in ("ids", "targets"))
    folds, groups = (np.concatenate([getattr(part, name) for part in parts]) for name in ("folds", "groups"))
    members = {fold: pooled[arm].members[fold] for fold, arm in best.items()}
    return Pooled(Predictions(ids, parts[0].predictions.labels, targets, probabilities), folds, groups, members)


def _have_same_folds(several: Sequence[Pooled]) -> bool:
    """Return whether arms have the same images in the same folds; the rows must be sorted by id.

    They may differ: images of mixed sizes are downscaled for the network, which can change which are near duplicates.
    """
    first = several[0]
    return all(
        np.array_equal(one.predictions.ids, first.predictions.ids) and np.array_equal(one.folds, first.folds)
        for one in several[1:]
    )


def describe_folds(config: ExperimentConfig, pooled: Pooled, *, file: str | None = None) -> CrossValidated:
    """Return the pooled metrics with their intervals, and the accuracy of each fold."""
    correct, num_folds = pooled.predictions.correct, config.finetune.data.folds
    folds = []
    for fold, member in sorted(pooled.members.items()):
        rows = pooled.folds == fold
        accuracy = compute_trained_accuracy(correct[rows], pooled.groups[rows])
        validation = member.metrics.validation.accuracy.value
        folds.append(
            FoldResult(
                fold=fold, arm=member.arm, seed=member.seed, n=int(rows.sum()), accuracy=accuracy, validation=validation
            )
        )
    accuracies = [fold.accuracy.value for fold in folds]
    return CrossValidated(
        num_folds=num_folds,
        n=len(correct),
        num_groups=len(np.unique(pooled.groups)),
        folds=folds,
        trained=compute_trained_accuracy(correct, pooled.groups),
        recipe=compute_recipe_accuracy(correct, pooled.groups, pooled.folds, num_folds=num_folds),
        sd_over_folds=float(np.std(accuracies, ddof=1)) if len(folds) > 1 else None,
        predictions=file,
        **_compute_macros(pooled.predictions, has_subjects=config.finetune.data.subjects is not None),
    )


def _compute_macros(predictions: Predictions, *, has_subjects: bool) -> dict[str, Estimate]:
    confusion = mt.compute_confusion(predictions.targets, predictions.predicted, len(predictions.labels))
    values = {
        "macro_f1": mt.compute_macro_f1(confusion),
        "macro_precision": mt.compute_macro(mt.compute_precision(confusion), confusion),
        "macro_recall": mt.compute_macro(mt.compute_recall(confusion), confusion),
    }
    if has_subjects:
        return {name: Estimate(value=float(value), reason=_SUBJECTS_REASON) for name, value in values.items()}
    intervals = compute_average_intervals(confusion)
    return {
        name: Estimate(value=float(value), low=float(intervals[name][0]), high=float(intervals[name][1]))
        for name, value in values.items()
    }


def _read_groups(member: Member, ids: np.ndarray) -> np.ndarray:
    """Return int [n], the group of each image of a member's fold.

    Group numbers agree between members, because groups are formed over the whole data.

    Raises:
        ModelError: the run's list of images is absent, damaged, or does not match its predictions.
    """
    path = Path(member.path) / IMAGES_FILE
    try:
        found = read_npz(path, names=("test_ids", "test_groups"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: the groups of the fold's images cannot be read ({error}). Run the fold again."
        ) from None
    known = dict(zip(found["test_ids"].tolist(), found["test_groups"].tolist(), strict=False))
    if not set(ids.tolist()) <= known.keys():
        raise ModelError(f"{path}: lists other images than the predictions of the fold. Run the fold again.")
    return np.array([known[name] for name in ids.tolist()])


def _make_row(comparison: Comparison, arm: str, pooled: Pooled) -> ArmRow:
    name = f"{POOLED_FOLDER}/{list(comparison.plan.arms).index(arm)}.npz"
    path = comparison.run.path / name
    path.parent.mkdir(exist_ok=True)
    write_predictions(pooled.predictions, path)
    found = describe_folds(comparison.config, pooled, file=name)
    members = [pooled.members[fold.fold] for fold in found.folds]
    means = {
        split: float(np.mean([scores.accuracy.value for scores in several]))
        for split in ("train", "validation")
        if all(several := [member.metrics.get(split) for member in members])
    }
    recipe = found.recipe
    return ArmRow(
        arm=arm,
        seeds=[member.seed for member in members],
        test=SeedEstimate(value=recipe.value, low=recipe.low, high=recipe.high, reason=recipe.reason, n=found.n),
        **{
            split: SeedEstimate(value=value, reason="a mean over folds that share images")
            for split, value in means.items()
        },
        ranked_by=means["validation"],
        seconds=average_seconds(members),
        cross_validated=found,
    )


def _compare_arms(reference: str, pooled: Mapping[str, Pooled], finished: Finished, *, num_folds: int) -> list[ArmPair]:
    """Compare each other arm with the reference on their common folds, at least two, with Holm's correction."""
    pairs = []
    for arm, other in pooled.items() if reference in pooled else ():
        common = sorted(set(pooled[reference].members) & set(other.members))
        if arm == reference or len(common) < 2:
            continue
        a, b = pooled[reference].take(common), other.take(common)
        if not _have_same_folds([a, b]):
            continue
        correct = a.predictions.correct, b.predictions.correct
        test = compare_folds(correct, a.groups, a.folds, num_folds=num_folds, names=(reference, arm))
        pairs.append(ArmPair.of(test, part="test"))
    failures = {arm: find_failures(members) for arm, members in finished.items()}
    return [conclude_pair(pair, [*failures[pair.a], *failures[pair.b]]) for pair in correct_pairs(pairs)]


def _write_notes(
    comparison: Comparison, rows: Sequence[ArmRow], finished: Finished, pairs: Sequence[ArmPair]
) -> list[str]:
    """Return notes on who predicted which images, what each interval covers, the ranking, and what is missing."""
    config, found = comparison.config, rows[0].cross_validated
    metrics = [member.metrics for members in finished.values() for member in members]
    leaked = sum(one.duplicates.in_train.any for one in metrics if one.duplicates is not None)
    selected = " A validation split of the other folds selected each epoch." * any(one.is_selected for one in metrics)
    notes = [
        f"Each of {found.n:,} images was predicted once, by the model of its fold, which did not see it; {leaked:,} have a "
        f"duplicate in the training split of that model.{selected}",
        *describe_intervals(config),
    ]
    if len(rows) > 1:
        why = "named beforehand" if comparison.plan.reference else "the best on validation"
        against = f" The others are compared with {pairs[0].a!r} ({why})" if pairs else ""
        holm = f", and Holm's correction holds over all {len(pairs)} pairs" if len(pairs) > 1 else ""
        notes.append(
            f"Ranked by accuracy on validation, the mean over folds; the test folds are not used for "
            f"ranking.{against}{holm}{'.' if against else ''}"
        )
        notes.append(
            "The validation images that selected the first row are test images of other folds, so its value is "
            "slightly too high. "
            "The row “each fold's own choice” includes the choice: each fold uses the arm that is best on its own "
            "validation split."
        )
        if len(pairs) < len(rows) - 1 and comparison.plan.reference in (None, *finished):
            notes.append(
                f"Not compared: {len(rows) - 1 - len(pairs)} of {len(rows) - 1} arms, which have fewer than two folds with the images "
                "of those of the arm to compare with."
            )
    if comparison.plan.reference not in (None, *finished):
        notes.append(
            f"No arm is compared with {comparison.plan.reference!r}, which was named beforehand: no fold of it has finished."
        )
    missing = len(comparison.members) - len(metrics)
    if missing:
        notes.append(
            f"{missing} of {len(comparison.members)} members have not finished; the images of their folds are not included."
        )
    return [*notes, *dict.fromkeys(one.banner for one in metrics if one.banner)]


def describe_intervals(config: ExperimentConfig) -> list[str]:
    """Return notes on what the two intervals of a cross-validation cover, and what neither covers."""
    data = config.finetune.data
    lines = [
        "The interval of the trained models, and that of macro F1, is over images: it says how good these models are on other "
        "images, and nothing about the recipe.",
        f"The interval of the recipe is over trainings, too, each on {data.folds - 1} of {data.folds} parts of as many images "
        "(Student's t with one degree of freedom less than folds that have finished, Nadeau and Bengio's correction). Neither is about a "
        "model trained on all images, which tends to be better.",
    ]
    if data.subjects is not None:
        lines.append("Images of one subject vary together: the intervals of accuracy count subjects, not images.")
    if config.pretrain is not None and config.pretrain.weights is None:
        lines.append("All folds share one EF-FER1, so no interval includes the variation over pretrainings.")
    return lines


def _show(found: ComparisonRecord, console: StudyConsole) -> None:
    for table in format_folds_tables(found):
        console.console.print(table)
    show_verdicts(found, console, most=_SHOWN_PAIRS)


CROSSVAL = Rules("cross_validation", _plan, _conclude, _show)
