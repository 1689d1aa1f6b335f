"""What stands beside a model: metrics.json and data.json of its run, or of the shipped copy, checked as they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dlfer.errors import ModelError
from dlfer.report.page import read_json
from dlfer.runs import records
from dlfer.runs.records import METRICS_FILE
from dlfer.runs.run import DATA_FILE

_WORDS = {
    dict: "an object",
    dict | None: "an object or null",
    str: "a text",
    str | None: "a text or null",
    int: "a whole number",
    int | float: "a number",
}
_ABSTAIN = {"threshold": int | float, "target_accuracy": int | float, "chosen_on": str, "n": int}


def read_parts(folder: Path) -> dict[str, dict]:
    """Return what data.json tells of each part, {"name", "fingerprint", ...}; empty where there is none.

    Raises:
        ModelError: it holds something else.
    """
    path = folder / DATA_FILE
    parts = _read_object(path).get("splits", {})
    _check(path, "splits", parts, dict)
    for name, part in parts.items():
        _check(path, f"splits.{name}", part, dict)
    return parts


def read_metrics(folder: Path) -> dict:
    """Return metrics.json, of which the banner and what was chosen for abstaining are checked; empty where there is none.

    Raises:
        ModelError: it holds something else.
    """
    path = folder / METRICS_FILE
    found = records.read_metrics(folder) or {}
    _check(path, "banner", found.get("banner"), str | None)
    abstain = found.get("abstain")
    _check(path, "abstain", abstain, dict | None)
    if abstain is not None:
        for key, kind in _ABSTAIN.items():
            _check(path, f"abstain.{key}", abstain.get(key), kind)
    return found


def _read_object(path: Path) -> dict:
    found = read_json(path)
    if found is None:
        return {}
    _check(path, "the file", found, dict)
    return found


def _check(path: Path, what: str, value: Any, kind: Any) -> None:
    """Raise ModelError unless a value read is of a kind, and finite where it is a number."""
    is_number = isinstance(value, int | float)
    if not isinstance(value, kind) or isinstance(value, bool) or (is_number and not math.isfinite(value)):
        raise ModelError(f"{path}: {what}: found {str(value)[:60]!r}, expected {_WORDS[kind]}. Get the model again.")
