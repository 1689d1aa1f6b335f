"""The routes of the server, and its error responses."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from dlfer._version import __version__
from dlfer.predict.predictor import NOTICE, make_notice
from dlfer.serve import schemas
from dlfer.serve.guard import CONTENT_TYPE, Guard, Metrics, Policy
from dlfer.serve.limits import Limits, Refusal
from dlfer.serve.models import VERSIONS, ServedModel, describe_tensors, write_answer
from dlfer.serve.schemas import complete_openapi, describe_body, describe_errors
from dlfer.serve.service import Body, Service, check_faces, read_crops_flag, read_face

_LOG = logging.getLogger("uvicorn.error")

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def build_app(
    models: Mapping[str, ServedModel],
    *,
    limits: Limits | None = None,
    faces: str = "auto",
    policy: Policy | None = None,
    window: float = 0.005,
) -> FastAPI:
    """Return the application; its service is `app.state.service`.

    Args:
        models: by name, the default model first.
        limits: of requests; None: the defaults of `Limits`.
        faces: the default for requests that do not specify it: "auto" or "whole".
        policy: which requests are allowed; None: those from this computer, without a key.
        window: seconds for which requests are collected into a batch.
    """
    metrics, policy = Metrics(), policy or Policy()
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
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    _add_errors(app)
    _add_page(app)
    _add_health(app, service)
    _add_models(app, service)
    _add_predictions(app, service)
    _add_kserve(app, service)
    complete_openapi(app, list(models), key=policy.key)
    app.add_middleware(
        Guard,
        policy=policy,
        metrics=metrics,
        name_route=_name_route,
        is_stopping=lambda: service.is_stopping,
    )
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> JSONResponse:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status in (408, 413, 503):
            headers["Connection"] = "close"  # the body may not have been read
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def pass_on(request: Request, error: ClientDisconnect) -> None:
        _LOG.debug("The client disconnected before its request was answered.")
        raise error


def _add_page(app: FastAPI) -> None:
    folder = files("dlfer.serve") / "page"
    for path, (name, kind) in _PAGE.items():
        app.add_api_route(
            path, _answer_with((folder / name).read_bytes(), kind), methods=["GET"], include_in_schema=False
        )


def _answer_with(contents: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(contents, media_type=kind)

    return answer


def _add_health(app: FastAPI, service: Service) -> None:
    not_ready = {503: {"description": "Not ready.", "model": schemas.Error}}

    def is_ready() -> None:
        if not service.is_ready:
            raise Refusal(503, "Not ready.", retry_after=5)

    @app.get("/healthz", tags=["health"])
    async def is_healthy() -> schemas.Health:
        """Whether the server is running."""
        return schemas.Health(status="ok")

    @app.get("/readyz", tags=["health"], responses=not_ready)
    async def ready() -> schemas.Health:
        """Whether the server accepts requests; 503 until it has started, and as soon as it is shutting down."""
        is_ready()
        return schemas.Health(status="ready")

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(service.metrics.write(), media_type=CONTENT_TYPE)

    @app.get("/v2/health/live", tags=["KServe"])
    async def live() -> schemas.Live:
        """Whether the server is running."""
        return schemas.Live(live=True)

    @app.get("/v2/health/ready", tags=["KServe"], responses=not_ready)
    async def ready_v2() -> schemas.Ready:
        """Whether the server accepts requests."""
        is_ready()
        return schemas.Ready(ready=True)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["dlfer"])
    async def list_models() -> schemas.Models:
        """The served models with their cards; the first is the default."""
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
        responses=describe_errors(400, 404, 408, 413, 415, 503, 504),
        openapi_extra=describe_body(
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
                "crops": {"type": "string", "enum": ["true", "false"]},
            },
            names=list(service.models),
        ),
    )
    async def predict(request: Request) -> schemas.Prediction:
        """Find the faces in pictures, and predict which expression label annotators would give to each."""
        async with service.admit(request), Body(request, service) as body, service.limit_time(request):
            if body.is_form:
                uploads, given = await body.read_form("model", "faces", "crops")
                model, faces = service.find_model(given.get("model")), check_faces(given.get("faces"))
                crops = read_crops_flag(given.get("crops"))
            else:
                asked, parts = await body.read_json(schemas.PredictRequest)
                if len(asked.images) > service.limits.pictures:
                    raise Refusal(
                        400, f"images: found {len(asked.images)}, expected at most {service.limits.pictures}."
                    )
                model, faces, crops = service.find_model(asked.model), asked.faces, asked.crops
                uploads = parts.find_all(asked.images)
            pictures = await service.predict(uploads, model, faces, crops=crops)
            notice = make_notice(is_smoke=model.card.smoke, research_only=model.card.research_only)
            return schemas.Prediction(model=model.name, notice=notice, images=pictures)

    @app.post(
        "/v1/explain",
        tags=["dlfer"],
        responses=describe_errors(400, 404, 408, 413, 415, 503, 504),
        openapi_extra=describe_body(
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
        """Occlude a face part by part, and return a map of where the probability of a label falls and rises."""
        async with (
            service.admit(request, explanation=True),
            Body(request, service) as body,
            service.limit_time(request),
        ):
            if body.is_form:
                uploads, given = await body.read_form("model", "faces", "face", "label")
                if len(uploads) != 1:
                    raise Refusal(400, f"file: found {len(uploads)} files, expected one.")
                model, faces = service.find_model(given.get("model")), check_faces(given.get("faces"))
                face, label = read_face(given.get("face", "0")), given.get("label")
            else:
                asked, parts = await body.read_json(schemas.ExplainRequest)
                model, faces, face, label = service.find_model(asked.model), asked.faces, asked.face, asked.label
                uploads = parts.find_all([asked.image])
            return await service.explain(uploads[0], model, faces=faces, face=face, label=label)


def _add_kserve(app: FastAPI, service: Service) -> None:
    @app.get("/v2", tags=["KServe"])
    async def describe_server() -> schemas.ServerDescription:
        """Name and version of the server."""
        return schemas.ServerDescription(name="dlfer", version=__version__, extensions=[])

    async def find_model(name: str) -> ServedModel:
        return service.find_model(name)

    async def find_version(name: str, version: str) -> ServedModel:
        model = service.find_model(name)
        if version not in VERSIONS:
            raise Refusal(404, f"version: found {version[:60]!r} of {name}, expected {', '.join(VERSIONS)}.")
        return model

    _add_kserve_model(app, service, "/v2/models/{name}", Depends(find_model))
    _add_kserve_model(app, service, "/v2/models/{name}/versions/{version}", Depends(find_version))


def _add_kserve_model(app: FastAPI, service: Service, place: str, found: Any) -> None:
    @app.get(place, tags=["KServe"], responses=describe_errors(404))
    async def describe_model(model: ServedModel = found) -> schemas.ModelDescription:
        """The tensors of a model, and its card."""
        return describe_tensors(model)

    @app.get(f"{place}/ready", tags=["KServe"], responses=describe_errors(404, 503))
    async def is_model_ready(model: ServedModel = found) -> schemas.ModelReady:
        """Whether a model accepts requests."""
        if not service.is_ready:
            raise Refusal(503, "Not ready.", retry_after=5)
        return schemas.ModelReady(name=model.name, ready=True)

    @app.post(
        f"{place}/infer",
        tags=["KServe"],
        responses=describe_errors(400, 404, 408, 413, 415, 503, 504),
        response_model_exclude_none=True,
        openapi_extra=describe_body(schemas.InferRequest),
    )
    async def infer(request: Request, model: ServedModel = found) -> schemas.InferResponse:
        """Predict face crops, given as one uint8 tensor [N, H, W] or [N, H, W, C]; no face detection is done."""
        if "inference-header-content-length" in request.headers:
            raise Refusal(
                400,
                "Inference-Header-Content-Length: binary tensor data is an extension that this server does not support; send "
                "data as JSON (in tritonclient: set_data_from_numpy(..., binary_data=False)).",
            )
        # Triton's own client sends no Content-Type.
        body_of = Body(request, service, kind="application/json")
        async with service.admit(request), body_of as body, service.limit_time(request):
            asked, parts = await body.read_json(schemas.InferRequest)
            crops = await service.read_crops(asked.inputs[0], parts, model)
            probabilities = await service.predict_crops(crops, model)
            service.metrics.faces.labels(model.name).inc(len(crops))
            return write_answer(asked, model, probabilities)


def _name_route(scope: Scope) -> str:
    """Return the path of the route that answered; all unknown paths share a name."""
    route = scope.get("route")
    if route is None and "endpoint" in scope:  # FastAPI's own route of /openapi.json, which has no parameters
        return scope["path"].removeprefix(scope.get("root_path", ""))
    return getattr(route, "path", "unknown")
