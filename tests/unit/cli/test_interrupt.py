"""Ctrl-C ends a command with exit code 130, also where a library turns the KeyboardInterrupt into an error of its own."""

import os
import signal

import pytest

from dlfer import cli


@pytest.fixture(autouse=True)
def heeded_sigint():
    """Ctrl-C is heeded, also where the tests run in the background of a shell, which lets it be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("swallow", [False, True])
def test_exit_code_after_ctrl_c(monkeypatch, swallow):
    def work(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            if swallow:
                raise RuntimeError("a callback failed") from error
            raise

    monkeypatch.setattr(cli, "app", work)
    with pytest.raises(SystemExit) as stop:
        cli.main(["show"])
    assert stop.value.code == 130


def test_other_errors_keep_their_exit_code(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["show"])
    assert stop.value.code == 1
