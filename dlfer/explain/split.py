"""Maps averaged over a part of a run's data, by label: figures, arrays and a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.sources import load_data
from dlfer.data.split import draw_subset
from dlfer.errors import UserError
from dlfer.explain.average import AverageMaps, MapAverage
from dlfer.explain.explanation import Explainer
from dlfer.explain.figures import describe_average, describe_maps, write_averages
from dlfer.explain.pictures import (
    Explained,
    ExplainJob,
    build_explainer,
    check_some,
    clean_name,
    describe_job,
    write_arrays,
    write_page,
)
from dlfer.model.artifact import load_artifact
from dlfer.model.classifier import Classifier
from dlfer.runs.evaluations import log_opening
from dlfer.runs.files import write_atomically
from dlfer.runs.find import find_run_of, open_run
from dlfer.runs.run import Run
from dlfer.train.progress import ConsoleListener


def explain_split(part: str, job: ExplainJob, *, say: Callable[[str], None]) -> Path:
    """Average the maps of a part of a run's data over the faces of each label, each about its own label.

    Writes average_<label>.png of each, averages.npz, explanations.json and index.html.

    Args:
        part: "test" or "validation"; opening a test part is logged in the run.
        job: what is asked for; its model is a run.
        say: is told what a reader has to know.

    Returns:
        The page.

    Raises:
        UserError, ModelError: the job cannot begin.
    """
    run, split, classifier = _load_part(part, job)
    explainer = build_explainer(classifier, job, say)
    if part == "test":
        opened = log_opening(run, split.name, len(split))
        say(f"the test part is opened (number {opened}); choose nothing by what you see")
    averages, examples = _average(split, explainer, job.per_class)
    labels = classifier.labels
    sanity = check_some(explainer, examples, job)
    notes = {
        average.label: describe_maps(examples[row].explanation, average.label) for row, average in enumerate(averages)
    }
    named = []
    for average in averages:
        name = f"average_{clean_name(average.label)}"
        write_averages(job.out / f"{name}.png", average, note=notes[average.label])
        say(describe_average(average))
        named.append(name)
    arrays = {f"{a.label}/{key}": values.astype(np.float32) for a in averages for key, values in a.maps.items()}
    arrays |= {f"{a.label}/flips": a.flips.astype(np.float32) for a in averages if a.flips is not None}
    write_arrays(job.out / "averages.npz", arrays)
    of = f"{split.name} of {run.path.name}: at most {job.per_class} faces of each label, drawn by seed 0, right and wrong ones"
    reading = [
        f"{of}. The maps of each face are of its own label; Grad-CAM is divided by each face's greatest value first. "
        "Averages blur what stands elsewhere in each image, and say nothing of a single one.",
        describe_maps(examples[0].explanation, None),
    ]
    record = {
        "part": split.name,
        "averages": [
            {"label": a.label, "n": a.num_images, "correct": a.num_correct, "halves": a.halves} for a in averages
        ],
        "labels": list(labels),
    }
    write_atomically(job.out / "explanations.json", json.dumps(record | describe_job(job, sanity), indent=2) + "\n")
    context = {"title": "What the model looks at, by label", "reading": reading, "failed": []}
    return write_page(job, named, context=context, sanity=sanity)


def _load_part(part: str, job: ExplainJob) -> tuple[Run, Split, Classifier]:
    """Return a run, the part of its data, and its classifier."""
    run = find_run_of(str(job.model)) or open_run(str(job.model))
    stage = run.config().finetune
    bundle = load_data(stage.data, image_size=stage.native_size, balance=stage.balance)
    split = getattr(bundle, part)
    if not isinstance(split, Split):
        raise UserError(f"{run.path}: its data has no {part} part in memory.")
    classifier = load_artifact(run.path)
    if tuple(bundle.labels) != classifier.labels:
        raise UserError(f"{run.path}: its data has the labels {bundle.labels}, its model {classifier.labels}.")
    return run, split, classifier


def _average(split: Split, explainer: Explainer, per_class: int) -> tuple[list[AverageMaps], list[Explained]]:
    """Return the averages of each label that has faces, and one face of each."""
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
                    examples.append(Explained(labels[target], str(some.ids[row]), None, image, explanation))
                done += 1
                listener.finish_part("faces", done, total)
            averages.append(average.finish())
    finally:
        listener.close()
    return averages, examples
