"""Listeners hear every event in order; one that raises is reported once and disturbs nobody."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from dlfer.errors import TrainingStopped
from dlfer.runs.listeners import Listener, Listeners

CALLS = {
    "start": (Path("run"), None),
    "step": ("pretrain", 1, 2, 10, {"loss": 1.5, "accuracy": 0.5}),
    "epoch": ("finetune", 1, {"train_loss": 0.5}),
    "finish": (None, Path("run")),
    "fail": (TrainingStopped("stopped", reason="Ctrl-C"),),
}


class Recorder(Listener):
    def __init__(self) -> None:
        self.calls = []


for _method in CALLS:
    setattr(Recorder, _method, lambda self, *given, _name=_method: self.calls.append((_name, *given)))


def list_events(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def call_all(listener: Listener) -> None:
    for name, arguments in CALLS.items():
        getattr(listener, name)(*arguments)


def test_the_tests_know_every_event():
    assert list_events(Listener) == set(CALLS) == list_events(Listeners)


def test_the_base_class_does_nothing():
    call_all(Listener())


def test_every_listener_hears_every_event_in_order():
    first, second = Recorder(), Recorder()
    call_all(Listeners([first, second]))
    assert first.calls == second.calls == [(name, *arguments) for name, arguments in CALLS.items()]


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("error", [ValueError("no"), OSError("gone"), ImportError("mlflow"), AssertionError()])
def test_a_listener_that_raises_is_reported_once_and_the_next_one_hears_of_it(method, error):
    class Broken(Recorder):
        pass

    def fail(self, *arguments):
        raise error

    setattr(Broken, method, fail)
    warnings, broken, whole = [], Broken(), Recorder()
    listeners = Listeners([broken, whole], warnings.append)
    call_all(listeners)
    call_all(listeners)
    assert len(warnings) == 1
    assert f"Broken failed in {method}(): {type(error).__name__}" in warnings[0]
    assert f"{Path(__file__).name}, line" in warnings[0]
    assert [name for name, *_ in whole.calls] == [*CALLS, *CALLS]
    assert [name for name, *_ in broken.calls] == [name for name in (*CALLS, *CALLS) if name != method]


def test_each_broken_listener_is_reported():
    class Broken(Listener):
        def epoch(self, stage, epoch, values):
            raise RuntimeError(stage)

    warnings = []
    Listeners([Broken(), Broken()], warnings.append).epoch("finetune", 1, {})
    assert len(warnings) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_passes(error):
    class Interrupted(Listener):
        def step(self, *arguments):
            raise error

    with pytest.raises(error):
        Listeners([Interrupted()]).step("finetune", 1, 1, 1, {})


def test_without_a_place_of_its_own_the_warning_goes_to_stderr(capsys):
    class Broken(Listener):
        def fail(self, error):
            raise RuntimeError("x")

    Listeners([Broken()]).fail(ValueError())
    captured = capsys.readouterr()
    assert "Broken failed in fail()" in captured.err
    assert captured.out == ""
