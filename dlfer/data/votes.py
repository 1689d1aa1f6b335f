"""Votes of several annotators on each image, as in FER+: agreement with the labels and with each other, and the
shares of the votes as soft targets for training."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlfer.config.names import expand_home
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import split_ids
from dlfer.data.files import normalise_name
from dlfer.data.labels import CANONICAL, SPELLINGS
from dlfer.data.survey import MAX_LISTED
from dlfer.errors import DataError, MissingDataError
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.runs.audit_record import ContestedImage, VoteShares, VoteSummary
from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.text import open_text, read_records

DEFINITION = (
    "The plurality of an image is the label with most votes, over all columns of the file (contempt, unknown and no "
    "face, too), where those of classes that data.labels.aliases makes one label are one; ties are shared equally. The agreement of one annotator is how often an annotator, drawn at random, "
    "agrees with the plurality of the others."
)
_COLUMNS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "nf")
_FERPLUS_NAME = re.compile(r"fer(\d{7})\.png", re.ASCII)
_BESIDE = ("usage", "row", "image name", "image", "id", "")


@dataclass(frozen=True)
class Votes:
    """The contents of a file of votes, sorted by the column row if there is one, else in the file's order.

    Attributes:
        path: the file.
        columns: the options that could be voted for, as spelled in the header.
        counts: int64 [M, V], number of votes in each row for each column.
        usages: str [M], the column Usage; None without one.
        ids: str [M], the column id; None without one.
    """

    path: Path
    columns: tuple[str, ...]
    counts: np.ndarray
    usages: np.ndarray | None
    ids: np.ndarray | None


def read_votes(path: str | Path) -> Votes:
    """Read FER+'s `fer2013new.csv` as published, or any csv with a column of vote counts per expression.

    All columns except Usage, row, "Image name", image and id hold votes. With a column id, each row belongs to
    the image with that id. Otherwise row i belongs to row i of the data, sorted by the column row if there is
    one, else in the file's order; rows with an empty image name count as well.

    Raises:
        MissingDataError: the file does not exist.
        DataError: the header has no columns of votes; a row has too few fields or a count that is not a whole number
            from 0; a number in row or an id occurs twice; or FER+'s image names are not in ascending order, so that
            the rows cannot be matched with those of the data.
    """
    path = expand_home(path)
    if not path.is_file():
        raise MissingDataError(
            f"{path}: there is no such file of votes. FER+ is published as fer2013new.csv at github.com/microsoft/FERPlus."
        )
    counts, fields, lines = [], [], []
    try:
        with open_text(path) as stream:
            records = read_records(stream)
            header = [name.strip() for name in next(records, (1, []))[1]]
            names, columns = _match_header(path, header)
            for line, row in records:
                if row:
                    counts.append(_parse_counts(path, line, row, columns, len(header)))
                    fields.append([text.strip() for text in row])
                    lines.append(line)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path.name}: not a csv ({error}); download the file again.") from error
    if not counts:
        raise DataError(f"{path.name}: found a header and no rows, expected one per image.")
    beside = {
        name: [row[names.index(name)] for row in fields] if name in names else None
        for name in ("usage", "id", "row", "image name")
    }
    repeated = _find_repeated(beside["id"] or [])
    if repeated is not None:
        raise DataError(
            f"{path.name}: the id {repeated[:80]!r} occurs more than once; expected one row of votes per image."
        )
    order = _order_rows(path, lines, beside["row"], beside["image name"])
    usages, ids = (None if beside[name] is None else np.array(beside[name])[order] for name in ("usage", "id"))
    chosen = tuple(header[place] for place in columns)
    return Votes(path, chosen, np.array(counts, np.int64)[order], usages, ids)


def _find_repeated(names: list[str]) -> str | None:
    return next((name for name, n in Counter(names).items() if name and n > 1), None)


def _order_rows(path: Path, lines: list[int], rows: list[str] | None, image_names: list[str] | None) -> np.ndarray:
    """Return int64 [M], the indices that sort the rows of a file of votes into the order of the data's rows.

    Args:
        lines: line number of each row.
        rows: the column row, numbers of rows of the data; None without it.
        image_names: the column "Image name"; FER+ numbers images from fer0000000.png on in the order of FER2013.

    Raises:
        DataError: a row number is invalid or occurs twice; without row numbers, FER+'s names are not ascending.
    """
    if rows is not None:
        wrong = next((place for place, text in enumerate(rows) if not _is_count(text)), None)
        if wrong is not None:
            raise DataError(
                f"{path.name} line {lines[wrong]}: found {rows[wrong][:40]!r} in the column row, expected the number of a row of the "
                "data. Correct it, or remove the column if the rows are in the order of the data."
            )
        repeated = _find_repeated(rows)
        if repeated is not None:
            raise DataError(
                f"{path.name}: the row {repeated} occurs more than once in the column row; expected one row of votes per image. "
                "Correct it, or remove the column if the rows are in the order of the data."
            )
        return np.argsort(np.array(rows, np.int64), kind="stable")
    numbered = [
        (place, found[1]) for place, name in enumerate(image_names or []) if (found := _FERPLUS_NAME.fullmatch(name))
    ]
    for (_, before), (place, number) in itertools.pairwise(numbered):
        if int(number) <= int(before):
            raise DataError(
                f"{path.name} line {lines[place]}: found the image fer{number}.png after fer{before}.png; FER+ has its images in the "
                "order of FER2013's rows, by which votes are matched. Sort the rows as they were published, or download the file again."
            )
    return np.arange(len(lines))


def merge_columns(votes: Votes, aliases: Mapping[str, str]) -> Votes:
    """Return the votes with the columns of classes that `data.labels.aliases` merges into one label summed.

    Args:
        votes: the votes as returned by `read_votes`.
        aliases: class name -> label, in any spelling.
    """
    if not aliases:
        return votes
    renamed = {_name_meaning(name): label for name, label in aliases.items()}
    groups: dict[str, list[int]] = {}
    names: dict[str, str] = {}
    for place, column in enumerate(votes.columns):
        name = renamed.get(_name_meaning(column), column)
        names.setdefault(_name_meaning(name), name)
        groups.setdefault(_name_meaning(name), []).append(place)
    counts = np.stack([votes.counts[:, places].sum(axis=1) for places in groups.values()], axis=1)
    return dataclasses.replace(votes, columns=tuple(names.values()), counts=counts)


def _name_meaning(name: str) -> str:
    """Return a key that is equal for all spellings of an expression."""
    return CANONICAL.get(normalise_name(name), normalise_name(name))


def align_votes(votes: Votes, splits: list[Split], num_rows: int | None = None) -> list[np.ndarray]:
    """Return int64 [N, V] for each split: the votes on each image, or a row of -1 if it has none.

    Votes with ids are matched by id. Otherwise they are matched by row: an image's id ends in the number of
    its csv row ("Training/17"), and the votes must have as many rows as the csv, or as its Usages, in the
    same order. Augmented copies have no votes of their own.

    Args:
        votes: the votes as returned by `read_votes`.
        splits: images with the ids that the source assigned.
        num_rows: rows of the csv, including unreadable ones; None: unknown, and assumed to match the votes.

    Raises:
        DataError: no id matches, the numbers of rows do not match, a row has another Usage than its image, or
            the images' ids have no row numbers.
    """
    if votes.ids is not None:
        places = {name: row for row, name in enumerate(votes.ids.tolist())}
        found = [np.array([places.get(str(name), -1) for name in split.ids], np.int64) for split in splits]
        if not any((rows >= 0).any() for rows in found):
            raise DataError(
                f"{votes.path.name}: none of its {len(places)} ids is that of an image; e.g. {str(splits[0].ids[0])!r}."
            )
        return [np.where(rows[:, None] >= 0, votes.counts[rows], -1) for rows in found]
    counts, usages = _match_rows(votes, splits, num_rows)
    aligned, taken = [], np.zeros(0, np.int64)
    for split in splits:
        copied = split_ids(split.ids)[1]
        rows = np.array([_get_row(votes, name) for name in split.ids], np.int64)
        if len(rows) and rows.max() >= len(counts):
            raise DataError(
                f"{votes.path.name}: found {len(counts)} rows of votes, but the data has a row {rows.max()} (from 0); "
                "expected a row of votes for each row of the csv, in its order."
            )
        if np.isin(rows[~copied], taken).any():
            raise DataError(
                f"{votes.path.name}: rows of votes go with the rows of one csv, and the data comes from several; "
                "expected a column id in the csv of votes."
            )
        if usages is not None:
            _check_usages(votes, split, rows, usages)
        taken = np.concatenate([taken, rows[~copied]])
        values = counts[rows]
        values[copied] = -1
        aligned.append(values)
    return aligned


def score_votes(votes: Votes, splits: list[Split], labels: tuple[str, ...], num_rows: int | None = None) -> VoteSummary:
    """Return how often the votes confirm the labels, as shares with Wilson's intervals.

    Args:
        votes, splits, num_rows: as for `align_votes`.
        labels: names of the targets; each must be a column, in any known spelling.

    Raises:
        DataError: as `align_votes`, or a label has no column.
    """
    lookup = np.array([find_column(votes, label) for label in labels])
    aligned = align_votes(votes, splits, num_rows)
    counts = np.concatenate(aligned)
    voted = np.flatnonzero(counts.sum(axis=1) > 0)  # also excludes the rows of -1
    counts = counts[voted]
    targets = np.concatenate([split.targets for split in splits])[voted]
    names = np.repeat([split.name for split in splits], [len(split) for split in splits])[voted]
    ids = np.concatenate([split.ids for split in splits])[voted]
    agrees = compute_agreement(counts, lookup[targets])
    ceiling = compute_annotator_agreement(counts)
    shares = {
        split.name: VoteShares(
            agreement=_estimate_share(agrees[names == split.name]),
            ceiling=_estimate_share(ceiling[names == split.name]),
        )
        for split in splits
    }
    return VoteSummary(
        file=votes.path.name,
        definition=DEFINITION,
        n=len(voted),
        agreement=_estimate_share(agrees),
        ceiling=_estimate_share(ceiling),
        splits=shares,
        labels={label: _estimate_share(agrees[targets == index]) for index, label in enumerate(labels)},
        contested=_list_contested(votes, counts, [labels[target] for target in targets], names, ids),
    )


def compute_agreement(counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return float64 [N] in [0, 1]: 1 if the chosen column has most votes, 1/k if it ties with k - 1 others, else 0.

    Args:
        counts: int [N, V], votes for each column.
        chosen: int [N], a column for each image.
    """
    first = counts == counts.max(axis=1, keepdims=True)
    return first[np.arange(len(counts)), chosen] / first.sum(axis=1)


def compute_annotator_agreement(counts: np.ndarray) -> np.ndarray:
    """Return float64 [N] in [0, 1]: the probability that a voter agrees with the plurality of the image's other voters.

    It is the mean over the voters; if k columns tie for the plurality of the others, agreement with one of
    them counts 1/k. An image with fewer than two votes gets NaN.

    Args:
        counts: int [N, V], votes for each column.
    """
    total = counts.sum(axis=1)
    agreed = np.zeros(len(counts))
    for column in range(counts.shape[1]):
        others = counts.copy()
        others[:, column] -= 1  # -1 if nobody voted for the column, but such a row has weight 0 below
        agreed += counts[:, column] * compute_agreement(others, np.full(len(counts), column))
    return np.divide(agreed, total, out=np.full(len(counts), np.nan), where=total >= 2)


def _match_header(path: Path, header: list[str]) -> tuple[list[str], list[int]]:
    """Return the names of all columns in lower case, and the positions of the columns of votes."""
    names = [normalise_name(name) for name in header]
    columns = [place for place, name in enumerate(names) if name not in _BESIDE]
    if len(columns) < 2 or not set(_COLUMNS) & set(names):
        raise DataError(
            f"{path.name} line 1: found the columns {', '.join(header[:12])[:200]}, expected a column of votes for "
            f"each expression, such as {', '.join(_COLUMNS)}."
        )
    return names, columns


def _parse_counts(path: Path, line: int, row: list[str], columns: list[int], num_fields: int) -> list[int]:
    if len(row) < num_fields:
        raise DataError(f"{path.name} line {line}: found {len(row)} fields, expected {num_fields}; the row is cut.")
    found = [row[place].strip() for place in columns]
    wrong = next((text for text in found if not _is_count(text)), None)
    if wrong is not None:
        raise DataError(f"{path.name} line {line}: found {wrong[:40]!r} as a number of votes, expected a whole number.")
    return [int(text) for text in found]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _match_rows(votes: Votes, splits: list[Split], num_rows: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the counts and Usages (None without them) of the rows that belong to the data, as many as it has."""
    if num_rows is None or len(votes.counts) == num_rows:
        return votes.counts, votes.usages
    found = f"{votes.path.name}: found {len(votes.counts):,} rows of votes"
    if votes.usages is not None:
        present = {_get_usage(name) for split in splits for name in split.ids}
        chosen = np.isin(votes.usages, sorted(present))
        if int(chosen.sum()) == num_rows:
            return votes.counts[chosen], votes.usages[chosen]
        found += f", {int(chosen.sum()):,} of them of Usage {', '.join(sorted(present))}"
    raise DataError(
        f"{found}, and {num_rows:,} rows of data; expected a row of votes for each row of the csv, in its order. "
        "Give the votes of this very csv, or a csv of votes with a column id."
    )


def _check_usages(votes: Votes, split: Split, rows: np.ndarray, usages: np.ndarray) -> None:
    own = np.array([_get_usage(name) for name in split.ids], dtype=str)
    wrong = np.flatnonzero((own != usages[rows]) & np.isin(own, usages))
    if len(wrong):
        raise DataError(
            f"{votes.path.name}: row {rows[wrong[0]]} (from 0) is of Usage {str(usages[rows[wrong[0]]])!r}, the image of that "
            f"row has the id {str(split.ids[wrong[0]])!r}; expected the rows in the order of the csv."
        )


def _get_usage(name: str) -> str:
    return str(name).rpartition("/")[0]


def _get_row(votes: Votes, name: str) -> int:
    row = split_ids(np.array([name]))[0][0].rpartition("/")[2]
    if not (row.isascii() and row.isdigit()):
        raise DataError(
            f"{votes.path.name}: rows of votes go with rows of a csv, and the image {str(name)!r} is not from one; "
            "expected a column id in the csv of votes."
        )
    return int(row)


def find_column(votes: Votes, label: str) -> int:
    """Return the index of the column of votes for a label, in any spelling.

    Raises:
        DataError: there is no such column, or several.
    """
    spellings = {normalise_name(label), *SPELLINGS.get(label, ())}
    found = [place for place, name in enumerate(votes.columns) if normalise_name(name) in spellings]
    if len(found) != 1:
        number = f"{len(found)} columns" if found else "no column"
        raise DataError(
            f"{votes.path.name}: found {number} of votes for the label {label!r} among {', '.join(votes.columns)}; "
            "expected one, by name."
        )
    return found[0]


def _estimate_share(values: np.ndarray) -> CountedEstimate:
    """Return the mean of the values in [0, 1] that are not NaN, with Wilson's interval; ties make values fractional."""
    values = values[~np.isnan(values)]
    if not len(values):
        return CountedEstimate(value=None, low=None, high=None, n=0)
    low, high = compute_wilson_interval(float(values.sum()), len(values))
    return CountedEstimate(value=float(values.mean()), low=low, high=high, n=len(values))


def _list_contested(
    votes: Votes, counts: np.ndarray, labels: list[str], names: np.ndarray, ids: np.ndarray
) -> list[ContestedImage]:
    """Return the images whose plurality has the smallest share; equal shares are sorted by entropy, then by id."""
    several = np.flatnonzero(counts.sum(axis=1) >= 2)
    shares = counts[several] / counts[several].sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1).round(9)
    order = several[np.lexsort((ids[several], -entropy, shares.max(axis=1)))][:MAX_LISTED]
    listed = []
    for row in order:
        most, total = int(counts[row].max()), int(counts[row].sum())
        low, high = compute_wilson_interval(most, total)
        listed.append(
            ContestedImage(
                split=str(names[row]),
                id=str(ids[row]),
                label=labels[row],
                plurality=[name for name, count in zip(votes.columns, counts[row], strict=True) if count == most],
                share=CountedEstimate(value=most / total, low=low, high=high, n=total),
                votes={name: int(n) for name, n in zip(votes.columns, counts[row], strict=True) if n},
            )
        )
    return listed


def add_soft_targets(bundle: DataBundle, votes: Votes, *, kind: str, share: float) -> DataBundle:
    """Add soft targets to train, and a note that says so.

    A soft target is a distribution over the labels that follows from the votes, mixed with the one-hot label. Images
    without votes, and augmented copies whose source is not in train, keep the one-hot label.

    Args:
        bundle: in-memory splits after the protocol.
        votes: the votes as returned by `read_votes`.
        kind: "ferplus": each label's share of the votes for any of the labels; votes for other options (contempt, unknown,
            no face) do not count, and an image that has only such votes keeps its label. Source: Barsoum et al., ICMI 2016
            (probabilistic label drawing and its cross-entropy form). "ferplus_posterior": P(label | votes), see
            `estimate_posterior`.
        share: weight of that distribution in the target, in 0..1.

    Raises:
        DataError: the votes do not match the images, no training image has one, or a label has no column of votes.
    """
    train = bundle.train
    found = [find_column(votes, label) for label in bundle.labels]
    columns = found if kind == "ferplus" else slice(None)
    splits = list(bundle.splits.values())
    counts = _take_from_sources(align_votes(votes, splits, bundle.reading.num_rows)[0], train)[:, columns]
    total = counts.sum(axis=1)
    voted = (counts >= 0).all(axis=1) & (total > 0)
    if not voted.any():
        raise DataError(
            f"{votes.path.name}: found no vote for any of the {len(train):,} training images, expected votes for most of them. "
            "Name the file of this data's votes by data.votes, or leave out data.soft_targets."
        )
    soft = np.eye(len(bundle.labels))[train.targets]
    if kind == "ferplus":
        given, what = counts[voted] / total[voted, None], "the shares of the votes"
    else:
        given, what = estimate_posterior(counts[voted], train.targets[voted], len(bundle.labels)), "P(label | votes)"
    soft[voted] = share * given + (1 - share) * soft[voted]
    note = (
        f"train: {int(voted.sum()):,} of {len(train):,} targets are {what}{' for the votes' * (kind != 'ferplus')} in {votes.path.name}"
        f"{'' if share == 1 else f' ({share:g} of them, the label for the rest)'}; these are labels beyond the data's own."
    )
    return dataclasses.replace(
        bundle,
        train=dataclasses.replace(train, soft_targets=soft.astype(np.float32)),
        notes=(*bundle.notes, note),
    )


def estimate_posterior(counts: np.ndarray, targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Return float64 [N, num_labels]: the probability of each label given an image's votes, to five digits.

    A multinomial logistic regression from the shares of the votes and their logarithms to the labels, fitted on these very
    images: its few dozen coefficients for each label cannot learn single labels of a data set of FER2013's size by heart. It
    translates the votes into the data's own use of the labels: FER+'s annotators, for example, call many faces neutral
    that FER2013 calls sad.

    Args:
        counts: int [N, V], votes for each column, at least one in each row.
        targets: int [N], the label of each image, in 0..num_labels - 1.
        num_labels: number of labels; those that no image has get probability 0.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    posterior = np.zeros((len(counts), num_labels))
    present = np.unique(targets)
    if len(present) < 2:
        posterior[:, present] = 1.0
        return posterior
    total = counts.sum(axis=1, keepdims=True)
    features = np.hstack([counts / total, np.log((counts + 0.3) / total)])
    # More threads are slower for so few columns, by minutes where other work has the cores.
    with threadpool_limits(1):
        model = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-8).fit(features, targets)
        posterior[:, model.classes_] = model.predict_proba(features)
    return np.round(posterior, 5)  # so that it does not depend on how a processor rounds


def _take_from_sources(counts: np.ndarray, split: Split) -> np.ndarray:
    """Return the votes, int [N, V], with the rows of augmented copies replaced by those of their sources in `split`."""
    sources, copied = split_ids(split.ids)
    places = {name: row for row, name in enumerate(split.ids.tolist())}
    rows = np.array([places.get(name, row) for row, name in enumerate(sources.tolist())], np.int64)
    return np.where(copied[:, None], counts[rows], counts)
