"""Trying a reader on many damaged files: a short, repeatable slice by default, minutes with FUZZ_MINUTES.

A property is a function of a few random generators, one for each change that it makes to a valid file. It
returns whether the file was accepted; a refusal is an exception of dlfer.errors. Anything else that is raised,
and a file that takes a minute, fails the test. Hypothesis draws the slice and takes changes away from what
failed; for minutes a plain loop draws, which is ten times as fast.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlfer.errors import DlferError

Property = Callable[[list[Random]], bool]

SLICE = 60
"""Files of each property in the default tests."""
MAX_CHANGES = 6
LONGEST_MESSAGE = 20_000
SLOWEST = 60
MEMORY = 3 * 2**30
"""What a process that fuzzes for minutes may have; an allocation beyond it fails."""


@pytest.fixture
def try_many(request: pytest.FixtureRequest) -> Callable[[Property], Counter]:
    """Return what tries a property on many files and counts the outcomes: tried, accepted, refused."""
    tests = [item for item in request.session.items if item.path == request.node.path]
    seconds = 60 * float(os.environ.get("FUZZ_MINUTES", 0)) / len(tests)

    def run(read: Property) -> Counter:
        counts: Counter = Counter()

        def check(seeds: list[int]) -> None:
            counts["tried"] += 1
            message = ""
            try:
                with at_most(SLOWEST):
                    counts["accepted" if read([Random(number) for number in seeds]) else "other"] += 1
            except DlferError as error:
                counts["refused"] += 1
                message = str(error)
            except BaseException as error:
                error.add_note(f"seeds of the changes: {seeds}")
                raise
            assert len(message) < LONGEST_MESSAGE

        if seconds:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
            try_for(check, seconds)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"\n{request.node.nodeid}: {dict(counts)} in {seconds:.0f} s, at most {peak} MB", file=sys.stderr)
        else:
            try_slice(check)
        return counts

    return run


def try_slice(check: Callable[[list[int]], None]) -> None:
    """Check the same few files each time."""

    @settings(
        max_examples=SLICE, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(st.integers(0, 2**32 - 1), max_size=MAX_CHANGES))
    def run(seeds: list[int]) -> None:
        check(seeds)

    run()


def try_for(check: Callable[[list[int]], None], seconds: float) -> None:
    """Check other files each time, for so long; of what fails, the fewest changes that still fail are told."""
    random = Random(time.time_ns())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seeds = [random.getrandbits(32) for _ in range(random.randrange(MAX_CHANGES + 1))]
        try:
            check(seeds)
        except Exception:
            for number in list(seeds):
                fewer = [other for other in seeds if other != number]
                seeds = fewer if fails(check, fewer) else seeds
            check(seeds)
            raise


def fails(check: Callable[[list[int]], None], seeds: list[int]) -> bool:
    try:
        check(seeds)
    except Exception:
        return True
    return False


class at_most:
    """Raise TimeoutError inside a block that takes longer than so many seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def stop(*_) -> None:
            raise TimeoutError(f"took more than {self.seconds} s")

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def __exit__(self, *_) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)
