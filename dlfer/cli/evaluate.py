"""`dlfer evaluate`: the metrics of a trained model, or of an external model file, on other data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlfer.cli.options import Force, print_text, say
from dlfer.errors import UserError

if TYPE_CHECKING:
    from dlfer.metrics.predictions import Predictions
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
        typer.Option(
            metavar="A,B,...|FILE",
            help="External model: its labels in the order of its outputs, or a .txt or .json that lists them.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="softmax|logits|sigmoid", help="External model: kind of its outputs (default: softmax)."),
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
    if predictions is not None and predictions.suffix != ".npz":
        raise UserError(f"--predictions {predictions}: expected a name that ends in .npz.")
    is_file = model.endswith(SUFFIXES)
    described = {"--input": input_text, "--labels": labels, "--output": output, "--ignore": ignore}
    if not is_file:
        _refuse(
            described | {"--temperature": temperature},
            f"goes with an external model, a file that ends in {', '.join(SUFFIXES)}",
        )
    # A wrong name and a place that cannot be written are told before TensorFlow is loaded.
    inputs = [model, csv, data, attributes, labels, None if is_file else find_model(model), _find_other(against)]
    check_outputs({"--json": json_out, "--predictions": predictions}, inputs, force=force)
    from dlfer.experiment.extras import Extras

    asked: dict[str, Any] = {"csv": csv, "usage": usage, "data": data, "say": say}
    asked["extras"] = Extras(
        corrupt=corrupt,
        views=tuple(views.split(",")) if views else (),
        headline=headline or "single",
        attributes=attributes,
    )
    if is_file:
        from dlfer.experiment.evaluate_file import FileModel, evaluate_file, read_labels

        names = read_labels(labels) if labels else ()
        given = FileModel(Path(model), input_text or "", names, output or "softmax", _split(ignore), temperature)
        metrics, found = evaluate_file(given, **asked)
    else:
        from dlfer.experiment.evaluate import evaluate_with_predictions

        metrics, found = evaluate_with_predictions(model, **asked)
    print_text(format_metrics(metrics))
    _write_json(metrics, json_out)
    _keep_predictions(found, Path(model).stem, predictions, against)


def _find_other(against: str | None) -> Path | None:
    """Return the run or the file of predictions to compare with.

    Raises:
        UserError: it is not there, or the file does not hold predictions.
    """
    from dlfer.metrics.predictions import read_predictions
    from dlfer.study.compare import find_entry

    if against is None:
        return None
    entry = find_entry(against, None)
    if entry.run is None:
        read_predictions(entry.path)
    return entry.path


def _keep_predictions(found: Predictions, name: str, path: Path | None, against: str | None) -> None:
    """Write the predictions where they were asked for, and print how they compare with other ones."""
    import tempfile

    from dlfer.metrics.predictions import write_predictions
    from dlfer.report.terminal import format_comparison
    from dlfer.study.compare import compare_runs

    if path is not None:
        write_predictions(found, path)
    if against is not None:
        with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
            file = Path(folder) / f"{name}.npz"
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
