"""Trying a reader on many damaged files: a short, repeatable slice by default, minutes with FUZZ_MINUTES.

A property is a function of a few random generators, one for each change that it makes to a valid file, so
that Hypothesis can take changes away from what failed. It returns whether the file was accepted; a refusal is
an exception of dlfer.errors. Anything else that is raised, and a file that takes a minute, fails the test.
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
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dlfer.errors import DlferError

Property = Callable[[list[Random]], bool]

SLICE = 60
"""Files of each property in the default tests."""
BATCH = 500
LONGEST_MESSAGE = 20_000
SLOWEST = 60
MEMORY = 3 * 2**30
"""What a process that fuzzes for minutes may have; an allocation beyond it fails."""
CHANGES = st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=6)
"""Seeds, one for each change."""


@pytest.fixture
def try_many(request: pytest.FixtureRequest) -> Callable[[Property], Counter]:
    """Return what tries a property on many files and counts the outcomes: tried, accepted, refused."""
    tests = [item for item in request.session.items if item.path == request.node.path]
    seconds = 60 * float(os.environ.get("FUZZ_MINUTES", 0)) / len(tests)

    def run(read: Property) -> Counter:
        counts: Counter = Counter()

        def check(seeds: list[int]) -> None:
            counts["tried"] += 1
            try:
                with at_most(SLOWEST):
                    counts["accepted" if read([Random(number) for number in seeds]) else "other"] += 1
            except DlferError as error:
                counts["refused"] += 1
                assert 10 < len(str(error)) < LONGEST_MESSAGE
            except BaseException as error:
                error.add_note(f"seeds of the changes: {seeds}")
                raise

        if not seconds:
            give_seeds(SLICE, derandomize=True)(check)()
            return counts
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            seed(time.time_ns())(give_seeds(BATCH, phases=(Phase.generate, Phase.shrink), print_blob=False)(check))()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"\n{request.node.nodeid}: {dict(counts)} in {seconds:.0f} s, at most {peak} MB", file=sys.stderr)
        return counts

    return run


def give_seeds(count: int, **options) -> Callable[[Callable], Callable]:
    """Return what makes Hypothesis call a function of seeds so many times."""
    chosen = settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck), **options
    )

    def decorate(check: Callable) -> Callable:
        @chosen
        @given(CHANGES)
        def run(seeds: list[int]) -> None:
            check(seeds)

        return run

    return decorate


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
