"""Conversion of an experiment file to an `ExperimentConfig` and back.

A file may name one parent (`extends: base.yaml`, relative to the file). The sections of the parent and of the file are
merged key by key, with two additional rules:

- `null` removes a section: it is then absent (pretrain), or has its defaults (augment);
- a section whose key `source` differs from the parent's replaces the parent's section, because its other keys depend on
  the source (synthetic faces have no path).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlfer.config.keys import (
    Key,
    Problem,
    get_mapping_value,
    get_section,
    is_nullable,
    list_problems,
    rename_keys,
    split_key,
    validate,
)
from dlfer.config.names import expand_home, list_places
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import Section, get_fields
from dlfer.config.strict_yaml import format_yaml, parse_value, parse_yaml, read_yaml
from dlfer.config.variations import check_ablation, check_space, check_sweep, set_value
from dlfer.errors import ConfigError

VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
"""The syntax of an environment variable in `resolve_path`: ${NAME} or $NAME."""
_DEFAULTS = {"DLFER_DATA": "data"}
_MAX_PARENTS = 20


def load_experiment(
    path: Path | str | ExperimentConfig, overrides: Mapping[str, object] | None = None
) -> ExperimentConfig:
    """Read an experiment file, apply overrides, and validate the result.

    Args:
        path: the path of the file; the name of a shipped experiment (see `find_experiment`); or an experiment that was
            loaded before, which is not modified.
        overrides: dotted key -> value, as in `--set KEY=VALUE`; None is YAML's null. A value may be anything that YAML
            can represent, a path, or a NumPy number or array.

    Returns:
        The frozen experiment, with attributes such as `config.finetune.epochs`.

    Raises:
        ConfigError: the file or an override is invalid; the message lists every problem.

    Example:
        >>> config = dlfer.load_experiment("experiments/dlfer.yaml", {"pretrain": None, "finetune.epochs": 3})
        >>> config.finetune.epochs
        3
    """
    check_overrides(overrides)
    if isinstance(path, ExperimentConfig):
        return with_overrides(path, overrides) if overrides else path
    if not isinstance(path, str | Path):
        raise ConfigError(
            f"experiment: found a {type(path).__name__}, expected the path of an experiment file (YAML), or an "
            "ExperimentConfig, which load_experiment returns."
        )
    path = find_experiment(path)
    tree, marks = _read_with_parents(path, ())
    problems = _apply(tree, marks, overrides or {})
    return _finish(tree, marks, problems, str(path), check_search=True)


def check_overrides(overrides: object) -> None:
    """Raise ConfigError unless `overrides` is None or a mapping with strings as keys."""
    if overrides is not None and not (
        isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides)
    ):
        raise ConfigError(
            f"overrides: found {overrides!r:.80}, expected a mapping of dotted keys to values, e.g. "
            '{"finetune.epochs": 3, "pretrain": None}.'
        )


def find_override(overrides: Mapping[str, object], key: str) -> str | None:
    """Return the override that sets a dotted key, either directly or as part of a section; None if there is none."""
    for dotted, value in overrides.items():
        if dotted == key or (key.startswith(f"{dotted}.") and _has_key(value, key[len(dotted) + 1 :])):
            return dotted
    return None


def _has_key(value: object, dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    value = value.model_dump() if isinstance(value, Section) else value
    if not isinstance(value, Mapping) or first not in value:
        return False
    return not rest or _has_key(value[first], rest)


def find_experiment(name: Path | str) -> Path:
    """Return the experiment file for a path or for the name of a shipped experiment.

    The path of an existing file is returned unchanged. Otherwise `quickstart` and `experiments/quickstart.yaml` both
    name the shipped experiment, which is looked up in `$DLFER_HOME/experiments`, the installed package and the
    checkout, in this order. Other paths are returned unchanged, whether they exist or not.

    Raises:
        ConfigError: `name` has the form of such a name, and there is neither a file nor a shipped experiment.

    Example:
        >>> find_experiment("quickstart").name
        'quickstart.yaml'
    """
    path = Path(name)
    is_name = (path.parent == Path() and not path.suffix) or (
        path.parent == Path("experiments") and path.suffix == ".yaml"
    )
    if os.path.isfile(path) or not is_name:
        return path
    places = list_places("experiments")
    for place in places:
        if os.path.isfile(place / f"{path.stem}.yaml"):
            return place / f"{path.stem}.yaml"
    if os.path.lexists(path):
        return path  # not a file, e.g. a folder; reading it raises a specific error
    known = sorted({file.stem for place in places for file in place.glob("*.yaml")})
    shipped = f" Experiments that come with dlfer: {', '.join(known)}." if known else ""
    raise ConfigError(f"{path}: there is no such file, and no experiment of this name comes with dlfer.{shipped}")


def load_recorded_experiment(path: Path | str) -> ExperimentConfig:
    """Read the complete experiment that a run recorded, with this version of dlfer or an earlier one.

    Renamed keys get their current names. The values of `search.space` and the cells of `sweep` are not validated: in
    the experiment of a member, one of them is set, and the others need not be compatible with it.

    Raises:
        ConfigError: the file is invalid; the message lists every problem.
    """
    tree, marks = _read_with_parents(Path(path), ())
    return _finish(rename_keys(tree), marks, [], str(path), check_search=False)


def parse_recorded_experiment(text: str, name: str) -> ExperimentConfig:
    """Parse the output of `dump_experiment` like `load_recorded_experiment`; `name` identifies the text in messages.

    Raises:
        ConfigError: the text is invalid; the message lists every problem.
    """
    document = parse_yaml(text, name)
    _check_mapping(document.data, name)
    return _finish(rename_keys(document.data), document.marks, [], name, check_search=False)


def with_overrides(config: ExperimentConfig, overrides: Mapping[str, object]) -> ExperimentConfig:
    """Return a validated copy of `config` with some dotted keys set.

    Raises:
        ConfigError: a key is unknown, a value is invalid, or a loss no longer fits the head's activation.
    """
    tree = config.model_dump(mode="json")
    marks: dict[Key, str] = {}
    problems = _apply(tree, marks, overrides)
    check_search = any(key.split(".")[0] in ("search", "sweep", "ablation") for key in overrides)
    name = f"experiment {config.experiment.name} with overrides"
    changed = _finish(tree, marks, problems, name, check_search=check_search)
    # A recorded experiment that has this problem already can still be read and changed.
    wrong = [
        Problem((stage, "loss", "name"), text).format(marks)
        for stage in ("pretrain", "finetune")
        if (text := changed.describe_loss_mismatch(stage)) and not config.describe_loss_mismatch(stage)
    ]
    if wrong:
        raise ConfigError(
            f"{name}: {len(wrong)} problem{'s' if len(wrong) != 1 else ''}:\n{list_problems(wrong, indent='  ')}"
        )
    return changed


def parse_override(text: str) -> tuple[str, Any]:
    """Return the dotted key and the YAML value of a `--set` argument, "a.b=value"; in a string, # begins no comment.

    Raises:
        ConfigError: there is no "=" or no key, the value is not YAML, or a comment follows a value that is no string.

    Example:
        >>> parse_override("finetune.optimizer.learning_rate=1e-4")
        ('finetune.optimizer.learning_rate', 0.0001)
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, e.g. --set finetune.epochs=10 or --set pretrain=null.")
    return key, parse_value(value, f"--set {key}")


def resolve_path(text: str) -> Path:
    """Return a path of an experiment with ~ and environment variables expanded.

    `${DLFER_DATA}` defaults to ./data. A relative path is relative to the working directory.

    Raises:
        ConfigError: a variable is not set.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        value = os.environ.get(name) or _DEFAULTS.get(name)
        if not value:
            raise ConfigError(f"{text}: the environment variable {name} is not set; set it, or write the full path.")
        return value

    return expand_home(VARIABLE.sub(fill, text))


def dump_experiment(config: ExperimentConfig) -> str:
    """Return the complete experiment as YAML text, including all defaults; loading it gives an equal config."""
    header = f"# The experiment {config.experiment.name} in full. It runs again with: dlfer run THIS_FILE\n"
    return header + format_yaml(config.model_dump(mode="json"))


def compute_digest(config: ExperimentConfig) -> str:
    """Return the sha256 (hex, 64 characters) of all keys that determine an experiment's result.

    Excluded are experiment.name, .checkpoint_minutes, .track and .track_model, and the sections expected, search,
    sweep and ablation.
    """
    values = config.model_dump(mode="json", exclude={"expected", "search", "sweep", "ablation"})
    for key in ("name", "checkpoint_minutes", "track", "track_model"):
        del values["experiment"][key]
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return the merged values of a file and its parents, and the file and line of each value."""
    document = read_yaml(path)
    _check_mapping(document.data, path)
    tree, marks = document.data, document.marks
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, marks
    where = marks[("extends",)]
    if not isinstance(parent, str):
        raise ConfigError(f"{where}: extends: found {parent!r}, expected the name of one experiment file.")
    parent_path = path.parent / parent
    chain = (*children, path)
    if any(parent_path.resolve() == child.resolve() for child in chain) or len(chain) > _MAX_PARENTS:
        names = " -> ".join(str(child) for child in (*chain, parent_path))
        raise ConfigError(f"{where}: extends: the files extend each other in a circle: {names}.")
    if not parent_path.is_file():
        raise ConfigError(
            f"{where}: extends: there is no file {parent_path}; the path is relative to the folder of the file."
        )
    parent_tree, parent_marks = _read_with_parents(parent_path, chain)
    return _merge(parent_tree, tree, parent_marks, ()), {**parent_marks, **marks}


def _check_mapping(data: object, where: object) -> None:
    if not isinstance(data, dict):
        found = {type(None): "nothing", str: "text", list: "a list"}.get(type(data), "a single value")
        raise ConfigError(
            f"{where}: found {found}, expected an experiment file with sections: experiment, model, finetune ... "
            "dlfer init DATA writes one for a folder of images, a csv or an .npz."
        )


def _merge(
    parent: dict[str, Any], child: dict[str, Any], parent_marks: dict[Key, str], location: Key
) -> dict[str, Any]:
    """Merge the child's values into the parent's by the rules in the module's docstring, and return the result.

    The marks of replaced values are removed from `parent_marks`.
    """
    merged = dict(parent)
    for key, value in child.items():
        above = parent.get(key)
        if isinstance(above, dict) and isinstance(value, dict) and not _is_other_source(above, value):
            merged[key] = _merge(above, value, parent_marks, (*location, key))
        else:
            merged[key] = value
            _forget(parent_marks, (*location, key))
    return merged


def _is_other_source(parent: dict[str, Any], child: dict[str, Any]) -> bool:
    return "source" in parent and "source" in child and parent["source"] != child["source"]


def _forget(marks: dict[Key, str], key: Key) -> None:
    """Remove the marks of a key and of all keys below it."""
    for stale in [mark for mark in marks if mark[: len(key)] == key]:
        del marks[stale]


def _apply(tree: dict[str, Any], marks: dict[Key, str], overrides: Mapping[str, object]) -> list[Problem]:
    """Set the overrides in `tree`, and return the problems of those that cannot be set."""
    problems = []
    for dotted, value in overrides.items():
        key = split_key(dotted)
        if dotted == "extends":
            problems.append(Problem(key, "cannot be set by an override; write it in a file."))
            continue
        try:
            plain = _to_plain(value)
        except RecursionError:
            problems.append(Problem(key, "is nested too deeply, or contains itself."))
            continue
        # The recorded file and line are those of the replaced value.
        _forget(marks, key)
        num_found = set_value(tree, key, plain)
        for end in range(num_found + 1, len(key) + 1):
            marks[key[:end]] = f"--set {dotted}"
    return problems


def _to_plain(value: Any) -> Any:
    """Return a copy of a value from Python code, converted to the types that a YAML file gives."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # Duck typing converts NumPy numbers and arrays without importing NumPy.
    return copy.deepcopy(value.tolist() if hasattr(value, "tolist") else value)


def _finish(
    tree: dict[str, Any], marks: Mapping[Key, str], problems: list[Problem], name: str, *, check_search: bool
) -> ExperimentConfig:
    _drop_nulls(tree, ExperimentConfig)
    config, found = validate(tree)
    problems = problems + found
    if check_search:
        problems += [*check_space(tree), *check_sweep(tree), *check_ablation(tree)]
        wrong = {stage: config.describe_loss_mismatch(stage) for stage in ("pretrain", "finetune")} if config else {}
        problems += [Problem((stage, "loss", "name"), text) for stage, text in wrong.items() if text]
    if problems or config is None:
        lines = list_problems([problem.format(marks) for problem in problems], indent="  ")
        raise ConfigError(f"{name}: {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{lines}")
    return config


def _drop_nulls(values: dict[str, Any], section: type[Section]) -> None:
    """Remove sections and free keys that are null but not nullable, so that they get their defaults."""
    for name, field in get_fields(section).items():
        value = values.get(name)
        below, free = get_section(field.annotation), get_mapping_value(field.annotation)
        if value is None and name in values and (below or free) and not is_nullable(field.annotation):
            del values[name]
        elif isinstance(value, dict) and below is not None:
            _drop_nulls(value, below)
        elif isinstance(value, dict) and free is not None and not is_nullable(free):
            values[name] = {key: item for key, item in value.items() if item is not None}
