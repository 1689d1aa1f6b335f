"""Selection of the images on which a model's exports are compared and calibrated, with descriptions of their origin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig, FacesConfig, NumImages
from dlfer.data.bundle import DataBundle, Split, compute_fingerprint
from dlfer.data.duplicates import hash_images
from dlfer.data.faces import prepare_split
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.given import OFFICIAL, SPLITS, GivenData, open_data
from dlfer.data.images import match_channels
from dlfer.data.labels import map_targets
from dlfer.data.sources import load_data, load_source_splits
from dlfer.data.split import draw_subset
from dlfer.errors import ConfigError, DataError, MissingDataError, ModelError, UserError
from dlfer.export.contract import Sample
from dlfer.predict.engines import Engine
from dlfer.predict.external import ExternalModel
from dlfer.runs.changes import IMAGES_FILE
from dlfer.runs.files import read_npz
from dlfer.runs.records import ArtifactRecord, DataRecord
from dlfer.runs.run import Run

if TYPE_CHECKING:
    from dlfer.model.classifier import Classifier

NUM_COMPARED, NUM_CALIBRATION, NUM_DRAWN = 4000, 200, 256
"""Maximum numbers of images for comparison and for calibration; number of faces drawn for comparison without images."""

_DRAWN = "faces drawn by dlfer, not photographs"


@dataclass(frozen=True)
class _Sets:
    """Images for comparison and for calibration.

    Attributes:
        compared, calibration: uint8 images of any size and number of channels.
        source, calibration_source: descriptions of their origin.
        is_labelled: whether the targets are indices of the classifier's labels.
        validation: `compared`, if it is the validation split on which the run fitted its temperature, else None.
    """

    compared: Split
    source: str
    calibration: Split
    calibration_source: str
    is_labelled: bool = True
    validation: Split | None = None


def gather_sample(
    classifier: Classifier,
    record: ArtifactRecord | None,
    *,
    run: Run | None,
    data: Path | None,
    say: Callable[[str], None],
) -> Sample:
    """Return images of `data`, else of the model's own run, else synthetic faces.

    `data` is as for `dlfer.export.exporters.export_model`; `run` is the run that trained the model; `record` is needed
    only with `data`.

    Raises:
        UserError: `data` is not found, or does not match the labels.
    """
    sets = None
    if data is not None:
        sets = _load_given(data, classifier, record, say)
    elif run is not None:
        sets = _load_own(run, classifier, say)
    if sets is None:
        say("found no run whose data could be compared on (use --data PATH); comparing on faces drawn by dlfer")
        sets = _draw_faces(classifier)
    compared = draw_subset(sets.compared, NUM_COMPARED, seed=0)
    calibration = draw_subset(sets.calibration, NUM_CALIBRATION, seed=0)
    return Sample(
        images=match_channels(compared.images, classifier.channels),
        source=sets.source,
        calibration=match_channels(calibration.images, classifier.channels),
        calibration_source=sets.calibration_source,
        targets=compared.targets if sets.is_labelled else None,
        validation=sets.validation,
        is_drawn=sets.source == _DRAWN,
    )


def find_native_size(run: Run | None) -> tuple[int, int] | None:
    """Return (H, W) of the images that a run's model was trained on, or None if the run does not record it."""
    if run is None:
        return None
    with contextlib.suppress(ModelError):
        train = DataRecord.require(run.path).splits.get("train")
        return None if train is None or train.shape is None else (train.shape[0], train.shape[1])
    return None


def _load_own(run: Run, classifier: Classifier, say: Callable[[str], None]) -> _Sets | None:
    """Return the validation and training images of a run; None if its data is absent, damaged, changed or streamed."""
    stage = run.config().finetune
    say(f"loading the data of {run.path}")
    try:
        bundle = load_data(stage.data, image_size=stage.native_size, balance=stage.balance, say=say)
    except (MissingDataError, ConfigError):
        return None
    except DataError as error:
        say(f"the data of {run.path} cannot be read any more: {error}")
        return None
    if not isinstance(bundle.validation, Split) or not isinstance(bundle.train, Split):
        return None
    if not _has_same_images(run, bundle):
        say(f"the data of {run.path} has changed since it was trained, so it is not compared on")
        return None
    validation = map_targets(bundle.validation, bundle.labels, classifier.labels)
    recorded = (DataRecord.read(run.path) or DataRecord()).splits.get("validation")
    is_known = recorded is not None and recorded.fingerprint == compute_fingerprint(bundle.validation)
    return _Sets(
        validation,
        f"validation of its run: {bundle.validation.name} of {bundle.source}",
        bundle.train,
        f"training images of its run: {bundle.train.name} of {bundle.source}",
        validation=validation if is_known else None,
    )


def _has_same_images(run: Run, bundle: DataBundle) -> bool:
    """Return whether labels and validation images are those that a run started with; True without a list of these."""
    try:
        known = read_npz(run.path / IMAGES_FILE, names=("labels", "validation_digests"))
    except (OSError, ValueError):  # earlier versions wrote no such list
        return True
    return known["labels"].tolist() == list(bundle.labels) and np.array_equal(
        np.sort(known["validation_digests"]), np.sort(hash_images(bundle.validation.images))
    )


def _load_given(path: Path, classifier: Classifier, record: ArtifactRecord, say: Callable[[str], None]) -> _Sets:
    """Return the images of a file or folder; a test split is used only if there is no other."""
    held, labels, _ = load_in_memory_splits(path, classifier, say)
    name = next((name for name in ("validation", "train", "test", "all") if name in held), None)
    if name is None:
        raise UserError(f"{path}: found no images to compare on.")
    compared, train, note = held[name], held.get("train") if name != "train" else None, ""
    if train is None:
        compared, train, note = _divide(compared)
    faces = record.about.faces
    if faces is not None:
        section = FacesConfig.model_validate(faces)
        compared, train = (
            prepare_split(draw_subset(split, number, seed=0), section, aspect=classifier.aspect, say=say)[0]
            for split, number in ((compared, NUM_COMPARED), (train, NUM_CALIBRATION))
        )
    compared = map_targets(compared, labels, classifier.labels)
    return _Sets(compared, f"{compared.name} of {path}{note}", train, f"{train.name} of {path}{note}")


def take_usage(split: Split, usage: str) -> Split | None:
    """Return the rows of a FER2013 csv with this Usage; None if there are none."""
    rows = np.flatnonzero(np.char.startswith(split.ids, f"{usage}/"))
    return split.take(rows, usage) if len(rows) else None


def load_in_memory_splits(
    path: Path, classifier: Classifier | Engine | ExternalModel, say: Callable[[str], None] | None = None
) -> tuple[dict[str, Split], tuple[str, ...], GivenData]:
    """Return the splits with images in memory, test first, the labels, and the recognised data.

    Data without splits is not divided: a csv without a column Usage has the single split "all".

    Args:
        path: data of a kind that `dlfer.data.given.recognise` knows; of an experiment file, `finetune.data` is loaded.
        classifier: the model that will receive the images; images of several sizes are made square as it does.
        say: called with lines about what was read, used and left out.
    """
    with open_data(path) as given:
        if given.csv is not None:
            for line in given.notes if say else ():
                say(line)
            rows = load_fer2013_usage(given.csv, None)
            held = {name: take_usage(rows, usage) for name, usage in OFFICIAL.items()}
            held = {name: split for name, split in held.items() if split is not None}
            return held or {"all": rows}, FER2013_LABELS, given
        config = given.config.model_copy(update={"aspect": classifier.aspect})
        bundle = load_source_splits(config, image_size=classifier.image_size)
    reading = bundle.reading.as_record()
    for line in [*(reading.describe() if reading else []), *bundle.notes] if say else ():
        say(line)
    splits = {name: getattr(bundle, name) for name in SPLITS}
    held = {name: split for name, split in splits.items() if isinstance(split, Split) and len(split)}
    return held, bundle.labels, given


def _divide(split: Split) -> tuple[Split, Split, str]:
    """Divide one split into images for comparison and for calibration; return both, and a note about it."""
    calibration = draw_subset(split, min(NUM_CALIBRATION, len(split) // 2), seed=0)
    if not len(calibration):
        return split, split, ""
    rest = np.flatnonzero(~np.isin(split.ids, calibration.ids))
    return split.take(rest), calibration, ", divided at random into images for comparison and for calibration"


def _draw_faces(classifier: Classifier) -> _Sets:
    numbers = NumImages(train=NUM_CALIBRATION, validation=NUM_DRAWN, test=1)
    drawn = load_data(DataConfig(source="synthetic_faces", num_images=numbers), image_size=classifier.image_size)
    return _Sets(drawn.validation, _DRAWN, drawn.train, _DRAWN, is_labelled=False)
