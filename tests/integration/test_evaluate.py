"""From a FER2013 csv to a judged model: duplicates are counted, and `evaluate` judges what it says."""

import errno
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dlfer.cli import app
from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig
from dlfer.data.synthetic.faces import load_synthetic_faces
from dlfer.errors import ModelError, UserError
from dlfer.experiment.evaluate import evaluate_model
from dlfer.experiment.extras import Extras
from dlfer.experiment.run import run_experiment
from dlfer.export.ship import ship_model
from dlfer.metrics.predictions import read_predictions
from dlfer.runs.listeners import RunOptions
from dlfer.runs.run import Run
from dlfer.runs.run_records import ExtraMetrics, read_metrics

pytestmark = pytest.mark.slow

EXPERIMENT = """
experiment: {{name: judged}}
model: {{backbone: efficientnet_nano}}
finetune:
  data: {{source: fer2013, path: {csv}}}
  epochs: 1
  batch_size: 16
  image_size: 32
evaluate: {{bootstrap: 100, num_train: 0}}
"""


@pytest.fixture(scope="module")
def faces():
    config = DataConfig.model_validate({"source": "synthetic_faces", "num_images": {"train": 150}})
    return load_synthetic_faces(config).train


@pytest.fixture(scope="module")
def work(tmp_path_factory, faces) -> Path:
    """A csv of 90 + 30 + 30 rows whose PrivateTest has one Training image, one flipped, and one of PublicTest flipped; a run on it."""
    folder = tmp_path_factory.mktemp("judged")
    images = faces.images[..., 0].copy()
    images[120], images[121] = images[5], images[6][:, ::-1]
    images[122] = images[95][:, ::-1]
    usages = ["Training"] * 90 + ["PublicTest"] * 30 + ["PrivateTest"] * 30
    with open(folder / "fer.csv", "w") as file:
        file.write("emotion,pixels,Usage\n")
        for target, image, usage in zip(np.arange(150) % 7, images, usages, strict=True):
            file.write(f"{target},{' '.join(map(str, image.ravel()))},{usage}\n")
    (folder / "judged.yaml").write_text(EXPERIMENT.format(csv=folder / "fer.csv"))
    run_experiment(folder / "judged.yaml", RunOptions(out=folder / "runs"))
    return folder


@pytest.fixture(scope="module")
def run(work) -> Path:
    return next(work.glob("runs/judged/*"))


def count_openings(run: Path) -> int:
    return sum(json.loads(line)["event"] == "test_opened" for line in (run / "log.jsonl").read_text().splitlines())


def test_the_page_of_a_run_says_when_it_finished(run):
    finished = json.loads((run / "run.json").read_text())["finished"]
    assert f"finished {finished[:16].replace('T', ' ')} UTC" in (run / "report.html").read_text()


def test_run_judges_on_private_test_and_scores_it_once_more_without_duplicates(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["selected_on"] == "PublicTest"
    assert metrics["test"]["n"] == 30
    assert metrics["duplicates"] == {
        "split": "test",
        "n": 30,
        "in_train": {"exact": 1, "augmented": 0, "any": 2},
        "in_selection": {"exact": 0, "augmented": 0, "any": 1},
        "in_pretrain": None,
        "in_either": {"exact": 1, "augmented": 0, "any": 3},
    }
    assert metrics["test_without_duplicates"]["n"] == 27
    assert metrics["validation"]["n"] == 30
    assert metrics["test_opened"] == count_openings(run) == 1
    artifact = json.loads((run / "model" / "artifact.json").read_text())
    assert artifact["temperature"] == metrics["temperature"]
    assert metrics["temperature"]["fitted_on"] == "PublicTest"


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    before, told = count_openings(run), []
    monkeypatch.setattr(Run, "log", refuse)
    monkeypatch.setattr(ExtraMetrics, "write", refuse)
    found = evaluate_model(str(run), extras=Extras(views=("mirror",)), say=told.append)
    assert found.test.n == 30
    assert "mirror" in found.views
    assert found.test_opened == count_openings(run) == before
    assert [line for line in told if "cannot be written" in line] == [
        f"{run} cannot be written (Read-only file system): this evaluation on PrivateTest is not counted there.",
        f"{run} cannot be written (Read-only file system): what was evaluated here is not kept there.",
    ]


def test_an_evaluation_ends_where_the_disk_is_full(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Run, "log", refuse)
    with pytest.raises(OSError, match="no space"):
        evaluate_model(str(run))


def test_evaluate_gives_the_figures_of_the_run_and_logs_the_opening(run, work):
    before = count_openings(run)
    of_run = json.loads((run / "metrics.json").read_text())
    found = evaluate_model(str(run), data=work / "fer.csv").as_json()
    assert found["judged_on"]["split"] == "PrivateTest"
    assert found["test"]["accuracy"] == of_run["test"]["accuracy"]
    assert found["test"]["confusion"] == of_run["test"]["confusion"]
    assert found["duplicates"] == of_run["duplicates"]
    assert found["test_without_duplicates"]["n"] == 27
    assert count_openings(run) == before + 1
    assert found["test_opened"] == before + 1
    assert json.loads((run / "metrics.json").read_text()) == of_run
    assert read_metrics(run).test_opened == before + 1
    for key in ("temperature", "abstain"):
        assert found[key] == of_run[key]
    assert found["test"]["calibration"]["scaled"] is not None
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert len(last["model"]) == 64


def test_the_predictions_of_a_model_are_written_and_compared(run, work, tmp_path):
    out = tmp_path / "p.npz"
    words = ["evaluate", str(run), "--data", str(work / "fer.csv"), "--predictions", str(out), "--against", str(run)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "classify exactly the same images correctly" in result.stdout
    found, of_run = read_predictions(out), read_predictions(run / "predictions" / "test.npz")
    assert found.ids.tolist() == of_run.ids.tolist()
    assert np.allclose(found.probabilities, of_run.probabilities, atol=1e-5)
    again = CliRunner().invoke(app, words)
    assert again.exit_code != 0
    assert "--force" in str(again.exception)


def test_usage_chooses_the_split(run, work):
    of_run = json.loads((run / "metrics.json").read_text())
    found = evaluate_model(str(run / "model"), data=work / "fer.csv", split="PublicTest").as_json()
    assert found["test"]["accuracy"] == of_run["validation"]["accuracy"]
    assert found["selected_on"] == "PublicTest"
    assert found["protocol"] == "official"
    assert found["duplicates"]["in_selection"] is None
    assert found["duplicates"]["in_train"]["any"] == 0


def test_validation_of_a_run_that_kept_its_last_epoch_calibrated_it_and_no_more(work, capsys):
    capsys.readouterr()  # of the run that every test here uses
    file = work / "last.yaml"
    file.write_text(EXPERIMENT.format(csv=work / "fer.csv").replace("name: judged", "name: last"))
    options = RunOptions(out=work / "runs", overrides={"finetune.keep": "last"})
    run = run_experiment(file, options)
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["selected_on"], metrics["is_selected"]) == ("PublicTest", False)
    assert metrics["temperature"]["fitted_on"] == "PublicTest"
    texts = [(run / name).read_text() for name in ("report.html", "model/MODEL_CARD.md")]
    for text in (*texts, "".join(capsys.readouterr())):
        for wrong in ("used for selection", "selected on PublicTest", "used to select", "which selected"):
            assert wrong not in text, wrong
    found = evaluate_model(str(run), split="validation")
    assert found.judged_on.used_for == "calibration"
    assert found.describe_selection() == "nothing (the last epoch was kept)"


def test_a_shipped_model_knows_what_selected_it_and_its_duplicates(run, work):
    """Its run need not be there: the splits' fingerprints travel with it, and the csv has its training images."""
    shipped = ship_model(run, work / "shipped", name="small")
    for csv, usage, used_for in (("fer.csv", "PublicTest", "selection"), ("fer.csv", "Training", "training")):
        found = evaluate_model(str(shipped), data=work / csv, split=usage).as_json()
        assert found["judged_on"]["used_for"] == used_for
    found = evaluate_model(str(shipped), data=work / "fer.csv").as_json()
    of_run = json.loads((run / "metrics.json").read_text())
    assert found["judged_on"]["used_for"] is None
    assert found["duplicates"] == of_run["duplicates"]
    assert found["test_without_duplicates"]["n"] == 27
    lines = (work / "fer.csv").read_text().splitlines()
    (work / "private.csv").write_text("\n".join([lines[0], *(x for x in lines if x.endswith("PrivateTest"))]) + "\n")
    other = next(x for x in lines[1:] if x.endswith("Training"))
    (work / "other.csv").write_text("\n".join([lines[0], *(x for x in lines[1:] if x != other)]) + "\n")
    assert evaluate_model(str(shipped), data=work / "other.csv").as_json()["duplicates"] is None
    alone = evaluate_model(str(shipped), data=work / "private.csv").as_json()
    assert alone["duplicates"] is None
    assert alone["test"]["accuracy"] == found["test"]["accuracy"]
    for name, damaged in (("metrics", '{"abstain": {"threshold": "high"}}'), ("data", '{"splits": []}')):
        (shipped / f"{name}.json").write_text(damaged)
        with pytest.raises(ModelError, match=rf"{name}\.json: (splits|abstain\.threshold): found"):
            evaluate_model(str(shipped), data=work / "private.csv").as_json()


def test_a_run_without_other_data_is_judged_on_its_own_test_split(run):
    of_run = json.loads((run / "metrics.json").read_text())
    assert evaluate_model(str(run)).as_json()["test"]["confusion"] == of_run["test"]["confusion"]


@pytest.fixture(scope="module")
def folders(work, faces) -> Path:
    """21 pictures in colour, in class folders of other names than the labels."""
    names = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
    for index in range(21):
        folder = work / "folders" / names[index % 7]
        folder.mkdir(parents=True, exist_ok=True)
        colour = np.repeat(faces.images[index], 3, axis=-1)
        Image.fromarray(colour).resize((60, 60)).save(folder / f"{index}.png")
    return work / "folders"


def test_class_folders_of_other_names_and_colours_are_judged_whole(run, folders):
    """Nothing is split off a folder without splits; names match by alias; colour becomes grey."""
    found = evaluate_model(str(run), data=folders).as_json()
    assert found["test"]["n"] == 21
    assert set(found["test"]["labels"]) == set(FER2013_LABELS)


def test_data_of_other_labels_is_refused(run, work, faces):
    for label in ("cat", "dog"):
        (work / "animals" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(faces.images[0, ..., 0]).save(work / "animals" / label / "0.png")
    with pytest.raises(ModelError, match="cat"):
        evaluate_model(str(run), data=work / "animals").as_json()


def test_a_split_that_the_data_does_not_have_is_refused(run, folders):
    with pytest.raises(UserError, match="expected the split validation, found train"):
        evaluate_model(str(run), data=folders, split="validation")
    with pytest.raises(UserError, match="--split tests: expected test"):
        evaluate_model(str(run), split="tests")


def test_a_zip_is_judged_as_what_it_holds(run, work, folders):
    """The pictures of the folder, and the csv of FER2013."""
    for name, files in (("folders", folders.rglob("*.png")), ("fer", [work / "fer.csv"])):
        with zipfile.ZipFile(work / f"{name}.zip", "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(work))
    for plain, packed in (("folders", "folders.zip"), ("fer.csv", "fer.zip")):
        found = [evaluate_model(str(run), data=work / name).test.confusion for name in (plain, packed)]
        assert found[0] == found[1]
