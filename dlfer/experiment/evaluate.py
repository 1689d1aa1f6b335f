"""A trained model judged again: on its own run's images, a csv, a folder, arrays, or another experiment's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.load import load_recorded_experiment, resolve_path
from dlfer.config.sections import FacesConfig
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint, make_split
from dlfer.data.duplicates import hash_images, shorten_digests
from dlfer.data.faces import prepare_split
from dlfer.data.given import GivenData, parse_split
from dlfer.data.labels import map_targets
from dlfer.data.sources import load_data
from dlfer.errors import ConfigError, DataError, MissingDataError, UserError
from dlfer.experiment.extras import PLAIN, Extras, check_extras, choose_changes, compute_extra_metrics, keep_extras
from dlfer.experiment.splits import JudgedDuplicates, find_judged_duplicates
from dlfer.export.images import load_held
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.predict.engines import Engine, load_engine
from dlfer.predict.foreign import ForeignModel
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.changes import IMAGES_FILE
from dlfer.runs.files import read_npz
from dlfer.runs.find import find_model, find_run_of
from dlfer.runs.metrics_record import JudgedOn, Metrics
from dlfer.runs.records import ArtifactRecord, DataRecord, SplitRecord
from dlfer.runs.run import CONFIG_FILE, Run
from dlfer.runs.run_records import log_opening, read_metrics
from dlfer.runs.text import count_noun


def evaluate_model(
    name: str,
    *,
    data: Path | tuple[Any, Any] | None = None,
    split: str | None = None,
    extras: Extras = PLAIN,
    say: Callable[[str], None] | None = None,
) -> Metrics:
    """Judge a trained model and return its metrics: the first of what `evaluate_with_predictions` returns."""
    return evaluate_with_predictions(name, data=data, split=split, extras=extras, say=say)[0]


def evaluate_with_predictions(
    name: str,
    *,
    data: Path | tuple[Any, Any] | None = None,
    split: str | None = None,
    extras: Extras = PLAIN,
    say: Callable[[str], None] | None = None,
) -> tuple[Metrics, Predictions]:
    """Judge a trained model and return its metrics and its plain predictions.

    Args:
        name: a run, an artifact folder, or a shipped model's name.
        data: a folder, a csv in the layout of FER2013, a zip with either, an .npz of arrays, or an experiment file
            whose `finetune.data` is used (with its aliases and drops); or (images, labels) as `dlfer.evaluate` takes them.
            Without it a run is judged on its own data.
        split: "test", "validation" or "train"; FER2013's names of them are taken, too. None: test, else validation,
            else train, or all of data without splits.

    Returns:
        `test` holds the metrics, `test_without_duplicates` those of the images without a duplicate in the data that
        trained or selected the model, where the run's data is there to compare with, or the csv has the same;
        `duplicates` has the counts. Temperature and threshold are those that the run found on its validation.
        `judged_on.used_for` is "selection" or "training" where the model was selected on these images or trained on
        them, else None.

    Raises:
        UserError: model or data is not found or does not fit.
    """
    wanted = parse_split(split)
    check_extras(extras)
    classifier = load_engine(find_model(name))
    run = find_run_of(name)
    record = read_artifact_record(find_model(name))
    given = None
    if isinstance(data, tuple):
        if wanted is not None:
            raise UserError("evaluate: found a split with (images, labels), which are one; leave the split out.")
        split, labels = _take_arrays(data, classifier)
    elif data is not None:
        split, labels, given = load_split(Path(data), wanted, classifier, say)
    if data is not None:
        split = prepare_as_trained(split, classifier, say)
    elif run is not None:
        split, labels = _choose_split(_load_stage(run), wanted)
    else:
        raise UserError(f"evaluate: {name} is not a run with its own data; give the data with --data DATA.")
    trained = run.path if run is not None else find_model(name)
    is_own = run is not None and not isinstance(data, tuple) and _is_own_data(run, given)
    used_for = tell_use(trained, split, is_own=is_own)
    split = map_targets(split, labels, classifier.labels)
    check_extras(extras, split.ids)
    opened = log_opening(run, split.name, len(split)) if run is not None else None
    predictions = Predictions(split.ids, classifier.labels, split.targets, classifier.predict(split.images))
    sources, same_ids = (None if run is None else _load_sources(run)), is_own
    if sources is None and given is not None and given.csv is not None:
        # Nothing but the same images passes, so that what they are named in this csv is what they were named there.
        sources, same_ids = _find_sources(trained, given.csv), True
    duplicates = None
    if sources is not None:
        train, selection = sources[0], None if used_for == "selection" else sources[1]
        duplicates = find_judged_duplicates("test", split, train=train, selection=selection, same_ids=same_ids)
    of_run = read_metrics(trained)
    # Duplicates that are counted, and a split that was used as a whole, say more.
    seen = describe_seen(trained, name, split) if duplicates is None and used_for is None else None
    metrics = _score(of_run, record, predictions, duplicates=duplicates, seen=seen, is_own=is_own, test_opened=opened)
    found = compute_extra_metrics(extras, classifier, {"test": split}, {"test": predictions}, say=say)
    is_whole = run is not None and of_run is not None and data is None and wanted is None
    if is_whole and keep_extras(run, of_run, found) and say is not None:
        say(f"kept in {run.path}; dlfer report {run.path} writes its report with them")
    more = choose_changes(extras, found)
    more["judged_on"] = JudgedOn(split=split.name, file=_name_source(data or run.path), used_for=used_for)
    return metrics.model_copy(update=more), predictions


def _take_arrays(data: tuple[Any, Any], classifier: Engine) -> tuple[Split, tuple[str, ...]]:
    if len(data) != 2:
        raise DataError(f"data: found a tuple of {len(data)}, expected (images, labels).")
    return make_split(*data, names=classifier.labels)


def _name_source(source: Path | tuple[Any, Any]) -> str:
    return "arrays in memory" if isinstance(source, tuple) else str(source)


def prepare_as_trained(split: Split, classifier: Engine, say: Callable[[str], None] | None) -> Split:
    """Return the split with its faces found and evened out as the model's training data had them."""
    faces = classifier.about.faces
    if faces is None:
        return split
    split, found = prepare_split(split, FacesConfig.model_validate(faces), aspect=classifier.aspect, say=say)
    if say is not None and faces["detect"] != "none":
        say(f"faces: found in {found.sum():,} of {len(found):,} images; the others are used whole")
    return split


def _score(
    of_run: Metrics | None,
    record: ArtifactRecord,
    predictions: Predictions,
    *,
    duplicates: JudgedDuplicates | None,
    seen: str | None = None,
    is_own: bool,
    test_opened: int | None,
) -> Metrics:
    """Return the metrics; `duplicates` is None where the data that made the model is not there any more."""
    protocol = record.about.protocol or "not known"
    return compute_metrics_file(
        {"test": predictions},
        Metrics(
            protocol=protocol,
            banner=" ".join(filter(None, (seen, _describe_run(of_run, protocol, is_own=is_own)))) or None,
            selected_on=record.about.selected_on or "not known",
            duplicates=None if duplicates is None else duplicates.as_record(),
            temperature=record.temperature,
            abstain=None if of_run is None else of_run.abstain,
            test_opened=test_opened,
        ),
        without_duplicates_ids=None if duplicates is None else duplicates.list_ids_without(),
    )


def _load_sources(run: Run) -> tuple[Split, Split | None] | None:
    """Return the splits that trained and selected a run; None where its data is gone or streamed."""
    with contextlib.suppress(MissingDataError, ConfigError):
        bundle = _load_stage(run)
        if isinstance(bundle.train, Split):
            return bundle.train, bundle.validation if isinstance(bundle.validation, Split) else None
    return None


def _find_sources(folder: Path, csv: Path) -> tuple[Split, Split | None] | None:
    """Return the splits that trained and selected a run or shipped model, if exactly those images are in a csv.

    None if the training images are not; None for the split that selected it if that one is not.
    """
    splits = (DataRecord.read(folder) or DataRecord()).splits
    described = {name: splits[name].fingerprint if name in splits else None for name in ("train", "validation")}
    if not described["train"] or not (folder / CONFIG_FILE).is_file():
        return None
    with contextlib.suppress(UserError):
        stage = load_recorded_experiment(folder / CONFIG_FILE).finetune
        if stage.data.source != "fer2013":
            return None
        data = stage.data.model_copy(update={"path": str(csv)})
        bundle = load_data(data, image_size=stage.native_size, balance=stage.balance)
        found = {split: compute_fingerprint(getattr(bundle, split)) for split in described}
        if found["train"] == described["train"]:
            return bundle.train, bundle.validation if found["validation"] == described["validation"] else None
    return None


def tell_use(folder: Path, split: Split, *, is_own: bool) -> str | None:
    """Return what a model used a split for, "selection" or "training"; None for a split that it did not use.

    Args:
        folder: of its run, or of the shipped model; data.json in it has the splits' fingerprints.
        split: as it was loaded.
        is_own: whether it comes from the run's own data, so that its name says enough.
    """
    splits = (DataRecord.read(folder) or DataRecord()).splits
    for name, use in (("validation", "selection"), ("train", "training")):
        found = splits.get(name, SplitRecord())
        if split.name == found.name and (is_own or compute_fingerprint(split) == found.fingerprint):
            return use
    return None


def describe_seen(folder: Path, name: str, split: Split) -> str | None:
    """Say how many images of a split trained a model or selected it, pixel by pixel the same; None where none did.

    Args:
        folder: of its run, or of the shipped model, with the list of its images; without that list nothing is known.
        name: of the model, in the sentence.
        split: as it was loaded.
    """
    try:
        lists = read_npz(folder / IMAGES_FILE)
    except (OSError, ValueError):
        return None
    digests = shorten_digests(hash_images(split.images))
    none = np.zeros(0, digests.dtype)
    trained, selected = (
        np.isin(digests, shorten_digests(lists.get(f"{key}_digests", none))) for key in ("train", "validation")
    )
    counts = {"trained": trained.sum(), "selected": (selected & ~trained).sum()}
    found = [f"{count:,} of the {len(split):,} images {did} {name}" for did, count in counts.items() if count]
    if not found:
        return None
    return (
        f"{' and '.join(found)} (identical pixels; resized, recompressed or flipped copies are not counted), so its accuracy "
        "on them is too high."
    )


def _describe_run(of_run: Metrics | None, protocol: str, *, is_own: bool) -> str | None:
    """Return the banner: the run's, said to be of its own test split where other data are judged."""
    if of_run is not None:
        return f"Of the run itself: {of_run.banner}" if of_run.banner and not is_own else of_run.banner
    if protocol != "paper":
        return None
    return (
        "Trained under the published protocol: evaluated images may have a duplicate in training. Its run is not "
        "available to count them."
    )


def _is_own_data(run: Run, given: GivenData | None) -> bool:
    """Tell whether data is the run's own, so that an id means the same image in both."""
    if given is None:
        return True
    path = run.config().finetune.data.path
    with contextlib.suppress(ConfigError):
        paths = [found for found in (given.csv, given.config.path) if found is not None]
        return path is not None and resolve_path(path).resolve() in [resolve_path(str(p)).resolve() for p in paths]
    return False


def _load_stage(run: Run) -> DataBundle:
    stage = run.config().finetune
    return load_data(stage.data, image_size=stage.native_size, balance=stage.balance)


def _choose_split(bundle: DataBundle, wanted: str | None) -> tuple[Split, tuple[str, ...]]:
    default = bundle.test if bundle.test is not None else bundle.validation
    split = default if wanted is None else getattr(bundle, wanted)
    if not isinstance(split, Split):
        missing = f"no {wanted} split" if wanted else "no test split"
        raise UserError(f"evaluate: this run's data has {missing} in memory; name other data by --data DATA.")
    return split, bundle.labels


def load_split(
    path: Path, wanted: str | None, classifier: Engine | ForeignModel, say: Callable[[str], None] | None
) -> tuple[Split, tuple[str, ...], GivenData]:
    """Return the split of data that judges a model, by default the first of test, validation and train, its labels, and what it is.

    Raises:
        UserError: there are no images, or not the split that is wanted.
    """
    held, labels, given = load_held(path, classifier, say)
    if not held:
        raise UserError(f"{path}: found no images to evaluate on.")
    if wanted is not None and wanted not in held:
        found = ", ".join(f"{name} ({count_noun(len(split), 'image')})" for name, split in held.items())
        raise UserError(
            f"{path}: expected the split {wanted}, found {found}; choose another by --split, or leave it out."
        )
    return next(iter(held.values())) if wanted is None else held[wanted], labels, given
