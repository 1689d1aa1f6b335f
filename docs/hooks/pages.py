"""MkDocs hook that adds pages which are not in docs/: the generated reference, and files of the repository.

The reference (experiment keys, commands, public names) is generated from the code at every build, so it is always up to
date. The pages of results/ and the files outside of docs/ that pages link to (an experiment, a deployment script)
become part of the site, so that the same relative links work in the repository and on the site, and all are checked.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
MEMBERS = {
    "FacePredictor": ("predict",),
    "Listener": ("start", "step", "epoch", "finish", "fail"),
    "Run": ("folder", "status", "config", "metrics", "history", "report", "classifier", "resume"),
    "Study": ("folder", "kind", "status", "config", "comparison", "members", "runs", "best", "report", "resume"),
}
"""Public class -> the members that the reference shows."""
PUBLISHED = ("results/**/*.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated reference, the published pages, and the files outside of docs/ that pages link to."""
    generated = {
        "reference/experiment.md": write_experiment_reference(),
        "reference/cli.md": write_cli_reference(),
        "reference/python.md": write_python_reference(),
        "reference/experiments.md": write_experiments(),
    }
    published = {path.relative_to(ROOT).as_posix() for pattern in PUBLISHED for path in ROOT.glob(pattern)}
    generated |= {name: (ROOT / name).read_text() for name in sorted(published)}
    for uri, text in generated.items():
        files.append(File.generated(config, uri, content=text))
    linked = {
        target
        for file in files.documentation_pages()
        for match in _iterate_links(file.content_string)
        if (target := _find_target(file.src_uri, match[2])) is not None
        and (ROOT / target).is_file()
        and not target.startswith("docs/")
    }
    for name in sorted(linked - published):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links to files outside of docs/ for the site; replace links to folders without a README.md by text."""
    uri = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        target = _find_target(uri, match[2])
        if target is None:
            return match[0]
        if (ROOT / target).is_dir():
            target = f"{target}/README.md"
            if not (ROOT / target).is_file():
                return match[1]
        link = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(uri) or ".")
        return f"[{match[1]}]({link}{match[3] or ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


def _iterate_links(markdown: str) -> Iterable[re.Match[str]]:
    return (match for part in _FENCE.split(markdown) if not part.startswith("```") for match in _LINK.finditer(part))


def _find_target(uri: str, link: str) -> str | None:
    """Return the path in the repository that a page's link refers to; None for a URL or a path that does not exist."""
    if "://" in link or link.startswith("mailto:"):
        return None
    source = uri if not (ROOT / "docs" / uri).exists() and (ROOT / uri).exists() else f"docs/{uri}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def write_experiment_reference() -> str:
    """Return the page with all keys of experiment files: values, default and meaning of each."""
    from dlfer.config.keys import describe_keys

    rows = describe_keys()
    shared = {row["key"].partition(".")[2]: row for row in rows if row["key"].startswith("finetune.")}
    lines = [
        "# Experiment files: every key",
        "",
        "A file states only what differs from these defaults; `dlfer show config FILE` prints it in full, and `--set KEY=VALUE` "
        "changes a key for one command. An unknown key is refused with the nearest known one. For completion in an editor, "
        "point it to [schema.json](../../experiments/schema.json). How a file is built: [Your own images]"
        "(../tutorials/own-images.md#the-file).",
        "",
    ]
    for row in rows:
        section, _, name = row["key"].partition(".")
        if not name:
            lines += [f"## {section}", "", _join_sentences(row["meaning"]), ""]
            if section == "pretrain":
                lines += ["The keys of [finetune](#finetune), with these differences:", ""]
            continue
        alike = shared.get(name) if section == "pretrain" else None
        if alike is not None and {**alike, "key": ""} == {**row, "key": ""}:
            continue
        lines += _format_key(row)
    return "\n".join(lines)


def _format_key(row: dict[str, str]) -> list[str]:
    default = {"": "", "required": ", required"}.get(row["default"], f", default `{row['default']}`")
    values = f"*{_escape(row['values'])}*{default}."
    return [f"`{row['key']}`", f":   {values} {_escape(row['meaning'])}", ""]


def write_cli_reference() -> str:
    """Return the page with all commands, their arguments and their options."""
    import typer

    from dlfer.cli import VERBS, app

    group = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed while working, 2 wrong input, 130 after "
        "Ctrl-C, 143 after SIGTERM (`serve`: 0 if all accepted requests were answered). `dlfer --version` prints the version; `--debug`, anywhere in a command, shows the traceback of "
        "an error.",
        "",
    ]
    for panel, modules in VERBS.items():
        lines += [
            f"**{panel}:** " + ", ".join(f"[{_name(module)}](#dlfer-{_name(module)})" for module in modules) + "",
            "",
        ]
    for modules in VERBS.values():
        for module in modules:
            lines += _format_command(_name(module), group.get_command(None, _name(module)))
    return "\n".join(lines)


def _name(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


def _format_command(name: str, command: Any) -> list[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(
        (word if argument.required else f"[{word}]") + ("" if argument.nargs == 1 else "...")
        for argument in arguments
        for word in [_metavar(argument)]
    )
    lines = [f"## dlfer {name}", "", "```text", f"dlfer {name} {usage} [OPTIONS]".replace("  ", " "), "```", ""]
    lines += [_escape(inspect.cleandoc(command.help or "")), ""]
    for argument in arguments:
        lines += [f"`{_metavar(argument)}`", f":   {_escape(argument.help or '')}", ""]
    for option in options:
        metavar = "" if option.is_flag else f" {_metavar(option)}"
        default = f" Default: `{option.default}`." if not option.is_flag and option.default not in (None, ()) else ""
        spelled = ", ".join([*option.opts, *option.secondary_opts])
        lines += [f"`{spelled}{metavar}`", f":   {_escape(option.help or '')}{default}", ""]
    return lines


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def write_python_reference() -> str:
    """Return the page with the public names, for which mkdocstrings inserts signatures and docstrings."""
    import dlfer
    from dlfer.quiet import hush_libraries

    hush_libraries()
    lines = [
        "# Python",
        "",
        "Everything public is in the package `dlfer`, and the classes of exceptions in `dlfer.errors`; `import dlfer` loads neither "
        "TensorFlow nor Keras. Other modules may change without notice. Examples: [Use dlfer from Python](../how-to/python.md).",
        "",
    ]
    for name in dlfer.__all__:
        value = getattr(dlfer, name)
        if name.startswith("__"):
            continue
        lines += [f"::: {value.__module__}.{value.__qualname__}", "    options:"]
        lines += [f"      heading: dlfer.{name}", f"      toc_label: dlfer.{name}"]
        if name in MEMBERS:
            lines += [f"      members: [{', '.join(MEMBERS[name])}]", "      inherited_members: true"]
        lines += [""]
    return "\n".join(lines)


def write_experiments() -> str:
    """Return the page with the shipped experiments, which shows the comments at the beginning of each file."""
    lines = [
        "# Shipped experiments",
        "",
        "Each file in [experiments/](../../experiments) begins with what it is for, the command, its cost and the result to expect. "
        "These heads are shown here; run `dlfer check FILE` to see what a file needs on your machine. The files come with an installed "
        "dlfer too: in any folder `dlfer run quickstart` runs experiments/quickstart.yaml.",
        "",
    ]
    for path in sorted((ROOT / "experiments").glob("*.yaml")):
        comments = [
            line for line in path.read_text().partition("\nexperiment:")[0].splitlines() if line.startswith("#")
        ]
        shown = [line.removeprefix("#").removeprefix(" ") for line in comments if "yaml-language-server" not in line]
        lines += [
            f"## {path.name}",
            "",
            f"[{path.name}](../../experiments/{path.name})",
            "",
            "```text",
            *shown,
            "```",
            "",
        ]
    return "\n".join(lines)


def _join_sentences(text: str) -> str:
    return _escape(" ".join(text.split()))


def _escape(text: str) -> str:
    """Return text with Markdown's special characters escaped, except in code between backquotes."""
    parts = text.split("`")
    return "`".join(
        part if index % 2 else re.sub(r"([\\*_\[\]<>{}])", r"\\\1", part) for index, part in enumerate(parts)
    )
