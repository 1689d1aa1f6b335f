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
    if len(set(record.labels)) < len(record.labels):
        raise ModelError(
            f"{path}: labels: found {str(record.labels)[:80]!r}, expected different names of classes. {MEND}."
        )
    return record
