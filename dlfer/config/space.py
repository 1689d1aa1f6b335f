"""What `search.space` may say: known keys, one kind of range each, and ends that the key can take."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from dlfer.config.keys import find_annotation, split_key, suggest_key
from dlfer.config.problems import Problem, validate

KINDS = ("log", "between", "choice")
FIXED = ("experiment.name", "expected", "search", "ablation", "experiment.checkpoint_minutes")
"""Keys that do not change the result of a run, so that searching over them means nothing."""


def check_space(tree: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of `search.space` in the values of an experiment file.

    Each extreme value (both ends, every choice) is set on its own, and the whole experiment is
    validated. Keys below a stage that is null here (the arm without EF-FER1) are only looked up.
    """
    search = tree.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if not isinstance(space, dict):
        return []
    if not space:
        return [Problem(("search", "space"), "is empty; expected at least one dotted key with a range.")]
    before = {(problem.key, problem.text) for problem in validate(tree)[1]}
    problems = []
    for dotted, spec in space.items():
        key = ("search", "space", dotted)
        wrong = _check_key(dotted)
        if wrong is None and isinstance(spec, dict):
            wrong = _check_spec(spec)
            if wrong is None and tree.get(dotted.split(".")[0], {}) is not None:
                wrong = _check_values(tree, dotted, spec, before)
        if wrong:
            problems.append(Problem(key, wrong))
    return problems


def _check_key(dotted: str) -> str | None:
    parts = split_key(dotted)
    if any(dotted == fixed or dotted.startswith(fixed + ".") for fixed in FIXED):
        return "does not change the result of a run; search over keys of model, pretrain, finetune."
    if find_annotation(parts) is not None:
        return None
    near = suggest_key(parts)
    return f"there is no such key.{f' Did you mean {near}?' if near else ''}"


def _check_spec(spec: Mapping[str, Any]) -> str | None:
    """Return what is wrong with {log: [low, high]}, {between: [low, high], step: s} or {choice: [...]}."""
    kinds = [name for name in spec if name in KINDS]
    extra = [name for name in spec if name not in KINDS and not (name == "step" and kinds == ["between"])]
    if len(kinds) != 1 or extra:
        return (
            f"found {', '.join(spec) or 'nothing'}; expected exactly one of "
            "log: [low, high], between: [low, high] (with step: s if wanted), choice: [...]."
        )
    kind, values = kinds[0], spec[kinds[0]]
    if kind == "choice":
        return None if isinstance(values, list) and values else f"choice: found {values!r}, expected a list of values."
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


def _check_values(
    tree: Mapping[str, Any], dotted: str, spec: Mapping[str, Any], before: set[tuple[Any, str]]
) -> str | None:
    for value in spec["choice"] if "choice" in spec else spec.get("log", spec.get("between")):
        changed = copy.deepcopy(dict(tree))
        set_value(changed, split_key(dotted), value)
        new = [problem for problem in validate(changed)[1] if (problem.key, problem.text) not in before]
        if new:
            return f"the value {value!r} does not fit: {'.'.join(new[0].key)}: {new[0].text}"
    return None


def set_value(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> int:
    """Set a key of nested mappings; a section that is absent or null is begun anew.

    Returns:
        How many leading parts of `key` stood there before.
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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
