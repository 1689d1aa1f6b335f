"""Faces keep their numbers over movement and gaps; smoothing does not depend on the rate of frames; between the frames that
the detector looks at faces are where they would have been found."""

import numpy as np
import pytest
from PIL import Image

import dlfer
from dlfer.data.faces import Face
from dlfer.predict.crops import FaceFinder, FaceTracker, choose_interval, compute_overlap, follow_faces
from dlfer.predict.media import Frame
from dlfer.predict.predictor import FacePredictor, predict_inputs
from dlfer.predict.video import Video

NONE = np.zeros((0, 2))


def make_box(x: float, side: float = 20.0):
    return (x, 10.0, x + side, 10.0 + side)


def test_overlap():
    assert compute_overlap(make_box(0), make_box(0)) == 1
    assert compute_overlap(make_box(0), make_box(10)) == pytest.approx(200 / 600)
    assert compute_overlap(make_box(0), make_box(20)) == 0
    assert compute_overlap(None, None) == 1
    assert compute_overlap(None, make_box(0)) == 0


def test_numbers_are_kept_when_faces_move_change_order_and_are_lost_for_a_moment():
    tracker, even = FaceTracker(), np.full((2, 2), 0.5)
    assert tracker.update([make_box(0), make_box(50)], even, 0.0)[0] == [1, 2]
    assert tracker.update([make_box(53), make_box(3)], even, 0.1)[0] == [2, 1]
    assert tracker.update([], NONE, 0.5)[0] == []
    assert tracker.update([make_box(5)], even[:1], 1.0)[0] == [1]
    assert tracker.update([make_box(53)], even[:1], 1.2)[0] == [3]  # unseen for more than a second
    assert tracker.update([make_box(200), make_box(5)], even, 1.3)[0] == [4, 1]


def test_the_greatest_overlap_wins():
    tracker, even = FaceTracker(), np.full((2, 2), 0.5)
    tracker.update([make_box(0)], even[:1], 0.0)
    assert tracker.update([make_box(8), make_box(1)], even, 0.1)[0] == [2, 1]


@pytest.mark.parametrize("rate", [5, 50])
def test_smoothing_is_that_of_the_stated_time_constant_at_any_rate(rate):
    tracker = FaceTracker(smooth=0.5)
    tracker.update([make_box(0)], np.array([[1.0, 0.0]]), 0.0)
    for index in range(1, rate + 1):
        _, smoothed = tracker.update([make_box(0)], np.array([[0.0, 1.0]]), index / rate)
    assert smoothed[0] == pytest.approx([np.exp(-1 / 0.5), 1 - np.exp(-1 / 0.5)])
    assert smoothed.sum() == pytest.approx(1)


def test_the_interval_is_by_the_rate_unless_it_is_given():
    rates = {0.5: 1, 5: 1, 10: 1, 12: 2, 24: 3, 25: 4, 29.97: 4, 50: 7, 60: 9, 240: 34}
    assert {rate: choose_interval(None, rate) for rate in rates} == rates
    assert [choose_interval(given, 25) for given in (1, 3, 100)] == [1, 3, 100]


VIDEO = Video(rate=25.0, num_frames=None, is_live=False)


class Scene:
    """Videos whose pixels tell the number of the frame, and a detector that knows what is on it and how often it looked."""

    def __init__(self, script) -> None:
        self.script, self.looked = script, []

    def detect(self, images):
        numbers = [int(image[0, 0, 0]) for image in images]
        self.looked += numbers
        return [self.tell(number) for number in numbers]

    def tell(self, number):
        boxes = self.script(number)
        marks = [np.array([[box[0] + 1.0, box[1] + 2.0]] * 5) for box in boxes]
        return [Face(tuple(map(float, box)), 0.9, points) for box, points in zip(boxes, marks, strict=True)]

    def find(self, count, interval, *, batches=(1000,), video=VIDEO, times=None):
        finder, found = FaceFinder(self.detect), []
        frames = [
            Frame("a.mp4", np.full((8, 8, 3), number, np.uint8), number, times[number] if times else number / 25, video)
            for number in range(count)
        ]
        while len(found) < count:
            rows = range(len(found), min(count, len(found) + batches[min(len(batches) - 1, len(found))]))
            found += finder.find([frames[row] for row in rows], [row % interval == 0 for row in rows])
        return found


def compare(found, expected):
    assert [len(faces) for faces in found] == [len(faces) for faces in expected]
    for faces, others in zip(found, expected, strict=True):
        for face, other in zip(faces, others, strict=True):
            assert face.box == pytest.approx(other.box)
            assert face.landmarks == pytest.approx(other.landmarks)


@pytest.mark.parametrize("batches", [(1000,), (9, 5, 8), (2,), (1,)])
def test_faces_that_move_evenly_are_where_they_would_be_found_whatever_the_batches(batches):
    scene = Scene(lambda number: [(100 - 2 * number, 10, 60, 50 + number), (200, number, 40, 40)])
    found = scene.find(22, 4, batches=batches)
    compare(found, [scene.tell(number) for number in range(22)])
    if batches == (1000,):
        assert scene.looked == [0, 4, 8, 12, 16, 20, 21]
        assert [face.score for faces in found[:5] for face in faces] == [0.9, 0.9, *[None] * 6, 0.9, 0.9]


@pytest.mark.parametrize(
    "script",
    [
        lambda number: [(10, 10, 50, 50)] if number >= 6 else [],
        lambda number: [(10, 10, 50, 50)] if number < 3 else [],
        lambda number: [(10, 10, 50, 50), *([(90, 10, 40, 40)] if number > 8 else [])],
        lambda number: [(10, 10, 50, 50)] if number < 5 else [(60, 60, 30, 30), (120, 10, 20, 20)],
        lambda number: [(10, 10, 50, 50)] if number < 7 else [(200, 10, 50, 50)],
        lambda number: [],
    ],
)
@pytest.mark.parametrize("interval", [4, 8])
def test_a_face_that_comes_or_goes_and_a_cut_are_found_where_they_are(script, interval):
    scene = Scene(script)
    compare(scene.find(13, interval), [scene.tell(number) for number in range(13)])
    assert len(scene.looked) == len(set(scene.looked)) < 9


def test_a_face_that_is_seen_between_two_looks_alone_is_the_price():
    scene = Scene(lambda number: [(10, 10, 50, 50)] if number in (1, 2, 3) else [])
    assert not any(scene.find(9, 4))
    assert scene.looked == [0, 4, 8]
    scene.looked = []
    assert [bool(faces) for faces in scene.find(9, 1)] == [number in (1, 2, 3) for number in range(9)]


def test_faces_move_by_the_times_of_the_frames():
    times = [0.0, 0.1, 0.2, 0.9, 1.0]
    scene = Scene(lambda number: [(10 * times[number], 10, 50, 50)])
    compare(scene.find(5, 4, times=times), [scene.tell(number) for number in range(5)])
    assert scene.looked == [0, 4]
    still = Scene(lambda number: [(2 * number, 10, 50, 50)])  # a video that tells no times
    compare(still.find(5, 4, times=[0.0] * 5), [still.tell(number) for number in range(5)])


def test_detectors_without_landmarks_and_pictures():
    plain = FaceFinder(lambda images: [[Face((float(image[0, 0, 0]), 0.0, 40.0, 40.0), 1.0)] for image in images])
    frames = [Frame("a", np.full((8, 8, 3), number, np.uint8), number, number / 25, VIDEO) for number in range(5)]
    found = plain.find(frames, [True, *[False] * 4])
    assert [faces[0].box[0] for faces in found] == pytest.approx(range(5))
    assert found[2][0].landmarks is None
    pictures = [Frame(str(number), np.full((8, 8, 3), 9 * number, np.uint8)) for number in range(3)]
    assert [faces[0].box[0] for faces in plain.find(pictures, [True] * 3)] == [0, 9, 18]


def test_of_two_videos_none_goes_on_in_the_other():
    scene = Scene(lambda number: [(10 * number, 10, 50, 50)])
    finder = FaceFinder(scene.detect)
    for video, numbers in ((VIDEO, (0, 1)), (Video(25.0, None, False), (9, 10, 11))):
        frames = [
            Frame("a", np.full((8, 8, 3), number, np.uint8), row, row / 25, video) for row, number in enumerate(numbers)
        ]
        compare(finder.find(frames, [True, *[False] * (len(numbers) - 1)]), [scene.tell(number) for number in numbers])


def draw_texture(x, y, side, size=(240, 320)):
    """Return uint8 [H, W, 3]: a textured square on a plain ground."""
    texture = np.random.default_rng(3).integers(0, 255, (12, 12), np.uint8)
    image = Image.new("L", (size[1], size[0]), 90)
    image.paste(Image.fromarray(texture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
    return np.asarray(image)[..., None].repeat(3, axis=-1)


def test_the_flow_moves_and_scales_faces_and_lets_those_go_that_leave():
    pytest.importorskip("cv2")
    marks = np.array([[75.0, 70.0], [105.0, 70.0], [90.0, 90.0], [80.0, 105.0], [100.0, 105.0]])
    face = Face((60.0, 50.0, 64.0, 64.0), 0.9, marks)
    (moved,) = follow_faces([face], draw_texture(60, 50, 64), draw_texture(69, 44, 64))
    assert moved.box == pytest.approx((69, 44, 64, 64), abs=0.5)
    assert moved.landmarks == pytest.approx(marks + np.array([9, -6]), abs=0.5)
    assert moved.score is None
    (grown,) = follow_faces([face], draw_texture(60, 50, 64), draw_texture(58, 48, 70))
    assert grown.box == pytest.approx((58, 48, 70, 70), abs=1)
    edge = Face((290.0, 50.0, 30.0, 30.0), 0.9)
    assert follow_faces([], draw_texture(60, 50, 64), draw_texture(60, 50, 64)) == []
    (still,) = follow_faces([face], draw_texture(60, 50, 64), draw_texture(60, 50, 64, size=(120, 160)))
    assert still is face
    blank = np.full((240, 320, 3), 90, np.uint8)
    assert all(0 <= value <= 320 for kept in follow_faces([edge, face], blank, blank) for value in kept.box)


def test_a_face_that_leaves_the_picture_of_a_camera_ends():
    pytest.importorskip("cv2")
    faces, left = [Face((250.0, 50.0, 64.0, 64.0), 0.9)], []
    for x in range(250, 330, 10):
        faces = follow_faces(faces, draw_texture(x, 50, 64), draw_texture(x + 10, 50, 64))
        left.append(len(faces))
        assert all(face.box[0] + face.box[2] <= 320 and min(face.box[2:]) >= 8 for face in faces)
    assert left[0] == 1


def test_of_a_camera_faces_are_followed_by_the_pixels_between_looks():
    pytest.importorskip("cv2")
    video, looked = Video(25.0, None, True), []

    def detect(images):
        looked.append(len(images))
        (image,) = images
        rows, columns = np.nonzero(image[..., 0] != 90)
        return [[Face((float(columns.min()), float(rows.min()), 64.0, 64.0), 0.9)]]

    finder, found = FaceFinder(detect), []
    for number in range(9):
        frame = Frame("camera:0", draw_texture(20 + 5 * number, 50, 64), number, number / 25, video)
        found += finder.find([frame], [number % 4 == 0])
    assert looked == [1, 1, 1]
    assert [faces[0].box[0] for faces in found] == pytest.approx([20 + 5 * number for number in range(9)], abs=1.5)


def test_a_photograph_in_motion_has_the_labels_that_it_has_with_every_frame_looked_at():
    """The stated tolerance: nine of ten labels the same without smoothing, probabilities by 0.02 in the mean."""
    photo = Image.open("docs/astronaut.jpg").convert("RGB")
    video, frames = Video(25.0, None, False), []
    for number in range(13):
        x, y, side = 60 + 6 * np.sin(number / 4), 10 + 0.8 * number, 240 + 2.5 * number
        view = photo.resize((160, 160), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        frames.append(Frame("a.mp4", np.asarray(view), number, number / 25, video))
    predictor = FacePredictor(dlfer.load("lite2_96"))
    all_looked, some = (
        [result.faces for result in predict_inputs(predictor, frames, smooth=0, detect_every=given)]
        for given in (1, None)
    )
    assert [len(faces) for faces in some] == [len(faces) for faces in all_looked] == [1] * 13
    assert sum(face.score is None for (face,) in some) == 9
    assert sum(a.label == b.label for (a,), (b,) in zip(all_looked, some, strict=True)) >= 12
    differences = [
        abs(a.probabilities[label] - b.probabilities[label])
        for (a,), (b,) in zip(all_looked, some, strict=True)
        for label in a.probabilities
    ]
    assert np.mean(differences) < 0.02
    overlaps = [compute_overlap(a.box, b.box) for (a,), (b,) in zip(all_looked, some, strict=True)]
    assert min(overlaps) > 0.85
