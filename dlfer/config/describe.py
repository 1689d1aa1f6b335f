"""The keys of an experiment file described: as rows for a reader, as a JSON Schema for editors."""

from __future__ import annotations

import json
from typing import Any

from dlfer.config.keys import find_annotation, find_default, get_alternatives, get_choices, get_section, list_keys
from dlfer.config.schema import ExperimentConfig
from dlfer.config.section import get_fields

_NAMES = {str: "text", int: "integer", float: "number", bool: "true/false", type(None): "null"}


def describe_keys() -> list[dict[str, str]]:
    """Return key, values, default and meaning of every key, in the order of the schema."""
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
    """Return the keys as text: key, values and default on a line, the meaning below."""
    lines = []
    for row in describe_keys():
        default = {"": "", "required": "   (required)"}.get(row["default"], f"   = {row['default']}")
        lines.append(f"{row['key']}: {row['values']}{default}")
        if row["meaning"]:
            lines.append(f"    {row['meaning']}")
    return "\n".join(lines)


def build_schema() -> dict[str, Any]:
    """Return a JSON Schema of experiment files, for completion and checks in an editor.

    Nothing is required in it and every section may be null, since a file may extend another one;
    `dlfer check` is what decides.
    """
    schema = ExperimentConfig.model_json_schema()
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
