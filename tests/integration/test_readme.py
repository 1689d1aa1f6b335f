"""The README's commands: each is one that dlfer takes, and the light ones are run as they stand."""

import csv
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from dlfer.predict.runtimes import EXTRAS, PACKAGES
from tests.integration.conftest import ROOT, dlfer

README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
LIGHT = [command for command in COMMANDS if command[:2] in (["dlfer", "check"], ["dlfer", "show"])]


def test_readme_has_the_two_commands_and_the_picture():
    assert ["make", "demo"] in COMMANDS
    assert ["make", "test"] in COMMANDS
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_makefile_has_every_target_of_the_readme():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in COMMANDS:
        if command[0] == "make":
            assert command[1] in targets


def test_extras_that_are_named_are_groups_of_the_project():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {*re.findall(r"`make extra-(\w+)`", README), *EXTRAS.values()}
    assert named >= {"litert", "openvino", "parquet", "mtcnn"}
    assert named <= set(groups)
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    for package in PACKAGES.values():
        lines = groups[EXTRAS[package]] if package in EXTRAS else requirements
        assert any(line.startswith(f"{package}==") for line in lines), package


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "dlfer"], ids=" ".join)
def test_verb_takes_these_options(command):
    """Click parses the line, so a renamed verb or option fails here; nothing is executed."""
    import typer

    from dlfer.cli import app

    group = typer.main.get_command(app)
    verb = group.get_command(None, command[1])
    assert verb is not None, command[1]
    known = {option for parameter in getattr(verb, "params", []) for option in parameter.opts}
    if not hasattr(verb, "commands"):
        assert {word for word in command[2:] if word.startswith("--")} <= known


@pytest.mark.parametrize("command", LIGHT, ids=" ".join)
def test_light_command_runs(command):
    done = dlfer(*command[1:], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_example_is_what_the_picture_shows(tmp_path):
    """One face, and the label and percentage that the README's picture and its text have."""
    [label, percent] = re.search(r"her face, (\w+) (\d+) %\]\(docs/astronaut_marked.jpg\)", README).groups()
    done = dlfer("predict", ROOT / "docs" / "astronaut.jpg", "--draw", tmp_path / "marked", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [row] = csv.DictReader(io.StringIO(done.stdout))
    assert row["label"] == label
    assert round(100 * float(row["confidence"])) == int(percent)
    assert (tmp_path / "marked" / "astronaut.jpg").is_file()


def test_doctor_runs(tmp_path):
    done = dlfer("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_init_runs_on_class_folders(tmp_path):
    import numpy as np
    from PIL import Image

    for label in ("angry", "happy", "sad"):
        folder = tmp_path / "my_faces" / label
        folder.mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 256, (40, 40)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    done = dlfer("init", "my_faces", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [path for path in Path(tmp_path).rglob("*.yaml")]
    assert len(written) == 1
    assert dlfer("check", written[0], cwd=tmp_path).returncode == 0
