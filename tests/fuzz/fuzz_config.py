"""Experiments that others wrote: mutations of those that dlfer is shipped with."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlfer.config.load import dump_experiment, load_experiment, parse_override
from dlfer.config.strict_yaml import format_yaml, parse_yaml
from dlfer.config.variations import list_cells

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHIPPED = {path.name: path.read_text(encoding="utf-8") for path in sorted(EXPERIMENTS.glob("*.yaml"))}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 10**30, -(10**400), 2**63, 0.5, 1e-300, 1e308, float("inf"), float("nan")),
    *(
        "",
        " ",
        "yes",
        "1e-3",
        "null",
        "../..",
        "/etc/passwd",
        "a" * 5000,
        "${HOME}",
        "${",
        "$X_NONE",
        "~root",
        "é😀",
        "\0",
    ),
    *([], {}, [[]], {"": {}}, [None] * 30, {"a": {"b": {"c": {}}}}, ["adam", "sgd"] * 300, list(range(2000))),
    *(
        {"source": "fer2013"},
        {"source": "arrays", "path": 3},
        {"min": 1, "max": 0},
        {"min": 1e-5, "max": 1e-1, "sampling": "log"},
    ),
    *(
        {"choices": [1, 2, 3]},
        {"choices": []},
        {"grid": {}},
        "efficientnet_b3",
        "official",
        "macro_f1",
        {"from": 3, "to": 1},
    ),
)
TOKENS = (
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [echo]",
        "!!binary aGk=",
        "!!int x",
        "! ",
        "---\n",
        "...\n",
    ),
    *(
        "%YAML 1.1\n",
        "%TAG ! x\n",
        "? ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "|\n",
        ">\n",
        "# ",
        '"',
        "'",
        "\\",
        "\t",
        "\r",
        "@",
        "`",
    ),
    *("\0", "\ufeff", "\x85", "\u2028", "\ud800", "😀", "0x", "1_000", "12:30:45", "9" * 6000, "[" * 200, "{a: " * 100),
    *(
        "- " * 500,
        "? " * 100,
        "extends: base.yaml\n",
        "extends: quickstart.yaml\n",
        "extends: ..\n",
        '"\\ud800"',
        "\\x00",
    ),
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c]\n",
)


def list_places(tree: Any, place: tuple = ()) -> list[tuple]:
    """Return the keys that lead to each value of a tree."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place, *(found for key, value in below for found in list_places(value, (*place, key)))]


def get_value(tree: Any, place: tuple) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def change_tree(tree: dict, random: Random) -> None:
    """Change, take away, rename, move or repeat one value."""
    places = [place for place in list_places(tree) if place]
    if not places:
        tree["experiment"] = {"name": "a"}
        return
    place = random.choice(places)
    parent, key = get_value(tree, place[:-1]), place[-1]
    other = get_value(tree, random.choice(places))
    match random.randrange(7):
        case 0 | 1:
            parent[key] = copy.deepcopy(random.choice(VALUES))
        case 2:
            del parent[key]
        case 3 if isinstance(parent, dict):
            parent[random.choice((f"{key}s", key[:-1], str(random.choice(VALUES))[:99], "extends"))] = parent.pop(key)
        case 4:
            parent[key] = copy.deepcopy(other)
        case 5:
            parent[key] = random.choice(
                ([parent[key]] * 3, {"choices": [parent[key]]}, {str(key): parent[key]}, str(parent[key]))
            )
        case _ if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = random.choice((-1, 0, 2, 1000, 1e-9)) * parent[key]
        case _:
            parent[key] = None


def change_text(text: str, random: Random) -> str:
    """Change lines, indents, or put a token in."""
    lines = text.splitlines(keepends=True) or [""]
    number = random.randrange(len(lines))
    line = lines[number]
    place = random.randrange(len(line) + 1)
    match random.randrange(8):
        case 0 | 1:
            lines[number] = line[:place] + random.choice(TOKENS) + line[place:]
        case 2:
            lines[number] = " " * random.choice((1, 2, 40)) + line
        case 3:
            lines[number] = line.lstrip()
        case 4:
            lines.insert(random.randrange(len(lines)), line)
        case 5:
            del lines[number]
        case 6:
            lines[number] = (
                line[:place] + chr(random.choice((random.randrange(128), random.randrange(0x3000)))) + line[place + 1 :]
            )
        case _:
            del lines[number:]
    return "".join(lines)


def damage(name: str, changes: list[Random]) -> bytes:
    """Return an experiment after some changes to its values, and then to its text."""
    tree, in_text = None, []
    for random in changes:
        if random.randrange(2):
            in_text.append(random)
            continue
        tree = tree if tree is not None else parse_yaml(SHIPPED[name], name).data
        change_tree(tree, random)
    text = SHIPPED[name] if tree is None else format_yaml(tree)
    for random in in_text:
        text = change_text(text, random)
    encoding = "utf-16" if changes and changes[-1].randrange(50) == 0 else "utf-8"
    return text.encode(encoding, errors="surrogatepass" if encoding == "utf-8" else "replace")


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in SHIPPED.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_experiments(try_many, folder):
    names = sorted(SHIPPED)

    def read(changes: list[Random]) -> bool:
        name = changes[0].choice(names) if changes else "quickstart.yaml"
        path = folder / f"changed_{name}"
        path.write_bytes(damage(name, changes))
        config = load_experiment(path)
        # What was accepted is written out in full and is the same experiment then.
        path.write_text(dump_experiment(config), encoding="utf-8")
        assert load_experiment(path) == config
        if config.sweep is not None:
            assert list_cells(config)
        return True

    assert try_many(read)["accepted"] > 0


def test_overrides(try_many, folder):
    tree = parse_yaml(SHIPPED["dlfer.yaml"], "dlfer.yaml").data
    keys = [".".join(map(str, place)) for place in list_places(tree) if place]

    def read(changes: list[Random]) -> bool:
        overrides = {}
        for random in changes:
            value = format_yaml(random.choice(VALUES)).strip()
            text = f"{random.choice(keys)}={value if random.randrange(2) else random.choice(TOKENS)}"
            key, overrides_value = parse_override(change_text(text, random) if random.randrange(4) == 0 else text)
            overrides[key] = overrides_value
        config = load_experiment(folder / "dlfer.yaml", overrides)
        path = folder / "changed.yaml"
        path.write_text(dump_experiment(config), encoding="utf-8")
        assert load_experiment(path) == config
        return True

    assert try_many(read)["accepted"] > 0
