"""The run directory, which is created once and never overwritten, and whose files are written atomically.

<runs folder>/<experiment name>/<UTC stamp>-<digest>[-<kind of comparison>]/
    run.json      status, command, times, device, seed, digest, commit, package versions, error
    config.yaml   the full experiment
    log.jsonl     events, one JSON object per line
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer._version import __version__
from dlfer.config.names import find_checkout
from dlfer.errors import ConfigError, HeldError, ModelError
from dlfer.runs.files import explain_write_error, read_json, write_atomically
from dlfer.runs.records import DataRecord, RunRecord, to_json

if TYPE_CHECKING:
    from dlfer.config.schema import ExperimentConfig


def format_duration(seconds: float | None, *, is_estimate: bool = False) -> str:
    """Format a duration in its two largest units; an estimate has less precision: whole seconds, or whole minutes.

    Example:
        >>> [format_duration(seconds) for seconds in (4.25, 1085, 11220, None)]
        ['4.2 s', '18 min 05 s', '3 h 07 min', '–']
        >>> [format_duration(seconds, is_estimate=True) for seconds in (45.3, 1085, 11220)]
        ['45 s', '18 min', '3 h 07 min']
    """
    if seconds is None or math.isnan(seconds):
        return "–"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    if minutes:
        return f"{minutes} min" if is_estimate else f"{minutes} min {int(seconds % 60):02d} s"
    return f"{seconds:.0f} s" if is_estimate else f"{seconds:.1f} s"


PACKAGES = (
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "torch",
    "keras",
    "numpy",
    "scipy",
    "scikit-learn",
    "xgboost-cpu",
    "xgboost",
    "pillow",
    "tensorflow-datasets",
    "pydantic",
)


def describe_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def describe_checkout() -> dict[str, Any] | None:
    """Return the commit of dlfer's source and whether tracked files differ from it; None outside a checkout."""
    root = find_checkout()
    if root is None or not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changes = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def list_packages() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def format_utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


CONFIG_FILE, LOG_FILE, LOCK_FILE = "config.yaml", "log.jsonl", ".lock"
RUN_FILE, DATA_FILE = RunRecord.FILE, DataRecord.FILE


class Run:
    """An existing run directory, as returned by `create_run` and `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def record(self) -> RunRecord:
        """The current contents of run.json.

        Raises:
            ModelError: the file is absent or damaged.
        """
        return RunRecord.require(self.path)

    @property
    def status(self) -> str:
        """running, interrupted (its process is gone), stopped, failed or finished."""
        return self.record.present_status

    @property
    def kind(self) -> str:
        """run, ablation, sweep, search or cross_validation."""
        return self.record.kind

    @property
    def is_smoke(self) -> bool:
        """Whether it is a smoke run (--smoke)."""
        return self.record.smoke

    def config(self) -> ExperimentConfig:
        """Return the experiment as it was run."""
        from dlfer.config.load import load_recorded_experiment

        return load_recorded_experiment(self.path / CONFIG_FILE)

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to log.jsonl: the time in UTC, the event, and the fields."""
        left = (json.dumps(to_json({"time": format_utc_now(), "event": event, **fields})) + "\n").encode()
        with (self.path / LOG_FILE).open("a+b", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            if start:
                file.seek(start - 1)
                left = left if file.read(1) == b"\n" else b"\n" + left  # a killed process left part of a line
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                file.truncate(start)  # leave no partial line, which cannot be parsed
                raise explain_write_error(error, self.path / LOG_FILE) from error

    def update(self, **fields: Any) -> None:
        """Set fields of run.json; status="running" also records this process and clears the error and the end."""
        if fields.get("status") == "running":
            fields = {**describe_process(), "error": None, "finished": None, **fields}
        RunRecord.build({**self.record.as_json(), **fields}).write(self.path)

    def warn(self, text: str) -> None:
        """Record a warning for the report; a warning that is repeated when the run is resumed is recorded once."""
        warnings = self.record.warnings
        if text not in warnings:
            self.update(warnings=[*warnings, text])

    def finish(self, *, at: str | None = None) -> None:
        """Record that the run has finished, at the time `at` that its report already shows, or now."""
        self._end("finished", at, error=None)

    def fail(self, error: BaseException, *, at: str | None = None) -> None:
        """Record an error; if even that cannot be written, the run counts as interrupted."""
        with contextlib.suppress(OSError):
            self._end("failed", at, error=f"{type(error).__name__}: {error}")

    def stop(self, reason: str, *, at: str | None = None) -> None:
        """Record that the run was stopped at a checkpoint, and why."""
        self._end("stopped", at, error=None, reason=reason)

    def read_json(self, name: str) -> Any:
        """Return the parsed contents of a JSON file of the run.

        Raises:
            ModelError: the file is absent or damaged.
        """
        path = self.path / name
        try:
            return read_json(path)
        except FileNotFoundError:
            raise ModelError(f"{path}: there is no such file; the run did not come so far, or it is no run.") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: expected JSON: {error}.") from None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock of this run inside the block, so that no other process works on it.

        Raises:
            HeldError: another process holds the lock.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            record = self.record
            raise HeldError(
                f"{self.path}: another process works on it (process {record.pid} on {record.host}). "
                "Wait for its end, or stop it (Ctrl-C, or kill with its number) then continue it with --resume."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def is_held(self) -> bool:
        """Return whether a process holds the lock of this run now."""
        try:
            with self.hold():
                return False
        except HeldError:
            return True

    def _end(self, status: str, at: str | None, **fields: Any) -> None:
        self.update(status=status, finished=at or format_utc_now(), **fields)
        self.log(status, **{key: value for key, value in fields.items() if value is not None})


def create_run(folder: Path, config: ExperimentConfig, *, argv: list[str], kind: str = "run") -> Run:
    """Create a run directory for an experiment, and write its config.yaml and run.json.

    Args:
        folder: the folder of runs.
        argv: the command line.
        kind: "run", or the kind of comparison, which is appended to the directory's name.
    """
    from dlfer.config.load import compute_digest, dump_experiment

    digest = compute_digest(config)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{stamp}-{digest[:8]}" + ("" if kind == "run" else f"-{kind}")
    run = Run(_make_new_folder(Path(folder) / config.experiment.name, name))
    write_atomically(run.path / CONFIG_FILE, dump_experiment(config))
    values = {
        "status": "running",
        "kind": kind,
        "experiment": config.experiment.name,
        "argv": argv,
        "started": format_utc_now(),
        "finished": None,
        "error": None,
        "device": None,
        "seed": config.experiment.seed,
        "config_digest": digest,
        "settings": config.model_dump(mode="json"),
        "git": describe_checkout(),
        "dlfer": __version__,
        "python": platform.python_version(),
        "platform": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "packages": list_packages(),
        **describe_process(),
    }
    RunRecord.build(values).write(run.path)
    run.log("created", kind=kind)
    return run


def _make_new_folder(parent: Path, name: str) -> Path:
    for number in range(1, 1000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"{parent}: cannot create a run there ({error.strerror or error}); choose a folder by --out."
            ) from None
        return path
    raise ConfigError(f"{parent}: found a thousand runs named {name}; choose another folder by --out.")
