"""How a run was made, as its run.json and config.yaml tell: name, time, command, seed, versions."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlfer.config.strict_yaml import parse_yaml
from dlfer.errors import ModelError
from dlfer.runs.member_rows import MEMBERS_FILE, read_member_rows


def read_text(path: Path) -> str | None:
    """Return the text of a file; None where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def get_name(run_path: Path, config_text: str | None) -> str:
    """Return the experiment's name from the resolved config, else the name of the folder above the run."""
    return str(read_config(config_text).get("experiment", {}).get("name") or run_path.resolve().parent.name)


def describe_run(run_path: Path, run: Mapping[str, Any]) -> str:
    """Return the line below the title: which run, when, and its state if it has not ended well."""
    words = [run_path.resolve().name]
    for key, word in (("started", "started"), ("finished", "finished")):
        if run.get(key):
            words.append(f"{word} {str(run[key])[:16].replace('T', ' ')} UTC")
    if run.get("status") in ("failed", "stopped"):
        words.append(run["status"])
    return " · ".join(words)


def format_command(run: Mapping[str, Any]) -> str | None:
    """Return the command line that made a run."""
    argv = run.get("argv")
    if not argv:
        return None
    words = [str(word) for word in argv]
    return "dlfer " + shlex.join(words[1:] if Path(words[0]).name in ("dlfer", "__main__.py") else words)


def describe_environment(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts of run.json that a repetition depends on, as (name, value)."""
    git, device = run.get("git") or {}, run.get("device") or {}
    commit = f"{git['commit']}{' with uncommitted changes' if git.get('dirty') else ''}" if git else None
    computed = [device.get("kind"), device.get("name"), device.get("backend"), "XLA" if device.get("jit") else None]
    software = {"dlfer": run.get("dlfer"), "Python": run.get("python"), **(run.get("packages") or {})}
    facts = {
        "seed": run.get("seed"),
        "config digest": run.get("config_digest"),
        "git commit": commit,
        "device": ", ".join(str(word) for word in computed if word),
        "platform": run.get("platform"),
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
    for members in sorted(run_path.parent.glob(f"*/{MEMBERS_FILE}")):
        # A damaged file of a neighbour must not keep a run from its report.
        with contextlib.suppress(ModelError):
            if run_path.name in {Path(row.path).name for row in read_member_rows(members.parent) if row.path}:
                found.append({"name": members.parent.name, "link": f"../{members.parent.name}/report.html"})
    return found
