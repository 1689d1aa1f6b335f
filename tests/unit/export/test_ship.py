"""A shipped model is small, answers as the run's, has its card, and is the one default."""

import json
import sys
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
import pytest
from huggingface_hub import ModelCard

from dlfer.cli.show import list_model_rows
from dlfer.config.load import load_experiment
from dlfer.config.sections import ModelConfig
from dlfer.errors import ModelError
from dlfer.export import ship as module
from dlfer.export.ship import ship_model, shrink_weights
from dlfer.model.artifact import load_artifact
from dlfer.model.classifier import TransferClassifier
from dlfer.model.stage_network import build_transfer_network
from dlfer.predict.engines import load_engine
from dlfer.report.card import Terms
from dlfer.runs import find as catalog
from dlfer.runs.find import find_default_model
from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.records import About, ArtifactRecord, InputRecord
from dlfer.runs.run import Run, create_run

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
    run.write_json("data.json", {"splits": {"train": {"name": "train", "n": 9, "shape": [48, 48, 1]}}})
    run.write_json("metrics.json", {})
    run.finish()
    return run.path


def test_a_run_is_shipped_and_is_the_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.config.places.find_checkout", lambda: None)
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
        )
    }
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
    monkeypatch.setattr(module, "compute_difference", lambda first, second: 0.0)
    monkeypatch.setattr(module, "load_artifact", lambda folder: None)
    monkeypatch.setattr(module, "embed_onnx", lambda folder, run: None)
    ship_model(run, tmp_path / "saved_models", name="second", default=True)
    rows = {row["name"]: row for row in list_model_rows()}
    assert {name: row["default"] for name, row in rows.items()} == {"first": False, "second": True}
    assert rows["first"]["test"] == CountedEstimate(**accuracy, n=9)
    assert not list((tmp_path / "saved_models").glob(".*"))


@pytest.fixture
def quick(monkeypatch):
    """Ship without computing: what is under test is the repository."""
    monkeypatch.setattr(module, "load_artifact", lambda folder: None)
    monkeypatch.setattr(module, "embed_onnx", lambda folder, run: None)
    monkeypatch.setattr(module, "compute_difference", lambda first, second: 0.0)


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
    "README.md",
    ".gitattributes",
}


@pytest.mark.parametrize("research_only", [False, True])
def test_a_model_is_pushed_with_its_card(run, hub, quick, call, monkeypatch, research_only):
    if research_only:
        monkeypatch.setattr("dlfer.report.card._judge_data", lambda data, title: Terms("FER2013", "Research.", True))
        monkeypatch.setattr(module, "find_terms", lambda *given: [Terms("FER2013", "Research.", True)])
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


def test_the_metrics_of_the_card_have_intervals_in_words(run, hub, quick, call):
    accuracy = {"value": 0.5, "low": 0.25, "high": 0.75}
    Run(run).write_json("metrics.json", {"test": {"n": 16, "accuracy": accuracy, "macro_f1": accuracy}})
    try:
        assert call("ship", str(run), "small", "--hub-folder", "repository")[0] == 0
    finally:
        Run(run).write_json("metrics.json", {})
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


def test_a_push_that_fails_keeps_the_folder_and_says_how_to_repeat_it(run, hub, quick, call, monkeypatch):
    monkeypatch.setattr(hub, "error", OSError("no route to host"))
    code, _, err = call("ship", str(run), "small", "--to-hub", "org/small")
    assert code == 1
    assert "no route to host" in err
    assert "hf upload org/small exports/small-hub ." in err
    assert Path("exports/small-hub/README.md").is_file()


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


def test_a_model_that_changes_or_is_large_is_not_shipped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_artifact", lambda folder: None)
    monkeypatch.setattr(module, "embed_onnx", lambda folder, run: None)
    monkeypatch.setattr(module, "compute_difference", lambda first, second: 0.0)
    monkeypatch.setattr(module, "MAX_BYTES", 2**20)
    with pytest.raises(ModelError, match="MB when shipped, expected at most 1"):
        ship_model(run, tmp_path, name="large")
    monkeypatch.setattr(module, "compute_difference", lambda first, second: 0.02)
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


def test_the_model_of_a_smoke_run_is_marked_and_never_the_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.config.places.find_checkout", lambda: None)
    monkeypatch.setattr(module, "load_artifact", lambda folder: None)
    monkeypatch.setattr(module, "embed_onnx", lambda folder, run: None)
    monkeypatch.setattr(module, "compute_difference", lambda first, second: 0.0)
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
