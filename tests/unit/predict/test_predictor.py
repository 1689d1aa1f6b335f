"""Faces of several pictures in one call, boxes in upright pixels, videos followed, thresholds kept."""

import threading
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import FacesConfig
from dlfer.data.faces import Face, crop_face, prepare_face
from dlfer.data.images import equalize
from dlfer.errors import UserError
from dlfer.predict.crops import build_cropper, crop_face_square
from dlfer.predict.engines import get_crop_size
from dlfer.predict.media import Frame, ReadAhead, UnreadableInput, list_inputs, open_inputs
from dlfer.predict.predictor import (
    UNCERTAIN,
    FacePredictor,
    describe_predictions,
    predict_inputs,
)
from dlfer.predict.video import Video
from dlfer.runs.records import About, Temperature
from tests.unit.conftest import find_blocks


def test_faces_of_several_pictures_go_to_the_network_in_one_call(classifier, blocks, draw_blocks):
    pictures = [
        draw_blocks((5, 5, 20, 250), (40, 10, 30, 130)),
        draw_blocks(),
        draw_blocks((50, 30, 16, 240)),
    ]
    frames = [Frame(f"{number}.png", image) for number, image in enumerate(pictures)]
    inputs = [frames[0], UnreadableInput("bad.jpg", "bad.jpg: no"), *frames[1:]]
    results = list(predict_inputs(FacePredictor(classifier, faces="opencv"), inputs))
    assert classifier.shapes == [(3, 16, 16, 1)]
    assert [type(result).__name__ for result in results] == [
        "FramePrediction",
        "UnreadableInput",
        *["FramePrediction"] * 2,
    ]
    first, _, second, third = results
    assert [face.box for face in first.faces] == [(40, 10, 70, 40), (5, 5, 25, 25)]
    assert [face.label for face in first.faces] == ["Light", "Light"]
    assert first.faces[0].probabilities == pytest.approx({"Dark": 125 / 255, "Light": 130 / 255}, abs=0.01)
    assert first.faces[1].confidence == pytest.approx(250 / 255, abs=0.03)
    assert second.faces == []
    assert [face.box for face in third.faces] == [(50, 30, 66, 46)]
    assert third.faces[0].track is None


def test_as_many_pictures_as_there_are_are_batched_by_32(classifier, blocks, draw_blocks):
    inputs = (Frame(str(number), draw_blocks((1, 1, 16, 200))) for number in range(70))
    assert len(list(predict_inputs(FacePredictor(classifier, faces="opencv"), inputs))) == 70
    assert [shape[0] for shape in classifier.shapes] == [32, 32, 6]


def test_whole_pictures_keep_a_small_size_and_lose_what_is_beside_the_square(classifier):
    wide = np.zeros((12, 30, 3), np.uint8)
    wide[:, 9:21] = 200  # its centred square
    large = np.full((64, 64, 3), 90, np.uint8)
    found = FacePredictor(classifier, faces="whole").predict([wide, large])
    assert sorted(classifier.shapes) == [(1, 12, 12, 1), (1, 16, 16, 1)]
    assert found[0][0].box is None
    assert found[0][0].score is None
    assert found[0][0].probabilities["Light"] == pytest.approx(200 / 255)
    assert found[1][0].label == "Dark"


def test_abstaining_keeps_the_probabilities(classifier, blocks, draw_blocks):
    image = draw_blocks((40, 10, 30, 130), (2, 2, 20, 250))
    unsure, sure = FacePredictor(classifier, faces="opencv", abstain=0.6).predict([image])[0]
    assert (unsure.label, unsure.abstained, sure.label, sure.abstained) == (UNCERTAIN, True, "Light", False)
    assert unsure.confidence == max(unsure.probabilities.values())
    with pytest.raises(UserError, match="abstain"):
        FacePredictor(classifier, faces="whole", abstain=1.5)
    with pytest.raises(UserError, match="faces"):
        FacePredictor(classifier, faces="some")


class LeftHalf:
    """Answers with the lightness of the left half, calibrated or not at all."""

    labels, channels, image_size, temperature_fit, about = ("Dark", "Light"), 1, 8, None, About()
    aspect = "crop"
    crop = None
    takes_any_size = True

    def predict(self, images, *, batch_size=64, calibrated=False):
        assert calibrated
        light = images[:, :, : images.shape[2] // 2].mean(axis=(1, 2, 3)) / 255
        return np.stack([1 - light, light], axis=1).astype(np.float32)


def test_the_mirror_image_has_half_of_the_say_and_readers_are_told():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    image[:2, :4] = 255  # a quarter of the left half
    plain, mirrored = (FacePredictor(LeftHalf(), faces="whole", mirror=mirror) for mirror in (False, True))
    assert plain.predict([image])[0][0].probabilities["Light"] == pytest.approx(0.25)
    (face,) = mirrored.predict([image])[0]
    assert (face.label, face.probabilities["Light"]) == ("Light", pytest.approx((0.25 + 1) / 2))
    assert describe_predictions(plain, faces="whole", smooth=0)["mirror"] is None
    told = describe_predictions(mirrored, faces="whole", smooth=0)["mirror"]
    assert "horizontal flip" in told
    assert "temperature" not in told
    mirrored.classifier.temperature_fit = Temperature(value=1.1, fitted_on="PublicTest")
    told = describe_predictions(mirrored, faces="whole", smooth=0)["mirror"]
    assert "the temperature was fitted without the flip" in told


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_in_the_upright_picture(orientation, classifier, blocks, draw_blocks, tmp_path):
    upright = draw_blocks((8, 4, 20, 200))
    undo = {2: 0, 3: 1, 4: 4, 5: 5, 6: 2, 7: 6, 8: 3}  # of PIL: what undoes it, by its inverse
    inverse = {
        0: Image.Transpose.FLIP_LEFT_RIGHT,
        1: Image.Transpose.ROTATE_180,
        2: Image.Transpose.ROTATE_90,
        3: Image.Transpose.ROTATE_270,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.TRANSVERSE,
    }
    stored = Image.fromarray(upright)
    if orientation != 1:
        stored = stored.transpose(inverse[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    (frame,) = open_inputs([str(tmp_path / "a.png")])
    assert np.array_equal(frame.image, upright)
    ((face,),) = FacePredictor(classifier, faces="opencv").predict([frame.image])
    assert face.box == (8, 4, 28, 24)


def test_videos_are_followed_and_smoothed_and_pictures_are_not(classifier, blocks, draw_blocks):
    video = Video(rate=10.0, num_frames=3, is_live=False)
    frames = [
        Frame("a.mp4", draw_blocks((10 + 2 * index, 10, 20, level)), index, index / 10, video)
        for index, level in enumerate((255, 255, 105))
    ]
    other = Video(rate=10.0, num_frames=1, is_live=False)
    frames.append(Frame("b.mp4", draw_blocks((10, 10, 20, 105)), 0, 0.0, other))
    predictor = FacePredictor(classifier, faces="opencv")
    *first, last = [result.faces[0] for result in predict_inputs(predictor, frames, smooth=0.5)]
    assert [face.track for face in first] == [1, 1, 1]
    raw = [result.faces[0] for result in predict_inputs(predictor, frames, smooth=0)]
    before, now = raw[1].probabilities["Light"], raw[2].probabilities["Light"]
    assert first[2].probabilities["Light"] == pytest.approx(before + (1 - np.exp(-0.1 / 0.5)) * (now - before))
    assert first[2].label == "Light"
    assert last.track == 1
    assert last.label == "Dark"
    assert raw[2].label == "Dark"


def test_a_camera_is_answered_before_its_next_frame_comes(classifier, blocks, draw_blocks):
    video, is_answered = Video(rate=25.0, num_frames=None, is_live=True), threading.Event()

    def watch():
        for index in range(6):
            yield Frame("camera:0", draw_blocks((1, 1, 20, 200)), index, index / 25, video)
            assert is_answered.wait(20)
            is_answered.clear()

    results = []
    for result in predict_inputs(FacePredictor(classifier, faces="opencv"), watch()):
        results.append(result)
        is_answered.set()
    assert [result.frame.index for result in results] == list(range(6))
    assert {face.track for result in results for face in result.faces} == {1}


def draw_video(draw_blocks, count, video=None):
    video = video or Video(rate=25.0, num_frames=count, is_live=False)
    return [
        Frame("a.mp4", draw_blocks((10 + index % 7, 10, 20, 200)), index, index / 25, video) for index in range(count)
    ]


def test_faces_are_searched_for_while_others_are_predicted(classifier, monkeypatch, draw_blocks):
    """The classifier waits until the detector has begun with the next batch."""
    looked, has_next = [], threading.Event()

    def detect(images, *, detector, size=None):
        looked.append(len(images))
        if len(looked) > 1:
            has_next.set()
        return find_blocks(images, detector=detector)

    def predict(images, **options):
        assert has_next.wait(20)
        return type(classifier).predict(classifier, images, **options)

    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", detect)
    monkeypatch.setattr(classifier, "predict", predict)
    results = list(
        predict_inputs(FacePredictor(classifier, faces="opencv"), draw_video(draw_blocks, 64), detect_every=1)
    )
    assert [result.frame.index for result in results] == list(range(64))
    assert looked == [32, 32]


def test_a_picture_is_predicted_while_the_next_is_long_in_coming(classifier, draw_blocks):
    """As in a list that another program writes to stdin."""
    may_go_on = threading.Event()

    def draw():
        yield Frame("a.png", draw_blocks((10, 10, 20, 200)))
        assert may_go_on.wait(60)
        yield Frame("b.png", draw_blocks((10, 10, 20, 200)))

    results = predict_inputs(FacePredictor(classifier, faces="whole"), ReadAhead(draw(), 4))
    assert next(results).frame.name == "a.png"
    assert not may_go_on.is_set()
    may_go_on.set()
    assert [result.frame.name for result in results] == ["b.png"]


def test_no_more_than_three_batches_are_in_memory(classifier, blocks, draw_blocks):
    drawn = 0

    def draw():
        nonlocal drawn
        for frame in draw_video(draw_blocks, 320):
            drawn += 1
            yield frame

    results = predict_inputs(FacePredictor(classifier, faces="opencv"), draw(), detect_every=1)
    for number, _ in enumerate(results):
        time.sleep(0.002)
        assert drawn <= 32 * (number // 32 + 3)
    assert drawn == 320


@pytest.mark.parametrize("place", ["the detector", "the classifier", "the video"])
def test_errors_of_any_stage_come_out_and_no_thread_stays(place, classifier, blocks, draw_blocks, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError(place)

    def draw():
        yield from draw_video(draw_blocks, 40)
        if place == "the video":
            fail()
        yield from draw_video(draw_blocks, 40)

    if place == "the detector":
        monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", fail)
    if place == "the classifier":
        monkeypatch.setattr(classifier, "predict", fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=place):
        list(predict_inputs(FacePredictor(classifier, faces="opencv"), draw()))
    wait_for_threads(before)


def test_leaving_a_video_early_ends_its_threads(classifier, blocks, draw_blocks):
    before = threading.active_count()
    results = predict_inputs(FacePredictor(classifier, faces="opencv"), draw_video(draw_blocks, 500))
    next(results)
    assert threading.active_count() > before
    results.close()
    wait_for_threads(before)


def test_a_detector_that_computes_is_waited_for(classifier, monkeypatch, draw_blocks):
    """A network that computes on while Python ends takes the process down with it."""
    looked, ended = [], threading.Event()

    def detect(images, *, detector, size=None):
        looked.append(len(images))
        if len(looked) > 1:
            time.sleep(0.5)
            ended.set()
        return find_blocks(images, detector=detector)

    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", detect)
    monkeypatch.setattr("threading.Thread.join", wait_at_most(0.1, threading.Thread.join))
    results = predict_inputs(FacePredictor(classifier, faces="opencv"), draw_video(draw_blocks, 200))
    next(results)
    while len(looked) < 2:
        time.sleep(0.001)
    results.close()
    assert ended.is_set()


def wait_at_most(limit, join):
    """Return a join of threads whose time-outs are short."""
    return lambda thread, timeout=None: join(thread, timeout and min(timeout, limit))


def wait_for_threads(count):
    deadline = time.monotonic() + 20
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= count


@pytest.mark.parametrize(("detect_every", "every", "looked"), [(1, 1, 41), (None, 1, 11), (None, 2, 21), (5, 1, 9)])
def test_the_interval_counts_frames_that_are_looked_at(
    classifier, monkeypatch, draw_blocks, detect_every, every, looked
):
    searched = []

    def detect(images, *, detector, size=None):
        searched.extend(images)
        return find_blocks(images, detector=detector)

    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", detect)
    video = Video(rate=25.0, num_frames=41, is_live=False)
    frames = [Frame("a.mp4", draw_blocks((10, 10, 20, 200)), index, index / 25, video) for index in range(41)]
    options = {"detect_every": detect_every, "every": every}
    results = list(predict_inputs(FacePredictor(classifier, faces="opencv"), frames, **options))
    assert len(searched) == looked
    assert {(face.box, face.track, face.label) for result in results for face in result.faces} == {
        ((10, 10, 30, 30), 1, "Light")
    }


def test_frames_between_looks_are_kept_up_to_a_limit(classifier, monkeypatch):
    """Of frames of 8 million pixels at most four wait for the next look, however far it is."""
    searched = []

    def detect(images, *, detector, size=None):
        searched.extend(images)
        return [[] for _ in images]

    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", detect)
    video, image = Video(rate=25.0, num_frames=None, is_live=False), np.zeros((2000, 4000, 3), np.uint8)
    frames = (Frame("a.mp4", image, index, index / 25, video) for index in range(12))
    assert len(list(predict_inputs(FacePredictor(classifier, faces="opencv"), frames, detect_every=1000))) == 12
    assert len(searched) == 1 + 3


def test_pictures_given_whole_are_not_searched(classifier, draw_blocks):
    results = list(predict_inputs(FacePredictor(classifier, faces="whole"), draw_video(draw_blocks, 40)))
    assert [len(result.faces) for result in results] == [1] * 40


def test_faces_are_prepared_as_in_training(monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (60, 80, 1), np.uint8).repeat(3, axis=-1)
    config = FacesConfig(detect="opencv", equalize="clahe")
    about = About(faces=config.model_dump(mode="json"), face_size=48)
    face = Face((10.0, 12.0, 30.0, 40.0), 1.0)
    monkeypatch.setattr(
        "dlfer.predict.crops.detect_faces_of_each", lambda images, detector, size: [[face] for _ in images]
    )
    classifier = SimpleNamespace(about=about, channels=1, image_size=64, aspect="crop", crop=None, takes_any_size=True)
    (crop,) = build_cropper("auto", classifier)([image])[0]
    expected = equalize(crop_face(image[..., :1], face.box, 48), "clahe")
    assert np.array_equal(crop.pixels, expected)
    assert crop.box == (10, 12, 40, 52)
    light = About(faces=FacesConfig(equalize="histogram").model_dump(mode="json"))
    classifier = SimpleNamespace(about=light, channels=1, image_size=60, aspect="crop", crop=None, takes_any_size=True)
    (whole,) = build_cropper("whole", classifier)([image[:, :60]])[0]
    assert np.array_equal(whole.pixels, prepare_face(image[:, :60, :1], FacesConfig(equalize="histogram"))[0])


def test_a_ready_crop_is_the_square_around_the_box_and_upright_if_it_tilts_much():
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (100, 1))[..., None]
    pixels = crop_face_square(ramp, Face((30.0, 20.0, 20.0, 40.0), 1.0), 20)
    # Columns 20 to 60, two of them in each pixel.
    assert np.abs(pixels[10, :, 0] - (2 * (np.arange(20) * 2 + 20.5))).max() <= 1
    angle = np.radians(30)
    eyes = np.array([[50.0, 50.0]] * 2) + np.outer([-10, 10], [np.cos(angle), np.sin(angle)])
    marks = np.vstack([eyes, [[50, 55], [45, 60], [55, 60]]])
    tilted = crop_face_square(ramp, Face((30.0, 30.0, 40.0, 40.0), 1.0, marks), 20)
    # Along the line of the eyes the ramp is less steep by the cosine.
    steps = np.diff(tilted[10, 4:16, 0].astype(float)).mean()
    assert steps == pytest.approx(4 * np.cos(angle), abs=0.2)
    beside = crop_face_square(ramp, Face((90.0, 40.0, 20.0, 20.0), 1.0), 20)
    assert (beside[:, 12:] == 198).all()


@pytest.mark.parametrize("size", [60, 96, 224])
def test_a_ready_crop_that_the_network_would_enlarge_is_enlarged_in_its_way(size):
    image = np.random.default_rng(0).integers(0, 255, (70, 70, 3), np.uint8)
    # Half a pixel is counted from a pixel's corner in boxes: this one is 48 pixels, as they are.
    pixels = crop_face_square(image, Face((11.0, 8.0, 40.0, 48.0), 1.0), size, trained_side=48)
    crop = image[8:56, 7:55]
    expected = keras.ops.image.resize(crop.astype(np.float32), (size, size), interpolation="bilinear", antialias=True)
    inside = slice(size // 48, -(size // 48))  # at its edge a crop has no neighbours
    assert np.abs(pixels[inside, inside] - np.asarray(expected)[inside, inside]).max() <= 0.6


def test_a_larger_face_has_little_more_detail_than_the_ready_crops_and_no_less():
    """A wave of 24 periods is the finest that 48 pixels hold."""

    def measure_contrast(periods):
        wave = 128 + 100 * np.sin(2 * np.pi * periods * (np.arange(480) + 0.5) / 480)
        image = np.tile(wave.round().astype(np.uint8), (480, 1))[..., None]
        return crop_face_square(image, Face((0.0, 0.0, 480.0, 480.0), 1.0), 96, trained_side=48)[48].std() / 70.7

    ready = 128 + 100 * np.sin(2 * np.pi * 12 * (np.arange(48) + 0.5) / 48)
    enlarged = np.asarray(
        Image.fromarray(np.tile(ready.round().astype(np.uint8), (48, 1))).resize((96, 96), Image.Resampling.BILINEAR)
    )
    assert measure_contrast(12) == pytest.approx(enlarged[48].std() / 70.7, abs=0.08)
    assert measure_contrast(12) > 0.7
    assert measure_contrast(44) < 0.15


@pytest.mark.parametrize(
    ("about", "others", "expected"),
    [
        (About(face_size=48), {}, 96),
        (About(), {}, 96),
        (About(face_size=120), {}, 120),
        (About(face_size=48), {"crop": 0.875}, 110),
        (About(face_size=48), {"takes_any_size": False}, 48),
        (About(face_size=48, faces={"detect": "centerface"}), {}, 48),
        (About(face_size=48, faces={"equalize": "clahe"}), {}, 48),
    ],
)
def test_faces_are_cut_at_the_networks_size_where_it_enlarges_ready_crops(about, others, expected):
    model = SimpleNamespace(**{"about": about, "image_size": 96, "crop": None, "takes_any_size": True, **others})
    assert get_crop_size(model) == expected


def test_found_faces_come_at_the_networks_size(classifier, draw_blocks):
    image = next(iter(draw_video(draw_blocks, 1))).image
    crops = FacePredictor(classifier, faces="opencv").cropper([image])[0]
    assert {crop.pixels.shape for crop in crops} <= {
        (classifier.image_size, classifier.image_size, classifier.channels)
    }


def test_what_is_said_of_predictions(classifier):
    about = describe_predictions(FacePredictor(classifier, faces="whole"), faces="whole", smooth=0.5)
    assert "annotators would give" in about["notice"]
    assert "research only" in about["notice"]
    assert "not calibrated" in about["probabilities"]
    assert "0.5 s" in about["smoothing"]
    classifier.temperature_fit = Temperature(value=1.25, fitted_on="PublicTest", n=3589)
    classifier.about = About(research_only=False, name="a")
    about = describe_predictions(FacePredictor(classifier, faces="whole"), faces="whole", smooth=0)
    assert "1.250" in about["probabilities"]
    assert "research only" not in about["notice"]
    assert (about["smoothing"], about["model"]) == (None, {"name": "a"})
    assert list(list_inputs([])) == []
