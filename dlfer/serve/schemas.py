"""Schemas of requests and responses, and their description in OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from dlfer.serve.guard import PUBLIC_PATHS

Faces = Literal["auto", "whole"]
_STRICT = ConfigDict(extra="forbid")


class Picture64(BaseModel):
    """A picture in a JSON request."""

    model_config = _STRICT
    base64: Annotated[
        str,
        Field(
            min_length=1,
            description="the file (JPEG, PNG, WebP, BMP, GIF, PBM, PGM, PPM; HEIC with pillow-heif), in base64",
        ),
    ]
    name: Annotated[str, Field(max_length=200, description="the picture's name in the response")] = ""


class PredictRequest(BaseModel):
    """Pictures in which the faces are found and predicted."""

    model_config = _STRICT
    images: Annotated[list[Picture64], Field(min_length=1)]
    model: Annotated[str | None, Field(description="one of /v1/models; the first by default")] = None
    faces: Annotated[
        Faces | None, Field(description="auto: faces are detected; whole: a picture is the crop of one face")
    ] = None
    crops: Annotated[bool, Field(description="whether each face is returned as the model is given it")] = False


class ExplainRequest(BaseModel):
    """A face whose prediction is explained by covering it part by part."""

    model_config = _STRICT
    image: Picture64
    model: Annotated[str | None, Field(description="one of /v1/models; the first by default")] = None
    faces: Faces | None = None
    face: Annotated[int, Field(ge=0, description="number of the face in the response of /v1/predict")] = 0
    label: Annotated[
        str | None, Field(description="the label whose probability is explained; the predicted one by default")
    ] = None


class Error(BaseModel):
    """The response to a request that failed."""

    error: str


class Figure(BaseModel):
    """An accuracy with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    n: int
    what: Annotated[str, Field(description="of which images")]


class Card(BaseModel):
    """The description of a model."""

    name: str
    family: str
    labels: list[str]
    backbone: str | None
    optimizer: str | None
    accuracy: Figure | None
    protocol: str | None
    banner: Annotated[
        str | None,
        Field(description="why its metrics are not from a clean test, or its intervals are too narrow, if so"),
    ]
    image_size: int
    preparation: Annotated[str, Field(description="how a face is prepared for the model")] = ""
    probabilities: Annotated[str, Field(description="whether they are calibrated")]
    research_only: bool
    smoke: Annotated[
        bool, Field(description="whether it comes from a smoke run, whose predictions are meaningless")
    ] = False


class Models(BaseModel):
    """The served models."""

    models: list[Card]
    faces: Annotated[Faces, Field(description="defaults of a request")]
    notice: str
    version: str


class Face(BaseModel):
    """A face and its probabilities."""

    box: Annotated[
        tuple[float, float, float, float] | None, Field(description="x0, y0, x1, y1 in pixels; null: the whole picture")
    ]
    score: Annotated[float | None, Field(description="the detector's")]
    label: str
    confidence: float
    probabilities: dict[str, float]
    crop_png: Annotated[
        str | None, Field(description="the face as the model is given it, PNG in base64; null unless crops is true")
    ] = None


class Picture(BaseModel):
    """A picture and the faces in it, the largest first."""

    name: str
    width: int
    height: int
    num_faces_found: int
    faces: list[Face]


class Prediction(BaseModel):
    """The response of /v1/predict."""

    model: str
    notice: str
    images: list[Picture]


class Explanation(BaseModel):
    """The response of /v1/explain."""

    model: str
    label: str
    probability: float
    predicted: str
    box: tuple[float, float, float, float] | None
    square: Annotated[int, Field(description="side of the square that covers, in pixels of the crop")]
    stride: int
    description: Annotated[str, Field(description="the map in words")]
    crop_png: Annotated[str, Field(description="the face as the network is given it, PNG in base64")]
    map_png: Annotated[str, Field(description="how much the probability falls where it is covered, PNG in base64")]
    largest_fall: float
    largest_rise: float
    flips: Annotated[float, Field(description="share of the face where covering changes the most probable label")]


class Tensor(BaseModel):
    """A tensor of the KServe protocol."""

    model_config = ConfigDict(extra="ignore")
    name: Literal["images"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Field(min_length=3, max_length=4)]
    datatype: Literal["UINT8"]
    data: Annotated[list[Any], Field(min_length=1, description="integers 0..255, flat or nested")]


class RequestedOutput(BaseModel):
    """An output that the client requests."""

    model_config = ConfigDict(extra="ignore")
    name: Literal["probabilities", "labels"]


class InferRequest(BaseModel):
    """A request of the KServe protocol, version 2: crops of faces as one tensor."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=1)]
    outputs: list[RequestedOutput] | None = None


class OutputTensor(BaseModel):
    """A tensor in a response of the KServe protocol."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float] | list[str]


class InferResponse(BaseModel):
    """A response of the KServe protocol."""

    model_name: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorDescription(BaseModel):
    """The name, data type and shape of a tensor; -1 means any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelDescription(BaseModel):
    """A model in the KServe protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDescription]
    outputs: list[TensorDescription]
    parameters: Card


class ModelReady(BaseModel):
    """Whether a model accepts requests."""

    name: str
    ready: bool


class ServerDescription(BaseModel):
    """The server in the KServe protocol."""

    name: str
    version: str
    extensions: list[str]


class Health(BaseModel):
    """The state of the server."""

    status: str


class Live(BaseModel):
    """Whether the server is running."""

    live: bool


class Ready(BaseModel):
    """Whether the server accepts requests."""

    ready: bool


_WORDS = {
    400: "The request is malformed, does not fit the schema, or has too many pictures.",
    401: "The API key is missing or wrong.",
    403: "The request comes from a page of a site that is not allowed.",
    404: "There is no such model.",
    408: "The request body did not arrive in time.",
    413: "The body or a picture is too large.",
    415: "The media type of the body or the format of a picture is not supported.",
    503: "Too many requests, or the server is shutting down; Retry-After says when to try again.",
    504: "The response was not ready in time.",
}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of a route's error responses, including 403, which every route may return."""
    return {status: {"description": _WORDS[status], "model": Error} for status in (*statuses, 403)}


def describe_body(
    kind: type[BaseModel], form: Mapping[str, Any] | None = None, *, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the OpenAPI description of a request body that the route parses itself, without FastAPI."""
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
    """Return a JSON schema with its definitions inlined, because OpenAPI keeps definitions in another place."""
    definitions = schema.pop("$defs", {})

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            return replace(definitions[name]) if name in definitions else {k: replace(v) for k, v in value.items()}
        return [replace(one) for one in value] if isinstance(value, list) else value

    return replace(schema)


def complete_openapi(app: FastAPI, names: Sequence[str], *, key: str | None) -> None:
    """Add the names of the models to the app's OpenAPI schema, and, if there is a key, the routes that require it."""
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
                    if parameter["name"] == "name":
                        parameter["schema"] = {"type": "string", "enum": list(names)}
                if key and path not in PUBLIC_PATHS:
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = {
                        "description": _WORDS[401],
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                    }
        return schema

    app.openapi = openapi
