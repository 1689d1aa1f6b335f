"""The `dlfer show` command: show an experiment in full, the runs, one run, models, backbones, sources or keys."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlfer.cli.options import (
    Force,
    Json,
    Overrides,
    Runs,
    complete_experiments,
    complete_shown,
    find_file,
    parse_overrides,
    print_result,
    say,
)
from dlfer.errors import UserError

if TYPE_CHECKING:
    from dlfer.runs.metrics_record import CountedEstimate, SplitMetrics
    from dlfer.runs.records import ArtifactRecord, SpeedRecord

Rows = list[dict[str, Any]]


def show(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="config | runs | RUN | models | backbones | sources | schema",
            autocompletion=complete_shown,
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="With config: the experiment file.",
            show_default=False,
            autocompletion=complete_experiments,
        ),
    ] = None,
    overrides: Overrides = None,
    runs: Runs = None,
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="With runs: sort by started, name, status or accuracy.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="WORD",
            help="With runs: only those with WORD in their name, status or protocol; status=WORD compares one of "
            "these only. Repeatable.",
        ),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="With models: measure here how long each takes for a face.")
    ] = False,
    json_out: Json = None,
    force: Force = False,
) -> None:
    """Show an experiment with all defaults, the runs, one run, or the models, backbones, sources and the schema of all keys."""
    from dlfer.runs.files import check_outputs
    from dlfer.runs.find import default_runs_folder

    if file is not None and what != "config":
        raise UserError(
            f"dlfer show {what} {file}: only config takes a file. A run is shown by dlfer show {shlex.quote(str(file))}."
        )
    if overrides and what != "config":
        raise UserError(f"dlfer show {what}: --set goes with config FILE only.")
    if what != "runs" and (sort or filters):
        raise UserError(f"dlfer show {what}: --sort and --filter go with runs only.")
    if what != "models" and time:
        raise UserError(f"dlfer show {what}: --time goes with models only.")
    check_outputs({"--json": find_file(json_out)}, [file], force=force)
    if what == "runs" and runs is not None and not runs.is_dir():
        raise UserError(f"--runs {runs}: there is no such folder; expected one with runs, as saved_models/runs is.")
    folder = runs or default_runs_folder()
    lists = {
        "models": partial(list_model_rows, time=time),
        "backbones": list_backbone_rows,
        "sources": list_source_rows,
    }
    if what == "config":
        _print_config(file, overrides, json_out)
    elif what == "schema":
        _print_schema(json_out)
    elif what == "runs":
        rows = sort_runs(filter_runs(list_run_rows(folder), filters or ()), sort or "started")
        none = f"no runs in {folder} {'match the filter' if filters else 'yet'}"
        _print_rows(rows, none, json_out)
    elif what in lists:
        _print_rows(lists[what](), f"no {what} yet", json_out)
    else:
        from dlfer.report.terminal import format_values
        from dlfer.runs.records import to_json

        run = describe_run(what, folder)
        print_result(format_values(_name_accuracies(run)), to_json(run), json_out)


def _print_config(file: Path | None, overrides: list[str] | None, json_out: Path | None) -> None:
    from dlfer.config.load import dump_experiment, load_experiment

    if file is None:
        raise UserError(
            "dlfer show config: name the experiment file, e.g. dlfer show config experiments/quickstart.yaml."
        )
    config = load_experiment(file, parse_overrides(overrides))
    print_result(dump_experiment(config).rstrip("\n"), config.model_dump(mode="json"), json_out)


def _print_schema(json_out: Path | None) -> None:
    from dlfer.config.keys import build_schema, format_keys

    print_result(format_keys(), build_schema(), json_out)


def _print_rows(rows: Rows, none: str, json_out: Path | None) -> None:
    from dlfer.report.terminal import format_rows
    from dlfer.runs.records import INT8_FILES, to_json

    if not rows and json_out is None:
        say(none)
    else:
        print_result(format_rows(rows), to_json(rows), json_out)
    if any(row.get("weights") == "int8" for row in rows):
        say(INT8_FILES)


def list_run_rows(folder: Path) -> Rows:
    """Return a row for each run of a folder, oldest first, with its accuracy, the split, and the 95 % interval."""
    from dlfer.runs.find import list_runs

    return [
        {
            "run": summary.name,
            "kind": summary.kind,
            "status": summary.status,
            "protocol": summary.protocol,
            "split": summary.split,
            "n": None if summary.accuracy is None else summary.accuracy.n,
            "accuracy": summary.accuracy,
            "started": summary.started,
            "error": summary.error,
        }
        for summary in list_runs(folder)
    ]


_FILTERED = {"name": "run", "status": "status", "protocol": "protocol", "kind": "kind"}
_ORDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "started": lambda row: row["started"],
    "name": lambda row: row["run"],
    "status": lambda row: row["status"],
    "accuracy": lambda row: 1.0 if row["accuracy"] is None else -(row["accuracy"].value or 0.0),
}
"""Column -> sort key of a row; the highest accuracy comes first, and runs without one last."""


def filter_runs(rows: Rows, filters: Sequence[str]) -> Rows:
    """Return the rows that match all filters.

    Args:
        rows: rows of `list_run_rows`.
        filters: words to find in name, status, protocol or kind, or KEY=WORD for only one of them; case is ignored.

    Raises:
        UserError: a KEY is none of these.
    """
    for text in filters:
        key, is_named, word = text.rpartition("=")
        if is_named and key not in _FILTERED:
            raise UserError(f"--filter {text}: expected a word, or KEY=WORD with a KEY of {', '.join(_FILTERED)}.")
        columns = [_FILTERED[key]] if is_named else list(_FILTERED.values())
        rows = [row for row in rows if any(word.casefold() in str(row[column] or "").casefold() for column in columns)]
    return rows


def sort_runs(rows: Rows, column: str) -> Rows:
    """Return the rows sorted by started, name, status or accuracy (the highest first, runs without one last).

    Raises:
        UserError: the column is none of these.
    """
    if column not in _ORDERS:
        raise UserError(f"--sort {column}: expected one of {', '.join(_ORDERS)}.")
    return sorted(rows, key=_ORDERS[column])


def describe_run(name: str, folder: Path) -> dict[str, Any]:
    """Return the contents of a run's run.json, its path, and its accuracy on each evaluated split.

    The accuracies have the keys "test_accuracy", "validation_accuracy" and so on, with their interval and n.

    Raises:
        ModelError: no run matches the name, or several do.
    """
    from dlfer.runs.find import open_run
    from dlfer.runs.run_records import read_metrics

    run = open_run(name, folder)
    values = {"path": str(run.path), **run.record.as_json(), "status": run.status}
    metrics = read_metrics(run.path)
    for split in ("test", "test_without_duplicates", "validation", "validation_without_duplicates", "train"):
        accuracy = _get_accuracy(None if metrics is None else metrics.get(split))
        if accuracy is not None:
            values[f"{split}_accuracy"] = accuracy
    return values


def _name_accuracies(values: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `describe_run` with the number of images added to the keys of the accuracies."""
    from dlfer.runs.metrics_record import CountedEstimate

    return {
        f"{key.replace('_', ' ')} (n = {value.n:,})" if isinstance(value, CountedEstimate) else key: value
        for key, value in values.items()
    }


def list_model_rows(*, time: bool = False) -> Rows:
    """Return a row for each model that can be named, with facts from its artifact.json, its accuracies and its speed.

    At most one is the default, which is used if no model is named. A damaged model is reported on stderr and left out.
    `megabytes` is the size of the ONNX file, or of all files of a model without one. `milliseconds` per face were
    measured when the model was shipped, on the machine in `measured_on`; with `time`, here and now. The accuracies are
    those of the trained model in float32; `lost_by_int8` is what its int8 version loses.
    """
    from dlfer.errors import DlferError, ModelError
    from dlfer.runs.find import find_default_model, list_models, read_about
    from dlfer.runs.metrics_record import Metrics
    from dlfer.runs.records import ArtifactRecord
    from dlfer.runs.run_records import read_metrics

    try:
        default = find_default_model()
    except ModelError:
        default = None
    rows = []
    for name, path in list_models().items():
        try:
            artifact, metrics = ArtifactRecord.require(path), read_metrics(path) or Metrics()
        except ModelError as error:
            say(str(error))
            continue
        try:
            speed = _measure(path) if time else artifact.about.shipped and artifact.about.shipped.speed
        except DlferError as error:
            say(str(error))
            speed = None
        rows.append(
            {
                "name": name,
                "default": path == default,
                "smoke": read_about(path, artifact).smoke,
                "family": artifact.family,
                "backbone": artifact.backbone,
                "image_size": artifact.input.image_size,
                "weights": None if artifact.onnx is None else artifact.onnx.weights.partition(",")[0],
                "megabytes": _count_megabytes(path, artifact),
                "milliseconds": round(speed.milliseconds, 2) if speed else None,
                "measured_on": f"{speed.engine}, batches of {speed.batch_size}, {speed.machine}" if speed else None,
                "test": _get_accuracy(metrics.test),
                "validation": _get_accuracy(metrics.validation),
                "lost_by_int8": _describe_loss(artifact),
                "path": str(path),
            }
        )
    return rows


def _describe_loss(artifact: ArtifactRecord) -> str | None:
    """Return the accuracy that the int8 ONNX file loses against float32; None for other models."""
    found = None if artifact.onnx is None else artifact.onnx.accuracy
    if found is None:
        return None
    return f"{found.lost + 0.0:.2f} percentage points [{found.low:.2f}, {found.high:.2f}], n = {found.n:,}"


def _measure(path: Path) -> SpeedRecord:
    from dlfer.predict.engines import measure_speed

    return measure_speed(path)


def _count_megabytes(path: Path, artifact: ArtifactRecord) -> float | None:
    """Return the size of the ONNX file, else of all the model's files, in units of 10^6 bytes; None if absent."""
    files = [artifact.onnx.file] if artifact.onnx is not None else list(artifact.sha256)
    try:
        return round(sum((path / file).stat().st_size for file in files) / 1e6, 1)
    except OSError:
        return None


def _get_accuracy(split: SplitMetrics | None) -> CountedEstimate | None:
    """Return the accuracy of a split with its interval and n, or None for a split without metrics."""
    from dlfer.runs.metrics_record import CountedEstimate

    return None if split is None else CountedEstimate.build({**split.accuracy.as_json(), "n": split.n})


def list_backbone_rows() -> Rows:
    """Return the table of backbones."""
    from dlfer.model.backbones import BACKBONES

    return [
        {
            "backbone": spec.name,
            "image_size": spec.image_size,
            "parameters": spec.num_parameters_without_top,
            "min_image_size": spec.min_image_size,
            "feature_levels": len(spec.stages),
            "weights": ", ".join(spec.weights) or None,
            "note": spec.note,
        }
        for spec in BACKBONES.values()
    ]


def list_source_rows() -> Rows:
    """Return the table of data sources."""
    from dlfer.data.sources import SOURCES

    return [{"source": name, "summary": spec.summary, "needs": spec.needs} for name, spec in SOURCES.items()]
