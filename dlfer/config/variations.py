"""The variations of an experiment: the cells of `sweep`, the arms of `ablation`, and the ranges of `search.space`.

The cells of a sweep are all combinations of the values of its grid. An axis of the grid is a dotted key with a list of
values, or a free name with named bundles of keys that belong together (an optimiser and its learning rate, a backbone
and its image size). A key below a section that the same cell sets to null is left out: a cell without EF-FER1 has no
`pretrain.image_size`, so the combinations that differ only in that key are one cell.

Each known key in a space has one range, whose ends must be valid values. A range may depend on another key:
`finetune.optimizer.momentum: {between: [0.8, 0.99], when: {finetune.optimizer.name: [sgd]}}` is searched only in trials
with the optimiser sgd; in the others the key has the experiment's own value.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from dlfer.config.keys import (
    Problem,
    describe_unknown_key,
    find_annotation,
    get_alternatives,
    split_key,
    validate,
)
from dlfer.config.schema import ExperimentConfig

MAX_CELLS = 1000
_MAX_SHOWN = 10


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep.

    Attributes:
        name: the name in tables and in the report.
        settings: axis -> its value as text; empty for a cell from `sweep.cells`.
        overrides: dotted key -> value, each section before the keys in it.
    """

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)


def list_cells(config: ExperimentConfig) -> list[Cell]:
    """Return the cells of an experiment's sweep: those of the grid, first axis slowest, then those of `sweep.cells`.

    Example:
        >>> [cell.name for cell in list_cells(load_experiment("backbones.yaml"))][:2]
        ['b0, adam, batch_size=16', 'b0, adam, batch_size=32']
    """
    if config.sweep is None:
        return []
    return _merge_same(_iterate_cells(config.sweep.model_dump(mode="json"), has_pretrain=config.pretrain is not None))


def check_sweep(tree: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of `sweep` in the values of an experiment file.

    The keys are checked first; if all are valid, every cell is validated as an experiment.
    """
    sweep = tree.get("sweep")
    grid, named = (sweep.get(name, {}) for name in ("grid", "cells")) if isinstance(sweep, dict) else (None, None)
    if not isinstance(grid, dict) or not isinstance(named, dict):
        return []
    if any(not isinstance(overrides, dict) for overrides in named.values()):
        return []  # the validation by the schema reports it
    problems = [
        *_check_axes(grid),
        *_check_bundles(("sweep", "cells"), named),
        *_check_repeated_keys(grid),
        *_check_best_of(sweep, grid),
    ]
    if problems:
        return problems
    num_cells = len(named) + (math.prod(len(values) for values in grid.values()) if grid else 0)
    if num_cells > MAX_CELLS:
        return [Problem(("sweep", "grid"), f"gives {num_cells:,} cells, expected at most {MAX_CELLS:,}.")]
    cells = _merge_same(_iterate_cells(sweep, has_pretrain=tree.get("pretrain") is not None))
    return _check_names(sweep, cells) or _check_cells(tree, cells)


def check_ablation(tree: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of `ablation.with` and `ablation.without` in the values of an experiment file.

    The keys are checked first; then each arm is validated as an experiment, with its valid keys.
    """
    ablation = tree.get("ablation")
    if not isinstance(ablation, dict):
        return []
    problems = []
    for arm in ("with", "without"):
        keys = ablation.get(arm) or {}
        if not isinstance(keys, dict):
            continue  # the validation by the schema reports it
        wrong = {dotted: text for dotted in keys if (text := _check_arm_key(arm, dotted))}
        problems += [Problem(("ablation", arm, dotted), text) for dotted, text in wrong.items()]
        problems += _check_arm(tree, arm, {dotted: value for dotted, value in keys.items() if dotted not in wrong})
    return problems


def _check_arm_key(arm: str, dotted: Any) -> str | None:
    if isinstance(dotted, str) and dotted == "experiment.seed":
        return "list the seeds in ablation.seeds: every arm is trained with each of them."
    if isinstance(dotted, str) and dotted.split(".")[0] == "pretrain" and (arm == "without" or dotted == "pretrain"):
        return "the arms differ by EF-FER1 (pretrain); this key cannot be set here."
    return _check_key(dotted)


def _check_arm(tree: Mapping[str, Any], arm: str, keys: Mapping[str, Any]) -> list[Problem]:
    base = {name: section for name, section in tree.items() if name not in ("ablation", "sweep", "search")}
    before = set(validate(base)[1])
    settings = {"pretrain": None} if arm == "without" else {}
    problems = []
    for problem in validate_with(base, settings | sort_keys(keys), before)[1]:
        dotted = ".".join(problem.key)
        culprit = next((key for key in keys if is_within(dotted, key)), None)
        where = ("ablation", arm) if culprit is None else ("ablation", arm, culprit)
        problems.append(Problem(where, f"does not fit: {dotted}: {problem.text}"))
    return problems


def _iterate_cells(sweep: Mapping[str, Any], *, has_pretrain: bool) -> Iterator[Cell]:
    grid = sweep.get("grid", {})
    axes = {axis: _list_values(axis, values, grid) for axis, values in grid.items()}
    if axes:
        for choice in product(*axes.values()):
            yield _combine(dict(zip(axes, choice, strict=True)), has_pretrain=has_pretrain)
    for name, overrides in sweep.get("cells", {}).items():
        yield Cell(name, {}, sort_keys(overrides))


@dataclass(frozen=True)
class _Value:
    """One value of an axis: its part of the cell's name, its value as text, and the keys that it sets."""

    title: str
    setting: str
    overrides: dict[str, Any]


def _list_values(axis: str, values: Any, grid: Mapping[str, Any]) -> list[_Value]:
    if isinstance(values, Mapping):
        return [_Value(name, name, dict(overrides)) for name, overrides in values.items()]
    short = shorten_axis(axis, [other for other, found in grid.items() if not isinstance(found, Mapping)])
    return [_Value(f"{short}={_show(value)}", _show(value), {axis: value}) for value in values]


def _combine(chosen: Mapping[str, _Value], *, has_pretrain: bool) -> Cell:
    """Combine one value of every axis into a cell, without the keys below a section that is null in it."""
    everything = {key: item for value in chosen.values() for key, item in value.overrides.items()}
    absent = [key for key, value in everything.items() if value is None]
    if not has_pretrain and "pretrain" not in everything:
        absent.append("pretrain")
    titles, settings, kept = [], {}, {}
    for axis, value in chosen.items():
        left = {key: item for key, item in value.overrides.items() if not any(key.startswith(f"{a}.") for a in absent)}
        kept |= left
        if left or not value.overrides:
            titles.append(value.title)
            settings[axis] = value.setting
    return Cell(", ".join(titles) or "as it is", settings, sort_keys(kept))


def sort_keys(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys in the order in which they must be set: each section before the keys in it."""
    return dict(sorted(overrides.items(), key=lambda item: item[0].count(".")))


def _merge_same(cells: Iterator[Cell]) -> list[Cell]:
    """Return the cells without repetitions, which occur where keys were left out."""
    merged: list[Cell] = []
    for cell in cells:
        if cell not in merged:
            merged.append(cell)
    return merged


def shorten_axis(axis: str, others: Collection[str]) -> str:
    """Return the last parts of a dotted key, as few as needed so that no other axis ends with them."""
    parts = axis.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other != axis and f".{other}".endswith(f".{end}") for other in others):
            return end
    return axis


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _check_axes(grid: Mapping[str, Any]) -> Iterator[Problem]:
    for axis, values in grid.items():
        key = ("sweep", "grid", axis)
        if isinstance(values, list):
            wrong = _check_key(axis)
            shown = [_show(value) for value in values]
            if wrong is None and not values:
                wrong = "found an empty list, expected values."
            if wrong is None and len(set(shown)) < len(shown):
                wrong = f"found {next(text for text in shown if shown.count(text) > 1)} twice."
            if wrong:
                yield Problem(key, wrong)
        elif isinstance(values, Mapping) and values and all(isinstance(item, Mapping) for item in values.values()):
            yield from _check_bundles(key, values)
        else:
            yield Problem(
                key,
                f"found {_show(values)[:80]}, expected a list of values, or named bundles of keys: "
                "{name: {dotted.key: value}, other name: {dotted.key: value}}.",
            )


def _check_bundles(key: tuple[str, ...], bundles: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    for name, overrides in bundles.items():
        for dotted in overrides:
            wrong = _check_key(dotted)
            if wrong:
                yield Problem((*key, name, dotted), wrong)


def _check_key(dotted: Any) -> str | None:
    if not isinstance(dotted, str):
        return "expected a dotted key, e.g. finetune.batch_size."
    if dotted == "experiment.seed":
        return "list the seeds in sweep.seeds: every cell is trained with each of them."
    return check_key(dotted, "set keys of model, pretrain, finetune, evaluate.")


def _check_repeated_keys(grid: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each key that two axes set, since one value would overwrite the other."""
    setters: dict[str, list[str]] = {}
    for axis, values in grid.items():
        bundles = values.values() if isinstance(values, Mapping) else [{axis: None}]
        keys = {key: None for bundle in bundles if isinstance(bundle, Mapping) for key in bundle}
        for key in keys:
            setters.setdefault(key, []).append(axis)
    for key, axes in setters.items():
        if len(axes) > 1:
            yield Problem(("sweep", "grid", axes[-1]), f"sets {key}, as {axes[0]} does; only one axis may set a key.")


def _check_best_of(sweep: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each name in `best_of` that is not an axis of the grid, or is repeated."""
    names = sweep.get("best_of") or ()
    if not isinstance(names, list | tuple) or any(not isinstance(name, str) for name in names):
        return  # the validation by the schema reports it
    for name in dict.fromkeys(names):
        if name not in grid:
            near = _find_near_axis(name, list(grid))
            mend = f" Did you mean {near}?" if near else ""
            known = f"the axes: {', '.join(grid)}" if grid else "it is empty"
            yield Problem(("sweep", "best_of"), f"sweep.grid has no axis {name!r}; {known}.{mend}")
        elif list(names).count(name) > 1:
            yield Problem(("sweep", "best_of"), f"found {name} twice.")


def _find_near_axis(name: str, axes: list[str]) -> str | None:
    """Return the axis with the most similar name, in full or by its last part; None if none is similar."""
    spellings = {axis.rsplit(".", 1)[-1]: axis for axis in axes} | {axis: axis for axis in axes}
    near = difflib.get_close_matches(name, spellings, n=1) or difflib.get_close_matches(
        name.rsplit(".", 1)[-1], spellings, n=1
    )
    return spellings[near[0]] if near else None


def _check_names(sweep: Mapping[str, Any], cells: list[Cell]) -> list[Problem]:
    names = [cell.name for cell in cells]
    if len(names) < 2:
        found = f"one cell, {names[0]}" if names else "no cell"
        return [Problem(("sweep",), f"found {found}; expected two or more, in grid or cells.")]
    if any(not name.strip() for name in names):
        return [Problem(("sweep",), "found a cell without a name; give every bundle and cell one.")]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        return [Problem(("sweep",), f"two cells are called {repeated!r}; give bundles and cells different names.")]
    reference = sweep.get("reference")
    if reference is not None and reference not in names:
        known = "; ".join(names[:_MAX_SHOWN]) + (" ..." if len(names) > _MAX_SHOWN else "")
        return [Problem(("sweep", "reference"), f"there is no cell {reference!r}; the cells: {known}.")]
    return []


def _check_cells(tree: Mapping[str, Any], cells: list[Cell]) -> list[Problem]:
    """Validate every cell, and return the problems that the experiment without the sweep does not have."""
    base = {name: section for name, section in tree.items() if name != "sweep"}
    before = set(validate(base)[1])
    problems: dict[Problem, None] = {}
    seen: dict[str, str] = {}
    for cell in cells:
        config, new = validate_with(base, cell.overrides, before)
        problems |= {_place(problem, cell, tree["sweep"]): None for problem in new}
        if config is not None:
            text = config.model_dump_json()
            same = seen.setdefault(text, cell.name)
            if same != cell.name:
                problems[Problem(("sweep",), f"the cells {same!r} and {cell.name!r} are the same experiment.")] = None
    return list(problems)[:_MAX_SHOWN]


def _place(problem: Problem, cell: Cell, sweep: Mapping[str, Any]) -> Problem:
    """Return a cell's problem with the key of the value that causes it, or else that of the cell or the grid."""
    dotted = ".".join(problem.key)
    culprit = next((key for key in cell.overrides if is_within(dotted, key)), None)
    if not cell.settings and cell.name in sweep.get("cells", {}):
        where: tuple[str, ...] = ("sweep", "cells", cell.name)
        return Problem((*where, culprit) if culprit else where, f"does not fit: {dotted}: {problem.text}")
    for axis, name in cell.settings.items():
        values = sweep["grid"][axis]
        if culprit is not None and isinstance(values, Mapping) and culprit in values[name]:
            return Problem(("sweep", "grid", axis, name, culprit), f"does not fit: {dotted}: {problem.text}")
        if culprit is not None and axis == culprit:
            return Problem(
                ("sweep", "grid", axis),
                f"the value {_show(cell.overrides[axis])} does not fit: {dotted}: {problem.text}",
            )
    return Problem(("sweep", "grid"), f"the cell {cell.name!r} does not fit: {dotted}: {problem.text}")


KINDS = ("log", "between", "choice")
FIXED = (
    "experiment.name",
    "experiment.checkpoint_minutes",
    "experiment.track",
    "experiment.track_model",
    "expected",
    "search",
    "ablation",
    "sweep",
)
"""Keys that do not change the result of a run, so that varying them is useless."""


def check_space(tree: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of `search.space` in the values of an experiment file.

    The experiment is validated with each end of a range and with each choice, one at a time. For keys below a stage
    that is null (in the arm without EF-FER1), only their existence and the range are checked.
    """
    search = tree.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if not isinstance(space, dict):
        return []
    if not space:
        return [Problem(("search", "space"), "is empty; expected at least one dotted key with a range.")]
    before = set(validate(tree)[1])
    problems = []
    for dotted, spec in space.items():
        key = ("search", "space", dotted)
        wrong = check_key(dotted, "search over keys of model, pretrain, finetune.") or _check_comparable(dotted)
        if wrong is None and isinstance(spec, dict):
            wrong = _check_spec(spec) or _check_step(dotted, spec) or _check_when(space, dotted)
            if wrong is None and tree.get(dotted.split(".")[0], {}) is not None:
                wrong = _check_values(tree, dotted, space, before)
        if wrong:
            problems.append(Problem(key, wrong))
    return problems


_OF_IMAGES = (
    "source",
    "path",
    "name",
    "splits",
    "folders",
    "protocol",
    "fold",
    "folds",
    "split",
    "select_on",
    "labels",
    "fraction",
    "seed",
)


def _check_comparable(dotted: str) -> str | None:
    """Return why trials that differ in a key cannot be ranked on validation; None if they can."""
    if is_within(dotted, "experiment.seed"):
        return "a search over seeds finds the luckiest one; take it out, and train the best trial with several seeds."
    keys = [*(f"finetune.data.{key}" for key in _OF_IMAGES), "finetune.data.num_images.validation"]
    if any(is_within(dotted, key) or is_within(key, dotted) for key in keys):
        return "trials would be ranked on different validation images; take it out, and compare them by a sweep or by runs of their own."
    return None


def check_key(dotted: str, hint: str) -> str | None:
    """Return why a dotted key cannot be varied, with `hint` on the keys that can; None if it can be varied."""
    if any(is_within(dotted, fixed) for fixed in FIXED):
        return f"does not change the result of a run; {hint}"
    parts = split_key(dotted)
    if find_annotation(parts) is not None:
        return None
    return describe_unknown_key(parts) or "there is no such key."


def is_within(dotted: str, section: str) -> bool:
    """Return whether a dotted key is `section` or a key below it."""
    return dotted == section or dotted.startswith(f"{section}.")


def _check_spec(spec: Mapping[str, Any]) -> str | None:
    """Return what is wrong with {log: [low, high]}, {between: [low, high], step: s} or {choice: [...]}."""
    kinds = [name for name in spec if name in KINDS]
    allowed = (*KINDS, "when", "step") if kinds == ["between"] else (*KINDS, "when")
    if len(kinds) != 1 or any(name not in allowed for name in spec):
        return (
            f"found {', '.join(spec) or 'nothing'}; expected exactly one of "
            "log: [low, high], between: [low, high] (with step: s if wanted), choice: [...]; "
            "and optionally when: {KEY: [values]}."
        )
    kind, values = kinds[0], spec[kinds[0]]
    if kind == "choice":
        if not isinstance(values, list) or not values:
            return f"choice: found {values!r}, expected a list of values."
        texts = [json.dumps(value, sort_keys=True) for value in values]
        twice = next((value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1), None)
        return (
            None if len(set(texts)) == len(texts) else f"choice: found {_show(twice)} twice, expected different values."
        )
    if not (isinstance(values, list) and len(values) == 2 and all(_is_number(value) for value in values)):
        return f"{kind}: found {values!r}, expected two numbers, [low, high]."
    low, high = values
    if not low < high:
        return f"{kind}: found low {low} and high {high}, expected low < high."
    if kind == "log" and low <= 0:
        return f"log: found low {low}, expected more than 0; a logarithm has none."
    step = spec.get("step")
    if step is not None and not (_is_number(step) and 0 < step <= high - low):
        return f"step: found {step!r}, expected a number in 0..{high - low} (more than 0)."
    return None


def _check_step(dotted: str, spec: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the step of a key that is an integer; None if nothing is."""
    alternatives, step = get_alternatives(find_annotation(split_key(dotted))), spec.get("step")
    if step is None or float in alternatives or float(step).is_integer():
        return None
    return f"step: found {step}, expected a whole number, as the key takes no others."


def _check_when(space: Mapping[str, Any], dotted: str) -> str | None:
    """Return what is wrong with the condition of a range; it must name choices of the space, without a cycle."""
    when = space[dotted].get("when", {})
    if not isinstance(when, dict) or not all(isinstance(values, list) and values for values in when.values()):
        return f"when: found {when!r}, expected {{KEY: [values]}}, e.g. {{finetune.optimizer.name: [sgd]}}."
    for parent, values in when.items():
        spec = space.get(parent)
        if not isinstance(spec, dict) or not isinstance(spec.get("choice"), list):
            choices = ", ".join(key for key, other in space.items() if isinstance(other, dict) and "choice" in other)
            return f"when: {parent} is no choice of this space; {f'those are {choices}' if choices else 'it has none'}."
        strange = [value for value in values if value not in spec["choice"]]
        if strange:
            return f"when: {parent} never is {strange[0]!r}; its choices are {spec['choice']}."
    if dotted in list_ancestors(space, dotted):
        return "when: the conditions form a circle."
    return None


def list_ancestors(space: Mapping[str, Any], dotted: str) -> list[str]:
    """Return the keys that the condition of `dotted` depends on, directly or indirectly."""
    found: list[str] = []
    queue = list(_get_when(space, dotted))
    while queue:
        parent = queue.pop(0)
        if parent not in found:
            found.append(parent)
            queue += list(_get_when(space, parent))
    return found


def _get_when(space: Mapping[str, Any], dotted: str) -> Mapping[str, Any]:
    """Return the condition of a key; {} if there is none or it is malformed."""
    spec = space.get(dotted)
    when = spec.get("when", {}) if isinstance(spec, dict) else {}
    return when if isinstance(when, dict) else {}


def _check_values(tree: Mapping[str, Any], dotted: str, space: Mapping[str, Any], before: set[Problem]) -> str | None:
    spec = space[dotted]
    for value in spec["choice"] if "choice" in spec else spec.get("log", spec.get("between")):
        for setting in _list_settings(space, dotted):
            _, new = validate_with(tree, {**setting, dotted: value}, before)
            if new:
                where = "".join(f" where {key} is {given!r}" for key, given in setting.items())
                return f"the value {value!r} does not fit{where}: {'.'.join(new[0].key)}: {new[0].text}"
    return None


def _list_settings(space: Mapping[str, Any], dotted: str) -> Iterator[dict[str, Any]]:
    """Yield the combinations of other keys' values under which `dotted` is searched; {} if it has no condition."""
    allowed: dict[str, list[Any]] = {}
    for key in reversed([dotted, *list_ancestors(space, dotted)]):
        for parent, values in _get_when(space, key).items():
            known = allowed.get(parent, values)
            allowed[parent] = [value for value in known if value in values]
    for values in itertools.product(*allowed.values()):
        yield dict(zip(allowed, values, strict=True))


def validate_with(
    tree: Mapping[str, Any], settings: Mapping[str, Any], before: set[Problem]
) -> tuple[ExperimentConfig | None, list[Problem]]:
    """Return the experiment with some dotted keys set (None if invalid), and the problems that are not in `before`."""
    changed = copy.deepcopy(dict(tree))
    for dotted, value in settings.items():
        set_value(changed, split_key(dotted), copy.deepcopy(value))
    config, found = validate(changed)
    return config, [problem for problem in found if problem not in before]


def set_value(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> int:
    """Set a key in nested mappings; a section that is missing or null is created.

    Returns:
        The number of leading parts of `key` that existed before.
    """
    num_found = 0
    for part in key[:-1]:
        below = tree.get(part)
        if isinstance(below, dict):
            num_found += 1
        else:
            below = tree[part] = {}
        tree = below
    tree[key[-1]] = value
    return num_found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
