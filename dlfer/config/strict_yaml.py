"""A strict YAML reader with the scalars of YAML 1.2, without repeated keys, and with the line of every value.

PyYAML follows YAML 1.1: it reads `1e-3` as a string, `no` as False, `1_000` as a number and `12:30` as 750, and
silently keeps the last of repeated keys. Such errors are easily overlooked and spoil a training.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dlfer.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 30
MAX_PROBLEMS = 50

# YAML 1.2.2, section 10.3.2 (core schema).
_SCALARS = (
    ("null", re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)
_TAG = "tag:yaml.org,2002:"

Location = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2; used to parse, not to construct."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """A dumper whose output `_Loader` reads back; strings that only YAML 1.1 reads as numbers are also quoted."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # In its other styles PyYAML turns line breaks such as U+0085 into spaces.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass
class Document:
    """The contents of one YAML file.

    Attributes:
        data: the value: dict, list, str, int, float, bool or None.
        marks: file and line of each value, e.g. ("finetune", "epochs") -> "a.yaml line 12".
    """

    data: Any
    marks: dict[Location, str] = field(default_factory=dict)


def read_yaml(path: Path) -> Document:
    """Read a YAML file with a single document.

    Raises:
        ConfigError: the file cannot be read or is larger than MAX_BYTES, or as for `parse_yaml`.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file. {_advise_missing(path)}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: is a folder; expected an experiment file (.yaml). For a folder of images, dlfer init {shlex.quote(str(path))} writes one."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); expected a YAML file.") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: found {len(raw):,} bytes, expected an experiment file of at most {MAX_BYTES:,}.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} line {line}: expected text in UTF-8, found the byte {raw[error.start]:#04x}."
        ) from None
    return parse_yaml(text, str(path))


def _advise_missing(path: Path) -> str:
    """Return a sentence that suggests a file with a similar name in the same folder, or says how to create one."""
    with contextlib.suppress(OSError):
        there = {file.stem: file for file in sorted(path.parent.iterdir()) if file.suffix in (".yaml", ".yml")}
        near = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.7)
        if near:
            return f"Did you mean {there[near[0]]}?"
    return "Expected an experiment file (.yaml); dlfer init FOLDER writes one for a folder of images."


def parse_yaml(text: str, name: str) -> Document:
    """Parse YAML text; `name` identifies it in messages and marks.

    Raises:
        ConfigError: it is not YAML, repeats a key, or has a value that experiments do not allow; with the line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{name}: values are nested too deeply; expected at most {MAX_DEPTH} levels.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name} line {mark.line + 1}, column {mark.column + 1}" if mark else name
        what = "; ".join(part for part in (error.context, error.problem, error.note) if part)
        raise ConfigError(f"{where}: this is not YAML ({what}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: this is not YAML ({' '.join(str(error).split())}).") from None
    if node is None:
        return Document(None)
    reader = _NodeReader(name)
    data = reader.read(node, ())
    if reader.problems:
        more = [f"{name}: and {reader.num_unlisted} more."] if reader.num_unlisted else []
        raise ConfigError("\n".join([*reader.problems, *more]))
    return Document(data, reader.marks)


def parse_value(text: str, name: str) -> Any:
    """Return the YAML value of a command-line argument; a string keeps a # that would begin a comment in a file.

    Raises:
        ConfigError: as for `parse_yaml`; or the text is one line in which a comment follows a value of another type.
    """
    data, text = parse_yaml(text, name).data, text.strip()
    comment = None if "\n" in text else _find_comment(text)
    if comment is None:
        return data
    if isinstance(data, str) and text.startswith(data):  # not in quotes, of which the text would begin with one
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    advice = shlex.quote(f'"{quoted}"')
    raise ConfigError(
        f"{name}: found {text[comment:][:80]}, which begins a comment in YAML and would be left out; leave it out, or put "
        f"the whole value in quotes for YAML and the shell if it is text: {advice[:200]}."
    )


def _find_comment(text: str) -> int | None:
    """Return the index of the first comment of valid YAML, a # between two tokens; None without a comment."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        found = text.find("#", end, token.start_mark.index)
        if found >= 0:
            return found
        end = token.end_mark.index
    return None


def format_yaml(data: Any) -> str:
    """Return YAML text from which `parse_yaml` gives equal data; mappings keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _NodeReader:
    """A converter of PyYAML's nodes to values, which collects the lines of the values and the problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.marks: dict[Location, str] = {}
        self.problems: list[str] = []
        self.num_unlisted = 0
        self._num_values = 0

    def read(self, node: yaml.Node, location: Location) -> Any:
        # Aliases can multiply a value exponentially ("billion laughs") or contain themselves.
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(location) > MAX_DEPTH:
            raise ConfigError(
                f"{self._where(node)}: found more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, "
                "aliases counted in full; experiment files are much smaller."
            )
        self.marks.setdefault(location, self._where(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._read_mapping(node, location)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, (*location, str(index))) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._read_scalar(node)
        self._refuse(
            node, f"found the tag {node.tag.removeprefix(_TAG)[:80]!r}, expected plain text, numbers, lists, keys."
        )
        return None

    def _read_mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self._read_key(key_node)
            if key is None:
                continue
            if key in values:
                self._refuse(
                    key_node, f"the key {key[:80]!r} is repeated; it is already in line {lines[key]}. Keep one."
                )
                continue
            lines[key] = key_node.start_mark.line + 1
            self.marks[(*location, key)] = self._where(key_node)
            values[key] = self.read(value_node, (*location, key))
        return values

    def _read_key(self, node: yaml.Node) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, "found a list or mapping as a key, expected text.")
        elif node.value == "<<" and node.style is None:
            self._refuse(node, "'<<' is not part of YAML 1.2; write the keys out, or use extends: FILE.")
        elif node.tag != _TAG + "str":
            self._refuse(
                node, f'found the key {node.value[:80]}, expected text; put it in quotes: "{node.value[:80]}".'
            )
        else:
            return node.value
        return None

    def _read_scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            match kind:
                case "str":
                    text.encode()  # raises for a lone surrogate, from an escape such as "\ud800"
                    return text
                case "null" if _SCALARS[0][1].match(text):
                    return None
                case "bool" if _SCALARS[1][1].match(text):
                    return text.lower() == "true"
                case "int" if _SCALARS[2][1].match(text):
                    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                case "float" if _SCALARS[3][1].match(text):
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            self._refuse(node, f"cannot read {text[:40]!r} ({error}).")
            return None
        self._refuse(node, f"cannot read {text[:40]!r} as {kind!r}; expected text, a number, true, false or null.")
        return None

    def _where(self, node: yaml.Node) -> str:
        return f"{self.name} line {node.start_mark.line + 1}"

    def _refuse(self, node: yaml.Node, message: str) -> None:
        if len(self.problems) >= MAX_PROBLEMS:
            self.num_unlisted += 1
        else:
            self.problems.append(f"{self._where(node)}: {message}")
