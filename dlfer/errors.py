"""The exceptions that dlfer raises for errors that it can explain.

    DlferError                 the base class                                       exit code 1
    ├── UserError              an input or the environment is invalid               exit code 2
    │   ├── ConfigError        an experiment file, a --set value or an output path is invalid
    │   ├── DataError          rows, images, folders or labels are invalid
    │   │   └── MissingDataError   the data is missing; the message says where to get it
    │   ├── ProtocolError      a split, balance or evaluation that the protocol forbids
    │   ├── ResumeError        the data, experiment or software of a run to resume has changed since it started
    │   ├── ModelError         a model or run is not found, is damaged, or does not fit the data
    │   │   └── HeldError          another process works on a run
    │   └── EnvironmentProblem a required package or device is missing
    ├── TransferError          the weights of one stage do not match the network of the next
    ├── ExportError            an exported model's predictions differ from those of its artifact
    ├── NonFiniteError         a loss or a weight became NaN or infinite in training
    ├── WorkerLost             another process of a training on several hosts was lost
    └── TrainingStopped        training was stopped on request, with a checkpoint

A message says where the problem is, what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

DEBUG = "DLFER_DEBUG"
"""Environment variable that turns on full error output; `--debug` sets it, and child processes inherit it."""
MAX_FOREIGN = 200
"""Maximum number of characters that a message quotes of another library's message; unlimited with `--debug`."""


def shorten(text: object, path: object = None, *, most: int = MAX_FOREIGN) -> str:
    """Return another library's message on one line, cut between words to `most` characters; uncut with `--debug`.

    Args:
        text: a message or an exception; of an OSError only its `strerror` is used, without the number and the file.
        path: a path that dlfer's own message names already; it is replaced by "it".
        most: maximum number of characters.

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
    """The base class of all errors that dlfer can explain; its subclasses are in `dlfer.errors`.

    Attributes:
        exit_code: the exit code of a command that ends with this error: 1, or 2 for invalid input (`UserError`).

    Example:
        >>> try:
        ...     run = dlfer.run("experiments/quickstart.yaml")
        ... except dlfer.DlferError as error:
        ...     print(error)
    """

    exit_code = 1


class UserError(DlferError):
    """The user's input or environment is invalid; a command prints the message without a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """An experiment file, a `--set` value or an output path is invalid."""


class DataError(UserError):
    """Rows, images, folders or labels of the data are invalid."""


class MissingDataError(DataError):
    """The data is not at the experiment's path; the message says where to get it."""


class ProtocolError(UserError):
    """The chosen protocol forbids a split, a balance or an evaluation."""


class ModelError(UserError):
    """A model or a run is not found, is damaged, or does not fit the data."""


class HeldError(ModelError):
    """Another process works on a run."""


class ResumeError(UserError):
    """The data, the experiment or the software of a run to resume has changed since the run started."""


class EnvironmentProblem(UserError):
    """A package, a device or another part of the environment that is required is missing or unsuitable."""


class TransferError(DlferError):
    """Weights do not match the network that they are loaded into, for example that of the next stage."""


class ExportError(DlferError):
    """An export failed, usually since the exported model's predictions differ from its artifact's; it is not kept."""


class NonFiniteError(DlferError):
    """A loss or a weight became NaN or infinite in training."""


class WorkerLost(DlferError):
    """Another process of a training on several hosts was lost; the last checkpoint remains valid."""


class TrainingStopped(DlferError):
    """Training was stopped by a signal or by `--max-hours`, with a checkpoint from which it can be resumed.

    Attributes:
        reason: what stopped it, e.g. "SIGTERM", "Ctrl-C" or "--max-hours".
        folder: the folder of the stopped run or study; None until the run or study has recorded the stop.
        exit_code: 143 for SIGTERM, 130 for Ctrl-C, 0 otherwise.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.folder: Path | None = None
        self.exit_code = {"SIGTERM": 143, "Ctrl-C": 130}.get(reason, 0)


class Signalled(KeyboardInterrupt):
    """A signal that interrupts the process like Ctrl-C.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
