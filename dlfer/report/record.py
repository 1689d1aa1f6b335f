"""How a run was made, from its run.json and config.yaml: name, time, command, seed, versions, experiment."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import NamedTuple

from dlfer.config.load import load_recorded_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError, ModelError
from dlfer.runs.member_rows import MEMBERS_FILE, read_member_rows
from dlfer.runs.records import RunRecord
from dlfer.runs.run import CONFIG_FILE


def read_text(path: Path) -> str | None:
    """Return the text of a file; None where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def read_experiment(folder: Path) -> ExperimentConfig | None:
    """Return the experiment that is recorded in the folder of a run or of a shipped model; None where there is none.

    Raises:
        ConfigError: its config.yaml is no experiment.
    """
    path = folder / CONFIG_FILE
    return load_recorded_experiment(path) if path.exists() else None


def try_experiment(folder: Path) -> tuple[ExperimentConfig | None, str | None]:
    """Return the recorded experiment and no problem, or None and why this version of dlfer cannot read it."""
    try:
        return read_experiment(folder), None
    except ConfigError as error:
        return None, str(error)


def get_name(run_path: Path, run: RunRecord) -> str:
    """Return the experiment's name, or where it is not known the name of the folder above the run."""
    return run.experiment or run_path.resolve().parent.name


def describe_run(run_path: Path, run: RunRecord) -> str:
    """Return the line below the title: which run, when, and its status if it has not ended well."""
    words = [run_path.resolve().name]
    for word, time in (("started", run.started), ("finished", run.finished)):
        if time:
            words.append(f"{word} {time[:16].replace('T', ' ')} UTC")
    if run.status in ("failed", "stopped"):
        words.append(run.status)
    return " · ".join(words)


def format_command(run: RunRecord) -> str | None:
    """Return the command line that made a run."""
    if not run.argv:
        return None
    first, *rest = run.argv
    return "dlfer " + shlex.join(rest if Path(first).name in ("dlfer", "__main__.py") else run.argv)


def describe_environment(run: RunRecord) -> list[tuple[str, str]]:
    """Return the facts of run.json that a repetition depends on, as (name, value)."""
    commit = run.git and f"{run.git.commit}{' with uncommitted changes' if run.git.dirty else ''}"
    device = run.device
    computed = [device.kind, device.name, device.backend, "XLA" if device.jit else None] if device else []
    software = {"dlfer": run.dlfer, "Python": run.python, **run.packages}
    facts = {
        "seed": run.seed,
        "config digest": run.config_digest,
        "git commit": commit,
        "device": ", ".join(word for word in computed if word),
        "platform": run.platform,
        "software": ", ".join(f"{name} {version}" for name, version in software.items() if version),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


class Link(NamedTuple):
    """The name of a report and its address relative to the page."""

    name: str
    link: str


def find_comparisons(run_path: Path) -> list[Link]:
    """Return the comparisons beside a run that it is a member of."""
    run_path, found = run_path.resolve(), []
    for members in sorted(run_path.parent.glob(f"*/{MEMBERS_FILE}")):
        # A damaged file of a neighbour must not keep a run from its report.
        with contextlib.suppress(ModelError):
            if run_path.name in {Path(row.path).name for row in read_member_rows(members.parent) if row.path}:
                found.append(Link(members.parent.name, f"../{members.parent.name}/report.html"))
    return found
