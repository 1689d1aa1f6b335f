"""Suppression of the messages that TensorFlow, OpenCV and other libraries write to stderr."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec

from dlfer.errors import DEBUG

_ADVICE = (
    "triggered tf.function retracing",
    "is deprecated",
    "has no dataset_info.json",
    "mkdir -p failed",
    "created a temporary cache directory",
    "building the font cache",
)


def hush_libraries() -> None:
    """Suppress TensorFlow's messages on processors and plugins at its import, and those of OpenCV and FFmpeg on files.

    TensorFlow's C++ code also logs harmless events as errors (oneDNN: an unsupported data type, in the first training
    step); a real failure raises an exception as well. For a file that cannot be decoded, dlfer has an error of its own.

    Some lines are written to file descriptor 2 before TF_CPP_MIN_LOG_LEVEL is read, so no setting prevents them, and
    the import runs with the descriptor redirected. Nothing is suppressed if DLFER_DEBUG is set in the environment.
    """
    if os.environ.get(DEBUG):
        return
    # tqdm, which a dependency imports, warns of this in notebooks without ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # TensorFlow warns of retracing, although a network needs one graph for each image size.
    # tensorflow_datasets calls deprecated functions of TensorFlow.
    # Matplotlib reports where it caches its fonts if the home folder is not writable.
    for name in ("tensorflow", "absl", "matplotlib", "matplotlib.font_manager"):
        logging.getLogger(name).addFilter(_is_no_advice)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    if "tensorflow" not in sys.modules and not any(isinstance(finder, _QuietImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuietImport())


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Return whether a message is to be shown: false for advice on the use of a library and for notes on its caches."""
    said = record.getMessage()
    return not any(text in said for text in _ADVICE)


class _QuietImport:
    """An import finder that executes the module tensorflow under `keep_back_stderr`.

    `_is_looking` lets the other finders answer its own lookup, so the module may be looked up more than once.
    """

    def __init__(self) -> None:
        self._is_looking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of tensorflow with a wrapped loader; None for every other module."""
        if name != "tensorflow" or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_looking = False
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = keep_back_stderr()(spec.loader.exec_module)
        return spec


@contextmanager
def keep_back_stderr() -> Iterator[None]:
    """Withhold what is written to file descriptor 2, unless an exception is raised or DLFER_DEBUG is set."""
    if os.environ.get(DEBUG):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
