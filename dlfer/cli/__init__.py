"""The `dlfer` command line: one module per subcommand, which parses options, calls the library and prints the result.

Results go to stdout, messages to stderr. Exit codes: 0 success, 1 failure at run time, 2 invalid input, 130 after
Ctrl-C, 143 after SIGTERM. Heavy packages are imported inside the subcommand that needs them.

A wrong command line gives one error that suggests the intended option, subcommand or key; dlfer never acts on a guess.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer import TyperException
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

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
from dlfer.config.aliases import find_keys, find_options, find_verb
from dlfer.errors import DlferError, Signalled, TrainingStopped, shorten
from dlfer.quiet import DEBUG, hush_libraries

VERBS = {
    "Start": (doctor, init, check, prepare, audit),
    "Train and compare": (run, ablate, sweep, crossval, search),
    "Use what was trained": (predict, explain, export, serve, ship, evaluate, compare, report),
    "Inspect": (show,),
}
"""Modules of the subcommands by help panel, in the order of `dlfer --help`; each defines a function with its name."""

_PACKAGE = Path(__file__).resolve().parents[1]

_EXTRA = re.compile(r"^Got unexpected extra argument\S* \((.*)\)\.?$", re.DOTALL)
_UNKNOWN_VERB = re.compile(r"^No such command '(.*?)'", re.DOTALL)
_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


class _PlainHelp:
    """A mixin for commands whose help shows no types of flags and of named arguments, and re-wraps paragraphs."""

    def __init__(self, *args: Any, help: str | None = None, **values: Any) -> None:
        super().__init__(*args, help=None if help is None else _LINE_BREAK.sub(" ", help), **values)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command, including --help, prepared for help without redundant types."""
        params = super().get_params(ctx)
        for param in params:
            if isinstance(param, TyperOption) and param.is_flag:
                param.metavar = ""
            elif isinstance(param, TyperArgument) and param.metavar is not None:
                param.display_type_rich = lambda ctx: None
        return params


class Verb(_PlainHelp, TyperCommand):
    """A subcommand of dlfer."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; if a signal ends it (Signalled), exit with 128 plus the number of that signal."""
        try:
            return super().invoke(ctx)
        except Signalled as stop:
            sys.exit(128 + stop.number)


class Verbs(_PlainHelp, TyperGroup):
    """The `dlfer` command with its subcommands."""


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
    # Both are handled before this call: --version by its callback, --debug by _run_command().
    del version, debug


def _describe_error(error: Exception) -> str:
    """Return the message of an error; for one of the file system, the file name and the reason without the errno."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        if isinstance(error, PermissionError):
            return f"{error.filename}: {error.strerror}. This user may not read or write it; change its permissions, or choose another place."
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _describe_unexpected(error: Exception) -> str:
    """Return the message for an unexpected exception, with the innermost line of dlfer's own code in its traceback."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    where = f" in {Path(own[-1].filename).relative_to(_PACKAGE.parent)} line {own[-1].lineno}" if own else ""
    return (
        f"{type(error).__name__}{where}: {shorten(error).rstrip('.')}. dlfer did not expect this error; run the same "
        "command with --debug to see the traceback."
    )


for _panel, _modules in VERBS.items():
    for _module in _modules:
        app.command(cls=Verb, rich_help_panel=_panel)(getattr(_module, _module.__name__.rpartition(".")[2]))


_LITERAL_TILDE = re.compile(r"^(--[\w-]+=|)(?:\./+)+(?=~)")
"""The beginning of a path such as ./~, which pathlib would make ~, the home folder."""


def _fill_optional(args: list[str]) -> list[str]:
    """Return the command-line words with "-" (standard output) inserted after a --json that has no FILE."""
    filled = []
    for word, following in zip(args, [*args[1:], "--"], strict=False):
        filled.append(word)
        if word == "--json" and following.startswith("-") and following != "-":
            filled.append("-")
    return filled


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Make Ctrl-C raise KeyboardInterrupt and SIGTERM SystemExit in the context, so that temporary files are removed.

    The yielded list collects the numbers of these signals, because a library may turn an exception that is raised in
    one of its callbacks into an error of its own. Trainings and servers install their own signal handlers.
    """
    noted: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        sys.exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    usual = (signal.default_int_handler, signal.SIG_DFL)
    before = {number: handler for number, handler in before.items() if handler in usual}
    for number in before:
        signal.signal(number, handle)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    """Run the command and exit; --debug, anywhere on the command line, shows the traceback of an error."""
    with _noting_signals() as noted:
        try:
            _run_command(argv, noted)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BaseException as error:
            if not noted or (isinstance(error, SystemExit) and error.code != 1):
                raise
            sys.exit(128 + noted[0])


def _run_command(argv: list[str] | None, noted: list[int]) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # Escape names that are not UTF-8 or that the terminal cannot encode, instead of raising UnicodeEncodeError.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # file names listed on stdin may not be UTF-8
    debug = "--debug" in args
    if debug:
        os.environ[DEBUG] = "1"
    hush_libraries()
    # Make waiting OpenMP threads of XGBoost sleep. By default they spin, which takes four times the CPU where anything
    # else runs on the machine (2,000 rows, two cores). Set here, before Keras loads the library that reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = [_LITERAL_TILDE.sub(lambda match: f"{match[1]}{Path.cwd()}/", arg) for arg in args]
    args = _fill_optional([arg for arg in args if arg != "--debug"]) or ["--help"]
    try:
        sys.exit(app(args, prog_name="dlfer", standalone_mode=False) or 0)
    except typer.TyperException as error:
        if debug:
            traceback.print_exc()
        say(describe_usage_error(error, args))
        sys.exit(error.exit_code)
    except TrainingStopped as stop:
        # The code that stopped has already printed the reason and how to continue.
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
        if not noted:
            say(f"dlfer: {_describe_unexpected(error)}")
        sys.exit(1)


def describe_usage_error(error: TyperException, args: Sequence[str]) -> str:
    """Return the message for a wrong command line: the error, and what was probably meant or else the usage.

    Args:
        error: error of the argument parser.
        args: words of the command line after "dlfer".
    """
    message = getattr(error, "message", "") or error.format_message()
    unknown, extra = _UNKNOWN_VERB.match(message), _EXTRA.match(message)
    context = getattr(error, "ctx", None)
    if context is None:
        return f"dlfer {args[0]}: {message}"
    command = context.command_path
    hints: list[str] = []
    if unknown:
        message, hints = f"No such command {unknown[1]!r}", _describe_verb(unknown[1], list(args), context)
    elif message.startswith("No such option"):
        wrong = _list_wrong_options(args, context) or [error.option_name]
        message = f"No such option: {', '.join(word.partition('=')[0] for word in wrong)}"
        hints = [hint for word in wrong for hint in _describe_option(word, args, context)]
    elif extra:
        message = f"no argument takes {extra[1]}"
        hints = list(_describe_extra([word for word in args if word in extra[1].split()], context))
    else:
        message = error.format_message()
        file = args[args.index("--json") + 1] if "--json" in args[:-1] else "-"
        if message.startswith("Missing argument") and file != "-":
            hints = [f"--json takes the word after it, {file}, as its file; put --json last"]
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ").replace("{", "").replace("}", "")
    return "\n  ".join([f"{command}: {message.rstrip('.')}.", *(hints or [f"Usage: {usage}; more: {command} --help"])])


def _list_wrong_options(args: Sequence[str], context: Any) -> list[str]:
    """Return the words of a command line that look like options but are not options of the subcommand."""
    known = {name for param in context.command.get_params(context) for name in (*param.opts, *param.secondary_opts)}
    ends = args.index("--") if "--" in args else len(args)
    words = [word for word in args[:ends] if re.match(r"--?[a-zA-Z]", word)]
    return [word for word in words if word.partition("=")[0] not in known]


def _describe_verb(word: str, args: list[str], context: Any) -> list[str]:
    """Return hints for an unknown subcommand: the corrected command line, and hints for its unknown options."""
    verbs = context.command.list_commands(context)
    near = difflib.get_close_matches(word.casefold(), verbs, n=1)
    meant = find_verb(word) or (near[0] if near else None)
    if meant is None:
        return [f"The commands: {', '.join(verbs)}; for their meaning: dlfer --help"]
    verb = context.command.get_command(context, meant.split()[0])
    rest = args[args.index(word) + 1 :]
    if verb is None:
        asked = [f"{rest[0]} "] if meant == "--help" and rest[:1] and rest[0] in verbs else [""]
        return [f"Did you mean: dlfer {asked[0]}{meant}"]
    inner = type(context)(verb, info_name=verb.name, parent=context)
    wrong = _list_wrong_options(rest, inner)
    hints = [hint for option in wrong for hint in _describe_option(option, rest, inner)]
    values = [_find_value(option, rest) for option in wrong if "=" not in option]
    kept = [part for part in rest if part not in (*wrong, *values)]
    return [f"Did you mean: {shlex.join(['dlfer', *meant.split(), *kept])}", *hints]


def _find_value(option: str, args: Sequence[str]) -> str:
    """Return the value of an option on a command line, or "" if it has none."""
    _, is_given, value = option.partition("=")
    place = args.index(option) if option in args else len(args)
    following = args[place + 1 : place + 2]
    if is_given or not following or following[0].startswith("--"):
        return value
    return following[0]


def _describe_option(word: str, args: Sequence[str], context: Any) -> Iterator[str]:
    """Yield hints for an unknown option: similar options and arguments of the subcommand, and experiment keys."""
    name, value = word.partition("=")[0], _find_value(word, args)
    params = context.command.get_params(context)
    options = [opt for param in params if isinstance(param, TyperOption) for opt in param.opts]
    arguments = [param.display_name_raw for param in params if isinstance(param, TyperArgument)]
    found = find_options(name, [*options, *arguments])
    assignments = list(_list_assignments(name, value)) if "--set" in options else []
    if not found and not assignments:
        found = difflib.get_close_matches(name, options, n=1)
    for known in found:
        if known in arguments:
            yield f"{known} is given without an option: {context.command_path} {known}"
        else:
            meaning = next(param.help for param in params if known in param.opts)
            yield f"Did you mean {known}: {meaning}"
    for assignment in assignments:
        yield f"A key of the experiment is set by: --set {shlex.quote(assignment)}"


def _describe_extra(words: Sequence[str], context: Any) -> Iterator[str]:
    """Yield hints for words that no argument takes: give KEY=VALUE by --set, and anything else by --data."""
    options = [opt for param in context.command.get_params(context) for opt in param.opts]
    for word in words:
        key, is_assignment, value = word.partition("=")
        if is_assignment and "--set" in options:
            for assignment in _list_assignments(key, value):
                yield f"A key of the experiment is set by: --set {shlex.quote(assignment)}"
        elif "--data" in options:
            yield f"Data is given by: --data {shlex.quote(word)}"


def _list_assignments(word: str, value: str) -> Iterator[str]:
    """Yield KEY=VALUE for the keys that a word may mean: the key itself, those it is an alias of, or a similar one."""
    from dlfer.config.keys import list_keys, suggest_key

    dotted = word.lstrip("-").replace("-", "_")
    parts = dotted.split(".")
    if dotted in list_keys():
        meant = [dotted]
    else:
        near = suggest_key(parts) if all(parts) else None
        meant = find_keys(parts) or ([near] if near is not None else [])
    for key in meant:
        yield key if "=" in key else f"{key}={value or 'VALUE'}"
