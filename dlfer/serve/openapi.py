"""What OpenAPI tells of bodies that are read by hand, of errors, of the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from dlfer.serve.guard import FREE
from dlfer.serve.schemas import Error

_WORDS = {
    400: "The request is damaged, or does not fit.",
    401: "The key is missing or wrong.",
    403: "The request comes from a page of another site.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body, the pictures or their number are too large.",
    415: "Another kind of body or picture.",
    503: "Too many requests, or the server is stopping; Retry-After says when to come again.",
    504: "The answer took too long.",
}


def tell_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors that a route may answer with, and 403, which every one may."""
    return {status: {"description": _WORDS[status], "model": Error} for status in (*statuses, 403)}


def tell_body(
    kind: type[BaseModel], form: Mapping[str, Any] | None = None, *, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what OpenAPI says of a body that is read by hand."""
    schema = _inline(kind.model_json_schema())
    if "model" in schema["properties"]:
        schema["properties"]["model"] |= {"anyOf": [{"type": "string", "enum": list(names)}, {"type": "null"}]}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if form is not None:
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": dict(form), "required": ["file"], "additionalProperties": False}
        }
    return {"requestBody": {"required": True, "content": content}}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its definitions in their places: in OpenAPI they would stand elsewhere."""
    definitions = schema.pop("$defs", {})

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            return replace(definitions[name]) if name in definitions else {k: replace(v) for k, v in value.items()}
        return [replace(one) for one in value] if isinstance(value, list) else value

    return replace(schema)


def complete_openapi(app: FastAPI, names: Sequence[str], *, key: str | None) -> None:
    """Let OpenAPI name the models, and say whether and where a key is needed."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = make()
        if key:
            schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                for parameter in operation.get("parameters", []):
                    parameter["schema"] = {"type": "string", "enum": list(names)}
                if key and path not in FREE:
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = {
                        "description": _WORDS[401],
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                    }
        return schema

    app.openapi = openapi
