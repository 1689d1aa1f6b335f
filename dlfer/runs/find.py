"""Runs by their names, and what there is in a folder of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dlfer.errors import ModelError
from dlfer.runs.run import CONFIG_FILE, RUN_FILE, Run

_MAX_LISTED = 15


@dataclass(frozen=True)
class RunSummary:
    """One line of `dlfer show runs`.

    Attributes:
        name: path under the folder of runs, <experiment>/<stamp>-<digest>.
        path: its folder.
        kind: "run", "ablation", "sweep" or "search".
        status: running, interrupted, stopped, failed, finished.
        started: UTC, ISO 8601.
        error: the first line of what went wrong, or None.
    """

    name: str
    path: Path
    kind: str
    status: str
    started: str
    error: str | None


def default_runs_folder() -> Path:
    """Return the folder of runs where --out does not say otherwise."""
    return Path("saved_models/runs")


def open_run(name: Path | str, folder: Path | None = None) -> Run:
    """Return the run at a path, or the one whose name under the folder of runs begins with `name`.

    Raises:
        ModelError: none, or more than one; with the names there are.

    Example:
        >>> open_run("quickstart/20261121T0930")
    """
    path = Path(name)
    if (path / RUN_FILE).is_file():
        return Run(path)
    if path.name in (RUN_FILE, CONFIG_FILE) and (path.parent / RUN_FILE).is_file():
        return Run(path.parent)
    folder = default_runs_folder() if folder is None else Path(folder)
    found = match_runs(str(name), folder)
    if len(found) == 1:
        return Run(folder / found[0])
    if found:
        raise ModelError(f"{name}: {len(found)} runs in {folder} begin so: {_join_last(found)}. Give more of the name.")
    names = [str(path.relative_to(folder)) for path in _iterate_runs(folder)]
    known = f"The runs there: {_join_last(names)}." if names else "There are no runs there yet."
    raise ModelError(f"{name}: neither the folder of a run nor the beginning of a run's name in {folder}. {known}")


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs of a folder, oldest first; one whose run.json is damaged has the status "damaged"."""
    summaries = []
    for path in _iterate_runs(Path(folder)):
        name = str(path.relative_to(folder))
        try:
            record = Run(path).record
            error = record.error.splitlines()[0] if record.error else None
            summary = RunSummary(name, path, record.kind, record.present_status, record.started or "", error)
        except ModelError as error:
            summary = RunSummary(name, path, "run", "damaged", "", str(error))
        summaries.append(summary)
    return sorted(summaries, key=lambda summary: (summary.path.name, summary.name))


def match_runs(name: str, folder: Path) -> list[str]:
    """Return the names of the runs in a folder that begin with `name`, with or without the experiment's.

    A whole name counts alone: a run's is the beginning of an ablation's of the same second.
    """
    names = [str(path.relative_to(folder)) for path in _iterate_runs(folder)]
    exact = [key for key in names if name in (key, Path(key).name)]
    if exact:
        return exact
    return [key for key in names if name and (key.startswith(name) or Path(key).name.startswith(name))]


def _iterate_runs(folder: Path) -> Iterator[Path]:
    """Yield the run directories <folder>/<experiment>/<run>; hidden folders (the cache) are no experiments."""
    for path in sorted(folder.glob(f"*/*/{RUN_FILE}")):
        if not path.parent.parent.name.startswith("."):
            yield path.parent


def _join_last(names: list[str]) -> str:
    shown = names[-_MAX_LISTED:]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} older" if len(shown) < len(names) else "")
