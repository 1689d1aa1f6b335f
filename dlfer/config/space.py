"""What `search.space` may say: known keys, one kind of range each, and ends that the key can take.

A range may depend on another key: `finetune.optimizer.momentum: {between: [0.8, 0.99], when:
{finetune.optimizer.name: [sgd]}}` is searched only in trials whose optimiser is sgd; elsewhere the key
keeps the experiment's own value.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dlfer.config.keys import describe_unknown_key, find_annotation, split_key
from dlfer.config.problems import Problem, validate
from dlfer.config.schema import ExperimentConfig

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
"""Keys that do not change the result of a run, so varying them is useless."""


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
    before = set(validate(tree)[1])
    problems = []
    for dotted, spec in space.items():
        key = ("search", "space", dotted)
        wrong = check_key(dotted, "search over keys of model, pretrain, finetune.")
        if wrong is None and isinstance(spec, dict):
            wrong = _check_spec(spec) or _check_when(space, dotted)
            if wrong is None and tree.get(dotted.split(".")[0], {}) is not None:
                wrong = _check_values(tree, dotted, space, before)
        if wrong:
            problems.append(Problem(key, wrong))
    return problems


def check_key(dotted: str, hint: str) -> str | None:
    """Return why a dotted key cannot be varied; `hint` says what can. None where it can."""
    if any(is_within(dotted, fixed) for fixed in FIXED):
        return f"does not change the result of a run; {hint}"
    parts = split_key(dotted)
    if find_annotation(parts) is not None:
        return None
    return describe_unknown_key(parts) or "there is no such key."


def is_within(dotted: str, section: str) -> bool:
    """Tell whether a dotted key is `section` or stands below it."""
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


def _check_when(space: Mapping[str, Any], dotted: str) -> str | None:
    """Return what is wrong with the condition of a range: it names choices of the space, and no circle."""
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
    """Return the keys that the condition of `dotted` depends on, directly or through other keys."""
    found: list[str] = []
    queue = list(_get_when(space, dotted))
    while queue:
        parent = queue.pop(0)
        if parent not in found:
            found.append(parent)
            queue += list(_get_when(space, parent))
    return found


def _get_when(space: Mapping[str, Any], dotted: str) -> Mapping[str, Any]:
    """Return the condition of a key, {} where it has none or is written wrongly."""
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
    """Yield the settings of other keys under which `dotted` is searched; one empty setting without a condition."""
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
    """Return the experiment with some dotted keys set, or None, and the problems that are not among `before`."""
    changed = copy.deepcopy(dict(tree))
    for dotted, value in settings.items():
        set_value(changed, split_key(dotted), copy.deepcopy(value))
    config, found = validate(changed)
    return config, [problem for problem in found if problem not in before]


def set_value(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> int:
    """Set a key of nested mappings; a section that is absent or null is replaced by a new one.

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
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
