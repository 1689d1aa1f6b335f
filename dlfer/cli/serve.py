"""The `dlfer serve` command: serve predictions of models over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from dlfer.cli.options import DetectorSize, Faces, complete_models, say
from dlfer.errors import UserError

_LARGEST = 10**9


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Names, runs or folders, or NAME=MODEL to name one; the default model if left out.",
            autocompletion=complete_models,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 listens on every network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port to listen on; 0 chooses a free one.")
    ] = 8000,
    faces: Faces = "auto",
    detector_size: DetectorSize = None,
    max_mb: Annotated[float, typer.Option(metavar="MB", help="Maximum size of a request body (413).")] = 20,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", help="Maximum total pixels of the pictures of a request (413).")
    ] = 25_000_000,
    max_faces: Annotated[
        int, typer.Option(metavar="N", help="Maximum faces predicted per picture, the largest first.")
    ] = 32,
    max_seconds: Annotated[
        float, typer.Option(metavar="S", help="Time limit for the request body (408), and for the response (504).")
    ] = 30,
    max_requests: Annotated[int, typer.Option(metavar="N", help="Maximum requests in progress (503).")] = 64,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another allowed name in the Host header; *.NAME allows all subdomains. Repeatable."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Allow requests from pages of this site (CORS), e.g. https://example.org. Repeatable.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on a public address without DLFER_API_KEY.")
    ] = False,
    root_path: Annotated[str, typer.Option(metavar="PATH", help="Path prefix that a proxy adds, e.g. /faces.")] = "",
    proxy_headers: Annotated[
        bool,
        typer.Option("--proxy-headers", help="Trust X-Forwarded-For: all requests come through one proxy."),
    ] = False,
    batch_ms: Annotated[
        float, typer.Option(metavar="MS", help="Milliseconds for which requests are collected into a batch.")
    ] = 5,
    access_log: Annotated[
        bool, typer.Option(help="Log a line for each request: address, method, path, status.")
    ] = True,
) -> None:
    """Serve predictions over HTTP: a web page, /v1/predict, and KServe's protocol (/v2).

    It predicts which expression label annotators would give, and does not detect what a person feels. In the EU,
    inferring emotions at work and in education is prohibited (AI Act, Art. 5(1)(f)).

    Pictures are kept in memory for the duration of their request; none is written or logged. If DLFER_API_KEY is set,
    requests must send the key, except for the page and health checks. After SIGTERM, accepted requests are answered.
    """
    numbers = {
        "--max-mb": max_mb,
        "--max-pixels": max_pixels,
        "--max-faces": max_faces,
        "--max-seconds": max_seconds,
        "--max-requests": max_requests,
    }
    for option, value in numbers.items():
        if not 0 < value <= _LARGEST:
            raise UserError(f"dlfer serve {option} {value}: expected a number above 0, at most {_LARGEST:,}.")
    if not 0 <= batch_ms <= 1000:
        raise UserError(f"dlfer serve --batch-ms {batch_ms}: expected 0 to 1000.")
    from dlfer.runs.find import find_default_model, find_model

    wanted = models or [str(find_default_model())]
    for name in wanted:
        if "=" not in name:
            find_model(name)  # report a wrong name before TensorFlow is loaded
    from dlfer.serve.limits import BYTES_PER_PIXEL, Limits
    from dlfer.serve.server import ServerOptions, serve_models

    limits = Limits(
        body_bytes=int(max_mb * 2**20),
        pixels=max_pixels,
        faces=max_faces,
        seconds=max_seconds,
        requests=max_requests,
        requests_each=max(1, max_requests * 3 // 4),
        all_bytes=max(48 * 2**20, int(2.4 * max_mb * 2**20)),
        decode_bytes=BYTES_PER_PIXEL * max_pixels,
    )
    options = ServerOptions(
        host=host,
        port=port,
        faces=faces,
        detector_size=detector_size,
        limits=limits,
        hosts=allow_host or (),
        origins=allow_origin or (),
        insecure=insecure,
        root_path=root_path,
        proxy_headers=proxy_headers,
        window=batch_ms / 1000,
        access_log=access_log,
    )
    serve_models(wanted, options, say=say)
