"""What the framework says while it is imported is kept back, and shown where it fails or --debug is said."""

import logging
import os
import platform
import subprocess
import sys

import pytest

from dlfer.quiet import hush_libraries

SPEAK = "import os; os.write(2, b'I0000 port.cc: oneDNN is on\\n')"


def import_fake(tmp_path, body, **environment):
    """Import a module `tensorflow` of this body in a process of its own; return the process."""
    (tmp_path / "tensorflow.py").write_text(f"{SPEAK}\n{body}\n")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from dlfer.quiet import hush_libraries\n"
        "hush_libraries(); hush_libraries(); print(len(sys.meta_path))\n"
        # tensorflow_datasets looks for it before it imports it.
        "import importlib.util; importlib.util.find_spec('tensorflow')\n"
        "import tensorflow; os.write(2, b'after'); print(tensorflow.VALUE, tensorflow.__name__)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "DLFER_DEBUG": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_is_said_during_the_import_is_kept_back(tmp_path):
    done = import_fake(tmp_path, "VALUE = 3")
    assert done.stdout.splitlines()[1] == "3 tensorflow"
    assert done.stderr == "after"


def test_debug_shows_it(tmp_path):
    done = import_fake(tmp_path, "VALUE = 3", DLFER_DEBUG="1")
    assert done.stderr == "I0000 port.cc: oneDNN is on\nafter"


@pytest.mark.parametrize("body", ["raise ImportError('libcuda is missing')", "import no_such_package"])
def test_a_failing_import_shows_what_was_said(tmp_path, body):
    done = import_fake(tmp_path, body)
    assert done.returncode == 1
    assert done.stderr.startswith("I0000 port.cc: oneDNN is on\nTraceback")


@pytest.mark.parametrize("debug", ["", "1"])
def test_opencv_says_nothing_of_damaged_files_but_with_debug(tmp_path, debug):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    (tmp_path / "a.pam").write_bytes(b"P7\nWIDTH 8\nHEIGHT 8\nDEPTH 9\nMAXVAL 7\nENDHDR\n" + bytes(999))
    code = (
        "from dlfer.quiet import hush_libraries; hush_libraries(); import cv2, sys\n"
        "cv2.VideoCapture(sys.argv[1] + '/a.mp4').isOpened(); cv2.imread(sys.argv[1] + '/a.pam')"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**kept, "DLFER_DEBUG": debug},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert bool(done.stderr) == bool(debug)


@pytest.mark.parametrize("debug", ["", "1"])
def test_advice_on_how_functions_are_compiled_is_kept_back_and_other_warnings_are_not(tmp_path, debug):
    body = (
        "import logging; logger = logging.getLogger('tensorflow'); logger.addHandler(logging.StreamHandler()); VALUE = 1\n"
        "logger.warning('5 out of the last %d calls triggered tf.function retracing. Tracing is expensive', 6)\n"
        "logger.warning('From %s: CounterV2 is deprecated and will be removed', 'reader.py')\n"
        "logger.warning('another')"
    )
    (tmp_path / "warns.py").write_text(body)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from dlfer.quiet import hush_libraries; hush_libraries(); import warns"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "DLFER_DEBUG": debug},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ("retracing" in done.stderr) == ("deprecated" in done.stderr) == bool(debug)
    assert "another" in done.stderr


@pytest.mark.parametrize(("debug", "is_said"), [("", False), ("1", True)])
def test_matplotlib_does_not_say_where_it_keeps_its_fonts(tmp_path, debug, is_said):
    code = "from dlfer.quiet import hush_libraries; hush_libraries(); import matplotlib.font_manager"
    (tmp_path / "file").touch()  # a folder in a file cannot be made, not by root either
    environment = {**os.environ, "DLFER_DEBUG": debug, "MPLCONFIGDIR": str(tmp_path / "file" / "x")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("temporary cache directory" in done.stderr) == is_said


# ONNX Runtime is told not to report; TensorFlow, to use oneDNN on processors with AVX2, too.
@pytest.mark.parametrize(
    "name",
    [
        "ORT_DISABLE_TELEMETRY",
        pytest.param(
            "TF_ENABLE_ONEDNN_OPTS",
            marks=pytest.mark.skipif(
                sys.platform != "linux" or platform.machine() != "x86_64", reason="set on Linux with x86 only"
            ),
        ),
    ],
)
@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_a_variable_of_a_library_is_set_unless_the_user_did(name, given, expected):
    code = f"import os, dlfer; print(os.environ['{name}'])"
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {} if given is None else {name: given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_onnx_runtime_leaves_no_identifier_behind(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    code = "import dlfer, onnxruntime; onnxruntime.get_available_providers()"
    environment["HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("name", "message", "is_said"),
    [
        ("absl", "`FeatureConnector.dtype` is deprecated.", False),
        ("absl", "Variant folder %s has no dataset_info.json", False),
        ("tensorflow", "5 out of 5 calls triggered tf.function retracing", False),
        ("matplotlib.font_manager", "Matplotlib is building the font cache; this may take a moment.", False),
        ("absl", "a record is damaged", True),
    ],
)
def test_advice_of_libraries_to_their_callers_is_kept_back(monkeypatch, caplog, name, message, is_said):
    monkeypatch.delenv("DLFER_DEBUG", raising=False)
    hush_libraries()
    with caplog.at_level("INFO", logger=name):
        logging.getLogger(name).warning(message, "x") if "%s" in message else logging.getLogger(name).warning(message)
    assert bool(caplog.records) == is_said


def test_advice_whose_words_come_as_arguments_is_kept_back(caplog):
    hush_libraries()
    for name in ("absl", "tensorflow"):
        logging.getLogger(name).warning("Variant folder %s has no %s", "/data/fer2013", "dataset_info.json")
        logging.getLogger(name).warning("Variant folder %s has no %s", "/data/fer2013", "permission")
    assert set(caplog.messages) == {"Variant folder /data/fer2013 has no permission"}
