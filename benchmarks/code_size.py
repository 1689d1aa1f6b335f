"""Statistics of the code: files, lines, modules with one importer, lengths of functions, and string keys in report/.

    python benchmarks/code_size.py [--list] [FOLDER]

FOLDER is the root of a clone (default: this one); use two worktrees to compare two commits. --list prints the modules
that exactly one other module imports, with their numbers of lines.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

MAX_LINES, MAX_PARAMETERS = 50, 7


def name_module(path: Path) -> str:
    """Return the dotted module name of a path, which is relative to the folder of the package."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def list_imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Yield the names of modules that a file imports, including imports in functions and by `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield getattr(node.args[0], "value", "")


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters without self and cls."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in given)


def is_string_key(node: ast.AST) -> bool:
    """Return whether a node has the form x["key"] or x.get("key")."""
    if isinstance(node, ast.Subscript):
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        key = node.args[0]
    else:
        return False
    return isinstance(key, ast.Constant) and isinstance(key.value, str)


def main() -> None:
    """Compute and print the statistics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    files = {name_module(path.relative_to(given.folder)): path for path in sorted(given.folder.glob("dlfer/**/*.py"))}
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    importers: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        for imported in list_imports(tree, set(files)):
            importers[imported].add(name)
    once = [name for name in files if len(importers[name] - {name}) == 1 and files[name].name != "__init__.py"]
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    functions = [node for _, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [function.end_lineno - function.lineno + 1 for function in functions]
    print(f"files                          {len(files)}")
    print(f"lines                          {sum(lines.values()):,}")
    print(f"modules with one importer      {len(once)}")
    print(
        f"string keys in report/         {sum(n.startswith('dlfer.report') and is_string_key(node) for n, node in nodes)}"
    )
    print(f"functions                      {len(functions):,}, median {statistics.median(lengths):.0f} lines")
    print(
        f"  of more than {MAX_LINES} lines         {sum(length > MAX_LINES for length in lengths) / len(lengths):.1%}"
    )
    print(
        f"  of more than {MAX_PARAMETERS} parameters     {sum(count_parameters(f) > MAX_PARAMETERS for f in functions)}"
    )
    if given.list:
        for name in sorted(once, key=lines.get):
            print(f"{lines[name]:5d} {name} <- {next(iter(importers[name] - {name}))}")


if __name__ == "__main__":
    main()
