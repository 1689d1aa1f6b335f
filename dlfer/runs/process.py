"""What run.json records of its process and its machine, and how values become JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "torch",
    "keras",
    "numpy",
    "scipy",
    "scikit-learn",
    "xgboost-cpu",
    "xgboost",
    "pillow",
    "tensorflow-datasets",
    "pydantic",
)


def find_checkout() -> Path | None:
    """Return the root of the checkout that dlfer is imported from, or None for an ordinary installation."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def describe_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def describe_checkout() -> dict[str, Any] | None:
    """Return the commit of dlfer's source and whether tracked files differ from it; None outside a checkout."""
    root = find_checkout()
    if root is None or not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changes = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def list_packages() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def to_json(value: Any) -> Any:
    """Return a value as JSON can hold it: records and numpy's by their own methods, NaN and infinity as null."""
    if hasattr(value, "as_json"):
        return to_json(value.as_json())
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    return str(value)


def tell_time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
