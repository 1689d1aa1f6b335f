"""From an experiment file to an `ExperimentConfig` and back.

A file may name one parent (`extends: base.yaml`, relative to the file). The parent's sections are
merged key by key with the file's own; two rules go beyond that:

- `null` removes: a section set to null is absent (pretrain), or has its defaults again (augment);
- a section with a key `source` that differs from its parent's replaces the parent's section, since
  the path of a csv means nothing to synthetic faces.
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
from dlfer.config.names import list_places
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import Section, get_fields
from dlfer.config.strict_yaml import format_yaml, parse_value, parse_yaml, read_yaml
from dlfer.config.variations import check_ablation, check_space, check_sweep, set_value
from dlfer.errors import ConfigError

VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
"""What `resolve_path` takes for an environment variable: ${NAME} or $NAME."""
_DEFAULTS = {"DLFER_DATA": "data"}
_MAX_PARENTS = 20


def load_experiment(
    path: Path | str | ExperimentConfig, overrides: Mapping[str, object] | None = None
) -> ExperimentConfig:
    """Read an experiment file, set some of its keys, and check all of it.

    Args:
        path: of the file; or the name of an experiment that comes with dlfer (see `find_experiment`); or an experiment that
            was loaded before, which stays as it is.
        overrides: dotted key -> value, as `--set KEY=VALUE` takes them; None as a value is null in YAML. A value may be
            anything that YAML can hold, a path, or a number of NumPy.

    Returns:
        The frozen experiment: `config.finetune.epochs` and so on.

    Raises:
        ConfigError: with every problem of the file and the overrides in one message.

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
    """Raise ConfigError unless `overrides` is None, or a mapping whose keys are text."""
    if overrides is not None and not (
        isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides)
    ):
        raise ConfigError(
            f"overrides: found {overrides!r:.80}, expected a mapping of dotted keys to values, e.g. "
            '{"finetune.epochs": 3, "pretrain": None}.'
        )


def find_override(overrides: Mapping[str, object], key: str) -> str | None:
    """Return the override that gives a dotted key, by itself or in its section; None where none does."""
    for dotted, value in overrides.items():
        if dotted == key or (key.startswith(f"{dotted}.") and _has_key(value, key[len(dotted) + 1 :])):
            return dotted
    return None


def _has_key(value: object, dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    if not isinstance(value, Mapping) or first not in value:
        return False
    return not rest or _has_key(value[first], rest)


def find_experiment(name: Path | str) -> Path:
    """Return the file that a path or the name of an experiment that comes with dlfer leads to.

    A file is found by its path. Where there is none, `quickstart` and `experiments/quickstart.yaml` mean the experiment of that name
    in the first of `$DLFER_HOME/experiments`, the installed package and the checkout that has it. Other paths are returned unchanged.

    Raises:
        ConfigError: it has the form of such a name, and there is neither a file nor a shipped experiment.

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
        return path  # what it is instead of a file is said where it is read
    known = sorted({file.stem for place in places for file in place.glob("*.yaml")})
    shipped = f" Experiments that come with dlfer: {', '.join(known)}." if known else ""
    raise ConfigError(f"{path}: there is no such file, and no experiment of this name comes with dlfer.{shipped}")


def load_recorded_experiment(path: Path | str) -> ExperimentConfig:
    """Read back the complete experiment that a run wrote, by this version of dlfer or an earlier one.

    Keys that were renamed since have their present names. The ends of `search.space` and the cells of `sweep` are not
    tried: a member has one of their values, which the others need not fit.

    Raises:
        ConfigError: with every problem of the file in one message.
    """
    tree, marks = _read_with_parents(Path(path), ())
    return _finish(rename_keys(tree), marks, [], str(path), check_search=False)


def parse_recorded_experiment(text: str, name: str) -> ExperimentConfig:
    """Return the complete experiment that `dump_experiment` wrote, as `load_recorded_experiment` does; `name` is for errors.

    Raises:
        ConfigError: with every problem of the text in one message.
    """
    document = parse_yaml(text, name)
    return _finish(rename_keys(document.data), document.marks, [], name, check_search=False)


def with_overrides(config: ExperimentConfig, overrides: Mapping[str, object]) -> ExperimentConfig:
    """Return `config` with some dotted keys set, validated again.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    tree = config.model_dump(mode="json")
    marks: dict[Key, str] = {}
    problems = _apply(tree, marks, overrides)
    check_search = any(key.split(".")[0] in ("search", "sweep", "ablation") for key in overrides)
    name = f"experiment {config.experiment.name} with overrides"
    return _finish(tree, marks, problems, name, check_search=check_search)


def parse_override(text: str) -> tuple[str, Any]:
    """Return the dotted key and the YAML value of a `--set` argument, "a.b=value"; # is part of a text.

    Raises:
        ConfigError: there is no "=", no key, or the value is not YAML, or has a comment behind what is no text.

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
    """Return a path of an experiment with ~ and environment variables filled in.

    `${DLFER_DATA}` is ./data unless the environment says otherwise. A relative path counts from the
    working directory.

    Raises:
        ConfigError: a variable that is not set.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        value = os.environ.get(name) or _DEFAULTS.get(name)
        if not value:
            raise ConfigError(f"{text}: the environment variable {name} is not set; set it, or write the full path.")
        return value

    return Path(VARIABLE.sub(fill, text)).expanduser()


def dump_experiment(config: ExperimentConfig) -> str:
    """Return the complete experiment as YAML text, every default written out; it loads to an equal config."""
    header = f"# The experiment {config.experiment.name} in full. It runs again with: dlfer run THIS_FILE\n"
    return header + format_yaml(config.model_dump(mode="json"))


def compute_digest(config: ExperimentConfig) -> str:
    """Return the sha256 (hex, 64 characters) of all that determines an experiment's result.

    Left out: experiment.name, checkpoint_minutes, track and track_model, and the sections expected, search, sweep, ablation.
    """
    values = config.model_dump(mode="json", exclude={"expected", "search", "sweep", "ablation"})
    for key in ("name", "checkpoint_minutes", "track", "track_model"):
        del values["experiment"][key]
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return the merged values of a file and its parents, and where each of them stands."""
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        found = {type(None): "nothing", str: "text", list: "a list"}.get(type(document.data), "a single value")
        raise ConfigError(
            f"{path}: found {found}, expected an experiment file with sections: experiment, model, finetune ... "
            "dlfer init DATA writes one for a folder of images, a csv or an .npz."
        )
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


def _merge(
    parent: dict[str, Any], child: dict[str, Any], parent_marks: dict[Key, str], location: Key
) -> dict[str, Any]:
    """Return the parent's values with the child's set, as the module's docstring says.

    Marks of what the child replaces are taken out of `parent_marks`.
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
    """Take the places of a key and of all below it out of `marks`."""
    for stale in [mark for mark in marks if mark[: len(key)] == key]:
        del marks[stale]


def _apply(tree: dict[str, Any], marks: dict[Key, str], overrides: Mapping[str, object]) -> list[Problem]:
    """Set the overrides in `tree`; return problems of keys that cannot be set."""
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
        # The lines of what stood there say nothing about the new value.
        _forget(marks, key)
        num_found = set_value(tree, key, plain)
        for end in range(num_found + 1, len(key) + 1):
            marks[key[:end]] = f"--set {dotted}"
    return problems


def _to_plain(value: Any) -> Any:
    """Return a copy of a value that Python code set, as YAML would give it."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # Numbers and arrays of NumPy, which is not imported for this.
    return copy.deepcopy(value.tolist() if hasattr(value, "tolist") else value)


def _finish(
    tree: dict[str, Any], marks: Mapping[Key, str], problems: list[Problem], name: str, *, check_search: bool
) -> ExperimentConfig:
    _drop_nulls(tree, ExperimentConfig)
    config, found = validate(tree)
    problems = problems + found
    if check_search:
        problems += [*check_space(tree), *check_sweep(tree), *check_ablation(tree)]
        wrong = {stage: config.tell_wrong_loss(stage) for stage in ("pretrain", "finetune")} if config else {}
        problems += [Problem((stage, "loss", "name"), text) for stage, text in wrong.items() if text]
    if problems or config is None:
        lines = list_problems([problem.format(marks) for problem in problems], indent="  ")
        raise ConfigError(f"{name}: {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{lines}")
    return config


def _drop_nulls(values: dict[str, Any], section: type[Section]) -> None:
    """Take out sections and free keys that are null where null is no value: they have their defaults again."""
    for name, field in get_fields(section).items():
        value = values.get(name)
        below, free = get_section(field.annotation), get_mapping_value(field.annotation)
        if value is None and name in values and (below or free) and not is_nullable(field.annotation):
            del values[name]
        elif isinstance(value, dict) and below is not None:
            _drop_nulls(value, below)
        elif isinstance(value, dict) and free is not None and not is_nullable(free):
            values[name] = {key: item for key, item in value.items() if item is not None}
