"""The work of `dlfer predict`: predict inputs, and write a table and pictures and videos with marked faces."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.markup import escape

from dlfer.data.files import Tally
from dlfer.data.images import MAX_PIXELS
from dlfer.errors import DlferError, Signalled, UserError, shorten
from dlfer.predict.draw import AnnotatedWriter, check_window, list_output_paths, number_labels, show_all
from dlfer.predict.engines import AUTO, Engine, choose_engine, load_engine
from dlfer.predict.media import NOT_READ, UnreadableInput, list_inputs, open_inputs
from dlfer.predict.predictor import FacePredictor, FramePrediction, describe_predictions, predict_inputs
from dlfer.predict.tables import Table, choose_form, open_table
from dlfer.predict.video import CAMERA, is_video
from dlfer.runs.files import check_outputs, check_writable
from dlfer.runs.find import find_default_model
from dlfer.runs.text import escape_text, to_utf8
from dlfer.train.progress import ConsoleListener


def _end(number: int, frame: FrameType | None) -> None:
    raise Signalled(number)


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the work as Ctrl-C does, so that the results until then are written.

    A signal that is ignored, as under nohup, stays ignored; on threads other than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in names}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # the command line's own handler would exit at once
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


_MAX_FAILURES = 20
NOT_REACHED = "not reached before the job ended"


@dataclass(frozen=True)
class PredictionJob:
    """The options of a prediction job.

    Attributes:
        model: a model's name, a run, or a folder; None: the default model.
        out: path of the table; None: stdout.
        draw: folder for marked pictures and videos, or None.
        faces, detector_size: see `build_cropper`.
        engine: see `load_engine`; "auto": see `choose_engine`.
        abstain, mirror: see `FacePredictor`.
        smooth, detect_every: see `predict_inputs`.
        every, seconds: see `read_video`.
        show: whether predictions are shown in a window, see `Window`.
        force: whether existing files, except inputs, are replaced.
        max_megapixels: larger pictures are refused.
    """

    model: str | None = None
    out: Path | None = None
    draw: Path | None = None
    faces: str = "auto"
    detector_size: int | None = None
    engine: str | None = None
    abstain: float | None = None
    mirror: bool = False
    smooth: float = 0.5
    detect_every: int | None = None
    every: int = 1
    seconds: float | None = None
    show: bool = False
    force: bool = False
    max_megapixels: float = MAX_PIXELS / 1_000_000


def predict_files(names: Sequence[str], job: PredictionJob, *, say: Callable[[str], None]) -> int:
    """Predict files, write the table and the marked pictures, and return the number of inputs not read or not drawn.

    `names` are those of `list_inputs`; `say` receives what a reader of the results has to know, and what failed.

    Raises:
        UserError, ModelError, EnvironmentProblem: the job cannot start, e.g. because an output would replace a file.
        OSError: the table cannot be written completely; except for parquet, the rows until then are kept.
    """
    choose_form(job.out)
    # A list on stdin may be endless; named inputs are counted first, to estimate the time left.
    tally = Tally()
    listed, is_list = list_inputs(names, stdin=sys.stdin, tally=tally), "-" in names
    files = listed if is_list else list(listed)
    known = [] if is_list else [name for name in files if isinstance(name, str)]
    _check_places(known, job, has_list=is_list)
    if job.show:
        check_window()
    num_pictures, has_videos = None, False
    if not is_list:
        num_pictures = sum(not is_video(name) for name in known)
        has_videos = any(is_video(name) for name in known)
    predictor, about = _open_predictor(job, num_pictures, has_videos=has_videos, say=say)
    max_pixels = int(job.max_megapixels * 1_000_000)
    inputs = open_inputs(files, every=job.every, seconds=job.seconds, max_pixels=max_pixels)
    results = predict_inputs(predictor, inputs, smooth=job.smooth, detect_every=job.detect_every, every=job.every)
    outcome = _Outcome(tally, every=job.every)
    try:
        table = open_table(job.out, labels=predictor.labels, about=about, has_videos=has_videos or is_list)
        sketches = AnnotatedWriter(job.draw, force=job.force) if job.draw is not None else None
        with (
            interrupt_on_signals(),
            contextlib.closing(inputs),
            contextlib.closing(results),
            contextlib.closing(_report_progress(results, num_pictures)) as reported,
            contextlib.closing(show_all(reported) if job.show else reported) as shown,
        ):
            outcome.write_all(shown, table, sketches)
    finally:
        outcome.tell(say)
    if job.out is not None:
        say(f"written: {job.out}")
    if job.draw is not None:
        say(f"written: {job.draw}, the marked copies")
    return len(outcome.unread) + len(outcome.undrawn)


def _open_predictor(
    job: PredictionJob, num_pictures: int | None, *, has_videos: bool, say: Callable[[str], None]
) -> tuple[FacePredictor, dict[str, Any]]:
    """Return the predictor and the description of its predictions, and report the latter by `say`."""
    classifier = _open_engine(job, num_pictures, say=say)
    predictor = FacePredictor(
        classifier, faces=job.faces, detector_size=job.detector_size, abstain=job.abstain, mirror=job.mirror
    )
    about = describe_predictions(predictor, faces=job.faces, smooth=job.smooth, detect_every=job.detect_every)
    for key in ("notice", "probabilities", "mirror", *(["detection", "smoothing"] if has_videos else [])):
        if about[key] is not None:
            say(f"{key}: {about[key]}")
    numbers = number_labels(predictor.labels) if job.draw is not None or job.show else {}
    if numbers:
        meanings = ", ".join(f"{number} {escape_text(label)}" for label, number in numbers.items())
        say(
            f"labels: marked copies show numbers for labels that no font found here can write: {meanings}. Install a "
            "font that has their characters; matplotlib finds it, where that is installed."
        )
    return predictor, about


def _check_places(known: Sequence[str], job: PredictionJob, *, has_list: bool) -> None:
    """Check that no output replaces an input, or another existing file unless `job.force` is set."""
    inputs = [name for name in known if not name.startswith(CAMERA)]
    if has_list and job.force and job.draw is not None:
        raise UserError(
            "dlfer predict - --draw --force: the inputs on stdin are not known in advance, so a drawn picture could "
            "replace one of them; draw into an empty folder without --force."
        )
    drawn = list_output_paths(known, job.draw) if job.draw is not None else []
    check_outputs({"--out": job.out, "--draw": drawn}, [*inputs, job.model], force=job.force)
    if job.draw is not None:
        check_writable(job.draw, "--draw")


def _open_engine(job: PredictionJob, num_pictures: int | None, *, say: Callable[[str], None]) -> Engine:
    """Load the engine; "auto" chooses one for `num_pictures`, or for 64 if that is None (a list) or 0 (videos)."""
    name = str(find_default_model() if job.model is None else job.model)
    if job.engine == AUTO:
        return choose_engine(name, num_faces=num_pictures or 64, any_size=job.faces == "whole", say=say)
    if job.model is None and job.engine == "litert":
        raise UserError(
            "--engine litert: expected an export as --model FOLDER; make one with dlfer export MODEL --to litert."
        )
    return load_engine(name, job.engine)


class _Outcome:
    """The failures of a job: inputs that could not be read, and predicted ones that could not be drawn.

    Args:
        tally: the counts of the inputs; those that could not be read or were not reached are added as left out.
        every: see `PredictionJob`.
    """

    def __init__(self, tally: Tally, *, every: int) -> None:
        self.unread: list[dict[str, str]] = []
        self.undrawn: list[dict[str, str]] = []
        self.notes: list[str] = []
        self._tally = tally
        self._every = every
        self._num_done = 0
        self._last: tuple[str, object] = ("", None)

    def write_all(
        self, results: Iterator[FramePrediction | UnreadableInput], table: Table, sketches: AnnotatedWriter | None
    ) -> None:
        """Write every result. After Ctrl-C or an OSError, such as a full disk, finish the table and raise again."""
        try:
            for result in results:
                if isinstance(result, UnreadableInput):
                    # Counted first: it is then reported at the end even if its row cannot be written.
                    self._count(result)
                table.write(result)
                if isinstance(result, FramePrediction):
                    self._count(result)
                    if sketches is not None:
                        self._draw(result, sketches)
            self._end(table, sketches)
        except (KeyboardInterrupt, OSError):
            self._end(table, sketches)
            raise
        except BaseException:
            table.discard()
            if sketches is not None:
                self._close(sketches)
            raise

    def tell(self, say: Callable[[str], None]) -> None:
        """Report the counts by `say`, and the failures: the first ones, and their number."""
        self._count_missed()
        # Inputs that could not be read are listed below, with the reason.
        counts = [line for line in self._tally.describe() if not line.startswith(f"Left out, {NOT_READ}:")]
        for line in [*self.notes, *counts]:
            say(line)
        for failed, what in ((self.unread, "read"), (self.undrawn, "drawn")):
            for failure in failed[:_MAX_FAILURES]:
                say(f"not {what}: {escape_text(failure['error'])}")
            if len(failed) > 1:
                say(f"{len(failed):,} of the inputs could not be {what}.")

    def _count(self, result: FramePrediction | UnreadableInput) -> None:
        """Count an input at its first result; a video that ends with an error was counted at its first frame."""
        name = result.name if isinstance(result, UnreadableInput) else result.frame.name
        video = None if isinstance(result, UnreadableInput) else result.frame.video
        is_same = (
            video is self._last[1]
            if video is not None
            else isinstance(result, UnreadableInput) and self._last[1] is not None
        )
        self._num_done += not (is_same and name == self._last[0])
        self._last = (name, video)
        if isinstance(result, UnreadableInput):
            failure = {"file": to_utf8(result.name), "error": to_utf8(result.error)}
            self.unread.append(failure)
            self._tally.leave_out(NOT_READ, failure["file"], was_seen=True)

    def _draw(self, result: FramePrediction, sketches: AnnotatedWriter) -> None:
        try:
            sketches.add(result, every=self._every)
        except Exception as error:  # encoders raise any type, and one picture must not end the job
            self._note(result.frame.name, error)

    def _end(self, table: Table, sketches: AnnotatedWriter | None) -> None:
        if sketches is not None:
            self._close(sketches)
        self._count_missed()
        table.close([*self.unread, *self.undrawn], self._tally.as_record())

    def _count_missed(self) -> None:
        """Count the inputs that the job did not reach as left out, except those counted by an earlier call."""
        others = sum(reason.n for reason in self._tally.list_left_out() if reason.reason != NOT_READ)
        missed = self._tally.seen - others - self._num_done
        if missed > 0:
            last = to_utf8(self._last[0])
            self._tally.leave_out(NOT_REACHED, f"all after {last}" if last else "all of them", missed, was_seen=True)

    def _close(self, sketches: AnnotatedWriter) -> None:
        try:
            sketches.close()
        except (DlferError, OSError) as error:
            self._note("the last video", error)
        self.notes = sketches.notes

    def _note(self, name: str, error: Exception) -> None:
        name = to_utf8(name)
        text = to_utf8(describe_failure(error))
        self.undrawn.append({"file": name, "error": f"{name}: predicted, not drawn: {text}"})


def describe_failure(error: Exception) -> str:
    """Return the message of an item's error, preceded by its type unless it is a DlferError or an OSError."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, DlferError | OSError) else f"{type(error).__name__}: {shorten(error)}"


def _report_progress(
    results: Iterator[FramePrediction | UnreadableInput], num_pictures: int | None
) -> Iterator[FramePrediction | UnreadableInput]:
    """Yield the results and show the progress; `num_pictures` is None if a list on stdin makes it unknown."""
    progress = ConsoleListener()
    num_done = 0
    try:
        for result in results:
            frame = result.frame if isinstance(result, FramePrediction) else None
            if frame is not None and frame.video is not None:
                progress.report_progress(
                    escape(escape_text(Path(frame.name).name)), (frame.index or 0) + 1, frame.video.num_frames
                )
            elif frame is not None:
                num_done += 1
                progress.report_progress("pictures", num_done, num_pictures)
            yield result
    finally:
        progress.close()
