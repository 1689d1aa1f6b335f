"""The work of `dlfer export`: a trained model, by its name, to several formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dlfer.data.images import compute_side
from dlfer.errors import ExportError
from dlfer.export.exporters import Origin, check_needs, export_classifier
from dlfer.export.images import find_native_size, gather_sample
from dlfer.model.artifact import load_artifact
from dlfer.model.classifier import read_artifact_record
from dlfer.report.card import CARD_FILE, compose_card
from dlfer.runs.export_record import ExportAbout, ExportRecord
from dlfer.runs.find_model import find_model, find_run_of
from dlfer.runs.records import About, ArtifactRecord
from dlfer.runs.run import Run


def export_model(
    name: str,
    formats: tuple[str, ...],
    *,
    out: Path | None = None,
    data: Path | None = None,
    size: tuple[int, int] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, tuple[Path, ExportRecord]]:
    """Export a trained model to several formats, each compared with the artifact before it is kept.

    Args:
        name: a run, an artifact folder, or a shipped model's name.
        formats: names of EXPORTERS.
        out: the folder of exports, one folder a format inside; None: exports/<name>.
        data: the images to compare on: a csv in the layout of FER2013 (PublicTest, else all rows), class folders,
            an .npz, or an experiment file (validation, else all). None takes validation of the model's own run,
            where its data is there, else faces drawn by dlfer. Test parts are never opened.
        size: (H, W) of the formats that take one size; None is that of the training images, made square.
        say: told what takes long, and what was refused.

    Returns:
        Format -> its folder and its export.json.

    Raises:
        UserError: model or data is not found or does not fit, or a package is missing.
        ExportError: one or more formats were refused; the others stand.

    Example:
        >>> export_model("saved_models/runs/lite2/RUN", ("onnx",))["onnx"][0]
        PosixPath('exports/lite2-20261121T064045Z-2c96f94e/onnx')
    """
    tell = say or (lambda text: None)
    folder = find_model(name)
    record = read_artifact_record(folder)
    classifier = load_artifact(name)
    check_needs(classifier, formats)
    run = find_run_of(folder.resolve()) if folder.resolve().name == "model" else None
    sample = gather_sample(classifier, record, run=run, data=data, say=tell)
    about = record.about
    side = compute_side(*(find_native_size(run) or sample.images.shape[1:3]), classifier.aspect)
    origin = Origin(
        card=_read_card(folder, run),
        about=_describe_artifact(record, name=_get_name(folder, about)),
        size=size or (side, side),
    )
    out = Path("exports") / _get_name(folder, about) if out is None else Path(out)
    tell(f"comparing on {len(sample.images):,} images: {sample.source}")
    done, refused = {}, []
    for number, format_name in enumerate(formats, 1):
        tell(f"{number} of {len(formats)}: {format_name}")
        try:
            done[format_name] = export_classifier(classifier, format_name, out=out, sample=sample, origin=origin)
        except ExportError as error:
            refused.append(str(error))
    if refused:
        kept = f" Kept: {', '.join(str(path) for path, _ in done.values())}." if done else ""
        raise ExportError("\n".join(refused) + kept)
    return done


def _get_name(folder: Path, about: About) -> str:
    """Return <experiment>-<run> of a run's model, else the name of the folder."""
    return "-".join(filter(None, (about.experiment, about.run))) or folder.resolve().name


def _describe_artifact(record: ArtifactRecord, *, name: str) -> ExportAbout:
    return ExportAbout(
        model=name,
        family=record.family,
        backbone=record.model.get("backbone"),
        artifact_sha256=record.sha256,
        trained=record.about,
    )


def _read_card(folder: Path, run: Run | None) -> str:
    """Return the card beside the artifact, else that of its run, else a line that says there is none."""
    if (folder / CARD_FILE).is_file():
        return (folder / CARD_FILE).read_text(encoding="utf-8")
    if run is not None:
        return compose_card(run.path)
    return (
        f"# Model card: {folder.resolve().name}\n\nThe artifact has no card, and its run is not there to write one: "
        "find out what it was trained on, and how good it is, before you use or pass it on. It predicts which label "
        "annotators would give to a picture of a face; it never detects what a person feels.\n"
    )
