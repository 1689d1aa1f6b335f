"""Lookup of runs and models by name, the list of runs in a folder, and models on the Hugging Face hub.

A model `hf://ORG/NAME` is downloaded to huggingface_hub's cache. When it is loaded, it is checked like any artifact:
the sha256 of each file, and the ranges of the values in artifact.json.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dlfer._version import __version__
from dlfer.config.names import expand_home, list_places
from dlfer.errors import DlferError, EnvironmentProblem, ModelError, UserError, shorten
from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.records import About, ArtifactRecord, RunRecord
from dlfer.runs.run import CONFIG_FILE, RUN_FILE, Run
from dlfer.runs.run_records import read_metrics

_MAX_LISTED = 15


@dataclass(frozen=True)
class RunSummary:
    """One line of `dlfer show runs`.

    Attributes:
        name: path relative to the folder of runs, <experiment>/<stamp>-<digest>.
        path: the run directory.
        kind: "run", "ablation", "sweep", "cross_validation" or "search".
        status: running, interrupted, stopped, failed, finished.
        started: UTC, ISO 8601.
        error: the first line of the error message, shortened, or None.
        protocol, split, accuracy: of the evaluated split; None before the evaluation, and for comparisons.
    """

    name: str
    path: Path
    kind: str
    status: str
    started: str
    error: str | None
    protocol: str | None = None
    split: str | None = None
    accuracy: CountedEstimate | None = None


def default_runs_folder() -> Path:
    """Return the default folder of runs, which --out replaces."""
    return Path("saved_models/runs")


def open_run(name: Path | str, folder: Path | None = None) -> Run:
    """Return the run at a path, or the only run in the folder of runs whose name begins with `name`.

    Raises:
        ModelError: there is no such run, or more than one; the message lists the names.

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
    if _get_artifact(path) is not None or str(name) in list_models():
        raise ModelError(f"{name}: is a model without its run (dlfer show models), expected a run. {known}")
    raise ModelError(f"{name}: neither the folder of a run nor the beginning of a run's name in {folder}. {known}")


def find_unfinished_run(name: str, digest: str, folder: Path | None = None) -> Path | None:
    """Return the newest unfinished run of an experiment, other than members of studies and smoke runs, or None.

    Args:
        name: name of the experiment.
        digest: digest of its configuration by `dlfer.config.load.compute_digest`; runs with another one are ignored.
        folder: the folder of runs; None for the default.
    """
    folder = default_runs_folder() if folder is None else Path(folder)
    for path in sorted((folder / name).glob(f"*/{RUN_FILE}"), reverse=True):
        try:
            record = Run(path.parent).record
        except ModelError:  # a damaged run cannot be resumed
            continue
        is_own = record.kind == "run" and record.study is None and not record.smoke and record.config_digest == digest
        if is_own and record.status != "finished":
            return path.parent
    return None


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs of a folder, oldest first; a run whose run.json is damaged has the status "damaged"."""
    summaries = []
    for path in _iterate_runs(Path(folder)):
        name = str(path.relative_to(folder))
        try:
            summary = _summarise(name, path)
        except ModelError as error:
            summary = RunSummary(name, path, "run", "damaged", "", shorten(str(error)))
        summaries.append(summary)
    return sorted(summaries, key=lambda summary: (summary.path.name, summary.name))


def _summarise(name: str, path: Path) -> RunSummary:
    record = Run(path).record
    error = shorten(record.error.strip().splitlines()[0]) if record.error and record.error.strip() else None
    found = RunSummary(name, path, record.kind, record.present_status, record.started or "", error)
    metrics = read_metrics(path) if record.kind == "run" else None
    if metrics is None or metrics.judged is None:
        return found
    judged = metrics.judged
    accuracy = CountedEstimate.build({**judged.accuracy.as_json(), "n": judged.n})
    return replace(found, protocol=metrics.protocol, split=metrics.judged_split, accuracy=accuracy)


def match_runs(name: str, folder: Path) -> list[str]:
    """Return the names of the runs in a folder that begin with `name`, with or without the experiment's name.

    An exact match excludes all others: a run's name is a prefix of that of an ablation started in the same second.
    """
    names = [str(path.relative_to(folder)) for path in _iterate_runs(folder)]
    exact = [key for key in names if name in (key, Path(key).name)]
    if exact:
        return exact
    return [key for key in names if name and (key.startswith(name) or Path(key).name.startswith(name))]


def _iterate_runs(folder: Path) -> Iterator[Path]:
    """Yield the run directories <folder>/<experiment>/<run>, except in hidden folders such as the cache."""
    for path in sorted(folder.glob(f"*/*/{RUN_FILE}")):
        if not path.parent.parent.name.startswith("."):
            yield path.parent


def _join_last(names: list[str]) -> str:
    shown = names[-_MAX_LISTED:]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} older" if len(shown) < len(names) else "")


ARTIFACT_FILE = ArtifactRecord.FILE
EXPORT_FILE = "export.json"


def find_model(name: Path | str) -> Path:
    """Return the artifact folder (which contains artifact.json) for a path, a model's name or a run's name.

    A name is looked up in ./saved_models, $DLFER_HOME/saved_models, the installed package and the checkout of an
    editable installation, then in the runs of each, whose artifact is `model`. hf://ORG/NAME[@REVISION] is downloaded.

    Raises:
        ModelError: nothing has that name; the message lists the searched places and the known names.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise ModelError(f"model: found {name!r:.80}, expected the name of a model, a run, or a folder.")
    if is_hub_name(name):
        return download_model(name)
    places = list_model_places()
    for path in (expand_home(name), *(place / name for place in places)):
        found = _get_artifact(path)
        if found is not None:
            return found
    for place in places:
        if match_runs(str(name), place / "runs"):
            return _get_artifact_of_run(open_run(name, place / "runs"))
    if Path(name).is_file():
        raise ModelError(
            f"{name}: is a file; a model is a folder with {ARTIFACT_FILE}, which holds its labels, its input and the "
            "sha256 of each file. Weights from elsewhere (.keras, .weights.h5, Keras' .h5) can start a training: "
            "set pretrain.weights to the file."
        )
    for path in (Path(name).expanduser(), *(place / name for place in places)):
        if path.is_dir():
            raise ModelError(f"{name}: {_describe_folder(path)}")
    known = list_models()
    raise ModelError(
        f"{name}: there is no such model. Looked for a folder of that path, then in "
        f"{', '.join(str(place) for place in places)} and their runs. "
        f"{'Known models: ' + ', '.join(known) if known else 'No models are there yet; train one with dlfer run'}."
    )


def _describe_folder(path: Path) -> str:
    """Return why a folder is no model: it is an export, or has no artifact.json."""
    exports = (
        [path] if (path / EXPORT_FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{EXPORT_FILE}"))
    )
    if exports:
        return (
            f"is an export ({', '.join(map(str, exports))}), not a model, so it has no {ARTIFACT_FILE}. dlfer predict takes "
            "exports to ONNX with --engine onnx or openvino and to LiteRT with --engine litert; the example.py in an export "
            "runs it without dlfer. For all else, name the model that was exported."
        )
    return (
        f"{path} is a folder without {ARTIFACT_FILE}, so it is no model; expected a folder that dlfer ship wrote, a run, or "
        "its folder model (dlfer show models and dlfer show runs list them)."
    )


def list_models() -> dict[str, Path]:
    """Return name -> folder of the models outside runs; the first place that has a name takes precedence."""
    models: dict[str, Path] = {}
    for place in list_model_places():
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.name != "runs" and (path / ARTIFACT_FILE).is_file():
                models.setdefault(path.name, path)
    return models


def find_default_model() -> Path:
    """Return the artifact folder of the default model, which is used if none is named.

    It is the one with `default: true` under `about` in artifact.json, in the first place that has one, and never that
    of a smoke run.

    Raises:
        ModelError: there is no default model, or a place has several.
    """
    for place in list_model_places():
        found = [path for path in list_models().values() if path.parent == place and is_default(path)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ModelError(
                f"{place}: found {len(found)} models that call themselves the default ({names}), expected one; "
                "name the model, or set default: false in the artifact.json of the others."
            )
        if found:
            return found[0]
    raise ModelError(
        "there is no default model in "
        f"{', '.join(str(place) for place in list_model_places())}. Name a model (dlfer show models lists them), or set DLFER_HOME "
        "to a clone of dlfer's repository, whose saved_models has one; this installation was built without it."
    )


def is_default(folder: Path) -> bool:
    """Return whether the artifact in a folder is marked as the default; that of a smoke run never counts as such."""
    try:
        record = ArtifactRecord.read(folder)
    except ModelError:
        return False  # a damaged artifact is reported when it is loaded
    return record is not None and record.about.default and not record.about.smoke


def read_about(folder: Path, record: ArtifactRecord) -> About:
    """Return the section `about` of an artifact; before dlfer 0.2, only its run recorded whether it was a smoke run.

    Args:
        folder: folder of the artifact.
        record: contents of its artifact.json.
    """
    try:
        run = RunRecord.read(folder.parent) if folder.name == "model" else None
    except ModelError:  # a damaged run.json does not make the model unusable
        run = None
    is_smoke = record.about.smoke or (run is not None and run.smoke)
    return record.about.model_copy(update={"smoke": True}) if is_smoke else record.about


def find_run_of(name: Path | str) -> Run | None:
    """Return the run with a path or name, or whose folder `model` it is; None for other models."""
    path = Path(name)
    if path.name == "model" and (path.parent / RUN_FILE).is_file():
        return Run(path.parent)
    try:
        return open_run(path)
    except ModelError:
        return None


def open_run_of_model(run: Path | str) -> tuple[Run, Path]:
    """Return a finished run that has a model, and the folder of its model.

    Args:
        run: its path, the beginning of its name, or the path of its model; not the name of a shipped model.

    Raises:
        ModelError: there is no such run, it has no model or has not finished, or it is a model without its run.
    """
    path = Path(run)
    is_of_run = path.name == "model" and (path.parent / RUN_FILE).is_file()
    opened = Run(path.parent) if is_of_run else open_run(run)
    folder = _get_artifact_of_run(opened)
    if opened.status != "finished":
        raise ModelError(
            f"{opened.path}: this run is {opened.status}, expected a finished one, whose model has been evaluated. Continue it "
            f"with: dlfer run --resume {shlex.quote(str(opened.path))}"
        )
    return opened, folder


def list_model_places() -> list[Path]:
    """Return the folders that are searched for a model's name, in order and without repeats."""
    places = [Path("saved_models"), *list_places("saved_models")]
    return [
        place for number, place in enumerate(places) if place.resolve() not in {p.resolve() for p in places[:number]}
    ]


def _get_artifact(path: Path) -> Path | None:
    """Return the artifact folder at a path (the path itself, or the folder `model` of a run), or None."""
    if (path / ARTIFACT_FILE).is_file():
        return path
    return _get_artifact_of_run(Run(path)) if (path / RUN_FILE).is_file() else None


def _get_artifact_of_run(run: Run) -> Path:
    if (run.path / "model" / ARTIFACT_FILE).is_file():
        return run.path / "model"
    if run.kind != "run":
        raise ModelError(
            f"{run.path}: a comparison ({run.kind}) has no model; name one of the runs in its members.csv."
        )
    raise ModelError(
        f"{run.path}: this run has no model; its status is {run.status}. Continue it with: dlfer run --resume."
    )


PATTERNS = ("*.json", "*.md", "*.yaml", "*.weights.h5", "*.onnx", "images.npz", "features.npz", "*/features.npz")
"""Patterns of an artifact's files; other files of a repository, such as pickles and programs, are not downloaded."""

# A Path collapses the two slashes into one.
_NAME = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+?)/?(?:@(?P<revision>.+))?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: Path | str) -> bool:
    """Return whether a name refers to a model on the hub."""
    return str(name).startswith("hf:/")


def download_model(name: Path | str) -> Path:
    """Return the artifact folder of a model on the hub in huggingface_hub's cache, after downloading what it lacks.

    Args:
        name: hf://ORG/NAME for the newest revision, or hf://ORG/NAME@REVISION for a branch, tag or commit.

    Raises:
        ModelError: another form of name, no such model or revision, no network and no cached copy, or no dlfer model.
        EnvironmentProblem: huggingface_hub is not installed.
    """
    match = _NAME.fullmatch(str(name))
    if match is None or not _REPOSITORY.fullmatch(match["repository"]):
        raise ModelError(f"{name}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION, a model on the Hugging Face hub.")
    return _download(match["repository"], match["revision"])


@cache  # a command looks up its model several times
def _download(repository: str, revision: str | None) -> Path:
    hub = _import_hub()
    name = f"hf://{repository}" + (f"@{revision}" if revision else "")
    try:
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # network, hub and cache raise too many types to list
        raise ModelError(
            f"{name}: cannot be downloaded ({_shorten(error)}). Check the name, the revision and the network; a private model "
            "needs the environment variable HF_TOKEN, or `hf auth login`."
        ) from error
    if not (folder / "artifact.json").is_file():
        raise ModelError(
            f"{name}: has no artifact.json, so it is no model of dlfer; expected what `dlfer ship --to-hub` pushes."
        )
    return folder


def check_hub(repository: str) -> None:
    """Raise an error unless a model can be pushed to a repository, without contacting the hub.

    Raises:
        UserError: the name is not that of a repository.
        EnvironmentProblem: huggingface_hub is not installed, or there is no token.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(
            f"--to-hub {repository}: expected ORG/NAME, e.g. my-group/my_model, of letters, digits and . - _"
        )
    if _import_hub().get_token() is None:
        raise EnvironmentProblem(
            f"--to-hub {repository}: found no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN."
        )


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Push a folder to a repository on the hub, which is created if it does not exist; return its URL.

    Files of an earlier model that the folder does not contain are deleted from the repository.

    Args:
        private: whether a new repository is private; an existing one is not changed.

    Raises:
        DlferError: the hub or the network fails; the message has the command to retry.
    """
    api = _import_hub().HfApi(library_name="dlfer", library_version=__version__)
    try:
        address = api.create_repo(repository, exist_ok=True, private=private)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message=f"Model written by dlfer {__version__}",
            delete_patterns=list(PATTERNS),
        )
    except Exception as error:  # as for a download
        raise DlferError(
            f"{repository}: could not be pushed ({_shorten(error)}). The folder is written: {folder}. Once the cause is removed, "
            f"push it with: hf upload {repository} {shlex.quote(str(folder))} .{' --private' * private}"
        ) from error
    return str(address)


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            "models on the Hugging Face hub need a package that is not installed: pip install 'dlfer[hub]'."
        ) from error
    return huggingface_hub


def _shorten(error: BaseException) -> str:
    """Return the type and the first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
