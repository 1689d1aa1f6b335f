"""Faces found in photographs: boxes in their own pixels, CenterFace against its publisher's decoding, alignment against OpenCV and skimage."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dlfer.data import faces as module
from dlfer.data.faces import (
    EYES,
    align_face,
    compute_alignment,
    crop_face,
    detect_faces,
    detect_faces_of_each,
    warp_fast,
    warp_image,
)
from dlfer.errors import DataError, EnvironmentProblem

DETECTORS = ("centerface", "mtcnn", "opencv")
FINDS_EYES = ("centerface", "mtcnn")
EYES_OF_PORTRAIT = ((220, 190), (308, 186))


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """Rear Admiral Grace Hopper, a photograph of the U.S. Navy in the public domain that matplotlib brings along."""
    matplotlib = pytest.importorskip("matplotlib")
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(params=DETECTORS)
def detector(request) -> str:
    pytest.importorskip({"centerface": "onnxruntime", "mtcnn": "mtcnn", "opencv": "cv2"}[request.param])
    return request.param


def test_one_face_in_a_portrait_around_the_eyes(portrait, detector):
    (face,) = detect_faces(portrait, detector=detector)
    left, top, width, height = face.box
    for x, y in EYES_OF_PORTRAIT:
        assert left < x < left + width
        assert top < y < top + height
    assert 150 < height < 260
    if detector in FINDS_EYES:
        assert np.abs(face.eyes - EYES_OF_PORTRAIT).max() < 12
        assert face.landmarks.shape == (5, 2)
        assert 0.8 < face.score <= 1
    else:
        assert face.eyes is None


def test_two_faces_of_a_large_photo_in_its_own_pixels(portrait, detector):
    small = np.asarray(Image.fromarray(portrait).resize((256, 300)))
    photo = np.full((1400, 2000, 3), 128, np.uint8)
    photo[100:700, 100:612] = portrait
    photo[900:1200, 1500:1756] = small
    first, second = detect_faces(photo, detector=detector)[:2]
    for face, (x, y, scale) in ((first, (100, 100, 1)), (second, (1500, 900, 0.5))):
        left, top, width, height = face.box
        for eye_x, eye_y in EYES_OF_PORTRAIT:
            assert left < x + scale * eye_x < left + width
            assert top < y + scale * eye_y < top + height
    assert first.box[2] > second.box[2]


@pytest.mark.parametrize("detector", FINDS_EYES[:1])
def test_a_larger_size_finds_smaller_faces(portrait, detector):
    photo = np.full((1000, 1600, 3), 128, np.uint8)
    photo[500:556, 800:848] = np.asarray(Image.fromarray(portrait).resize((48, 56), Image.Resampling.BOX))
    assert detect_faces(photo, detector=detector) == []
    (face,) = detect_faces(photo, detector=detector, size=1600)
    for x, y in EYES_OF_PORTRAIT:
        assert face.box[0] < 800 + x * 48 / 512 < face.box[0] + face.box[2]
        assert face.box[1] < 500 + y * 56 / 600 < face.box[1] + face.box[3]


def test_a_small_grey_crop_is_enlarged_and_its_box_stays_inside(portrait, detector):
    crop = np.asarray(Image.fromarray(portrait[80:360, 130:410]).convert("L").resize((48, 48), Image.Resampling.BOX))
    (face,) = detect_faces(crop, detector=detector)
    left, top, width, height = face.box
    assert 0 <= left < left + width <= 48
    assert 0 <= top < top + height <= 48
    assert height > 24
    if detector in FINDS_EYES:
        expected = (np.array(EYES_OF_PORTRAIT) - (130, 80)) * 48 / 280
        assert np.abs(face.eyes - expected).max() < 2.5


@pytest.mark.slow
def test_several_images_are_the_same_as_one_by_one(portrait, detector):
    images = [portrait, portrait[:, ::-1], np.full((60, 60, 1), 9, np.uint8), portrait[60:, 40:], portrait // 2]
    together = detect_faces_of_each(images, detector=detector)
    assert [len(found) for found in together] == [1, 1, 0, 1, 1]
    for image, found in zip(images, together, strict=True):
        for one, other in zip(found, detect_faces(np.ascontiguousarray(image), detector=detector), strict=True):
            assert np.allclose(one.box, other.box)
            assert one.landmarks is None or np.allclose(one.landmarks, other.landmarks)


@pytest.mark.parametrize("shape", [(8, 8), (12, 400, 1), (300, 20, 3)])
def test_tiny_and_narrow_images_hold_no_face_and_no_error(shape, detector):
    assert detect_faces(np.full(shape, 200, np.uint8), detector=detector) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_image_is_shrunk_in_strips_to_the_pixels_of_the_whole(monkeypatch, channels):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (301, 402, channels)).astype(np.uint8)
    rows_first = module._resize_at_once(module._resize_at_once(image, 131, 301), 131, 98)
    sizes, resize = [], module._resize_at_once
    monkeypatch.setattr(module, "_resize_at_once", lambda part, *size: sizes.append(part.size) or resize(part, *size))
    monkeypatch.setattr(module, "STRIP_PIXELS", 10_000)
    assert np.array_equal(module._resize(image, 131, 98), rows_first)
    assert len(sizes) == 14
    assert max(sizes[:-1]) <= 10_000 * channels * 1.1


def test_large_images_go_to_the_detector_a_few_at_a_time(monkeypatch):
    """The memory of a network grows with all pixels that it gets at once."""
    given = []

    def find(images, are_crops):
        given.append((images[0].shape, len(images)))
        return [[] for _ in images]

    monkeypatch.setitem(module.DETECTORS, "centerface", module.Detector(find, 640))
    for shape, count in (((480, 640, 3), 10), ((48, 48, 1), 70), ((4000, 2000, 3), 4)):
        assert detect_faces_of_each([np.zeros(shape, np.uint8)] * count) == [[]] * count
    assert detect_faces_of_each([np.zeros((2048, 2048, 3), np.uint8)] * 2, size=2048) == [[], []]
    assert [number for _, number in given] == [4, 4, 2, 32, 32, 6, 4, 1, 1]


def test_alignment_is_the_similarity_of_two_points():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for _ in range(20):
        eyes, size = rng.uniform(0, 200, (2, 2)), int(rng.integers(24, 200))
        to = np.array(EYES) * size - 0.5
        expected, _ = cv2.estimateAffinePartial2D(eyes, to)
        assert np.allclose(compute_alignment(eyes, size), expected, atol=1e-4)
        assert np.allclose(compute_alignment(eyes, size) @ [*eyes[0], 1], to[0])


def test_warp_that_enlarges_is_opencvs(portrait):
    cv2 = pytest.importorskip("cv2")
    image = np.ascontiguousarray(portrait[100:160, 150:210])
    for eyes in ([[20, 25], [40, 24]], [[25, 20], [35, 40]], [[-5, 10], [20, 10]]):
        matrix = compute_alignment(np.array(eyes), 96)
        expected = cv2.warpAffine(image, matrix, (96, 96), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        difference = np.abs(warp_image(image, matrix, 96).astype(int) - expected)
        # OpenCV samples at 1/32 of a pixel.
        assert difference.mean() < 1
        assert difference.max() < 25


@pytest.mark.parametrize("angle", [0, 20, -35])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_aligned_face_has_its_eyes_in_place(angle, channels):
    # Two white dots on black, turned; shrunk fourfold, so that the antialiasing is in play.
    turn = np.deg2rad(angle)
    middle, half = np.array([200.0, 180.0]), 66 * np.array([np.cos(turn), np.sin(turn)])
    eyes = np.array([middle - half, middle + half])
    y, x = np.mgrid[:400, :400]
    image = np.zeros((400, 400, channels), np.uint8)
    for eye_x, eye_y in eyes:
        image[(x - eye_x) ** 2 + (y - eye_y) ** 2 < 100] = 255
    size = 96
    aligned = align_face(image, eyes, size)
    assert aligned.shape == (size, size, channels)
    for column, half_of in enumerate((aligned[:, : size // 2, 0], aligned[:, size // 2 :, 0])):
        weights = half_of / half_of.sum()
        rows, columns = np.mgrid[: half_of.shape[0], : half_of.shape[1]]
        centre = (weights * columns).sum() + column * size // 2, (weights * rows).sum()
        assert np.allclose(centre, np.array(EYES[column]) * size - 0.5, atol=0.3)


def test_a_crop_is_the_square_around_the_box(portrait):
    assert np.array_equal(crop_face(portrait, (100, 50, 64, 64), 64), portrait[50:114, 100:164])
    taller = crop_face(portrait, (120, 50, 24, 64), 64)
    assert np.array_equal(taller, portrait[50:114, 100:164])
    outside = crop_face(portrait, (-10, 0, 20, 20), 20)
    assert np.array_equal(outside[:, :10], np.repeat(portrait[:20, :1], 10, axis=1))


def test_eyes_at_one_place_are_refused():
    with pytest.raises(DataError, match="both eyes at 3"):
        align_face(np.zeros((9, 9, 1), np.uint8), np.full((2, 2), 3.0), 9)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.float32), np.zeros((9, 9, 2), np.uint8), np.zeros((0, 9), np.uint8)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(DataError, match="expected uint8"):
        detect_faces(image, detector="opencv")


def test_an_unknown_detector_is_refused():
    with pytest.raises(DataError, match="found 'dlib', expected one of centerface, mtcnn, opencv"):
        detect_faces(np.zeros((9, 9), np.uint8), detector="dlib")


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("centerface", "onnxruntime", "pip install onnxruntime"),
        ("mtcnn", "mtcnn", "pip install mtcnn==1.0.0"),
        ("opencv", "cv2", "pip install 'opencv-python-headless<5'"),
    ],
)
def test_an_absent_package_is_named_with_its_command(name, package, command, monkeypatch):
    real = builtins.__import__

    def refuse(wanted, *args, **given):
        if wanted == package:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *args, **given)

    module._load_mtcnn.cache_clear()
    module._load_cascade.cache_clear()
    module._load_centerface.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EnvironmentProblem) as problem:
        detect_faces(np.zeros((60, 60), np.uint8), detector=name)
    assert command in str(problem.value)


def test_the_cubic_warp_keeps_pixels_follows_ramps_and_continues_edges():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
    identity = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert np.array_equal(warp_fast(image, identity, 50), image[:50, :50])
    beside = np.array([[1.0, 0.0, -50.0], [0.0, 1.0, -40.0]])
    assert np.array_equal(warp_fast(image, beside, 40), warp_image(image, beside, 40))
    ramp = np.tile(np.arange(0, 210, 3, dtype=np.uint8), (60, 1))[..., None]
    for scale in (0.5, 1.0, 2.0):
        turn = scale * np.exp(0.4j)
        matrix = np.array([[turn.real, -turn.imag, 5.0], [turn.imag, turn.real, -3.0]])
        found = warp_fast(ramp, matrix, 40).astype(int)
        assert np.abs(found - warp_image(ramp, matrix, 40)).max() <= 2


def test_the_cubic_warp_is_sharper_between_pixels():
    stripes = np.tile(np.repeat(np.array([40, 200], np.uint8), 3), (48, 8))[..., None]
    half = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]])
    spread = [warp(stripes, half, 40)[:, 4:36].astype(float).std() for warp in (warp_image, warp_fast)]
    assert spread[1] > 1.05 * spread[0]


def test_the_bilinear_warp_of_pillow_is_ours_and_may_look_at_fewer_pixels():
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    for scale in (1.0, 1.7, 4.0):
        turn = scale * np.exp(0.2j)
        matrix = np.array([[turn.real, -turn.imag, 5.2], [turn.imag, turn.real, -3.4]])
        found = warp_fast(image, matrix, 40, kernel="bilinear").astype(int)
        assert np.abs(found - warp_image(image, matrix, 40)).max() <= 1
        assert np.array_equal(found, warp_fast(image, matrix, 40, kernel="bilinear", resolution=40))
    blurred = warp_fast(image, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 40, kernel="bilinear", resolution=10)
    assert blurred.std() < 0.6 * image[:40, :40].std()
    assert np.abs(blurred.mean(axis=(0, 1)) - image[:40, :40].mean(axis=(0, 1))).max() < 6


ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.asarray(Image.open(ROOT / "docs" / "astronaut.jpg").convert("RGB"))


def tile(image: np.ndarray) -> np.ndarray:
    """Return four copies, two of them flipped, as [512, 512, 3]."""
    small = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR))
    flipped = small[:, ::-1]
    return np.concatenate([np.concatenate([small, flipped], 1), np.concatenate([flipped, small], 1)], 0)


@pytest.mark.parametrize("name", ["astronaut", "tiled"])
def test_boxes_scores_and_landmarks_are_those_of_another_implementation(photo, name):
    expected = json.loads((ROOT / "tests" / "golden" / "centerface.json").read_text())[name]
    boxes, marks = np.array(expected["boxes"]), np.array(expected["landmarks"]).reshape(-1, 5, 2)
    found = module.detect((photo if name == "astronaut" else tile(photo))[None], min_score=0.5)[0]
    assert len(found.scores) == len(boxes)
    order = np.lexsort((found.boxes[:, 0].round(), found.boxes[:, 1].round()))
    other = np.lexsort((boxes[:, 0].round(), boxes[:, 1].round()))
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], axis=1)
    assert corners[order] == pytest.approx(boxes[other, :4], abs=0.02)
    assert found.scores[order] == pytest.approx(boxes[other, 4], abs=1e-4)
    # Those of the other implementation are relative to the corner of the first pixel, as its boxes are.
    assert found.landmarks[order] + 0.5 == pytest.approx(module.sort_left_right(marks[other]), abs=0.02)


class SquareFinder:
    """Stands in for CenterFace: finds one bright square, and gives its centre as the published decoding expects it.

    That is ((cell + offset + 0.5) * 4) from the corner of the first pixel for the box, and fractions of the box from its
    corner for the landmarks.
    """

    def run(self, names, given):
        outputs = []
        for image in given["input.1"][:, 0].astype(float):
            centre = np.array(
                [
                    np.average(np.arange(side) + 0.5, weights=image.sum(1 - axis))
                    for axis, side in enumerate(image.shape)
                ]
            )
            row, column = np.floor(centre / 4).astype(int)
            heat, scale, offset, marks = (
                np.zeros((number, *(side // 4 for side in image.shape))) for number in (1, 2, 2, 10)
            )
            heat[0, row, column], scale[:, row, column], marks[:, row, column] = 0.9, np.log(6), 0.5
            offset[:, row, column] = centre / 4 - (row, column) - 0.5
            outputs.append((heat, scale, offset, marks))
        return [np.stack(one) for one in zip(*outputs, strict=True)]


@pytest.mark.parametrize(
    ("shape", "half", "size"), [((300, 400), 20, 640), ((300, 400), 20, 200), ((300, 400), 20, 160), ((60, 60), 6, 640)]
)
def test_landmarks_are_relative_to_the_centre_of_the_first_pixel_at_any_scale(monkeypatch, shape, half, size):
    monkeypatch.setattr(module, "_load_centerface", SquareFinder)
    for x, y in ((shape[1] // 2 - 5, shape[0] // 2 + 2), (shape[1] // 2 + 4, shape[0] // 2 - 7)):
        image = np.zeros((*shape, 3), np.uint8)
        image[y - half : y + half + 1, x - half : x + half + 1] = 200
        (face,) = detect_faces(image, size=size)
        assert face.landmarks == pytest.approx(np.tile([x, y], (5, 1)), abs=0.05)
        left, top, width, height = face.box
        assert (left + width / 2, top + height / 2) == pytest.approx((x + 0.5, y + 0.5), abs=0.05)


def test_images_of_one_size_are_found_together_as_one_by_one(photo):
    images = np.stack([photo, photo[:, ::-1], np.zeros_like(photo)])
    together = module.detect(images, min_score=0.5)
    for found, image in zip(together, images, strict=True):
        alone = module.detect(image[None], min_score=0.5)[0]
        assert found.boxes == pytest.approx(alone.boxes, abs=1e-2)
        assert found.scores == pytest.approx(alone.scores, abs=1e-5)
    assert [len(found.scores) for found in together] == [1, 1, 0]


@pytest.mark.parametrize("size", [(33, 64), (97, 51), (480, 301), (31, 31)])
def test_any_size_is_taken_and_boxes_stay_within_it(photo, size):
    image = np.asarray(Image.fromarray(photo).resize(size[::-1]))
    found = module.detect(image[None], min_score=0.2)[0]
    assert found.boxes.shape == (len(found.scores), 4)
    assert found.landmarks.shape == (len(found.scores), 5, 2)
    assert (found.boxes[:, :2] >= 0).all()
    assert (found.boxes[:, 0] + found.boxes[:, 2] <= size[1] + 1e-6).all()
    assert (found.boxes[:, 1] + found.boxes[:, 3] <= size[0] + 1e-6).all()


def test_eyes_and_corners_of_the_mouth_are_from_left_to_right_in_a_flipped_picture(photo):
    for image in (photo, photo[:, ::-1]):
        marks = module.detect(np.ascontiguousarray(image)[None], min_score=0.5)[0].landmarks[0]
        assert marks[0, 0] < marks[1, 0]
        assert marks[3, 0] < marks[4, 0]
        assert marks[:2, 1].max() < marks[2, 1] < marks[3:, 1].min()  # eyes above nose above mouth


def test_faces_below_the_least_size_are_left_out(photo, monkeypatch):
    assert len(module.detect(photo[None], min_score=0.5)[0].scores) == 1
    monkeypatch.setattr(module, "MIN_SIDE", 100.0)  # the face is 89 pixels wide
    assert len(module.detect(photo[None], min_score=0.5)[0].scores) == 0


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.just(5)), elements=st.floats(1, 50)))
def test_suppression_keeps_the_best_of_what_overlaps_and_nothing_else(values):
    boxes, scores = values[:, :4], values[:, 4]
    kept = module.suppress(boxes, scores)
    assert list(scores[kept]) == sorted(scores[kept], reverse=True)
    for place, index in enumerate(kept):
        assert all(overlap(boxes[index], boxes[other]) <= module.MAX_OVERLAP + 1e-9 for other in kept[:place])
    for index in set(range(len(boxes))) - set(kept.tolist()):
        assert any(
            scores[other] >= scores[index] and overlap(boxes[index], boxes[other]) > module.MAX_OVERLAP - 1e-9
            for other in kept
        )


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "centerface.onnx"
    broken.write_bytes(module.CENTERFACE_FILE.read_bytes()[:-1])
    monkeypatch.setattr(module, "CENTERFACE_FILE", broken)
    module._load_centerface.cache_clear()
    try:
        with pytest.raises(EnvironmentProblem, match=r"centerface\.onnx.*damaged"):
            module.detect(np.zeros((1, 64, 64, 3), np.uint8), min_score=0.5)
    finally:
        module._load_centerface.cache_clear()
