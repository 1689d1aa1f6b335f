"""`dlfer show`: an experiment in full, the runs, one run, or what there is to choose from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlfer.cli.options import Json, Out, Overrides, parse_overrides, print_text, say
from dlfer.errors import UserError

if TYPE_CHECKING:
    from dlfer.runs.metrics_record import CountedEstimate, SplitMetrics

Rows = list[dict[str, Any]]


def show(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="config | runs | RUN | models | backbones | sources | schema")
    ],
    file: Annotated[Path | None, typer.Argument(help="With config: the experiment file.", show_default=False)] = None,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show an experiment in full, the runs, one run, or what there is to choose from."""
    from dlfer.report.terminal import format_values
    from dlfer.runs.find import default_runs_folder

    if file is not None and what != "config":
        raise UserError(f"dlfer show {what} {file}: only config takes a file.")
    if overrides and what != "config":
        raise UserError(f"dlfer show {what}: --set goes with config FILE only.")
    folder = out or default_runs_folder()
    lists = {
        "models": list_model_rows,
        "backbones": list_backbone_rows,
        "sources": list_source_rows,
    }
    if what == "config":
        _print_config(file, overrides, as_json=as_json)
    elif what == "schema":
        _print_schema(as_json=as_json)
    elif what == "runs":
        _print_rows(list_run_rows(folder), f"no runs in {folder} yet", as_json=as_json)
    elif what in lists:
        _print_rows(lists[what](), f"no {what} yet", as_json=as_json)
    else:
        run = describe_run(what, folder)
        print_text(json.dumps(run, indent=2) if as_json else format_values(run))


def _print_config(file: Path | None, overrides: list[str] | None, *, as_json: bool) -> None:
    from dlfer.config.load import dump_experiment, load_experiment

    if file is None:
        raise UserError(
            "dlfer show config: name the experiment file, e.g. dlfer show config experiments/quickstart.yaml."
        )
    config = load_experiment(file, parse_overrides(overrides))
    print_text(
        json.dumps(config.model_dump(mode="json"), indent=2) if as_json else dump_experiment(config).rstrip("\n")
    )


def _print_schema(*, as_json: bool) -> None:
    from dlfer.config.keys import build_schema, format_keys

    print_text(json.dumps(build_schema(), indent=2) if as_json else format_keys())


def _print_rows(rows: Rows, none: str, *, as_json: bool) -> None:
    from dlfer.report.terminal import format_rows
    from dlfer.runs.records import to_json

    if as_json:
        print_text(json.dumps(to_json(rows), indent=2))
    elif rows:
        print_text(format_rows(rows))
    else:
        say(none)


def list_run_rows(folder: Path) -> Rows:
    """Return the runs of a folder, oldest first."""
    from dlfer.runs.find import list_runs

    return [
        {
            "run": summary.name,
            "kind": summary.kind,
            "status": summary.status,
            "started": summary.started,
            "error": summary.error,
        }
        for summary in list_runs(folder)
    ]


def describe_run(name: str, folder: Path) -> dict[str, Any]:
    """Return what run.json says of a run, its path, and its accuracy on each split that was judged.

    Raises:
        ModelError: no such run, or more than one.
    """
    from dlfer.report.terminal import format_estimate
    from dlfer.runs.find import open_run
    from dlfer.runs.run_records import read_metrics

    run = open_run(name, folder)
    values = {"path": str(run.path), **run.record.as_json(), "status": run.status}
    metrics = read_metrics(run.path)
    for split in ("test", "test_without_duplicates", "validation", "validation_without_duplicates", "train"):
        judged = None if metrics is None else metrics.get(split)
        if judged is not None:
            title = f"{split.replace('_', ' ')} accuracy (n = {judged.n:,})"
            values[title] = format_estimate(judged.accuracy)
    return values


def list_model_rows() -> Rows:
    """Return the models that can be named, what their artifact.json says of them, and their accuracies.

    At most one is the default: the one that is used where none is named. A damaged model is said and left out.
    """
    from dlfer.errors import ModelError
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
        rows.append(
            {
                "name": name,
                "default": path == default,
                "smoke": read_about(path, artifact).smoke,
                "family": artifact.family,
                "backbone": artifact.backbone,
                "image_size": artifact.input.image_size,
                "test": _get_accuracy(metrics.test),
                "validation": _get_accuracy(metrics.validation),
                "path": str(path),
            }
        )
    return rows


def _get_accuracy(split: SplitMetrics | None) -> CountedEstimate | None:
    """Return the accuracy of a split with its interval and n, or None where there is none."""
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
            "weights": ", ".join(spec.weights) or None,
            "note": spec.note,
        }
        for spec in BACKBONES.values()
    ]


def list_source_rows() -> Rows:
    """Return the table of data sources."""
    from dlfer.data.sources import SOURCES

    return [{"source": name, "summary": spec.summary, "needs": spec.needs} for name, spec in SOURCES.items()]
