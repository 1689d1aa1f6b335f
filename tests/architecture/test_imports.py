"""The order of imports, and what may never be loaded or written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dlfer"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each may import only from itself and from what stands before it.
ORDER = (
    "_version",
    "errors",
    "quiet",
    "config",
    "runs",
    "metrics",
    "data",
    "model",
    "train",
    "report",
    "predict",
    "explain",
    "export",
    "serve",
    "experiment",
    "study",
    "api",
    "cli",
    "__main__",
)
FRAMEWORKS = {"tensorflow", "keras", "torch", "jax"}


def get_layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def get_rank(layer: str) -> int:
    return ORDER.index(layer)


def list_imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import of a file, those inside functions and importlib's included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from dlfer import runs` names a module; `from dlfer.runs import Run` does not.
            found += [(node.lineno, f"{base}.{alias.name}" if base == "dlfer" else base) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return found


def test_there_is_something_to_look_at():
    assert len(MODULES) > 20
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert found == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        layer = "_version"  # the public names are resolved lazily: nothing else may be loaded
    wrong = []
    for line, module in list_imports(path):
        if module.startswith("."):
            wrong.append(f"line {line}: {module} is relative; write dlfer. out")
        if module.split(".")[0] != "dlfer" or module == "dlfer.__version__":
            continue
        target = get_layer(module)
        if target != layer and get_rank(target) >= get_rank(layer):
            wrong.append(f"line {line}: {layer} imports {module}, which stands to its right")
    assert wrong == []


def list_edges() -> dict[str, set[str]]:
    """Return what each module of dlfer imports of dlfer, imports inside functions included."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
        # A package is in the way to each of its modules, and is no user of theirs.
        edges[module] = {
            name for name in found if name in names and name != module and not module.startswith(f"{name}.")
        }
    return edges


def find_circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Return the modules of one circle of imports in order, or None where there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(edges.get(module, ())):
            circle = follow(target, [*path, module])
            if circle:
                return circle
        done.add(module)
        return None

    for module in sorted(edges):
        circle = follow(module, [])
        if circle:
            return circle
    return None


def test_no_file_imports_itself_through_others():
    assert find_circle(list_edges()) is None


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("package", ["metrics", "report", "config"])
def test_scores_reports_and_configs_know_no_framework(package):
    wrong = [
        f"{path.relative_to(ROOT)} line {line}: {module}"
        for path in sorted((PACKAGE / package).rglob("*.py"))
        for line, module in list_imports(path)
        if module.split(".")[0] in FRAMEWORKS
    ]
    assert wrong == []


def test_models_and_training_use_keras_alone():
    """tensorflow is imported where tfds streams and where models are exported, and for the devices.

    In a model it is only for a kernel or a compiled function of its own, which falls back on Keras for other backends.
    """
    kernels = {f"dlfer/model/{name}.py" for name in ("training_kernels", "predict")}
    wrong = [
        f"{path.relative_to(ROOT)} line {line}: {module}"
        for path in MODULES
        for line, module in list_imports(path)
        if module.split(".")[0] == "tensorflow" and path.relative_to(PACKAGE).parts[0] == "model"
        if str(path.relative_to(ROOT)) not in kernels
    ]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_and_no_silent_except_in_the_source(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            wrong.append(f"line {node.lineno}: assert")
        is_broad = isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        )
        if is_broad and all(isinstance(statement, ast.Pass) for statement in node.body):
            wrong.append(f"line {node.lineno}: an exception is swallowed")
    assert wrong == []


HEAVY = [*sorted(FRAMEWORKS), "tensorflow_datasets", "matplotlib", "pandas", "sklearn", "scipy"]
PROBE = """
import json, sys
from dlfer.cli import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(json.dumps({"code": code, "modules": sorted({name.split(".")[0] for name in sys.modules})}), file=sys.stderr)
"""


def load(folder: Path, *args: str) -> tuple[int, set[str]]:
    """Run the command in a process of its own; return its exit code and the top-level modules it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *args],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    answer = json.loads(done.stderr.strip().splitlines()[-1])
    return answer["code"] or 0, set(answer["modules"])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_is_read_and_written_in_utf8_whatever_the_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    text = [node for node in calls if getattr(node.func, "attr", "") in ("read_text", "write_text")]
    assert not [node.lineno for node in text if "encoding" not in [word.arg for word in node.keywords]]


def test_help_loads_next_to_nothing(tmp_path):
    code, modules = load(tmp_path, "--help")
    assert code == 0
    assert modules.isdisjoint([*HEAVY, "pydantic", "yaml", "numpy", "PIL"])


@pytest.mark.parametrize(
    "args",
    [
        ("check", "a.yaml"),
        ("show", "config", "a.yaml"),
        ("show", "runs"),
        ("show", "schema", "--json"),
        ("show", "backbones"),
        ("show", "sources"),
        ("show", "models"),
        ("init", "images", "--out", "b.yaml"),
        ("run", "none.yaml"),
        ("report", "none"),
        ("export", "none"),
        ("explain", "none", "--model", "none"),
    ],
    ids=" ".join,
)
def test_light_verbs_load_no_framework(tmp_path, args):
    (tmp_path / "a.yaml").write_text("experiment: {name: a}\nfinetune: {data: {source: synthetic_faces}}\n")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.pgm").write_bytes(b"P5 8 8 255\n" + bytes(64))
    code, modules = load(tmp_path, *args)
    assert code == (2 if args[1] in ("none.yaml", "none") else 0)
    assert modules.isdisjoint([*sorted(FRAMEWORKS), "tensorflow_datasets", "pandas", "sklearn"])


def test_a_model_with_its_onnx_file_is_evaluated_without_a_framework(tmp_path):
    for name in ("Happy", "Sad"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.pgm").write_bytes(b"P5 48 48 255\n" + bytes(48 * 48))
    code, modules = load(tmp_path, "evaluate", "lite2_96", "--data", "images")
    assert code == 0
    assert modules.isdisjoint([*sorted(FRAMEWORKS), "pandas", "sklearn", "matplotlib"])


def test_evaluate_and_report_load_without_a_framework(tmp_path):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("metrics", "report")
        for path in sorted((PACKAGE / package).glob("[a-z]*.py"))
    ]
    code = f"import sys, {', '.join(modules)}\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert FRAMEWORKS.isdisjoint(done.stdout.split())
