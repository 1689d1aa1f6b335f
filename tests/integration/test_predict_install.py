"""predict and serve with the packages of requirements-predict.txt alone, without TensorFlow."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACE = ROOT / "docs" / "astronaut.jpg"

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from dlfer.cli import main
main(sys.argv[1:])
"""
IMPORTS = {"scikit-learn": "sklearn", "keras-tuner": "keras_tuner", "xgboost-cpu": "xgboost"}


def read_names(file):
    lines = (ROOT / file).read_text().splitlines()
    return {line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")}


def list_absent():
    """Return what is imported of the packages that requirements-predict.txt leaves out."""
    left_out = read_names("requirements.txt") - read_names("requirements-predict.txt")
    packages = {line.partition("==")[0] for line in left_out} | {"tensorflow"}
    return {IMPORTS.get(package, package.replace("-", "_")) for package in packages} | {"h5py", "mtcnn"}


def run_without(*args, cwd):
    code = BLOCKED.format(names=sorted(list_absent()))
    environment = {**os.environ, "DLFER_HOME": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_its_lines_are_lines_of_the_requirements():
    assert read_names("requirements-predict.txt") <= read_names("requirements.txt")
    assert {"tensorflow", "keras", "scipy", "matplotlib"} <= list_absent()


def check_prediction(done):
    assert done.returncode == 0, done.stderr
    [row] = csv.DictReader(io.StringIO(done.stdout))
    [(label, percent)] = re.findall(r"her face, (\w+) (\d+) %", (ROOT / "README.md").read_text())
    assert row["label"] == label
    assert round(100 * float(row["confidence"])) == int(percent)


def test_a_photograph_is_predicted_without_the_other_packages(tmp_path):
    check_prediction(run_without("predict", FACE, "--draw", tmp_path / "marked", cwd=tmp_path))
    for command in (
        ["show", "models"],
        ["show", "config", ROOT / "experiments" / "quickstart.yaml"],
        ["predict", "--help"],
    ):
        done = run_without(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["predict", FACE, "--engine", "keras"], ["explain", FACE], ["export", "lite2_96"]])
def test_what_needs_the_framework_names_it(command, tmp_path):
    done = run_without(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"dlfer: this command needs the package .* \w+, which is not installed in .*\n", done.stderr)


@pytest.mark.slow
def test_in_an_environment_of_its_own(tmp_path):
    """As `make install-predict` makes it."""
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", tmp_path / "venv"],
        [*pip, "--require-hashes", "--requirement", ROOT / "locks" / "predict.txt"],
        [*pip, "--no-deps", ROOT],
    ):
        subprocess.run(command, check=True, timeout=900)
    command = [python, "-m", "dlfer", "predict", FACE]
    environment = {**os.environ, "DLFER_HOME": str(ROOT)}
    environment.pop("PYTHONPATH", None)
    check_prediction(
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    )
