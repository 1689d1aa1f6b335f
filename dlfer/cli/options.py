"""Command-line options shared by several subcommands, their checks and parsing, shell completion, and output helpers.

Completion of experiment files, data, models and runs looks only at file names, never into files, because the shell
waits for each answer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dlfer.config.names import expand_home, list_places
from dlfer.errors import ConfigError, UserError
from dlfer.runs.listeners import RunOptions
from dlfer.runs.text import escape_text

_PASSWORD = re.compile(r"(://[^:/@\s]*):[^@/\s]*@")

RUNS = Path("saved_models/runs")
_DATA_SUFFIXES = (".csv", ".gz", ".npz", ".zip")


def complete_experiments(incomplete: str) -> list[str]:
    """Return the experiment files and folders that start with `incomplete`; if it is empty, also experiments/*.yaml."""
    found = _complete_paths(incomplete, (".yaml", ".yml"))
    if incomplete:
        return found
    own = sorted(str(path) for path in Path("experiments").glob("*.yaml"))
    shipped = sorted({path.name for place in list_places("experiments") for path in place.glob("*.yaml")})
    return [*found, *own, *([] if own else shipped)]


def complete_data(incomplete: str) -> list[str]:
    """Return the folders and the csv, gz, npz, zip and YAML files whose paths start with `incomplete`."""
    return _complete_paths(incomplete, (*_DATA_SUFFIXES, ".yaml", ".yml"))


def complete_models(incomplete: str) -> list[str]:
    """Return the names of models that start with `incomplete`, then those of runs."""
    names = {path.parent.name for place in _list_model_places() for path in place.glob("*/artifact.json")}
    return _begin_with(incomplete, sorted(names)) + complete_runs(incomplete)


def complete_runs(incomplete: str) -> list[str]:
    """Return the runs in saved_models/runs that start with `incomplete`, the latest first, as EXPERIMENT/RUN."""
    paths = (path.parent for path in RUNS.glob("*/*/run.json") if not path.parent.parent.name.startswith("."))
    latest = sorted(paths, key=lambda path: path.name, reverse=True)
    return _begin_with(incomplete, [str(path.relative_to(RUNS)) for path in latest])


def complete_shown(incomplete: str) -> list[str]:
    """Return the values for WHAT of `dlfer show` that start with `incomplete`."""
    words = ("config", "runs", "models", "backbones", "sources", "schema")
    return _begin_with(incomplete, words) + complete_runs(incomplete)


def _list_model_places() -> list[Path]:
    """Return the folders that hold models, like `dlfer.runs.find.list_model_places`, but possibly with duplicates."""
    return [Path("saved_models"), *list_places("saved_models")]


def _complete_paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the folders, and the files with one of the suffixes, that start with `incomplete`, without hidden ones."""
    folder, _, beginning = incomplete.rpartition("/")
    folder += "/" if "/" in incomplete else ""
    try:
        entries = sorted(expand_home(folder or ".").iterdir())
    except OSError:
        return []
    named = [path for path in entries if path.name.startswith(beginning) and not path.name.startswith(".")]
    return [
        f"{folder}{path.name}{'/' if path.is_dir() else ''}"
        for path in named
        if path.is_dir() or path.name.casefold().endswith(suffixes)
    ]


def _begin_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


OptionalFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE",
        help="Experiment file (YAML); none with --resume.",
        show_default=False,
        autocompletion=complete_experiments,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. finetune.epochs=10, pretrain=null. Repeatable."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder to write the run in, instead of saved_models/runs.")
]
Runs = Annotated[
    Path | None, typer.Option("--runs", metavar="DIR", help="Folder to look runs up in, instead of saved_models/runs.")
]
DATA = "a folder, a csv in the layout of FER2013, a zip with either, an .npz of arrays, or an experiment file"
"""The kinds of data that subcommands accept, for help texts; `dlfer.data.given` recognises them."""
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DATA", help=f"Images and labels: {DATA}.", autocompletion=complete_data),
]
SplitName = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="Split: test, validation or train; by default the first available."),
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="RUN", help="Continue an interrupted run.", autocompletion=complete_runs),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Run every phase on two small batches; needs no data.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
RequireGpu = Annotated[bool, typer.Option("--require-gpu", help="Refuse to run without a GPU.")]
MaxHours = Annotated[float | None, typer.Option("--max-hours", metavar="H", help="Stop at a checkpoint after H hours.")]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes", help="Continue although data, experiment or software changed; the report says so."
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Train EF-FER1 even if it is in the cache.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Name of a model, a run or a folder; the default model if left out.",
        autocompletion=complete_models,
    ),
]
Faces = Annotated[
    str,
    typer.Option(
        metavar="DETECTOR", help="Face detector: auto, centerface, mtcnn or opencv; whole: each picture is one face."
    ),
]
DetectorSize = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS", help="Longest side to which pictures are shrunk before detection; use 1280 for small faces."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Train N members at a time; by default one for each GPU, or one without GPUs."
    ),
]
MemberNumber = Annotated[
    str | None,
    typer.Option(metavar="K|auto", help="Job array: run member K of a shared --out; auto: the array's index."),
]
Collect = Annotated[
    bool, typer.Option("--collect", help="Job array: compare the members that have finished in a shared --out.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files, but never an input.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="[FILE]", help="The result as JSON: into FILE, or on stdout instead of the text."),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the result as a self-contained HTML page.")
]
STDOUT = Path("-")
"""The value of --json without a FILE."""


def with_run_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all training subcommands share to a function, which gets them as `resume` and `options`."""
    own = inspect.signature(verb, eval_str=True)
    taken = inspect.signature(_make_options, eval_str=True)
    positional = [p for p in own.parameters.values() if p.name not in ("resume", "options")]
    resume_option = inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Resume)
    shared = [resume_option, *taken.parameters.values()]

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        options = _make_options(**{name: values.pop(name) for name in taken.parameters})
        verb(**values, options=options)

    command.__signature__ = own.replace(
        parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*positional, *shared)]
    )
    return command


def _make_options(
    *,
    overrides: Overrides = None,
    out: Out = None,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    require_gpu: RequireGpu = False,
    max_hours: MaxHours = None,
    no_cache: NoCache = False,
    accept_changes: AcceptChanges = False,
) -> RunOptions:
    if max_hours is not None and not max_hours > 0:
        raise UserError(f"--max-hours {max_hours}: expected more than 0.")
    return RunOptions(
        overrides=parse_overrides(overrides),
        out=out,
        smoke=smoke,
        dry_run=dry_run,
        require_gpu=require_gpu,
        max_hours=max_hours,
        use_cache=not no_cache,
        accept_changes=accept_changes,
        # Mask passwords in URLs of storages, because every run records its command line.
        argv=("dlfer", *(_PASSWORD.sub(r"\1:***@", word) for word in sys.argv[1:])),
    )


def parse_overrides(texts: list[str] | None) -> dict[str, Any]:
    from dlfer.config.load import parse_override

    given: dict[str, Any] = {}
    for key, value in map(parse_override, texts or ()):
        if key in given:
            raise UserError(f"--set {key}: given twice ({given[key]} and {value}); leave one of them out.")
        given[key] = value
    return given


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: expected different whole numbers from 0, separated by commas, e.g. 0,1,2.")
    return seeds


KINDS = {
    "run": "run",
    "ablate": "ablation",
    "sweep": "sweep",
    "crossval": "cross_validation",
    "search": "search",
}
"""Subcommand -> the kind of run that it creates."""


def check_start(
    verb: str, file: Path | None, resume: str | None, options: RunOptions, *, shared: bool = False
) -> Path | None:
    """Check what can be checked before TensorFlow is loaded; return the folder of the run to continue, if any.

    Args:
        verb: name of the subcommand.
        file: experiment file; None with `resume`.
        resume: run to continue; None with `file`.
        options: options of the command line.
        shared: whether the command may continue earlier work even without `resume`, so that --accept-changes applies.
    """
    from dlfer.config.load import load_experiment
    from dlfer.experiment.limits import refuse_obstacles
    from dlfer.runs.changes import accept_or_refuse_changes, find_changes
    from dlfer.runs.find import open_run
    from dlfer.train.progress import check_alone

    if verb != "run":
        check_alone(verb)
    if (file is None) == (resume is None):
        raise UserError(f"dlfer {verb}: give either an experiment FILE or --resume RUN.")
    if resume is None:
        if options.accept_changes and not shared:
            raise UserError(
                f"dlfer {verb} --accept-changes: only continues a run that has begun; add --resume RUN, or leave it out."
            )
        config = load_experiment(file, options.overrides)
        refuse_obstacles(config, file, kind=KINDS[verb], smoke=options.smoke, out=options.out)
        return None
    given = {"--set": options.overrides, "--smoke": options.smoke, "--dry-run": options.dry_run}
    for option in [name for name, value in given.items() if value]:
        raise UserError(
            f"dlfer {verb} --resume: a run continues with its own settings; leave {option} out, or start a new one."
        )
    found = open_run(resume, options.out)
    own_verb = {kind: name for name, kind in KINDS.items()}[found.kind]
    if own_verb != verb:
        raise UserError(
            f"{found.path}: this is of the kind {found.kind}; continue it with: dlfer {own_verb} --resume {shlex.quote(str(found.path))}"
        )
    if found.status != "finished" and not options.accept_changes:
        accept_or_refuse_changes(found, find_changes(found), accept=False)
    return found.path


def check_double(verb: str, option: str, keys: Iterable[str], options: RunOptions) -> None:
    """Raise UserError if --set gives a key, itself or in its section, that another option also sets."""
    from dlfer.config.load import find_override

    for key in keys:
        dotted = find_override(options.overrides, key)
        if dotted is not None:
            raise UserError(
                f"dlfer {verb}: found both {option} and --set {dotted}={options.overrides[dotted]}, which give {key}; leave one "
                "of them out."
            )


@contextlib.contextmanager
def name_option(option: str, keys: Iterable[str]) -> Iterator[None]:
    """In a ConfigError raised in the context, replace `--set KEY` by the option that was given instead and sets KEY."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for key in keys:
            text = re.sub(rf"--set {re.escape(key)}(?![\w.])", lambda match: option, text)
        if text == str(error):
            raise
        raise type(error)(text) from None


def check_array(
    verb: str, member: str | None, *, resume: str | None, collect: bool, workers: int | None, options: RunOptions
) -> bool:
    """Check --member and --collect; return whether one of them is given."""
    given = "--member" if member is not None else "--collect"
    if member is None and not collect:
        return False
    if member is not None and collect:
        raise UserError(f"dlfer {verb}: found both --member and --collect; collect when the members are done.")
    if resume is not None:
        raise UserError(
            f"dlfer {verb} {given}: expected the experiment FILE and --out, found --resume; leave that out."
        )
    idle = ["--workers"] if workers is not None else []
    idle += ["--max-hours"] if collect and options.max_hours is not None else []
    if idle:
        does = "trains nothing" if collect else "trains one member"
        raise UserError(f"dlfer {verb} {given}: found {' and '.join(idle)}, but {given} {does}; leave that out.")
    if options.out is None:
        raise UserError(
            f"dlfer {verb} {given}: expected --out DIR, a folder of runs that all tasks of the array share."
        )
    return True


def print_done(path: Path | None) -> None:
    """Print the paths of a run's folder and of its report; print nothing for None, a dry run."""
    if path is not None:
        print_text(path)
        print_text(path / "report.html")


def print_result(text: str, values: Any, json_out: Path | None) -> None:
    """Print a result, and write it as JSON if --json names a file; for --json without a file, print the JSON instead.

    Args:
        text: result as text.
        values: result in a form that `json.dumps` accepts.
        json_out: value of --json.
    """
    if json_out is None:
        print_text(text)
        return
    import json

    from dlfer.runs.files import write_atomically

    encoded = json.dumps(values, indent=2)
    if json_out == STDOUT:
        print_text(encoded)
        return
    write_atomically(json_out, encoded + "\n")  # first: whoever reads stdout may have closed it
    print_text(text)


def find_file(json_out: Path | None) -> Path | None:
    """Return the file that --json names; None for standard output or without --json."""
    return None if json_out == STDOUT else json_out


def print_text(text: object) -> None:
    """Print results on stdout with control characters escaped, because a name in them could manipulate the terminal."""
    print(escape_text(str(text), keep="\n\t"))


def say(text: str) -> None:
    """Print a message on stderr with control characters escaped; stdout is reserved for results."""
    print(escape_text(text, keep="\n\t"), file=sys.stderr, flush=True)
