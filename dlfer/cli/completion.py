"""What the shell completes: experiment files, data, names of models and of runs.

Nothing but the names of files is looked at and no other module of dlfer is imported, since the shell waits for each answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

RUNS = Path("saved_models/runs")
_DATA_SUFFIXES = (".csv", ".gz", ".npz", ".zip")


def complete_experiments(incomplete: str) -> list[str]:
    """Return experiment files and folders that a path begins with; where nothing is typed, those of experiments/, too."""
    found = _complete_paths(incomplete, (".yaml", ".yml"))
    return found if incomplete else [*found, *sorted(str(path) for path in Path("experiments").glob("*.yaml"))]


def complete_data(incomplete: str) -> list[str]:
    """Return folders, csv, zip, .npz and experiment files that a path begins with."""
    return _complete_paths(incomplete, (*_DATA_SUFFIXES, ".yaml", ".yml"))


def complete_models(incomplete: str) -> list[str]:
    """Return the names of models that begin so, then runs."""
    names = {path.parent.name for place in _list_places() for path in place.glob("*/artifact.json")}
    return _begin_with(incomplete, sorted(names)) + complete_runs(incomplete)


def complete_runs(incomplete: str) -> list[str]:
    """Return the runs of saved_models/runs whose names begin so, the latest first, as names that `dlfer` takes."""
    paths = (path.parent for path in RUNS.glob("*/*/run.json") if not path.parent.parent.name.startswith("."))
    latest = sorted(paths, key=lambda path: path.name, reverse=True)
    return _begin_with(incomplete, [str(path.relative_to(RUNS)) for path in latest])


def complete_shown(incomplete: str) -> list[str]:
    """Return what `dlfer show` shows."""
    words = ("config", "runs", "models", "backbones", "sources", "schema")
    return _begin_with(incomplete, words) + complete_runs(incomplete)


def _list_places() -> list[Path]:
    """Return the folders of models, as `dlfer.runs.find.list_model_places` has them."""
    home = os.environ.get("DLFER_HOME")
    homes = [Path(), *([Path(home).expanduser()] if home else []), Path(__file__).resolve().parents[2]]
    return [path / "saved_models" for path in homes]


def _complete_paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files with one of the suffixes, and the folders, whose paths begin so; hidden ones are left out."""
    folder, _, beginning = incomplete.rpartition("/")
    folder += "/" if "/" in incomplete else ""
    try:
        entries = sorted(Path(folder or ".").expanduser().iterdir())
    except OSError:
        return []
    named = [path for path in entries if path.name.startswith(beginning) and not path.name.startswith(".")]
    return [
        f"{folder}{path.name}{'/' if path.is_dir() else ''}"
        for path in named
        if path.is_dir() or path.name.casefold().endswith(suffixes)
    ]


def _begin_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
