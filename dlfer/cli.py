"""The command `dlfer`: one function per verb, which parses, calls and prints.

Results go to stdout, talk to stderr. Exit codes: 0 done, 1 failed while working, 2 the input is
wrong, 130 after Ctrl-C, 143 after SIGTERM. What is heavy is imported inside the verb that needs it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlfer._version import __version__
from dlfer.errors import ConfigError, DlferError, TrainingStopped, UserError

if TYPE_CHECKING:
    from dlfer.runs import RunOptions

START, TRAIN, USE, LOOK = "Start", "Train and compare", "Use what was trained", "Look"

app = typer.Typer(
    name="dlfer",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train, compare and use facial-expression classifiers by cascaded transfer learning.",
    epilog="First steps: dlfer ablate experiments/quickstart.yaml    or, with your own images: dlfer init FOLDER",
)

File = Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)]
OptionalFile = Annotated[
    Path | None, typer.Argument(help="Experiment file (YAML); none with --resume.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. finetune.epochs=10, pretrain=null. Repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of runs, instead of saved_models/runs.")]
Resume = Annotated[str | None, typer.Option("--resume", metavar="RUN", help="Go on with an interrupted run.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Walk every phase on two small batches; needs no data.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
RequireGpu = Annotated[bool, typer.Option("--require-gpu", help="Refuse to run without a GPU.")]
MaxHours = Annotated[float | None, typer.Option("--max-hours", metavar="H", help="Stop at a checkpoint after H hours.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Train EF-FER1 even if it was trained before.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dlfer {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # Both are done with by now: --version by its callback, --debug by main().
    del version, debug


@app.command(rich_help_panel=START)
def doctor() -> None:
    """Look at Python, packages, GPU, data, disk and memory, and say how to mend what is wrong."""
    from dlfer.doctor import examine

    num_missing = 0
    for finding in examine():
        print(finding, flush=True)
        num_missing += finding.status == "missing"
    if num_missing:
        raise typer.Exit(1)


@app.command(rich_help_panel=START)
def init(
    folder: Annotated[Path, typer.Argument(help="Class folders, or train/validation/test with them.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The file to write.")] = None,
) -> None:
    """Write a first experiment for a folder of your own images."""
    from dlfer.starter import write_starter

    path = write_starter(folder, out)
    _say(f"Next: dlfer run {path} --smoke, then dlfer run {path}")
    print(path)


@app.command(rich_help_panel=START)
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Experiment files.", show_default=False)],
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--print", help="Print each experiment in full, as YAML.")] = False,
) -> None:
    """Check experiment files, and name every problem at once; nothing is trained, no data is read."""
    from dlfer.config.load import compute_digest, dump_experiment, load_experiment

    values = _parse_overrides(overrides)
    errors = []
    for file in files:
        try:
            config = load_experiment(file, values)
        except ConfigError as error:
            errors.append(str(error))
            continue
        _say(f"ok  {file}  {config.experiment.name}  {compute_digest(config)[:8]}")
        for note in _list_absent(config):
            _say(f"    {note}")
        if show:
            print(dump_experiment(config), end="")
    if errors:
        raise ConfigError("\n".join(errors))


@app.command(rich_help_panel=TRAIN)
def run(
    file: OptionalFile = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    require_gpu: RequireGpu = False,
    max_hours: MaxHours = None,
    no_cache: NoCache = False,
) -> None:
    """Run one experiment from data to report: EF-FER1, EF-FER2, evaluation."""
    options = _make_options(
        overrides, out, smoke=smoke, dry_run=dry_run, require_gpu=require_gpu, max_hours=max_hours, no_cache=no_cache
    )
    resumed = _check_start("run", file, resume, options)
    from dlfer.experiment import resume_run, run_experiment

    _print_done(run_experiment(file, options) if resumed is None else resume_run(resumed, options))


@app.command(rich_help_panel=TRAIN)
def ablate(
    file: OptionalFile = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of ablation.seeds.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    require_gpu: RequireGpu = False,
    max_hours: MaxHours = None,
    no_cache: NoCache = False,
) -> None:
    """Run an experiment with and without EF-FER1 over seeds, and compare the two."""
    options = _make_options(
        overrides, out, smoke=smoke, dry_run=dry_run, require_gpu=require_gpu, max_hours=max_hours, no_cache=no_cache
    )
    numbers = None if seeds is None else _parse_seeds(seeds)
    if resume is not None and numbers is not None:
        raise UserError("dlfer ablate --resume: an ablation goes on with its own seeds; leave --seeds out.")
    resumed = _check_start("ablate", file, resume, options)
    from dlfer.compare import resume_ablation, run_ablation

    if resumed is None:
        _print_done(run_ablation(file, options, seeds=numbers))
    else:
        _print_done(resume_ablation(resumed, options))


@app.command(rich_help_panel=USE)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model's name, its folder, or a run.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A csv in the layout of FER2013.")] = None,
    usage: Annotated[str | None, typer.Option(metavar="NAME", help="With --csv: its Usage, e.g. PrivateTest.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Class folders, an .npz, or an experiment file.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the figures there too.")] = None,
) -> None:
    """Judge a trained model on other data; a run without any, on its own test or validation part."""
    from dlfer.runs import find_model
    from dlfer.show import format_metrics

    if csv is not None and data is not None:
        raise UserError("dlfer evaluate: found both --csv and --data, expected one of them.")
    if usage is not None and csv is None:
        raise UserError("dlfer evaluate: --usage goes with --csv FILE.")
    find_model(model)  # a wrong name is told before TensorFlow is loaded
    from dlfer.judge import evaluate_model

    print(format_metrics(evaluate_model(model, csv=csv, usage=usage, data=data, json_out=json_out)))


@app.command(rich_help_panel=USE)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, or beginnings of their names.")],
    out: Out = None,
) -> None:
    """Write the report of runs again, from the files in them."""
    from dlfer.report.comparison import write_comparison_report
    from dlfer.report.html import write_report
    from dlfer.runs import open_run

    for opened in [open_run(name, out) for name in runs]:
        print(write_report(opened.path) if opened.kind == "run" else write_comparison_report(opened.path))


@app.command(rich_help_panel=LOOK)
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
    from dlfer import show as tables
    from dlfer.runs import default_runs_folder

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


def main(argv: list[str] | None = None) -> None:
    """Run the command and exit; --debug may stand anywhere and shows the traceback of an error."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if not debug:
        # TensorFlow's own talk of plugins and instructions; errors are still shown.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args = [arg for arg in args if arg != "--debug"]
    try:
        app(args, prog_name="dlfer")
    except TrainingStopped as stop:
        # What stopped, and how to go on, was said where it stopped.
        sys.exit(stop.exit_code)
    except (DlferError, OSError) as error:
        if debug:
            traceback.print_exc()
        _say(f"dlfer: {error}")
        sys.exit(getattr(error, "exit_code", 1))


def _make_options(
    overrides: list[str] | None,
    out: Path | None,
    *,
    smoke: bool,
    dry_run: bool,
    require_gpu: bool,
    max_hours: float | None,
    no_cache: bool,
) -> RunOptions:
    from dlfer.runs import RunOptions

    if max_hours is not None and not max_hours > 0:
        raise UserError(f"--max-hours {max_hours}: expected more than 0.")
    return RunOptions(
        overrides=_parse_overrides(overrides),
        out=out,
        smoke=smoke,
        dry_run=dry_run,
        require_gpu=require_gpu,
        max_hours=max_hours,
        use_cache=not no_cache,
        argv=("dlfer", *sys.argv[1:]),
    )


def _parse_overrides(texts: list[str] | None) -> dict[str, Any]:
    from dlfer.config.load import parse_override

    return dict(parse_override(text) for text in texts or ())


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seeds {text}: expected different whole numbers from 0 with commas between them, e.g. 0,1,2."
        )
    return seeds


def _check_start(verb: str, file: Path | None, resume: str | None, options: RunOptions) -> Path | None:
    """Check what can be checked before TensorFlow is loaded; return the folder of the run to go on with."""
    from dlfer.config.load import load_experiment
    from dlfer.runs import open_run

    if (file is None) == (resume is None):
        raise UserError(f"dlfer {verb}: give either an experiment FILE or --resume RUN.")
    if resume is None:
        load_experiment(file, options.overrides)
        return None
    given = {"--set": options.overrides, "--smoke": options.smoke, "--dry-run": options.dry_run}
    for option in [name for name, value in given.items() if value]:
        raise UserError(f"dlfer {verb} --resume: a run goes on as it began; leave {option} out, or start a new one.")
    found = open_run(resume, options.out)
    own_verb = {"run": "run", "ablation": "ablate"}.get(found.kind, found.kind)
    if own_verb != verb:
        raise UserError(f"{found.path}: its kind is {found.kind}; go on with: dlfer {own_verb} --resume {found.path}")
    return found.path


def _list_absent(config: Any) -> list[str]:
    """Return notes on data that the experiment names and that is not here."""
    from dlfer.config.load import resolve_path

    notes = []
    for stage in ("pretrain", "finetune"):
        data = getattr(getattr(config, stage), "data", None)
        if data is None or data.path is None:
            continue
        try:
            if not resolve_path(data.path).exists():
                notes.append(f"{stage}.data.path: {resolve_path(data.path)} is not there yet")
        except ConfigError as error:
            notes.append(f"{stage}.data.path: {error}")
    return notes


def _print_config(file: Path | None, overrides: list[str] | None, *, as_json: bool) -> None:
    from dlfer.config.load import dump_experiment, load_experiment

    if file is None:
        raise UserError(
            "dlfer show config: name the experiment file, e.g. dlfer show config experiments/quickstart.yaml."
        )
    config = load_experiment(file, _parse_overrides(overrides))
    print(json.dumps(config.model_dump(mode="json"), indent=2) if as_json else dump_experiment(config).rstrip("\n"))


def _print_schema(*, as_json: bool) -> None:
    from dlfer.config.describe import build_schema, format_keys

    print(json.dumps(build_schema(), indent=2) if as_json else format_keys())


def _print_rows(rows: list[dict[str, Any]], none: str, *, as_json: bool) -> None:
    from dlfer.show import format_rows

    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(format_rows(rows))
    else:
        _say(none)


def _print_done(path: Path | None) -> None:
    """Print where a run stands and its report; a dry run has none."""
    if path is not None:
        print(path)
        print(path / "report.html")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
