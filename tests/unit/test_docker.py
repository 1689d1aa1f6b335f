"""Dockerfile, .dockerignore and compose.yaml, as far as they can be read; deploy/check_image.sh really builds."""

import fnmatch
import re
from pathlib import Path

import pytest
import typer
import yaml

import dlfer
from dlfer.cli import app

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "builder",
    "builder-cpu",
    "package-source",
    "package-cpu",
    "runtime",
    "cpu",
    "builder-gpu",
    "package-gpu",
    "gpu",
)
Stages = dict[str, list[tuple[str, str]]]


def read_stages() -> Stages:
    """Return stage -> its instructions (FROM included) as pairs of name and argument; "" is what stands before."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    stages: Stages = {"": []}
    current = ""
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, argument = line.partition(" ")
        if name == "FROM":
            current = argument.split(" AS ")[1]
            stages[current] = []
        stages[current].append((name, re.sub(r"\s+", " ", argument).strip()))
    return stages


def get_all(stages: Stages, stage: str, instruction: str) -> list[str]:
    """Return the arguments of an instruction in a stage and in those that it is built on."""
    source = stages[stage][0][1].split(" AS ")[0]
    before = get_all(stages, source, instruction) if source in stages else []
    return before + [argument for name, argument in stages[stage] if name == instruction]


@pytest.fixture(scope="module")
def stages() -> Stages:
    return read_stages()


def test_stages_start_from_one_base_that_can_be_replaced(stages):
    assert tuple(stages)[1:] == STAGES
    assert stages[""] == [("ARG", "BASE_IMAGE=python:3.12-slim")]
    sources = {stage: lines[0][1].split(" AS ")[0] for stage, lines in stages.items() if stage}
    assert set(sources.values()) <= {"${BASE_IMAGE}", "builder", "package-source", "runtime"}


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_the_images_run_dlfer_under_tini_as_a_numbered_user(stages, stage):
    assert get_all(stages, stage, "ENTRYPOINT") == ['["tini", "--", "dlfer"]']
    assert re.fullmatch("[1-9][0-9]*", get_all(stages, stage, "USER")[-1])
    assert get_all(stages, stage, "STOPSIGNAL") == ["SIGTERM"]
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(get_all(stages, stage, "ENV"))))
    assert environment["DLFER_DATA"] == "/data"
    writable = re.search(r"install --directory --mode 1777 ([^&]*)", " ".join(get_all(stages, stage, "RUN")))[1].split()
    for name in ("HOME", "DLFER_CACHE", "KERAS_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        assert any(Path(environment[name]).is_relative_to(folder) for folder in writable), name
    # An unnamed volume would hide what the host mounts there, and be thrown away.
    assert not any("saved_models" in volumes for volumes in get_all(stages, stage, "VOLUME"))


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_packages_come_from_the_lock_file_with_their_hashes(stages, stage):
    (install,) = [line for line in get_all(stages, f"builder-{stage}", "RUN") if "pip install" in line]
    assert f"--require-hashes --requirement locks/{stage}.txt --requirement extras.txt" in install
    # dlfer itself, without what it requires, is the only other package.
    others = [line for lines in stages.values() for _, line in lines if "pip install" in line and "locks/" not in line]
    assert all("--no-deps" in line for line in others)
    assert f"--from=builder-{stage} /opt/venv /opt/venv" in get_all(stages, stage, "COPY")


def test_code_comes_after_what_is_installed(stages):
    for stage in ("builder-cpu", "builder-gpu"):
        assert get_all(stages, stage, "COPY") == ["locks locks"]
    for stage in ("cpu", "gpu"):
        copies = get_all(stages, stage, "COPY")
        assert copies[0].startswith(f"--from=builder-{stage} ")
        assert f"--from=package-{stage} /package /opt/venv" in copies[1:]
        build = {"cpu": "tensorflow-cpu", "gpu": '"tensorflow[and-cuda]"'}[stage]
        assert any(f"DLFER_TENSORFLOW={build} pip install" in run for run in get_all(stages, f"package-{stage}", "RUN"))


def test_labels_tell_the_version(stages):
    assert f"VERSION={dlfer.__version__}" in get_all(stages, "cpu", "ARG")
    labels = " ".join(get_all(stages, "cpu", "LABEL"))
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


def is_ignored(path: str) -> bool:
    """Return whether .dockerignore leaves a path out: the last pattern that it, or a folder above it, matches."""
    parts = path.split("/")
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        steps = pattern.split("/")
        if any(_match(parts[:length], steps) for length in range(1, len(parts) + 1)):
            ignored = not line.startswith("!")
    return ignored


def _match(parts: list[str], steps: list[str]) -> bool:
    if not steps:
        return not parts
    if steps[0] == "**":
        return any(_match(parts[start:], steps[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], steps[0]) and _match(parts[1:], steps[1:])


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".venv-jax/pyvenv.cfg",
        "build/image/storage",
        "data/fer2013/fer2013.csv",
        "dlfer/__pycache__/runs.cpython-312.pyc",
        "exports/onnx/model.onnx",
        "saved_models/runs/dlfer/run.json",
        "saved_models/runs/.cache/pretrain/backbone.weights.h5",
        "tests/unit/test_docker.py",
        "secrets.txt",
    ],
)
def test_the_builder_is_not_sent(path):
    assert is_ignored(path)


def test_the_builder_is_sent_what_the_dockerfile_copies_and_the_package_needs(stages):
    copied = [
        name
        for lines in stages.values()
        for instruction, argument in lines
        if instruction == "COPY" and not argument.startswith("--from")
        for name in argument.split()[:-1]
    ]
    assert {"dlfer", "experiments", "saved_models", "requirements.txt", "pyproject.toml", "locks"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert not is_ignored(name), name
    for path in (ROOT / "dlfer").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert not is_ignored(path.relative_to(ROOT).as_posix()), path
    assert not is_ignored("saved_models/lite2_96/network.weights.h5")


@pytest.fixture(scope="module")
def services() -> dict:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def parse(arguments: list[str]) -> dict:
    """Return what dlfer's own parser makes of a command line; it exits where a verb or an option is not known."""
    group = typer.main.get_command(app)
    verb = group.commands[arguments[0]]
    return verb.make_context(verb.name, list(arguments[1:])).params


def test_services_say_what_dlfer_understands(services):
    train, serve = (parse(services[name]["command"]) for name in ("train", "serve"))
    assert set(services) == {"prepare", "train", "tensorboard", "serve"}
    assert parse(services["prepare"]["command"])["file"] == train["file"]
    assert train["require_gpu"] is True
    assert train["file"] is not None
    assert (ROOT / str(train["file"]).lstrip("/")).is_file()  # ./experiments is /experiments there
    assert serve["host"] == "0.0.0.0"
    assert services["serve"]["ports"] == [f"127.0.0.1:{serve['port']}:{serve['port']}"]
    assert f":{serve['port']}/readyz" in services["serve"]["healthcheck"]["test"][-1]
    compile(services["serve"]["healthcheck"]["test"][-1], "healthcheck", "exec")
    with pytest.raises(Exception, match="No such option"):
        parse([*services["serve"]["command"], "--no-such"])


def test_services_are_of_the_images_and_have_their_folders(services, stages):
    for name, service in services.items():
        assert service["image"] == f"dlfer:{service['build']['target']}"
        assert service["build"]["target"] in stages
        mounted = dict(reversed(volume.split(":")[:2]) for volume in service["volumes"])
        assert mounted["/app/saved_models"] == "./saved_models", name
    assert "./data:/data:ro" in services["train"]["volumes"]
    # What is prepared for it is where it looks.
    assert "./data:/data" in services["prepare"]["volumes"]
    devices = services["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert services["tensorboard"]["entrypoint"][:2] == ["tini", "--"]
    assert services["tensorboard"]["command"][1] == "/app/saved_models/runs"


@pytest.mark.parametrize("file", ["docs/tutorials/serve.md", "compose.yaml"])
def test_commands_of_containers_are_what_dlfer_understands(file, services):
    text = (ROOT / file).read_text()
    # What a command does stands behind it, after a # or two blanks.
    lines = [re.split(r"\s#|\s{2,}", line.lstrip("# "))[0].strip() for line in text.splitlines()]
    runs = [match.groups() for line in lines if (match := re.fullmatch(r"docker compose run --rm (\w+)(.*)", line))]
    runs += [match.groups() for line in lines if (match := re.fullmatch(r"docker run .*dlfer:(\w+) (.*)", line))]
    assert {"prepare", "train"} <= {name for name, _ in runs}
    for name, arguments in runs:
        words = arguments.split() or services[name]["command"]
        file_given = str(parse(words).get("file")).lstrip("/")
        assert (ROOT / file_given).is_file(), (name, words)


def test_the_command_of_the_readme_is_understood():
    line = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "docker run" in line and "gpu" in line
    )
    options, _, arguments = line.partition(" dlfer:gpu ")
    assert parse(arguments.split())["require_gpu"] is True
    for mount in (
        '"$PWD/data:/data:ro"',
        '"$PWD/experiments:/experiments:ro"',
        '"$PWD/saved_models:/app/saved_models"',
    ):
        assert f"-v {mount}" in options
