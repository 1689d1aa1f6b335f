"""What a command says of a run besides the experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunOptions:
    """What `dlfer run` and `dlfer ablate` take besides the experiment.

    Attributes:
        overrides: dotted key -> value, from --set.
        out: the folder of runs; None: saved_models/runs.
        smoke: two batches of at most eight images in every phase.
        dry_run: explain what would be done, and stop.
        require_gpu: refuse to run without a GPU.
        max_hours: stop cleanly at a checkpoint after so long.
        use_cache: take EF-FER1 from the cache if it was trained before.
        judge_test: judge the model on the test split at the end; a search's trials leave it closed.
        accept_changes: continue a run although its data, experiment or software has changed since it began.
        argv: the command, recorded in run.json.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    smoke: bool = False
    dry_run: bool = False
    require_gpu: bool = False
    max_hours: float | None = None
    use_cache: bool = True
    judge_test: bool = True
    accept_changes: bool = False
    argv: tuple[str, ...] = ()
