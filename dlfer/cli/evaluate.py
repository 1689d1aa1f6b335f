"""`dlfer evaluate`: the metrics of a trained model, or of an external model file, on other data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dlfer.cli.completion import complete_models
from dlfer.cli.options import STDOUT, Data, Force, Html, Json, SplitName, find_file, print_result, print_text, say
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
            autocompletion=complete_models,
        ),
    ],
    data: Data = None,
    split: SplitName = None,
    json_out: Json = None,
    html_out: Html = None,
    corrupt: Annotated[
        bool, typer.Option("--corrupt", help="Also evaluate on noisy, blurred, dark and other corrupted images; slow.")
    ] = False,
    views: Annotated[
        str | None,
        typer.Option(metavar="VIEWS", help="Test-time augmentation, mirror,ten_crop: each in a row of its own."),
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
        typer.Option(metavar="KIND", help="External model: its outputs are softmax (default), logits or sigmoid."),
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="External model: outputs to ignore, e.g. contempt.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="External model: compare it with a run on the same images.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="External model: write its predictions (.npz), for dlfer compare."),
    ] = None,
    force: Force = False,
) -> None:
    """Evaluate a trained model on other data or, for a run without --data, on its own test or validation split.

    It also evaluates an external model file: dlfer evaluate FILE.onnx --input "48x48 gray /255" --labels
    angry,disgust,fear,happy,sad,surprise,neutral --data fer2013.csv
    """
    from dlfer.predict.foreign import SUFFIXES
    from dlfer.runs.find import find_model
    from dlfer.runs.outputs import check_outputs

    described = {"--input": input_text, "--labels": labels, "--output": output, "--ignore": ignore}
    kept = {"--against": against, "--predictions": predictions}
    if model.endswith(SUFFIXES):
        of_ours = {"--corrupt": corrupt or None, "--views": views, "--headline": headline, "--attributes": attributes}
        _refuse(of_ours, "goes with a model of dlfer, not with an external model file")
        from dlfer.experiment.evaluate_file import FileModel

        given = FileModel(Path(model), input_text or "", _split(labels), output or "softmax", _split(ignore))
        outputs = Outputs(json_out, html_out, predictions, force)
        _evaluate_file(given, {"data": data, "split": split}, against, outputs)
        return
    _refuse(described | kept, f"goes with an external model, a file that ends in {', '.join(SUFFIXES)}")
    # A wrong name and a place that cannot be written are told before TensorFlow is loaded.
    outputs = {"--json": find_file(json_out), "--html": html_out}
    check_outputs(outputs, [find_model(model), model, data, attributes], force=force)
    _check_data(data, split)
    from dlfer.experiment.evaluate import evaluate_model
    from dlfer.experiment.extras import Extras

    asked = Extras(
        corrupt=corrupt,
        views=tuple(views.split(",")) if views else (),
        headline=headline or "single",
        attributes=attributes,
    )
    metrics = evaluate_model(model, data=data, split=split, extras=asked, say=say)
    _show_metrics(metrics, model, json_out, html_out)


class Outputs(NamedTuple):
    """What an evaluation writes; None: not that file. `force` replaces files that are there."""

    json: Path | None
    html: Path | None
    predictions: Path | None
    force: bool


def _evaluate_file(model: FileModel, source: dict[str, Any], against: str | None, outputs: Outputs) -> None:
    """Evaluate an external model, print its metrics, and what a run differs in, where one is named."""
    import tempfile

    from dlfer.experiment.evaluate_file import evaluate_file
    from dlfer.metrics.predictions import write_predictions
    from dlfer.report.terminal import format_comparison
    from dlfer.runs.outputs import check_outputs
    from dlfer.study.compare import compare_runs, find_entry

    predictions = outputs.predictions
    if predictions is not None and predictions.suffix != ".npz":
        raise UserError(f"--predictions {predictions}: expected a name that ends in .npz.")
    if against is not None and outputs.json == STDOUT:
        raise UserError("dlfer evaluate --against: prints a comparison, too; name a file for the metrics: --json FILE.")
    entry = None if against is None else find_entry(against, None)
    inputs = [model.path, source["data"], None if entry is None else entry.path]
    files = {"--json": find_file(outputs.json), "--html": outputs.html, "--predictions": predictions}
    check_outputs(files, inputs, force=outputs.force)
    metrics, found = evaluate_file(model, **source, say=say)
    _show_metrics(metrics, model.path.name, outputs.json, outputs.html)
    if predictions is not None:
        write_predictions(found, predictions)
    if against is not None:
        with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
            file = Path(folder) / f"{model.path.stem}.npz"
            write_predictions(found, file)
            print_text(format_comparison(compare_runs([against, str(file)])))


def _check_data(data: Path | None, split: str | None) -> None:
    """Raise UserError for data that is not there or is none, and for a split of another name."""
    from dlfer.data.given import parse_split, recognise

    parse_split(split)
    if data is not None:
        recognise(data)


def _show_metrics(metrics: Metrics, name: str, json_out: Path | None, html_out: Path | None) -> None:
    from dlfer.report.terminal import format_metrics
    from dlfer.runs.records import SCHEMA

    print_result(format_metrics(metrics), {"schema": SCHEMA, **metrics.as_json()}, json_out)
    if html_out is not None:
        from dlfer.report.html import write_metrics_page

        write_metrics_page(html_out, metrics, name)
        say(f"written: {html_out}")


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise UserError where an option was given that does not go with the model."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"dlfer evaluate: {', '.join(given)} {why}.")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()
