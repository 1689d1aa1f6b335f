"""What several runs of one process share: the options, the device's control, and the data that was loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dlfer.config.schema import StageConfig
from dlfer.data.bundle import DataBundle
from dlfer.data.sources import load_data
from dlfer.runs.find import default_runs_folder
from dlfer.runs.options import RunOptions
from dlfer.runs.run import Run, format_duration
from dlfer.train.control import StopControl
from dlfer.train.progress import ConsoleListener
from dlfer.train.watch import TrainingListener

RunMembers = Callable[[Mapping[str, Run], "Session", Callable[[], None]], None]
"""(name of a member -> its run directory, the session, who is told that a member has ended): executes the runs."""


@dataclass
class Session:
    """What several runs of one process share: device, stop requests, the listener, and loaded data.

    Attributes:
        options: of the command line.
        control: asked after each step whether to stop.
        listener: told about the progress.
        bundles: the data that has been loaded, by its config; arms and seeds share it.
        resume_hint: the command that goes on after a stop, where it is not that of the run itself.
        run_members: trains the members of an ensemble; None: they are trained one after another in this process.
    """

    options: RunOptions
    control: StopControl
    listener: TrainingListener
    bundles: dict[str, DataBundle] = field(default_factory=dict)
    resume_hint: str | None = None
    run_members: RunMembers | None = None

    @classmethod
    def start(cls, options: RunOptions, *, run_members: RunMembers | None = None) -> Session:
        """Return a session that talks on stderr."""
        return cls(options, StopControl(options.max_hours), ConsoleListener(), run_members=run_members)

    @property
    def runs_folder(self) -> Path:
        """Where runs of this session are put."""
        return self.options.out or default_runs_folder()

    def load_bundle(self, stage: StageConfig) -> DataBundle:
        """Return the stage's data, loaded once per session."""
        key = json.dumps([stage.data.model_dump(mode="json"), stage.native_size, stage.balance], sort_keys=True)
        if key not in self.bundles:
            start = time.monotonic()
            say = self.listener.say
            self.bundles[key] = load_data(stage.data, image_size=stage.native_size, balance=stage.balance, say=say)
            self.listener.say(describe_bundle(self.bundles[key], time.monotonic() - start))
        return self.bundles[key]


def describe_bundle(bundle: DataBundle, seconds: float) -> str:
    """Return what was loaded, with every note, for the terminal."""
    parts = [("train", bundle.train), ("validation", bundle.validation), ("test", bundle.test)]
    counts = ", ".join(f"{name} {len(split):,} ({split.name})" for name, split in parts if split is not None)
    notes = "".join(f"\n  note: {note}" for note in bundle.notes)
    return (
        f"data: {bundle.source}, {len(bundle.labels)} labels, protocol {bundle.protocol}: {counts}; "
        f"selected on {bundle.selected_on}; loaded in {format_duration(seconds)}{notes}"
    )
