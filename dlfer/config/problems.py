"""All problems of an experiment at once, each in the words of the person who wrote the file."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dlfer.config.aliases import find_keys
from dlfer.config.keys import (
    Key,
    describe_unknown_key,
    find_annotation,
    get_alternatives,
    get_choices,
    get_mapping_value,
    get_section,
)
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import get_fields

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
    """One thing that is wrong: the key it concerns, and a sentence."""

    key: Key
    text: str

    def format(self, marks: Mapping[Key, str]) -> str:
        """Return the sentence with the place of the key, or of the section it is missing from."""
        key, text = _cut(".".join(self.key), 200), _cut(self.text, MAX_TEXT)
        for end in range(len(self.key), -1, -1):
            if self.key[:end] in marks:
                return f"{_cut(marks[self.key[:end]], MAX_TEXT)}: {key}: {text}"
        return f"{key}: {text}"


def list_problems(lines: Sequence[str], indent: str = "") -> str:
    """Return the first problems, one a line, and how many more there are."""
    shown = [f"{indent}{line}" for line in lines[:MAX_LISTED]]
    more = [f"{indent}... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n".join(shown + more)


def validate(tree: Mapping[str, Any]) -> tuple[ExperimentConfig | None, list[Problem]]:
    """Return the experiment that `tree` describes, or None and every problem that stands in its way."""
    try:
        # Half a character (a byte of a command line that is no UTF-8) is an error here, in pydantic a strange one.
        text = json.dumps(tree, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return None, [
            Problem((), f"found a value that YAML cannot contain ({error}); use text, numbers, lists, mappings.")
        ]
    try:
        # By way of JSON, strict validation takes a list for a tuple, and still no text for a number.
        return ExperimentConfig.model_validate_json(text), []
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None, [
                Problem((), f"cannot be read ({error.errors()[0]['ctx']['error']}); is it nested too deeply?")
            ]
        problems = _translate(error)
        unknown = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
    if unknown:
        # pydantic leaves out the rules of a section that has an unknown key: look again without those keys.
        rest = json.loads(text)
        for location in unknown:
            _delete(rest, location)
        known = {problem.key for problem in problems}
        problems += [problem for problem in validate(rest)[1] if problem.key not in known]
    return None, problems


def _translate(error: ValidationError) -> list[Problem]:
    """Return pydantic's errors as problems; the alternatives of one key are joined by "or"."""
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
    """Return the key of a pydantic location, which also names the members of unions it tried."""
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
    """Return the key that a rule of the schema names at its beginning, and the rest of the sentence."""
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
        text += " (without quotes)"
    return text


def _cut(text: str, length: int) -> str:
    """Return a text without its middle where it is too long: its end says what was expected."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _delete(tree: Any, location: tuple[str | int, ...]) -> None:
    for item in location[:-1]:
        tree = tree[item]
    del tree[location[-1]]
