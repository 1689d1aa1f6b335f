"""The routes of the server, and their errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Scope

from dlfer._version import __version__
from dlfer.apply.predict import NOTICE, RESEARCH_ONLY
from dlfer.apply.serve import kserve, schemas
from dlfer.apply.serve.guard import FREE, Guard
from dlfer.apply.serve.inputs import (
    Upload,
    decode_base64,
    get_content_type,
    parse_form,
    parse_json,
)
from dlfer.apply.serve.limits import Limits, Refusal, read_body
from dlfer.apply.serve.metrics import CONTENT_TYPE, Metrics
from dlfer.apply.serve.models import ServedModel
from dlfer.apply.serve.service import Service

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
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


def build_app(
    models: Mapping[str, ServedModel],
    *,
    limits: Limits | None = None,
    faces: str = "auto",
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    window: float = 0.005,
) -> FastAPI:
    """Return the application; its service is `app.state.service`.

    Args:
        models: by name, the default first.
        limits: of requests; the usual ones by default.
        faces: what is done where a request does not say: "auto" or "whole".
        key: that clients have to send; None: none.
        hosts: names by which the server may be called; None: any.
        window: seconds for which requests are collected.
    """
    metrics = Metrics()
    service = Service(models, limits=limits or Limits(), faces=faces, metrics=metrics, window=window)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title="dlfer",
        version=__version__,
        description=NOTICE,
        lifespan=live,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    _add_errors(app)
    _add_page(app)
    _add_health(app, service)
    _add_models(app, service)
    _add_predictions(app, service)
    _add_kserve(app, service)
    _complete_openapi(app, list(models), key=key)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard, key=key, metrics=metrics, name_route=_name_route)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> JSONResponse:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status in (408, 413, 503):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "The server failed; its log says why."}, 500)


def _add_page(app: FastAPI) -> None:
    folder = files("dlfer.apply.serve") / "page"
    for path, (name, kind) in _PAGE.items():
        contents = (folder / name).read_bytes()

        async def get(contents: bytes = contents, kind: str = kind) -> Response:
            return Response(contents, media_type=kind)

        app.add_api_route(path, _without_arguments(get), methods=["GET"], include_in_schema=False)


def _without_arguments(function: Callable[[], Awaitable[Response]]) -> Callable[[], Awaitable[Response]]:
    """Hide the default arguments of a function, which would be read from the query."""

    async def call() -> Response:
        return await function()

    return call


def _add_health(app: FastAPI, service: Service) -> None:
    not_ready = {503: {"description": "Not ready.", "model": schemas.Error}}

    def is_ready() -> None:
        if not service.is_ready:
            raise Refusal(503, "Not ready.", retry_after=5)

    @app.get("/healthz", tags=["health"])
    async def is_healthy() -> schemas.Health:
        """Whether the server answers."""
        return schemas.Health(status="ok")

    @app.get("/readyz", tags=["health"], responses=not_ready)
    async def ready() -> schemas.Health:
        """Whether it takes requests; 503 before it has begun, and as soon as it was told to stop."""
        is_ready()
        return schemas.Health(status="ready")

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.write(), media_type=CONTENT_TYPE)

    @app.get("/v2/health/live", tags=["KServe"])
    async def live() -> schemas.Live:
        """Whether the server answers."""
        return schemas.Live(live=True)

    @app.get("/v2/health/ready", tags=["KServe"], responses=not_ready)
    async def ready_v2() -> schemas.Ready:
        """Whether it takes requests."""
        is_ready()
        return schemas.Ready(ready=True)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["dlfer"])
    async def list_models() -> schemas.Models:
        """The models that are served, with what their cards say; the first is the default."""
        return schemas.Models(
            models=[model.card for model in service.models.values()],
            faces=service.faces,
            notice=NOTICE,
            version=__version__,
        )


def _add_predictions(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/predict",
        tags=["dlfer"],
        responses=_tell_errors(400, 404, 408, 413, 415, 503, 504),
        openapi_extra=_tell_body(
            schemas.PredictRequest,
            {
                "file": {
                    "type": "array",
                    "items": {"type": "string", "format": "binary"},
                    "minItems": 1,
                    "maxItems": service.limits.pictures,
                    "description": "one or more pictures",
                },
                "model": {"type": "string", "enum": list(service.models)},
                "faces": {"type": "string", "enum": ["auto", "whole"]},
            },
            names=list(service.models),
        ),
    )
    async def predict(request: Request) -> schemas.Prediction:
        """Find the faces in pictures, and predict which expression label annotators would give to each."""
        async with service.admit(), _Body(request, service) as body:
            if body.is_form:
                form = await body.read_form("file", fields=("model", "faces"))
                uploads = _name_uploads([upload for _, upload in form.files])
                model, faces = service.find_model(form.fields.get("model")), _check_faces(form.fields.get("faces"))
            else:
                asked = await body.read_json(schemas.PredictRequest)
                if len(asked.images) > service.limits.pictures:
                    raise Refusal(
                        400, f"images: found {len(asked.images)}, expected at most {service.limits.pictures}."
                    )
                model, faces = service.find_model(asked.model), asked.faces
                uploads = await service.run(lambda: _decode_all(asked.images))
            async with service.limit_time():
                pictures = await service.predict(uploads, model, faces)
            return schemas.Prediction(model=model.name, notice=_notice_of(model), images=pictures)

    @app.post(
        "/v1/explain",
        tags=["dlfer"],
        responses=_tell_errors(400, 404, 408, 413, 415, 503, 504),
        openapi_extra=_tell_body(
            schemas.ExplainRequest,
            {
                "file": {"type": "string", "format": "binary", "description": "a picture"},
                "model": {"type": "string", "enum": list(service.models)},
                "faces": {"type": "string", "enum": ["auto", "whole"]},
                "face": {"type": "integer", "minimum": 0},
                "label": {"type": "string"},
            },
            names=list(service.models),
        ),
    )
    async def explain(request: Request) -> schemas.Explanation:
        """Cover a face part by part, and map where the probability of a label falls and rises."""
        async with service.admit(explanation=True), _Body(request, service) as body:
            if body.is_form:
                form = await body.read_form("file", fields=("model", "faces", "face", "label"))
                if len(form.files) != 1:
                    raise Refusal(400, f"file: found {len(form.files)} files, expected one.")
                upload, given = _name_uploads([form.files[0][1]])[0], form.fields
                model, faces = service.find_model(given.get("model")), _check_faces(given.get("faces"))
                face, label = _check_face(given.get("face", "0")), given.get("label")
            else:
                asked = await body.read_json(schemas.ExplainRequest)
                model, faces, face, label = service.find_model(asked.model), asked.faces, asked.face, asked.label
                upload = (await service.run(lambda: _decode_all([asked.image])))[0]
            async with service.limit_time():
                return await service.explain(upload, model, faces=faces, face=face, label=label)


def _add_kserve(app: FastAPI, service: Service) -> None:
    @app.get("/v2", tags=["KServe"])
    async def describe_server() -> schemas.ServerDescription:
        """What this server is."""
        return schemas.ServerDescription(name="dlfer", version=__version__, extensions=[])

    @app.get("/v2/models/{name}", tags=["KServe"], responses=_tell_errors(404))
    async def describe_model(name: str) -> schemas.ModelDescription:
        """The tensors of a model, and its card."""
        return kserve.describe_model(service.find_model(name))

    @app.get("/v2/models/{name}/ready", tags=["KServe"], responses=_tell_errors(404, 503))
    async def is_model_ready(name: str) -> schemas.ModelReady:
        """Whether a model takes requests."""
        model = service.find_model(name)
        if not service.is_ready:
            raise Refusal(503, "Not ready.", retry_after=5)
        return schemas.ModelReady(name=model.name, ready=True)

    @app.post(
        "/v2/models/{name}/infer",
        tags=["KServe"],
        responses=_tell_errors(400, 404, 408, 413, 415, 503, 504),
        response_model_exclude_none=True,
        openapi_extra=_tell_body(schemas.InferRequest),
    )
    async def infer(name: str, request: Request) -> schemas.InferResponse:
        """Predict crops of faces, one tensor of uint8 [N, H, W] or [N, H, W, C]; no face is searched for."""
        model = service.find_model(name)
        async with service.admit(), _Body(request, service) as body:
            asked = await body.read_json(schemas.InferRequest)
            crops = await service.run(lambda: kserve.read_crops(asked.inputs[0], model, service.limits))
            async with service.limit_time():
                probabilities = await service.predict_crops(crops, model)
            service.metrics.faces.labels(model.name).inc(len(crops))
            return kserve.write_answer(asked, model, probabilities)


class _Body:
    """The body of a request in memory, which is given back at the end."""

    def __init__(self, request: Request, service: Service) -> None:
        self._request = request
        self._service = service
        self._taken = 0
        self.is_form = get_content_type(request) == "multipart/form-data"

    async def __aenter__(self) -> _Body:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._service.bytes.give_back(self._taken)

    async def _read(self) -> bytes:
        body, self._taken = await read_body(self._request, self._service.limits, self._service.bytes)
        return body

    async def read_form(self, file_field: str, *, fields: Sequence[str]):
        """Return a multipart body that has nothing but files called `file_field`, at least one, and `fields`."""
        form = await parse_form(await self._read(), self._request.headers, self._service.limits)
        unknown = {name for name, _ in form.files} - {file_field} | set(form.fields) - set(fields)
        if unknown or not form.files:
            found = ", ".join(sorted(name[:60] for name in unknown)) or "no file"
            raise Refusal(
                400, f"multipart/form-data: found {found}, expected files called {file_field}, and {', '.join(fields)}."
            )
        return form

    async def read_json(self, kind: type[BaseModel]) -> Any:
        """Return a JSON body as a schema has it."""
        if get_content_type(self._request) != "application/json":
            raise Refusal(415, "The body is neither multipart/form-data (where that is taken) nor application/json.")
        body = await self._read()
        return await self._service.run(lambda: parse_json(body, kind))


def _decode_all(images: Sequence[schemas.Picture64]) -> list[Upload]:
    named = _name_uploads([Upload(image.name, b"") for image in images])
    return [decode_base64(image.base64, upload.name) for image, upload in zip(images, named, strict=True)]


def _name_uploads(uploads: Sequence[Upload]) -> list[Upload]:
    return [
        upload if upload.name else Upload(f"image {number}", upload.contents)
        for number, upload in enumerate(uploads, start=1)
    ]


def _check_faces(faces: str | None) -> str | None:
    if faces not in (None, "auto", "whole"):
        raise Refusal(400, f"faces: found {faces[:60]!r}, expected auto or whole.")
    return faces


def _check_face(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise Refusal(400, f"face: found {text[:60]!r}, expected the number of a face, from 0.")
    return int(text)


def _notice_of(model: ServedModel) -> str:
    return f"{NOTICE} {RESEARCH_ONLY}" if model.card.research_only else NOTICE


def _tell_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _WORDS[status], "model": schemas.Error} for status in (*statuses, 403)}


def _tell_body(
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


def _complete_openapi(app: FastAPI, names: Sequence[str], *, key: str | None) -> None:
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


def _name_route(scope: Scope) -> str:
    """Return the path of the route that answered; all that is unknown shares a name."""
    route = scope.get("route")
    return getattr(route, "path", "unknown")
