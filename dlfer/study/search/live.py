"""The search as a person watches it: a live table on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from dlfer.report.keys import format_overrides
from dlfer.runs.wording import format_duration
from dlfer.study.search.board import find_best
from dlfer.study.search.engine import TrialRecord
from dlfer.study.search.worker import Progress

_SHOWN = 8
_ENDED = ("finished", "rung", "pruned", "failed")


class SearchView:
    """Shows trials, the best so far and the time left on stderr.

    Args:
        figure: the validation figure that is the score.
        console: where to; stderr by default.

    Attributes:
        total_epochs: of all trials, where those have different ones.
    """

    def __init__(self, figure: str, console: Console | None = None) -> None:
        self.figure = figure
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.told: set[str] = set()
        self.live: Live | None = None
        self.title, self.total, self.num_workers = "", None, 1
        self.total_epochs: int | None = None

    def say(self, text: str) -> None:
        """Say a sentence; it stays above the table."""
        self.console.print(text, markup=False)

    def start(
        self, title: str, total: int | None, num_workers: int, read: Callable[[], tuple[list, list[Progress]]]
    ) -> None:
        """Begin to show an arm; `read` gives its records and where its workers stand."""
        self.title, self.total, self.num_workers = title, total, num_workers
        self.told = {record.trial for record in read()[0] if record.status in _ENDED}
        if self.console.is_terminal:
            self.live = Live(
                get_renderable=lambda: self.draw(*read()), console=self.console, refresh_per_second=2, transient=True
            )
            self.live.start()

    def stop(self) -> None:
        """Take the live table away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def update(self, records: Sequence[TrialRecord]) -> None:
        """Say a line for each trial that has ended since."""
        best = find_best(records, self.figure)
        for number, record in enumerate(records, start=1):
            if record.status not in _ENDED or record.trial in self.told:
                continue
            self.told.add(record.trial)
            of = f" of {self.total}" if self.total else ""
            if record.status == "failed":
                what = f"failed: {(record.error or '').splitlines()[0][:200]}"
            else:
                what = f"{self.figure} {record.score:.4f}{_describe_end(record)}"
                what += "  <- best so far" if best is not None and best.trial == record.trial else ""
            left = self.describe_left(records)
            self.say(f"trial {number}{of}: {format_overrides(record.overrides)}: {what}{f' ({left})' if left else ''}")

    def describe_left(self, records: Sequence[TrialRecord], workers: Sequence[Progress] = ()) -> str:
        """Return the time left, reckoned from the trials that have ended; "" where nothing tells.

        Of trials with different epochs, as those of Hyperband, the epochs are counted, else the trials.
        """
        ended = [record for record in records if record.seconds and record.status in _ENDED]
        if self.total_epochs is None:
            total, done = self.total or 0, sum(record.status in _ENDED for record in records)
            counted = len(ended)
        else:
            total, done = self.total_epochs, _count_epochs(ended)
            counted = done
        if not counted or total <= done:
            return ""
        took = sum(record.seconds for record in ended) / counted
        now = time.monotonic()
        running = sum(now - progress.started for progress in workers if progress.proposal is not None)
        seconds = (took * (total - done) - running) / self.num_workers
        return f"about {format_duration(seconds)} left" if seconds > 0 else ""

    def draw(self, records: Sequence[TrialRecord], workers: Sequence[Progress]) -> Group:
        """Return the live table: the best trials, those that run, and the time left."""
        table = Table(title=self.title, title_justify="left")
        for name in ("trial", "keys", "state", self.figure, "epochs", "time"):
            table.add_column(name, justify="right" if name in (self.figure, "epochs", "time") else "left")
        number = {record.trial: index for index, record in enumerate(records, start=1)}
        ended = [record for record in records if record.status in _ENDED]
        best = find_best(records, self.figure)
        newest = [record for record in ended if record is not best][-_SHOWN:]
        for record in [*([best] if best else []), *newest]:
            table.add_row(*_format_row(number[record.trial], record), style="bold green" if record is best else None)
        now, shown = time.monotonic(), set()
        for progress in workers:
            proposal = progress.proposal
            if proposal is not None:
                score = "–" if progress.score is None else f"{progress.score:.4f}"
                took = format_duration(now - progress.started)
                keys, state = format_overrides(proposal.overrides), f"running {progress.stage}".strip()
                table.add_row(str(number.get(proposal.trial, "–")), keys, state, score, str(progress.epoch), took)
                shown.add(proposal.trial)
        for record in records:
            # Of a trial on another machine no more is known than that it runs.
            if record.status == "running" and record.trial not in shown:
                table.add_row(str(number[record.trial]), format_overrides(record.overrides), "running", "–", "–", "–")
        failed = sum(record.status == "failed" for record in records)
        parts = [f"{len(ended)} of {self.total or '?'} trials"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"best {self.figure} {best.score:.4f}"] if best else []
        left = self.describe_left(records, workers)
        return Group(table, " · ".join([*parts, left] if left else parts))


def _count_epochs(records: Sequence[TrialRecord]) -> int:
    """Return the epochs that were trained; a trial's longer rung went on from its shorter one."""
    most: dict[str, int] = {}
    for record in records:
        trial = record.run or record.trial
        most[trial] = max(most.get(trial, 0), record.epochs)
    return sum(most.values())


def _describe_end(record: TrialRecord) -> str:
    if record.status == "rung":
        return f" after the {record.epochs} epochs of its rung"
    return f" when pruned after {record.epochs} epochs" if record.status == "pruned" else ""


def _format_row(number: int, record: TrialRecord) -> tuple[str, ...]:
    score = "–" if record.score is None else f"{record.score:.4f}"
    keys = format_overrides(record.overrides)
    return str(number), keys, record.status, score, str(record.epochs), format_duration(record.seconds)
