"""The same rows in every format, documented as they are; files appear whole or not at all."""

import csv
import json

import numpy as np
import pytest

from dlfer.errors import UserError
from dlfer.predict import tables
from dlfer.predict.media import Frame, UnreadableInput
from dlfer.predict.predictor import FacePrediction, FramePrediction
from dlfer.predict.tables import list_columns, open_table
from dlfer.predict.video import Video
from dlfer.runs.records import LeftOut, ReadingRecord

LABELS = ("Happy", "score")
PIXELS = np.zeros((9, 9, 3), np.uint8)
FACE = FacePrediction((1.0, 2.0, 3.126, 4.0), 0.75, "Happy", 0.9, {"Happy": 0.9, "score": 0.1}, track=7)
WHOLE = FacePrediction(None, None, "uncertain", 0.5, {"Happy": 0.5, "score": 0.5}, abstained=True)
RESULTS = (
    FramePrediction(Frame("a.mp4", PIXELS, 3, 0.12345, Video(25.0, 9, False)), [FACE]),
    FramePrediction(Frame("b,1.jpg", PIXELS), [WHOLE]),
    FramePrediction(Frame("c.jpg", PIXELS), []),
)
FAILED = [{"file": "d.jpg", "error": "d.jpg: no"}]
BAD = UnreadableInput("d.jpg", "d.jpg: no")
READING = ReadingRecord(seen=5, used=3, left_out=[LeftOut(reason="not read", n=2, first=["d.jpg", "e.txt"])])


def write(path, form=None):
    table = open_table(path, labels=LABELS, about={"notice": "n"}, form=form)
    for result in RESULTS:
        table.write(result)
    table.write(BAD)
    if path is not None:
        assert not path.exists()
    table.close(FAILED, READING)


def test_the_table_of_pictures_has_no_column_of_times(capsys):
    for has_videos in (True, False):
        table = open_table(None, labels=LABELS, about={}, form="table", has_videos=has_videos)
        for result in RESULTS:
            table.write(result)
        table.close([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "seconds", "face", "label", "box"]
    assert "0.12" in lines[1]
    assert lines[4].split() == ["file", "face", "label", "box"]
    assert lines[4].index("face") + 3 == lines[6].index("1", lines[6].index(".jpg"))


def test_csv(tmp_path):
    write(tmp_path / "deep" / "a.csv")
    rows = list(csv.DictReader((tmp_path / "deep" / "a.csv").open()))
    assert list(rows[0]) == list(list_columns(LABELS))
    documented = tables.__doc__.split()
    assert all(name in documented for name in rows[0] if name not in ("Happy", "p_score"))
    assert rows[0] == {
        **{"file": "a.mp4", "face": "1", "x0": "1.0", "y0": "2.0", "x1": "3.13", "y1": "4.0", "score": "0.75"},
        **{"label": "Happy", "confidence": "0.9", "Happy": "0.9", "p_score": "0.1", "abstained": "false"},
        **{"frame": "3", "seconds": "0.123", "track": "7", "error": ""},
    }
    assert (rows[1]["file"], rows[1]["x0"], rows[1]["label"], rows[1]["abstained"]) == (
        "b,1.jpg",
        "",
        "uncertain",
        "true",
    )
    assert (rows[2]["face"], rows[2]["label"], rows[2]["Happy"], rows[2]["frame"]) == ("0", "", "", "")
    assert {name: value for name, value in rows[3].items() if value} == {"file": "d.jpg", "error": "d.jpg: no"}


def test_json_and_lines(tmp_path):
    write(tmp_path / "a.json")
    write(tmp_path / "a.jsonl")
    whole = json.loads((tmp_path / "a.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert whole == {"about": {"notice": "n"}, "rows": lines[:3], "failed": FAILED, "reading": READING.model_dump()}
    assert list(lines[3]) == list(lines[0])
    assert (lines[3]["file"], lines[3]["face"], lines[3]["error"]) == ("d.jpg", None, "d.jpg: no")
    assert lines[0]["probabilities"] == {"Happy": 0.9, "score": 0.1}
    assert (lines[0]["score"], lines[1]["score"], lines[2]["probabilities"]) == (0.75, None, None)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == list(list_columns(LABELS))
    assert table.column("p_score").to_pylist() == [0.1, 0.5, None, None]
    assert table.column("track").to_pylist() == [7, None, None, None]
    assert table.column("error").to_pylist() == [None, None, None, "d.jpg: no"]
    metadata = parquet.read_metadata(tmp_path / "a.parquet").metadata
    assert json.loads(metadata[b"dlfer"]) == {"notice": "n"}
    assert json.loads(metadata[b"dlfer_failed"]) == FAILED
    assert json.loads(metadata[b"dlfer_reading"]) == READING.model_dump()


def test_on_a_terminal_and_in_a_pipe(capsys, monkeypatch):
    write(None)
    assert capsys.readouterr().out.startswith("file,face,x0")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write(None)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["a.mp4", "0.12", "#7", "Happy", "90.0%", "1", "2", "3", "4"]
    assert "no face found" in shown[3]
    assert shown[4].split() == ["d.jpg", "not", "read"]


def test_nothing_is_left_of_what_failed_and_other_formats_are_refused(tmp_path):
    for suffix in ("csv", "json", "jsonl"):
        table = open_table(tmp_path / f"a.{suffix}", labels=LABELS, about={})
        table.write(RESULTS[0])
        table.discard()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"\.csv, \.json, \.jsonl, \.parquet"):
        open_table(tmp_path / "a.xlsx", labels=LABELS, about={})
