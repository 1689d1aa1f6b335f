"""Verbs that show what there is: show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dlfer.cli.options import Json, Out, Overrides, parse_overrides, say
from dlfer.errors import UserError


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
    from dlfer.runs.find import default_runs_folder
    from dlfer.verbs import show as tables

    if file is not None and what != "config":
        raise UserError(f"dlfer show {what} {file}: only config takes a file.")
    if overrides and what != "config":
        raise UserError(f"dlfer show {what}: --set goes with config FILE only.")
    folder = out or default_runs_folder()
    lists = {
        "models": tables.list_model_rows,
        "backbones": tables.list_backbone_rows,
        "sources": tables.list_source_rows,
    }
    if what == "config":
        _print_config(file, overrides, as_json=as_json)
    elif what == "schema":
        _print_schema(as_json=as_json)
    elif what == "runs":
        _print_rows(tables.list_run_rows(folder), f"no runs in {folder} yet", as_json=as_json)
    elif what in lists:
        _print_rows(lists[what](), f"no {what} yet", as_json=as_json)
    else:
        run = tables.describe_run(what, folder)
        print(json.dumps(run, indent=2) if as_json else tables.format_values(run))


def _print_config(file: Path | None, overrides: list[str] | None, *, as_json: bool) -> None:
    from dlfer.config.load import dump_experiment, load_experiment

    if file is None:
        raise UserError(
            "dlfer show config: name the experiment file, e.g. dlfer show config experiments/quickstart.yaml."
        )
    config = load_experiment(file, parse_overrides(overrides))
    print(json.dumps(config.model_dump(mode="json"), indent=2) if as_json else dump_experiment(config).rstrip("\n"))


def _print_schema(*, as_json: bool) -> None:
    from dlfer.config.describe import build_schema, format_keys

    print(json.dumps(build_schema(), indent=2) if as_json else format_keys())


def _print_rows(rows: list[dict[str, Any]], none: str, *, as_json: bool) -> None:
    from dlfer.verbs.show import format_rows

    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(format_rows(rows))
    else:
        say(none)
