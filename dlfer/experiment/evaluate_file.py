"""An external model, given as a file, evaluated like our own: same images, metrics and intervals, duplicates counted."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.files import fold_name
from dlfer.data.given import parse_split
from dlfer.data.labels import CANONICAL
from dlfer.errors import UserError
from dlfer.experiment.evaluate import load_split
from dlfer.experiment.extras import PLAIN, Extras, check_extras, choose_changes, compute_extra_metrics
from dlfer.experiment.splits import JudgedDuplicates, find_judged_duplicates
from dlfer.export.images import take_usage
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.predict.foreign import BATCH, OUTPUTS, ForeignModel, open_foreign, parse_input, to_probabilities
from dlfer.runs.files import hash_file
from dlfer.runs.metrics_record import ForeignModelRecord, JudgedOn, Metrics
from dlfer.runs.records import Temperature

BANNER = (
    "An external model: which images trained and selected it is not known to dlfer; these may be among them. Duplicates are "
    "those in the data's own training split."
)

_LABELS_FORM = 'expected a .txt with a label a line, or a .json with a list of labels or {"0": "angry", "1": ...}, in the order of the outputs'


@dataclass(frozen=True)
class FileModel:
    """An external model as its user describes it.

    Attributes:
        path: of the file.
        input: as `dlfer.predict.foreign.parse_input` reads it.
        labels: of its outputs, in order.
        output: one of `dlfer.predict.foreign.OUTPUTS`.
        ignore: labels whose outputs are left out.
        temperature: the number above 0 that its logits are divided by for calibrated probabilities; None: not known.
    """

    path: Path
    input: str
    labels: tuple[str, ...]
    output: str = "softmax"
    ignore: tuple[str, ...] = ()
    temperature: float | None = None


@dataclass(frozen=True)
class Alignment:
    """How the outputs of a model become probabilities under the labels of the data.

    Attributes:
        labels: of the data, then those that the model alone has.
        columns: for each of these labels, the column of the model's outputs; None: it has none.
        unknown: labels with images that the model has no output for.
    """

    labels: tuple[str, ...]
    columns: tuple[int | None, ...]
    unknown: tuple[str, ...] = ()

    def arrange(self, probabilities: np.ndarray) -> np.ndarray:
        """Return float32 [N, len(labels)] of the model's float [N, outputs]; rows are divided by their sum."""
        values = np.zeros((len(probabilities), len(self.columns)), np.float64)
        for index, column in enumerate(self.columns):
            if column is not None:
                values[:, index] = probabilities[:, column]
        sums = values.sum(axis=1, keepdims=True)
        return np.where(sums > 0, values / np.where(sums > 0, sums, 1), 1 / values.shape[1]).astype(np.float32)


@dataclass(frozen=True)
class AlignedModel:
    """An external model that answers under the labels of the data, as one of dlfer does.

    Attributes:
        given: its description.
        opened: its file.
        alignment: of its outputs.
    """

    given: FileModel
    opened: ForeignModel
    alignment: Alignment

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the columns of `predict`."""
        return self.alignment.labels

    def predict(self, images: np.ndarray, *, batch_size: int = BATCH) -> np.ndarray:
        """Return float32 [N, len(labels)], rows sum to one, of uint8 images [N, H, W, C]; the file sets the batch size."""
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

    Labels are matched by name, spellings of one expression alike. An output for a class that the data does not have is a
    wrong answer unless it is ignored; a class of the data without an output counts as wrong.

    Args:
        data, split: as `dlfer.experiment.evaluate.evaluate_model` takes them; data is needed.

    Returns:
        Metrics whose `test` are of the images, `test_without_duplicates` of those without a duplicate in the data's own
        Training (csv), and whose `foreign` is the description with the time that an image took.

    Raises:
        UserError: file, description, labels or data are wrong or do not fit.
    """
    if data is None:
        raise UserError("evaluate: an external model needs --data DATA to be evaluated on.")
    wanted = parse_split(split)
    check_extras(extras)
    columns, opened = _open(model)
    split, labels, given = load_split(Path(data), wanted, opened, say)
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
        without_duplicates_ids=None if duplicates is None else duplicates.list_ids_without(),
    )
    found = compute_extra_metrics(extras, aligned, {"test": split}, {"test": predictions}, say=say)
    more: dict[str, Any] = choose_changes(extras, found)
    more |= {
        "judged_on": JudgedOn(split=split.name, file=str(data)),
        "foreign": _describe(aligned, ms_per_image, opened.time_one(split.images)),
    }
    return metrics.model_copy(update=more), predictions


def _open(model: FileModel) -> tuple[list[int], ForeignModel]:
    """Return which outputs of a model are kept, and the model, opened.

    Raises:
        UserError: the description is missing, is not understood, or does not fit the file.
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
    return columns, open_foreign(model.path, given, len(model.labels))


def choose_columns(labels: Sequence[str], ignore: Sequence[str] = ()) -> list[int]:
    """Return which outputs are kept.

    Raises:
        UserError: a label is empty or stands twice, an ignored one is none of them, or fewer than two are left.
    """
    names = [_get_name(label) for label in labels]
    twice = [label for label, name in zip(labels, names, strict=True) if Counter(names)[name] > 1]
    if twice or not all(names):
        raise UserError(
            f"--labels {','.join(labels)}: found {', '.join(twice) or 'an empty name'}, expected a different name for each "
            "output, in the order of the outputs."
        )
    unknown = [label for label in ignore if _get_name(label) not in names]
    if unknown:
        raise UserError(f"--ignore: found {', '.join(unknown)}, expected some of --labels {','.join(labels)}.")
    ignored = {_get_name(label) for label in ignore}
    kept = [index for index, name in enumerate(names) if name not in ignored]
    if len(kept) < 2:
        raise UserError(f"--labels: found {len(kept)} that are not ignored, expected two or more.")
    return kept


def align_labels(split: Split, labels: Sequence[str], own: Sequence[str], kept: Sequence[int]) -> Alignment:
    """Match the labels of a model with those of the data, by name.

    Args:
        split: the images, with targets that index `labels`.
        own: of the model's outputs.
        kept: columns of the outputs that are not ignored.

    Raises:
        UserError: the model knows fewer than two labels of the data.
    """
    places = {_get_name(own[column]): column for column in kept}
    present = {labels[target] for target in np.unique(split.targets)}
    unknown = tuple(label for label in labels if label in present and _get_name(label) not in places)
    if len(present) - len(unknown) < min(2, len(present)):
        raise UserError(
            f"--labels: found {', '.join(own)}, of which the data's labels {', '.join(labels)} have less than two; expected "
            "names of the same classes, in the order of the outputs."
        )
    named = {_get_name(label) for label in labels}
    extra = [column for column in kept if _get_name(own[column]) not in named]
    columns = (*(places.get(_get_name(label)) for label in labels), *extra)
    return Alignment((*labels, *(own[column] for column in extra)), columns, unknown)


def read_labels(text: str) -> tuple[str, ...]:
    """Return labels in the order of the outputs: of a list with commas, or of a file.

    Args:
        text: "angry,disgust,..."; or the path of a .txt with a label a line, or of a .json with a list, or with an object
            whose keys are the numbers of the outputs, e.g. {"0": "angry"}, also under "id2label" as transformers writes it.

    Raises:
        UserError: the file is not there or holds something else.
    """
    path = Path(text)
    if path.suffix not in (".txt", ".json"):
        return tuple(name.strip() for name in text.split(","))
    try:
        contents = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
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
    """Return what labels are compared by: an expression's name in FER2013's spelling, or the name itself."""
    return CANONICAL.get(fold_name(label), fold_name(label))


def _find_duplicates(split: Split, csv: Path) -> JudgedDuplicates | None:
    """Return the duplicates in Training of the csv, and in PublicTest where another split is judged; None without Training."""
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
