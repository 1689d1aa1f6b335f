"""What tests of several parts call."""

from __future__ import annotations

import sys

import pytest

from dlfer.cli import main


@pytest.fixture
def call(capsys, monkeypatch):
    """Run `dlfer` with these arguments in this process; return its exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dlfer", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call
