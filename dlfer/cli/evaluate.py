"""`dlfer evaluate`: the metrics of a trained model, or of an external model file, on other data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlfer.cli.options import Force, print_text, say
from dlfer.errors import UserError

if TYPE_CHECKING:
    from dlfer.experiment.evaluate_file import FileModel
    from dlfer.runs.metrics_record import Metrics


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model's name, its folder, a run, or an external model file: .onnx, .tflite, .h5, .keras.",
        ),
    ],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A csv in the layout of FER2013.")] = None,
    usage: Annotated[str | None, typer.Option(metavar="NAME", help="With --csv: its Usage, e.g. PrivateTest.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Class folders, an .npz, or an experiment file.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the metrics to this file.")
    ] = None,
    corrupt: Annotated[
        bool, typer.Option("--corrupt", help="Also evaluate on noisy, blurred, dark and other corrupted images; slow.")
    ] = False,
    views: Annotated[
        str | None, typer.Option(metavar="mirror,ten_crop", help="Test-time augmentation, each in a row of its own.")
    ] = None,
    headline: Annotated[
        str | None, typer.Option(metavar="VIEW", help="Report the accuracy with this one of --views as the headline.")
    ] = None,
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A csv with id,attribute,...: also report accuracy and recall by group."),
    ] = None,
    input_text: Annotated[
        str | None,
        typer.Option("--input", metavar="WORDS", help='External model: its input, e.g. "48x48 gray /255".'),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="External model: its labels in the order of its outputs."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="softmax|logits|sigmoid", help="External model: kind of its outputs (default: softmax)."),
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="External model: outputs to ignore, e.g. contempt.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="External model: compare it with a run on the same images.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="OUT.npz", help="External model: write its predictions, for dlfer compare."),
    ] = None,
    force: Force = False,
) -> None:
    """Evaluate a trained model on other data or, for a run without --csv and --data, on its own test or validation split.

    It also evaluates an external model file: dlfer evaluate FILE.onnx --input "48x48 gray /255" --labels
    angry,disgust,fear,happy,sad,surprise,neutral --csv fer2013.csv
    """
    from dlfer.predict.foreign import SUFFIXES
    from dlfer.report.terminal import format_metrics
    from dlfer.runs.find import find_model
    from dlfer.runs.outputs import check_outputs

    if csv is not None and data is not None:
        raise UserError("dlfer evaluate: found both --csv and --data, expected one of them.")
    if usage is not None and csv is None:
        raise UserError("dlfer evaluate: --usage goes with --csv FILE.")
    described = {"--input": input_text, "--labels": labels, "--output": output, "--ignore": ignore}
    kept = {"--against": against, "--predictions": predictions}
    if model.endswith(SUFFIXES):
        of_ours = {"--corrupt": corrupt or None, "--views": views, "--headline": headline, "--attributes": attributes}
        _refuse(of_ours, "goes with a model of dlfer, not with an external model file")
        from dlfer.experiment.evaluate_file import FileModel

        given = FileModel(Path(model), input_text or "", _split(labels), output or "softmax", _split(ignore))
        _evaluate_file(given, {"csv": csv, "usage": usage, "data": data}, against, predictions, json_out, force=force)
        return
    _refuse(described | kept, f"goes with an external model, a file that ends in {', '.join(SUFFIXES)}")
    # A wrong name and a place that cannot be written are told before TensorFlow is loaded.
    check_outputs({"--json": json_out}, [find_model(model), model, csv, data, attributes], force=force)
    from dlfer.experiment.evaluate import evaluate_model
    from dlfer.experiment.extras import Extras

    asked = Extras(
        corrupt=corrupt,
        views=tuple(views.split(",")) if views else (),
        headline=headline or "single",
        attributes=attributes,
    )
    metrics = evaluate_model(model, csv=csv, usage=usage, data=data, extras=asked, say=say)
    print_text(format_metrics(metrics))
    _write_json(metrics, json_out)


def _evaluate_file(
    model: FileModel,
    source: dict[str, Any],
    against: str | None,
    predictions: Path | None,
    json_out: Path | None,
    *,
    force: bool,
) -> None:
    """Evaluate an external model, print its metrics, and what a run differs in, where one is named."""
    import tempfile

    from dlfer.experiment.evaluate_file import evaluate_file
    from dlfer.metrics.predictions import write_predictions
    from dlfer.report.terminal import format_comparison, format_metrics
    from dlfer.runs.outputs import check_outputs
    from dlfer.study.compare import compare_runs, find_entry

    if predictions is not None and predictions.suffix != ".npz":
        raise UserError(f"--predictions {predictions}: expected a name that ends in .npz.")
    entry = None if against is None else find_entry(against, None)
    inputs = [model.path, source["csv"], source["data"], None if entry is None else entry.path]
    check_outputs({"--json": json_out, "--predictions": predictions}, inputs, force=force)
    metrics, found = evaluate_file(model, **source, say=say)
    print_text(format_metrics(metrics))
    _write_json(metrics, json_out)
    if predictions is not None:
        write_predictions(found, predictions)
    if against is not None:
        with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
            file = Path(folder) / f"{model.path.stem}.npz"
            write_predictions(found, file)
            print_text(format_comparison(compare_runs([against, str(file)])))


def _write_json(metrics: Metrics, path: Path | None) -> None:
    import json

    from dlfer.runs.files import write_atomically
    from dlfer.runs.records import SCHEMA

    if path is not None:
        write_atomically(path, json.dumps({"schema": SCHEMA, **metrics.as_json()}, indent=2) + "\n")


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise UserError where an option was given that does not go with the model."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"dlfer evaluate: {', '.join(given)} {why}.")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()
