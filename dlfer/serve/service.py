"""The processing of requests behind the routes: admission, reading, decoding, prediction, explanation, and shutdown.

The bodies of requests are kept in memory and never written to disk.
"""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from PIL import Image, ImageDraw
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dlfer.errors import EnvironmentProblem, ModelError, UserError
from dlfer.explain.occlusion import Occlusion, compute_occlusion
from dlfer.predict.crops import Crop
from dlfer.runs.text import count_noun, escape_text
from dlfer.serve.guard import Metrics, find_address
from dlfer.serve.limits import Budget, Limits, Refusal, estimate_wait
from dlfer.serve.models import ServedModel, check_tensor
from dlfer.serve.pool import Batcher, FacesFound, Pool, PredictionTask
from dlfer.serve.schemas import Explanation, Face, Picture, Picture64, Tensor

_SHOWN_SIDE = 384
_FALL, _RISE = (214, 69, 0), (0, 90, 181)
"""Orange and blue, which people with the common kinds of colour blindness can distinguish; the text says the same."""


def explain_crop(
    crop: Crop, label: str | None, *, model: str, labels: tuple[str, ...], predict: Callable[[np.ndarray], np.ndarray]
) -> Explanation:
    """Return an explanation by occlusion: how covering parts of a face changes the probability of a label.

    Args:
        crop: the face as the model receives it.
        label: one of `labels`; None: the most probable one.
        model: name of the model.
        labels: of the model.
        predict: uint8 [N, S, S, C] -> float [N, number of labels].
    """
    if label is None:
        label = labels[int(predict(crop.pixels[None])[0].argmax())]
    found = compute_occlusion(predict, crop.pixels, labels.index(label))
    return Explanation(
        model=model,
        label=label,
        probability=found.probability,
        predicted=labels[found.predicted],
        box=crop.box,
        square=found.size,
        stride=found.stride,
        description=describe_occlusion(found, label),
        crop_png=_encode(_enlarge(crop.pixels)),
        map_png=_encode(draw_map(crop.pixels, found)),
        largest_fall=float(max(0.0, found.sensitivity.max())),
        largest_rise=float(max(0.0, -found.sensitivity.min())),
        flips=float(found.flips.mean()),
    )


def describe_occlusion(found: Occlusion, label: str) -> str:
    """Describe an occlusion map in a few sentences."""
    fall, rise = found.sensitivity.max(), -found.sensitivity.min()
    words = [f"Without occlusion, the probability of {label} is {found.probability:.0%}."]
    if fall >= 0.005:
        words.append(
            f"It falls most, by {count_noun(round(100 * fall), 'percentage point')}, where the {_name_place(found.sensitivity)} of the face "
            "is covered."
        )
    else:
        words.append("Covering any region lowers it by less than half a percentage point.")
    if rise >= 0.005:
        words.append(
            f"It rises most, by {count_noun(round(100 * rise), 'percentage point')}, with the {_name_place(-found.sensitivity)} covered."
        )
    flips = found.flips.mean()
    words.append(
        f"On {flips:.0%} of the face a square of {found.size} pixels can change the most probable label."
        if flips
        else f"No square of {found.size} pixels changes the most probable label."
    )
    return " ".join(words)


def draw_map(crop: np.ndarray, found: Occlusion) -> Image.Image:
    """Return the grey face overlaid with orange where covering lowers the probability, and blue where it raises it.

    A frame marks the square with the largest fall, for people who cannot distinguish the colours.
    """
    sensitivity = found.sensitivity
    grey = crop.astype(np.float64).mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    strength = np.abs(sensitivity) / max(1e-9, np.abs(sensitivity).max()) * 0.85
    colour = np.where((sensitivity >= 0)[..., None], np.array(_FALL), np.array(_RISE))
    mixed = grey * (1 - strength[..., None]) + colour * strength[..., None]
    image = _enlarge(mixed.round().clip(0, 255).astype(np.uint8))
    if sensitivity.max() > 0:
        y, x = np.unravel_index(int(sensitivity.argmax()), sensitivity.shape)
        scale, half = _SHOWN_SIDE / len(sensitivity), found.size / 2
        x0, y0 = (min(max(0.0, place + 0.5 - half), len(sensitivity) - found.size) for place in (x, y))
        frame = [round(scale * value) for value in (x0, y0, x0 + found.size, y0 + found.size)]
        pen = ImageDraw.Draw(image)
        pen.rectangle(frame, outline=(0, 0, 0), width=6)
        pen.rectangle([frame[0] + 2, frame[1] + 2, frame[2] - 2, frame[3] - 2], outline=(255, 255, 255), width=2)
    return image


def _name_place(values: np.ndarray) -> str:
    """Return the name of the cell, in a 3 x 3 grid over the face as seen, that has the largest value."""
    y, x = np.unravel_index(int(values.argmax()), values.shape)
    rows, columns = ("upper", "middle", "lower"), ("left", "middle", "right")
    row = rows[min(2, 3 * int(y) // values.shape[0])]
    column = columns[min(2, 3 * int(x) // values.shape[1])]
    return "middle" if row == column == "middle" else f"{row} {column}"


def _add_crops(pictures: Sequence[Picture], found: Sequence[FacesFound]) -> None:
    """Add to each face in `pictures` the crop that the model received."""
    for picture, one in zip(pictures, found, strict=True):
        for face, crop in zip(picture.faces, one.crops, strict=True):
            face.crop_png = _encode(_make_image(crop.pixels))


def _make_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _enlarge(pixels: np.ndarray) -> Image.Image:
    return _make_image(pixels).resize((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.BICUBIC)


def _encode(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


_Asked = TypeVar("_Asked", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        name: given by the client.
        contents: its bytes, or their base64 encoding.
        is_base64: whether `contents` is base64.
    """

    name: str
    contents: bytes | memoryview
    is_base64: bool = False


async def read_body(request: Request, limits: Limits, budget: Budget) -> tuple[bytes, int]:
    """Return the body of a request, and the amount reserved in the budget, which the caller has to release.

    Raises:
        Refusal: 413 if it is too large: before anything is read if Content-Length says so, else as soon as the limit is
            exceeded; 408 if it does not arrive in time; 503 if all bodies together exceed the budget.
    """
    told = request.headers.get("content-length")
    if told is not None and told.isdecimal() and int(told) > limits.body_bytes:
        raise _too_large(limits)
    parts, size, taken = [], 0, 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                if not budget.take(len(part)):
                    raise Refusal(
                        503,
                        "The request bodies in progress take all memory reserved for them; try again later.",
                        retry_after=1,
                    )
                taken += len(part)
                parts.append(part)
    except BaseException as error:
        budget.give_back(taken)
        if isinstance(error, TimeoutError):
            raise Refusal(408, f"The body of the request did not arrive within {limits.seconds:g} seconds.") from error
        raise
    return b"".join(parts), taken


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"The body of the request is larger than {limits.body_bytes:,} bytes; shrink the pictures.")


class Parts:
    """The large parts extracted from a JSON body, see `dlfer.serve.worker.extract_large_parts`."""

    def __init__(self, body: bytes, spans: Sequence[tuple[int, int]], mark: str) -> None:
        self._body, self._spans, self._mark = memoryview(body), spans, mark

    def find(self, text: Any) -> memoryview | None:
        """Return the part that a placeholder refers to; None if the string is not a placeholder."""
        number = text.removeprefix(self._mark) if isinstance(text, str) and text.startswith(self._mark) else ""
        if not (number.isascii() and number.isdecimal() and len(number) < 4 and int(number) < len(self._spans)):
            return None
        return self._body[slice(*self._spans[int(number)])]

    def find_all(self, images: Sequence[Picture64]) -> list[Upload]:
        """Return the pictures of a JSON body as uploads."""
        return [
            Upload(image.name or f"image {number}", self.find(image.base64) or image.base64.encode(), is_base64=True)
            for number, image in enumerate(images, start=1)
        ]


async def read_json(body: bytes, kind: type[_Asked], pool: Pool) -> tuple[_Asked, Parts]:
    """Return a JSON body validated against a schema, and its large parts.

    Raises:
        Refusal: 400, with the first five problems.
    """
    mark = f"@{secrets.token_hex(8)}:"
    spans, (rest,) = await pool.ask("json", [body], mark=mark)
    try:
        return kind.model_validate_json(bytes(rest)), Parts(body, spans, mark)
    except ValidationError as error:
        raise Refusal(400, describe_problems(error)) from error


async def read_form(
    body: bytes, content_type: str, expected: Sequence[str], pool: Pool
) -> tuple[list[Upload], dict[str, str]]:
    """Return the files of a multipart body, and its fields by name.

    Args:
        body: of the request.
        content_type: its Content-Type header.
        expected: the names of the allowed fields; files, at least one, are called "file".
        pool: the workers that parse it.

    Raises:
        Refusal: 400 if it is malformed or has too many or unknown parts, 413 for a field that is too long.
    """
    (texts, files), _ = await pool.ask("form", [body], content_type=content_type)
    fields: dict[str, str] = {}
    for name, value in texts:
        if name in fields:
            raise Refusal(400, f"multipart/form-data: the field {name!r} occurs twice.")
        fields[name] = value
    unknown = {name[:60] for name in fields if name not in expected} | {
        name[:60] for name, _, _ in files if name != "file"
    }
    if unknown or not files:
        found = ", ".join(sorted(unknown)) or "no file"
        raise Refusal(
            400, f"multipart/form-data: found {found}, expected files called file, and {', '.join(expected)}."
        )
    whole = memoryview(body)
    return [
        Upload(name or f"image {number}", whole[slice(*span)]) for number, (_, name, span) in enumerate(files, start=1)
    ], fields


def describe_problems(error: ValidationError) -> str:
    """Return the validation problems in one line, without the values, which may be pictures."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    told = [
        f"{'.'.join(str(step)[:60] for step in one['loc']) or 'request body'}: {one['msg']}" for one in problems[:5]
    ]
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(told)[:1000] + more


def _tell_files(uploads: Sequence[Upload]) -> dict[str, Any]:
    return {"files": [(upload.name, upload.is_base64) for upload in uploads]}


async def measure_pictures(uploads: Sequence[Upload], pool: Pool) -> tuple[int, int]:
    """Return the total pixels of all files, and the bytes of memory that decoding them takes, from their headers.

    Raises:
        Refusal: 400 for invalid base64, 415 for a file that is not a picture, 413 for one that is too large.
    """
    value, _ = await pool.ask("measure", [upload.contents for upload in uploads], **_tell_files(uploads))
    return tuple(value)


async def decode_picture(upload: Upload, pool: Pool) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3], upright.

    Raises:
        Refusal: 400 if the file is damaged.
    """
    size, (pixels,) = await pool.ask("decode", [upload.contents], **_tell_files([upload]))
    return np.frombuffer(pixels, np.uint8).reshape(*size, 3)


def check_faces(faces: str | None) -> str | None:
    """Return `faces` if it is "auto", "whole" or None; raise a Refusal (400) otherwise."""
    if faces not in (None, "auto", "whole"):
        raise Refusal(400, f"faces: found {faces[:60]!r}, expected auto or whole.")
    return faces


def read_crops_flag(text: str | None) -> bool:
    """Return whether the field `crops` of a form is "true"; a missing field counts as false."""
    if text not in (None, "true", "false"):
        raise Refusal(400, f"crops: found {text[:60]!r}, expected true or false.")
    return text == "true"


def read_face(text: str) -> int:
    """Parse the number of a face, from 0; raise a Refusal (400) if it is invalid."""
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise Refusal(400, f"face: found {text[:60]!r}, expected the number of a face, from 0.")
    return int(text)


_PARSERS, _DECODERS = 1, 2
"""Numbers of worker processes. Pictures that occupy both decoders do not delay the parsing of JSON and forms."""
_COVERED_AT_ONCE = 32
"""Occluded faces predicted per batch, so that an explanation does not delay other requests for long."""
_T = TypeVar("_T")


class Body:
    """A context manager for the body of a request, which is read on entry and released on exit.

    Args:
        request: the request.
        service: its service, with the limits and the memory budget.
        kind: media type that is assumed if the request has no Content-Type.
    """

    def __init__(self, request: Request, service: Service, *, kind: str = "") -> None:
        self._request, self._service, self._taken, self._bytes = request, service, 0, b""
        self._type = request.headers.get("content-type", kind)
        self._kind = self._type.partition(";")[0].strip().lower()

    @property
    def is_form(self) -> bool:
        """Whether it is multipart/form-data, else JSON."""
        return self._kind == "multipart/form-data"

    async def __aenter__(self) -> Body:
        if self._kind not in ("application/json", "multipart/form-data"):
            raise Refusal(
                415, "Content-Type: expected application/json, or multipart/form-data where the route accepts it."
            )
        self._bytes, self._taken = await read_body(self._request, self._service.limits, self._service.bytes)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._bytes = b""
        self._service.bytes.give_back(self._taken)

    async def read_form(self, *fields: str) -> tuple[list[Upload], dict[str, str]]:
        """Return the files and the fields of a multipart body."""
        return await read_form(self._bytes, self._type, fields, self._service.parsers)

    async def read_json(self, kind: type[_Asked]) -> tuple[_Asked, Parts]:
        """Return a JSON body validated against a schema, and its large parts."""
        if self.is_form:
            raise Refusal(415, "Content-Type: found multipart/form-data, expected application/json.")
        return await read_json(self._bytes, kind, self._service.parsers)


class Service:
    """The state behind the routes; the arguments are those of `build_app`."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        limits: Limits,
        faces: str,
        metrics: Metrics,
        window: float = 0.005,
    ) -> None:
        self.models = dict(models)
        self.limits = limits
        self.faces = faces
        self.metrics = metrics
        self.bytes = Budget(limits.all_bytes)
        self.num_requests = 0
        self.is_stopping = False
        self.parsers = Pool(_PARSERS, limits, name="dlfer-parse")
        self._decoders = Pool(_DECODERS, limits, name="dlfer-decode")
        self._memory = Budget(limits.decode_bytes)
        self._num_explanations = 0
        self._num_of: Counter[str] = Counter()
        self._batcher = Batcher(window=window, observe=metrics.batch.observe)
        self._threads = ThreadPoolExecutor(_DECODERS, thread_name_prefix="dlfer-fit")
        self._explainers = ThreadPoolExecutor(1, thread_name_prefix="dlfer-explain")

    def start(self) -> None:
        """Start the workers, and predict once with each model, so that the first request is as fast as the others."""
        self.parsers.start()
        self._decoders.start()
        self._batcher.start()
        for model in self.models.values():
            blank = np.full((256, 256, 3), 127, np.uint8)
            for faces in dict.fromkeys((self.faces, "whole")):
                self._batcher.submit(PredictionTask(model, [blank], faces)).result()

    def stop(self) -> None:
        """End the threads and processes; predictions that have been submitted are finished first."""
        self.is_stopping = True
        self._explainers.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        self.parsers.stop()
        self._decoders.stop()
        if self._batcher.is_alive:
            self._batcher.stop()

    @property
    def is_ready(self) -> bool:
        """Whether the server accepts predictions."""
        return self._batcher.is_alive and not self.is_stopping

    @asynccontextmanager
    async def admit(self, request: Request, *, explanation: bool = False) -> AsyncIterator[None]:
        """Count a request as in progress, before its body is read.

        Raises:
            Refusal: 503 while too many are in progress, in total or from one address, or while the server is shutting down.
        """
        if not self.is_ready:
            raise Refusal(503, "The server is shutting down.", retry_after=5)
        address = find_address(request.scope)
        if self.num_requests >= self.limits.requests or self._num_of[address] >= self.limits.requests_each:
            raise self._too_busy(self.num_requests)
        if explanation and self._num_explanations >= self.limits.explanations:
            raise self._too_busy(self.limits.requests)
        self.num_requests += 1
        self._num_of[address] += 1
        self._num_explanations += explanation
        self.metrics.waiting.set(self.num_requests)
        try:
            yield
        finally:
            self.num_requests -= 1
            self._num_of[address] -= 1
            if not self._num_of[address]:
                del self._num_of[address]
            self._num_explanations -= explanation
            self.metrics.waiting.set(self.num_requests)

    @asynccontextmanager
    async def limit_time(self, request: Request) -> AsyncIterator[None]:
        """Cancel the work on a request that takes too long or whose client has disconnected; its body has been read.

        Raises:
            Refusal: 504 after `Limits.seconds`.
            ClientDisconnect: the client has disconnected.
        """
        has_left = False

        async def watch() -> None:
            nonlocal has_left
            while (await request.receive())["type"] != "http.disconnect":
                continue
            has_left = True
            timer.reschedule(asyncio.get_running_loop().time())

        try:
            async with asyncio.timeout(self.limits.seconds) as timer:
                watcher = asyncio.create_task(watch())
                try:
                    yield
                finally:
                    watcher.cancel()
        except TimeoutError as error:
            if has_left:
                raise ClientDisconnect from error
            raise Refusal(504, f"The response was not ready within {self.limits.seconds:g} seconds.") from error

    def find_model(self, name: str | None) -> ServedModel:
        """Return a model by name, the first for None.

        Raises:
            Refusal: 404 if there is no such model.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refusal(404, f"There is no model {name[:100]!r}; there are: {', '.join(self.models)}.")
        return self.models[name]

    async def predict(
        self, uploads: Sequence[Upload], model: ServedModel, faces: str | None, *, crops: bool = False
    ) -> list[Picture]:
        """Return the pictures with their predicted faces; with `crops`, including the crops that the model received."""
        found, sizes = await self._find(uploads, model, faces)
        self.metrics.faces.labels(model.name).inc(sum(len(one.crops) for one in found))
        pictures = [
            _describe_picture(upload.name, size, one, model.labels)
            for upload, size, one in zip(uploads, sizes, found, strict=True)
        ]
        if crops:
            await self.run(lambda: _add_crops(pictures, found))
        return pictures

    async def read_crops(self, tensor: Tensor, parts: Parts, model: ServedModel) -> list[np.ndarray]:
        """Return the images of a tensor as crops of the model's own size; see `dlfer.serve.models.check_tensor`."""
        shape = check_tensor(tensor, self.limits)
        text = parts.find(tensor.data[0]) if len(tensor.data) == 1 else None
        if text is None:
            raise Refusal(400, f"images: expected {prod(shape):,} integers 0..255 in data, flat or nested.")
        _, (values,) = await self.parsers.ask("tensor", [text], shape=tensor.shape)
        images = np.frombuffer(values, np.uint8).reshape(shape)
        return await self.run(lambda: [model.fit(image) for image in images])

    async def predict_crops(self, crops: Sequence[np.ndarray], model: ServedModel) -> np.ndarray:
        """Return probabilities float32 [N, C] of crops of the model's own size."""
        return await self._ask(PredictionTask(model, crops))

    async def explain(
        self, upload: Upload, model: ServedModel, *, faces: str | None, face: int, label: str | None
    ) -> Explanation:
        """Return the occlusion map of a face."""
        if label is not None and label not in model.labels:
            raise Refusal(400, f"label: found {label[:100]!r}, expected one of {escape_text(', '.join(model.labels))}.")
        (found,), _ = await self._find([upload], model, faces)
        if face >= len(found.crops):
            if not found.crops:
                raise Refusal(400, "No face was found in the picture. Send faces=whole if the picture is a face.")
            raise Refusal(400, f"face: found {face}, but the picture has {len(found.crops)} (the first is 0).")

        is_given_up = threading.Event()

        def predict(covered: np.ndarray) -> np.ndarray:
            if is_given_up.is_set():
                raise CancelledError
            parts = [covered[start : start + _COVERED_AT_ONCE] for start in range(0, len(covered), _COVERED_AT_ONCE)]
            return np.concatenate(
                [self._batcher.submit(PredictionTask(model, part)).result(self.limits.seconds) for part in parts]
            )

        try:
            return await self.run(
                lambda: explain_crop(found.crops[face], label, model=model.name, labels=model.labels, predict=predict),
                self._explainers,
            )
        except asyncio.CancelledError:
            is_given_up.set()
            raise

    async def run(self, work: Callable[[], _T], pool: ThreadPoolExecutor | None = None) -> _T:
        """Run a function on a thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(pool or self._threads, work)

    async def _find(
        self, uploads: Sequence[Upload], model: ServedModel, faces: str | None
    ) -> tuple[list[FacesFound], list[tuple[int, int]]]:
        """Return the faces in pictures, and (width, height) of each, after waiting for the memory that they need."""
        pixels, taken = await measure_pictures(uploads, self._decoders)
        await self._memory.wait_for(taken)
        images: list[np.ndarray] = []
        work = PredictionTask(model, images, faces or self.faces, self.limits.faces)

        def free(done: object = None) -> None:
            images.clear()  # a remaining reference to the list, e.g. in a traceback, then keeps no picture in memory
            self._memory.give_back(taken)

        try:
            for upload in uploads:
                images.append(await decode_picture(upload, self._decoders))
            # The decoder's memory is free again; the pixels are kept until they are predicted.
            self._memory.give_back(taken - 3 * pixels)
            taken = 3 * pixels
            sizes = [(image.shape[1], image.shape[0]) for image in images]
            return await self._ask(work), sizes
        finally:
            if work.done.running():  # the request was cancelled, but its pictures are still being predicted
                loop = asyncio.get_running_loop()
                work.done.add_done_callback(lambda done: loop.call_soon_threadsafe(free))
            else:
                free()

    async def _ask(self, work: PredictionTask) -> Any:
        try:
            return await asyncio.wrap_future(self._batcher.submit(work))
        except (ModelError, EnvironmentProblem):
            raise  # a fault of the server
        except UserError as error:
            raise Refusal(400, str(error)) from error

    def _too_busy(self, num_waiting: int) -> Refusal:
        wait = estimate_wait(num_waiting, self._batcher.seconds_each)
        return Refusal(503, "Too many requests are in progress; try again later.", retry_after=wait)


def _describe_picture(name: str, size: tuple[int, int], found: FacesFound, labels: tuple[str, ...]) -> Picture:
    faces = []
    for crop, row in zip(found.crops, found.probabilities, strict=True):
        best = int(row.argmax())
        faces.append(
            Face(
                box=crop.box,
                score=crop.score,
                label=labels[best],
                confidence=float(row[best]),
                probabilities={label: float(value) for label, value in zip(labels, row, strict=True)},
            )
        )
    return Picture(name=name, width=size[0], height=size[1], num_faces_found=found.num_found, faces=faces)
