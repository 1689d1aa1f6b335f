"""Boxes and labels where the faces are; files named after the inputs, none over another."""

import numpy as np
import pytest
from PIL import features

from dlfer.predict import draw
from dlfer.predict.draw import PAPER, AnnotatedWriter, VideoWriter, draw_faces
from dlfer.predict.media import Frame, open_inputs
from dlfer.predict.predictor import FacePrediction, FramePrediction
from dlfer.predict.video import Video

FACE = FacePrediction((100.0, 120.0, 180.0, 200.0), 0.9, "Happy", 0.9, {"Happy": 0.9, "Sad": 0.1}, track=2)
WHOLE = FacePrediction(None, None, "Happy", 0.9, {"Happy": 0.9, "Sad": 0.1})


def test_a_box_is_drawn_on_its_edge_and_nothing_elsewhere():
    image = np.full((300, 400, 3), 50, np.uint8)
    before = image.copy()
    drawn = draw_faces(image, [FACE])
    assert np.array_equal(image, before)
    assert drawn.shape == image.shape
    for x, y in ((100, 160), (180, 160), (140, 120), (140, 200)):
        assert tuple(drawn[y, x]) == PAPER
    assert (drawn[130:195, 110:175] == 50).all()
    assert (drawn[210:] == 50).all()
    assert (drawn[100:118, 100:120] != 50).any()  # the label, above


def test_small_crops_are_enlarged_and_labels_stay_inside():
    assert draw_faces(np.zeros((48, 48, 3), np.uint8), [WHOLE]).shape == (240, 240, 3)
    assert draw_faces(np.zeros((48, 64, 3), np.uint8), [WHOLE], enlarge=False).shape == (48, 64, 3)


def draw_label(label, labels):
    face = FacePrediction(None, None, label, 0.9, dict.fromkeys(labels, 0.5))
    return draw_faces(np.zeros((240, 240, 3), np.uint8), [face])


@pytest.mark.parametrize("labels", [("гнев", "горе"), ("Überraß", "Êtrange"), ("غضب", "حزن")])
def test_labels_beyond_ascii_are_drawn_as_they_are(labels, monkeypatch):
    pytest.importorskip("matplotlib")
    if labels[0] == "غضب" and not features.check("raqm"):
        pytest.skip("this Pillow cannot lay out Arabic")
    assert draw.number_labels(labels) == {}
    # Boxes for missing characters would be as many and as wide, and differ from one another in nothing.
    first, second = (draw_label(label, labels) for label in labels)
    assert (first != second).any()
    monkeypatch.setattr(draw, "_find_font", lambda label: "")
    assert (draw_label(labels[0], labels) != first).any()


def test_a_label_without_a_font_is_a_number(monkeypatch):
    labels = ("Angry", "快乐", "悲伤")
    monkeypatch.setattr(draw, "find_font", lambda characters: None)
    draw._find_font.cache_clear()
    assert draw.number_labels(labels) == {"快乐": "[2]", "悲伤": "[3]"}
    assert np.array_equal(draw_label("悲伤", labels), draw_label("[3]", ("[3]",)))
    draw._find_font.cache_clear()


def test_a_folder_of_pictures_and_videos(tmp_path):
    pytest.importorskip("cv2")
    sketches = AnnotatedWriter(tmp_path / "drawn")
    picture = np.full((300, 400, 3), 50, np.uint8)
    for name in ("a/x.png", "b/x.jpg"):
        sketches.add(FramePrediction(Frame(name, picture), [FACE]))
    videos = [Video(10.0, 3, False) for _ in range(2)]
    for name, video in zip(("x.mp4", "camera:0"), videos, strict=True):
        for index in range(3):
            sketches.add(FramePrediction(Frame(name, picture, 2 * index, index / 5, video), [FACE]), every=2)
    sketches.close()
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["camera-0.mp4", "x-2.jpg", "x.jpg", "x.mp4"]
    frames = list(open_inputs([str(tmp_path / "drawn" / "x.mp4")]))
    assert len(frames) == 3
    assert frames[0].video.rate == pytest.approx(5)
    assert abs(int(frames[1].image[160, 100, 2]) - PAPER[2]) < 60


def test_a_fault_in_the_times_of_a_video_is_not_filled_with_still_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "_MAX_REPEATED", 5)
    writer = VideoWriter(tmp_path / "a.mp4", rate=10)
    # As where the clock of an MPEG stream starts again: every later frame is far ahead of what was written.
    for level, seconds in ((0, 0.0), (60, 0.3), (120, 95443.7), (180, 95443.8)):
        writer.write(np.full((48, 64, 3), level, np.uint8), seconds)
    writer.close()
    frames = list(open_inputs([str(tmp_path / "a.mp4")]))
    assert [round(frame.image.mean() / 60) for frame in frames] == [0, 0, 0, 1, 2, 3]


def test_a_fault_in_the_times_of_a_video_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "_MAX_REPEATED", 5)
    video = Video(10.0, 3, False)
    sketches = AnnotatedWriter(tmp_path / "drawn")
    for index, seconds in enumerate((0.0, 0.1, 95443.7)):
        frame = Frame("x.avi", np.full((96, 128, 3), 40, np.uint8), index, seconds, video)
        sketches.add(FramePrediction(frame, []), every=1)
    sketches.close()
    assert len(sketches.notes) == 1
    assert "jump by more than 5 frames at 1 place, and the written video goes on there at once" in sketches.notes[0]
