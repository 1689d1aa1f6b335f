"""The dotted keys of the schema, and the validation of an experiment against it.

For an unknown key the nearest known one is suggested. All problems of an experiment are reported at once, in terms of
the keys in the file and not of pydantic's types.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from dlfer.config.aliases import find_keys
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import Section, get_fields

Key = tuple[str, ...]

RENAMED_KEYS = {
    "data.drop_twins": "data.drop_duplicates",
}
"""Former name of a key -> current name, both as the last parts of a dotted key, with the same number of parts. A former
name is an error in an experiment file, whose message gives the current one, but is accepted in records of old runs."""

_HOLDS_KEYS = (
    ("search", "space"),
    ("sweep", "grid"),
    ("sweep", "cells"),
    ("ablation", "with"),
    ("ablation", "without"),
)
"""Sections whose keys are dotted keys themselves, or names that may contain dots."""


def get_alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union type, without Annotated; for any other type, a tuple of that type alone."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return get_alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(part for member in typing.get_args(annotation) for part in get_alternatives(member))
    return (annotation,)


def get_section(annotation: Any) -> type[Section] | None:
    """Return the Section class among the alternatives of an annotation, if there is one."""
    for part in get_alternatives(annotation):
        if inspect.isclass(part) and issubclass(part, Section):
            return part
    return None


def get_mapping_value(annotation: Any) -> Any | None:
    """Return the type of the values if an annotation allows a dict with arbitrary keys, else None."""
    for part in get_alternatives(annotation):
        if typing.get_origin(part) is dict:
            return typing.get_args(part)[1]
    return None


def is_nullable(annotation: Any) -> bool:
    """Return whether an annotation allows null."""
    return type(None) in get_alternatives(annotation)


def split_key(dotted: str) -> Key:
    """Return the parts of a dotted key; what follows a section of _HOLDS_KEYS, e.g. search.space, is a single part."""
    parts = tuple(dotted.split("."))
    return (*parts[:2], ".".join(parts[2:])) if parts[:2] in _HOLDS_KEYS and len(parts) > 2 else parts


def find_annotation(key: Key) -> Any | None:
    """Return the type of a key in the schema, or None if there is no such key."""
    annotation: Any = ExperimentConfig
    for part in key:
        section, value = get_section(annotation), get_mapping_value(annotation)
        if section is not None and part in get_fields(section):
            annotation = get_fields(section)[part].annotation
        elif section is None and value is not None:
            annotation = value
        else:
            return None
    return annotation


def find_default(key: Key) -> Any:
    """Return the default of a known key; it is a mapping for a section, and None for a required key."""
    annotation: Any = ExperimentConfig
    default: Any = None
    for part in key:
        section = get_section(annotation)
        if section is None or part not in get_fields(section):
            return None
        field = get_fields(section)[part]
        annotation, default = field.annotation, None if field.is_required() else field.default
    return default.model_dump(mode="json") if isinstance(default, Section) else default


@functools.cache
def list_keys() -> tuple[str, ...]:
    """Return every dotted key of an experiment file, including sections, in the order of the schema."""
    return tuple(_walk(ExperimentConfig, ()))


def _walk(section: type[Section], above: Key) -> list[str]:
    found = []
    for name, field in get_fields(section).items():
        found.append(".".join((*above, name)))
        below = get_section(field.annotation)
        if below is not None:
            found += _walk(below, (*above, name))
    return found


def describe_unknown_key(key: Key) -> str | None:
    """Return a sentence with the key to write instead of an unknown one; None if no known key is similar."""
    dotted = ".".join(key)
    renamed = rename_key(dotted)
    if renamed != dotted:
        return f"this key was renamed to {renamed}."
    meant = find_keys(key) or [suggest_key(key)]
    return f"there is no such key. Did you mean {' or '.join(meant)}?" if meant[0] else None


def rename_key(dotted: str) -> str:
    """Return the current name of a dotted key: the key itself, unless it or a section above it was renamed.

    Example:
        >>> rename_key("finetune.data.drop_twins")
        'finetune.data.drop_duplicates'
    """
    whole = f".{dotted}."
    for former, present in RENAMED_KEYS.items():
        whole = whole.replace(f".{former}.", f".{present}.")
    return whole.strip(".")


def rename_keys(tree: Any, above: str = "") -> Any:
    """Return a tree of sections with the current names of all keys, including keys in lists and dotted keys.

    Args:
        tree: the contents of an experiment file or a part of them; scalars are returned unchanged.
        above: the dotted key of the tree itself.
    """
    if isinstance(tree, list):
        return [rename_keys(item, above) for item in tree]
    if not isinstance(tree, dict):
        return tree
    renamed = {}
    for key, value in tree.items():
        dotted = f"{above}.{key}" if above else str(key)
        present = rename_key(dotted)
        name = ".".join(present.split(".")[-len(str(key).split(".")) :]) if present != dotted else key
        renamed[name] = rename_keys(value, dotted)
    return renamed


def suggest_key(key: Key) -> str | None:
    """Return the known key nearest to an unknown one: a sibling with a similar name, else a similar name elsewhere.

    A key of the same stage has precedence: finetune.learning_rate suggests finetune.optimizer.learning_rate.
    """
    section = get_section(find_annotation(key[:-1]) or ExperimentConfig)
    siblings = list(get_fields(section)) if section is not None else []
    near = difflib.get_close_matches(key[-1], siblings, n=1)
    if near:
        return ".".join((*key[:-1], near[0]))
    names = {dotted.rsplit(".", 1)[-1] for dotted in list_keys()}
    near = difflib.get_close_matches(key[-1], sorted(names), n=1, cutoff=0.8)
    if not near:
        return None
    places = [dotted for dotted in list_keys() if dotted.rsplit(".", 1)[-1] == near[0]]
    # If several are equally near, prefer that of finetune, which most people change.
    return max(places, key=lambda dotted: (_count_shared(dotted.split("."), key), dotted[:1] == "f", -len(dotted)))


def get_choices(annotation: Any) -> tuple[str, ...]:
    """Return the strings that a key with a fixed set of values allows, or () for any other type."""
    return tuple(
        value
        for part in get_alternatives(annotation)
        if typing.get_origin(part) is Literal
        for value in typing.get_args(part)
        if isinstance(value, str)
    )


def _count_shared(parts: list[str], key: Key) -> int:
    shared = 0
    for a, b in zip(parts, key, strict=False):
        if a != b:
            break
        shared += 1
    return shared


_NAMES = {str: "text", int: "integer", float: "number", bool: "true/false", type(None): "null"}


def describe_keys() -> list[dict[str, str]]:
    """Return the name, values, default and meaning of every key, in the order of the schema."""
    rows = []
    for dotted in list_keys():
        key = tuple(dotted.split("."))
        section = get_section(find_annotation(key[:-1])) or ExperimentConfig
        field = get_fields(section)[key[-1]]
        below = get_section(field.annotation)
        default = "required" if field.is_required() else "" if below else json.dumps(find_default(key))
        meaning = field.description or (below.__doc__ if below else "") or ""
        values = _describe_values(field.annotation)
        rows.append({"key": dotted, "values": values, "default": default, "meaning": " ".join(meaning.split())})
    return rows


def format_keys() -> str:
    """Return all keys as text: name, values and default on one line, the meaning on the next."""
    lines = []
    for row in describe_keys():
        default = {"": "", "required": "   (required)"}.get(row["default"], f"   = {row['default']}")
        lines.append(f"{row['key']}: {row['values']}{default}")
        if row["meaning"]:
            lines.append(f"    {row['meaning']}")
    return "\n".join(lines)


def build_schema() -> dict[str, Any]:
    """Return a JSON Schema of experiment files, for completion and validation in an editor.

    It requires no key and allows null for every section, since a file may extend another one. The complete validation
    is that of `dlfer check`.
    """
    schema = ExperimentConfig.model_json_schema()
    schema["description"] = schema["description"].partition("\n")[0]
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
        section["properties"] = {name: _allow_null(value) for name, value in section.get("properties", {}).items()}
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "An experiment file, relative to this one, whose sections are merged with those here.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_null(value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    rest = {key: item for key, item in value.items() if key != "$ref"}
    return {**rest, "anyOf": [{"$ref": value["$ref"]}, {"type": "null"}]}


def _describe_values(annotation: Any) -> str:
    choices = get_choices(annotation)
    names = []
    for part in get_alternatives(annotation):
        if part in _NAMES:
            names.append(_NAMES[part])
        elif get_section(part):
            names.append("section")
        elif not get_choices(part):
            names.append({tuple: "list", dict: "mapping"}.get(getattr(part, "__origin__", None), "value"))
    return " | ".join([*choices, *names])


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a section of keys and values",
    "dict_type": "a section of keys and values",
    "tuple_type": "a list",
}
_LEADING_KEY = re.compile(r"^([a-z_0-9.]+): (.*)$", re.DOTALL)


MAX_LISTED, MAX_TEXT = 50, 1000


@dataclass(frozen=True)
class Problem:
    """A problem of an experiment: the key that it concerns, and a sentence."""

    key: Key
    text: str

    def format(self, marks: Mapping[Key, str]) -> str:
        """Return the sentence with the file and line of the key, or of the nearest section above it that has a mark."""
        key, text = _cut(".".join(self.key), 200), _cut(self.text, MAX_TEXT)
        for end in range(len(self.key), -1, -1):
            if self.key[:end] in marks:
                return f"{_cut(marks[self.key[:end]], MAX_TEXT)}: {key}: {text}"
        return f"{key}: {text}"


def list_problems(lines: Sequence[str], indent: str = "") -> str:
    """Return the first problems, one per line, and the number of the others."""
    shown = [f"{indent}{line}" for line in lines[:MAX_LISTED]]
    more = [f"{indent}... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n".join(shown + more)


def validate(tree: Mapping[str, Any]) -> tuple[ExperimentConfig | None, list[Problem]]:
    """Return the experiment that `tree` describes and no problems, or None and all problems."""
    try:
        # A lone surrogate (a byte of the command line that is not UTF-8) raises a clear error here, not in pydantic.
        text = json.dumps(tree, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return None, [
            Problem((), f"found a value that YAML cannot contain ({error}); use text, numbers, lists, mappings.")
        ]
    try:
        # From JSON, strict validation accepts a list for a tuple, but still no string for a number.
        return ExperimentConfig.model_validate_json(text), []
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None, [
                Problem((), f"cannot be read ({error.errors()[0]['ctx']['error']}); is it nested too deeply?")
            ]
        problems = _translate(error)
        unknown = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
    if unknown:
        # pydantic skips the validators of a section with an unknown key, so validate again without those keys.
        rest = json.loads(text)
        for location in unknown:
            _delete(rest, location)
        known = {problem.key for problem in problems}
        problems += [problem for problem in validate(rest)[1] if problem.key not in known]
    return None, problems


def _translate(error: ValidationError) -> list[Problem]:
    """Return pydantic's errors as problems; the expected alternatives of a key are joined by "or"."""
    texts: dict[Key, str] = {}
    expected: dict[Key, tuple[str, list[str]]] = {}
    for item in error.errors(include_url=False):
        key = _get_key(item["loc"])
        kind = item["type"]
        if kind == "value_error":
            key, text = _split_rule(key, str(item["ctx"]["error"]))
            texts[key] = f"{texts[key]} {text}" if key in texts else text
        elif kind == "extra_forbidden":
            texts[key] = _describe_unknown(key)
        elif kind == "missing":
            texts[key] = f"is missing; {_describe_kind(key)}"
        else:
            found = item["loc"][-2] if item["loc"][-1] == "[key]" else item["input"]
            expected.setdefault(key, (_show(found), []))[1].append(_describe_expected(item, key, found))
    for key, (found, parts) in expected.items():
        texts[key] = f"found {found}, expected {' or '.join(dict.fromkeys(parts))}."
    return [Problem(key, text) for key, text in texts.items()]


def _get_key(location: tuple[str | int, ...]) -> Key:
    """Return the key of a pydantic location, without the members of unions that pydantic adds to it."""
    key: list[str] = []
    annotation: Any = ExperimentConfig
    for item in location:
        section, value = get_section(annotation), get_mapping_value(annotation)
        if section is not None:
            key.append(str(item))
            if item not in get_fields(section):
                break
            annotation = get_fields(section)[item].annotation
        elif value is not None and item != "[key]":
            key.append(str(item))
            annotation = value
        elif isinstance(item, int):
            key.append(str(item))
        else:
            break
    return tuple(key)


def _split_rule(key: Key, text: str) -> tuple[Key, str]:
    """Split a validator's message: return the key that it begins with, and the rest of the sentence."""
    match = _LEADING_KEY.match(text)
    return ((*key, *match[1].split(".")), match[2]) if match else (key, text)


def _describe_unknown(key: Key) -> str:
    described = describe_unknown_key(key)
    if described is not None:
        return described
    section = get_section(find_annotation(key[:-1]) or ExperimentConfig)
    known = f" Known keys here: {', '.join(get_fields(section))}." if section else ""
    return f"there is no such key.{known}"


def _describe_kind(key: Key) -> str:
    annotation = find_annotation(key)
    section = get_section(annotation)
    if section is not None:
        required = [name for name, field in get_fields(section).items() if field.is_required()]
        return f"expected a section{' with ' + ', '.join(required) if required else ''}."
    choices = get_choices(annotation)
    if choices:
        return f"expected one of {', '.join(choices)}."
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return f"expected {names.get(get_alternatives(annotation)[0], 'a value')}."


def _describe_expected(item: Mapping[str, Any], key: Key, found: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(found, choices, n=1) if isinstance(found, str) else []
        listed = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        return f"{listed} (did you mean {near[0]}?)" if near else listed
    if kind == "string_pattern_mismatch":
        if key == ("experiment", "name"):
            return "lower-case letters, digits, - and _, beginning with a letter or digit"
        return f"text of the form {context['pattern']}"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"a list of at {'least' if kind == 'too_short' else 'most'} {bound} item{'s' if bound != 1 else ''}"
    text = _EXPECTED.get(kind, re.sub(r"^Input should be ", "", item["msg"]))
    if kind == "model_type" and not isinstance(found, list | dict):
        section, meant = get_section(find_annotation(key)), find_keys(key)
        if section is not None and not meant:
            text += f": {', '.join(get_fields(section))}"
        text += f" (did you mean {' or '.join(meant)}?)" if meant else ""
    if kind in ("int_type", "float_type") and isinstance(found, str) and _is_number(found):
        text += " (without quotes or underscores)" if "_" in found else " (without quotes)"
    return text


def _cut(text: str, length: int) -> str:
    """Return a text without its middle if it is too long; its end, which says what was expected, is kept."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _delete(tree: Any, location: tuple[str | int, ...]) -> None:
    for item in location[:-1]:
        tree = tree[item]
    del tree[location[-1]]
