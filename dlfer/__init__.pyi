"""Stub of the public names for type checkers and editors, which cannot resolve the lazy imports of `__init__.py`."""

from dlfer._version import __version__ as __version__
from dlfer.api import RunResult as Run
from dlfer.api import Study as Study
from dlfer.api import ablate as ablate
from dlfer.api import audit as audit
from dlfer.api import compare as compare
from dlfer.api import evaluate as evaluate
from dlfer.api import open_run as open_run
from dlfer.api import run as run
from dlfer.api import search as search
from dlfer.api import sweep as sweep
from dlfer.config.load import load_experiment as load_experiment
from dlfer.config.schema import ExperimentConfig as ExperimentConfig
from dlfer.errors import DlferError as DlferError
from dlfer.predict.engines import load_model as load
from dlfer.predict.media import read_image as read_image
from dlfer.predict.predictor import FacePredictor as FacePredictor
from dlfer.runs.listeners import Listener as Listener

__all__ = [
    "DlferError",
    "ExperimentConfig",
    "FacePredictor",
    "Listener",
    "Run",
    "Study",
    "__version__",
    "ablate",
    "audit",
    "compare",
    "evaluate",
    "load",
    "load_experiment",
    "open_run",
    "read_image",
    "run",
    "search",
    "sweep",
]
