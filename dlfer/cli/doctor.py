"""The `dlfer doctor` command: check what this machine has and lacks for training, and suggest fixes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from dlfer.cli.options import print_text
from dlfer.errors import ConfigError, shorten
from dlfer.runs.machine import count_cores, get_memory_bytes, read_cgroup_limits

OLDEST_PYTHON, FIRST_PYTHON_TOO_NEW = (3, 11), (3, 14)
MIN_DISK_GB, MIN_MEMORY_GB = 2, 4
BACKENDS = ("tensorflow", "jax", "torch")
TENSORFLOWS = ("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-macos")
"""Package names of the TensorFlow builds, any one of which is enough."""
_INSTALL_FIX = "make install; outside of a clone: pip install --require-hashes -r locks/cpu.txt (or locks/gpu.txt)"
_PROBE = """
import json, keras
backend = keras.backend.backend()
if backend == "tensorflow":
    import tensorflow as tf
    gpus = [tf.config.experimental.get_device_details(d).get("device_name", d.name)
            for d in tf.config.list_physical_devices("GPU")]
    version = tf.__version__
elif backend == "jax":
    import jax
    gpus = [d.device_kind for d in jax.devices() if d.platform in ("gpu", "cuda", "rocm")]
    version = jax.__version__
else:
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    version = torch.__version__
print(json.dumps({"backend": backend, "version": version, "keras": keras.__version__, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: "ok"; "note" (works, but worth knowing); "missing" (training is not possible).
        text: what was found.
        mend: how to fix it; "" if there is nothing to fix.
    """

    name: str
    status: Literal["ok", "note", "missing"]
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8}{self.name}: {self.text}" + (f"\n        -> {self.mend}" if self.mend else "")


def examine() -> Iterator[Finding]:
    """Yield the findings of all checks; the one that loads the backend comes last, because it takes some seconds."""
    yield examine_python(sys.version_info[:2])
    yield from examine_packages(list_pins())
    yield check_dependencies()
    yield examine_memory()
    yield examine_container()
    yield examine_disk(Path())
    yield examine_data()
    yield from examine_backend()


def examine_python(version: tuple[int, int]) -> Finding:
    """Check that TensorFlow has wheels for this version of Python."""
    found = ".".join(map(str, version))
    if OLDEST_PYTHON <= version < FIRST_PYTHON_TOO_NEW:
        return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    return Finding(
        "python", "missing", f"found {found}, expected 3.11 to 3.13", "create the environment with another Python"
    )


def list_pins() -> dict[str, str]:
    """Return package -> pinned version ("" if not exact), from requirements.txt of the checkout or from metadata."""
    from packaging.requirements import InvalidRequirement, Requirement

    from dlfer.runs.run import find_checkout

    checkout = find_checkout()
    path = checkout / "requirements.txt" if checkout else None
    if path is not None and path.is_file():
        lines = [line.partition(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        try:
            lines = importlib.metadata.requires("dlfer") or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
    pins = {}
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            exact = [item.version for item in requirement.specifier if item.operator == "=="]
            pins["tensorflow" if requirement.name in TENSORFLOWS else requirement.name] = exact[0] if exact else ""
    return pins


def examine_packages(pins: dict[str, str]) -> Iterator[Finding]:
    """Yield findings on packages that are absent or of another version than pinned, or a single one if all match."""
    backend = get_backend()
    absent, other = [], []
    for name, pinned in pins.items():
        if name == "tensorflow" and backend != "tensorflow":
            continue
        builds = TENSORFLOWS if name == "tensorflow" else (name,)
        found = next((version for version in map(_get_version, builds) if version), None)
        if found is None:
            absent.append(name)
        elif pinned and found != pinned:
            other.append(f"{name} {found} (pinned {pinned})")
    if absent:
        yield Finding("packages", "missing", f"not installed: {', '.join(absent)}", _INSTALL_FIX)
    if other:
        yield Finding("packages", "note", f"other versions: {', '.join(other)}", _INSTALL_FIX)
    if not absent and not other:
        text = f"{len(pins)} as pinned" if pins else "found no list of requirements to compare with"
        yield Finding("packages", "ok" if pins else "note", text)


def check_dependencies() -> Finding:
    """Check by `pip check` that the installed packages satisfy each other's requirements."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding("pip check", "note", "gave no answer within two minutes")
    if done.returncode == 0:
        return Finding("pip check", "ok", "no broken requirements")
    if "No module named pip" in done.stderr:
        return Finding("pip check", "note", "pip is not installed in this environment")
    lines = [line for line in done.stdout.splitlines() if line.strip()] or done.stderr.strip().splitlines()[-1:]
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return Finding("pip check", "note", f"{'; '.join(lines[:3])}{more}", _INSTALL_FIX)


def examine_container() -> Finding:
    """Return the memory and CPU limits that control groups, and thereby containers, set for this process."""
    limits = read_cgroup_limits()
    if limits.version is None:
        return Finding("container", "ok", "this system has no control groups")
    memory = "no memory limit" if limits.memory_bytes is None else f"{limits.memory_bytes / 1e9:.1f} GB of memory"
    cpus = "no CPU limit" if limits.cpus is None else f"{limits.cpus:g} CPUs"
    return Finding("container", "ok", f"{memory}, {cpus} (cgroup v{limits.version})")


def examine_memory() -> Finding:
    """Check the memory available to a process, within the limit of a container."""
    available, cores = get_memory_bytes(), count_cores()
    if available is None:
        return Finding("memory", "note", f"size unknown; {cores} cores")
    text = f"{available / 1e9:.1f} GB, {cores} cores"
    if available < MIN_MEMORY_GB * 1e9:
        mend = "use a smaller image_size or batch_size: EfficientNet-B3 at 224 px with batch 32 takes about 8 GB"
        return Finding("memory", "note", text, mend)
    return Finding("memory", "ok", text)


def examine_disk(folder: Path) -> Finding:
    """Check that a folder is writable and has enough free disk space for a run."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", "missing", f"{folder.resolve()} is not writable", "work in another folder, or use --out DIR"
        )
    if free < MIN_DISK_GB * 1e9:
        return Finding(
            "disk", "note", text, "a run of EfficientNet-B3 takes about 1 GB; use --out DIR on a larger disk"
        )
    return Finding("disk", "ok", text)


def examine_data() -> Finding:
    """List the contents of the folder of data sets, DLFER_DATA."""
    from dlfer.config.load import resolve_path

    try:
        folder = resolve_path("${DLFER_DATA}")
    except ConfigError as error:
        return Finding("data", "note", str(error))
    if not folder.is_dir():
        mend = "set DLFER_DATA, or use experiments/quickstart.yaml, which draws its own images"
        return Finding("data", "note", f"found no folder {folder}", mend)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return Finding("data", "ok", f"{folder}: {', '.join(names[:10]) or 'empty'}{' ...' if len(names) > 10 else ''}")


def examine_backend() -> Iterator[Finding]:
    """Yield findings on the backend of Keras and its GPUs, queried in a subprocess."""
    backend = get_backend()
    if backend not in BACKENDS:
        yield Finding("backend", "missing", f"KERAS_BACKEND is {backend!r}", f"expected one of {', '.join(BACKENDS)}")
        return
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        answer = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        yield Finding("backend", "missing", f"{backend} did not respond ({type(error).__name__})", "install it again")
        return
    if answer is None:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        mend = f"pip install {'tensorflow-cpu' if backend == 'tensorflow' else backend}, or make install"
        yield Finding("backend", "missing", f"{backend} cannot be imported: {shorten(last)}", mend)
        return
    yield Finding("backend", "ok", f"{answer['backend']} {answer['version']}, keras {answer['keras']}")
    yield examine_gpus(answer["gpus"], has_driver=has_nvidia_driver(), backend=backend)


def examine_gpus(gpus: list[str], *, has_driver: bool, backend: str) -> Finding:
    """List the GPUs that the backend sees; an installed driver without a visible GPU is the most frequent problem."""
    if gpus:
        return Finding("gpu", "ok", ", ".join(gpus))
    if not has_driver:
        return Finding("gpu", "note", "none; training runs on the CPU")
    package = {"tensorflow": "tensorflow[and-cuda]", "jax": "jax[cuda12]"}.get(backend, "torch")
    mend = (
        f'pip install "{package}" of the pinned version; in a container start it with --gpus all; or see make install'
    )
    return Finding("gpu", "note", f"an NVIDIA driver is installed, but {backend} sees no GPU", mend)


def get_backend() -> str:
    """Return the backend that Keras will use: KERAS_BACKEND, else that of keras.json, else TensorFlow."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"))
    try:
        return json.loads((home / "keras.json").read_text(encoding="utf-8"))["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


def has_nvidia_driver() -> bool:
    """Return whether the kernel has an NVIDIA driver, or nvidia-smi is installed."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _get_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def doctor() -> None:
    """Check Python, packages, GPU, data, disk and memory, and suggest how to fix problems."""
    num_missing = 0
    for finding in examine():
        print_text(finding)
        num_missing += finding.status == "missing"
    if num_missing:
        raise typer.Exit(1)
