"""Protocols that assign images to train, validation and test: stratified draws by id, independent of the row order."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection

import numpy as np

from dlfer.config.load import resolve_path
from dlfer.config.sections import DataConfig, SubjectsConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import Components, group_duplicates
from dlfer.data.pipeline import add_copies, draw_smallest
from dlfer.errors import DataError, ProtocolError
from dlfer.metrics.scores import read_attributes
from dlfer.runs.text import count_noun, to_utf8

TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.2
"""The test split takes 20 % of all images, and validation takes 20 % of the rest."""


def compute_ranks(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Return uint64 [N], one random number per id that depends only on the id, the seed and the purpose."""
    prefix = f"{purpose}:{seed}:".encode()
    digests = b"".join(hashlib.blake2b(prefix + to_utf8(str(name)).encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8")


def draw_indices(targets: np.ndarray, ids: np.ndarray, num: int | None, *, seed: int) -> np.ndarray:
    """Return the rows (int64, ascending) of a stratified draw of `num` images; None draws all.

    Each class keeps its share (largest remainders), and at least one image if `num` allows it.
    The drawn ids do not depend on the order of the rows.
    """
    if num is None or num >= len(targets):
        return np.arange(len(targets))
    classes, counts = np.unique(targets, return_counts=True)
    quotas = _share_out(counts, num)
    order = np.lexsort((ids, compute_ranks(ids, seed, "subset")))
    sorted_targets = targets[order]
    rows = [order[sorted_targets == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(rows))


def draw_subset(split: Split, num: int | None, seed: int) -> Split:
    """Return a stratified draw of `num` images of `split`, or `split` itself if it has no more or `num` is None."""
    if num is None or num >= len(split):
        return split
    return split.take(draw_indices(split.targets, split.ids, num, seed=seed))


def _share_out(counts: np.ndarray, num: int) -> np.ndarray:
    """Return the number of images of each class in a draw of `num`: proportional, and at least one where possible."""
    least = (counts > 0).astype(np.int64) if num >= len(counts) else np.zeros(len(counts), np.int64)
    exact = counts * (num / counts.sum())
    quotas = np.maximum(np.floor(exact).astype(np.int64), least)
    while quotas.sum() > num:  # raising small classes to one image takes images from those furthest above their share
        quotas[np.argmax(np.where(quotas > least, quotas - exact, -np.inf))] -= 1
    while quotas.sum() < num:
        quotas[np.argmax(np.where(quotas < counts, exact - quotas, -np.inf))] += 1
    return quotas


def draw_held_out(
    split: Split, fraction: float, *, seed: int, purpose: str, groups: np.ndarray | None = None
) -> np.ndarray:
    """Return bool [N], the rows of a stratified draw of about `fraction` of them in whole groups of duplicates.

    Every class with at least two groups has one on both sides. The draw depends only on the seed, the
    purpose and the ids, not on the order of the rows.

    Args:
        fraction: in (0, 1).
        purpose: a word that makes draws with the same seed independent.
        groups: int [N], rows with the same number stay together; None: those of `group_duplicates`.
            A group belongs to the class of its member with the first id.
    """
    groups = group_duplicates(split.images, split.ids) if groups is None else groups
    by_id = np.argsort(split.ids, kind="stable")
    _, first = np.unique(groups[by_id], return_index=True)
    _, dense, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    leaders = by_id[first]
    leader_ids, leader_targets = split.ids[leaders], split.targets[leaders]
    order = np.lexsort((leader_ids, compute_ranks(leader_ids, seed, purpose)))
    chosen = np.zeros(len(leaders), bool)
    for label in np.unique(leader_targets):
        members = order[leader_targets[order] == label]
        if len(members) < 2:
            continue
        ends = np.cumsum(sizes[members])
        taken = int(np.sum(ends - sizes[members] / 2 <= fraction * ends[-1]))
        chosen[members[: min(max(taken, 1), len(members) - 1)]] = True
    return chosen[dense]


def assign_folds(split: Split, folds: int, *, seed: int, groups: np.ndarray) -> np.ndarray:
    """Return int64 [N], the fold (0..folds-1) of each row: stratified by class, with whole groups.

    The largest groups are assigned first, each to the fold that has the smallest part of the group's classes so far, or
    among equal folds to the one with the fewest images. If every group is one image, the folds differ by at most one
    image in each class and in total. The assignment depends only on the seed and the ids, not on the order of the rows.

    Args:
        folds: number of folds, at least 2.
        groups: int [N]; rows with the same number stay together.
    """
    by_id = np.argsort(split.ids, kind="stable")
    _, first = np.unique(groups[by_id], return_index=True)
    _, dense = np.unique(groups, return_inverse=True)
    leaders = by_id[first]
    classes, targets = np.unique(split.targets, return_inverse=True)
    counts = np.zeros((len(leaders), len(classes)), np.int64)
    np.add.at(counts, (dense, targets), 1)
    ranks = compute_ranks(split.ids[leaders], seed, "folds")
    order = np.lexsort((split.ids[leaders], ranks, targets[leaders], -counts.sum(axis=1)))
    weights = 1 / counts.sum(axis=0).astype(np.float64) ** 2
    held, chosen = np.zeros((folds, len(classes)), np.int64), np.zeros(len(leaders), np.int64)
    for group in order:
        load = held @ (counts[group] * weights)
        least = np.flatnonzero(load <= load.min() * (1 + 1e-9))
        chosen[group] = least[np.argmin(held[least].sum(axis=1))]
        held[chosen[group]] += counts[group]
    return chosen[dense]


def find_subjects(config: SubjectsConfig, ids: np.ndarray) -> np.ndarray:
    """Return str [N], the subject that each image shows.

    Args:
        config: the pattern that finds the subject in an id, or the csv of ids and subjects.
        ids: str [N], the ids of the images.

    Raises:
        DataError: the csv has no column subject or several, or an image has no subject.
    """
    if config.pattern is not None:
        where = f"data.subjects.pattern: {config.pattern!r}"
        matches = {name: re.search(config.pattern, name) for name in ids.tolist()}
        found = {name: match[1] for name, match in matches.items() if match is not None and match[1]}
    else:
        path = resolve_path(config.file)
        where, attributes = str(path), read_attributes(path, expected="id,subject with a row for each image")
        named = [values for name, values in attributes.items() if name.casefold() == "subject"]
        if len(named) != 1:
            raise DataError(f"{path} line 1: found the columns id, {', '.join(attributes)}; expected id and subject.")
        found = named[0]
    without = [name for name in ids.tolist() if name not in found]
    if without:
        raise DataError(
            f"{where}: found no subject for {len(without):,} of {len(ids):,} images, e.g. {without[0]!r}; expected one for each. "
            "Images whose subject is not known could show one that is on the other side of a split."
        )
    return np.array([found[name] for name in ids.tolist()])


def draw_fraction(bundle: DataBundle, fraction: float, *, seed: int) -> DataBundle:
    """Draw about `fraction` of a bundle's images, stratified; each image stays in its split.

    Groups of duplicates are drawn whole, also across splits, so that the share of images with a duplicate in another
    split is about the same as before.
    """
    splits = list(bundle.splits.values())
    drawn = draw_held_out(_join(splits), fraction, seed=seed, purpose="fraction", groups=_group(splits))
    ends = np.cumsum([len(split) for split in splits])[:-1]
    kept = {
        name: split.take(np.flatnonzero(rows))
        for (name, split), rows in zip(bundle.splits.items(), np.split(drawn, ends), strict=True)
    }
    note = (
        f"{drawn.sum():,} of {len(drawn):,} images were drawn (data.fraction {fraction:g}), "
        "in whole groups of duplicates."
    )
    return dataclasses.replace(bundle, **kept, notes=(*bundle.notes, note))


def apply_protocol(bundle: DataBundle, config: DataConfig, *, balance: str) -> DataBundle:
    """Divide a source's in-memory splits into train, validation and test by the protocol of `config`.

    official: the source's splits. With select_on, that fraction of train (in whole groups of duplicates) is the
        validation split, and the source's validation split becomes the test set if there is no other. Without a
        validation split, a fifth of train takes its place; with train only, it is divided as by resplit. Notes say so.
    resplit: all splits are pooled and divided 80/20 and again 80/20, stratified, duplicates on one side.
    cross_validation: all splits are pooled and divided into folds, stratified, duplicates in one fold; the configured
        fold is the test set, and a fifth (or select_on) of the others is the validation split.
    paper, official_80_20: a fifth of train is the validation split, and all other splits are the test set.
    paper, after_balance: all splits are pooled, balanced by augmented copies or down to the smallest class, and then
        divided 80/20 and again 80/20 regardless of duplicates, so that many test images have a duplicate in train.

    Args:
        bundle: the source's splits; validation and test may be None.
        config: protocol, split, folds and fold, select_on, subjects and seed. In all draws except that of after_balance
            the images of one subject stay together.
        balance: that of the stage; after_balance needs "augment" or "undersample", the others balance in training.

    Raises:
        ProtocolError: the settings are incompatible, or the splits that the protocol needs are missing.
        DataError: a subject is missing, the images differ in shape, or a fold would lack images or a class.
    """
    if config.protocol == "paper":
        if config.split == "after_balance":
            return _divide_after_balance(bundle, config, balance)
        return _divide_80_20(bundle, config)
    if config.protocol == "cross_validation":
        return _cross_validate(bundle, config)
    if config.protocol == "resplit":
        return _resplit(bundle, config)
    return _note_shared_subjects(_keep_official(bundle, config), config)


def drop_duplicates(bundle: DataBundle) -> DataBundle:
    """Remove the images of train that a chain of duplicates connects to validation or test.

    Chains run through all three splits: if A and B are in train, A is a duplicate of B, and B of C in test, both are
    removed. Validation and test are unchanged; a note states how many images were removed.

    Args:
        bundle: in-memory splits; their image sizes may differ.
    """
    groups = _group(bundle.splits.values())
    num_train = len(bundle.train)
    connected = np.isin(groups[:num_train], groups[num_train:])
    note = (
        f"train: {int(connected.sum()):,} of {num_train:,} images were left out, because they have a duplicate in validation or test "
        "or are connected to one by a chain of duplicates."
    )
    return dataclasses.replace(bundle, train=bundle.train.take(np.flatnonzero(~connected)), notes=(*bundle.notes, note))


def _keep_official(bundle: DataBundle, config: DataConfig) -> DataBundle:
    if bundle.validation is None and bundle.test is None:
        note = "The data has no splits of its own: it was divided 80/20 and again 80/20, duplicates on one side."
        return _resplit(dataclasses.replace(bundle, notes=(*bundle.notes, note)), config)
    if bundle.validation is not None and config.select_on is None:
        return dataclasses.replace(bundle, protocol="official", selected_on=bundle.validation.name)
    fraction, notes = config.select_on or VALIDATION_FRACTION, bundle.notes
    if config.select_on is None:
        notes += (f"The data has no validation split: {fraction:.0%} of {bundle.train.name} serves as one.",)
    test = bundle.test
    if test is None:
        test = bundle.validation
    elif bundle.validation is not None:
        notes += (f"{bundle.validation.name} ({len(bundle.validation)} images) is not used: select_on is set.",)
    train, validation = _hold_out(bundle.train, fraction, config)
    selected_on = f"{fraction:.4g} of {bundle.train.name} (duplicates kept together)"
    return dataclasses.replace(
        bundle, train=train, validation=validation, test=test, protocol="official", selected_on=selected_on, notes=notes
    )


def _resplit(bundle: DataBundle, config: DataConfig) -> DataBundle:
    pool = _join(bundle.splits.values())
    groups = _group(bundle.splits.values(), config.subjects)
    judged = draw_held_out(pool, TEST_FRACTION, seed=config.seed, purpose="test", groups=groups)
    rest = np.flatnonzero(~judged)
    fraction = config.select_on or VALIDATION_FRACTION
    selected = draw_held_out(pool.take(rest), fraction, seed=config.seed, purpose="validation", groups=groups[rest])
    _check_subjects({"test": judged, "validation": selected}, bundle.splits.values(), config.subjects)
    return dataclasses.replace(
        bundle,
        train=pool.take(rest[~selected], "train"),
        validation=pool.take(rest[selected], "validation"),
        test=pool.take(np.flatnonzero(judged), "test"),
        protocol="resplit",
        selected_on=f"validation ({fraction:.4g} of the images left after the test set was drawn)",
    )


def _cross_validate(bundle: DataBundle, config: DataConfig) -> DataBundle:
    if config.fold is None:
        raise ProtocolError(
            "data.fold: found null; one training needs the number of the fold that it leaves out, e.g. --set "
            "finetune.data.fold=0. dlfer crossval trains a model for each fold."
        )
    pool = _join(bundle.splits.values())
    groups = _group(bundle.splits.values(), config.subjects)
    folds = assign_folds(pool, config.folds, seed=config.seed, groups=groups)
    _check_folds(pool, folds, groups, config, splits=bundle.splits.values(), labels=bundle.labels)
    judged = folds == config.fold
    rest, fraction = np.flatnonzero(~judged), config.select_on or VALIDATION_FRACTION
    purpose = f"validation of fold {config.fold}"
    selected = draw_held_out(pool.take(rest), fraction, seed=config.seed, purpose=purpose, groups=groups[rest])
    _check_subjects({"validation": selected}, bundle.splits.values(), config.subjects)
    sizes = np.bincount(folds, minlength=config.folds)
    note = (
        f"Fold {config.fold} of 0 to {config.folds - 1} is the test set: {sizes[config.fold]:,} of {len(pool):,} images; the folds have "
        f"{sizes.min():,} to {sizes.max():,}, in whole groups of duplicates{' and subjects' if config.subjects else ''} "
        f"({count_noun(len(np.unique(groups)), 'group')})."
    )
    return dataclasses.replace(
        bundle,
        train=pool.take(rest[~selected], "train"),
        validation=pool.take(rest[selected], "validation"),
        test=pool.take(np.flatnonzero(judged), f"fold {config.fold}"),
        protocol="cross_validation",
        selected_on=f"validation ({fraction:.4g} of the images outside the fold)",
        notes=(*bundle.notes, note),
        test_groups=groups[judged],
    )


def _check_folds(
    pool: Split,
    folds: np.ndarray,
    groups: np.ndarray,
    config: DataConfig,
    *,
    splits: Collection[Split],
    labels: tuple[str, ...],
) -> None:
    """Raise DataError if a fold would be empty, or if all images of a class would be in one fold."""
    what, more = "groups of duplicates", ""
    if config.subjects is not None:
        what += f" and subjects ({_count_subjects(config.subjects, splits)})"
        more = " Correct data.subjects if the images show more subjects."
    num_groups = len(np.unique(groups))
    if len(np.unique(folds)) < config.folds:
        raise DataError(
            f"data.folds: found {num_groups:,} {what} for {config.folds} folds, expected at least one for each. Set fewer folds.{more}"
        )
    if config.num_images.train is not None:
        return  # the data is limited on purpose; a note says which classes are missing
    lone = [labels[label] for label in np.unique(pool.targets) if len(np.unique(folds[pool.targets == label])) < 2]
    if lone:
        raise DataError(
            f"data.folds: all images of {', '.join(lone)} are in one of the {what}, and so in one fold: the model that is judged on "
            f"it could not learn the class. Add images, or set data.labels.drop: [{', '.join(lone)}].{more}"
        )


def _count_subjects(subjects: SubjectsConfig, splits: Collection[Split]) -> str:
    ids = np.concatenate([split.ids for split in splits])
    return count_noun(len(np.unique(find_subjects(subjects, ids))), "subject")


def _check_subjects(drawn: dict[str, np.ndarray], splits: Collection[Split], subjects: SubjectsConfig | None) -> None:
    """Raise DataError if a split (name -> bool [N], the rows that were drawn) has no image, since subjects stay together."""
    empty = [name for name, rows in drawn.items() if not rows.any()]
    if subjects is not None and empty:
        raise DataError(
            f"data.subjects: found {_count_subjects(subjects, splits)}, and {' and '.join(empty)} got no image, because a subject "
            "stays in one split; expected at least three, each with images of all classes. Correct data.subjects if the images show "
            "more subjects, or add images of others."
        )


def _divide_80_20(bundle: DataBundle, config: DataConfig) -> DataBundle:
    """Take train and validation from the official training split, and test on all other splits."""
    others = [split for split in (bundle.validation, bundle.test) if split is not None]
    if not others:
        raise ProtocolError(
            "data.split: official_80_20 judges on the splits beside train, and the data has none. "
            "Take data that has them, or protocol: resplit."
        )
    test = _join([bundle.train, *others])
    test = test.take(np.arange(len(bundle.train), len(test)), "+".join(split.name for split in others))
    train, validation = _hold_out(bundle.train, VALIDATION_FRACTION, config)
    share = len(bundle.train) / (len(bundle.train) + len(test))
    notes = bundle.notes
    if bundle.test is None:
        notes += (
            f"The data has no third split, so {len(bundle.train)} / {len(test)} images ({share:.0%}) "
            "stand for the official 28,709 / 7,178.",
        )
    return dataclasses.replace(
        bundle,
        train=train,
        validation=validation,
        test=test,
        protocol="paper",
        selected_on=f"a fifth of {bundle.train.name} (duplicates kept together)",
        notes=notes,
    )


def _divide_after_balance(bundle: DataBundle, config: DataConfig, balance: str) -> DataBundle:
    """Balance all images before dividing them, as the wording of some papers suggests."""
    if balance not in ("augment", "undersample"):
        raise ProtocolError(
            f"balance: found {balance!r}; data.split: after_balance balances all images before the split. "
            "Set balance: augment (by augmented copies) or undersample, or data.split: official_80_20."
        )
    pool = _join(bundle.splits.values())
    if balance == "augment":
        balanced, how = add_copies(pool, seed=config.seed), "by augmented copies"
    else:
        balanced, how = draw_smallest(pool, seed=config.seed), "down to the smallest class"
    alone = np.arange(len(balanced))
    judged = draw_held_out(balanced, TEST_FRACTION, seed=config.seed, purpose="test", groups=alone)
    rest = balanced.take(np.flatnonzero(~judged))
    selected = draw_held_out(
        rest, VALIDATION_FRACTION, seed=config.seed, purpose="validation", groups=alone[: len(rest)]
    )
    train = rest.take(np.flatnonzero(~selected), "train")
    test = balanced.take(np.flatnonzero(judged), "test")
    note = (
        f"{len(pool)} images were balanced to {len(balanced)} {how} before the split, and then split without regard to "
        "duplicates."
    )
    return dataclasses.replace(
        bundle,
        train=train,
        validation=rest.take(np.flatnonzero(selected), "validation"),
        test=test,
        protocol="paper",
        selected_on="validation (a fifth of the images left after the test set was drawn, copies on both sides)",
        notes=(*bundle.notes, note),
    )


def _hold_out(train: Split, fraction: float, config: DataConfig) -> tuple[Split, Split]:
    """Divide train by a stratified draw of about `fraction` in whole groups: return the rest and the drawn images."""
    groups = _group([train], config.subjects)
    held = draw_held_out(train, fraction, seed=config.seed, purpose="validation", groups=groups)
    _check_subjects({"validation": held}, [train], config.subjects)
    return train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held), f"{train.name} (held out)")


def _group(splits: Collection[Split], subjects: SubjectsConfig | None = None) -> np.ndarray:
    """Return int64 [N], the groups of duplicates in the concatenated rows of several splits.

    With `subjects`, a group also contains all images of its subjects: chains of both relations are joined.
    """
    ids = np.concatenate([split.ids for split in splits])
    groups = group_duplicates([split.images for split in splits], ids)
    if subjects is None:
        return groups
    components, rows = Components(len(ids)), np.arange(len(ids))
    components.join_equal(groups, rows)
    components.join_equal(find_subjects(subjects, ids), rows)
    return components.compute_groups()


def _note_shared_subjects(bundle: DataBundle, config: DataConfig) -> DataBundle:
    """Add a note to the bundle if train shares subjects with the test split, or with validation if there is no test."""
    if config.subjects is None:
        return bundle
    judged = bundle.validation if bundle.test is None else bundle.test
    subjects = find_subjects(config.subjects, judged.ids)
    shared = np.isin(subjects, find_subjects(config.subjects, bundle.train.ids))
    if not shared.any():
        return bundle
    note = (
        f"{int(shared.sum()):,} of {len(judged):,} images of {judged.name} show one of {len(np.unique(subjects[shared])):,} subjects "
        "that are in train as well: the value says little about new subjects. Use protocol resplit or cross_validation."
    )
    return dataclasses.replace(bundle, notes=(*bundle.notes, note))


def _join(splits: Collection[Split]) -> Split:
    """Concatenate the splits; if an id occurs in several of them, all ids are prefixed with the name of their split."""
    shapes = {split.images.shape[1:] for split in splits}
    if len(shapes) > 1:
        raise DataError(f"data: found splits with images of {sorted(shapes)}, expected one shape; set data.size.")
    ids = np.concatenate([split.ids for split in splits])
    if len(np.unique(ids)) < len(ids):
        ids = np.concatenate([np.array([f"{split.name}/{name}" for name in split.ids]) for split in splits])
    images = np.concatenate([split.images for split in splits])
    return Split("all", images, np.concatenate([split.targets for split in splits]), ids)
