"""A shipped model is small, answers as the run's, has its card, and is the one default."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import ClassVar

import h5py
import keras
import numpy as np
import pytest
from huggingface_hub import ModelCard

import dlfer
from dlfer.cli.show import list_model_rows
from dlfer.config.load import load_experiment
from dlfer.config.sections import BoostingConfig, ModelConfig, NormalizeConfig
from dlfer.data.sources import load_data
from dlfer.errors import ModelError
from dlfer.experiment.evaluate import evaluate_model
from dlfer.experiment.splits import compute_run_metrics, describe_data
from dlfer.export import ship
from dlfer.export.ship import ONNX_FILE, factor_kernel, list_kernels, ship_model, shrink_weights, write_embedded_onnx
from dlfer.metrics.confidence import describe_temperature
from dlfer.metrics.predictions import Predictions
from dlfer.model.classifier import WEIGHTS_FILE, TransferClassifier
from dlfer.model.families import BoostedClassifier, EnsembleClassifier, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.trees import SCALE_FILE, TREES_FILE
from dlfer.predict.engines import ArtifactModel, load_engine
from dlfer.predict.runtimes import open_onnx
from dlfer.report.card import Terms
from dlfer.runs import find as catalog
from dlfer.runs.files import read_npz, write_npz
from dlfer.runs.find import find_default_model
from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.records import INT8_FILES, About, ArtifactRecord, InputRecord, OnnxRecord, Temperature
from dlfer.runs.run import Run, create_run
from dlfer.runs.run_records import read_metrics
from tests.unit.model.test_boosted import make_classifier

LABELS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ship")
    path = folder / "a.yaml"
    path.write_text(
        "experiment: {name: small, seed: 7}\nmodel: {backbone: efficientnet_lite0}\npretrain: null\n"
        "finetune: {data: {source: synthetic_faces}, image_size: 32}\n"
    )
    config = load_experiment(path)
    run = create_run(folder / "runs", config, argv=[])
    network = build_transfer_network(
        ModelConfig(backbone="efficientnet_lite0"), num_labels=7, image_size=32, channels=1
    )
    classifier = TransferClassifier(network, LABELS, config=config.model, channels=1)
    classifier.save(run.path / "model", about=About(experiment="small", run=run.path.name))
    (run.path / "data.json").write_text(
        json.dumps({"splits": {"train": {"name": "train", "n": 9, "shape": [48, 48, 1]}}})
    )
    (run.path / "metrics.json").write_text(json.dumps({}))
    digests = {
        f"{part}_digests": np.array([f"{number:032x}" for number in range(9)], "S32") for part in ("train", "test")
    }
    write_npz(run.path / "images.npz", {**digests, "train_ids": np.arange(9).astype(str)})
    run.finish()
    return run.path


@pytest.mark.slow
def test_a_run_is_shipped_and_is_the_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: None)
    with pytest.raises(ModelError, match="DLFER_HOME"):
        find_default_model()
    first = ship_model(run, tmp_path / "saved_models", name="first", default=True)
    assert {path.name for path in first.iterdir()} == {
        *(
            "artifact.json",
            "network.weights.h5",
            "network.onnx",
            "MODEL_CARD.md",
            "config.yaml",
            "metrics.json",
            "data.json",
            "images.npz",
        )
    }
    kept = read_npz(first / "images.npz")
    assert {name: digests.dtype for name, digests in kept.items()} == {"train_digests": np.dtype("S16")}
    size, whole = ((path / "network.weights.h5").stat().st_size for path in (first, run / "model"))
    assert size < 0.65 * whole
    images = np.random.default_rng(0).integers(0, 256, (20, 48, 48), np.uint8)
    shipped, trained = load_artifact("first"), load_artifact(run)
    assert np.abs(shipped.predict(images) - trained.predict(images)).max() < 1e-2
    assert all(variable.dtype == "float32" for variable in shipped.network.weights)
    assert shipped.about.face_size == 48
    assert shipped.about.research_only is False
    assert shipped.about.shipped.largest_difference < 1e-2
    record = ArtifactRecord.require(first)
    assert record.onnx.weights == "large kernels in float16"
    assert np.abs(load_engine("first").predict(images) - shipped.predict(images)).max() < 1e-4
    assert "This copy" in (first / "MODEL_CARD.md").read_text()
    assert find_default_model().name == "first"
    accuracy = {"value": 0.5, "low": 0.2, "high": 0.8}
    (first / "metrics.json").write_text(json.dumps({"test": {"n": 9, "accuracy": accuracy}}))
    with pytest.raises(ModelError, match="exists already"):
        ship_model(run, tmp_path / "saved_models", name="first")
    monkeypatch.setattr(ship, "compute_difference", lambda first, second: 0.0)
    monkeypatch.setattr(ship, "load_artifact", lambda folder: None)
    monkeypatch.setattr(ship, "embed_onnx", lambda folder, run, **given: None)
    ship_model(run, tmp_path / "saved_models", name="second", default=True)
    rows = {row["name"]: row for row in list_model_rows()}
    assert {name: row["default"] for name, row in rows.items()} == {"first": False, "second": True}
    assert rows["first"]["test"] == CountedEstimate(**accuracy, n=9)
    assert not list((tmp_path / "saved_models").glob(".*"))


def test_a_run_is_found_whose_name_begins_as_that_of_a_shipped_model(run, tmp_path, monkeypatch):
    """Else the card of one and the weights of the other would be shipped together."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "model", tmp_path / "saved_models" / "small")
    with pytest.raises(ModelError, match="is a model without its run"):
        catalog.open_run_of_model("small")
    own = tmp_path / "saved_models" / "runs" / "small" / run.name
    shutil.copytree(run, own)
    for name in ("small", own, own / "model"):
        opened, folder = catalog.open_run_of_model(name)
        assert (opened.path.resolve(), folder.resolve()) == (own.resolve(), (own / "model").resolve())
    record = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    with pytest.raises(ModelError, match=r"this run is failed, expected a finished one"):
        catalog.open_run_of_model("small")


def test_every_file_of_every_family_is_downloaded_from_a_hub():
    named = {
        "artifact.json",
        "README.md",
        "config.yaml",
        "images.npz",
        "network.onnx",
        WEIGHTS_FILE,
        TREES_FILE,
        SCALE_FILE,
    }
    for name in named:
        for path in (name, f"members/a/{name}"):
            assert path == "members/a/images.npz" or any(fnmatch(path, pattern) for pattern in catalog.PATTERNS), path


def test_a_folder_for_the_hub_within_the_model_is_refused(run, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for place in ("saved_models/mine", "saved_models/mine/hub"):
        code, _, err = call("ship", str(run), "mine", "--hub-folder", place)
        assert code == 2
        assert "choose another one" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick(monkeypatch):
    """Ship without computing: what is under test is the repository."""
    monkeypatch.setattr(ship, "load_artifact", lambda folder: None)
    monkeypatch.setattr(ship, "embed_onnx", lambda folder, run, **given: None)
    monkeypatch.setattr(ship, "compute_difference", lambda first, second: 0.0)


class FakeApi:
    """In place of HfApi, whose protocol for uploads is too large to imitate."""

    error: Exception | None = None
    calls: ClassVar[list] = []

    def __init__(self, **given):
        pass

    def create_repo(self, repository, **given):
        self.calls.append(("create", repository, given["private"]))
        return f"https://hub.example/{repository}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}, delete_patterns))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr(FakeApi, "calls", [])
    return FakeApi


FILES = {
    "artifact.json",
    "network.weights.h5",
    "config.yaml",
    "metrics.json",
    "data.json",
    "images.npz",
    "README.md",
    ".gitattributes",
}


@pytest.mark.slow
@pytest.mark.parametrize("research_only", [False, True])
def test_a_model_is_pushed_with_its_card(run, hub, quick, call, monkeypatch, research_only):
    if research_only:
        monkeypatch.setattr("dlfer.report.card._judge_data", lambda data, title: Terms("FER2013", "Research.", True))
        monkeypatch.setattr(ship, "find_terms", lambda *given: [Terms("FER2013", "Research.", True)])
    code, out, err = call("ship", str(run), "small", "--to-hub", "org/small-faces", "--private")
    assert code == 0, err
    folder = Path("exports/small-hub")
    assert out.splitlines() == ["saved_models/small", str(folder), "https://hub.example/org/small-faces"]
    created, uploaded = hub.calls
    assert created == ("create", "org/small-faces", True)
    assert uploaded[1:3] == ("org/small-faces", FILES)
    assert "*.onnx" in uploaded[3], "files of an earlier model are removed"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "dlfer"
    assert {"dlfer", "keras", "facial-expression-recognition"} <= set(card.data.tags)
    assert 'dlfer.load("hf://org/small-faces")' in card.text
    assert ("research-only" in card.data.tags) == research_only
    assert (card.data.license, "For research only" in card.text) == (
        ("other", True) if research_only else ("unknown", False)
    )
    assert ("for research only" in err) == research_only
    # It is an artifact like any other.
    assert ArtifactRecord.require(folder).about.name == "small"


@pytest.mark.slow
def test_the_metrics_of_the_card_have_intervals_in_words(run, hub, quick, call):
    accuracy = {"value": 0.5, "low": 0.25, "high": 0.75}
    (run / "metrics.json").write_text(json.dumps({"test": {"n": 16, "accuracy": accuracy, "macro_f1": accuracy}}))
    try:
        assert call("ship", str(run), "small", "--hub-folder", "repository")[0] == 0
    finally:
        (run / "metrics.json").write_text(json.dumps({}))
    assert hub.calls == [], "a folder alone is not pushed"
    card = ModelCard.load("repository/README.md")
    assert "50.0 % (25.0 to 75.0)" in card.text
    assert "n = 16" in card.text
    [found] = [result for result in card.data.eval_results if result.metric_type == "accuracy"]
    assert (found.metric_value, "95 % 0.250 to 0.750" in found.metric_name) == (0.5, True)
    assert 'dlfer.load("this folder")' in card.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to-hub", "small"], "expected ORG/NAME"),
        (["--to-hub", "a/b/c"], "expected ORG/NAME"),
        (["--to-hub", "org/../x"], "expected ORG/NAME"),
        (["--private"], "add --to-hub"),
        (["--hub-folder", "there"], "--hub-folder there: exists already"),
        (["--to-hub", "org/small", "--hub-folder", "there/no"], None),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(run, hub, quick, call, options, words):
    Path("there").mkdir()
    code, _, err = call("ship", str(run), "small", *options)
    assert code == (0 if words is None else 2), err
    assert words is None or words in err
    assert Path("saved_models").exists() == (words is None)


def test_without_a_token_or_the_package_nothing_is_written(run, hub, quick, call, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = call("ship", str(run), "small", "--to-hub", "org/small")
    assert (code, "HF_TOKEN" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = call("ship", str(run), "small", "--to-hub", "org/small")
    assert (code, "pip install 'dlfer[hub]'" in err) == (2, True)
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_a_push_that_fails_keeps_the_folder_and_says_how_to_repeat_it(run, hub, quick, call, monkeypatch):
    monkeypatch.setattr(hub, "error", OSError("no route to host"))
    code, _, err = call("ship", str(run), "small", "--to-hub", "org/small")
    assert code == 1
    assert "no route to host" in err
    assert "hf upload org/small exports/small-hub ." in err
    assert "--private" not in err
    assert Path("exports/small-hub/README.md").is_file()


@pytest.fixture(scope="module")
def sharp(run, tmp_path_factory):
    """Return a run whose small network tells images apart, as a trained one does."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("sharp") / "runs" / "small" / run.name
    shutil.copytree(run, path, ignore=shutil.ignore_patterns("model"))
    config = ModelConfig(backbone="efficientnet_nano", feature_level=4)
    network = build_transfer_network(config, num_labels=7, image_size=32, channels=1)
    network.head.kernel.assign(network.head.kernel * 20.0)
    classifier = TransferClassifier(network, LABELS, config=config, channels=1)
    classifier.save(path / "model", about=About(experiment="small", run=path.name))
    return path


@pytest.mark.slow
def test_a_model_of_eight_bits_is_shipped_and_says_what_it_loses(sharp, tmp_path, call, monkeypatch):
    code, out, err = call("ship", str(sharp), "small8", "--weights", "int8", "--out", str(tmp_path / "saved_models"))
    assert code == 0, err
    folder = tmp_path / "saved_models" / "small8"
    assert out.strip() == str(folder)
    record = ArtifactRecord.require(folder)
    assert record.onnx.weights.startswith("int8")
    assert record.onnx.labels_agree >= 0.9
    assert "labels agree" in err
    assert "ms for a face" in err
    shipped = load_engine(folder)
    assert type(shipped).__name__ == "ArtifactModel"
    faces = ship.gather_sample(shipped, None, run=None, data=None, say=lambda text: None).images[:32]
    float32, int8 = load_engine(folder, "keras").predict(faces), shipped.predict(faces)
    assert (float32.argmax(axis=1) == int8.argmax(axis=1)).mean() >= 0.9
    assert 0 < np.abs(float32 - int8).max() <= record.onnx.largest_difference + 1e-5
    card = (folder / "MODEL_CARD.md").read_text()
    assert "computes with eight bits" in card
    kept = "The temperature and the threshold for abstaining are those of the trained model."
    assert (kept in card, kept in err, record.onnx.temperature) == (True, True, None), "data.json has no validation"
    assert INT8_FILES in card
    assert "When it was shipped it took" in card
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: None)
    code, out, err = call("show", "models", "--json")
    assert code == 0, err
    row = next(row for row in json.loads(out) if row["name"] == "small8")
    size = (folder / "network.onnx").stat().st_size
    assert (row["weights"], row["megabytes"]) == ("int8", round(size / 1e6, 1))
    assert row["milliseconds"] == round(record.about.shipped.speed.milliseconds, 2)
    assert "core" in row["measured_on"]
    assert INT8_FILES in err


def predict(model, split):
    return Predictions(split.ids, model.labels, split.targets, model.predict(split.images))


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Return a run with metrics and a temperature, and its data, where the network is right on most images."""
    (tmp_path / "a.yaml").write_text(
        "experiment: {name: small}\nmodel: {backbone: efficientnet_nano, feature_level: 4}\npretrain: null\n"
        "finetune: {image_size: 32, data: {source: synthetic_faces, num_images: {train: 40, validation: 90, test: 20}}}\n"
    )
    config = load_experiment(tmp_path / "a.yaml")
    bundle = load_data(config.finetune.data, image_size=48)
    keras.utils.set_random_seed(0)
    network = build_transfer_network(config.model, num_labels=7, image_size=32, channels=1)
    network.head.kernel.assign(network.head.kernel * 20.0)
    classifier = TransferClassifier(network, LABELS, config=config.model, channels=1)
    rng = np.random.default_rng(0)
    for name in ("validation", "test"):
        split = getattr(bundle, name)
        targets = np.where(rng.random(len(split)) < 0.7, predict(classifier, split).predicted, split.targets)
        bundle = replace(bundle, **{name: replace(split, targets=targets)})
    monkeypatch.setattr("dlfer.export.images.load_data", lambda *given, **more: bundle)
    predictions = {name: predict(classifier, getattr(bundle, name)) for name in ("validation", "test")}
    classifier.temperature_fit = describe_temperature(predictions["validation"], bundle.selected_on)
    run = create_run(tmp_path / "runs", config, argv=[])
    classifier.save(run.path / "model", about=About(experiment="small", run=run.path.name))
    describe_data(bundle, None).write(run.path)
    compute_run_metrics(config, bundle, predictions, duplicates=None, temperature=classifier.temperature_fit).write(
        run.path
    )
    run.finish()
    return run.path, bundle


def test_a_model_of_eight_bits_has_its_own_temperature_and_threshold(judged, tmp_path, call):
    run, bundle = judged
    code, _, err = call("ship", str(run), "small8", "--weights", "int8", "--out", str(tmp_path))
    assert code == 0, err
    folder = tmp_path / "small8"
    engine, record, card = load_engine(folder), ArtifactRecord.require(folder), (folder / "MODEL_CARD.md").read_text()
    expected = compute_run_metrics(
        load_experiment(run / "config.yaml"),
        bundle,
        {"validation": predict(engine, bundle.validation)},
        duplicates=None,
    )
    trained, metrics = read_metrics(run), read_metrics(folder)
    assert engine.temperature_fit == record.onnx.temperature == metrics.temperature == expected.temperature
    assert load_engine(folder, "keras").temperature_fit == record.temperature == trained.temperature
    assert metrics.abstain == expected.abstain
    assert 0 < metrics.abstain.threshold != trained.abstain.threshold
    assert metrics.temperature.value != trained.temperature.value
    assert metrics.validation == trained.validation.model_copy(update={"selective": expected.validation.selective})
    assert metrics.test == trained.test
    evaluated = evaluate_model(str(folder), data=(bundle.test.images, bundle.test.targets))
    assert (evaluated.temperature, evaluated.abstain) == (expected.temperature, expected.abstain)
    at = expected.validation.selective.at_threshold
    assert f"temperature {expected.temperature.value:.3f} was fitted on validation" in card
    assert f"at least {at.threshold:.3f}, it answers {at.coverage.value:.1%}".replace("%", " %") in card
    assert f"Its temperature ({expected.temperature.value:.3f}) and the threshold for abstaining were fitted on" in err
    assert "except for temperature and abstaining, which are the ONNX file's" in card


def test_only_the_files_of_the_model_are_shipped(run, tmp_path, quick, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / run.name
    shutil.copytree(run, own)
    for name in (".DS_Store", "artifact.json~", "notes/big.bin"):
        (own / "model" / name).parent.mkdir(exist_ok=True)
        (own / "model" / name).write_text("x")
    (own / "model" / "MODEL_CARD.md").write_text("of the run")
    code, _, err = call("ship", str(own), "small")
    assert code == 0, err
    assert "3 files not listed in artifact.json left out: .DS_Store, artifact.json~, notes/big.bin" in err
    assert {path.name for path in (tmp_path / "saved_models" / "small").rglob("*")} == {
        *FILES - {"README.md", ".gitattributes"},
        "MODEL_CARD.md",
    }


@pytest.mark.parametrize("weights", ["int4", "", "INT8"])
def test_other_weights_are_refused_before_anything_is_written(run, tmp_path, call, weights):
    code, _, err = call("ship", str(run), "small", "--weights", weights, "--out", str(tmp_path / "saved_models"))
    assert code == 2
    assert f"--weights {weights}: expected float16 or int8" in err
    assert not (tmp_path / "saved_models").exists()


def test_the_time_is_measured_on_request_alone(call):
    code, _, err = call("show", "backbones", "--time")
    assert code == 2
    assert "--time goes with models only" in err


def test_two_defaults_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "list_model_places", lambda: [tmp_path])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ArtifactRecord(
            format=1,
            family="transfer",
            labels=["a"],
            model={},
            input=InputRecord(channels=1, image_size=32),
            sha256={},
            about=About(default=True),
        ).write(tmp_path / name)
    with pytest.raises(ModelError, match=r"2 models .*\(a, b\)"):
        find_default_model()


@pytest.mark.slow
def test_a_model_that_changes_or_is_large_is_not_shipped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "load_artifact", lambda folder: None)
    monkeypatch.setattr(ship, "embed_onnx", lambda folder, run, **given: None)
    monkeypatch.setattr(ship, "compute_difference", lambda first, second: 0.0)
    monkeypatch.setattr(ship, "MAX_BYTES", 2**20)
    with pytest.raises(ModelError, match="MiB when shipped, expected at most 1 MiB"):
        ship_model(run, tmp_path, name="large")
    monkeypatch.setattr(ship, "compute_difference", lambda first, second: 0.02)
    with pytest.raises(ModelError, match=r"by 0\.020"):
        ship_model(run, tmp_path, name="other")
    for name in (
        "../out",
        ".hidden",
        "runs",
        "",
        "-x",
        "a/b",
        "a\x1b[2J",
        "two\nlines",
        "caf\udce9",
        "<b>",
        "a\u202eb",
        "a b",
    ):
        with pytest.raises(ModelError, match="not a model's name"):
            ship_model(run, tmp_path, name=name)
    assert list(tmp_path.iterdir()) == []


def test_only_large_kernels_become_float16_and_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "a.weights.h5"
    with h5py.File(path, "w") as file:
        file.attrs["a"] = "b"
        file.create_dataset("x/kernel", data=np.full((200, 100), 0.1, np.float32))
        file.create_dataset("x/small", data=np.full((20, 20), 0.1, np.float32))
        file.create_dataset("x/vector", data=np.full(30_000, 1e6, np.float32))
    shrink_weights(path)
    with h5py.File(path) as file:
        assert [file[f"x/{name}"].dtype for name in ("kernel", "small", "vector")] == ["float16", "float32", "float32"]
        assert file.attrs["a"] == "b"
    with h5py.File(path, "w") as file:
        file.create_dataset("kernel", data=np.full((200, 100), 1e5, np.float32))
    with pytest.raises(ModelError, match="65,504"):
        shrink_weights(path)


@pytest.mark.slow
def test_the_model_of_a_smoke_run_is_marked_and_never_the_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: None)
    monkeypatch.setattr(ship, "load_artifact", lambda folder: None)
    monkeypatch.setattr(ship, "embed_onnx", lambda folder, run, **given: None)
    monkeypatch.setattr(ship, "compute_difference", lambda first, second: 0.0)
    Run(run).update(smoke=True)
    try:
        with pytest.raises(ModelError, match="cannot become the default"):
            ship_model(run, tmp_path / "saved_models", name="small", default=True)
        assert not (tmp_path / "saved_models").exists()
        path = ship_model(run, tmp_path / "saved_models", name="small")
    finally:
        Run(run).update(smoke=False)
    record = ArtifactRecord.require(path)
    assert record.about.smoke
    # Nor does one become it by hand.
    record.model_copy(update={"about": record.about.model_copy(update={"default": True})}).write(path)
    with pytest.raises(ModelError, match="no default model"):
        find_default_model()
    assert {row["name"]: (row["smoke"], row["default"]) for row in list_model_rows()} == {"small": (True, False)}


ROOT = Path(__file__).resolve().parents[3]
LABELS_embedded = ("Angry", "Happy", "Sad")
NO_IMAGES = np.zeros((0, 1, 1, 1), np.uint8)


def build(backbone: str = "efficientnet_nano", channels: int = 1, seed: int = 0) -> TransferClassifier:
    """Return a classifier with random weights, whose answers differ from image to image."""
    network = build_transfer_network(
        ModelConfig(backbone=backbone), num_labels=len(LABELS_embedded), image_size=32, channels=channels
    )
    rng = np.random.default_rng(seed)
    for weight in network.model.weights:
        values = np.asarray(weight.value)
        if "moving" not in weight.path:
            weight.assign(values + 0.1 * rng.standard_normal(values.shape) * (np.abs(values).mean() + 0.1))
    fit = Temperature(value=1.7, fitted_on="validation", n=9)
    return TransferClassifier(
        network, LABELS_embedded, config=ModelConfig(backbone=backbone), channels=channels, temperature_fit=fit
    )


def halve(classifier: TransferClassifier) -> None:
    """Round the large kernels to float16, as a shipped model has them."""
    for weight in classifier.network.weights:
        if len(weight.shape) >= 2 and np.prod(weight.shape) >= ship.MIN_KERNEL:
            weight.assign(np.asarray(weight.value).astype(np.float16).astype(np.float32))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (40, 48, 48, 1), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    place = tmp_path_factory.mktemp("artifact") / "model"
    build().save(place, write_onnx=partial(write_embedded_onnx, images=images, source="random images"))
    return place


def test_it_answers_as_keras_does_and_the_artifact_says_so(folder, images):
    record = ArtifactRecord.require(folder)
    assert record.onnx.n == len(images)
    assert record.onnx.images == "random images"
    assert record.onnx.largest_difference < 1e-4
    assert record.onnx_absent is None
    assert ONNX_FILE in record.sha256
    keras, found = load_artifact(folder), load_engine(str(folder))
    assert isinstance(found, ArtifactModel)
    for calibrated in (False, True):
        expected = keras.predict(images, calibrated=calibrated)
        assert found.predict(images, calibrated=calibrated) == pytest.approx(expected, abs=1e-4)
    for key in (
        "labels",
        "channels",
        "image_size",
        "aspect",
        "crop",
        "family",
        "about",
        "temperature_fit",
        "temperature",
    ):
        assert getattr(found, key) == getattr(keras, key)


@pytest.mark.parametrize("shape", [(20, 20), (48, 31), (97, 60)])
def test_images_of_any_size_and_any_number(folder, shape):
    keras, found = load_artifact(folder), load_engine(str(folder))
    images = np.random.default_rng(2).integers(0, 256, (5, *shape, 1), np.uint8)
    expected = keras.predict(images)
    assert found.predict(images, batch_size=2) == pytest.approx(expected, abs=1e-4)
    assert found.predict(images[:1]) == pytest.approx(expected[:1], abs=1e-4)
    assert found.predict(images[:0]).shape == (0, 3)


@pytest.mark.slow
def test_the_engine_can_be_chosen(folder, images):
    keras = load_engine(str(folder), "keras")
    assert isinstance(keras, TransferClassifier)
    for engine in ("onnx", "openvino"):
        if engine == "openvino":
            pytest.importorskip("openvino")
        found = load_engine(str(folder), engine)
        assert found.predict(images) == pytest.approx(keras.predict(images), abs=1e-4)


def test_the_keras_model_is_there_on_demand(folder, images):
    found = dlfer.load(folder)
    raw = np.asarray(found.network(images))
    assert found.predict(images) == pytest.approx(raw, abs=1e-4)


def test_a_changed_file_is_refused_by_every_engine(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    contents = bytearray((copy / ONNX_FILE).read_bytes())
    contents[len(contents) // 2] ^= 1
    (copy / ONNX_FILE).write_bytes(contents)
    for engine in (None, "onnx", "keras"):
        with pytest.raises(ModelError, match=rf"{ONNX_FILE}: sha256 is"):
            load_engine(str(copy), engine)
    (copy / ONNX_FILE).unlink()
    with pytest.raises(ModelError, match=ONNX_FILE):
        load_engine(str(copy))


def test_a_model_without_the_file_is_computed_by_keras(tmp_path):
    build().save(tmp_path / "plain")
    assert isinstance(load_engine(str(tmp_path / "plain")), TransferClassifier)
    with pytest.raises(ModelError, match="no export for --engine onnx"):
        load_engine(str(tmp_path / "plain"), "onnx")


@pytest.mark.slow
def test_answers_that_differ_leave_no_file_and_a_reason(tmp_path, images, monkeypatch):
    classifier = build()
    monkeypatch.setattr(ship, "open_onnx", lambda path: lambda images: np.full((len(images), 3), 1 / 3, np.float32))
    classifier.save(tmp_path / "model", write_onnx=partial(write_embedded_onnx, images=images, source="random images"))
    record = ArtifactRecord.require(tmp_path / "model")
    assert record.onnx is None
    assert "refused" in record.onnx_absent
    assert not (tmp_path / "model" / ONNX_FILE).exists()
    assert ONNX_FILE not in record.sha256


def test_another_backend_says_why_there_is_none(tmp_path, images, monkeypatch):
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    found = write_embedded_onnx(build(), tmp_path, images=images, source="random images")
    assert "jax" in found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_ensemble_of_networks_has_one_file(tmp_path, images):
    members = {"a": build(), "b": build(seed=3)}
    ensemble = EnsembleClassifier(members, LABELS_embedded, config=ModelConfig(), combine="average")
    found = write_embedded_onnx(ensemble, tmp_path, images=images, source="random images")
    assert isinstance(found, OnnxRecord), found
    answer = open_onnx(tmp_path / ONNX_FILE)(images)
    assert answer == pytest.approx(ensemble.predict(images), abs=1e-4)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        pytest.param("efficientnet_lite0", 1, marks=pytest.mark.slow),
        pytest.param("mobilenet", 3, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 3, marks=pytest.mark.slow),
        pytest.param("resnet18", 1, marks=pytest.mark.slow),
    ],
)
def test_large_kernels_in_float16_change_nothing(tmp_path, backbone, channels):
    classifier = build(backbone, channels)
    halve(classifier)
    images = np.random.default_rng(4).integers(0, 256, (12, 40, 40, channels), np.uint8)
    sizes = {}
    for is_half in (False, True):
        found = write_embedded_onnx(classifier, tmp_path, images=images, source="random images", halve=is_half)
        assert isinstance(found, OnnxRecord), found
        assert found.largest_difference < 1e-4
        sizes[is_half] = (tmp_path / ONNX_FILE).stat().st_size
    large = sum(kernel.size for kernel in list_kernels(classifier))
    assert sizes[False] - sizes[True] > 0.9 * 2 * large


def test_a_kernel_is_known_by_its_values_and_another_is_not():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 8, 16)).astype(np.float16).astype(np.float32)
    scale = rng.uniform(0.1, 2, 16).astype(np.float32)
    values = np.transpose(kernel, (3, 2, 0, 1)) * scale[:, None, None, None]
    half, found = factor_kernel(values, kernel)
    assert half.dtype == np.float16
    assert half.astype(np.float32) * found == pytest.approx(values, rel=1e-6)
    assert factor_kernel(values + 1e-3, kernel) is None
    assert factor_kernel(values, kernel[..., :8]) is None
    dead = kernel.copy()
    dead[..., 3] = 0
    assert factor_kernel(np.transpose(dead, (3, 2, 0, 1)), dead) is not None


CODE = """
import sys
import dlfer
classifier = dlfer.load("lite2_96")
faces = dlfer.FacePredictor(classifier).predict([dlfer.read_image("docs/astronaut.jpg")])[0]
assert [face.label for face in faces] == ["Happy"], faces
from dlfer.serve.server import load_models
load_models(["lite2_96"], faces="auto", say=lambda text: None)
print([name for name in ("tensorflow", "keras", "jax", "torch", "mtcnn") if name in sys.modules])
"""


def test_prediction_and_serving_of_a_shipped_model_load_no_framework():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture(
    scope="module", params=["standard", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("l2", "none"))]
)
def boosted(request, tmp_path_factory, images) -> tuple[BoostedClassifier, Path]:
    boosting = BoostingConfig(max_depth=3, colsample=1.0, normalize=NormalizeConfig(features=request.param))
    classifier, place = make_classifier(boosting), tmp_path_factory.mktemp("boosted") / "model"
    classifier.save(place, write_onnx=partial(write_embedded_onnx, images=images, source="random images", halve=True))
    return classifier, place


@pytest.mark.slow
def test_trees_answer_with_the_features_of_the_onnx_file(boosted, images):
    classifier, place = boosted
    record = ArtifactRecord.require(place)
    assert (record.onnx.output, record.onnx.weights) == ("features", "float32")
    found = load_engine(str(place))
    assert isinstance(found, ArtifactModel)
    expected = classifier.predict(images)
    assert found.predict(images) == pytest.approx(expected, abs=0.05)
    assert np.median(np.abs(found.predict(images) - expected)) < 1e-6
    assert (found.predict(images).argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.95
    other_size = np.random.default_rng(2).integers(0, 256, (5, 50, 41, 1), np.uint8)
    assert found.predict(other_size) == pytest.approx(classifier.predict(other_size), abs=0.05)


def test_trees_are_predicted_without_a_framework(boosted):
    _, place = boosted
    code = (
        "import sys, dlfer, numpy as np\n"
        f"print(dlfer.load({str(place)!r}).predict(np.zeros((2, 40, 40, 1), np.uint8)).shape)\n"
        "print([name for name in ('tensorflow', 'keras', 'mtcnn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["(2, 3)", "[]"]


@pytest.mark.parametrize("file", ["trees.json", "features.npz", ONNX_FILE])
def test_changed_files_of_trees_are_refused(boosted, tmp_path, file):
    copy = shutil.copytree(boosted[1], tmp_path / "copy")
    contents = bytearray((copy / file).read_bytes())
    contents[len(contents) // 2] ^= 1
    (copy / file).write_bytes(contents)
    with pytest.raises(ModelError, match=rf"{file}: sha256 is"):
        load_engine(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "probabilities"}, "outputs have the shape"),
        ({"levels": None}, "features"),
        ({"levels": [{"name": "a", "features": 3}]}, "features"),
        ({"boosting": None}, "boosting"),
        ({"boosting": {"normalize": {"features": "odd"}}}, "boosting"),
    ],
)
def test_a_forged_record_of_trees_is_refused(boosted, tmp_path, change, message):
    copy = shutil.copytree(boosted[1], tmp_path / "copy")
    path = copy / ArtifactRecord.FILE
    values = json.loads(path.read_text())
    target = values["onnx"] if "output" in change else values
    target.update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        load_engine(str(copy))


@pytest.mark.slow
def test_trees_whose_labels_differ_leave_no_file(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        ship, "combine_trees", lambda *given: lambda images: np.eye(3, dtype=np.float32)[[0] * len(images)]
    )
    make_classifier().save(tmp_path / "model", write_onnx=partial(write_embedded_onnx, images=images, source="random"))
    record = ArtifactRecord.require(tmp_path / "model")
    assert record.onnx is None
    assert "99 % of the labels" in record.onnx_absent
    assert not (tmp_path / "model" / ONNX_FILE).exists()
