"""artifact.json, the description of a trained model, read without a framework."""

from __future__ import annotations

from pathlib import Path

from dlfer.config import names
from dlfer.errors import ModelError
from dlfer.runs.files import read_json
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.runs.records import ArtifactRecord

FORMAT = 1
MEND = "Copy the artifact again, or train it again"
"""What to do about an artifact that was changed; the end of a message, without its full stop."""

_MOST_LABELS, _LARGEST_IMAGE = 10_000, 4096


def read_artifact_record(folder: Path) -> ArtifactRecord:
    """Return artifact.json of an artifact folder, checked to be one that this version reads.

    Raises:
        ModelError: it is not there, damaged, of another format, or outside of the limits.
    """
    path = Path(folder) / ARTIFACT_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected the description of a trained model: {error}.") from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{path}: found a {type(values).__name__}, expected the description of a trained model. {MEND}."
        )
    form, family = values.get("format"), values.get("family")
    if form != FORMAT or family not in names.FAMILIES:
        raise ModelError(
            f"{path}: found format {str(form)[:40]!r} and family {str(family)[:40]!r}, "
            f"expected format {FORMAT} and one of {', '.join(names.FAMILIES)}; it needs another version of dlfer."
        )
    record = ArtifactRecord.parse(values, path)
    _check_limits(record, path)
    return record


def _check_limits(record: ArtifactRecord, path: Path) -> None:
    """Raise ModelError unless what a network is built from is within limits."""
    labels, given = record.labels, record.input
    if not 0 < len(labels) <= _MOST_LABELS or len(set(labels)) < len(labels):
        raise ModelError(f"{path}: labels: found {str(labels)[:80]!r}, expected different names of classes. {MEND}.")
    if not 0 < given.image_size <= _LARGEST_IMAGE:
        raise ModelError(
            f"{path}: input.image_size: found {given.image_size}, expected 1..{_LARGEST_IMAGE} pixels. {MEND}."
        )
    if given.crop is not None and not 0 < given.crop <= 1:
        raise ModelError(f"{path}: input.crop: found {given.crop}, expected null or a number in 0..1. {MEND}.")
    if record.temperature is not None and not record.temperature.value > 0:
        raise ModelError(
            f"{path}: found the temperature {record.temperature.value}, expected a number above 0. {MEND}."
        )
