"""A whole prediction: from the names of files to a table and marked pictures, with progress, past what is damaged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlfer.errors import UserError
from dlfer.predict import video as films
from dlfer.predict.draw import Sketches
from dlfer.predict.engines import AUTO, Engine, load_engine
from dlfer.predict.media import BadInput, list_inputs, open_inputs
from dlfer.predict.predictor import FacePredictor, FramePrediction, describe_predictions, predict_inputs
from dlfer.predict.progress import ProgressLine
from dlfer.predict.tables import Table, open_table
from dlfer.runs.find_model import find_default_model

_MOST_FAILURES = 20


@dataclass(frozen=True)
class PredictionJob:
    """What is asked for.

    Attributes:
        model: a model's name, a run, or a folder; None: the default model.
        out: the table; None: stdout.
        draw: folder of marked pictures and films, or None.
        faces: see `build_cropper`.
        engine: see `load_engine`; "auto": see `choose_engine`.
        abstain, mirror: see `FacePredictor`.
        smooth: see `predict_inputs`.
        every, seconds: see `read_film`.
    """

    model: str | None = None
    out: Path | None = None
    draw: Path | None = None
    faces: str = "auto"
    engine: str = "keras"
    abstain: float | None = None
    mirror: bool = False
    smooth: float = 0.5
    every: int = 1
    seconds: float | None = None


def predict_files(names: Sequence[str], job: PredictionJob, *, say: Callable[[str], None]) -> int:
    """Predict files, write the table and the marked pictures; return how many inputs could not be read.

    Args:
        names: as a user gives them, see `list_inputs`.
        job: what is asked for.
        say: is told what a reader of the results has to know, and what failed.

    Raises:
        UserError, ModelError, EnvironmentProblem: the job cannot begin.
    """
    # A list on stdin may be endless; what is named is counted first, for the time left.
    listed = list_inputs(names, stdin=sys.stdin)
    files = listed if "-" in names else list(listed)
    num_pictures, has_films = None, False
    if "-" not in names:
        num_pictures = sum(isinstance(name, str) and not films.is_film(name) for name in files)
        has_films = job.smooth > 0 and any(isinstance(name, str) and films.is_film(name) for name in files)
    classifier = _open_engine(job, num_pictures, say=say)
    predictor = FacePredictor(classifier, faces=job.faces, abstain=job.abstain, mirror=job.mirror)
    about = describe_predictions(predictor, faces=job.faces, smooth=job.smooth)
    for key in ("notice", "probabilities", *(["mirror"] if job.mirror else []), *(["smoothing"] if has_films else [])):
        say(f"{key}: {about[key]}")
    inputs = open_inputs(files, every=job.every, seconds=job.seconds)
    results = predict_inputs(predictor, inputs, smooth=job.smooth)
    table = open_table(job.out, labels=predictor.labels, about=about)
    sketches = Sketches(job.draw) if job.draw is not None else None
    failed = _write_all(_report_progress(results, num_pictures), table, sketches, every=job.every)
    for failure in failed[:_MOST_FAILURES]:
        say(f"not read: {failure['error']}")
    if failed:
        say(f"{len(failed):,} of the inputs could not be read.")
    if job.out is not None:
        say(f"written: {job.out}")
    return len(failed)


def _open_engine(job: PredictionJob, num_pictures: int | None, *, say: Callable[[str], None]) -> Engine:
    """Return what computes; of films and lists the number of pictures is not known, and they are many."""
    name = str(job.model or find_default_model())
    if job.engine == AUTO:
        # It needs Keras, which the other engines do without.
        from dlfer.predict.choose_engine import choose_engine

        return choose_engine(name, num_faces=num_pictures or 64, any_size=job.faces == "whole", say=say)
    if job.model is None and job.engine != "keras":
        raise UserError(f"--engine {job.engine}: name an export by --model FOLDER; dlfer export MODEL makes one.")
    return load_engine(name, job.engine)


def _write_all(
    results: Iterator[FramePrediction | BadInput], table: Table, sketches: Sketches | None, *, every: int
) -> list[dict[str, str]]:
    """Write every result; return what failed. Ctrl-C ends the table where it is, and goes on to the caller."""
    failed: list[dict[str, str]] = []
    try:
        for result in results:
            if isinstance(result, BadInput):
                failed.append({"file": result.name, "error": result.error})
                continue
            table.write(result)
            if sketches is not None:
                sketches.add(result, every=every)
    except KeyboardInterrupt:
        table.close(failed)
        raise
    except BaseException:
        table.discard()
        raise
    finally:
        if sketches is not None:
            sketches.close()
    table.close(failed)
    return failed


def _report_progress(
    results: Iterator[FramePrediction | BadInput], num_pictures: int | None
) -> Iterator[FramePrediction | BadInput]:
    """Yield the results, and show how far it is; the number of pictures on a list that is being read is not known."""
    progress = ProgressLine()
    num_done = 0
    try:
        for result in results:
            frame = result.frame if isinstance(result, FramePrediction) else None
            if frame is not None and frame.film is not None:
                progress.show(Path(frame.name).name, (frame.index or 0) + 1, frame.film.num_frames)
            elif frame is not None:
                num_done += 1
                progress.show("pictures", num_done, num_pictures)
            yield result
    finally:
        progress.close()
