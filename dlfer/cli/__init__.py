"""The command `dlfer`: one file per verb, named after the verb, which parses, calls and prints.

Results go to stdout, talk to stderr. Exit codes: 0 done, 1 failed while working, 2 the input is
wrong, 130 after Ctrl-C, 143 after SIGTERM. What is heavy is imported inside the verb that needs it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from dlfer._version import __version__
from dlfer.cli import (
    ablate,
    audit,
    check,
    compare,
    crossval,
    doctor,
    evaluate,
    explain,
    export,
    init,
    predict,
    prepare,
    report,
    run,
    search,
    serve,
    ship,
    show,
    sweep,
)
from dlfer.cli.options import say
from dlfer.cli.usage import Verb, Verbs, describe_usage_error
from dlfer.errors import DlferError, TrainingStopped, shorten
from dlfer.quiet import DEBUG, hush_libraries

VERBS = {
    "Start": (doctor, init, check, prepare, audit),
    "Train and compare": (run, ablate, sweep, crossval, search),
    "Use what was trained": (predict, explain, export, serve, ship, evaluate, compare, report),
    "Inspect": (show,),
}
"""The modules of the verbs in the order of `dlfer --help`; each has one public function of its own name."""

_PACKAGE = Path(__file__).resolve().parents[1]

app = typer.Typer(
    name="dlfer",
    cls=Verbs,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train, compare and use facial-expression classifiers by cascaded transfer learning.",
    epilog="First steps: dlfer ablate experiments/quickstart.yaml    or, with your own images: dlfer init FOLDER",
)


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


def _describe_error(error: Exception) -> str:
    """Return what went wrong, an error of the file system with its file first and without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _describe_unexpected(error: Exception) -> str:
    """Return what an error says that dlfer did not expect, and the last line of dlfer's own that it went through."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    where = f" in {Path(own[-1].filename).relative_to(_PACKAGE.parent)} line {own[-1].lineno}" if own else ""
    return (
        f"{type(error).__name__}{where}: {shorten(error).rstrip('.')}. dlfer did not expect this error; the same command with --debug "
        "shows all of it."
    )


for _panel, _modules in VERBS.items():
    for _module in _modules:
        app.command(cls=Verb, rich_help_panel=_panel)(getattr(_module, _module.__name__.rpartition(".")[2]))


def _fill_optional(args: list[str]) -> list[str]:
    """Return the words of a command line with "-", standard output, for the FILE of a --json that has none."""
    filled = []
    for word, following in zip(args, [*args[1:], "--"], strict=False):
        filled.append(word)
        if word == "--json" and following.startswith("-") and following != "-":
            filled.append("-")
    return filled


def _exit_on_sigterm() -> None:
    """Let SIGTERM end the process by SystemExit, so that temporary files are removed; trainings and servers handle it themselves."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[threading.Event]:
    """Inside, Ctrl-C sets the event and raises KeyboardInterrupt; trainings and servers handle it themselves."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not is_default:
        yield interrupted
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: list[str] | None = None) -> None:
    """Run the command and exit; --debug may stand anywhere and shows the traceback of an error."""
    with _noting_interrupts() as interrupted:
        try:
            _run_command(argv)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BaseException as error:
            # A library may turn a KeyboardInterrupt in one of its callbacks into an error of its own.
            if not interrupted.is_set() or (isinstance(error, SystemExit) and error.code != 1):
                raise
            sys.exit(128 + signal.SIGINT)


def _run_command(argv: list[str] | None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks, or that is not UTF-8, is shown escaped and ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in args
    if debug:
        os.environ[DEBUG] = "1"
    hush_libraries()
    _exit_on_sigterm()
    # Threads of XGBoost that wait for each other shall sleep. By default they spin, which on a machine where anything
    # else runs takes four times the CPU (2,000 rows, two cores). Keras loads the library that reads this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = _fill_optional([arg for arg in args if arg != "--debug"]) or ["--help"]
    try:
        sys.exit(app(args, prog_name="dlfer", standalone_mode=False) or 0)
    except typer.TyperException as error:
        if debug:
            traceback.print_exc()
        say(describe_usage_error(error, args))
        sys.exit(error.exit_code)
    except TrainingStopped as stop:
        # What stopped, and how to continue, was said where it stopped.
        sys.exit(stop.exit_code)
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("dlfer"):
            raise
        say(
            f"dlfer: this command needs the package that Python imports as {error.name}, which is not installed in "
            f"{sys.prefix}. Install dlfer with TensorFlow: pip install dlfer (in a clone: make install). "
            "Without TensorFlow there are predict, serve, init, show and report."
        )
        sys.exit(1)
    except (DlferError, OSError) as error:
        if debug:
            traceback.print_exc()
        say(f"dlfer: {_describe_error(error)}")
        sys.exit(getattr(error, "exit_code", 1))
    except Exception as error:
        if debug:
            traceback.print_exc()
        say(f"dlfer: {_describe_unexpected(error)}")
        sys.exit(1)
