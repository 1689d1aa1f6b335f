"""What libraries say to stderr by themselves, kept back in commands for people."""

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
    """Keep back what TensorFlow says of processors and plugins when it is imported from here on, and what OpenCV and FFmpeg say of files.

    TensorFlow's C++ libraries also log as errors what is none (oneDNN: an unsupported data type, in the first step of a training);
    a failure raises an exception as well. What cannot be decoded is an error of dlfer's own, which names the file.

    Its C++ libraries write some lines to the file descriptor 2 before they read TF_CPP_MIN_LOG_LEVEL, which no setting
    stops. With DLFER_DEBUG in the environment nothing is kept back.
    """
    if os.environ.get(DEBUG):
        return
    # tqdm, which a library of ours imports, says so in notebooks without ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # TensorFlow takes the programs of a network, one for each size of image, for a mistake of its user.
    # tensorflow_datasets calls functions of TensorFlow's that are deprecated.
    # Matplotlib says where it keeps its fonts, where the home folder cannot be written.
    for name in ("tensorflow", "absl", "matplotlib", "matplotlib.font_manager"):
        logging.getLogger(name).addFilter(_is_no_advice)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    if "tensorflow" not in sys.modules and not any(isinstance(finder, _QuietImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuietImport())


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Tell whether a message is other than advice on how a library is to be called, or where it keeps its caches."""
    said = record.getMessage()
    return not any(text in said for text in _ADVICE)


class _QuietImport:
    """Finds tensorflow, however often it is looked for before, and executes it with the file descriptor 2 on a file, which an
    exception shows."""

    def __init__(self) -> None:
        self._is_looking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the specification of tensorflow, with another loader; None for every other module."""
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
    """Keep back what libraries write to the file descriptor 2 meanwhile; an exception shows it, as DLFER_DEBUG does."""
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
