"""Train, compare and use facial-expression classifiers by cascaded transfer learning."""

from __future__ import annotations

import importlib
from typing import Any

from dlfer._version import __version__

# Public name -> where it stands. Resolved on first use: `import dlfer` loads neither TensorFlow nor pydantic.
_PLACES = {
    "ExperimentConfig": ("dlfer.config.schema", "ExperimentConfig"),
    "FacePredictor": ("dlfer.predict.predictor", "FacePredictor"),
    "evaluate_model": ("dlfer.experiment.evaluate", "evaluate_model"),
    "load": ("dlfer.predict.engines", "load_model"),
    "load_experiment": ("dlfer.config.load", "load_experiment"),
    "read_image": ("dlfer.predict.media", "read_image"),
    "run_ablation": ("dlfer.study.ablation", "run_ablation"),
    "run_experiment": ("dlfer.experiment.run", "run_experiment"),
    "run_sweep": ("dlfer.study.sweep", "run_sweep"),
}

__all__ = [
    "ExperimentConfig",
    "FacePredictor",
    "__version__",
    "evaluate_model",
    "load",
    "load_experiment",
    "read_image",
    "run_ablation",
    "run_experiment",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dlfer' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
