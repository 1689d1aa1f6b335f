"""Asking a training to stop: the first wish stays, Ctrl-C waits once, and what was there before comes back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from dlfer.train.progress import StopControl


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_a_wish_to_stop(number, reason, capfd):
    before = signal.getsignal(number)
    with StopControl().watch_signals() as control:
        assert control.get_reason() is None
        os.kill(os.getpid(), number)
        assert control.get_reason() == reason
    assert signal.getsignal(number) is before
    assert ("once more to stop at once" in capfd.readouterr().err) == (reason == "Ctrl-C")


def test_a_second_ctrl_c_interrupts_at_once():
    with StopControl().watch_signals() as control:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert control.get_reason() == "Ctrl-C"


def test_the_first_reason_stays_and_time_runs_out():
    control = StopControl(max_hours=0.0)
    assert control.get_reason() == "--max-hours"
    control.request("SIGTERM")
    assert control.get_reason() == "--max-hours"


def test_another_thread_than_the_main_one_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def watch() -> None:
        with StopControl().watch_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [before]
