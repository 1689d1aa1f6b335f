"""The run directory: made once, never overwritten, every file whole or absent.

<runs folder>/<experiment name>/<UTC stamp>-<digest>[-ablation]/
    run.json      status, command, times, device, seed, digest, commit, package versions, error
    config.yaml   the experiment in full
    log.jsonl     what happened, one JSON object a line
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlfer._version import __version__
from dlfer.errors import ConfigError, ModelError
from dlfer.files.json_file import read_json

if TYPE_CHECKING:
    from dlfer.config.schema import ExperimentConfig

RUN_FILE, CONFIG_FILE, LOG_FILE, LOCK_FILE = "run.json", "config.yaml", "log.jsonl", ".lock"
METRICS_FILE = "metrics.json"
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
_MAX_LISTED = 15


@dataclass(frozen=True)
class RunOptions:
    """What `dlfer run` and `dlfer ablate` take besides the experiment.

    Attributes:
        overrides: dotted key -> value, from --set.
        out: the folder of runs; None: saved_models/runs.
        smoke: two batches of at most eight images in every phase.
        dry_run: explain what would be done, and stop.
        require_gpu: refuse to run without a GPU.
        max_hours: stop cleanly at a checkpoint after so long.
        use_cache: take EF-FER1 from the cache if it was trained before.
        judge_test: judge the model on the test part at the end; a search's trials leave it closed.
        argv: the command, recorded in run.json.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    smoke: bool = False
    dry_run: bool = False
    require_gpu: bool = False
    max_hours: float | None = None
    use_cache: bool = True
    judge_test: bool = True
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """One line of `dlfer show runs`.

    Attributes:
        name: path under the folder of runs, <experiment>/<stamp>-<digest>.
        path: its folder.
        kind: "run", "ablation", "sweep" or "search".
        status: running, interrupted, stopped, failed, finished.
        started: UTC, ISO 8601.
        error: the first line of what went wrong, or None.
    """

    name: str
    path: Path
    kind: str
    status: str
    started: str
    error: str | None


class Run:
    """A run directory that exists; make one by `create_run`, find one by `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def status(self) -> str:
        """running, interrupted (its process is gone), stopped, failed or finished."""
        return _tell_status(self.read_json(RUN_FILE))

    @property
    def kind(self) -> str:
        """run, ablation, sweep or search."""
        return self.read_json(RUN_FILE).get("kind", "run")

    @property
    def is_smoke(self) -> bool:
        """Whether it was made by --smoke."""
        return bool(self.read_json(RUN_FILE).get("smoke", False))

    def config(self) -> ExperimentConfig:
        """Return the experiment as it was run."""
        from dlfer.config.load import load_experiment

        return load_experiment(self.path / CONFIG_FILE, check_search=False)

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to log.jsonl: the time in UTC, the event, and the fields."""
        line = json.dumps(_to_json({"time": _now(), "event": event, **fields})) + "\n"
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(line)

    def update(self, **fields: Any) -> None:
        """Set fields of run.json; status="running" also records the process that goes on with it."""
        if fields.get("status") == "running":
            fields = {**_describe_process(), "error": None, "finished": None, **fields}
        self.write_json(RUN_FILE, {**self.read_json(RUN_FILE), **fields})

    def finish(self) -> None:
        """Record that everything was done."""
        self._end("finished", error=None)

    def fail(self, error: BaseException) -> None:
        """Record what went wrong."""
        self._end("failed", error=f"{type(error).__name__}: {error}")

    def stop(self, reason: str) -> None:
        """Record that it stands at a checkpoint, and what asked for the stop."""
        self._end("stopped", error=None, reason=reason)

    def write_json(self, name: str, values: Mapping[str, Any] | list[Any]) -> None:
        """Write a file of the run as JSON; numpy's numbers become plain ones, NaN and infinity null."""
        write_atomically(self.path / name, json.dumps(_to_json(values), indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Return the contents of a JSON file of the run.

        Raises:
            ModelError: it is not there or damaged.
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
        """Keep every other process from working on this run while inside.

        Raises:
            ModelError: another process works on it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            values = self.read_json(RUN_FILE)
            raise ModelError(
                f"{self.path}: another process works on it (process {values.get('pid')} on {values.get('host')}). "
                "Wait for its end, or stop it (Ctrl-C, or kill with its number) and go on with --resume then."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def is_held(self) -> bool:
        """Tell whether a process works on this run now."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _end(self, status: str, **fields: Any) -> None:
        self.update(status=status, finished=_now(), **fields)
        self.log(status, **{key: value for key, value in fields.items() if value is not None})


def default_runs_folder() -> Path:
    """Return the folder of runs where --out does not say otherwise."""
    return Path("saved_models/runs")


def create_run(folder: Path, config: ExperimentConfig, *, argv: list[str], kind: str = "run") -> Run:
    """Make a new run directory for an experiment and describe it in config.yaml and run.json.

    Args:
        folder: the folder of runs.
        argv: the command that asked for it.
        kind: "run", or the kind of comparison, which then ends the directory's name.
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
        "started": _now(),
        "finished": None,
        "error": None,
        "device": None,
        "seed": config.experiment.seed,
        "config_digest": digest,
        "git": _describe_checkout(),
        "dlfer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _list_packages(),
        **_describe_process(),
    }
    run.write_json(RUN_FILE, values)
    run.log("created", kind=kind)
    return run


def open_run(name: Path | str, folder: Path | None = None) -> Run:
    """Return the run at a path, or the one whose name under the folder of runs begins with `name`.

    Raises:
        ModelError: none, or more than one; with the names there are.

    Example:
        >>> open_run("quickstart/20261121T0930")
    """
    path = Path(name)
    if (path / RUN_FILE).is_file():
        return Run(path)
    if path.name in (RUN_FILE, CONFIG_FILE) and (path.parent / RUN_FILE).is_file():
        return Run(path.parent)
    folder = default_runs_folder() if folder is None else Path(folder)
    found = match_runs(str(name), folder)
    if len(found) == 1:
        return Run(folder / found[0])
    if found:
        raise ModelError(f"{name}: {len(found)} runs in {folder} begin so: {_join_last(found)}. Give more of the name.")
    names = [str(path.relative_to(folder)) for path in _iterate_runs(folder)]
    known = f"The runs there: {_join_last(names)}." if names else "There are no runs there yet."
    raise ModelError(f"{name}: neither the folder of a run nor the beginning of a run's name in {folder}. {known}")


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs of a folder, oldest first; one whose run.json is damaged has the status "damaged"."""
    summaries = []
    for path in _iterate_runs(Path(folder)):
        name = str(path.relative_to(folder))
        try:
            values = Run(path).read_json(RUN_FILE)
            error = str(values["error"]).splitlines()[0] if values.get("error") else None
            summary = RunSummary(
                name, path, values.get("kind", "run"), _tell_status(values), values.get("started", ""), error
            )
        except (ModelError, AttributeError, TypeError) as error:
            summary = RunSummary(name, path, "run", "damaged", "", str(error))
        summaries.append(summary)
    return sorted(summaries, key=lambda summary: (summary.path.name, summary.name))


def match_runs(name: str, folder: Path) -> list[str]:
    """Return the names of the runs in a folder that begin with `name`, with or without the experiment's.

    A whole name counts alone: a run's is the beginning of an ablation's of the same second.
    """
    names = [str(path.relative_to(folder)) for path in _iterate_runs(folder)]
    exact = [key for key in names if name in (key, Path(key).name)]
    if exact:
        return exact
    return [key for key in names if name and (key.startswith(name) or Path(key).name.startswith(name))]


def find_checkout() -> Path | None:
    """Return the root of the checkout that dlfer is imported from, or None for an ordinary installation."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file under a temporary name beside it and rename it, so that it is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_new_folder(parent: Path, name: str) -> Path:
    for number in range(1, 1000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"{parent}: cannot make a run there ({error.strerror or error}); choose a folder by --out."
            ) from None
        return path
    raise ConfigError(f"{parent}: found a thousand runs named {name}; choose another folder by --out.")


def _iterate_runs(folder: Path) -> Iterator[Path]:
    """Yield the run directories <folder>/<experiment>/<run>; hidden folders (the cache) are no experiments."""
    for path in sorted(folder.glob(f"*/*/{RUN_FILE}")):
        if not path.parent.parent.name.startswith("."):
            yield path.parent


def _tell_status(values: Mapping[str, Any]) -> str:
    """Return the recorded status, or "interrupted" where it says running and the process is gone."""
    status = str(values.get("status", "running"))
    if status != "running" or values.get("host") != socket.gethostname() or not isinstance(values.get("pid"), int):
        return status
    try:
        os.kill(values["pid"], 0)
    except ProcessLookupError:
        return "interrupted"
    except PermissionError:
        return status
    return status


def _describe_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _describe_checkout() -> dict[str, Any] | None:
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


def _list_packages() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _to_json(value: Any) -> Any:
    """Return a value as JSON can hold it: numpy's by their own tolist, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        return _to_json(value.tolist())
    return str(value)


def _join_last(names: list[str]) -> str:
    shown = names[-_MAX_LISTED:]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} older" if len(shown) < len(names) else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
