"""dlfer explain: from pictures to files, past what cannot be read; and the averages of a run's data."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlfer.config.load import load_experiment
from dlfer.config.sections import ModelConfig
from dlfer.data.bundle import Split
from dlfer.data.faces import Face
from dlfer.data.synthetic.faces import draw_face
from dlfer.explain import jobs
from dlfer.explain.explanation import MapOptions
from dlfer.predict.engines import load_engine
from dlfer.runs.find import default_runs_folder
from dlfer.runs.run import create_run

pytestmark = pytest.mark.usefixtures("blank_figures")

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"
LABELS = ("Angry", "Happy", "Sad")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of a small classifier with random weights."""
    from dlfer.model.families import FAMILIES
    from dlfer.model.stage_network import build_transfer_network

    config = ModelConfig(backbone="efficientnet_nano")
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["transfer"](network, LABELS, config=config, channels=1).save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Two pictures of one name, one that is none, and a video."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a/face.png", "b/face.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(rng.integers(0, 256, (48, 48)).astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize("given", ["a", "a/*"])
def test_videos_in_a_folder_are_counted_and_no_failure(call, pictures, model, given):
    (pictures / "a" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    code, _, err = call("explain", given, "--model", str(model), "--faces", "whole", "--method", "occlusion")
    assert code == 0
    assert "2 files seen, 1 used, 1 left out." in err
    assert "Left out, videos, which explain does not take: 1 (a/clip.mp4)." in err


def test_ctrl_c_leaves_the_page_of_the_faces_so_far(call, pictures, model, monkeypatch):
    def interrupt(*args):
        if args[0].source == "b/face.png":
            raise KeyboardInterrupt
        return write(*args)

    write = jobs._write_face
    monkeypatch.setattr(jobs, "_write_face", interrupt)
    code, _, err = call(
        *("explain", "a", "b", "--model", str(model), "--faces", "whole", "--method", "occlusion", "--out", "maps")
    )
    assert code == 130
    assert "interrupted" in err
    record = json.loads((pictures / "maps" / "explanations.json").read_text())
    assert [face["source"] for face in record["faces"]] == ["a/face.png"]
    assert (pictures / "maps" / "index.html").is_file()


def test_pictures_become_figures_arrays_and_a_page(call, pictures, model):
    code, out, err = call(
        *("explain", "a/face.png", "text.jpg", "b/face.png", "video.mp4", "--model", str(model), "--faces", "whole"),
        *("--size", "16", "--stride", "8", "--feature-level", "4", "--sanity", "--label", "Happy", "--out", "maps"),
    )
    assert code == 1
    assert out == "maps/index.html\n"
    assert "4 files seen, 2 used, 2 left out." in err
    assert "not read: text.jpg" in err
    assert "video.mp4: a video" in err
    folder = pictures / "maps"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("explanations.json", "face.npz", "face.png", "face_2.npz", "face_2.png", "index.html"),
    ]
    record = json.loads((folder / "explanations.json").read_text())
    assert [face["source"] for face in record["faces"]] == ["a/face.png", "b/face.png"]
    assert {face["explained"] for face in record["faces"]} == {"Happy"}
    assert record["faces"][0]["occlusion"] | {"greatest_fall": 0, "flips": 0} == {
        **{"size": 16, "stride": 8, "num_predictions": 10, "greatest_fall": 0, "flips": 0}
    }
    assert [cam["grid"] for cam in record["faces"][0]["gradcam"]] == [[2, 2]]
    assert set(record["sanity"]) == {"head", "all", "other_face"}
    with np.load(folder / "face.npz", allow_pickle=False) as arrays:
        # The size that the classifier was given: crops are no larger than its input.
        assert {name: values.shape for name, values in arrays.items()} == dict.fromkeys(
            ("occlusion", "gradcam", "flips"), (32, 32)
        )
    with Image.open(folder / "face.png") as figure:
        assert "Explained: Happy" in figure.info["Title"]
        assert "A map shows neither what a person feels" in figure.info["Title"]
        assert "too few" not in figure.info["Title"]
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png") == 2
    assert "rank correlation" in page
    assert "AI Act" in page
    assert "text.jpg" in page
    assert f"Model: {model.name} · efficientnet_nano · 32 px" in page
    # How the maps are made is said once, not below every figure.
    assert page.count("slides over the face") == page.count("the feature map of") == 1


def test_the_faces_of_one_picture_are_told_by_number(call, pictures, model, monkeypatch):
    monkeypatch.setattr(
        "dlfer.predict.crops.detect_faces_of_each",
        lambda images, detector, size: [[Face((0, 0, 30, 30), 0.9), Face((5, 5, 40, 40), 0.8)]] * len(images),
    )
    code, _, _ = call("explain", "a/face.png", "--model", str(model), "--method", "occlusion", "--out", "maps")
    assert code == 0
    titles = [Image.open(pictures / "maps" / f"face-{number}.png").info["Title"] for number in (1, 2)]
    assert [title.partition(":")[0] for title in titles] == ["face.png, face 1", "face.png, face 2"]


def test_a_photo_without_a_face_is_no_face(call, pictures, model, monkeypatch):
    monkeypatch.setattr("dlfer.predict.crops.detect_faces_of_each", lambda images, detector, size: [[] for _ in images])
    code, out, err = call("explain", "a/face.png", "--model", str(model), "--faces", "mtcnn")
    assert (code, out) == (2, "")
    assert "a/face.png: no face found" in err
    assert "--faces whole" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give either IMAGE"),
        (("a.png", "--split", "test"), "give either IMAGE"),
        (("--split", "train", "--model", "m"), "expected test or validation"),
        (("--split", "test"), "needs --model RUN"),
        (("--split", "test", "--model", "m", "--label", "Happy"), "--label goes with IMAGE"),
        (("a.png", "--method", "lime"), "expected occlusion, gradcam or both"),
        (("a.png", "--per-class", "0"), "expected 1 or more"),
        (("a.png", "--model", "nowhere"), "no such model"),
    ],
)
def test_what_does_not_go_together_is_refused(call, pictures, args, message):
    code, _, err = call("explain", *args)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_label_that_the_model_does_not_know_is_refused(call, pictures, model):
    code, _, err = call("explain", "a/face.png", "--model", str(model), "--label", "happy", "--faces", "whole")
    assert code == 2
    assert "expected one of Angry, Happy, Sad" in err


@pytest.fixture
def job(model, tmp_path, monkeypatch):
    """A job on a split of random faces in place of a run's."""
    from dlfer.explain import jobs as module
    from dlfer.explain.jobs import ExplainJob
    from dlfer.model.families import load_artifact

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 32, 32, 1)).astype(np.uint8)
    split = Split("PrivateTest", images, np.array([0, 1] * 4 + [0]), np.array([f"PrivateTest/{n}" for n in range(9)]))

    class Run:
        path = tmp_path / "run"

    monkeypatch.setattr(module, "_load_split", lambda *_: (Run(), split, load_artifact(model)))
    return ExplainJob(model="run", out=tmp_path / "out", maps=MapOptions(size=16, stride=16), per_class=3)


@pytest.mark.slow
def test_a_split_becomes_the_averages_of_each_label(job, monkeypatch):
    from dlfer.explain import jobs as module

    opened = []
    monkeypatch.setattr(module, "log_opening", lambda run, split, num_images: opened.append((split, num_images)) or 1)
    said = []
    page = module.explain_split("test", job, say=said.append)
    assert opened == [("PrivateTest", 9)]
    assert any("do not select anything" in text for text in said)
    assert sorted(path.name for path in job.out.iterdir()) == [
        *("average_Angry.png", "average_Happy.png", "averages.npz", "explanations.json", "index.html"),
    ]
    record = json.loads((job.out / "explanations.json").read_text())
    assert [(one["label"], one["n"]) for one in record["averages"]] == [("Angry", 3), ("Happy", 3)]
    with np.load(job.out / "averages.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {f"{label}/{name}" for label in LABELS[:2] for name in ("occlusion", "gradcam", "flips")}
    assert page.read_text().count("data:image/png") == 2
    # A validation split may be looked at as often as one likes.
    module.explain_split("validation", replace(job, maps=MapOptions(methods=("gradcam",))), say=said.append)
    assert opened == [("PrivateTest", 9)]
    with np.load(job.out / "averages.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"Angry/gradcam", "Happy/gradcam"}


EXPLAIN = ("--faces", "whole", "--size", "32", "--stride", "32", "--method", "occlusion")


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [("--force",), pytest.param((), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("a/face.png", "--out", "a"), "a/face.png: is the input a/face.png"),
        (("a", "--out", "a"), "a/face.png: is the input"),
        (("a/face.png", "--out", "hard"), "hard/face.png: is the input"),
        (("b/face.png", "a/face.png", "--out", "linked"), "linked/face.png: is the input"),
        (("old/face.png", "--out", "old"), "old/face.png: is the input"),
    ],
)
def test_no_picture_is_replaced_by_its_figure(call, pictures, model, args, told, force):
    (pictures / "linked").symlink_to("a")
    (pictures / "hard").mkdir()
    (pictures / "hard" / "face.png").hardlink_to(pictures / "a" / "face.png")
    assert call("explain", "a/face.png", "--model", str(model), *EXPLAIN, "--out", "old")[0] == 0
    before = snapshot(pictures)
    code, out, err = call("explain", *args, "--model", str(model), *EXPLAIN, *force)
    assert (code, out) == (2, "")
    assert told in err
    assert snapshot(pictures) == before


def test_figures_of_an_earlier_but_one_run_are_replaced(call, pictures, model):
    (pictures / "a" / "face.png").rename(pictures / "one.png")
    (pictures / "b" / "face.png").rename(pictures / "two.png")
    for name in ("one.png", "two.png", "one.png", "two.png"):
        assert call("explain", name, "--model", str(model), *EXPLAIN, "--out", "maps")[0] == 0
    record = json.loads((pictures / "maps" / "explanations.json").read_text())
    assert record["earlier"] == ["one.npz", "one.png"]
    assert sorted(path.stem for path in (pictures / "maps").glob("*.npz")) == ["one", "two"]
    (pictures / "maps" / "three.png").write_text("mine")
    (pictures / "three.png").write_bytes((pictures / "one.png").read_bytes())
    assert call("explain", "three.png", "--model", str(model), *EXPLAIN, "--out", "maps")[0] == 2


@pytest.mark.slow
def test_an_earlier_explanation_is_replaced_and_other_files_are_not(call, pictures, model):
    given = ("--model", str(model), *EXPLAIN, "--out", "maps")
    assert call("explain", "a/face.png", *given)[0] == 0
    assert call("explain", "b/face.png", *given)[0] == 0
    (pictures / "a" / "mine.png").write_bytes((pictures / "a" / "face.png").read_bytes())
    for name in ("mine.png", "mine-1.npz"):
        (pictures / "maps" / name).write_text("mine")
    code, _, err = call("explain", "a/mine.png", *given)
    assert code == 2
    assert "exists already" in err
    assert (pictures / "maps" / "mine.png").read_text() == "mine"
    assert call("explain", "a/mine.png", *given, "--force")[0] == 0
    assert (pictures / "maps" / "mine.png").read_bytes()[:4] == b"\x89PNG"
    (pictures / "page").mkdir()
    (pictures / "page" / "index.html").write_text("mine")
    assert call("explain", "a/face.png", "--model", str(model), *EXPLAIN, "--out", "page")[0] == 2
    assert (pictures / "page" / "index.html").read_text() == "mine"


HOSTILE = (
    *(b"caf\xe9.png", b"=1.png", b"a\x1b[2J.png", b"two\nlines.png", "a\u202eb.png".encode()),
    *(b"<script>alert(1)<.png", b"$\\frac{$.png", b"x" * 250 + b".png", b"x" * 250 + b"y.png"),
)


def test_an_int8_model_is_explained_by_the_file_that_predicts(call, tmp_path, monkeypatch):
    """Its Keras weights give other probabilities; they are for Grad-CAM alone, which the page and the record say."""
    model = Path(__file__).parents[3] / "saved_models" / "faces_small"
    face = draw_face("Sad", rng=np.random.default_rng(0))
    Image.fromarray(face).save(tmp_path / "face.png")
    monkeypatch.chdir(tmp_path)
    options = ("--model", str(model), *EXPLAIN[:-2], "--out")
    assert call("explain", "face.png", *options, "maps")[0] == 0
    record = json.loads(Path("maps/explanations.json").read_text())
    engine = load_engine(model)
    [expected] = engine.predict(face[None], calibrated=True)
    [keras] = engine.keras_classifier.predict(face[None], calibrated=True)
    assert np.abs(expected - keras).max() > 0.005
    assert list(record["faces"][0]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert "Grad-CAM" in record["remarks"][0]
    assert record["remarks"][0] in Path("maps/index.html").read_text()
    assert call("explain", "face.png", *options, "occlusion", "--method", "occlusion")[0] == 0
    assert json.loads(Path("occlusion/explanations.json").read_text())["remarks"] == []


def test_hostile_names_and_one_picture_that_fails_end_nothing(call, pictures, model, monkeypatch):
    contents = (pictures / "a" / "face.png").read_bytes()
    (pictures / "in").mkdir()
    for name in HOSTILE:
        with open(os.fsencode(pictures / "in") + b"/" + name, "wb") as file:
            file.write(contents)
    from dlfer.explain import jobs as module

    write = module.write_npz

    def fail_once(path, arrays):
        if "two" in path.name:
            raise OSError(28, "the disk is full", str(path))
        write(path, arrays)

    monkeypatch.setattr(module, "write_npz", fail_once)
    code, out, err = call("explain", "in", "--model", str(model), *EXPLAIN, "--out", "maps")
    assert (code, out) == (1, "maps/index.html\n")
    assert r"not explained: in/two\nlines.png" in err
    assert "\x1b" not in err
    assert "\u202e" not in err
    record = json.loads((pictures / "maps" / "explanations.json").read_text())
    assert len(record["faces"]) == len(HOSTILE) - 1
    assert r"in/caf\xe9.png" in {face["source"] for face in record["faces"]}
    names = [face["name"] for face in record["faces"]]
    assert all((pictures / "maps" / f"{name}.{end}").is_file() for name in names for end in ("png", "npz"))
    page = (pictures / "maps" / "index.html").read_bytes().decode()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert r"two\nlines.png" in page


def test_a_split_of_a_shipped_model_is_not_that_of_a_run_whose_name_begins_so(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create_run(default_runs_folder(), load_experiment(QUICKSTART, {"experiment.name": "lite2_96"}), argv=[])
    (run.path / "model").mkdir()
    (run.path / "model" / "artifact.json").write_text("{}")
    code, _, err = call("explain", "--split", "validation", "--model", "lite2_96")
    assert code == 2
    assert "lite2_96: is a model without its run" in " ".join(err.split())


def test_a_square_that_one_picture_is_too_small_for_leaves_that_one_out(call, pictures, model):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save("b/face.png")
    words = ("--model", str(model), "--faces", "whole", "--method", "occlusion", "--size", "20", "--out", "out")
    code, _, err = call("explain", "a/face.png", "b/face.png", *words)
    assert code == 1
    assert "not explained: b/face.png: occlusion: found size 20" in " ".join(err.split())
    assert [face["source"] for face in json.loads((pictures / "out/explanations.json").read_text())["faces"]] == [
        "a/face.png"
    ]
