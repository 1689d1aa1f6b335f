"""Names of labels: known spellings, aliases, dropped classes, and the mapping of targets by name."""

from __future__ import annotations

import dataclasses
import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import LabelsConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.files import normalise_name
from dlfer.errors import DataError, ModelError
from dlfer.runs.text import count_noun

SPELLINGS = {
    "Angry": ("angry", "anger"),
    "Disgust": ("disgust", "disgusted"),
    "Fear": ("fear", "fearful", "afraid", "scared"),
    "Happy": ("happy", "happiness", "joy", "joyful"),
    "Sad": ("sad", "sadness", "sorrow"),
    "Surprise": ("surprise", "surprised"),
    "Neutral": ("neutral",),
}
"""FER2013's labels -> their spellings in other data sets, in lower case."""

DROPPED = "of classes in data.labels.drop"

CANONICAL = {spelling: label for label, spellings in SPELLINGS.items() for spelling in spellings}


def match_labels(names: Iterable[str], labels: LabelsConfig) -> dict[str, str | None]:
    """Return the label of each class name of the data, or None for a dropped class.

    Names are compared by `normalise_name`; equal ones become one label. If the names are recognisably expressions (at least
    two, and at least half of all, are known spellings), known spellings become FER2013's labels, e.g. "happiness"
    becomes "Happy". `labels.aliases` take precedence; an alias that is another spelling of an existing label, as
    "disgust" of Disgust, becomes that label. All other names are kept.

    Raises:
        DataError: an alias or a class to drop is not in the data, or every class is dropped.
    """
    names = sorted(set(names))
    folded = {name: normalise_name(name) for name in names}
    known = {key for key in folded.values() if key in CANONICAL}
    expressions = len(known) >= 2 and 2 * len(known) >= len(set(folded.values()))
    first: dict[str, str] = {}
    for name, key in folded.items():
        first.setdefault(key, unicodedata.normalize("NFC", name).strip())
    mapping: dict[str, str | None] = {
        name: CANONICAL.get(key, first[key]) if expressions else first[key] for name, key in folded.items()
    }
    aliased = {normalise_name(name) for name in labels.aliases}
    known_labels = {
        _name_meaning(label, expressions): label for name, label in mapping.items() if folded[name] not in aliased
    }
    for name, label in labels.aliases.items():
        found = [other for other, key in folded.items() if key == normalise_name(name)]
        if not found:
            raise DataError(_unknown("aliases", name, names))
        meant = known_labels.setdefault(_name_meaning(label, expressions), label)
        mapping.update(dict.fromkeys(found, meant))
    for name in labels.drop:
        dropped = [
            key for key, label in mapping.items() if normalise_name(name) in (folded[key], normalise_name(str(label)))
        ]
        if not dropped:
            raise DataError(_unknown("drop", name, names))
        mapping.update(dict.fromkeys(dropped))
    if names and not any(mapping.values()):
        raise DataError("data.labels.drop: every class of the data is dropped; leave at least two.")
    return mapping


def _name_meaning(label: str, expressions: bool) -> str:
    """Return a key that is equal for all spellings of a label."""
    return CANONICAL.get(normalise_name(label), normalise_name(label)) if expressions else normalise_name(label)


def describe_merged(mapping: Mapping[str, str | None], labels: LabelsConfig) -> list[str]:
    """Return a sentence for each label to which several class names of the data were mapped without an alias."""
    aliased = {normalise_name(name) for name in labels.aliases}
    by_label: dict[str, list[str]] = {}
    for name, label in mapping.items():
        if label is not None and normalise_name(name) not in aliased:
            by_label.setdefault(label, []).append(name)
    return [
        f"The classes {', '.join(map(repr, names))} are one label, {label}."
        for label, names in by_label.items()
        if len(names) > 1
    ]


def describe_unknown(mapping: Mapping[str, str | None], counts: Mapping[str, int]) -> list[str]:
    """Return a sentence about class names that are no known expression, if at least two others are; else no sentence.

    Args:
        mapping: the result of `match_labels`.
        counts: class name -> number of images.
    """
    known = {label for label in mapping.values() if label in SPELLINGS}
    odd = [
        name
        for name, label in mapping.items()
        if label not in (None, *SPELLINGS) and normalise_name(name) != "contempt"
    ]
    if len(known) < 2 or not odd:
        return []
    shown = ", ".join(f"{name} ({count_noun(counts[name], 'image')})" for name in odd[:10]) + (
        ", ..." if len(odd) > 10 else ""
    )
    return [
        f"dlfer does not know these names of classes as expressions: {shown}. Each becomes a label of its own; "
        "data.labels.aliases gives one another name, data.labels.drop leaves it out."
    ]


def order_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels sorted by name, ignoring case."""
    return tuple(sorted(set(labels), key=lambda label: (label.casefold(), label)))


def index_labels(names: Sequence[str], labels: LabelsConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the labels in the order of `names`, and int64 [len(names)], each name's index in them (-1: dropped).

    Raises:
        DataError: as `match_labels`.
    """
    mapping = match_labels(names, labels)
    kept = tuple(dict.fromkeys(label for name in names if (label := mapping[name]) is not None))
    return kept, np.array([-1 if mapping[name] is None else kept.index(mapping[name]) for name in names], np.int64)


def relabel_bundle(bundle: DataBundle, labels: LabelsConfig) -> DataBundle:
    """Apply aliases to a bundle of in-memory splits and leave out dropped classes.

    The order of the labels remains that of the source.

    Raises:
        DataError: as `match_labels`.
    """
    kept, lookup = index_labels(bundle.labels, labels)
    merged = describe_merged(match_labels(bundle.labels, labels), labels)
    if kept == bundle.labels:
        return bundle
    splits, dropped = {}, []
    for key, split in bundle.splits.items():
        targets = lookup[split.targets]
        rows = np.flatnonzero(targets >= 0)
        dropped += split.ids[targets < 0].tolist()
        splits[key] = Split(split.name, split.images[rows], targets[rows], split.ids[rows])
    notes = bundle.notes
    reading = bundle.reading.leave_out(DROPPED, dropped)
    if dropped:
        names = ", ".join(name for name, index in zip(bundle.labels, lookup, strict=True) if index < 0)
        notes += (f"{count_noun(len(dropped), 'image')} of the dropped classes {names} left out.",)
    return dataclasses.replace(bundle, labels=kept, notes=(*notes, *merged), reading=reading, **splits)


def map_targets(split: Split, from_labels: Sequence[str], to_labels: Sequence[str]) -> Split:
    """Return `split` with targets that index `to_labels` (a model's) instead of `from_labels` (the data's).

    Labels are mapped by name; spellings of the same expression (happy, Happiness) are equal. The model may have labels
    that the data lacks, and the data may have labels that the model lacks if no image of the split has them.

    Raises:
        ModelError: the model lacks a label that has images.
    """
    present = np.unique(split.targets)
    lookup = np.full(len(from_labels), -1, np.int64)
    lookup[present] = compute_label_map([from_labels[target] for target in present], to_labels, data=from_labels)
    return dataclasses.replace(split, targets=lookup[split.targets])


def compute_label_map(
    from_labels: Sequence[str], to_labels: Sequence[str], *, data: Sequence[str] | None = None
) -> np.ndarray:
    """Return int64 [len(from_labels)]: the index in `to_labels` of each of `from_labels`, by name.

    Args:
        from_labels: the labels of the data that have images.
        to_labels: the labels of the model.
        data: all labels of the data, for the error message; None: `from_labels`.

    Raises:
        ModelError: one of `from_labels` is not in `to_labels`.
    """
    sources, wanted = list(from_labels), list(to_labels)
    if not set(sources) <= set(wanted):
        sources, wanted = _canonical(sources), _canonical(wanted)
    if not set(sources) <= set(wanted):
        unknown = [own for own, name in zip(from_labels, sources, strict=True) if name not in wanted]
        raise ModelError(
            f"labels differ: the data has {', '.join(data or from_labels)}; the model knows {', '.join(to_labels)}, "
            f"and has no name for {', '.join(unknown)}. "
            "Map or drop classes of the data by data.labels, or take a model trained on these labels."
        )
    return np.array([wanted.index(label) for label in sources], dtype=np.int64)


def _canonical(names: list[str]) -> list[str]:
    """Return the names in FER2013's spelling (unknown ones folded), or unchanged if two would become equal."""
    changed = [CANONICAL.get(normalise_name(name), normalise_name(name)) for name in names]
    return changed if len(set(changed)) == len(names) else names


def _unknown(key: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, [*names, *FER2013_LABELS], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"data.labels.{key}: found {name!r}, expected a class of the data: {shown}.{hint}"
