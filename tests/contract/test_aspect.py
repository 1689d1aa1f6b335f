"""A circle stays a circle: on every path by which an image that is not square reaches a network or an array.

Where a path ends in an array, the circle is measured in what the input stage of a network makes of it. Where it ends
in probabilities, they are those of the image that NumPy crops or pads.
"""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from dlfer.config.names import ASPECTS
from dlfer.config.schema import AugmentConfig, StageConfig
from dlfer.config.sections import BoostingConfig, DataConfig, FacesConfig, ModelConfig
from dlfer.data.pipeline import iterate_epoch
from dlfer.data.sources import load_data
from dlfer.errors import ModelError
from dlfer.experiment import evaluate as again
from dlfer.explain.explanation import Explainer, MapOptions, randomise
from dlfer.export.contract import Sample
from dlfer.export.exporters import EXPORTERS, Origin, check_needs, export_classifier
from dlfer.model.backbone_spec import Preprocessing
from dlfer.model.face_input import FaceInput
from dlfer.model.families import FAMILIES, build_level_features, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.trees import FeatureScale, import_xgboost, make_parameters
from dlfer.predict.engines import ExportedModel
from dlfer.predict.predictor import FacePredictor
from dlfer.predict.runtimes import EXPORT_FILE, compute_checksums
from dlfer.runs.artifact import ExportAbout
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.runs.records import About
from dlfer.serve.models import ServedModel
from dlfer.serve.worker import read_tensor

SHAPES = [(96, 64), (64, 96), (160, 20), (20, 160), (61, 47), (47, 62)]
SIDE = 48
LABELS = ("a", "b", "c")


def draw_circle(height: int, width: int, channels: int = 1) -> np.ndarray:
    """Return a disc in the centre of uint8 [H, W, channels], 0.7 of the shorter side wide, with soft edges."""
    fine = 8
    y, x = np.indices((height * fine, width * fine)) / fine + 0.5 / fine
    inside = np.hypot(y - height / 2, x - width / 2) <= 0.35 * min(height, width)
    soft = inside.reshape(height, fine, width, fine).mean(axis=(1, 3))
    return np.repeat((20 + 200 * soft).round().astype(np.uint8)[..., None], channels, axis=-1)


def measure_ratio(image: np.ndarray) -> float:
    """Return the width of what is brighter than the corner by its height, as standard deviations of its light."""
    light = np.asarray(image, np.float64).mean(axis=-1)
    light = np.clip(light - light[0, 0], 0, None)
    down, across = (light.sum(axis=axis) / light.sum() for axis in (1, 0))

    def spread(shares: np.ndarray) -> float:
        places = np.arange(len(shares))
        return math.sqrt((shares * places**2).sum() - (shares * places).sum() ** 2)

    return spread(across) / spread(down)


def look(images: np.ndarray, aspect: str) -> np.ndarray:
    """Return what a network of 48 pixels is given of images, float [N, 48, 48, C]."""
    return np.asarray(FaceInput(SIDE, Preprocessing().as_dict(), aspect=aspect).resize(images))


def square_by_numpy(images: np.ndarray, aspect: str) -> np.ndarray:
    """Return images [N, H, W, C] cropped, or padded with their edges."""
    side = (min if aspect == "crop" else max)(images.shape[1:3])
    rows, columns = (np.clip(np.arange(side) + int((length - side) / 2), 0, length - 1) for length in images.shape[1:3])
    return images[:, rows][:, :, columns]


def write_folder(root: Path, shape: tuple[int, int], *, odd: bool) -> str:
    """Write circles of one size in two classes, train and validation; with `odd`, one of another size beside them."""
    for part in ("train", "validation"):
        for label in ("happy", "sad"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(draw_circle(*shape)[..., 0]).save(folder / f"{number}.png")
            if odd:
                Image.fromarray(draw_circle(40, 40)[..., 0]).save(folder / "odd.png")
    return str(root)


def write_arrays(path: Path, shape: tuple[int, int]) -> str:
    images = np.stack([draw_circle(*shape, channels=3)] * 4)
    arrays = {f"{part}_{name}": values for part in ("train", "validation") for name, values in
              (("images", images), ("targets", np.arange(4) % 2))}  # fmt: skip
    np.savez(path, **arrays)
    return str(path)


SOURCES = {
    "folder of one size": lambda root, shape: {"source": "folder", "path": write_folder(root, shape, odd=False)},
    "folder of several sizes": lambda root, shape: {"source": "folder", "path": write_folder(root, shape, odd=True)},
    "folder, resized": lambda root, shape: {"source": "folder", "path": write_folder(root, shape, odd=False), "size": 40},
    "arrays": lambda root, shape: {"source": "arrays", "path": write_arrays(root / "a.npz", shape)},
    "arrays, resized": lambda root, shape: {"source": "arrays", "path": write_arrays(root / "a.npz", shape), "size": 40},
    "no face found": lambda root, shape: {
        "source": "arrays",
        "path": write_arrays(root / "a.npz", shape),
        "faces": FacesConfig(equalize="histogram"),
    },
    "streamed": lambda root, shape: {
        "source": "tfds",
        "name": "image_folder",
        "path": write_folder(root, shape, odd=True),
        "crop": {"train": "random_resized"},
    },
}  # fmt: skip


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", SOURCES)
def test_data(source, shape, aspect, tmp_path, monkeypatch):
    monkeypatch.setenv("DLFER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    config = DataConfig(aspect=aspect, **SOURCES[source](tmp_path / "data", shape))
    bundle = load_data(config, image_size=SIDE)
    if source == "streamed":
        images, _, ids = next(bundle.validation.batches(8, seed=0, epoch=0, training=False))
    else:
        images, ids = bundle.validation.images, bundle.validation.ids
    kept = images[[not name.endswith("odd.png") for name in ids]]
    seen = look(kept, aspect)
    for image in seen:
        # Eight to one, padded to 48 pixels, the circle is four pixels wide.
        assert measure_ratio(image) == pytest.approx(1, abs=0.06 if aspect == "pad" and max(shape) == 160 else 0.02)
    # That it is a circle is not enough: it is as large as it is in the square.
    share = 0.35**2 * math.pi * (min(shape) / max(shape)) ** (2 if aspect == "pad" else 0)
    share /= 0.875**2 if source == "streamed" else 1
    bright = (seen > 120).mean(axis=(1, 2, 3))
    assert bright == pytest.approx(share, rel=0.4 if share < 0.02 else 0.2)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_run_is_told_what_is_cropped(aspect, tmp_path):
    notes = load_data(
        DataConfig(source="arrays", path=write_arrays(tmp_path / "a.npz", (64, 96)), aspect=aspect), image_size=SIDE
    ).notes
    seen = {"crop": "central 64 x 64 of each; 33% of its pixels", "pad": "whole image, padded to 96 x 96"}[aspect]
    assert any("96 x 64 pixels, not square" in note and seen in note for note in notes)
    square = DataConfig(source="arrays", path=write_arrays(tmp_path / "b.npz", (64, 64)), aspect=aspect)
    assert load_data(square, image_size=SIDE).notes == ()


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("crop", [None, 0.9])
@pytest.mark.parametrize("shape", [*SHAPES, (384, 256), (97, 200)])
def test_training_with_a_random_warp(shape, crop, aspect, tmp_path):
    data = DataConfig(source="arrays", path=write_arrays(tmp_path / "a.npz", shape), aspect=aspect)
    augment = AugmentConfig(rotation=25.0, zoom=0.1, shift=0.03, mirror=0.5)
    stage = StageConfig(data=data, image_size=SIDE, batch_size=4, crop=crop, augment=augment)
    split = load_data(data, image_size=SIDE).train
    inputs, _ = next(iterate_epoch(split, stage, num_labels=2, seed=0, epoch=0))
    layer = FaceInput(SIDE, Preprocessing().as_dict(), crop, aspect)
    for image in np.asarray(layer.augment(inputs["image"], inputs, fill="nearest")):
        assert measure_ratio(image) == pytest.approx(1, abs=0.1 if aspect == "pad" and max(shape) == 160 else 0.03)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("shape", [(48, 64), (64, 40), (24, 192)])
def test_an_image_is_seen_alike_from_a_folder_and_by_predict(shape, aspect, tmp_path):
    """Stored as squares by Pillow, or native and made square in the graph: within the rounding of what is stored."""
    image = draw_circle(*shape, channels=3)
    image[..., 1] = np.linspace(0, 255, shape[1]).astype(np.uint8)
    image[..., 2] = np.linspace(0, 255, shape[0]).astype(np.uint8)[:, None]
    for label in ("happy", "sad"):
        for part in ("train", "validation"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / part / label / "0.png")
    config = DataConfig(source="folder", path=str(tmp_path), size=SIDE, aspect=aspect)
    stored = look(load_data(config, image_size=SIDE).train.images, aspect)
    assert np.abs(stored - look(image[None], aspect)).max() < 1.01


class Recorder:
    """An engine that remembers the images that it is given."""

    labels, image_size, temperature_fit, crop, takes_any_size = LABELS, SIDE, None, None, True

    def __init__(self, aspect: str, *, channels: int = 1, faces: FacesConfig | None = None) -> None:
        self.aspect = aspect
        self.channels = channels
        self.about = About(faces=None if faces is None else faces.model_dump(mode="json"))
        self.seen: list[np.ndarray] = []

    def predict(self, images, *, batch_size=64, calibrated=False):
        self.seen.append(images)
        return np.full((len(images), 3), 1 / 3, np.float32)


def ask_by_tensor(engine: Recorder, picture: np.ndarray) -> None:
    model = ServedModel("m", engine, card=None, croppers={})
    images = read_tensor(str(picture.ravel().tolist()).encode(), [1, *picture.shape])
    model.predict([model.fit(image) for image in images])


ASKED = {
    "predict --faces whole": lambda engine, picture: FacePredictor(engine, faces="whole").predict([picture]),
    "predict --mirror": lambda engine, picture: FacePredictor(engine, faces="whole", mirror=True).predict([picture]),
    "a served crop": lambda engine, picture: ServedModel("m", engine, card=None, croppers={}).predict([picture]),
    "a served tensor": ask_by_tensor,
}


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("faces", [None, FacesConfig(equalize="histogram")])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ASKED)
def test_pictures(path, shape, channels, faces, aspect):
    engine = Recorder(aspect, channels=channels, faces=faces)
    ASKED[path](engine, draw_circle(*shape, channels=3))
    assert engine.seen
    for images in engine.seen:
        assert images.shape[1] == images.shape[2]
        assert images.shape[3] == channels
        ratio = measure_ratio(look(images, aspect)[0])
        assert ratio == pytest.approx(1, abs=0.06 if aspect == "pad" and max(shape) == 160 else 0.02)


def build(aspect: str, *, family: str = "transfer", channels: int = 1, crop: float | None = None):
    keras.utils.set_random_seed(0)
    keys = (
        {"branches": ("efficientnet_nano", "resnet_nano")} if family == "hybrid" else {"backbone": "efficientnet_nano"}
    )
    config = ModelConfig(family=family, **keys)
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=channels, crop=crop, aspect=aspect)
    network.head.kernel.assign(network.head.kernel * 20.0)
    if family != "boosted":
        return FAMILIES[family](network, LABELS, config=config, channels=channels)
    boosting = BoostingConfig(max_depth=3, colsample=1.0)
    features = build_level_features(network, config, boosting)
    values = features.compute(
        np.random.default_rng(0).integers(0, 256, (60, 32, 32, channels), np.uint8), batch_size=20
    )
    scale = FeatureScale.fit(boosting.normalize.features, features.levels, values)
    xgb = import_xgboost()
    matrix = xgb.DMatrix(scale.apply(values), label=np.arange(60) % 3)
    trees = features, scale, xgb.train(make_parameters(boosting, num_labels=3, seed=0), matrix, 5)
    given = {"config": config, "channels": channels, "boosting": boosting, "trees": trees}
    return FAMILIES["boosted"](network, LABELS, **given)


def build_ensemble(aspect: str):
    members = {"one": build(aspect), "two": build(aspect, channels=3, crop=0.8)}
    return FAMILIES["ensemble"](members, LABELS, config=ModelConfig(family="ensemble"))


CLASSIFIERS = {
    "transfer": build,
    "transfer, colour": lambda aspect: build(aspect, channels=3),
    "transfer, parts": lambda aspect: build(aspect, crop=0.8),
    "hybrid": lambda aspect: build(aspect, family="hybrid"),
    "boosted": lambda aspect: build(aspect, family="boosted"),
    "ensemble": build_ensemble,
}


def draw_faces(shape: tuple[int, int], channels: int) -> np.ndarray:
    """Return three different images, whose central squares differ from the whole."""
    noise = np.random.default_rng(0).integers(0, 256, (3, *shape, channels))
    return ((noise + draw_circle(*shape, channels).astype(int)) // 2).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize(
    "kind", ["transfer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CLASSIFIERS if kind != "transfer")]
)
def test_every_family_predicts_what_numpy_crops_or_pads(kind, aspect, tmp_path):
    classifier = CLASSIFIERS[kind](aspect)
    classifier.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / ARTIFACT_FILE).read_text())["input"]["aspect"] == aspect
    loaded = load_artifact(str(tmp_path / "model"))
    assert loaded.aspect == aspect
    for shape in ((96, 64), (20, 160), (61, 47)):
        images = draw_faces(shape, classifier.channels)
        wanted = classifier.predict(square_by_numpy(images, aspect))
        # Trees jump where a feature does not.
        assert np.allclose(loaded.predict(images), wanted, atol=0.05 if kind == "boosted" else 1e-5), shape
    assert randomise(loaded).aspect == aspect


@pytest.mark.slow
@pytest.mark.parametrize("aspect", ASPECTS)
def test_the_program_for_all_other_sizes_does_the_same(aspect, monkeypatch):
    many = build(aspect)
    for shape in SHAPES:
        images = draw_faces(shape, 1)
        with monkeypatch.context() as patch:
            patch.setattr("dlfer.model.predict.MAX_SIZES", 0)
            found = many.predict(images)
        assert np.allclose(found, many.predict(square_by_numpy(images, aspect)), atol=1e-3), shape


def test_an_artifact_of_before_the_choice_is_cropped(tmp_path):
    build("crop").save(tmp_path)
    record = json.loads((tmp_path / ARTIFACT_FILE).read_text())
    del record["input"]["aspect"]
    (tmp_path / ARTIFACT_FILE).write_text(json.dumps(record))
    assert load_artifact(str(tmp_path)).aspect == "crop"
    for wrong in ("stretch", None, 1):
        record["input"]["aspect"] = wrong
        (tmp_path / ARTIFACT_FILE).write_text(json.dumps(record))
        with pytest.raises(ModelError, match=r"input.aspect: found .*expected crop or pad"):
            load_artifact(str(tmp_path))


def test_an_ensemble_has_members_of_one_kind():
    with pytest.raises(ModelError, match=r"one: crop, two: pad.*expected one data.aspect"):
        FAMILIES["ensemble"]({"one": build("crop"), "two": build("pad")}, LABELS, config=ModelConfig(family="ensemble"))


@pytest.mark.slow
@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("shape", [(64, 96), (61, 40)])
def test_maps_lie_where_the_network_looks(shape, aspect):
    """Covering what is cropped changes nothing; of the rest, and of a padded image, both methods have a map."""
    classifier = build(aspect)
    image = draw_faces(shape, 1)[0]
    explanation = Explainer(classifier, MapOptions(size=8, stride=4)).explain(image)
    side = min(shape)
    top, left = ((length - side) // 2 for length in shape)
    outside = np.ones(shape, bool)
    outside[top : top + side, left : left + side] = False
    assert set(explanation.maps) == {"occlusion", "gradcam"}
    for values in explanation.maps.values():
        assert values.shape == shape
        assert np.abs(values[~outside]).max() > 1e-3
    # A square that lies half outside counts for all its pixels.
    far = outside.copy()
    far[max(0, top - 8) : top + side + 8, max(0, left - 8) : left + side + 8] = False
    assert (np.abs(explanation.maps["occlusion"][far]).max() < 1e-6) == (aspect == "crop")
    assert explanation.maps["gradcam"][outside].any() == (aspect == "pad")


@pytest.mark.slow
@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_folder_of_several_sizes_is_judged_as_the_model_was_trained(aspect, tmp_path, monkeypatch):
    build(aspect).save(tmp_path / "model", about=About(protocol="official"))
    for label in ("a", "b", "c"):
        for part in ("train", "test"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for number, shape in enumerate([(64, 96), (61, 40)]):
                Image.fromarray(draw_circle(*shape)[..., 0]).save(tmp_path / "data" / part / label / f"{number}.png")
    classifier, seen = load_artifact(str(tmp_path / "model")), []
    predict = classifier.predict
    monkeypatch.setattr(classifier, "predict", lambda images, **given: seen.append(images) or predict(images, **given))
    monkeypatch.setattr(again, "load_engine", lambda name: classifier)
    again.evaluate_model(str(tmp_path / "model"), data=tmp_path / "data")
    # The median side of the squares: of 64 and 40 pixels, or of 96 and 61.
    assert seen[0].shape[1:3] == {"crop": (52, 52), "pad": (78, 78)}[aspect]
    assert measure_ratio(seen[0][0]) == pytest.approx(1, abs=0.02)


@pytest.fixture(scope="module", params=["crop", pytest.param("pad", marks=pytest.mark.slow)])
def exports(request, tmp_path_factory):
    """Return a classifier and the folder of its exports, those of one size for squares of 40 pixels."""
    out = tmp_path_factory.mktemp(request.param)
    check_needs(classifier := build(request.param), tuple(EXPORTERS))
    sample = Sample(draw_faces((64, 40), 1), "drawn", draw_faces((64, 40), 1), "drawn")
    for name in ("savedmodel", "onnx", "litert"):
        export_classifier(
            classifier,
            name,
            out=out,
            sample=sample,
            origin=Origin(card="# A card\n", about=ExportAbout(), size=(40, 40)),
        )
    return classifier, out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["savedmodel", "onnx", "litert"])
def test_exports(name, exports, tmp_path):
    classifier, out = exports
    model = ExportedModel(out / name)
    assert model.aspect == classifier.aspect
    for shape in SHAPES:
        images = draw_faces(shape, 1)
        found, wanted = model.predict(images), classifier.predict(square_by_numpy(images, classifier.aspect))
        if model.takes_any_size:
            assert np.allclose(found, wanted, atol=1e-4)
        else:
            # Resized to 40 pixels before, then to 32.
            assert np.abs(found - wanted).mean() < 0.05
    if name == "savedmodel":
        return
    pictures = []
    for number, shape in enumerate([(64, 96), (61, 40), (20, 160)]):
        pictures.append(draw_faces(shape, 1)[0])
        Image.fromarray(pictures[-1][..., 0]).save(tmp_path / f"{number}.png")
    names = [str(tmp_path / f"{number}.png") for number in range(len(pictures))]
    done = subprocess.run(
        [sys.executable, str(out / name / "example.py"), *names], capture_output=True, text=True, check=True
    )
    for line, picture in zip(done.stdout.splitlines(), pictures, strict=True):
        answers = ast.literal_eval(line[line.index("{") :])
        assert np.allclose(list(answers.values()), model.predict(picture[None])[0], atol=2e-4)


@pytest.mark.slow
def test_an_export_of_before_the_choice_does_not_stretch(exports, monkeypatch):
    """Its graph scales the two axes differently, so it is given squares."""
    classifier, out = exports
    if classifier.aspect == "pad":
        pytest.skip("cropped if nothing is told")
    place = out / "onnx"
    text = (place / EXPORT_FILE).read_text()
    record = json.loads(text)
    del record["input"]["aspect"]
    assert record["sha256"] == {name: value for name, value in compute_checksums(place).items() if name != EXPORT_FILE}
    (place / EXPORT_FILE).write_text(json.dumps(record))
    try:
        model, given = ExportedModel(place), []
        monkeypatch.setattr(model, "_answer", lambda images: given.append(images) or np.full((len(images), 3), 1 / 3))
        model.predict(draw_faces((64, 96), 1))
    finally:
        (place / EXPORT_FILE).write_text(text)
    assert given[0].shape == (3, 64, 64, 1)
