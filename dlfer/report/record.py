"""How a run was made, as its run.json and config.yaml tell: name, time, command, seed, versions."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from typing import Any

from dlfer.config.strict_yaml import parse_yaml
from dlfer.runs.records import DeviceRecord, RunRecord


def read_text(path: Path) -> str | None:
    """Return the text of a file; None where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def get_name(run_path: Path, config_text: str | None) -> str:
    """Return the experiment's name from the resolved config, else the name of the folder above the run."""
    return str(read_config(config_text).get("experiment", {}).get("name") or run_path.resolve().parent.name)


def describe_run(run_path: Path, run: RunRecord) -> str:
    """Return the line below the title: which run, when, and its state if it has not ended well."""
    words = [run_path.resolve().name]
    for word, time in (("started", run.started), ("finished", run.finished)):
        if time:
            words.append(f"{word} {time[:16].replace('T', ' ')} UTC")
    if run.status in ("failed", "stopped"):
        words.append(run.status)
    return " · ".join(words)


def format_command(run: RunRecord) -> str | None:
    """Return the command line that made a run."""
    words = run.argv
    if not words:
        return None
    return "dlfer " + shlex.join(words[1:] if Path(words[0]).name in ("dlfer", "__main__.py") else words)


def describe_environment(run: RunRecord) -> list[tuple[str, str]]:
    """Return the facts of run.json that a repetition depends on, as (name, value)."""
    git, device = run.git, run.device or DeviceRecord()
    commit = None if git is None else f"{git.commit}{' with uncommitted changes' if git.dirty else ''}"
    computed = [device.kind, device.name, device.backend, "XLA" if device.jit else None]
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


def read_config(text: str | None) -> dict[str, Any]:
    """Return what the text of a config.yaml holds; empty for None.

    Raises:
        ConfigError: it is not YAML as dlfer writes it.
    """
    values = parse_yaml(text, "config.yaml").data if text else None
    return values if isinstance(values, dict) else {}


def find_comparisons(run_path: Path) -> list[dict[str, str]]:
    """Return the comparisons beside a run that it is a member of: {"name", "link"}, the address of their report."""
    run_path, found = run_path.resolve(), []
    for members in sorted(run_path.parent.glob("*/members.csv")):
        with members.open(newline="", encoding="utf-8") as file:
            names = {Path(row["path"]).name for row in csv.DictReader(file) if row.get("path")}
        if run_path.name in names:
            found.append({"name": members.parent.name, "link": f"../{members.parent.name}/report.html"})
    return found
