"""The files of a search's directory: trials.json, members.csv, best.yaml; and whether it is still the same search."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from dlfer.config.load import dump_experiment, load_recorded_experiment, with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ConfigError
from dlfer.report.keys import format_value
from dlfer.report.search import ALONE, TRIALS_FILE
from dlfer.runs.files import write_atomically
from dlfer.runs.run import CONFIG_FILE, Run
from dlfer.study.search.arms import Arm
from dlfer.study.search.board import find_best
from dlfer.study.search.engine import TrialRecord
from dlfer.study.search.objective import get_direction

MEMBERS_FILE = "members.csv"
ORIGINAL_FILE = "engine/experiment.yaml"
_COLUMNS = ("arm", "trial", "seed", "digest", "path", "status", "score", "low", "high", "epochs", "seconds", "error")


def write_files(run: Run, config: ExperimentConfig, arms: Mapping[str, tuple[Arm, Sequence[TrialRecord]]]) -> None:
    """Write trials.json, members.csv and the best experiments; `arms` is name -> the arm and its records."""
    search = config.search
    run.write_json(
        TRIALS_FILE,
        {
            "engine": search.engine,
            "figure": search.objective,
            "direction": get_direction(search.objective),
            "epochs": config.finetune.epochs,
            "keys": list(search.space),
            "arms": [{"name": arm.name, "records": [r.as_dict() for r in records]} for arm, records in arms.values()],
        },
    )
    write_atomically(run.path / MEMBERS_FILE, _format_members(run, config, arms))
    for arm, records in arms.values():
        best = find_best(records, search.objective)
        if best is not None:
            write_atomically(run.path / get_best_name(arm), format_best(run, config, arm, best))


def get_best_name(arm: Arm) -> str:
    """Return the file name of an arm's best experiment: best.yaml, or best-<arm>.yaml where there are two."""
    return "best.yaml" if arm.name == ALONE else f"best-{arm.slug}.yaml"


def format_best(run: Run, config: ExperimentConfig, arm: Arm, best: TrialRecord) -> str:
    """Return the experiment of the best trial as a file that runs as it is."""
    keys = "".join(f"#   {key}: {format_value(value)}\n" for key, value in best.overrides.items())
    header = (
        f"# The best trial of the search {run.path.parent.name}/{run.path.name}: "
        f"validation {config.search.objective} {best.score:.4f}.\n{keys}"
        "# Chosen as the best of several on validation, that figure is too good; test judges it: dlfer run THIS_FILE\n"
    )
    best_config = with_overrides(config, {**arm.base, **best.overrides, "search": None})
    return header + dump_experiment(best_config)


def keep_original(run: Run) -> None:
    """Keep the experiment as the search began with it."""
    write_atomically(run.path / ORIGINAL_FILE, (run.path / CONFIG_FILE).read_text())


def check_same(run: Run, other: ExperimentConfig | None) -> ExperimentConfig:
    """Return the search's experiment, after seeing that neither its copy nor the file that was given differs.

    Raises:
        ConfigError: with every key that differs.
    """
    original = load_recorded_experiment(run.path / ORIGINAL_FILE)
    for name, config in ((CONFIG_FILE, run.config()), ("the experiment file", other)):
        if config is None:
            continue
        differences = list_differences(original, config)
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise ConfigError(
                f"{run.path}: {name} is not the experiment and space that this search began with:\n{lines}\n"
                "Scores of different experiments cannot be ranked together. Start a new search, or set them back."
            )
    return original


def list_differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """Return a line for each key in which two experiments differ; the number of trials may."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if key != "search.trials" and before.get(key) != after.get(key):
            lines.append(f"{key}: {_show(before, key)} -> {_show(after, key)}")
    return lines


def _show(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"


def _flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{above}{name}"
        # A key of the space and its range are compared as one.
        if isinstance(value, Mapping) and above != "search.space.":
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _format_members(run: Run, config: ExperimentConfig, arms: Mapping[str, tuple[Arm, Sequence[TrialRecord]]]) -> str:
    keys = list(config.search.space)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_COLUMNS, *keys], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for arm, records in arms.values():
        for number, record in enumerate(records, start=1):
            row: dict[str, Any] = {**record.as_dict(), **record.overrides, "arm": arm.name, "trial": number}
            row["seed"] = config.experiment.seed
            row["error"] = (record.error or "").splitlines()[0] if record.error else ""
            if record.run is not None:
                path = run.path.parent / record.run
                row["path"] = str(path.resolve())
                if (path / CONFIG_FILE).exists():
                    row["digest"] = Run(path).read_json("run.json")["config_digest"][:8]
            writer.writerow(row)
    return text.getvalue()
