"""An external model, given as a file, evaluated like our own: same images, metrics and intervals, duplicates counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.files import fold_name
from dlfer.data.given import parse_split
from dlfer.data.labels import CANONICAL
from dlfer.errors import UserError
from dlfer.experiment.evaluate import load_split
from dlfer.experiment.splits import JudgedDuplicates, find_judged_duplicates
from dlfer.export.images import take_usage
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.predict.foreign import BATCH, OUTPUTS, ForeignModel, open_foreign, parse_input, to_probabilities
from dlfer.runs.files import hash_file
from dlfer.runs.metrics_record import ForeignModelRecord, JudgedOn, Metrics

BANNER = (
    "An external model: which images trained and selected it is not known to dlfer; these may be among them. Duplicates are "
    "those in the data's own training part."
)


@dataclass(frozen=True)
class FileModel:
    """An external model as its user describes it.

    Attributes:
        path: of the file.
        input: as `dlfer.predict.foreign.parse_input` reads it.
        labels: of its outputs, in order.
        output: one of `dlfer.predict.foreign.OUTPUTS`.
        ignore: labels whose outputs are left out.
    """

    path: Path
    input: str
    labels: tuple[str, ...]
    output: str = "softmax"
    ignore: tuple[str, ...] = ()


def evaluate_file(
    model: FileModel,
    *,
    data: Path | None = None,
    split: str | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Metrics, Predictions]:
    """Evaluate an external model and return its metrics and its predictions.

    Labels are matched by name, spellings of one expression alike. An output for a class that the data does not have is a
    wrong answer unless it is ignored; a class of the data without an output counts as wrong.

    Args:
        model: the file and its description.
        data, split: as `dlfer.experiment.evaluate.evaluate_model` takes them; data is needed.
        say: is told what takes long.

    Returns:
        Metrics whose `test` are of the images, `test_without_duplicates` of those without a duplicate in the data's own
        Training (csv), and whose `foreign` is the description with the time that an image took.

    Raises:
        UserError: file, description, labels or data are wrong or do not fit.
    """
    if data is None:
        raise UserError("evaluate: an external model needs --data DATA to be judged on.")
    wanted = parse_split(split)
    columns, opened = _open(model)
    split, labels, given = load_split(Path(data), wanted, opened, say)
    start = time.perf_counter()
    outputs = opened.compute_outputs(split.images)
    ms_per_image = 1000 * (time.perf_counter() - start) / len(split)
    probabilities = to_probabilities(outputs, model.output, model.path)[:, columns]
    predictions, unknown = align_labels(split, labels, probabilities, [model.labels[column] for column in columns])
    duplicates = None if given.csv is None else _find_duplicates(split, given.csv)
    found = None if duplicates is None else duplicates.as_record()
    metrics = compute_metrics_file(
        {"test": predictions},
        Metrics(protocol="not known", banner=BANNER, selected_on="not known", duplicates=found),
        without_duplicates_ids=None if duplicates is None else duplicates.list_ids_without(),
    )
    more = {
        "judged_on": JudgedOn(split=split.name, file=str(data)),
        "foreign": _describe(model, opened, unknown, ms_per_image, opened.time_one(split.images)),
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


def align_labels(
    split: Split, labels: Sequence[str], probabilities: np.ndarray, own: Sequence[str]
) -> tuple[Predictions, list[str]]:
    """Return the predictions under the labels of the data, then those that the model alone has; and what it does not know.

    Args:
        split: the images, with targets that index `labels`.
        labels: of the data.
        probabilities: float [N, len(own)]; rows are divided by their sum.
        own: labels of the model's outputs.

    Raises:
        UserError: the model knows fewer than two labels of the data.
    """
    places = {_get_name(label): column for column, label in enumerate(own)}
    present = {labels[target] for target in np.unique(split.targets)}
    unknown = [label for label in labels if label in present and _get_name(label) not in places]
    if len(present) - len(unknown) < min(2, len(present)):
        raise UserError(
            f"--labels: found {', '.join(own)}, of which the data's labels {', '.join(labels)} have less than two; expected "
            "names of the same classes, in the order of the outputs."
        )
    named = {_get_name(label) for label in labels}
    extra = [column for column, label in enumerate(own) if _get_name(label) not in named]
    values = np.zeros((len(split), len(labels) + len(extra)), np.float64)
    for index, label in enumerate(labels):
        if _get_name(label) in places:
            values[:, index] = probabilities[:, places[_get_name(label)]]
    values[:, len(labels) :] = probabilities[:, extra]
    sums = values.sum(axis=1, keepdims=True)
    values = np.where(sums > 0, values / np.where(sums > 0, sums, 1), 1 / values.shape[1])
    names = (*labels, *(own[column] for column in extra))
    return Predictions(split.ids, names, split.targets, values), unknown


def _get_name(label: str) -> str:
    """Return what labels are compared by: an expression's name in FER2013's spelling, or the name itself."""
    return CANONICAL.get(fold_name(label), fold_name(label))


def _find_duplicates(split: Split, csv: Path) -> JudgedDuplicates | None:
    """Return the duplicates in Training of the csv, and in PublicTest where another part is judged; None without Training."""
    rows = load_fer2013_usage(csv, None)
    train, public = take_usage(rows, "Training"), take_usage(rows, "PublicTest")
    if train is None or split.name == "Training":
        return None
    return find_judged_duplicates("test", split, train=train, selection=None if split.name == "PublicTest" else public)


def _describe(
    model: FileModel, opened: ForeignModel, unknown: list[str], ms_per_image: float, ms_alone: float
) -> ForeignModelRecord:
    return ForeignModelRecord(
        file=str(model.path),
        sha256=hash_file(model.path),
        input=model.input,
        output=model.output,
        labels=list(model.labels),
        ignored=list(model.ignore),
        unknown=unknown,
        runtime=opened.runtime,
        batch_size=opened.batch or BATCH,
        ms_per_image=ms_per_image,
        ms_alone=ms_alone,
    )
