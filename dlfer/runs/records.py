"""metrics.json and audit.json as they are read back, whether this version of dlfer wrote them or an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlfer.errors import ModelError
from dlfer.runs.json_file import read_json

METRICS_FILE, AUDIT_FILE = "metrics.json", "audit.json"


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the metrics.json of a folder with the present names of its keys; None where there is none.

    Args:
        folder: a run, or a shipped model.

    Raises:
        ModelError: the file is damaged.
    """
    values = _read_object(Path(folder) / METRICS_FILE)
    return None if values is None else upgrade_metrics(values)


def read_audit(folder: Path) -> dict[str, Any] | None:
    """Return the audit.json of a run with the present names of its keys; None where there is none.

    Args:
        folder: of the run.

    Raises:
        ModelError: the file is damaged.
    """
    values = _read_object(Path(folder) / AUDIT_FILE)
    return None if values is None else upgrade_audit(values)


def upgrade_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a metrics.json with the present names of keys that an earlier version wrote.

    `twins` counted the test images with a duplicate in training alone, and `test_without_twins` left out no others. Its
    exact copies included augmented ones, which occur under protocol paper, so that there their number is not known.
    """
    upgraded: dict[str, Any] = {}
    for key, value in values.items():
        if key == "test_without_twins":
            upgraded["test_without_duplicates"] = value
        elif key == "twins":
            upgraded["duplicates"] = _upgrade_twins(value, values)
        elif key == "selected_on" and isinstance(value, str):
            upgraded[key] = value.replace("(twins kept together)", "(duplicates kept together)")
        else:
            upgraded[key] = value
    return upgraded


def upgrade_audit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of an audit.json with the present names of keys that an earlier version wrote.

    Its exact copies included augmented ones: where there are some, the number of the others is not known.
    """
    upgraded = dict(values)
    if values.get("leaks"):
        upgraded["leaks"] = {pair: _upgrade_leak(leak) for pair, leak in values["leaks"].items()}
    samples = values.get("samples")
    if samples and "mirrored" in samples:
        upgraded["samples"] = {"flipped" if kind == "mirrored" else kind: found for kind, found in samples.items()}
    return upgraded


def _upgrade_leak(leak: Mapping[str, Any]) -> Mapping[str, Any]:
    if "near_or_mirrored" not in leak:
        return leak
    augmented = leak.get("from_source", 0)
    return {"exact": None if augmented else leak["exact"], "augmented": augmented, "any": leak["near_or_mirrored"]}


def _upgrade_twins(twins: Any, values: Mapping[str, Any]) -> dict[str, Any] | None:
    test = values.get("test")
    if not isinstance(test, dict) or not isinstance(twins, dict) or "near_or_mirrored" not in twins:
        return None
    exact = None if values.get("protocol") == "paper" else twins.get("exact")
    in_train = {"exact": exact, "augmented": None, "any": twins["near_or_mirrored"]}
    return {"split": "test", "n": test.get("n"), "in_train": in_train, "in_selection": None, "in_either": None}


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        values = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON ({error}). The run is damaged; run the experiment again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: the file: found {str(values)[:60]!r}, expected an object. Get the model again.")
    return values
