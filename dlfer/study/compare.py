"""Comparison of trained models: over seeds between the arms of a study, or between finished runs and models.

For arms, it gives the table, the differences from a reference arm, and the notes. For finished runs, models and files
of predictions, nothing is trained: their predictions are matched image by image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.config.load import compute_digest, with_overrides
from dlfer.data.bundle import Split
from dlfer.data.given import parse_split, recognise
from dlfer.errors import DataError, ModelError, UserError
from dlfer.metrics.learned import describe_no_conclusion, find_run_failure
from dlfer.metrics.paired import align_correct, compare_seeds, describe_difference
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.metrics.seeds import compute_seed_summary
from dlfer.metrics.several import compare_several, compute_holm, match_predictions
from dlfer.runs.comparison_record import (
    ArmPair,
    ArmRow,
    ModelComparison,
    PairedTest,
    SeedEstimate,
    System,
    UnfinishedMember,
)
from dlfer.runs.find import ARTIFACT_FILE, find_model, find_run_of, list_models, open_run
from dlfer.runs.member_rows import read_member_rows
from dlfer.runs.metrics_record import Metrics, ModelPair
from dlfer.runs.run import Run
from dlfer.runs.run_records import require_metrics
from dlfer.study.members import Member, group_finished

if TYPE_CHECKING:
    from dlfer.predict.engines import Engine

Finished = Mapping[str, Sequence[Member]]
"""Arm -> its finished members (at least one)."""

_MAX_LEFT_OUT = 5


def summarise_arm(arm: str, members: Sequence[Member]) -> ArmRow:
    """Return the accuracy of an arm on each split; None for a split without predictions."""
    return ArmRow(
        arm=arm,
        seeds=[member.seed for member in members],
        train=_summarise_split(members, "train"),
        validation=_summarise_split(members, "validation"),
        test=_summarise_split(members, "test"),
    )


def summarise_accuracy(several: Sequence[Predictions]) -> SeedEstimate | None:
    """Return the mean accuracy over seeds with its 95 % interval; None without any predictions.

    For one seed, it is Wilson's interval over images. For several, it covers images and seeds: it estimates the
    accuracy of the recipe, not only that of these trainings.
    """
    if not several:
        return None
    by_id = [dict(zip(p.ids.tolist(), p.correct.tolist(), strict=True)) for p in several]
    summary = compute_seed_summary(np.array([[seed[key] for key in by_id[0]] for seed in by_id], dtype=float))
    low, high = summary.items_and_seeds or summary.items
    accuracy = SeedEstimate(value=summary.value, low=low, high=high, n=summary.n, per_seed=summary.per_seed)
    return accuracy if len(several) == 1 else accuracy.model_copy(update={"sd_over_seeds": summary.sd_over_seeds})


def compare_with(reference: str, finished: Finished, split: str) -> list[ArmPair]:
    """Compare every other arm with the arm `reference` on a split, over the seeds that both have finished.

    Arms evaluated on other images, or without a common seed, are left out (see `describe_left_out`). The p values of
    several pairs are Holm-corrected, which decides about significance. If a training of either arm did not learn, the
    pair is not significant, its sentence says so, and `not_learned` has the reasons.
    """
    if reference not in finished:
        return []
    tests = {
        arm: _compare_arms(finished[reference], members, split) for arm, members in finished.items() if arm != reference
    }
    pairs = [ArmPair.of(test, part=split) for test in tests.values() if test is not None]
    failures = {arm: find_failures(members) for arm, members in finished.items()}
    return [conclude_pair(pair, [*failures[pair.a], *failures[pair.b]]) for pair in correct_pairs(pairs)]


def group_comparable(finished: Finished, split: str) -> list[list[str]]:
    """Return the arms in groups that were judged on the same images with the same labels, the largest group first."""
    groups: list[list[str]] = []
    for arm, members in finished.items():
        group = next((names for names in groups if _have_same_images([*finished[names[0]], *members], split)), None)
        if group is None:
            groups.append([arm])
        else:
            group.append(arm)
    return sorted(groups, key=len, reverse=True)


def _have_same_images(members: Sequence[Member], split: str) -> bool:
    several = [member.read_split(split) for member in members]
    try:
        for predictions in several:
            align_correct(several[0], predictions)
    except DataError:
        return False
    return True


def describe_groups(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return a sentence on the cells of each group of `group_comparable`; [] if there is only one group."""
    if len(groups) < 2:
        return []
    sets = ". ".join(f"Set {number}: {_join(names)}" for number, names in enumerate(groups[:_MAX_LEFT_OUT], start=1))
    more = f". And {len(groups) - _MAX_LEFT_OUT} more sets" if groups[_MAX_LEFT_OUT:] else ""
    return [
        f"The cells were validated on {len(groups)} sets of images, and are ranked within each: metrics on validation of "
        f"different sets are not comparable. {sets}{more}."
    ]


def describe_left_out(reference: str, finished: Finished, pairs: Sequence[ArmPair]) -> list[str]:
    """Return a sentence on the arms that `compare_with` could not compare with the reference; [] if it compared all."""
    compared = {reference, *(pair.b for pair in pairs)}
    left = [arm for arm in finished if arm not in compared]
    if not left:
        return []
    shown = _join(left)
    if reference not in finished:
        return [f"Not compared with {reference}, of which no member has finished: {shown}."]
    ends = ("was", "has") if len(left) == 1 else ("were", "have")
    return [
        f"Not compared with {reference}: {shown}, which {ends[0]} not judged on the same images with the same labels, or "
        f"{ends[1]} no seed in common with it."
    ]


def correct_pairs(pairs: Sequence[ArmPair]) -> list[ArmPair]:
    """Return the pairs of a table with Holm-corrected p values, which decide about significance; keep a single pair."""
    if len(pairs) < 2:
        return list(pairs)
    corrected = []
    for pair, p_holm in zip(pairs, compute_holm([pair.p_value for pair in pairs]), strict=True):
        is_significant = pair.is_significant and p_holm < 1 - pair.level
        changes = {"p_holm": p_holm, "num_pairs": len(pairs), "is_significant": is_significant}
        corrected.append(pair.model_copy(update=changes))
    return corrected


def conclude_pair(pair: ArmPair, not_learned: Sequence[str]) -> ArmPair:
    """Return a pair with its verdict in words; it is not significant if a training did not learn.

    `pair` is already corrected for the others in its table; `not_learned` has a clause for each such training.
    """
    changes = {"not_learned": list(not_learned), "is_significant": pair.is_significant and not not_learned}
    changes["sentence"] = describe_difference(pair)
    if not_learned:
        changes["sentence"] = describe_no_conclusion((pair.a, pair.b), not_learned)
    return pair.model_copy(update=changes)


def find_failures(members: Sequence[Member]) -> list[str]:
    """Return a clause for each training that did not learn, e.g. "without EF-FER1, seed 0: its accuracy ..."."""
    found = {member.title: find_run_failure(member.run.path) for member in members}
    return [f"{title}: {why}" for title, why in found.items() if why is not None]


def choose_split(finished: Finished) -> str:
    """Return the split on which the arms are evaluated: "test" if every finished member has one, else "validation"."""
    has_test = all(member.metrics.test for members in finished.values() for member in members)
    return "test" if has_test else "validation"


def describe_split(split: str, finished: Finished, *, is_ranked: bool = False) -> str:
    """Return the split in words; for validation, say whether it selected the models. `is_ranked`: it ranked them."""
    if split == "test":
        return "test"
    metrics = [member.metrics for members in finished.values() for member in members]
    if is_ranked:
        metrics = [one.model_copy(update={"is_selected": True}) for one in metrics]
    return ", ".join(sorted({one.describe_validation() for one in metrics}))


def list_unfinished(members: Sequence[Member]) -> list[UnfinishedMember]:
    """Return a record of each member that has not finished and so is not in the table."""
    return [
        UnfinishedMember(arm=member.arm, seed=member.seed, status=member.status, error=member.error)
        for member in members
        if member.status != "finished"
    ]


def describe_missing(members: Sequence[Member], *, arms: str = "arms") -> list[str]:
    """Return notes if the arms' means are over different seeds, and if members are not in the table; [] otherwise."""
    finished, notes = group_finished(members), []
    if len({tuple(member.seed for member in several) for several in finished.values()}) > 1:
        notes.append(f"The {arms} differ in which of their seeds finished; their means are not over the same seeds.")
    counts = Counter(member.status for member in members if member.status != "finished")
    if counts:
        listed = ", ".join(f"{count} {status}" for status, count in counts.items())
        notes.append(f"Not in the table: {listed} of {len(members)} members.")
    return notes


def collect_notes(finished: Finished, judged_on: str, pairs: Sequence[ArmPair] = ()) -> list[str]:
    """Return notes on the evaluated split and protocol, the members' banners, and the limits of the number of seeds."""
    metrics = [member.metrics for members in finished.values() for member in members]
    notes = [f"Evaluated on {judged_on}, protocol {', '.join(sorted({str(m.protocol) for m in metrics}))}."]
    notes += dict.fromkeys(m.banner for m in metrics if m.banner)
    if max(len(members) for members in finished.values()) == 1:
        notes.append(
            "One seed in each arm: the intervals are over images. The variation over trainings is not known, so "
            "nothing here is a statement about the recipes; train several seeds, e.g. --seeds 0,1,2."
        )
    else:
        notes.append(
            "Intervals of several seeds are over images and seeds, with Student's t: they are wide for two or three "
            "seeds, which give a poor estimate of the variance."
        )
        notes += _describe_single_seeds(finished, pairs)
    return notes


def _describe_single_seeds(finished: Finished, pairs: Sequence[ArmPair]) -> list[str]:
    """Return notes on arms and differences that rest on one seed while others rest on several."""
    notes = []
    alone = [arm for arm, members in finished.items() if len(members) == 1]
    if alone:
        notes.append(
            f"One seed only of {_join(alone)}: the interval is over images, and the variation over trainings is not in it."
        )
    single = [f"{pair.a} and {pair.b}" for pair in pairs if pair.num_seeds == 1]
    if single:
        notes.append(
            f"One seed in common of {_join(single)}: the difference is that of two trained models, with an interval over images, "
            "and no statement about the recipes. Train the seeds that are missing."
        )
    return notes


def _join(names: Sequence[str]) -> str:
    more = f"; and {len(names) - _MAX_LEFT_OUT} more" if names[_MAX_LEFT_OUT:] else ""
    return "; ".join(names[:_MAX_LEFT_OUT]) + more


def _summarise_split(members: Sequence[Member], split: str) -> SeedEstimate | None:
    several = [member.read_split(split) for member in members]
    return summarise_accuracy([predictions for predictions in several if predictions is not None])


def _compare_arms(a: Sequence[Member], b: Sequence[Member], split: str) -> PairedTest | None:
    """Return the test over the seeds that both arms have; None without any, or if their images differ."""
    of_b = {member.seed: member for member in b}
    pairs = [(member.read_split(split), of_b[member.seed].read_split(split)) for member in a if member.seed in of_b]
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    try:
        return compare_seeds(pairs, names=(a[0].arm, b[0].arm)) if pairs else None
    except DataError:
        return None


SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Entry:
    """A run, a predictions file or a model to compare.

    Attributes:
        name: its name in the result.
        path: path of the run directory, the predictions file, or the model's artifact.
        run: the run; None for a predictions file or a model.
        is_model: whether it is a model without predictions.
    """

    name: str
    path: Path
    run: Run | None
    is_model: bool = False


def compare_runs(
    names: Sequence[str],
    *,
    split: str | None = None,
    data: Path | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ModelComparison:
    """Compare the accuracies of two or more runs and models on the images that all of them predicted.

    Args:
        names: runs (paths, or beginnings of their names), shipped models by name, and predictions files (.npz).
        split: "test" or "validation", also by FER2013's names; None: test if all runs have it, else validation, and of
            `data` its first of test, validation and train.
        data: data that all runs and models predict now; None: only models predict, the data of the first run.
        folder: folder of runs; None: saved_models/runs.
        say: called with messages on progress.

    Returns:
        The result of `compare_several`, with the split, the paths of the runs, the systems (runs that differ only in
        the seed) with their differences over seeds, and notes. A pair with a training that did not learn is not
        significant, its sentence says so, and `not_learned` has the reasons.

    Raises:
        UserError: fewer than two names; a run without these predictions; labels, targets or images that do not match; a
            model without a run or data whose images it could predict.
    """
    if len(names) < 2:
        raise UserError(f"compare: found {len(names)} run, expected two or more.")
    entries = _name_entries([find_entry(name, folder) for name in names])
    wanted = parse_split(split, SPLITS)
    split = wanted or ("test" if data is not None else _choose_split(entries))
    images = Images(entries, wanted if data is not None else split, data, say)
    several = [
        images.predict(entry) if images.is_needed(entry) else read_predictions(_get_file(entry, split))
        for entry in entries
    ]
    titles = [entry.name for entry in entries]
    if images.notes:
        several = images.extend_labels(several, titles)
    result = compare_several(several, titles)
    matched = dict(zip(titles, match_predictions(several, titles), strict=True))
    systems, repeated = _group_seeds(entries)
    failures = _find_failures(entries)
    runs = [run.model_copy(update={"path": str(entry.path)}) for run, entry in zip(result.runs, entries, strict=True)]
    used = images.used or split
    changes = {
        "part": used,
        "runs": runs,
        "pairs": [_withdraw_verdict(pair, failures) for pair in result.pairs],
        "systems": [_describe_system(name, members, matched) for name, members in systems.items()],
        "system_pairs": _compare_systems(systems, matched, failures),
        "notes": [*_describe_matching(result, used), *images.notes, *_describe_runs(entries, used), *repeated],
    }
    return result.model_copy(update=changes)


def find_entry(name: str, folder: Path | None) -> Entry:
    """Return the entry for a name: an .npz file, the exact name or path of a model, or a run's path or name prefix.

    Raises:
        UserError: no such run or model, or it is a study.
    """
    path = Path(name)
    if path.suffix == ".npz":
        return Entry(path.stem, path, None)
    models = list_models()
    if name in models or (path / ARTIFACT_FILE).is_file():
        model = models.get(name, path)
        run = find_run_of(model) if model.name == "model" else None
        if run is None:
            return Entry(name, model, None, is_model=True)
        path = run.path
    try:
        run = open_run(path, folder)
    except ModelError as error:
        raise ModelError(f"{error} The models: {', '.join(models) or 'there are none'}.") from None
    if run.kind == "run":
        return Entry(f"{run.path.resolve().parent.name}/{run.path.resolve().name}", run.path, run)
    members = _read_member_paths(run)
    pooled = [str(file) for file in sorted((run.path / "predictions").glob("*.npz"))]
    if pooled:
        raise UserError(
            f"{run.path}: a cross-validation is no run; compare the pooled predictions of its arms: {' '.join(pooled)}."
        )
    raise UserError(
        f"{run.path}: a comparison ({run.kind}) has no predictions of its own; compare its members: "
        f"{' '.join(members) or 'it has none yet'}."
    )


def _read_member_paths(run: Run) -> list[str]:
    """Return the directories of the members: as recorded, or beside the comparison if the folder of runs was moved."""
    return [str(row.find_folder(run.path) or row.path) for row in read_member_rows(run.path) if row.path]


def _name_entries(entries: list[Entry]) -> list[Entry]:
    """Return the entries with unique names: equal names become paths, and entries that are given twice are numbered."""
    counts = Counter(name for name, _ in {(entry.name, entry.path.resolve()) for entry in entries})
    longer = [entry.name if counts[entry.name] == 1 else str(entry.path) for entry in entries]
    unique = []
    for position, (entry, name) in enumerate(zip(entries, longer, strict=True)):
        before = longer[:position].count(name)
        unique.append(replace(entry, name=f"{name} ({before + 1})" if before else name))
    return unique


def _get_file(entry: Entry, split: str) -> Path:
    """Return the predictions file of a split.

    Raises:
        ModelError: the run has none.
    """
    if entry.run is None:
        return entry.path
    path = entry.path / "predictions" / f"{split}.npz"
    if path.is_file():
        return path
    present = [other.stem for other in sorted(path.parent.glob("*.npz"))]
    found = f"found those of {', '.join(present)}" if present else f"found none; its status is {entry.run.status}"
    raise ModelError(f"{entry.path}: expected predictions of {split}, {found}. Choose another split by --split.")


class Images:
    """The images that models predict for a comparison, with faces detected as in the training of each model.

    Args:
        entries: entries of the comparison; the first run among them provides the data.
        split: split of the data; None: the first of test, validation and train that `data` has.
        data: data to use instead of the run's.
        say: called with messages on progress.

    Attributes:
        used: name of the split of `data` that was predicted; None without `data`.
        notes: which images each model predicted, and what else it used them for.
        own: images of the run, their labels, and their origin in words; None until they are loaded.
    """

    def __init__(
        self, entries: Sequence[Entry], split: str | None, data: Path | None, say: Callable[[str], None]
    ) -> None:
        if data is not None:
            recognise(data)  # report unknown data before a model is loaded
        self.split, self.data, self.say = split, data, say
        self.used: str | None = None
        self.source = next((entry for entry in entries if entry.run is not None), None)
        self.notes: list[str] = []
        self.own: tuple[Split, tuple[str, ...], str] | None = None

    def is_needed(self, entry: Entry) -> bool:
        """Return whether an entry has to predict now: a model always, a run only with `data`."""
        return entry.is_model or (self.data is not None and entry.run is not None)

    def predict(self, entry: Entry) -> Predictions:
        """Return the predictions of a model or of a run's model, by ONNX Runtime if it has an ONNX file.

        Raises:
            UserError: there are no images, or their labels do not match those of the model.
        """
        from dlfer.data.labels import map_targets
        from dlfer.experiment.evaluate import describe_seen, get_previous_use, prepare_as_trained
        from dlfer.predict.engines import load_engine

        model = load_engine(find_model(entry.path))
        images, labels, where = self._load_given(model) if self.data is not None else self._load_own()
        if self.data is not None or self.source.run.config().finetune.data.faces is None:
            images = prepare_as_trained(images, model, self.say)
        use = get_previous_use(entry.path, images, is_own=False)
        seen = None if use else describe_seen(entry.path, entry.name, images)
        images = map_targets(images, labels, model.labels)
        self.say(f"{entry.name}: predicting {len(images):,} images")
        self.notes.append(
            f"{entry.name} predicted the {len(images):,} images of {images.name} of {where} for this comparison; they are matched "
            "by id."
        )
        if use is not None:
            did = {"training": "trained", "selection": "selected"}.get(use)
            if did is None:
                self.notes.append(
                    f"The temperature of {entry.name} was fitted on these images, its accuracy is not affected."
                )
            else:
                self.notes.append(f"Warning: these images {did} {entry.name}, so its accuracy is too high.")
        if seen is not None:
            self.notes.append(f"Warning: {seen}")
        return Predictions(images.ids, model.labels, images.targets, model.predict(images.images))

    def extend_labels(self, several: Sequence[Predictions], names: Sequence[str]) -> list[Predictions]:
        """Return predictions over the labels of the model with the most, if these include all labels of the others.

        Labels that a model lacks get the probability 0. Predicting a label that no image has counts as an error.
        """
        most = max(several, key=lambda predictions: len(predictions.labels)).labels
        if not all(set(predictions.labels) <= set(most) for predictions in several):
            return list(several)
        extended = []
        for predictions, name in zip(several, names, strict=True):
            unknown = [label for label in most if label not in predictions.labels]
            if unknown:
                self.notes.append(f"{name} has no output for {', '.join(unknown)} and never predicts it.")
            columns = [predictions.labels.index(label) if label in predictions.labels else -1 for label in most]
            padded = np.pad(predictions.probabilities, ((0, 0), (0, 1)))
            targets = np.array([most.index(label) for label in predictions.labels])[predictions.targets]
            extended.append(Predictions(predictions.ids, most, targets, padded[:, columns]))
        return extended

    def _load_given(self, model: Engine) -> tuple[Split, tuple[str, ...], str]:
        """Return the images of `data` as stored on disk, their labels, and their origin in words."""
        from dlfer.experiment.evaluate import load_split

        images, labels, _ = load_split(self.data, self.split, model, self.say)
        self.used = images.name
        return images, labels, str(self.data)

    def _load_own(self) -> tuple[Split, tuple[str, ...], str]:
        """Return the images of the run with faces detected as in its training, their labels, and their origin."""
        from dlfer.data.sources import load_data

        if self.source is None:
            raise UserError(
                "compare: models need images to predict; name a run, whose images they are, or give --data DATA."
            )
        if self.own is None:
            stage = self.source.run.config().finetune
            bundle = load_data(stage.data, image_size=stage.native_size, balance=stage.balance, say=self.say)
            images = getattr(bundle, self.split)
            if not isinstance(images, Split):
                raise UserError(f"compare: {self.source.name} has no {self.split} images in memory; give --data DATA.")
            self.own = images, bundle.labels, f"the data of {self.source.name}"
        return self.own


def _choose_split(entries: list[Entry]) -> str:
    """Return the first split of which every run has predictions; "test" if there is none."""
    runs = [entry for entry in entries if entry.run is not None]
    for split in SPLITS:
        if all((entry.path / "predictions" / f"{split}.npz").is_file() for entry in runs):
            return split
    return SPLITS[0]


def _describe_matching(result: ModelComparison, split: str) -> list[str]:
    left_out = [f"{run.left_out:,} of {run.num_images:,} of {run.name}" for run in result.runs if run.left_out]
    notes = []
    if left_out:
        notes.append(f"Compared on the {result.n_common:,} common {split} images; left out: {', '.join(left_out)}.")
    same = [pair for pair in result.pairs if pair.mcnemar.b + pair.mcnemar.c == 0]
    notes += [f"{pair.a} and {pair.b} classify exactly the same images correctly." for pair in same]
    return notes


def _describe_runs(entries: list[Entry], split: str) -> list[str]:
    """Return notes on runs with different protocols or selection, on their banners, and on optimistic values."""
    metrics: dict[str, Metrics] = {
        entry.name: require_metrics(entry.path) for entry in entries if entry.run is not None
    }
    notes = []
    facts = {
        "protocol": {name: found.protocol for name, found in metrics.items()},
        "selected on": {name: found.describe_selection() for name, found in metrics.items()},
    }
    for fact, found in facts.items():
        if len(set(found.values())) > 1:
            listed = "; ".join(f"{name}: {value}" for name, value in found.items())
            notes.append(f"Warning: the runs differ in {fact} ({listed}).")
    banners = {name: found.banner for name, found in metrics.items() if found.banner}
    if banners and len(banners) < len(metrics):
        notes.append("Warning: only some of the runs have a banner; their metrics are not comparable.")
    notes += [f"{name}: {banner}" for name, banner in banners.items()]
    selected = {name: str(found.selected_on) for name, found in metrics.items() if found.is_selected}
    if split == "validation" and selected:
        if len(selected) == len(entries):
            whom = "these models, so all values are optimistic"
        else:
            whom = f"{', '.join(selected)}, so their values are optimistic"
            whom += ". What selected the others is not known" if len(metrics) < len(entries) else ""
        notes.append(f"Validation ({', '.join(sorted(set(selected.values())))}) selected {whom}.")
    return notes


def _group_seeds(entries: list[Entry]) -> tuple[dict[str, dict[int, Entry]], list[str]]:
    """Return system -> seed -> run for experiments with several seeds, and a note for each run that repeats a seed.

    Two runs with the same seed are not two independent trainings of the recipe, so only the first one is used.
    """
    groups: dict[str, dict[int, Entry]] = {}
    notes: list[str] = []
    for entry in entries:
        if entry.run is not None:
            config = entry.run.config()
            digest = compute_digest(with_overrides(config, {"experiment.seed": 0}))
            group = groups.setdefault(f"{config.experiment.name} {digest[:8]}", {})
            first = group.setdefault(config.experiment.seed, entry)
            if first is not entry:
                notes.append(
                    f"{entry.name} is of the same experiment and seed as {first.name}, which alone is in what is said over seeds."
                )
    found = {name: members for name, members in groups.items() if len(members) > 1}
    return found, notes if found else []


def _describe_system(name: str, members: dict[int, Entry], matched: dict[str, Predictions]) -> System:
    accuracies = [float(matched[entry.name].correct.mean()) for entry in members.values()]
    return System(
        name=name,
        runs=[entry.name for entry in members.values()],
        seeds=list(members),
        mean=float(np.mean(accuracies)),
        sd=float(np.std(accuracies, ddof=1)),
    )


def _find_failures(entries: list[Entry]) -> dict[str, str]:
    """Return name -> "name: reason" for the runs whose training did not learn."""
    found = {entry.name: find_run_failure(entry.path) for entry in entries if entry.run is not None}
    return {name: f"{name}: {why}" for name, why in found.items() if why is not None}


def _withdraw_verdict(pair: ModelPair, failures: dict[str, str]) -> ModelPair:
    """Return a pair whose verdict is replaced by the reasons, if one of its two trainings did not learn."""
    reasons = [failures[name] for name in (pair.a, pair.b) if name in failures]
    if not reasons:
        return pair.model_copy(update={"not_learned": []})
    sentence = describe_no_conclusion((pair.a, pair.b), reasons)
    return pair.model_copy(update={"not_learned": reasons, "sentence": sentence, "is_significant": False})


def _compare_systems(
    systems: dict[str, dict[int, Entry]], matched: dict[str, Predictions], failures: dict[str, str]
) -> list[ArmPair]:
    """Return the differences of systems over the seeds that both have, if these are at least two.

    Their p values are Holm-corrected over all these pairs.
    """
    names, compared = list(systems), []
    for position, a in enumerate(names):
        for b in names[position + 1 :]:
            seeds = sorted(systems[a].keys() & systems[b].keys())
            if len(seeds) > 1:
                pairs = [(matched[systems[a][seed].name], matched[systems[b][seed].name]) for seed in seeds]
                compared.append(ArmPair.of(compare_seeds(pairs, names=(a, b))))
    concluded = []
    for pair in correct_pairs(compared):
        members = [entry.name for name in (pair.a, pair.b) for entry in systems[name].values()]
        concluded.append(conclude_pair(pair, [failures[name] for name in members if name in failures]))
    return concluded
