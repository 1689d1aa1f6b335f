"""Train, compare and use facial-expression classifiers by cascaded transfer learning.

    import dlfer

    run = dlfer.run("experiments/quickstart.yaml", {"finetune.epochs": 3})
    print(run.metrics.test.accuracy)
    probabilities = run.classifier.predict(images)

The names in `dlfer.__all__` and the classes in `dlfer.errors` are public; other modules may change without notice.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from dlfer._version import __version__

# Without this, ONNX Runtime sends usage data to its vendor as soon as it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# By default, TensorFlow uses oneDNN only on x86 processors with AVX512-VNNI or later instructions. With AVX2 alone it
# makes dlfer's training steps faster as well (benchmarks/cpu_settings.py). TensorFlow reads the variable at its import.
if sys.platform == "linux" and os.uname().machine == "x86_64":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Public name -> (module, attribute), resolved on first use: `import dlfer` loads neither TensorFlow nor pydantic. Type
# checkers read __init__.pyi instead.
_PLACES = {
    "DlferError": ("dlfer.errors", "DlferError"),
    "ExperimentConfig": ("dlfer.config.schema", "ExperimentConfig"),
    "FacePredictor": ("dlfer.predict.predictor", "FacePredictor"),
    "Listener": ("dlfer.runs.listeners", "Listener"),
    # Not dlfer.runs.run.Run, which is the internal class for writing a run directory.
    "Run": ("dlfer.api", "RunResult"),
    "Study": ("dlfer.api", "Study"),
    "ablate": ("dlfer.api", "ablate"),
    "audit": ("dlfer.api", "audit"),
    "compare": ("dlfer.api", "compare"),
    "evaluate": ("dlfer.api", "evaluate"),
    "load": ("dlfer.predict.engines", "load_model"),
    "load_experiment": ("dlfer.config.load", "load_experiment"),
    "open_run": ("dlfer.api", "open_run"),
    "read_image": ("dlfer.predict.media", "read_image"),
    "run": ("dlfer.api", "run"),
    "search": ("dlfer.api", "search"),
    "sweep": ("dlfer.api", "sweep"),
}

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


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dlfer' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return list(__all__)
