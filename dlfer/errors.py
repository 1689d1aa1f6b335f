"""Every exception that dlfer raises on purpose.

    DlferError                 something went wrong that dlfer can explain     exit code 1
    ├── UserError              what the user gave is wrong                     exit code 2
    │   ├── ConfigError        an experiment file, a --set, or where to write
    │   ├── DataError          rows, images, folders, labels
    │   │   └── MissingDataError   the data is not there; the message says where to get it
    │   ├── ProtocolError      a split, balance or evaluation that the protocol forbids
    │   ├── ResumeError        a run to resume whose data, experiment or software changed since it began
    │   ├── ModelError         a model or run that is not found, damaged or does not fit
    │   └── EnvironmentProblem a package or a device that the command needs is absent
    ├── TransferError          weights that do not carry over exactly
    ├── ExportError            an exported model that does not answer as its artifact does
    ├── NonFiniteError         a loss or a weight became NaN or infinite in training
    ├── WorkerLost             another process of a training over several hosts is gone
    └── TrainingStopped        training was asked to stop and stands at a checkpoint

A message says where, what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

DEBUG = "DLFER_DEBUG"
"""Environment variable that says to show everything; `--debug` sets it, so that processes of members know."""
MAX_FOREIGN = 200
"""Characters of another library's message that stand in one of dlfer's; with `--debug` all of it does."""


def shorten(text: object, path: object = None, *, most: int = MAX_FOREIGN) -> str:
    """Return what another library says on one line of at most `most` characters, cut between words; all of it with `--debug`.

    Args:
        text: a message or an exception, of the operating system without its number and file.
        path: which dlfer's own message names, so that it need not stand in this one, too.
        most: characters.

    Example:
        >>> shorten(ValueError("no\\n  such   file"))
        'no such file'
    """
    said = text.strerror if isinstance(text, OSError) and text.strerror else str(text)
    if path is not None and str(path) not in ("", "."):
        said = re.sub(rf"(?<![\w./-])['\"]?{re.escape(str(path))}['\"]?(?![\w/-])", "it", said)
    line = " ".join(said.split()) or (type(text).__name__ if isinstance(text, BaseException) else "")
    if len(line) <= most or os.environ.get(DEBUG):
        return line
    cut = line[: most - 4]
    return f"{cut[: cut.rfind(' ')] if ' ' in cut[most // 2 :] else cut} ..."


class DlferError(Exception):
    """Something went wrong that dlfer can explain; the command exits with `exit_code`.

    It is the base of every exception that dlfer raises on purpose; the others are in `dlfer.errors`.

    Example:
        >>> try:
        ...     run = dlfer.run("experiments/quickstart.yaml")
        ... except dlfer.DlferError as error:
        ...     print(error)
    """

    exit_code = 1


class UserError(DlferError):
    """What the user gave is wrong: one message, no traceback."""

    exit_code = 2


class ConfigError(UserError):
    """An experiment file, a value given by --set, or a place to write to is wrong."""


class DataError(UserError):
    """Rows, images, folders or labels are wrong."""


class MissingDataError(DataError):
    """The data is not where the experiment says; the message tells where to obtain it."""


class ProtocolError(UserError):
    """A split, balance or evaluation that the chosen protocol forbids."""


class ModelError(UserError):
    """A model or a run that is not found, is damaged, or does not fit the data."""


class ResumeError(UserError):
    """A run is to be continued whose data, experiment or software has changed since it began."""


class EnvironmentProblem(UserError):
    """A package or a device that the command needs is absent."""


class TransferError(DlferError):
    """Weights that do not carry over exactly from one stage to the next."""


class ExportError(DlferError):
    """An exported model that does not answer as its artifact does; it is not kept."""


class NonFiniteError(DlferError):
    """A loss or a weight became NaN or infinite in training."""


class WorkerLost(DlferError):
    """Another process of a training over several hosts is gone; the last checkpoint stands."""


class TrainingStopped(DlferError):
    """Training was asked to stop (a signal, --max-hours) and stands at a checkpoint.

    Attributes:
        reason: what asked for the stop, e.g. "SIGTERM", "Ctrl-C" or "--max-hours".
        folder: of the run, ablation, sweep or search that was stopped; None until that has recorded the stop.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.folder: Path | None = None
        self.exit_code = {"SIGTERM": 143, "Ctrl-C": 130}.get(reason, 0)


class Signalled(KeyboardInterrupt):
    """A signal that ends the work as Ctrl-C does.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
