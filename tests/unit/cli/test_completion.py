"""What the shell completes: verbs, options, experiments, models, runs and data, without loading what computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dlfer.cli.options import complete_data, complete_experiments, complete_models, complete_runs, complete_shown


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    for name in ("a.yaml", "notes.txt", "fer.csv", "faces.zip", "faces.npz", ".hidden.yaml", "experiments/b.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "faces").mkdir()
    for name in ("saved_models/mine/artifact.json", "saved_models/runs/small/20260101T0-a/run.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_names_of_what_is_there(work):
    assert complete_experiments("a") == ["a.yaml"]
    assert complete_experiments("experiments/") == ["experiments/b.yaml"]
    assert "experiments/b.yaml" in complete_experiments("")
    assert not [name for name in complete_experiments("") if name == "lite2.yaml"]  # those of the folder are meant
    (work / "experiments" / "b.yaml").unlink()
    assert "lite2.yaml" in complete_experiments("")  # one that comes with dlfer
    assert complete_data("fa") == ["faces/", "faces.npz", "faces.zip"]
    assert complete_data("fer") == ["fer.csv"]
    assert complete_data("nowhere/") == []
    assert complete_models("mi") == ["mine"]
    assert complete_models("sm") == ["small/20260101T0-a"]
    assert complete_runs("small") == ["small/20260101T0-a"]
    assert complete_shown("s") == ["sources", "schema", "small/20260101T0-a"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dlfer ev", "evaluate"),
        ("dlfer run a", "a.yaml"),
        ("dlfer run --max", "--max-hours"),
        ("dlfer evaluate mi", "mine"),
        ("dlfer predict x.jpg --model mi", "mine"),
        ("dlfer run --resume small", "small/20260101T0-a"),
        ("dlfer evaluate mine --data fer", "fer.csv"),
        ("dlfer show mod", "models"),
    ],
)
def test_the_shell_is_answered(work, words, expected):
    """In a process of its own, which tells what it loaded. (Typer itself loads pydantic.)"""
    code = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})), file=sys.stderr))\n"
        "from dlfer.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=work,
        check=False,
        env={
            "PYTHONPATH": ":".join(sys.path),
            "PATH": "/usr/bin:/bin",
            "_DLFER_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
    )
    assert expected in done.stdout.split(), done.stderr
    loaded = json.loads(done.stderr.strip().splitlines()[-1])
    assert not {"numpy", "yaml", "tensorflow", "keras", "onnxruntime", "PIL"} & set(loaded)
