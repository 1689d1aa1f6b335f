"""The commands, Python and YAML of README and of the site: each is executed as a reader would, or says why it cannot be here.

A comment before a block says how it is tested: nothing (executed in the fast suite), `slow` (in the slow suite), `server` and
`client` (in the slow suite, the server in the background), or `skip REASON`, a reason of REASONS that must hold for the block. The
blocks of a page are executed in order, in a folder with drawn images, a drawn FER2013 and the shipped experiments.
"""

import csv
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from dlfer.cli import app
from dlfer.config.load import load_experiment
from dlfer.predict.runtimes import EXTRAS, PACKAGES
from tests.integration.conftest import ROOT, dlfer, environment

REASONS = {
    "download": r"^(npm|tar|mkdir) |dlfer check experiments/mobilenet_faces",
    "install": r"^(make (install|install-predict|demo|test)\b|source )",
    "docker": r"^(docker |make docker-check$)",
    "gpu": r"--require-gpu|^dlfer prepare experiments/dlfer.yaml",
    "fer2013": r"^dlfer (run|ablate|search|crossval) (experiments/\S+\.yaml)",
    "minutes": r"^dlfer (ablate|search|run) (experiments/quickstart\.yaml|\S+/best\.yaml)",
    "camera": r" camera:0",
    "jax": r"^make jax$|^KERAS_BACKEND=jax ",
    "cluster": r"devices=|CUDA_VISIBLE_DEVICES|TF_CONFIG|--member|--collect|--storage|sweep",
    "weights": r"weights_file=",
    "trackers": r"experiment\.track=|^mlflow ui",
    "hub": r"--to-hub|hf://|^hf auth login",
    "file": r"^dlfer evaluate (\S+\.onnx |faces_128 --data data/fer2013/)",
    "run": r"RUN|SECRET|--max-hours",
}
"""Why a block is not executed -> what each of its commands must match, so that a reason cannot outlive its block."""

_BLOCK = re.compile(
    r"(?:<!-- test: (?P<how>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.M
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page; `how` is what the comment before it says, "" without one."""

    page: str
    language: str
    text: str
    how: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell, without comments and empty lines."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = [re.sub(r"\s+#\s.*", "", line).strip() for line in joined.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def read_blocks(path: Path) -> list[Block]:
    name = path.relative_to(ROOT).as_posix()
    found = _BLOCK.finditer(path.read_text())
    return [Block(name, m["language"], m["text"], m["how"] or "") for m in found]


PAGES = {
    path.relative_to(ROOT).as_posix(): read_blocks(path)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCKS = [block for blocks in PAGES.values() for block in blocks]
COMMANDS = [(block, command) for block in BLOCKS if block.language == "sh" for command in block.commands]
FAST = [page for page, blocks in PAGES.items() if any(b.how == "" and b.language in ("sh", "python") for b in blocks)]
FIRST_READ = ("README.md", "docs/get-started.md")
SLOW = [page for page, blocks in PAGES.items() if any(b.how in ("slow", "server") for b in blocks)]


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100, "the README has two screens; details belong to docs/"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_the_example_is_what_the_picture_shows(tmp_path):
    """One face, and the label and percentage that the README's picture and its text have."""
    pattern = r"her face, (\w+) (\d+) %\]\(docs/astronaut_marked.jpg\)"
    [label, percent] = re.search(pattern, (ROOT / "README.md").read_text()).groups()
    done = dlfer("predict", ROOT / "docs" / "astronaut.jpg", "--draw", tmp_path / "marked", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [row] = csv.DictReader(io.StringIO(done.stdout))
    assert row["label"] == label
    assert round(100 * float(row["confidence"])) == int(percent)
    assert (tmp_path / "marked" / "astronaut.jpg").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_and_a_known_way_of_being_tested(page):
    for block in PAGES[page]:
        assert block.language in ("sh", "python", "yaml", "text"), (page, block.text)
        assert block.how in ("", "slow", "server", "client") or block.how.startswith("skip "), block.how
        assert block.language in ("sh", "python") or not block.how, (page, block.how)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.how.startswith("skip ")], ids=lambda b: f"{b.page}:{b.how}")
def test_reason_for_skipping_holds(block):
    reason = block.how.removeprefix("skip ")
    assert reason in REASONS
    for command in block.commands:
        match = re.search(REASONS[reason], command)
        assert match, f"{command}: the reason {reason} does not hold for it"
        if reason == "fer2013":
            config = load_experiment(ROOT / match[2], {"pretrain.weights": "imagenet"})
            assert config.finetune.data.source == "fer2013", command


@pytest.mark.parametrize("command", sorted({c for _, c in COMMANDS if re.search(r"\bdlfer [a-z]", c)}))
def test_dlfer_takes_the_command(command):
    """Its parser reads the line, so that a verb or an option that was renamed fails here; nothing is executed."""
    words = shlex.split(command.rpartition(" | ")[2])
    words = words[words.index("dlfer") + 1 :]
    if "docker" in command:
        words = words[next(index for index, word in enumerate(words) if not word.startswith("-")) :]
    verb = typer.main.get_command(app).get_command(None, words[0])
    assert verb is not None, words[0]
    verb.make_context(verb.name, words[1:])


def test_makefile_has_every_target_that_is_named():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"`make ([a-z-]+)", text)) | {c.split()[1] for _, c in COMMANDS if c.startswith("make ")}
    assert {"install", "demo", "docs", "jax"} <= named
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert named <= targets | {f"extra-{name}" for name in extras}


def test_extras_that_are_named_are_groups_of_the_project():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = {*re.findall(r"`make extra-(\w+)`", text), *EXTRAS.values()}
    assert {"litert", "openvino", "parquet", "mtcnn"} <= named <= set(groups)
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    for package in PACKAGES.values():
        lines = groups[EXTRAS[package]] if package in EXTRAS else requirements
        assert any(line.startswith(f"{package}==") for line in lines), package


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b.page)
def test_yaml_is_part_of_an_experiment(block, tmp_path):
    file = tmp_path / "part.yaml"
    whole = "experiment" in yaml.safe_load(block.text)
    base = "" if whole else f"extends: {ROOT / 'experiments' / 'quickstart.yaml'}\nexperiment: {{name: part}}\n"
    if "source: folder" in block.text:
        base += "pretrain: null\n"
    file.write_text(base + block.text)
    load_experiment(file, {"finetune.data.num_images": {}} if "source: folder" in block.text else {})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder with what the pages talk about: class folders, a FER2013, photographs, a video, the experiments."""
    import cv2

    from dlfer.config.names import FER2013_LABELS
    from dlfer.data.synthetic.faces import draw_face

    place = tmp_path_factory.mktemp("drawn")
    faces = [draw_face(label, rng=np.random.default_rng(index)) for index in range(12) for label in FER2013_LABELS]
    rows = ["emotion,pixels,Usage"]
    for index, face in enumerate(faces):
        name, split = FER2013_LABELS[index % 7], ("Training", "Training", "PublicTest", "PrivateTest")[index // 7 % 4]
        rows.append(f"{index % 7},{' '.join(map(str, face.ravel()))},{split}")
        if name in ("Angry", "Happy", "Sad"):
            folder = place / "my_faces" / name.lower()
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(face).save(folder / f"{index:03}.png")
    (place / "data" / "fer2013").mkdir(parents=True)
    (place / "data" / "fer2013" / "fer2013.csv").write_text("\n".join(rows) + "\n")
    photo = ROOT / "docs" / "astronaut.jpg"
    for name in ("photo.jpg", "docs/astronaut.jpg", "holiday/beach.jpg", "scans/old/portrait.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(photo) as image:
            image.save(place / name)
    pixels = cv2.resize(cv2.imread(str(photo)), (256, 256))
    video = cv2.VideoWriter(str(place / "video.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (256, 256))
    for _ in range(6):
        video.write(pixels)
    video.release()
    shutil.copytree(ROOT / "experiments", place / "experiments")
    script = place / "bin" / "dlfer"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m dlfer "$@"\n')
    script.chmod(0o755)
    return place


@pytest.fixture(scope="module")
def trained(drawn) -> Path:
    """The folder with a run of the experiment that dlfer init writes, trained for three epochs."""
    settings = ["model.backbone=resnet_nano", "pretrain=null", "finetune.epochs=3", "experiment.name=my_faces"]
    options = " ".join(f"--set {setting}" for setting in settings)
    execute(drawn, "sh", f"dlfer init my_faces --out first.yaml && dlfer run first.yaml {options}")
    return drawn


def execute(place: Path, language: str, text: str, *, port: int | None = None) -> str:
    """Execute a block in a folder and return what it printed; RUN is the newest run of its experiment."""

    def fill(match: re.Match[str]) -> str:
        runs = sorted((place / match[1]).iterdir(), key=lambda run: run.stat().st_mtime)
        return f"{match[1]}/{runs[-1].name}"

    text = re.sub(r"(saved_models/runs/\w+)/RUN\b", fill, text)
    if port is not None:
        text = text.replace("localhost:8000", f"127.0.0.1:{port}").replace(
            "curl ", "curl --fail --silent --show-error "
        )
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(
        command, cwd=place, env=_environment(place), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _environment(place: Path) -> dict[str, str]:
    return environment(
        PATH=f"{place / 'bin'}:{os.environ['PATH']}",
        DLFER_HOME=str(ROOT),
        DLFER_DATA=str(place / "data"),
        DLFER_CACHE=str(place / "cache"),
    )


def execute_page(page: str, place: Path, ways: tuple[str, ...]) -> None:
    """Execute the blocks of a page whose way of being tested is one of `ways`; blocks of Python in a row share their names."""
    server, port, python = None, _find_port(), ""
    try:
        for block in PAGES[page]:
            if block.how not in ways or block.language not in ("sh", "python"):
                continue
            if block.language == "python":
                python += block.text
                continue
            if python:
                execute(place, "python", python)
                python = ""
            if block.how == "server":
                command = [sys.executable, "-m", "dlfer", *shlex.split(block.text)[1:], "--port", str(port)]
                server = subprocess.Popen(command, cwd=place, env=_environment(place))
                _wait_until_ready(server, port)
            else:
                execute(place, "sh", block.text, port=port if block.how == "client" else None)
        if python:
            execute(place, "python", python)
    finally:
        if server is not None:
            server.terminate()
            server.wait(60)


def _find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_until_ready(server: subprocess.Popen, port: int) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the server is not ready after five minutes")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page in FIRST_READ else pytest.mark.slow) for page in FAST]
)
def test_light_blocks_run(page, drawn, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(drawn, place)
    execute_page(page, place, ("",))


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_all_blocks_run(page, trained, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(trained, place)
    execute_page(page, place, ("", "slow", "server", "client"))
