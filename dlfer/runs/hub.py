"""Models on the Hugging Face hub: `hf://ORG/NAME` is downloaded to huggingface_hub's cache, and a folder is pushed.

What is downloaded is checked as any other artifact is, where it is read: the sha256 of each file, the ranges of artifact.json.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from dlfer._version import __version__
from dlfer.errors import DlferError, EnvironmentProblem, ModelError, UserError

PATTERNS = ("*.json", "*.md", "*.yaml", "*.weights.h5", "*.onnx")
"""Files of an artifact; others of a repository, such as pickles and programs, are not downloaded."""

# A Path has one slash less.
_NAME = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+?)/?(?:@(?P<revision>.+))?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: Path | str) -> bool:
    """Return whether a name means a model on the hub."""
    return str(name).startswith("hf:/")


def download_model(name: Path | str) -> Path:
    """Return the artifact folder of a model on the hub, in huggingface_hub's cache; what is there is not downloaded again.

    Args:
        name: hf://ORG/NAME, the newest revision, or hf://ORG/NAME@REVISION, a branch, tag or commit.

    Raises:
        ModelError: another form of name, no such model or revision, no network and not in the cache, or no model of dlfer.
        EnvironmentProblem: huggingface_hub is not installed.
    """
    match = _NAME.fullmatch(str(name))
    if match is None or not _REPOSITORY.fullmatch(match["repository"]):
        raise ModelError(f"{name}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION, a model on the Hugging Face hub.")
    return _download(match["repository"], match["revision"])


@cache  # a command asks for its model several times
def _download(repository: str, revision: str | None) -> Path:
    hub = _import_hub()
    name = f"hf://{repository}" + (f"@{revision}" if revision else "")
    try:
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # of the network, of the hub and of the cache there are too many kinds to name
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
    """Raise unless a model can be pushed to a repository, as far as that is known without asking the hub.

    Raises:
        UserError: no name of a repository.
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
    """Push a folder to a repository on the hub, which is created if it is not there; return its address.

    Files of an earlier model in the repository that the folder does not have are removed.

    Args:
        private: whether a new repository is; one that is there stays as it is.

    Raises:
        DlferError: the hub or the network refuses; with the command that repeats it.
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
    except Exception as error:  # as of a download
        raise DlferError(
            f"{repository}: could not be pushed ({_shorten(error)}). The folder is written: {folder}. Once the cause is removed, "
            f"push it with: hf upload {repository} {folder} ."
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
    """Return what caused an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
