"""The two jobs of `dlfer explain`: maps of the faces in pictures, and average maps over a split of a run's data.

Each writes figures, arrays and a page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.files import Tally
from dlfer.data.sources import load_data
from dlfer.data.split import draw_subset
from dlfer.errors import DataError, DlferError, ModelError, UserError
from dlfer.explain.explanation import AverageMaps, Explainer, Explanation, MapAverage, MapOptions, check_maps
from dlfer.explain.figures import (
    describe_average,
    describe_maps,
    describe_sanity,
    list_sanity_rows,
    write_averages,
    write_explanation,
    write_explanation_report,
)
from dlfer.model.classifier import Classifier
from dlfer.model.families import EnsembleClassifier
from dlfer.predict.crops import Crop, build_cropper
from dlfer.predict.engines import ArtifactModel, Engine, load_engine
from dlfer.predict.job import describe_failure, interrupt_on_signals
from dlfer.predict.media import NOT_READ, Frame, UnreadableInput, list_inputs, open_inputs
from dlfer.predict.predictor import NOTICE
from dlfer.predict.video import CAMERA, is_video
from dlfer.runs.files import (
    Place,
    check_outputs,
    check_writable,
    choose_name,
    fold_name,
    read_json,
    write_atomically,
    write_npz,
)
from dlfer.runs.find import find_default_model, find_model, find_run_of, open_run
from dlfer.runs.run import Run
from dlfer.runs.run_records import ignore_read_only, log_opening
from dlfer.runs.text import escape_text, to_utf8
from dlfer.train.progress import ConsoleListener

MAX_CHECKED = 12
"""Maximum number of faces whose maps are computed again with re-initialised weights, as a sanity check."""

VIDEOS = "videos, which explain does not take"

MAX_SHOWN = 60
"""Maximum number of figures on the page, to which each adds about 100 KB."""


@dataclass(frozen=True)
class ExplainJob:
    """The options of `dlfer explain`.

    Attributes:
        model: a model's name, a run, or a folder; None: the default model.
        out: the output folder for figures, arrays and the page.
        maps: the methods and their settings.
        label: the label that the maps of pictures explain; None: each face's most probable label.
        faces, detector_size: see `build_cropper`.
        per_class: maximum number of faces of each label, for maps of a split.
        check: whether to check that maps change when weights are re-initialised.
        force: whether to replace existing files that an earlier `dlfer explain` did not write; inputs never are.
    """

    model: str | None
    out: Path
    maps: MapOptions = field(default_factory=MapOptions)
    label: str | None = None
    faces: str = "auto"
    detector_size: int | None = None
    per_class: int = 40
    check: bool = False
    force: bool = False


@dataclass(frozen=True)
class Explained:
    """A face and its maps.

    Attributes:
        name: of its figure, without .png.
        source: the picture's name, or the id of the image in a split.
        number: of the face in its picture, from 1; None if it is the only one.
        box: x0, y0, x1, y1 in the picture; None if the whole picture was used as a face.
        image: uint8 [H, W, C], the classifier's input.
        explanation: the maps.
    """

    name: str
    source: str
    number: int | None
    box: tuple[float, float, float, float] | None
    image: np.ndarray
    explanation: Explanation


def explain_pictures(names: Sequence[str], job: ExplainJob, *, say: Callable[[str], None]) -> tuple[Path, int]:
    """Explain each face in pictures; write <name>.png and <name>.npz for each, explanations.json and index.html.

    Args:
        names: pictures, folders and globs, see `list_inputs`.

    Returns:
        The path of the page, and the number of failures to read a picture or explain a face.

    Raises:
        UserError, ModelError, EnvironmentProblem: the job cannot start, e.g. because an output would replace a file, or
            no face could be explained.
        KeyboardInterrupt: after Ctrl-C, once the page of the faces explained so far is written.
    """
    tally = Tally()
    inputs = list(list_inputs(names, stdin=sys.stdin, tally=tally))
    known = [name for name in inputs if isinstance(name, str) and not name.startswith(CAMERA)]
    used = _check_places([clean_name(Path(name).stem) for name in known], job, known)
    folder = find_default_model() if job.model is None else find_model(job.model)
    engine = load_engine(folder)
    target = _find_label(engine, job.label)
    explainer = build_explainer(engine, job, say)
    classifier = explainer.classifier
    cropper = build_cropper(job.faces, engine, detector_size=job.detector_size)

    def explain(image: np.ndarray) -> list[tuple[Crop, Explanation]]:
        return [(crop, explainer.explain(crop.pixels, target)) for crop in cropper([image])[0]]

    failed: list[str] = []
    pictures = _read_pictures(inputs, set(names), failed, tally)
    faces = _explain_faces(pictures, explain, used, failed, say=say)
    records, kept, interrupt = _write_faces(faces, job, classifier, failed, num_inputs=len(inputs))
    # `failed` lists unreadable inputs with their reasons, so the tally's line about them is left out.
    for line in [*(text for text in tally.describe() if not text.startswith(f"Left out, {NOT_READ}:")), *failed]:
        say(line)
    if interrupt is not None:
        say("explain: interrupted; the page has the faces explained so far")
        if not records:
            raise interrupt
    if not records:
        advice = " Faces are found by a detector; --faces whole takes each picture for one."
        raise UserError(f"explain: no face was explained.{'' if failed else advice}")
    sanity = run_sanity_check(explainer, kept, job) if interrupt is None else None
    record = {"labels": list(classifier.labels), "faces": records, **describe_job(job, folder, sanity, explainer)}
    _write_record(job, record)
    reading = describe_maps([one.explanation for one in kept], job.label) + list_remarks(explainer)
    if len(records) > MAX_SHOWN:
        reading.append(
            f"The page shows the first {MAX_SHOWN} of {len(records):,} faces; the figures of the others are in its folder."
        )
    context = {"title": "What the predictions depend on", "reading": reading, "failed": failed}
    context |= {"subtitle": describe_model(folder, classifier)}
    page = write_page(job, [record["name"] for record in records[:MAX_SHOWN]], context=context, sanity=sanity)
    if interrupt is not None:
        raise interrupt
    return page, len(failed)


def _write_faces(
    faces: Iterator[Explained], job: ExplainJob, classifier: Classifier, failed: list[str], *, num_inputs: int
) -> tuple[list[dict[str, Any]], list[Explained], KeyboardInterrupt | None]:
    """Write the figure and arrays of each face; return the records, the first faces, and an early interrupt or None."""
    records: list[dict[str, Any]] = []
    kept: list[Explained] = []
    listener = ConsoleListener()
    try:
        with interrupt_on_signals():
            for explained in faces:
                if not _write_face(explained, job, classifier, failed):
                    continue
                records.append(_describe_face(explained, classifier))
                # To limit memory, only the faces for the sanity check are kept.
                kept = kept if len(kept) == MAX_CHECKED else [*kept, explained]
                listener.report_progress("faces", len(records), max(num_inputs, len(records)))
    except KeyboardInterrupt as error:
        return records, kept, error
    finally:
        listener.close()
    return records, kept, None


@dataclass
class UsedNames:
    """The names of figures (<name>.png, with arrays in <name>.npz) that are in use in a folder, by `fold_name`."""

    folder: Path
    names: set[str]

    def choose(self, stem: str) -> str:
        """Return an unused name for a figure, and mark it as used."""
        name = choose_name(stem, ".png", self.names, folder=self.folder, join="_")
        self.names.add(fold_name(f"{name}.png"))
        return name


def _check_places(stems: Iterable[str], job: ExplainJob, inputs: Sequence[Place]) -> UsedNames:
    """Check that no input is overwritten, nor another file unless `force` is set; return the names in use.

    The numbers of faces are not known yet, so every existing figure whose name could be needed is checked.
    """
    check_writable(job.out, "--out")
    wanted, earlier = {fold_name(stem) for stem in stems}, _list_earlier(job.out)
    fixed = [job.out / name for name in sorted(FIXED)]
    there = [path for path in job.out.glob("*") if path.suffix in (".png", ".npz") and path not in fixed]
    figures = [path for path in there if _strip_numbers(path.stem) & wanted]
    check_outputs({"--out": [*fixed, *figures]}, inputs, force=True)
    check_outputs({"--out": [path for path in (*fixed, *figures) if path.name not in earlier]}, force=job.force)
    here = {Path(path).name for path in inputs if Path(path).parent.resolve() == job.out.resolve()}
    kept = [path for path in there if path.name in here or not (job.force or path.name in earlier)]
    return UsedNames(job.out, {fold_name(f"{path.stem}.png") for path in kept})


def _strip_numbers(stem: str) -> set[str]:
    """Return the possible stems of a figure's name before numbers for faces and for equal names were appended."""
    name = fold_name(stem)
    return {name, *(re.sub(pattern, "", name) for pattern in (r"_\d+$", r"-\d+$", r"-\d+_\d+$"))}


FIXED = frozenset({"index.html", "explanations.json", "averages.npz"})
"""The files whose names do not depend on what is explained."""


def _list_earlier(folder: Path) -> set[str]:
    """Return the names of the files that earlier runs of `dlfer explain` wrote into a folder."""
    try:
        record = read_json(folder / "explanations.json")
        is_ours = record["notice"] == NOTICE
        return FIXED | _list_figures(record) | set(record.get("earlier", ())) if is_ours else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _list_figures(record: dict[str, Any]) -> set[str]:
    """Return the names of the figures and arrays that explanations.json lists as those of its own run."""
    names = [f["name"] for f in record.get("faces", ())] + [a["name"] for a in record.get("averages", ())]
    return {f"{name}{end}" for name in names for end in (".png", ".npz")}


def _write_record(job: ExplainJob, record: dict[str, Any]) -> None:
    """Write explanations.json, with the figures of earlier runs that are still there, so that they can be replaced."""
    earlier = _list_earlier(job.out) - FIXED - _list_figures(record)
    record = {**record, "earlier": sorted(name for name in earlier if (job.out / name).is_file())}
    write_atomically(job.out / "explanations.json", json.dumps(record, indent=2) + "\n")


def _explain_faces(
    frames: Iterator[Frame],
    explain: Callable[[np.ndarray], list[tuple[Crop, Explanation]]],
    used: UsedNames,
    failed: list[str],
    *,
    say: Callable[[str], None],
) -> Iterator[Explained]:
    """Yield the faces in pictures with maps; report pictures without one through `say`, add errors to `failed`."""
    for frame in frames:
        try:
            found = explain(frame.image)
        except Exception as error:  # an error of any part in one picture must not end the job
            _record_or_raise(frame.name, error, failed)
            continue
        if not found:
            say(f"{frame.name}: no face found; if the picture is a crop of one face, use --faces whole")
        for number, (crop, explanation) in enumerate(found, 1):
            shown = number if len(found) > 1 else None
            name = _name_file(frame.name, shown, used)
            yield Explained(name, frame.name, shown, crop.box, crop.pixels, explanation)


def _record_or_raise(name: str, error: Exception, failed: list[str]) -> None:
    """Add an error of one picture to `failed`, e.g. that it is smaller than the square; raise one of the whole job."""
    if isinstance(error, DlferError) and not isinstance(error, DataError | ModelError):
        raise error
    failed.append(escape_text(f"not explained: {name}: {describe_failure(error)}"))


INT8_NOTE = (
    "The model has two files of weights. Probabilities, predicted labels and occlusion are those of its ONNX file in int8, which "
    "predicts; Grad-CAM needs gradients and is computed from the Keras weights in float, whose predictions may differ."
)


def list_remarks(explainer: Explainer) -> list[str]:
    """Return the texts for the page and the record on Grad-CAM of another network than the one that predicts."""
    return [INT8_NOTE] if explainer.has_other_gradcam else []


def build_explainer(engine: Engine, job: ExplainJob, say: Callable[[str], None]) -> Explainer:
    """Return the explainer of the engine that predicts; report through `say` if Grad-CAM has to be left out."""
    classifier = engine.keras_classifier if isinstance(engine, ArtifactModel) else engine
    explainer = Explainer(classifier, job.maps, engine=engine)
    if explainer.lacks_gradcam:
        say(f"this model of family {classifier.family} has no gradients, so there are occlusion maps only, no Grad-CAM")
    return explainer


def _find_label(classifier: Engine, label: str | None) -> int | None:
    if label is None:
        return None
    if label not in classifier.labels:
        raise UserError(f"--label {label}: expected one of {', '.join(classifier.labels)}.")
    return classifier.labels.index(label)


def _read_pictures(
    inputs: Sequence[str | UnreadableInput], named: set[str], failed: list[str], tally: Tally
) -> Iterator[Frame]:
    """Yield the pictures that can be read; add the errors of the others to `failed`, and count them in `tally`.

    Videos are left out: those in `named` are errors, those found in a folder are only counted.
    """
    for name in inputs:
        if isinstance(name, str) and is_video(name):
            if name in named:
                what = "a camera" if name.startswith(CAMERA) else "a video"
                failed.append(f"not read: {escape_text(name)}: {what}; explain takes pictures; save the frame as one.")
            tally.leave_out(NOT_READ if name in named else VIDEOS, name, was_seen=True)
            continue
        with contextlib.closing(open_inputs([name])) as found:
            for item in found:
                if isinstance(item, UnreadableInput):
                    failed.append(f"not read: {escape_text(item.error)}")
                    tally.leave_out(NOT_READ, item.name, was_seen=True)
                else:
                    yield item


def run_sanity_check(explainer: Explainer, done: Sequence[Explained], job: ExplainJob) -> dict[str, Any] | None:
    """Return the result of `check_maps` on the first faces; None if the check was not requested."""
    if not job.check:
        return None
    some, listener = done[:MAX_CHECKED], ConsoleListener()
    try:
        return check_maps(
            explainer,
            [one.image for one in some],
            [one.explanation for one in some],
            say=lambda finished, total: listener.report_progress("maps of new weights", finished, total),
        )
    finally:
        listener.close()


def _write_face(explained: Explained, job: ExplainJob, classifier: Classifier, failed: list[str]) -> bool:
    """Write the figure and arrays of one face; return whether that succeeded, and add the error to `failed` if not."""
    path, explanation = job.out / f"{explained.name}.png", explained.explanation
    arrays = {name: values.astype(np.float32) for name, values in explanation.maps.items()}
    if explanation.occlusion is not None:
        arrays["flips"] = explanation.occlusion.flips
    try:
        shown = escape_text(Path(explained.source).name)
        shown += "" if explained.number is None else f", face {explained.number}"
        write_explanation(path, explained.image, explanation, labels=classifier.labels, name=shown)
        write_npz(job.out / f"{explained.name}.npz", arrays)
    except Exception as error:  # an error of any encoder in one picture must not end the job
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        _record_or_raise(explained.source, error, failed)
        return False
    return True


def _describe_face(explained: Explained, classifier: Classifier) -> dict[str, Any]:
    """Return a face's entry in explanations.json."""
    box = explained.box
    return {
        "name": explained.name,
        "source": to_utf8(explained.source),
        "box": None if box is None else [round(value, 2) for value in box],
        **explained.explanation.describe(classifier.labels),
    }


def describe_job(job: ExplainJob, folder: Path, sanity: dict | None, explainer: Explainer) -> dict[str, Any]:
    """Return the entries of explanations.json on how maps were made; `folder` is that of the model or its run."""
    maps = dataclasses.asdict(job.maps)
    return {
        "notice": NOTICE,
        "model": str(folder),
        "maps": maps,
        "remarks": list_remarks(explainer),
        "sanity": sanity,
    }


def describe_model(folder: Path, classifier: Classifier) -> str:
    """Return a line on the explained model: its name, its run if that is known, its network and its image size.

    Args:
        folder: the folder of its artifact or of its run.
    """
    about, config = classifier.about, classifier.config
    name = about.name or about.experiment or folder.resolve().name
    if isinstance(classifier, EnsembleClassifier):
        network = f"ensemble of {', '.join(classifier.members)}"
    else:
        network = " and ".join(config.branches) or config.backbone
    words = [f"Model: {name}", about.run and f"run {about.run}", network, f"{classifier.image_size} px"]
    if about.smoke:
        words.append("of a smoke run: its predictions are meaningless")
    return " · ".join(word for word in words if word)


def write_page(job: ExplainJob, names: Sequence[str], *, context: dict[str, Any], sanity: dict | None) -> Path:
    """Write index.html with the named figures; `context` has "title", "subtitle", "reading" and "failed"."""
    rest = {
        "sanity": [] if sanity is None else list_sanity_rows(sanity),
        "verdicts": [] if sanity is None else describe_sanity(sanity),
        "notice": NOTICE,
    }
    return write_explanation_report(job.out, names, {**context, **rest})


def _name_file(source: str, number: int | None, used: UsedNames) -> str:
    """Return an unused name for a face's figure: the picture's, with the face's number (from the largest) if any."""
    return used.choose(clean_name(Path(source).stem) + ("" if number is None else f"-{number}"))


def clean_name(name: str) -> str:
    """Return the name of a picture or label with characters that are unsafe in file names replaced by "_"."""
    return re.sub(r"[^\w.-]+", "_", name) or "picture"


def explain_split(split_name: str, job: ExplainJob, *, say: Callable[[str], None]) -> Path:
    """Average the maps of each label's faces in a split of a run's data, and return the path of the page.

    Each face's maps explain its own label. Writes average_<label>.png, averages.npz, explanations.json and index.html.

    Args:
        split_name: "test" or "validation"; opening a test split is logged in the run.
        job: the options; `job.model` is a run.

    Raises:
        UserError, ModelError: the job cannot start.
    """
    run, split, engine = _load_split(split_name, job)
    used = _check_places([f"average_{clean_name(label)}" for label in engine.labels], job, [run.path])
    explainer = build_explainer(engine, job, say)
    if split_name == "test":
        with ignore_read_only(run, "that its test split is opened is not logged there", say):
            opened = log_opening(run, split.name, len(split))
            say(f"the test split is opened (opening {opened} is logged); do not select anything by these maps")
    averages, examples = _average(split, explainer, job.per_class)
    labels = engine.labels
    sanity = run_sanity_check(explainer, examples, job)
    notes = {
        average.label: " ".join(describe_maps([examples[row].explanation], average.label))
        for row, average in enumerate(averages)
    }
    named = []
    for average in averages:
        name = used.choose(f"average_{clean_name(average.label)}")
        write_averages(job.out / f"{name}.png", average, note=notes[average.label])
        say(describe_average(average))
        named.append(name)
    arrays = {f"{a.label}/{key}": values.astype(np.float32) for a in averages for key, values in a.maps.items()}
    arrays |= {f"{a.label}/flips": a.flips.astype(np.float32) for a in averages if a.flips is not None}
    write_npz(job.out / "averages.npz", arrays)
    faces = f"at most {job.per_class} faces of each label, drawn with seed 0, with right and wrong predictions"
    reading = [
        f"{split.name} of {run.path.name}: {faces}. The maps of each face are of its own label; Grad-CAM is divided by each face's greatest value first. "
        "Averages blur what is at a different place in each image, and say nothing about a single image.",
        *describe_maps([examples[0].explanation], None),
        *list_remarks(explainer),
    ]
    record = {
        "part": split.name,
        "averages": [
            {"label": a.label, "name": name, "n": a.num_images, "correct": a.num_correct, "halves": a.halves}
            for a, name in zip(averages, named, strict=True)
        ],
        "labels": list(labels),
    }
    _write_record(job, record | describe_job(job, run.path, sanity, explainer))
    context = {"title": "What the model looks at, by label", "reading": reading, "failed": []}
    context |= {"subtitle": describe_model(run.path, explainer.classifier)}
    return write_page(job, named, context=context, sanity=sanity)


def _load_split(split_name: str, job: ExplainJob) -> tuple[Run, Split, Engine]:
    """Return the run of a job, the named split of its data, and the engine that predicts with its model."""
    folder = find_model(str(job.model))  # a shipped model takes precedence over a run whose name begins like it
    run = find_run_of(folder) or open_run(folder)
    stage = run.config().finetune
    bundle = load_data(stage.data, image_size=stage.native_size, balance=stage.balance)
    split = getattr(bundle, split_name)
    if not isinstance(split, Split):
        raise UserError(f"{run.path}: its data has no {split_name} split in memory.")
    engine = load_engine(run.path)
    if tuple(bundle.labels) != engine.labels:
        raise UserError(f"{run.path}: its data has the labels {bundle.labels}, its model {engine.labels}.")
    return run, split, engine


def _average(split: Split, explainer: Explainer, per_class: int) -> tuple[list[AverageMaps], list[Explained]]:
    """Return the average maps of each label that has faces, and one explained face of each such label."""
    labels = explainer.classifier.labels
    drawn = {
        target: draw_subset(split.take(rows), per_class, seed=0)
        for target in range(len(labels))
        if len(rows := np.flatnonzero(split.targets == target))
    }
    total = sum(len(some) for some in drawn.values())
    listener, done = ConsoleListener(), 0
    averages, examples = [], []
    try:
        for target, some in drawn.items():
            average = MapAverage(labels[target])
            for row, image in enumerate(some.images):
                explanation = explainer.explain(image, target)
                average.add(image, explanation)
                if row == 0:
                    examples.append(Explained(labels[target], str(some.ids[row]), None, None, image, explanation))
                done += 1
                listener.report_progress("faces", done, total)
            averages.append(average.finish())
    finally:
        listener.close()
    return averages, examples
