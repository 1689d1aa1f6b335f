"""What is wrong with a command line, in one message: the option, verb or key that was meant is named, and never taken for it."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from typer import TyperException
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from dlfer.config.aliases import find_keys, find_options, find_verb

_EXTRA = re.compile(r"^Got unexpected extra argument\S* \((.*)\)\.?$", re.DOTALL)
_UNKNOWN_VERB = re.compile(r"^No such command '(.*?)'", re.DOTALL)
_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


class _PlainHelp:
    """A command whose help gives no type where there is nothing to type (<bool>), and whose paragraphs fill the lines."""

    def __init__(self, *args: Any, help: str | None = None, **values: Any) -> None:
        super().__init__(*args, help=None if help is None else _LINE_BREAK.sub(" ", help), **values)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command, --help among them."""
        params = super().get_params(ctx)
        for param in params:
            if isinstance(param, TyperOption) and param.is_flag:
                param.metavar = ""
            elif isinstance(param, TyperArgument) and param.metavar is not None:
                param.display_type_rich = lambda ctx: None
        return params


class Verb(_PlainHelp, TyperCommand):
    """A verb of dlfer."""


class Verbs(_PlainHelp, TyperGroup):
    """The command dlfer with its verbs."""


def describe_usage_error(error: TyperException, args: Sequence[str]) -> str:
    """Return what is wrong with a command line, what was probably meant, and how the command is used.

    Args:
        error: of the parser.
        args: the words of the command line after "dlfer".
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
        if message.startswith("Missing argument") and "--json" in args[:-1]:
            hints = [f"--json takes the word after it, {args[args.index('--json') + 1]}, for its file; put --json last"]
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ").replace("{", "").replace("}", "")
    return "\n  ".join([f"{command}: {message.rstrip('.')}.", *(hints or [f"Usage: {usage}; more: {command} --help"])])


def _list_wrong_options(args: Sequence[str], context: Any) -> list[str]:
    """Return the words of a command line that look like options and that the verb does not have."""
    known = {name for param in context.command.get_params(context) for name in (*param.opts, *param.secondary_opts)}
    ends = args.index("--") if "--" in args else len(args)
    words = [word for word in args[:ends] if re.match(r"--?[a-zA-Z]", word)]
    return [word for word in words if word.partition("=")[0] not in known]


def _describe_verb(word: str, args: list[str], context: Any) -> list[str]:
    """Say which verb was meant, with the rest of the command line, and what is wrong in that."""
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
    """Return the value of an option on a command line; "" where it has none."""
    _, is_given, value = option.partition("=")
    place = args.index(option) if option in args else len(args)
    following = args[place + 1 : place + 2]
    if is_given or not following or following[0].startswith("--"):
        return value
    return following[0]


def _describe_option(word: str, args: Sequence[str], context: Any) -> Iterator[str]:
    """Say which options the verb has for a wrong one, and which key of an experiment has its name."""
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
    """Say what words are for that no argument takes."""
    options = [opt for param in context.command.get_params(context) for opt in param.opts]
    for word in words:
        key, is_assignment, value = word.partition("=")
        if is_assignment and "--set" in options:
            for assignment in _list_assignments(key, value):
                yield f"A key of the experiment is set by: --set {shlex.quote(assignment)}"
        elif "--data" in options:
            yield f"Data is given by: --data {shlex.quote(word)}"


def _list_assignments(word: str, value: str) -> Iterator[str]:
    """Yield KEY=VALUE of the keys that a word may mean: its own key, those of the table, or the one spelt alike."""
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
