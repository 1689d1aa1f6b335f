"""How often the model of a run was judged on images that neither trained nor selected it."""

from __future__ import annotations

import contextlib
import json

from dlfer.errors import ModelError
from dlfer.runs.run import DATA_FILE, LOG_FILE, Run


def log_opening(run: Run, split: str, num_images: int, *, milestone: int | None = None) -> int:
    """Record that a split was opened to judge the run's model, and return how often a test split was by now.

    The run's metrics.json, if it is there, says the number from then on.

    Args:
        split: its name in data.json, e.g. "PrivateTest".
        num_images: in the split.
        milestone: the epoch whose weights are judged, where it is not the model that the run ends with.
    """
    sha256 = run.read_json("model/artifact.json")["sha256"]
    which = {"model": next(iter(sha256.values()))} if milestone is None else {"milestone": milestone}
    run.log("test_opened", split=split, n=num_images, **which)
    opened = count_openings(run)
    with contextlib.suppress(ModelError):
        run.write_json("metrics.json", {**run.read_metrics(), "test_opened": opened})
    return opened


def count_openings(run: Run) -> int:
    """Return how often the run's model was judged on images other than those it was trained and selected on."""
    splits = run.read_json(DATA_FILE)["splits"]
    seen = {splits[name]["name"] for name in ("train", "validation") if name in splits}
    events = []
    for line in (run.path / LOG_FILE).read_text(encoding="utf-8").splitlines():
        # A process that was killed while it wrote may have left half a line.
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return sum(event["event"] == "test_opened" and event["split"] not in seen for event in events)
