"""How the benchmarks take time: by turns, warmed up first, and compared within a round."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "timing.py"


@pytest.fixture(scope="module")
def timing():
    spec = importlib.util.spec_from_file_location("timing", FILE)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up the module that they stand in.
    sys.modules["timing"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["timing"]


@pytest.fixture
def clock(timing, monkeypatch):
    """A clock that stands still but for what a test adds to it."""

    class Clock:
        now = 0.0

        def read(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.read)
    monkeypatch.setattr(timing.time, "process_time", lambda: 2 * clock.now)
    return clock


def test_ways_are_called_by_turns_and_the_warm_up_is_not_timed(timing, clock):
    calls = []

    def make_way(name, costs):
        costs = iter(costs)

        def way():
            calls.append(name)
            clock.now += next(costs)

        return way

    ways = {"a": make_way("a", [100.0, 100.0, 1.0, 2.0, 6.0]), "b": make_way("b", [50.0, 50.0, 2.0, 8.0, 6.0])}
    found = timing.time_by_turns(ways, rounds=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert found["a"].seconds.tolist() == [1.0, 2.0, 6.0]
    assert found["b"].seconds.tolist() == [2.0, 8.0, 6.0]
    assert found["a"].median == 2.0
    assert found["b"].cpu_seconds.tolist() == [4.0, 16.0, 12.0]
    assert found["b"].median_cpu == 12.0


def test_a_ratio_is_of_two_times_of_one_round(timing):
    """The machine slows down threefold on the way; the ratio of the medians would be 3."""
    slow_down = np.array([1.0, 1.1, 3.0])
    first = timing.Timing(slow_down)
    second = timing.Timing(2.0 * slow_down * np.array([1.0, 1.5, 1.0]))
    middle, low, high = first.compute_ratio(second)
    assert (middle, low, high) == pytest.approx((2.0, 2.0, 2.5))
    assert second.compute_ratio(first)[0] == pytest.approx(0.5)
    assert timing.describe_ratio(first, second) == {"ratio": 2.0, "quartiles": [2.0, 2.5]}


def test_a_process_tells_its_time_its_memory_and_what_it_printed(timing):
    code = "import os; block = b'x' * 300_000_000; print(os.environ['WORD'], len(block))"
    done = timing.run_process([sys.executable, "-c", code], environment={"WORD": "here"})
    assert done.output == "here 300000000\n"
    assert done.seconds > 0
    assert done.megabytes > 286
    with pytest.raises(RuntimeError, match=r"ended with 3\. this went wrong"):
        timing.run_process([sys.executable, "-c", "import sys; print('this went wrong', file=sys.stderr); sys.exit(3)"])


def test_figures_are_written_with_the_machine(timing, tmp_path, monkeypatch):
    path = tmp_path / "bench" / "a.json"
    monkeypatch.setattr(
        timing.sys, "argv", ["benchmarks/a.py", "--csv", str(tmp_path / "fer2013.csv"), "--rounds", "2"]
    )
    timing.write_figures(path, [{"x": 1}], "numpy", "no-such-package")
    written = json.loads(path.read_text())
    assert written["rows"] == [{"x": 1}]
    assert written["command"] == ["benchmarks/a.py", "--csv", "fer2013.csv", "--rounds", "2"]
    assert written["machine"]["numpy"] == np.__version__
    assert "no-such-package" not in written["machine"]
    assert {"processor", "cores", "load_average", "commit"} <= set(written["machine"])
    timing.write_figures(None, [])
