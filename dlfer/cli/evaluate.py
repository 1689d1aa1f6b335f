"""The `dlfer evaluate` command: compute the metrics of a trained model, or of an external model file, on other data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlfer.cli.options import (
    STDOUT,
    Data,
    Force,
    Html,
    Json,
    SplitName,
    complete_models,
    find_file,
    print_result,
    print_text,
    say,
)
from dlfer.errors import UserError

if TYPE_CHECKING:
    from dlfer.metrics.predictions import Predictions
    from dlfer.runs.metrics_record import Metrics


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model's name, its folder, a run, or an external model file: .onnx, .tflite, .h5, .hdf5, .keras.",
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
        typer.Option(
            metavar="VIEWS",
            help="Test-time augmentation: mirror, ten_crop or both (mirror,ten_crop), each in its own row.",
        ),
    ] = None,
    headline: Annotated[
        str | None,
        typer.Option(metavar="VIEW", help="Use the accuracy with this view, one of --views, as the headline."),
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
        typer.Option(
            metavar="A,B,...|FILE",
            help="External model: its labels in the order of its outputs, or a .txt or .json that lists them.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="External model: its outputs are softmax (default), logits or sigmoid."),
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="External model: outputs to ignore, e.g. contempt.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="External model: also report the calibration of its logits divided by T."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN|OUT.npz", help="Compare with a run or with predictions on the same images."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="OUT.npz", help="Write the predictions, for --against and dlfer compare."),
    ] = None,
    force: Force = False,
) -> None:
    """Evaluate a trained model on other data or, for a run without --data, on its own test or validation split.

    It also evaluates an external model file: dlfer evaluate FILE.onnx --input "48x48 gray /255" --labels
    angry,disgust,fear,happy,sad,surprise,neutral --data fer2013.csv
    """
    from dlfer.metrics.predictions import write_predictions
    from dlfer.predict.external import SUFFIXES
    from dlfer.runs.files import check_outputs
    from dlfer.runs.find import find_model

    if predictions is not None and predictions.suffix != ".npz":
        raise UserError(f"--predictions {predictions}: expected a name that ends in .npz.")
    if against is not None and json_out == STDOUT:
        raise UserError(
            "dlfer evaluate --against: it prints a comparison as well, so --json needs a file for the metrics: --json FILE."
        )
    is_file = model.casefold().endswith(SUFFIXES)
    described = {"--input": input_text, "--labels": labels, "--output": output, "--ignore": ignore}
    if not is_file:
        _refuse(
            described | {"--temperature": temperature},
            f"needs an external model, a file that ends in {', '.join(SUFFIXES)}",
        )
    # Report wrong names and unwritable paths before the model is loaded.
    inputs = [model, data, attributes, labels, None if is_file else find_model(model), _find_other(against)]
    files = {"--json": find_file(json_out), "--html": html_out, "--predictions": predictions}
    check_outputs(files, inputs, force=force)
    _check_data(data, split)
    from dlfer.experiment.extras import Extras

    asked: dict[str, Any] = {"data": data, "split": split, "say": say}
    asked["extras"] = Extras(
        corrupt=corrupt,
        views=tuple(views.split(",")) if views else (),
        headline=headline or "single",
        attributes=attributes,
    )
    if is_file:
        from dlfer.experiment.evaluate import FileModel, evaluate_file, read_labels

        names = read_labels(labels) if labels else ()
        given = FileModel(Path(model), input_text or "", names, output or "softmax", _split(ignore), temperature)
        metrics, found = evaluate_file(given, **asked)
    else:
        from dlfer.experiment.evaluate import evaluate_with_predictions

        metrics, found = evaluate_with_predictions(model, **asked)
    # Files are written first, because whoever reads stdout may have closed it.
    if predictions is not None:
        write_predictions(found, predictions)
    _show_metrics(metrics, Path(model).name if is_file else model, json_out, html_out)
    if against is not None:
        # Resolve the path, because a run may be named by "." instead of by its folder.
        _show_comparison(found, Path(model).resolve().stem, against)


def _find_other(against: str | None) -> Path | None:
    """Return the path of the run or predictions file to compare with; None if `against` is None.

    Raises:
        UserError: it does not exist, is a model without predictions, or the file holds no predictions.
    """
    from dlfer.metrics.predictions import read_predictions
    from dlfer.study.compare import find_entry

    if against is None:
        return None
    entry = find_entry(against, None)
    if entry.is_model:
        raise UserError(
            f"--against {against}: is a model without predictions, expected a run or a file of predictions, which dlfer evaluate "
            "MODEL --data DATA --predictions OUT.npz writes."
        )
    if entry.run is None:
        read_predictions(entry.path)
    return entry.path


def _show_comparison(found: Predictions, name: str, against: str) -> None:
    """Print the comparison of predictions with those of a run or of a file."""
    import tempfile

    from dlfer.metrics.predictions import write_predictions
    from dlfer.report.terminal import format_comparison
    from dlfer.study.compare import compare_runs

    with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
        file = Path(folder) / f"{name}.npz"
        write_predictions(found, file)
        print_text(format_comparison(compare_runs([against, str(file)])))


def _check_data(data: Path | None, split: str | None) -> None:
    """Raise UserError if the data is missing or not recognised, or the name of the split is unknown."""
    from dlfer.data.given import parse_split, recognise

    parse_split(split)
    if data is not None:
        recognise(data)


def _show_metrics(metrics: Metrics, name: str, json_out: Path | None, html_out: Path | None) -> None:
    from dlfer.report.terminal import format_metrics
    from dlfer.runs.records import SCHEMA

    if html_out is not None:
        from dlfer.report.html import write_metrics_page

        write_metrics_page(html_out, metrics, name)
    print_result(format_metrics(metrics), {"schema": SCHEMA, **metrics.as_json()}, json_out)
    if html_out is not None:
        say(f"written: {html_out}")


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise UserError if an option is given that does not apply to the model."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"dlfer evaluate: {', '.join(given)} {why}.")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()
