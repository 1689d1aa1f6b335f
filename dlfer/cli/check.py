"""The `dlfer check` command: report all problems of experiment files, of data, and of running them on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlfer.cli.options import Overrides, complete_data, parse_overrides, print_text, say
from dlfer.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dlfer.data.given import GivenData


def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Experiment files, or data: folders, csv, zip, .npz.",
            show_default=False,
            autocompletion=complete_data,
        ),
    ],
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--print", help="Print each experiment in full, as YAML.")] = False,
) -> None:
    """Check experiment files or data, and report every problem in one message, without training.

    Experiments are also checked against this machine, but their images are not read. For data, every image is read.
    """
    from dlfer.config.load import compute_digest, dump_experiment, load_experiment, resolve_path
    from dlfer.experiment.limits import describe_obstacles, find_obstacles

    values = parse_overrides(overrides)
    errors = []
    for file in files:
        try:
            if not _is_experiment(file):
                say(f"ok  {check_data(file)}")
                continue
            config = load_experiment(file, values)
        except UserError as error:
            errors.append(str(error))
            continue
        data = config.finetune.data
        if data.protocol == "cross_validation" and data.fold is None:
            kind = "cross_validation"
        else:
            kind = "sweep" if config.sweep is not None else "search" if config.search is not None else "run"
        obstacles = find_obstacles(config, kind=kind)
        if obstacles:
            errors.append(describe_obstacles(file, obstacles))
        else:
            images = (
                f"; its images were not read, dlfer check {shlex.quote(str(resolve_path(data.path)))} reads them"
                if data.path is not None and data.source != "tfds"
                else ""
            )
            say(f"ok  {file}  {config.experiment.name}  {compute_digest(config)[:8]}{images}")
            for name, stage in (("pretrain", config.pretrain), ("finetune", config.finetune)):
                if stage is not None and (unused := stage.list_unused_keys()):
                    say(f"{file}: {name}: without effect: {', '.join(unused)}")
                if stage is not None and (long := stage.describe_long_warmup()):
                    say(f"{file}: {name}: {long}")
        if show:
            print_text(dump_experiment(config).rstrip("\n"))
    if errors:
        raise ConfigError("\n".join(errors))


def _is_experiment(path: Path) -> bool:
    """Return whether a path is an experiment file by its suffix or content; a missing path counts as one."""
    if path.suffix.casefold() in (".yaml", ".yml") or not path.exists():
        return True
    from dlfer.data.given import recognise

    return recognise(path) == "experiment"


def check_data(path: Path) -> str:
    """Return a summary of data: its kind and contents, what is left out, and the command to run next.

    Raises:
        DataError: it is not data, has images or rows that cannot be read, or `dlfer run` would refuse its classes.
    """
    from dlfer.data.given import open_data
    from dlfer.experiment.audit import check_inspected, load_inspected

    with open_data(path) as given:
        data = load_inspected(given)
        trains = _has_training(given, [split.name for split in data.splits])
        found, next_step = check_inspected(data, trains=trains), _name_next_step(given, trains)
    reading = data.reading.as_record()
    lines = [*(reading.describe() if reading and reading.left_out else ()), *data.notes]
    return ("\n" if lines else " ").join([f"{given.describe()}; {found}.", *lines, next_step])


def _has_training(given: GivenData, splits: list[str]) -> bool:
    """Return whether data can be trained on: all but a csv without training rows."""
    return given.csv is None or "Training" in splits or given.csv.name.casefold().startswith("train.csv")


def _name_next_step(given: GivenData, trains: bool) -> str:
    """Return the next command: unzip for a zip of pictures, evaluate for a csv without training rows, else init."""
    from dlfer.data.starter import name_unzip

    path = shlex.quote(str(given.path))
    if given.kind == "folder" and given.path.is_file():
        return f"Next: {', then: '.join(name_unzip(given.path))}"
    return f"Next: dlfer init {path}" if trains else f"Next: dlfer evaluate MODEL --data {path}"
