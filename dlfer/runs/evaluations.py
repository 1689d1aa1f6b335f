"""What became of a run's model: its metrics, what was evaluated later, and how often a test split was opened.

metrics.json is written once, at the end of a run. Metrics that `dlfer evaluate` adds to a run go into extra_metrics.json,
and each opening of a split goes into log.jsonl; `read_metrics` puts the three together.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from dlfer.runs.metrics_record import Corruptions, Groups, Metrics, ViewMetrics
from dlfer.runs.records import ArtifactRecord, DataRecord, FileRecord
from dlfer.runs.run import LOG_FILE, Run
from dlfer.runs.training_records import read_events


class ExtraMetrics(FileRecord):
    """extra_metrics.json: what was evaluated on a run's own images after it had ended."""

    FILE: ClassVar[str] = "extra_metrics.json"

    views: dict[str, dict[str, ViewMetrics]] = Field(default_factory=dict)
    groups: Groups | None = None
    corruptions: Corruptions | None = None


def read_metrics(folder: Path | str) -> Metrics | None:
    """Return the metrics of a run or a shipped model, with those added later; None where there are none.

    `test_opened` is the number of openings up to now where the folder has a log, else up to when the file was written.

    Raises:
        ModelError: a file is damaged.
    """
    folder = Path(folder)
    metrics, extra = Metrics.read(folder), ExtraMetrics.read(folder)
    if metrics is None:
        return None
    changed: dict[str, object] = {}
    if extra is not None:
        views = {**metrics.views}
        for view, splits in extra.views.items():
            views[view] = {**views.get(view, {}), **splits}
        changed = {"views": views, "groups": extra.groups or metrics.groups}
        changed["corruptions"] = extra.corruptions or metrics.corruptions
    if (folder / LOG_FILE).is_file() and metrics.test_opened is not None:
        changed["test_opened"] = max(metrics.test_opened, count_openings(folder))
    return metrics.model_copy(update=changed)


def require_metrics(folder: Path | str) -> Metrics:
    """Return the metrics of a run, with those added later.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    return read_metrics(folder) or Metrics.require(folder)


def add_metrics(run: Run, found: ExtraMetrics) -> None:
    """Add metrics to a run; what was added before stays, but for the same view, groups or corruptions."""
    old = ExtraMetrics.read(run.path) or ExtraMetrics()
    views = {**old.views}
    for view, splits in found.views.items():
        views[view] = {**views.get(view, {}), **splits}
    ExtraMetrics(
        views=views, groups=found.groups or old.groups, corruptions=found.corruptions or old.corruptions
    ).write(run.path)


def log_opening(run: Run, split: str, num_images: int, *, milestone: int | None = None) -> int:
    """Record that a split was opened to judge the run's model, and return how often a test split was by now.

    Args:
        split: its name in data.json, e.g. "PrivateTest".
        num_images: in the split.
        milestone: the epoch whose weights are judged, where it is not the model that the run ends with.
    """
    if milestone is None:
        sha256 = ArtifactRecord.require(run.path / "model").sha256
        run.log("test_opened", split=split, n=num_images, model=next(iter(sha256.values())))
    else:
        run.log("test_opened", split=split, n=num_images, milestone=milestone)
    return count_openings(run.path)


def count_openings(folder: Path | str) -> int:
    """Return how often a run's model was judged on images other than those it was trained and selected on."""
    splits = (DataRecord.read(folder) or DataRecord()).splits
    seen = {splits[name].name for name in ("train", "validation") if name in splits}
    return sum(event.event == "test_opened" and event.split not in seen for event in read_events(folder))
