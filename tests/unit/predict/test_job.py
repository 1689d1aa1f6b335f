"""dlfer predict from end to end, with a classifier of brightness: outputs, failures, progress, exit codes."""

import csv
import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dlfer import cli
from dlfer.data.faces import Face
from dlfer.errors import ModelError
from dlfer.predict import draw, tables
from dlfer.predict import job as module
from dlfer.predict.draw import VideoWriter
from dlfer.predict.media import Frame
from dlfer.predict.predictor import FramePrediction
from dlfer.predict.video import Video
from tests.unit.conftest import make_stdin


@pytest.fixture
def call(capsys, monkeypatch, classifier, blocks, tmp_path):
    """Return a function: arguments of dlfer predict -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_engine", lambda name, engine: classifier)
    monkeypatch.setattr(module, "find_default_model", lambda: Path("the default"))

    def run(*args):
        with pytest.raises(SystemExit) as caught:
            cli.main(["predict", *map(str, args)])
        return (caught.value.code or 0, *capsys.readouterr())

    return run


def test_pictures_to_csv_on_stdout_with_talk_on_stderr(call, draw_blocks):
    Image.fromarray(draw_blocks((5, 5, 20, 250), (40, 10, 30, 130))).save("a.png")
    Image.fromarray(draw_blocks()).save("b.png")
    Path("bad.jpg").write_text("text")
    code, out, err = call("a.png", "bad.jpg", "b.png", "absent.png", "--faces", "opencv", "--draw", "drawn")
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["file"], row["face"], row["label"]) for row in rows] == [
        ("a.png", "1", "Light"),
        ("a.png", "2", "Light"),
        ("bad.jpg", "", ""),
        ("b.png", "0", ""),
        ("absent.png", "", ""),
    ]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, True]
    assert rows[4]["error"] == "absent.png: there is no such file."
    assert "annotators would give" in err
    assert "not calibrated" in err
    assert "bad.jpg" in err
    assert "absent.png: there is no such file" in err
    assert "2 of the inputs could not be read" in err
    assert "Left out, not read" not in err  # each is named with its reason
    assert "written: drawn, the marked copies" in err
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["a.jpg", "b.jpg"]


def test_an_empty_folder_to_draw_in_is_refused(call, draw_blocks):
    Image.fromarray(draw_blocks()).save("b.png")
    code, out, err = call("b.png", "--faces", "whole", "--draw", "")
    assert (code, out, "--draw: found an empty path" in err) == (2, "", True)
    assert [path.name for path in Path().iterdir()] == ["b.png"]


def write_data() -> list[str]:
    Path("fer.csv").write_text("emotion,pixels\n0,1 2 3\n")
    Path("fer.csv.gz").write_bytes(gzip.compress(b"emotion,pixels\n"))
    Path("photo.gz").write_bytes(gzip.compress(b"\xff\xd8\xff"))
    Path("x.yaml").write_text("experiment: {name: x}\n")
    np.savez("a.npz", images=np.zeros((1, 8, 8), np.uint8))
    for name in ("faces.zip", "text.zip"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("a/happy.png" if name == "faces.zip" else "a.txt", b"x")
    return ["fer.csv", "fer.csv.gz", "photo.gz", "x.yaml", "a.npz", "faces.zip", "text.zip"]


def test_data_among_pictures_do_not_stop_the_job(call, draw_blocks):
    Image.fromarray(draw_blocks()).save("b.png")
    data = write_data()
    code, out, err = call(*data, "b.png", "--faces", "whole")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 1
    assert [row["file"] for row in rows if not row["error"]] == ["b.png"]
    assert [row["file"] for row in rows if "not a picture" in row["error"]] == data
    assert "7 of the inputs could not be read" in err


@pytest.mark.parametrize(
    ("name", "what", "has_unpack", "has_evaluate"),
    [
        ("fer.csv", "a csv", False, True),
        ("fer.csv.gz", "a csv", False, True),
        ("photo.gz", "a gzip archive", True, False),
        ("x.yaml", "an experiment file", False, True),
        ("a.npz", "arrays", False, True),
        ("faces.zip", "a zip of pictures", True, True),
        ("text.zip", "a zip archive", True, False),
    ],
)
def test_data_alone_are_refused_with_what_to_do(call, name, what, has_unpack, has_evaluate):
    write_data()
    code, out, err = call(name)
    assert (code, out, f"{name}: found {what}, expected pictures" in err) == (2, "", True)
    assert ("unpack it" in err, "dlfer evaluate MODEL --data" in err) == (has_unpack, has_evaluate)


@pytest.mark.parametrize("suffix", ["csv", "gz", "zip", "npz", "yaml"])
@pytest.mark.parametrize(
    ("contents", "told"),
    [(bytes(range(256)), "not a picture"), (b"\x1f\x8bxx", "not a picture"), (b"", "the file is empty")],
)
def test_a_damaged_file_is_not_called_data(call, suffix, contents, told):
    Path(f"x.{suffix}").write_bytes(contents)
    code, _, err = call(f"x.{suffix}")
    assert (code, f"x.{suffix}: {told}" in err, "dlfer evaluate" in err) == (1, True, False)


@pytest.mark.parametrize("has_font", [True, False])
def test_numbers_for_labels_without_a_font_are_explained(call, classifier, draw_blocks, monkeypatch, has_font):
    monkeypatch.setattr(classifier, "labels", ("Dark", "明るい"), raising=False)
    monkeypatch.setattr(draw, "_find_font", lambda label: "" if has_font or label.isascii() else None)
    Image.fromarray(draw_blocks((5, 5, 20, 250))).save("a.png")
    code, out, err = call("a.png", "--faces", "opencv", "--draw", "drawn")
    assert code == 0
    assert "明るい" in out
    assert ("show numbers for labels that no font found here can write: [2] 明るい." in err) is not has_font
    assert "show numbers" not in call("a.png", "--faces", "opencv")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode alone")
def test_a_list_on_stdin_may_name_files_that_are_not_utf8(call, draw_blocks, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(draw_blocks((5, 5, 20, 250))).save("a.png")
    os.rename("a.png", name)
    # As in a locale such as en_US.UTF-8, where Python reads stdin strictly.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.png\n"), encoding="utf-8"))
    code, out, err = call("-", "--faces", "opencv")
    assert code == 0, err
    assert [row["file"] for row in csv.DictReader(io.StringIO(out))] == [r"caf\xe9.png"]


def test_a_list_on_stdin_to_json(call, draw_blocks, monkeypatch):
    Image.fromarray(draw_blocks((5, 5, 20, 130))).save("a.png")
    monkeypatch.setattr("sys.stdin", make_stdin("a.png\nb.png\n"))
    code, out, _ = call("-", "--faces", "opencv", "--abstain", "0.9", "--out", "a.json")
    found = json.loads(Path("a.json").read_text())
    assert (code, out) == (1, "")
    assert found["about"]["abstain_below"] == 0.9
    assert "annotators" in found["about"]["notice"]
    assert [(row["label"], row["abstained"]) for row in found["rows"]] == [("uncertain", True)]
    assert found["failed"][0]["file"] == "b.png"


def test_json_counts_what_a_folder_holds_by_reason(call, draw_blocks):
    Path("in/__MACOSX").mkdir(parents=True)
    save(draw_blocks, "in/a.png", "in/b.png")
    for name in ("notes.txt", "model.nef", ".DS_Store", "__MACOSX/._a.png"):
        (Path("in") / name).write_text("x")
    Path("in/bad.jpg").write_text("text")
    assert call("in", "absent.png", "--faces", "whole", "--out", "a.json")[0] == 1
    reading = json.loads(Path("a.json").read_text())["reading"]
    assert (reading["seen"], reading["used"]) == (8, 2)
    assert {reason["reason"]: (reason["n"], reason["first"]) for reason in reading["left_out"]} == {
        "unreadable or incomplete": (2, ["in/bad.jpg", "absent.png"]),
        "hidden files and files of the system": (2, ["in/.DS_Store", "in/__MACOSX"]),
        "files that are not in a supported picture format (.txt)": (1, ["in/notes.txt"]),
        "raw pictures of cameras, which are not decoded: convert them to JPEG or PNG": (1, ["in/model.nef"]),
    }


def test_a_video_that_is_cut_short_is_one_input(call, draw_blocks):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter("a.avi", cv2.VideoWriter_fourcc(*"MJPG"), 25, (80, 60))
    for index in range(12):
        writer.write(draw_blocks((10 + index, 10, 20, 250)))
    writer.release()
    data = Path("a.avi").read_bytes()
    Path("a.avi").write_bytes(data[: len(data) * 2 // 3])
    save(draw_blocks, "b.png")
    assert call("a.avi", "b.png", "--faces", "whole", "--out", "a.json")[0] == 1
    found = json.loads(Path("a.json").read_text())
    assert len(found["rows"]) > 3
    assert (found["reading"]["seen"], found["reading"]["used"]) == (2, 1)
    assert [reason["reason"] for reason in found["reading"]["left_out"]] == ["unreadable or incomplete"]


def test_a_video_to_lines_and_an_annotated_video(call, draw_blocks):
    pytest.importorskip("cv2")
    writer = VideoWriter(Path("a.mp4"), rate=10)
    for index in range(5):
        writer.write(np.kron(draw_blocks((10 + 2 * index, 10, 20, 250)), np.ones((4, 4, 1), np.uint8)))
    writer.close()
    code, _, err = call("a.mp4", "--faces", "whole", "--out", "a.jsonl", "--draw", "drawn")
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert code == 0
    assert [row["frame"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["seconds"] for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {row["track"] for row in rows} == {1}
    assert "smoothing: " in err
    assert Path("drawn/a.mp4").stat().st_size > 1000


def write_video(draw_blocks, path="a.mp4", count=9, rate=25):
    pytest.importorskip("cv2")
    writer = VideoWriter(Path(path), rate=rate)
    for index in range(count):
        writer.write(np.kron(draw_blocks((10 + index, 10, 20, 250)), np.ones((4, 4, 1), np.uint8)))
    writer.close()


@pytest.mark.parametrize(
    ("args", "looked", "told"),
    [
        ((), [0, 4, 8], "about 7 times a second"),
        (("--detect-every", "3"), [0, 3, 6, 8], "on one frame in 3"),
        (("--detect-every", "1"), list(range(9)), None),
    ],
)
def test_rows_tell_on_which_frames_faces_were_searched_for(call, draw_blocks, monkeypatch, args, looked, told):
    def find(images, *, detector, size=None):
        return [[Face((40.0, 40.0, 80.0, 80.0), 0.75)] for _ in images]

    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", find)
    write_video(draw_blocks)
    code, _, err = call("a.mp4", "--faces", "opencv", "--out", "a.json", *args)
    found = json.loads(Path("a.json").read_text())
    assert code == 0
    assert [row["frame"] for row in found["rows"] if row["score"] is not None] == looked
    assert [row["frame"] for row in found["rows"]] == list(range(9))
    assert ("detection: " in err) == (told is not None)
    assert told is None or told in found["about"]["detection"]


class FakeWindows:
    """What cv2 has for windows; answers with these keys, one each time it is asked, then with none."""

    WND_PROP_VISIBLE = 4

    def __init__(self, cv2, keys=(), is_closed_after=10**9) -> None:
        self._cv2, self.keys, self.shown, self.closed = cv2, list(keys), [], 0
        self.is_closed_after, self.delays, self.sizes = is_closed_after, [], []

    def __getattr__(self, name):
        return getattr(self._cv2, name)

    def getBuildInformation(self):
        return "General\n\n  GUI:                           QT5\n    QT:   YES (ver 5.15.19)\n"

    def namedWindow(self, title, flags):
        assert flags & self.WINDOW_KEEPRATIO == self.WINDOW_KEEPRATIO

    def resizeWindow(self, title, *size):
        self.sizes.append(size)

    def imshow(self, title, image):
        self.shown.append((title, image.copy()))

    def waitKey(self, delay):
        assert delay >= 1
        self.delays.append(delay)
        return self.keys.pop(0) if self.keys else -1

    def getWindowProperty(self, title, what):
        assert (title, what) == (self.shown[-1][0], 4)
        return 0.0 if len(self.shown) >= self.is_closed_after else 1.0

    def destroyAllWindows(self):
        self.closed += 1


@pytest.fixture
def open_windows(monkeypatch):
    """Return a function that puts windows in the place of OpenCV's, which are there and have a display."""
    cv2 = pytest.importorskip("cv2")

    def put(**options):
        windows = FakeWindows(cv2, **options)
        monkeypatch.setattr(draw, "load_opencv", lambda: windows)
        monkeypatch.setattr(draw.subprocess, "run", lambda *args, **kw: SimpleNamespace(returncode=0, stderr=""))
        monkeypatch.setenv("DISPLAY", ":77")
        return windows

    return put


def test_a_video_is_shown_with_its_boxes_and_the_table_is_the_same(call, draw_blocks, open_windows):
    windows = open_windows()
    write_video(draw_blocks)
    assert call("a.mp4", "--faces", "whole", "--out", "a.csv")[0] == 0
    assert call("a.mp4", "--faces", "whole", "--out", "b.csv", "--show", "--draw", "drawn")[0] == 0
    assert Path("a.csv").read_text() == Path("b.csv").read_text()
    assert len(windows.shown) == 9
    assert {(title, image.shape, image.dtype) for title, image in windows.shown} == {
        (draw.TITLE, (240, 320, 3), np.dtype(np.uint8))
    }
    assert windows.closed == 1
    # The colour of a label, in the order of OpenCV.
    assert (windows.shown[0][1].reshape(-1, 3) == draw.PAPER[::-1]).all(axis=1).any()
    assert Path("drawn/a.mp4").stat().st_size > 1000


@pytest.mark.parametrize("key", [ord("q"), 27, ord("q") + 0x100000])
def test_q_and_esc_end_with_the_rows_so_far(call, draw_blocks, open_windows, key):
    windows = open_windows(keys=[-1, -1, -1, key])
    write_video(draw_blocks, count=60, rate=1000 / 33)
    code, _, _ = call("a.mp4", "--faces", "whole", "--out", "a.csv", "--show")
    assert code == 0
    assert 1 <= len(windows.shown) <= 4
    assert len(Path("a.csv").read_text().splitlines()) == 1 + len(windows.shown)
    assert windows.closed == 1


def test_a_window_that_is_closed_ends_the_job_and_other_keys_do_not(call, draw_blocks, open_windows):
    windows = open_windows(keys=[ord("x")] * 200, is_closed_after=5)
    write_video(draw_blocks, count=30)
    assert call("a.mp4", "--faces", "whole", "--out", "a.csv", "--show")[0] == 0
    assert len(windows.shown) == 5


def test_a_video_is_shown_at_its_rate_and_what_comes_late_is_not_caught_up_with(open_windows, monkeypatch):
    windows, now = open_windows(), 100.0

    def wait(delay):
        nonlocal now
        now += delay / 1000
        return -1

    monkeypatch.setattr(windows, "waitKey", wait)
    monkeypatch.setattr(draw.time, "monotonic", lambda: now)
    window, video, ends = draw.Window(), Video(10.0, None, False), []
    for index in range(6):
        now += 0.5 if index == 3 else 0.02  # what the prediction takes
        assert window.show(
            FramePrediction(Frame("a.mp4", np.zeros((48, 64, 3), np.uint8), index, index / 10, video), [])
        )
        ends.append(now)
    assert np.diff(ends) == pytest.approx([0.1, 0.1, 0.5, 0.1, 0.1], abs=0.01)
    live = Frame("camera:0", np.zeros((48, 64, 3), np.uint8), 0, 7.0, Video(10.0, None, True))
    assert window.show(FramePrediction(live, []))
    assert now - ends[-1] < 0.01


def test_pictures_wait_for_a_key_and_what_cannot_be_read_is_passed_over(call, draw_blocks, open_windows):
    windows = open_windows(keys=[-1, -1, ord(" "), -1, ord("q")])
    save(draw_blocks, "a.png", "c.png")
    Image.new("RGB", (3840, 1000)).save("b.png")
    Path("bad.jpg").write_text("text")
    assert call("a.png", "bad.jpg", "b.png", "c.png", "--faces", "whole", "--out", "a.csv", "--show")[0] == 1
    assert len(windows.shown) == 2
    assert min(windows.shown[0][1].shape[:2]) == 240  # enlarged
    assert windows.sizes == [(320, 240), (960, 250)]
    assert windows.keys == []


class FakeCamera:
    """A camera of one grey face; it never ends."""

    def __init__(self, source) -> None:
        self.is_there = source == 0

    def isOpened(self):
        return self.is_there

    def get(self, what):
        return 0.0

    def grab(self):
        time.sleep(0.005)
        return True

    def retrieve(self):
        return True, np.full((48, 64, 3), 200, np.uint8)

    def release(self):
        self.is_there = False


def test_a_camera_is_shown_until_q(call, open_windows, monkeypatch):
    monkeypatch.setattr("cv2.VideoCapture", FakeCamera)
    windows = open_windows(keys=[-1] * 9 + [ord("q")])
    code, _, err = call("camera:0", "--faces", "whole", "--out", "a.csv", "--show")
    assert (code, len(windows.shown)) == (0, 10), err
    assert max(windows.delays) == 1  # nothing is waited for
    assert len(Path("a.csv").read_text().splitlines()) == 11
    code, _, err = call("camera:1", "--faces", "whole", "--show")
    assert code == 1
    assert "no such camera" in err


def test_an_error_or_ctrl_c_closes_the_window(call, draw_blocks, open_windows, monkeypatch):
    windows = open_windows()
    write_video(draw_blocks)
    monkeypatch.setattr(windows, "waitKey", lambda delay: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call("a.mp4", "--faces", "whole", "--out", "a.csv", "--show")[0] == 130
    assert windows.closed == 1
    assert len(Path("a.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("build", "display", "told"),
    [
        ("  GUI:                           NONE\n", ":0", "opencv-python-headless"),
        ("  GUI:                           QT5\n", "", "DISPLAY is not set"),
        ("  GUI:                           GTK3\n", ":0", "could not connect to display"),
    ],
)
def test_where_no_window_can_be_opened_it_is_said_before_the_model_is_loaded(
    call, draw_blocks, open_windows, monkeypatch, build, display, told
):
    windows = open_windows()
    failed = SimpleNamespace(returncode=-6, stderr="qt.qpa.xcb: could not connect to display :0\nAborted\n")
    monkeypatch.setattr(windows, "getBuildInformation", lambda: build)
    monkeypatch.setattr(draw.subprocess, "run", lambda *args, **kw: failed)
    monkeypatch.setattr(module, "load_engine", lambda *args: 1 / 0)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    save(draw_blocks, "a.png")
    code, out, err = call("a.png", "--show")
    assert (code, out) == (2, "")
    assert told in " ".join(err.split())
    assert "--draw DIR" in " ".join(err.split())
    assert "Traceback" not in err
    assert not windows.shown


def test_ctrl_c_keeps_the_rows_so_far(call, draw_blocks, monkeypatch):
    def interrupt(*args, **options):
        yield from list(inputs(*args, **options))
        raise KeyboardInterrupt

    inputs = module.predict_inputs
    Image.fromarray(draw_blocks((5, 5, 20, 130))).save("a.png")
    monkeypatch.setattr(module, "predict_inputs", interrupt)
    code, _, _ = call("a.png", "--faces", "opencv", "--out", "a.csv")
    assert code == 130
    assert len(Path("a.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_job_that_is_ended_keeps_the_rows_so_far(call, draw_blocks, monkeypatch, request, name):
    def end(*args, **options):
        yield next(inputs(*args, **options))
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(5)

    # Under nohup, SIGHUP is ignored, and stays so.
    number = getattr(signal, name)
    outer = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, outer))
    inputs = module.predict_inputs
    save(draw_blocks, "a.png", "b.png")
    monkeypatch.setattr(module, "predict_inputs", end)
    code, _, err = call("a.png", "b.png", "--faces", "whole", "--out", "a.csv")
    assert code == 128 + number
    assert [row["file"] for row in read_csv("a.csv")] == ["a.png"]
    assert "not reached before the job ended: 1" in err
    assert signal.getsignal(number) != signal.default_int_handler
    assert not list(Path().glob(".*.tmp"))


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with module.interrupt_on_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_inputs_that_an_interrupted_job_did_not_reach_are_counted(call, draw_blocks, monkeypatch):
    def interrupt(*args, **options):
        yield next(inputs(*args, **options))
        raise KeyboardInterrupt

    inputs = module.predict_inputs
    save(draw_blocks, "a.png", "b.png", "c.png")
    monkeypatch.setattr(module, "predict_inputs", interrupt)
    code, _, err = call("a.png", "b.png", "c.png", "--faces", "whole", "--out", "a.json")
    assert code == 130
    assert "3 files seen, 1 used, 2 left out" in err
    assert "not reached before the job ended: 2 (all after a.png, ...)" in err
    assert json.loads(Path("a.json").read_text())["reading"]["used"] == 1


def test_a_failure_leaves_no_table(call, draw_blocks, monkeypatch, classifier):
    Image.fromarray(draw_blocks((5, 5, 20, 130))).save("a.png")
    monkeypatch.setattr(classifier, "predict", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.predict_files(["a.png"], module.PredictionJob(out=Path("a.csv"), faces="opencv"), say=lambda text: None)
    assert not list(Path().glob("*.csv*"))
    assert not list(Path().glob(".*.tmp"))


def test_an_empty_name_of_a_model_is_not_the_default(draw_blocks, tmp_path, monkeypatch):
    """As an empty variable of a shell gives it."""
    monkeypatch.chdir(tmp_path)
    save(draw_blocks, "a.png")
    with pytest.raises(ModelError, match="found ''"):
        module.predict_files(["a.png"], module.PredictionJob(model=""), say=lambda text: None)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--faces", "some"), "faces"),
        (("--abstain", "2"), "abstain"),
        (("--every", "0"), "--every"),
        (("--smooth", "-1"), "--smooth"),
        (("--smooth", "nan"), "--smooth nan"),
        (("--smooth", "inf"), "--smooth inf"),
        (("--seconds", "-3"), "--seconds -3"),
        (("--seconds", "nan"), "--seconds nan"),
        (("--abstain", "nan"), "abstain: found nan"),
        (("--max-megapixels", "nan"), "--max-megapixels nan"),
        (("--max-megapixels", "inf"), "--max-megapixels inf"),
        (("--max-megapixels", "0"), "--max-megapixels 0"),
        (("--detect-every", "0"), "--detect-every 0"),
        (("--detect-every", "often"), "--detect-every often"),
        (("--detect-every", "9" * 5000), "--detect-every 9"),
        (("--detect-every", "-3"), "--detect-every -3"),
        (("--engine", "litert"), "--model"),
        (("--out", "a.xlsx"), ".parquet"),
    ],
)
def test_wrong_options_end_with_2(call, args, problem):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save("a.png")
    code, _, err = call("a.png", *args)
    assert code == 2
    assert problem in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (("a.png", "b.png", "--faces", "whole"), {"num_faces": 2, "any_size": True}),
        (("-", "--faces", "opencv"), {"num_faces": 64, "any_size": False}),
    ],
)
def test_the_engine_is_chosen_for_what_is_to_be_done(call, args, given, classifier, monkeypatch):
    def choose(name, *, say, **options):
        say(f"engine chosen for {name}")
        assert options == given
        return classifier

    monkeypatch.setattr("dlfer.predict.job.choose_engine", choose)
    monkeypatch.setattr("sys.stdin", make_stdin("a.png\n"))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(name)
    code, out, err = call(*args, "--engine", "auto")
    assert code == 0
    assert "engine chosen for the default" in err
    assert "engine" not in out


def save(draw_blocks, *names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_blocks((5, 5, 20, 130))).save(name)


def read_csv(path):
    return list(csv.DictReader(io.StringIO(Path(path).read_bytes().decode())))


def snapshot(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("photos", "--draw", "photos"), ("photos/me",)),
        (("photos/me.jpg", "--draw", "photos/sub/.."), ("photos/sub/../me.jpg", "photos/me.jpg")),
        (("photos/me.jpg", "--draw", "linked"), ("linked/me.jpg", "photos/me.jpg")),
        (("other/me.png", "photos/me.jpg", "--draw", "photos"), ("photos/me.jpg",)),
        (("other/me.png", "other/sub/me.png", "photos/me-2.jpg", "--draw", "photos"), ("photos/me-2.jpg",)),
        (("photos/*.jpg", "--draw", "hard"), ("hard/me.jpg", "photos/me.jpg")),
        (("photos/me.jpg", "photos/list.jsonl", "--out", "photos/list.jsonl"), ("photos/list.jsonl",)),
    ],
)
def test_no_input_is_replaced(call, draw_blocks, args, told, force):
    save(draw_blocks, "photos/me.jpg", "photos/me-2.jpg", "photos/sub/x.png", "other/me.png", "other/sub/me.png")
    Path("photos/list.jsonl").write_text("mine")
    Path("linked").symlink_to("photos")
    Path("hard").mkdir()
    Path("hard/me.jpg").hardlink_to("photos/me.jpg")
    before = snapshot()
    code, out, err = call(*args, *force)
    assert (code, out) == (2, "")
    assert all(path in err for path in told)
    assert "is the input" in err
    assert snapshot() == before


def test_another_file_is_replaced_by_force_alone(call, draw_blocks):
    save(draw_blocks, "a.png")
    Path("drawn").mkdir()
    Path("drawn/b.jpg").write_text("mine")
    assert call("a.png", "--out", "a.csv", "--draw", "drawn")[0] == 0
    before = snapshot()
    for args in (("--out", "a.csv"), ("--draw", "drawn")):
        code, _, err = call("a.png", *args)
        assert code == 2
        assert "exists already" in err
        assert "--force" in err
    assert snapshot() == before
    assert call("a.png", "--out", "a.csv", "--draw", "drawn", "--force")[0] == 0
    assert Path("drawn/b.jpg").read_text() == "mine"


def test_pictures_on_a_list_are_not_replaced(call, draw_blocks, monkeypatch):
    save(draw_blocks, "me.jpg", "b/you.png")
    before = snapshot()
    monkeypatch.setattr("sys.stdin", make_stdin("me.jpg\nb/you.png\n"))
    code, _, err = call("-", "--faces", "whole", "--draw", ".", "--out", "a.csv")
    assert code == 1
    assert "not drawn: me.jpg: predicted, not drawn: me.jpg: exists already" in err
    assert len(Path("a.csv").read_text().splitlines()) == 3
    assert {path: snapshot()[path] for path in before} == before
    assert Path("you.jpg").exists()
    monkeypatch.setattr("sys.stdin", make_stdin("me.jpg\n"))
    code, _, err = call("-", "--draw", ".", "--force")
    assert code == 2
    assert "not known in advance" in err


HOSTILE = (
    b"caf\xe9.png",
    b"=cmd|' C calc'!A0.png",
    b"+1.png",
    b"-1.png",
    b"@SUM(1).png",
    b"\t=1.png",
    b"a\x1b[2Jb.png",
    b"two\nlines.png",
    "a\u202egpj.png".encode(),
    b"<script>alert(1)<script>.png",
    b"x" * 251 + b".png",
    "日本 👨‍👩‍👧.png".encode(),
    b"[red]a[red].png",
    b"a,b\"c'd.png",
)


def write_hostile(draw_blocks, folder="in"):
    Path(folder).mkdir()
    save(draw_blocks, "plain.png")
    contents = Path("plain.png").read_bytes()
    for name in HOSTILE:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(contents)


def find_dangers(text):
    """Return what of a text could turn, clear or feign something on a terminal."""
    return [
        character for character in text if character != "\n" and (not character.isprintable()) and character != "\u200d"
    ]


def test_hostile_names_go_through(call, draw_blocks):
    write_hostile(draw_blocks)
    code, _, err = call("in", "--faces", "whole", "--out", "a.csv", "--draw", "drawn")
    assert code == 0
    assert not find_dangers(err)
    text = Path("a.csv").read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(HOSTILE)
    assert len(text.splitlines()) == len(HOSTILE) + 1
    assert not find_dangers(text)
    files = {row["file"] for row in rows}
    assert {
        r"in/caf\xe9.png",
        r"in/a\x1b[2Jb.png",
        r"in/two\nlines.png",
        r"in/a\u202egpj.png",
        r"in/\t=1.png",
    } <= files
    drawn = os.listdir(b"drawn")
    assert len(drawn) == len(HOSTILE)
    assert all(name.endswith(b".jpg") for name in drawn)
    for name in os.listdir("in"):
        code, out, err = call(f"in/{name}", "--faces", "whole")
        assert code == 0
        assert not find_dangers(out + err)


def test_a_name_like_a_formula_is_text_in_csv_and_itself_in_json(call, draw_blocks, monkeypatch):
    write_hostile(draw_blocks)
    monkeypatch.chdir("in")
    names = [name for name in os.listdir() if name[0] in "=+-@\t"]
    assert len(names) == 5
    paths = [name for name in names if not name.startswith("-")]
    assert call(*paths, "--faces", "whole", "--out", "../a.csv")[0] == 0
    assert all(row["file"].startswith("'") for row in read_csv("../a.csv"))
    assert call(*paths, "--faces", "whole", "--out", "../a.json")[0] == 0
    assert [row["file"] for row in json.loads(Path("../a.json").read_text())["rows"]] == paths


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "parquet"])
def test_a_name_that_is_not_utf_8_is_in_every_format(call, draw_blocks, form):
    save(draw_blocks, "plain.png")
    with open(b"caf\xe9.png", "wb") as file:
        file.write(Path("plain.png").read_bytes())
    if form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    assert call(os.fsdecode(b"caf\xe9.png"), "caf\udce8.png", "--faces", "whole", "--out", f"a.{form}")[0] == 1
    if form == "parquet":
        assert parquet.read_table("a.parquet").column("file").to_pylist() == [r"caf\xe9.png", r"caf\xe8.png"]
        return
    text = Path(f"a.{form}").read_bytes().decode()
    assert r"caf\xe9.png" in text.replace("\\\\", "\\")
    if form == "json":
        assert json.loads(text)["failed"][0]["file"] == r"caf\xe8.png"


def test_a_video_with_a_name_that_is_not_utf_8(call, draw_blocks):
    pytest.importorskip("cv2")
    writer = VideoWriter(Path("a.mp4"), rate=10)
    for _ in range(3):
        writer.write(np.kron(draw_blocks((10, 10, 20, 250)), np.ones((4, 4, 1), np.uint8)))
    writer.close()
    os.rename(b"a.mp4", b"caf\xe9.mp4")
    code, _, err = call(os.fsdecode(b"caf\xe9.mp4"), "--faces", "whole", "--out", "a.csv", "--draw", "dr\udcffawn")
    assert code == 0, err
    assert len(Path("a.csv").read_text().splitlines()) == 4
    assert os.listdir(b"dr\xffawn") == [b"caf\xe9.mp4"]


def test_what_cannot_be_drawn_is_named_and_the_rest_is_there(call, draw_blocks, monkeypatch):
    def save_some(image, path, *args, **options):
        if image.size[0] == 400:
            raise OSError("encoder error -2")
        return saved(image, path, *args, **options)

    saved = Image.Image.save
    Image.new("RGB", (9, 70000)).save("long.png")
    save(draw_blocks, "a.png", "b.png")
    Image.new("RGB", (400, 400)).save("big.png")
    monkeypatch.setattr(Image.Image, "save", save_some)
    code, _, err = call(
        "long.png", "a.png", "big.png", "b.png", "--faces", "whole", "--out", "a.json", "--draw", "drawn"
    )
    assert code == 1
    assert "not drawn: big.png" in err
    found = json.loads(Path("a.json").read_text())
    assert len(found["rows"]) == 4
    assert [failure["file"] for failure in found["failed"]] == ["big.png"]
    assert sorted(os.listdir("drawn")) == ["a.jpg", "b.jpg", "long.jpg"]
    with Image.open("drawn/long.jpg") as image:
        assert max(image.size) == 65_500
    assert "drawn/long.jpg: shrunk to 65,500 pixels" in err.replace("\n", " ")


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_folders_that_disappear_cost_no_rows(call, draw_blocks, monkeypatch, form):
    def remove(*args, **options):
        for number, result in enumerate(inputs(*args, **options)):
            if number == 1:
                shutil.rmtree("out")
            yield result

    inputs = module.predict_inputs
    save(draw_blocks, "a.png", "b.png", "c.png")
    monkeypatch.setattr(module, "predict_inputs", remove)
    code, _, err = call("a.png", "b.png", "c.png", "--faces", "whole", "--out", f"out/a.{form}", "--draw", "out/drawn")
    assert code == 1
    assert "not drawn: b.png" in err
    assert "not drawn: c.png" in err
    text = Path(f"out/a.{form}").read_text()
    assert all(f"{name}.png" in text for name in "abc")


def test_what_cannot_be_written_is_known_before_the_model_is_loaded(call, draw_blocks, monkeypatch):
    save(draw_blocks, "a.png")
    Path("file").write_text("")
    monkeypatch.setattr(module, "load_engine", lambda *args: 1 / 0)
    for args in (("--out", "file/a.csv"), ("--draw", "file"), ("--draw", "file/drawn"), ("--out", "a.xlsx")):
        code, _, err = call("a.png", *args)
        assert code == 2
        assert args[1] in err


FULL = """
import resource, signal, sys
import numpy as np
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from dlfer.predict.media import Frame
from dlfer.predict.predictor import FacePrediction, FramePrediction
from dlfer.predict.tables import open_table
face = FacePrediction(None, None, "Happy", 0.9, {"Happy": 0.9, "Sad": 0.1})
table = open_table(Path(sys.argv[1]), labels=("Happy", "Sad"), about={"notice": "n"})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
failed = None
for number in range(1000):
    try:
        table.write(FramePrediction(Frame(f"{number}.png", np.zeros((9, 9, 3), np.uint8)), [face]))
    except OSError as error:
        failed = error
        break
try:
    table.close([{"file": "x", "error": "x" * 300}])
except OSError as error:
    failed = error
print(failed.filename, failed.strerror)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "parquet"])
def test_a_full_disk_leaves_whole_rows_and_no_partial_file(tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"a.{form}"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert f"{path} the file would be larger than is allowed" in done.stdout
    assert "bytes are free; make room" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ([] if form == "parquet" else [path.name])
    if form == "csv":
        rows = list(csv.reader(path.open()))
        assert len(rows) > 20
        assert len({len(row) for row in rows}) == 1
    elif form == "json":
        found = json.loads(path.read_text())
        assert len(found["rows"]) > 5
        assert found["failed"][0]["file"] == "x"
    elif form == "jsonl":
        assert len([json.loads(line) for line in path.read_text().splitlines()]) > 5


def test_a_disk_that_is_full_for_the_table_is_told_with_what_failed(call, draw_blocks, monkeypatch):
    def fill(table, prediction):
        if isinstance(prediction, FramePrediction) and prediction.frame.name == "b.png":
            raise OSError(errno.ENOSPC, "the disk is full: 0 bytes are free", "a.csv")
        return write(table, prediction)

    write = tables._TextTable.write
    save(draw_blocks, "a.png", "b.png", "c.png")
    Path("bad.jpg").write_text("text")
    monkeypatch.setattr(tables._TextTable, "write", fill)
    code, _, err = call("bad.jpg", "a.png", "b.png", "c.png", "--faces", "whole", "--out", "a.csv")
    assert code == 1
    assert "a.csv: the disk is full" in err
    assert "not read: bad.jpg" in err
    assert [row["file"] for row in read_csv("a.csv")] == ["bad.jpg", "a.png"]
