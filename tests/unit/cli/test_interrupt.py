"""Ctrl-C ends a command with exit code 130, also where a library turns the KeyboardInterrupt into an error of its own."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dlfer import cli

ROOT = Path(__file__).resolve().parents[3]


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


@pytest.mark.parametrize(("ignored", "code"), [(False, 130), (True, 0)])
def test_ctrl_c_during_the_imports_of_the_command_is_quiet(tmp_path, ignored, code):
    # A package that the command imports gets the signal where Python makes a RuntimeError of a KeyboardInterrupt.
    (tmp_path / "shlex.py").write_text(
        "import os, signal\n"
        "class Interrupted:\n"
        "    def __set_name__(self, owner, name):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "class Package:\n"
        "    attribute = Interrupted()\n"
        "print('imported')\n"
        "raise SystemExit\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, as from nohup
    ended = subprocess.run(
        [sys.executable, "-m", "dlfer", "--version"], env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout == ("imported\n" if ignored else "")


def test_the_script_has_the_same_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dlfer": "dlfer.__main__:main"}
