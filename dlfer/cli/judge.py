"""Verbs that judge data, models and runs: evaluate, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import Out, say
from dlfer.errors import UserError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model's name, its folder, or a run.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A csv in the layout of FER2013.")] = None,
    usage: Annotated[str | None, typer.Option(metavar="NAME", help="With --csv: its Usage, e.g. PrivateTest.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Class folders, an .npz, or an experiment file.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the figures there too.")] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="Also on noisy, blurred, dark... images; slow.")] = False,
    views: Annotated[
        str | None, typer.Option(metavar="mirror,ten_crop", help="Test-time augmentation, each a row of its own.")
    ] = None,
    headline: Annotated[
        str | None, typer.Option(metavar="VIEW", help="Make the accuracy of this one of --views the headline.")
    ] = None,
    attributes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A csv id,attribute,...: accuracy and recall by group.")
    ] = None,
) -> None:
    """Judge a trained model on other data; a run without any, on its own test or validation part."""
    from dlfer.catalog import find_model
    from dlfer.verbs.show import format_metrics

    if csv is not None and data is not None:
        raise UserError("dlfer evaluate: found both --csv and --data, expected one of them.")
    if usage is not None and csv is None:
        raise UserError("dlfer evaluate: --usage goes with --csv FILE.")
    find_model(model)  # a wrong name is told before TensorFlow is loaded
    from dlfer.judge.again import evaluate_model
    from dlfer.judge.extras import Extras

    asked = Extras(
        corrupt=corrupt,
        views=tuple(views.split(",")) if views else (),
        headline=headline or "single",
        attributes=attributes,
    )
    print(
        format_metrics(evaluate_model(model, csv=csv, usage=usage, data=data, json_out=json_out, extras=asked, say=say))
    )


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Runs, or files of predictions (.npz).", show_default=False),
    ],
    part: Annotated[
        str | None, typer.Option(metavar="test|validation", help="Which part; test if all have it, else validation.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result there too.")] = None,
    out: Out = None,
) -> None:
    """Compare finished runs on the same images: paired differences, and which of them are significant."""
    import json

    from dlfer.files.atomic import write_atomically
    from dlfer.verbs.compare import compare_runs
    from dlfer.verbs.show import format_comparison

    comparison = compare_runs(runs, part=part, folder=out)
    if json_out is not None:
        write_atomically(json_out, json.dumps(comparison, indent=2) + "\n")
    print(format_comparison(comparison))


def audit(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (YAML) or arrays (.npz).", show_default=False)
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A csv in the layout of FER2013.")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Class folders, or train/validation/test with them.")
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="FER+ votes: fer2013new.csv, or a csv of votes.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the audit.")] = None,
    html_out: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page with the images that it is about.")
    ] = None,
    groups_out: Annotated[
        Path | None,
        typer.Option("--write-groups", metavar="OUT", help="Write the group of duplicates of each image (csv)."),
    ] = None,
    split_out: Annotated[
        Path | None,
        typer.Option("--write-split", metavar="OUT", help="Write a split that keeps duplicates together (csv)."),
    ] = None,
) -> None:
    """Audit data: duplicates and leaks, contradicting labels, empty images, outliers, votes of annotators."""
    if sum(given is not None for given in (file, csv, folder)) != 1:
        raise UserError("dlfer audit: give one of FILE, --csv FILE and --folder DIR.")
    from dlfer.report.audit import describe_audit
    from dlfer.verbs.audit import AuditFiles, inspect_data

    files = AuditFiles(json_out, html_out, groups_out, split_out)
    found = inspect_data(file, csv=csv, folder=folder, votes=votes, files=files)
    for line in [*describe_audit(found), *found["notes"]]:
        print(line)
    for path in (json_out, html_out, groups_out, split_out):
        if path is not None:
            say(f"written: {path}")


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, or beginnings of their names.")],
    out: Out = None,
) -> None:
    """Write the report of runs again, from the files in them, and the card of a run that has a model."""
    from dlfer.catalog import ARTIFACT_FILE
    from dlfer.report.card import write_card
    from dlfer.report.comparison import write_comparison_report
    from dlfer.report.html import write_report
    from dlfer.report.search import write_search_report
    from dlfer.runs.find import open_run

    writers = {"run": write_report, "search": write_search_report}
    for opened in [open_run(name, out) for name in runs]:
        print(writers.get(opened.kind, write_comparison_report)(opened.path))
        if (opened.path / "model" / ARTIFACT_FILE).is_file():
            write_card(opened.path)
