"""Evaluation of a trained model on its own run's data, a csv, a folder, arrays, or the data of another experiment.

External models, given as files, are evaluated likewise, on the same images and with the same metrics and intervals.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.load import load_recorded_experiment, resolve_path
from dlfer.config.names import expand_home
from dlfer.config.schema import StageConfig
from dlfer.config.sections import FacesConfig
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint, make_split
from dlfer.data.duplicates import hash_images, shorten_digests
from dlfer.data.faces import prepare_split
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.files import normalise_name
from dlfer.data.given import GivenData, parse_split
from dlfer.data.labels import CANONICAL, map_targets
from dlfer.data.sources import load_data
from dlfer.errors import ConfigError, DataError, MissingDataError, ModelError, UserError
from dlfer.experiment.extras import PLAIN, Extras, check_extras, choose_changes, compute_extra_metrics, keep_extras
from dlfer.experiment.lineage import trace_model
from dlfer.experiment.splits import EvaluationDuplicates, find_judged_duplicates
from dlfer.export.images import load_in_memory_splits, take_usage
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.predict.engines import Engine, load_engine
from dlfer.predict.external import BATCH, OUTPUTS, ExternalModel, open_external, parse_input, to_probabilities
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.changes import IMAGES_FILE
from dlfer.runs.files import hash_file, read_npz
from dlfer.runs.find import find_model, find_run_of
from dlfer.runs.metrics_record import LAST_EPOCH, ForeignModelRecord, JudgedOn, Metrics
from dlfer.runs.records import About, ArtifactRecord, DataRecord, SplitRecord, Temperature
from dlfer.runs.run import CONFIG_FILE, Run
from dlfer.runs.run_records import count_openings, ignore_read_only, log_opening, read_metrics
from dlfer.runs.text import count_noun


def evaluate_model(
    name: str,
    *,
    data: Path | tuple[Any, Any] | None = None,
    split: str | None = None,
    extras: Extras = PLAIN,
    say: Callable[[str], None] | None = None,
) -> Metrics:
    """Evaluate a trained model and return its metrics; the arguments are those of `evaluate_with_predictions`."""
    return evaluate_with_predictions(name, data=data, split=split, extras=extras, say=say)[0]


def evaluate_with_predictions(
    name: str,
    *,
    data: Path | tuple[Any, Any] | None = None,
    split: str | None = None,
    extras: Extras = PLAIN,
    say: Callable[[str], None] | None = None,
) -> tuple[Metrics, Predictions]:
    """Evaluate a trained model and return its metrics, and its predictions without test-time augmentation.

    Args:
        name: a run, an artifact folder, or a shipped model's name.
        data: a folder, a csv in the layout of FER2013, a zip with either, an .npz of arrays, or an experiment file
            whose `finetune.data` is used (with its aliases and drops); or (images, labels) as for `dlfer.evaluate`.
            None: a run is evaluated on its own data.
        split: "test", "validation" or "train", or FER2013's names for them. None: test, else validation, else train, or
            all images of data without splits.
        extras: additional evaluations to make.

    Returns:
        `test` has the metrics, `test_without_duplicates` those of the images without a duplicate in the data that
        trained or selected the model, if the run's data is available or the csv contains the same; `duplicates` has the
        counts. Temperature and threshold are those that were fitted on validation, by the run or, of an int8 file, by
        `dlfer ship`. `judged_on.used_for` says whether the model was trained, selected or calibrated on these images;
        see `get_previous_use`.

    Raises:
        UserError: the model or the data is not found, or the data does not fit the model.
    """
    wanted = parse_split(split)
    check_extras(extras)
    folder = find_model(name)
    classifier = load_engine(folder)
    run = find_run_of(folder)  # not by `name`: a shipped model's name may also be the beginning of a run's name
    record = read_artifact_record(folder)
    given = None
    if isinstance(data, tuple):
        if wanted is not None:
            raise UserError("evaluate: found a split with (images, labels), which are one; leave the split out.")
        if len(data) != 2:
            raise DataError(f"data: found a tuple of {len(data)}, expected (images, labels).")
        split, labels = make_split(*data, names=classifier.labels)
    elif data is not None:
        split, labels, given = load_split(expand_home(data), wanted, classifier, say)
    if data is not None:
        split = prepare_as_trained(split, classifier, say)
    elif run is not None:
        split, labels = _choose_split(_load_stage(run), wanted)
    else:
        raise UserError(f"evaluate: {name} is not a run with its own data; give the data with --data DATA.")
    trained = run.path if run is not None else folder
    is_own = run is not None and not isinstance(data, tuple) and _is_own_data(run, given)
    # If the run's own data is split in another way, its test split may contain images that trained the run.
    is_redivided = is_own and given is not None and _has_trained(run, split)
    is_own = is_own and not is_redivided
    used_for = "training" if is_redivided else get_previous_use(trained, split, is_own=is_own)
    is_validation = used_for in ("selection", "calibration")
    split = map_targets(split, labels, classifier.labels)
    check_extras(extras, split.ids)
    opened = None
    if run is not None:
        # If the run's own data is split in another way, the split is recorded by its fingerprint like other data.
        names = [found.name for found in (DataRecord.read(run.path) or DataRecord()).splits.values()]
        fingerprint = None if is_own and (split.name in names or not names) else compute_fingerprint(split)
        opened = count_openings(run.path, fingerprint)
        with ignore_read_only(run, f"this evaluation on {split.name} is not counted there", say):
            opened = log_opening(run, split.name, len(split), fingerprint=fingerprint)
    predictions = Predictions(split.ids, classifier.labels, split.targets, classifier.predict(split.images))
    sources, same_ids = (None if run is None else _load_sources(run)), is_own
    if sources is None and given is not None and given.csv is not None:
        # The fingerprints guarantee that these are the same images, so the ids mean the same as in the run.
        sources, same_ids = _find_sources(trained, given.csv), True
    duplicates = None
    if sources is not None:
        train, selection = sources[0], None if is_validation else sources[1]
        duplicates = find_judged_duplicates("test", split, train=train, selection=selection, same_ids=same_ids)
        own = run.config().finetune.data if is_own else None
        history = trace_model(folder, _load_section)
        in_pretrain = history.find_in_pretraining(split, own, with_selection=not is_validation)
        duplicates = replace(duplicates, in_pretrain=in_pretrain)
    of_run = read_metrics(trained)
    # Not needed if duplicates are counted or the split as a whole was used, since these are reported.
    seen = describe_seen(trained, name, split) if duplicates is None and used_for is None else None
    if duplicates is not None and used_for != "training" and not record.about.smoke:
        seen = duplicates.describe_leak()
    record = record.model_copy(update={"temperature": classifier.temperature_fit})
    metrics = _score(of_run, record, predictions, duplicates=duplicates, seen=seen, is_own=is_own, test_opened=opened)
    found = compute_extra_metrics(extras, classifier, {"test": split}, {"test": predictions}, say=say)
    is_whole = run is not None and of_run is not None and data is None and wanted is None
    if is_whole:
        with ignore_read_only(run, "what was evaluated here is not kept there", say):
            if keep_extras(run, of_run, found) and say is not None:
                say(f"kept in {run.path}; dlfer report {shlex.quote(str(run.path))} writes its report with them")
    more = choose_changes(extras, found)
    file = "arrays in memory" if isinstance(data, tuple) else str(data or run.path)
    more["judged_on"] = JudgedOn(split=split.name, file=file, used_for=used_for)
    return metrics.model_copy(update=more), predictions


def prepare_as_trained(split: Split, classifier: Engine, say: Callable[[str], None] | None) -> Split:
    """Return the split with faces cropped and equalised as in the model's training data."""
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
    duplicates: EvaluationDuplicates | None,
    seen: str | None = None,
    is_own: bool,
    test_opened: int | None,
) -> Metrics:
    """Return the metrics; `duplicates` is None if the data that the model was made from is not available."""
    protocol = record.about.protocol or "not known"
    return compute_metrics_file(
        {"test": predictions},
        Metrics(
            protocol=protocol,
            banner=" ".join(filter(None, (seen, _describe_run(of_run, protocol, is_own=is_own)))) or None,
            selected_on=(of_run or record.about).selected_on or "not known",
            is_selected=_is_selected(of_run, record.about),
            duplicates=None if duplicates is None else duplicates.as_record(),
            temperature=record.temperature,
            abstain=None if of_run is None else of_run.abstain,
            test_opened=test_opened,
        ),
        without_duplicates_ids=None if duplicates is None else duplicates.list_ids_without_duplicates(),
    )


def _load_sources(run: Run) -> tuple[Split, Split | None] | None:
    """Return the splits that trained and selected a run; None if its data is missing or streamed."""
    with contextlib.suppress(MissingDataError, ConfigError):
        bundle = _load_stage(run)
        if isinstance(bundle.train, Split):
            return bundle.train, bundle.validation if isinstance(bundle.validation, Split) else None
    return None


def _find_sources(folder: Path, csv: Path) -> tuple[Split, Split | None] | None:
    """Return the splits that trained and selected a run or shipped model, if a csv contains exactly these images.

    The result is None if the csv lacks the training images, and its second item if it lacks those that selected.
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


def get_previous_use(folder: Path, split: Split, *, is_own: bool) -> str | None:
    """Return what a model used a split for: "training", "selection", "calibration" (without selection), or None.

    Args:
        folder: the folder of the run or of the shipped model; its data.json has the splits' fingerprints.
        split: the split as loaded.
        is_own: whether it comes from the run's own data, so that comparing the name suffices.
    """
    splits = (DataRecord.read(folder) or DataRecord()).splits
    of_validation = "selection" if _is_selected_in(folder) else "calibration"
    for name, use in (("validation", of_validation), ("train", "training")):
        found = splits.get(name, SplitRecord())
        if split.name == found.name and (is_own or compute_fingerprint(split) == found.fingerprint):
            return use
    return None


def _is_selected(metrics: Metrics | None, about: About | None) -> bool:
    """Return whether the model was selected on validation; assumed if neither the metrics nor the artifact says so."""
    if metrics is not None:
        return metrics.is_selected
    return about is None or about.selected_on != LAST_EPOCH


def _is_selected_in(folder: Path) -> bool:
    """Return whether the model of a run, or the shipped model in a folder, was selected on validation."""
    record = None
    with contextlib.suppress(ModelError):  # damaged
        record = ArtifactRecord.read(folder) or ArtifactRecord.read(folder / "model")
    return _is_selected(read_metrics(folder), None if record is None else record.about)


def describe_seen(folder: Path, name: str, split: Split) -> str | None:
    """Return a sentence on how many images of a split trained or selected a model, by their pixels; None if none did.

    Args:
        folder: the folder of the run or of the shipped model; without a list of images in it the result is None.
        name: the model's name in the sentence.
        split: the split as loaded.
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
    counts = {"trained": trained.sum()}
    if _is_selected_in(folder):
        counts["selected"] = (selected & ~trained).sum()
    found = [f"{count:,} of the {len(split):,} images {did} {name}" for did, count in counts.items() if count]
    if not found:
        return None
    return (
        f"{' and '.join(found)} (identical pixels; resized, recompressed or flipped copies are not counted), so its accuracy "
        "on them is too high."
    )


def _describe_run(of_run: Metrics | None, protocol: str, *, is_own: bool) -> str | None:
    """Return the run's banner, marked as the run's own if other data is evaluated; without a run, one for `paper`."""
    if of_run is not None:
        return f"Of the run itself: {of_run.banner}" if of_run.banner and not is_own else of_run.banner
    if protocol != "paper":
        return None
    return (
        "Trained under the published protocol: evaluated images may have a duplicate in training. Its run is not "
        "available to count them."
    )


def _is_own_data(run: Run, given: GivenData | None) -> bool:
    """Return whether the data is the run's own, so that an id means the same image in both."""
    if given is None:
        return True
    path = run.config().finetune.data.path
    with contextlib.suppress(ConfigError):
        paths = [found for found in (given.csv, given.config.path) if found is not None]
        return path is not None and resolve_path(path).resolve() in [resolve_path(str(p)).resolve() for p in paths]
    return False


def _has_trained(run: Run, split: Split) -> bool:
    """Return whether an image of a split of the run's own data is in the list of its training images."""
    try:
        known = read_npz(run.path / IMAGES_FILE, names=("train_ids",))["train_ids"]
    except (OSError, ValueError):  # runs of older versions have no list
        return False
    return bool(np.isin(split.ids, known.astype(str)).any())


def _load_stage(run: Run) -> DataBundle:
    return _load_section(run.config().finetune)


def _load_section(stage: StageConfig) -> DataBundle:
    return load_data(stage.data, image_size=stage.native_size, balance=stage.balance)


def _choose_split(bundle: DataBundle, wanted: str | None) -> tuple[Split, tuple[str, ...]]:
    default = bundle.test if bundle.test is not None else bundle.validation
    split = default if wanted is None else getattr(bundle, wanted)
    if not isinstance(split, Split):
        missing = f"no {wanted} split" if wanted else "no test split"
        raise UserError(f"evaluate: this run's data has {missing} in memory; name other data by --data DATA.")
    return split, bundle.labels


def load_split(
    path: Path, wanted: str | None, classifier: Engine | ExternalModel, say: Callable[[str], None] | None
) -> tuple[Split, tuple[str, ...], GivenData]:
    """Return the split to evaluate on, by default the first of test, validation and train, its labels, and its source.

    Raises:
        UserError: there are no images, or the wanted split is absent.
    """
    held, labels, given = load_in_memory_splits(path, classifier, say)
    if not held:
        raise UserError(f"{path}: found no images to evaluate on.")
    if wanted is not None and wanted not in held:
        found = ", ".join(f"{name} ({count_noun(len(split), 'image')})" for name, split in held.items())
        raise UserError(
            f"{path}: expected the split {wanted}, found {found}; choose another by --split, or leave it out."
        )
    return next(iter(held.values())) if wanted is None else held[wanted], labels, given


BANNER = (
    "An external model: which images trained and selected it is not known to dlfer; these may be among them. Duplicates are "
    "those in the data's own training split."
)

_LABELS_FORM = 'expected a .txt with one label per line, or a .json with a list of labels or {"0": "angry", "1": ...}, in the order of the outputs'


@dataclass(frozen=True)
class FileModel:
    """The user's description of an external model.

    Attributes:
        path: of the file.
        input: the input format, in the syntax of `dlfer.predict.external.parse_input`.
        labels: of the outputs, in order.
        output: one of `dlfer.predict.external.OUTPUTS`.
        ignore: labels whose outputs are excluded.
        temperature: the number above 0 that logits are divided by for calibrated probabilities; None: unknown.
    """

    path: Path
    input: str
    labels: tuple[str, ...]
    output: str = "softmax"
    ignore: tuple[str, ...] = ()
    temperature: float | None = None


@dataclass(frozen=True)
class Alignment:
    """The mapping from a model's outputs to probabilities of the data's labels.

    Attributes:
        labels: those of the data, followed by those that only the model has.
        columns: for each of these labels the column of the model's outputs; None: the model has no such output.
        unknown: labels that have images but no output.
    """

    labels: tuple[str, ...]
    columns: tuple[int | None, ...]
    unknown: tuple[str, ...] = ()

    def arrange(self, probabilities: np.ndarray) -> np.ndarray:
        """Return float32 [N, len(labels)] of float [N, outputs], normalised; rows of zeros become uniform."""
        values = np.zeros((len(probabilities), len(self.columns)), np.float64)
        for index, column in enumerate(self.columns):
            if column is not None:
                values[:, index] = probabilities[:, column]
        sums = values.sum(axis=1, keepdims=True)
        return np.where(sums > 0, values / np.where(sums > 0, sums, 1), 1 / values.shape[1]).astype(np.float32)


@dataclass(frozen=True)
class AlignedModel:
    """An external model that predicts the labels of the data, with the interface of dlfer's own classifiers.

    Attributes:
        given: the user's description.
        opened: the loaded file.
        alignment: the mapping from its outputs to labels.
    """

    given: FileModel
    opened: ExternalModel
    alignment: Alignment

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the columns of `predict`."""
        return self.alignment.labels

    def predict(self, images: np.ndarray, *, batch_size: int = BATCH) -> np.ndarray:
        """Return float32 [N, len(labels)], rows sum to one, of uint8 images [N, H, W, C]; `batch_size` is ignored."""
        del batch_size
        outputs = self.opened.compute_outputs(images)
        return self.alignment.arrange(to_probabilities(outputs, self.given.output, self.given.path))


def evaluate_file(
    model: FileModel,
    *,
    data: Path | None = None,
    split: str | None = None,
    extras: Extras = PLAIN,
    say: Callable[[str], None] | None = None,
) -> tuple[Metrics, Predictions]:
    """Evaluate an external model and return its metrics and its predictions.

    Labels are matched by name, with different spellings of an expression treated as equal. A prediction of a class that
    the data lacks is wrong unless that output is ignored; images of a class without an output count as errors.

    Args:
        data, split: as for `evaluate_model`, but data is required.

    Returns:
        Metrics in `test`, those of the images without a duplicate in the csv's own Training split in
        `test_without_duplicates`, and the description of the model with the time per image in `foreign`.

    Raises:
        UserError: the file, the description, the labels or the data are invalid or do not fit each other.
    """
    if data is None:
        raise UserError("evaluate: an external model needs --data DATA to be evaluated on.")
    wanted = parse_split(split)
    check_extras(extras)
    columns, opened = _open(model)
    split, labels, given = load_split(expand_home(data), wanted, opened, say)
    check_extras(extras, split.ids)
    aligned = AlignedModel(model, opened, align_labels(split, labels, model.labels, columns))
    start = time.perf_counter()
    predictions = Predictions(split.ids, aligned.labels, split.targets, aligned.predict(split.images))
    ms_per_image = 1000 * (time.perf_counter() - start) / len(split)
    temperature = None
    if model.temperature is not None:
        temperature = Temperature(value=model.temperature, fitted_on="not known", note="given by --temperature")
    duplicates = None if given.csv is None else _find_duplicates(split, given.csv)
    metrics = compute_metrics_file(
        {"test": predictions},
        Metrics(
            protocol="not known",
            banner=BANNER,
            selected_on="not known",
            duplicates=None if duplicates is None else duplicates.as_record(),
            temperature=temperature,
        ),
        without_duplicates_ids=None if duplicates is None else duplicates.list_ids_without_duplicates(),
    )
    found = compute_extra_metrics(extras, aligned, {"test": split}, {"test": predictions}, say=say)
    more: dict[str, Any] = choose_changes(extras, found)
    more |= {
        "judged_on": JudgedOn(split=split.name, file=str(data)),
        "foreign": _describe(aligned, ms_per_image, opened.time_one(split.images)),
    }
    return metrics.model_copy(update=more), predictions


def _open(model: FileModel) -> tuple[list[int], ExternalModel]:
    """Return the columns of a model's outputs to keep, and the loaded model.

    Raises:
        UserError: the description is missing, invalid, or does not fit the file.
    """
    if not model.input or not model.labels:
        raise UserError(
            f'{model.path}: an external model needs --input, what it takes ("48x48 gray /255"), and --labels, the names of its '
            "outputs in order (angry,disgust,fear,happy,sad,surprise,neutral)."
        )
    if model.temperature is not None and not 0 < model.temperature < float("inf"):
        raise UserError(f"--temperature: found {model.temperature:g}, expected a number above 0.")
    if model.output not in OUTPUTS:
        raise UserError(f"--output: found {model.output!r}, expected one of {', '.join(OUTPUTS)}.")
    given, columns = parse_input(model.input), choose_columns(model.labels, model.ignore)
    return columns, open_external(model.path, given, len(model.labels))


def choose_columns(labels: Sequence[str], ignore: Sequence[str] = ()) -> list[int]:
    """Return the columns of the outputs that are not ignored.

    Raises:
        UserError: a label is empty or repeated, an ignored one is not among them, or fewer than two are left.
    """
    names = [normalise_name(label) for label in labels]
    twice = [label for label, name in zip(labels, names, strict=True) if Counter(names)[name] > 1]
    if twice or not all(names):
        raise UserError(
            f"--labels {','.join(labels)}: found {', '.join(twice) or 'an empty name'}, expected a different name for each "
            "output, in the order of the outputs."
        )
    known = {*names, *map(_get_name, labels)}
    unknown = [label for label in ignore if normalise_name(label) not in known and _get_name(label) not in known]
    if unknown:
        raise UserError(f"--ignore: found {', '.join(unknown)}, expected some of --labels {','.join(labels)}.")
    # Ignore the output of exactly this name, or, if there is none, those with another spelling of it.
    ignored = {name if (name := normalise_name(label)) in names else _get_name(label) for label in ignore}
    kept = [index for index, label in enumerate(labels) if not {names[index], _get_name(label)} & ignored]
    if len(kept) < 2:
        raise UserError(f"--labels: found {len(kept)} that are not ignored, expected two or more.")
    return kept


def align_labels(split: Split, labels: Sequence[str], own: Sequence[str], kept: Sequence[int]) -> Alignment:
    """Match the labels of a model with those of the data, by name.

    Args:
        split: the images, with targets that are indices into `labels`.
        labels: of the data.
        own: of the model's outputs.
        kept: columns of the outputs that are not ignored.

    Raises:
        UserError: fewer than two labels with images have an output (if only one has images: it has none).
    """
    matched = _match_columns(labels, own, kept)
    present = {labels[target] for target in np.unique(split.targets)}
    unknown = tuple(label for label, column in zip(labels, matched, strict=True) if label in present and column is None)
    if len(present) - len(unknown) < min(2, len(present)):
        raise UserError(
            f"--labels: found {', '.join(own)}, of which the data's labels {', '.join(labels)} have less than two; expected "
            "names of the same classes, in the order of the outputs."
        )
    extra = [column for column in kept if column not in matched]
    return Alignment((*labels, *(own[column] for column in extra)), (*matched, *extra), unknown)


def _match_columns(labels: Sequence[str], own: Sequence[str], kept: Sequence[int]) -> list[int | None]:
    """Return the column of each label of the data: of the output with the same name or another spelling of it, or None.

    Another spelling of an expression matches only if exactly one label and one output for this expression are left.
    """
    exact = {normalise_name(own[column]): column for column in kept}
    matched = [exact.get(normalise_name(label)) for label in labels]
    rest = Counter(_get_name(label) for label, column in zip(labels, matched, strict=True) if column is None)
    left = [column for column in kept if column not in matched]
    of_name = Counter(_get_name(own[column]) for column in left)
    others = {name: column for column in left if rest[name := _get_name(own[column])] == of_name[name] == 1}
    return [
        others.get(_get_name(label)) if column is None else column
        for label, column in zip(labels, matched, strict=True)
    ]


def read_labels(text: str) -> tuple[str, ...]:
    """Return labels in the order of the outputs, from a comma-separated list or a file.

    Args:
        text: "angry,disgust,..."; or the path of a .txt with one label per line, or of a .json with a list, or with an
            object whose keys are the indices of the outputs, e.g. {"0": "angry"}, also (transformers) as "id2label".

    Raises:
        UserError: the file cannot be read or has another structure.
    """
    path = Path(text)
    suffix = path.suffix.casefold()
    if suffix not in (".txt", ".json"):
        return tuple(name.strip() for name in text.split(","))
    try:
        contents = path.read_text(encoding="utf-8-sig")
        if suffix == ".txt":
            return tuple(line.strip() for line in contents.splitlines() if line.strip())
        found = json.loads(contents)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--labels {path}: cannot be read ({error}); {_LABELS_FORM}.") from error
    found = found.get("id2label", found) if isinstance(found, dict) else found
    if isinstance(found, dict) and sorted(found) == sorted(map(str, range(len(found)))):
        found = [found[str(number)] for number in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"--labels {path}: found something else; {_LABELS_FORM}.")
    return tuple(name.strip() for name in found)


def _get_name(label: str) -> str:
    """Return the name by which labels are compared: that of the expression in FER2013, or else the normalised label."""
    return CANONICAL.get(normalise_name(label), normalise_name(label))


def _find_duplicates(split: Split, csv: Path) -> EvaluationDuplicates | None:
    """Return the duplicates in the csv's Training and, unless that is evaluated, PublicTest; None without Training."""
    rows = load_fer2013_usage(csv, None)
    train, public = take_usage(rows, "Training"), take_usage(rows, "PublicTest")
    if train is None or split.name == "Training":
        return None
    return find_judged_duplicates("test", split, train=train, selection=None if split.name == "PublicTest" else public)


def _describe(aligned: AlignedModel, ms_per_image: float, ms_alone: float) -> ForeignModelRecord:
    model, opened = aligned.given, aligned.opened
    return ForeignModelRecord(
        file=str(model.path),
        sha256=hash_file(model.path),
        size_bytes=model.path.stat().st_size,
        input=model.input,
        output=model.output,
        labels=list(model.labels),
        ignored=list(model.ignore),
        unknown=list(aligned.alignment.unknown),
        runtime=opened.runtime,
        batch_size=opened.batch or BATCH,
        ms_per_image=ms_per_image,
        ms_alone=ms_alone,
    )
