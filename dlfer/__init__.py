"""Train, compare and use facial-expression classifiers by cascaded transfer learning.

    import dlfer

    run = dlfer.run("experiments/quickstart.yaml", {"finetune.epochs": 3})
    print(run.metrics.test.accuracy)
    probabilities = run.classifier.predict(images)

The names of `dlfer.__all__` are public, and the classes of `dlfer.errors`; other modules may change without notice.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from dlfer._version import __version__

# ONNX Runtime reports its use to its vendor, from its import on, unless it finds this.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# TensorFlow uses oneDNN by default only on x86 processors with AVX512-VNNI and later instructions. On one with AVX2, too, dlfer's
# training steps are faster with it (benchmarks/cpu_settings.py). TensorFlow reads this when it is imported.
if sys.platform == "linux" and os.uname().machine == "x86_64":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Public name -> where it stands. Resolved on first use: `import dlfer` loads neither TensorFlow nor pydantic. Tools for types
# read __init__.pyi instead.
_PLACES = {
    "DlferError": ("dlfer.errors", "DlferError"),
    "ExperimentConfig": ("dlfer.config.schema", "ExperimentConfig"),
    "FacePredictor": ("dlfer.predict.predictor", "FacePredictor"),
    "Listener": ("dlfer.runs.listeners", "Listener"),
    # dlfer.runs.run.Run is the directory, which commands write.
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
