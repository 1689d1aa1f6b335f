"""dlfer predict from end to end, with a classifier of brightness: outputs, failures, progress, exit codes."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlfer import cli
from dlfer.predict import job as module
from dlfer.predict.job import FilmWriter


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
        ("b.png", "0", ""),
    ]
    assert "annotators would give" in err
    assert "not calibrated" in err
    assert "bad.jpg" in err
    assert "absent.png: there is no such file" in err
    assert "2 of the inputs could not be read" in err
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["a.jpg", "b.jpg"]


def test_a_list_on_stdin_to_json(call, draw_blocks, monkeypatch):
    Image.fromarray(draw_blocks((5, 5, 20, 130))).save("a.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("a.png\nb.png\n"))
    code, out, _ = call("-", "--faces", "opencv", "--abstain", "0.9", "--out", "a.json")
    found = json.loads(Path("a.json").read_text())
    assert (code, out) == (1, "")
    assert found["about"]["abstain_below"] == 0.9
    assert "annotators" in found["about"]["notice"]
    assert [(row["label"], row["abstained"]) for row in found["rows"]] == [("uncertain", True)]
    assert found["failed"][0]["file"] == "b.png"


def test_a_film_to_lines_and_an_annotated_film(call, draw_blocks):
    pytest.importorskip("cv2")
    writer = FilmWriter(Path("a.mp4"), rate=10)
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


def test_a_failure_leaves_no_table(call, draw_blocks, monkeypatch, classifier):
    Image.fromarray(draw_blocks((5, 5, 20, 130))).save("a.png")
    monkeypatch.setattr(classifier, "predict", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.predict_files(["a.png"], module.PredictionJob(out=Path("a.csv"), faces="opencv"), say=lambda text: None)
    assert not list(Path().glob("*.csv*"))
    assert not list(Path().glob(".*.tmp"))


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--faces", "some"), "faces"),
        (("--abstain", "2"), "abstain"),
        (("--every", "0"), "--every"),
        (("--smooth", "-1"), "--smooth"),
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
    monkeypatch.setattr("sys.stdin", io.StringIO("a.png\n"))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(name)
    code, out, err = call(*args, "--engine", "auto")
    assert code == 0
    assert "engine chosen for the default" in err
    assert "engine" not in out
