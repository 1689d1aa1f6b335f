"""The `dlfer predict` command: predict labels for the faces in pictures and videos."""

from __future__ import annotations

import codecs
import gzip
import math
import shlex
import zlib
from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import DetectorSize, Faces, Force, Model, say
from dlfer.errors import DlferError, UserError


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Pictures, folders, globs, videos, camera:0, or - for a list on stdin."),
    ],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .csv, .json, .jsonl or .parquet, instead of stdout.")
    ] = None,
    draw: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write pictures and videos with the faces marked.")
    ] = None,
    faces: Faces = "auto",
    detector_size: DetectorSize = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Inference engine: onnx (default if the model has an ONNX file), keras (default otherwise), "
            "openvino, litert (needs an export), or auto, the fastest with the same results.",
        ),
    ] = None,
    abstain: Annotated[
        float | None, typer.Option(metavar="T", help="Below this confidence the label is 'uncertain'.")
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Average over each face and its horizontal flip; takes twice the time.")
    ] = False,
    smooth: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Videos: time constant of the smoothing of probabilities; 0: no smoothing."
        ),
    ] = 0.5,
    detect_every: Annotated[
        str,
        typer.Option(
            metavar="K|auto",
            help="Videos: detect faces on every Kth frame that is used, and follow them in between; auto: about 7 "
            "times a second.",
        ),
    ] = "auto",
    every: Annotated[int, typer.Option(metavar="N", help="Videos: use every Nth frame.")] = 1,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Videos and cameras: stop after S seconds.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show the predictions in a window; q or Esc closes it. Needs a display.")
    ] = False,
    force: Force = False,
    max_megapixels: Annotated[
        float,
        typer.Option(metavar="M", help="Refuse pictures above M million pixels; each million takes 3 MB of memory."),
    ] = 200.0,
) -> None:
    """Predict which expression label annotators would give to each face in pictures and videos.

    It does not detect what a person feels. In the EU, inferring emotions at work and in education is prohibited
    (AI Act, Art. 5(1)(f)); models trained on FER2013 or ImageNet weights are for research only.

    Without --out the rows go to stdout: as a table on a terminal, as csv otherwise. Inputs that cannot be read or drawn
    are listed at the end, and the command exits with 1. Columns: docs/how-to/predict.md.
    """
    if every < 1:
        raise UserError(f"--every {every}: expected 1 or more.")
    interval = None if detect_every == "auto" else _parse_interval(detect_every)
    if not 0 < max_megapixels <= 2000:
        raise UserError(f"--max-megapixels {max_megapixels:g}: expected more than 0 and at most 2000.")
    if not 0 <= smooth < math.inf:
        raise UserError(f"--smooth {smooth:g}: expected a number of seconds from 0.")
    if seconds is not None and not seconds >= 0:
        raise UserError(f"--seconds {seconds:g}: expected a number of seconds from 0.")
    if draw is not None and not draw.strip():  # Path("") is the current folder
        raise UserError("--draw: found an empty path, expected a folder, e.g. --draw marked.")
    if len(inputs) == 1:
        _refuse_data(inputs[0], model)
    from dlfer.predict.job import PredictionJob, predict_files

    job = PredictionJob(
        model=model,
        out=out,
        draw=None if draw is None else Path(draw),
        faces=faces,
        detector_size=detector_size,
        engine=engine,
        abstain=abstain,
        mirror=mirror,
        smooth=smooth,
        detect_every=interval,
        every=every,
        seconds=seconds,
        show=show,
        force=force,
        max_megapixels=max_megapixels,
    )
    num_failed = predict_files(inputs, job, say=say)
    if num_failed:
        raise typer.Exit(1)


def _parse_interval(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise UserError(f"--detect-every {text}: expected auto, or a whole number from 1.")
    return int(text)


def _refuse_data(name: str, model: str | None) -> None:
    """Raise UserError if a job's only input is a csv, .npz, zip, gzip or experiment file, with what to do instead."""
    path = Path(name)
    if path.suffix.casefold() not in (".csv", ".npz", ".zip", ".gz", ".yaml", ".yml") or not path.is_file():
        return
    found = _describe_data(path)
    if found is None:
        return  # an unreadable picture, which the job reports
    what, is_archive, is_data = found
    ways = ["unpack it"] if is_archive else []
    if is_data:
        ways.append(f"evaluate a model on it: dlfer evaluate {model or 'MODEL'} --data {shlex.quote(str(name))}")
    raise UserError(f"{name}: found {what}, expected pictures, folders, globs or videos; {', or '.join(ways)}")


def _describe_data(path: Path) -> tuple[str, bool, bool] | None:
    """Return what a file holds, whether unpacking it may give pictures, and whether it is data; None: it is neither."""
    from dlfer.data.given import recognise

    try:
        with path.open("rb") as stream:
            start = stream.read(_HEAD)
        is_zip, is_gzip = start.startswith((b"PK\3\4", b"PK\5\6")), start.startswith(b"\x1f\x8b")
        if is_gzip:
            with gzip.open(path) as stream:
                start = stream.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return None
    if is_gzip and b"pixels" not in start.partition(b"\n")[0]:
        return "a gzip archive", True, False
    if not is_zip and (not start.strip() or b"\0" in start or not _is_text(start)):
        return None
    try:
        kind = recognise(path)
    except DlferError:
        return ("a zip archive", True, False) if is_zip else None
    names = {"csv": "a csv", "arrays": "arrays", "experiment": "an experiment file", "pictures": "a zip of pictures"}
    return names[kind], kind == "pictures", True


_HEAD = 4096


def _is_text(start: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8; the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True
