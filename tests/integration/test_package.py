"""A wheel and a source distribution, and what an installed dlfer does far from a checkout."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from dlfer import __version__
from tests.integration.conftest import ROOT

PHOTO = ROOT / "docs" / "astronaut.jpg"
REPOSITORY = "https://example.org/owner/dlfer"
PACKAGED = ("faces_128", "faces_small")
"""The models in a wheel; the others are too large, and stay in the repository and the container images."""
MAX_BYTES = 50 * 2**20
"""Of a wheel or a source distribution; an index of packages takes 100 MB."""

pytestmark = pytest.mark.slow


def execute(*command, cwd, **given):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DLFER_HOME")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, **given},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    """An environment with the packages of the one that runs the tests, but not its dlfer."""
    place = tmp_path_factory.mktemp("venv")
    execute(sys.executable, "-m", "venv", place, cwd=place)
    [packages] = place.glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "packages_of_the_tests.pth").write_text("\n".join(seen) + "\n")
    return place


@pytest.fixture(scope="module")
def distributions(venv, tmp_path_factory) -> Path:
    """dist/ of this checkout as a release makes it: the wheel from the source distribution."""
    place = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    lines = (ROOT / "requirements-tools.txt").read_text().splitlines()
    tools = [line for line in lines if re.match(r"(build|twine)==", line)]
    execute(venv / "bin" / "python", "-m", "pip", "install", "--quiet", *tools, cwd=place)
    execute(venv / "bin" / "python", "-m", "build", cwd=place, DLFER_REPOSITORY=REPOSITORY)
    return place / "dist"


def test_both_are_complete_and_small(distributions, venv):
    [wheel], [source] = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    assert {wheel.name, source.name} == {f"dlfer-{__version__}-py3-none-any.whl", f"dlfer-{__version__}.tar.gz"}
    assert max(wheel.stat().st_size, source.stat().st_size) < MAX_BYTES
    print({path.name: f"{path.stat().st_size / 1e6:.1f} MB" for path in (wheel, source)})
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
        metadata = message_from_bytes(file.read(f"dlfer-{__version__}.dist-info/METADATA"))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dlfer").rglob("*.py")}
    shipped = {f"dlfer/experiments/{path.name}" for path in (ROOT / "experiments").iterdir()}
    model = {f"dlfer/{path.relative_to(ROOT)}" for name in PACKAGED for path in ROOT.glob(f"saved_models/{name}/*")}
    assert {"dlfer/py.typed", *modules, *shipped, *model} <= packed
    assert {name.split("/")[2] for name in packed if name.startswith("dlfer/saved_models/")} == set(PACKAGED)
    assert not [name for name in packed if not name.startswith(("dlfer/", f"dlfer-{__version__}.dist-info/"))]
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"setup.py", "requirements.txt", "LICENSE", "CHANGELOG.md", "saved_models/faces_128/network.onnx"} <= names
    assert not [name for name in names if name.startswith(("build/", "data/", "tests/", "saved_models/runs/"))]
    execute(venv / "bin" / "python", "-m", "twine", "check", "--strict", wheel, source, cwd=distributions)
    check_metadata(metadata)


def check_metadata(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The dlfer authors"
    assert {line.partition(", ")[0] for line in metadata.get_all("Project-URL")} >= {
        "Source",
        "Documentation",
        "Issues",
    }
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert {line.rpartition(" :: ")[2] for line in classifiers if ":: 3." in line} == {"3.11", "3.12", "3.13"}
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert any(line.startswith("tensorflow==") for line in metadata.get_all("Requires-Dist"))
    readme = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links
    assert all(link.startswith((f"{REPOSITORY}/", "https://", "#")) for link in links), links
    assert f"{REPOSITORY}/raw/HEAD/docs/astronaut_marked.jpg" in links
    for link in links:
        inside = re.fullmatch(rf"{REPOSITORY}/(?:raw|blob)/HEAD/([^#]*)(?:#.*)?", link)
        assert inside is None or (ROOT / inside[1]).exists(), link


@pytest.fixture(scope="module")
def installed(distributions, venv):
    """Return a function that runs the installed command, and the unrelated folder that it runs in."""
    [wheel] = distributions.glob("*.whl")
    place = distributions.parents[1] / "elsewhere"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    execute(venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=place)
    shutil.copyfile(PHOTO, place / "photo.jpg")

    def dlfer(*words):
        return execute(venv / "bin" / "dlfer", *words, cwd=place, DLFER_CACHE=place / "cache")

    dlfer.place = place
    where = execute(venv / "bin" / "python", "-c", "import dlfer; print(dlfer.__file__)", cwd=place)
    assert where.startswith(str(venv))
    return dlfer


def test_an_installed_dlfer_has_its_model_and_its_experiments(installed):
    rows = list(csv.DictReader(io.StringIO(installed("predict", "photo.jpg"))))
    assert [row["label"] for row in rows] == ["Happy"]
    assert "faces_128" in installed("show", "models")
    assert "experiment" in installed("show", "config", "faces_128")
    for name in ("quickstart", "experiments/quickstart.yaml"):
        installed("check", name)


def test_an_installed_dlfer_trains(installed):
    from PIL import Image

    for label, level in (("happy", 200), ("sad", 60)):
        (installed.place / "my_faces" / label).mkdir(parents=True)
        for number in range(10):
            image = Image.effect_noise((48, 48), 40 + number).point(lambda value, level=level: (value + level) // 2)
            image.save(installed.place / "my_faces" / label / f"{number}.png")
    installed("init", "my_faces")
    installed("check", "my_faces.yaml")
    installed("run", "my_faces.yaml", "--smoke", "--set", "model.backbone=resnet_nano", "--set", "pretrain=null")
    installed("run", "quickstart", "--smoke")
    runs = {path.parts[-3] for path in installed.place.glob("saved_models/runs/*/*/report.html")}
    assert runs == {"my_faces", "quickstart"}
