from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from dlfer.cli import main
from dlfer.config.load import load_experiment
from dlfer.config.names import FER2013_LABELS as FACE_LABELS
from dlfer.data.duplicates import hash_images, shorten_digests
from dlfer.data.sources import load_data
from dlfer.errors import DataError, MissingDataError, ModelError, UserError
from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.report.comparison import write_models_page
from dlfer.report.terminal import format_comparison
from dlfer.runs.files import write_npz
from dlfer.runs.records import About
from dlfer.runs.run import Run, create_run
from dlfer.study.compare import compare_runs

LABELS = ("Angry", "Happy", "Sad")
EXPERIMENT = "experiment: {name: NAME, seed: SEED}\nfinetune: {data: {source: synthetic_faces}, epochs: EPOCHS}\n"


def draw(quality: float, *, n: int = 300, seed: int = 0) -> Predictions:
    """Predictions of the same n images that are right with the chance `quality`."""
    generator = np.random.default_rng(seed)
    targets = np.arange(n) % 3
    right = generator.random(n) < quality
    probabilities = np.full((n, 3), 0.1)
    probabilities[np.arange(n), np.where(right, targets, (targets + 1) % 3)] = 0.8
    return Predictions([f"PrivateTest/{number}" for number in range(n)], LABELS, targets, probabilities)


def make_majority(n: int = 300) -> Predictions:
    """Predictions that always answer the first of three classes."""
    return Predictions([f"train/{i}" for i in range(n)], LABELS, np.arange(n) % 3, np.tile([0.5, 0.25, 0.25], (n, 1)))


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a finished run with predictions and metrics."""

    def make(
        name: str = "small", *, seed: int = 0, epochs: int = 2, test=None, validation=None, train=None, **facts
    ) -> Run:
        file = tmp_path / "a.yaml"
        file.write_text(EXPERIMENT.replace("NAME", name).replace("SEED", str(seed)).replace("EPOCHS", str(epochs)))
        run = create_run(tmp_path / "runs", load_experiment(file), argv=[])
        for part, predictions in (("test", test), ("validation", validation), ("train", train)):
            if predictions is not None:
                write_predictions(predictions, run.path / "predictions" / f"{part}.npz")
        known = {"protocol": "official", "banner": None, "selected_on": "PublicTest"}
        (run.path / "metrics.json").write_text(json.dumps({**known, **facts}))
        run.finish()
        return run

    return make


def names(*runs: Run) -> list[str]:
    return [str(run.path) for run in runs]


def test_runs_are_compared_on_their_test_split(make_run):
    a = make_run("good", test=draw(0.8, seed=1), validation=draw(0.9))
    b = make_run("poor", test=draw(0.6, seed=2))
    result = compare_runs(names(a, b))
    assert result.part == "test"
    assert result.n_common == 300
    assert "own images" not in format_comparison(result)
    assert [run.name for run in result.runs] == [f"good/{a.path.name}", f"poor/{b.path.name}"]
    assert [run.path for run in result.runs] == names(a, b)
    assert result.cochran_q is None
    assert result.pairs[0].is_significant
    assert result.notes == []
    assert (result.systems, result.system_pairs) == ([], [])
    json.dumps(result.as_json(), allow_nan=False)


def test_predictions_files_are_compared_too(make_run, tmp_path):
    run = make_run(test=draw(0.8))
    file = write_predictions(draw(0.7, seed=3), tmp_path / "theirs.npz")
    result = compare_runs([str(run.path), str(file)])
    assert (result.runs[1].name, result.runs[1].path) == ("theirs", str(file))


def test_of_a_file_it_is_not_told_that_validation_selected_it(make_run, tmp_path):
    run = make_run(validation=draw(0.8))
    file = write_predictions(draw(0.7, seed=3), tmp_path / "theirs.npz")
    [note] = compare_runs([str(run.path), str(file)], split="validation").notes
    assert note == (
        f"Validation (PublicTest) selected {run.path.parent.name}/{run.path.name}, so their values are optimistic. "
        "What selected the others is not known."
    )


def test_without_test_predictions_validation_is_taken_and_told(make_run):
    a, b = make_run(validation=draw(0.7), test=draw(0.8)), make_run(epochs=3, validation=draw(0.6, seed=1))
    result = compare_runs(names(a, b))
    assert result.part == "validation"
    assert result.notes == ["Validation (PublicTest) selected these models, so all values are optimistic."]
    with pytest.raises(ModelError, match="expected predictions of test, found those of validation"):
        compare_runs(names(a, b), split="test")


def test_images_that_one_lacks_are_left_out_and_told(make_run, tmp_path):
    a, b = make_run("a", test=draw(0.7)), make_run("b", test=draw(0.7).take(np.arange(40, 300)))
    result = compare_runs(names(a, b))
    assert result.n_common == 260
    assert result.notes[0] == (f"Compared on the 260 common test images; left out: 40 of 300 of a/{a.path.name}.")
    lines = format_comparison(result).splitlines()
    assert [line.split()[1:4] for line in lines[1:4]] == [
        ["n", "own", "images"],
        ["260", "300", f"{100 * result.runs[0].accuracy.value:.2f}"],
        ["260", "260", f"{100 * result.runs[1].accuracy.value:.2f}"],
    ]
    page = write_models_page(tmp_path / "a.html", result).read_text()
    assert "<th>n</th><th>own images</th><th>accuracy</th>" in page
    assert "<td>260</td><td>300</td>" in page
    assert "own images" in result._repr_html_()
    written = result.as_json()["runs"][0]
    assert (written["n"], written["num_images"], written["left_out"]) == (260, 300, 40)
    other = draw(0.7)
    stranger = make_run(
        "c", test=Predictions([f"x{i}" for i in range(300)], LABELS, other.targets, other.probabilities)
    )
    with pytest.raises(DataError, match="found no id in common"):
        compare_runs(names(a, stranger))


def test_other_protocols_and_banners_are_warned_of(make_run):
    a = make_run("a", test=draw(0.7))
    b = make_run("b", test=draw(0.9, seed=1), protocol="paper", banner="7 of 300 test images have a duplicate.")
    notes = compare_runs(names(a, b)).notes
    assert notes == [
        f"Warning: the runs differ in protocol (a/{a.path.name}: official; b/{b.path.name}: paper).",
        "Warning: only some of the runs have a banner; their metrics are not comparable.",
        f"b/{b.path.name}: 7 of 300 test images have a duplicate.",
    ]


def test_runs_of_an_earlier_version_do_not_differ_by_the_name_of_duplicates(make_run):
    a = make_run("a", test=draw(0.7), selected_on="0.1 of Training (twins kept together)", twins=None)
    b = make_run("b", test=draw(0.9, seed=1), selected_on="0.1 of Training (duplicates kept together)")
    assert not [note for note in compare_runs(names(a, b)).notes if note.startswith("Warning")]


def test_a_run_does_not_differ_from_itself(make_run):
    run = make_run(test=draw(0.7))
    result = compare_runs(names(run, run))
    assert [described.name for described in result.runs] == [
        f"small/{run.path.name}",
        f"small/{run.path.name} (2)",
    ]
    assert not result.pairs[0].is_significant
    assert "classify exactly the same images correctly" in result.notes[0]


def test_seeds_of_one_experiment_are_a_system(make_run):
    of_a = [make_run("a", seed=seed, test=draw(0.8, seed=seed)) for seed in (0, 1, 2)]
    of_b = [make_run("b", seed=seed, test=draw(0.6, seed=10 + seed)) for seed in (1, 2)]
    result = compare_runs(names(*of_a, *of_b))
    assert [system.seeds for system in result.systems] == [[0, 1, 2], [1, 2]]
    accuracies = [run.accuracy.value for run in result.runs[:3]]
    assert result.systems[0].mean == pytest.approx(np.mean(accuracies))
    assert result.systems[0].sd == pytest.approx(np.std(accuracies, ddof=1))
    assert len(result.pairs) == 10
    assert result.cochran_q.df == 4
    pair = result.system_pairs[0]
    assert pair.as_json()["unit"] == "percentage points"
    assert pair.num_seeds == 2
    assert "2 seeds, n = 300" in pair.sentence
    text = format_comparison(result)
    assert "seeds 0, 1, 2: mean " in text
    assert pair.sentence in text


def test_of_two_runs_of_one_seed_the_first_stands_for_it_and_a_note_says_so(make_run):
    runs = [make_run("a", seed=seed, test=draw(0.7, seed=row)) for row, seed in enumerate((0, 1, 0))]
    result = compare_runs(names(*runs))
    [system] = result.systems
    assert (system.seeds, system.runs) == ([0, 1], [f"a/{run.path.name}" for run in runs[:2]])
    assert result.notes[-1] == (
        f"a/{runs[2].path.name} is of the same experiment and seed as a/{runs[0].path.name}, which alone is in what is said over seeds."
    )


def test_pairs_of_three_systems_are_corrected_by_holm(make_run):
    accuracies = {"a": 0.8, "b": 0.74, "c": 0.6}
    runs = [
        make_run(name, seed=seed, test=draw(accuracy, seed=10 * number + seed))
        for number, (name, accuracy) in enumerate(accuracies.items())
        for seed in (0, 1)
    ]
    pairs = compare_runs(names(*runs)).system_pairs
    expected = multipletests([pair.p_value for pair in pairs], method="holm")[1]
    assert [pair.p_holm for pair in pairs] == pytest.approx(expected.tolist())
    assert all("by Holm over 3 pairs" in pair.sentence for pair in pairs)


def test_a_comparison_folder_names_its_members(make_run, tmp_path):
    run = make_run(test=draw(0.7))
    folder = create_run(tmp_path / "runs", run.config(), argv=[], kind="ablation")
    (folder.path / "members.csv").write_text(
        f"arm,seed,path\nx,0,/elsewhere/{run.path.name}\ny,0,/elsewhere/gone\nz,1,\n"
    )
    with pytest.raises(UserError) as caught:
        compare_runs(names(run, folder))
    assert f"compare its members: {run.path} /elsewhere/gone." in str(caught.value)


def test_what_cannot_be_compared_is_refused(make_run, tmp_path):
    run = make_run(test=draw(0.7))
    with pytest.raises(UserError, match="found 1 run, expected two"):
        compare_runs(names(run))
    with pytest.raises(UserError, match="--split train: expected test"):
        compare_runs(names(run, run), split="train")
    with pytest.raises(DataError, match="no such file"):
        compare_runs([str(run.path), str(tmp_path / "none.npz")])
    with pytest.raises(ModelError, match="neither the folder of a run"):
        compare_runs([str(run.path), "none"], folder=tmp_path / "runs")
    with pytest.raises(ModelError, match="found none; its status is finished"):
        compare_runs(names(run, make_run("empty")))


def test_the_verb_prints_the_table_and_writes_json(make_run, tmp_path, capsys):
    a, b, c = (
        make_run(name, test=draw(q, seed=i)) for i, (name, q) in enumerate([("a", 0.8), ("b", 0.78), ("c", 0.5)])
    )
    with pytest.raises(SystemExit) as done:
        main(["compare", *names(a, b, c), "--json", str(tmp_path / "o.json")])
    assert done.value.code in (0, None)
    out = capsys.readouterr().out
    assert out.startswith("test, 300 common images\nrun")
    assert "Cochran's Q: " in out
    assert "with 2 degrees of freedom" in out
    result = json.loads((tmp_path / "o.json").read_text())
    assert all(pair["sentence"] in out for pair in result["pairs"])
    assert "images would be needed for a power of 80 %" in result["pairs"][0]["sentence"]


def test_a_run_that_did_not_learn_takes_the_verdict_away(make_run):
    good, stuck = make_run("a", test=draw(0.8), train=draw(0.8)), make_run("b", test=draw(0.5), train=make_majority())
    result = compare_runs(names(good, stuck))
    (pair,) = result.pairs
    assert not pair.is_significant
    assert pair.sentence.startswith("No conclusion about a/")
    assert f"b/{stuck.path.name}: its accuracy on 300 training images is" in pair.not_learned[0]
    assert pair.sentence in format_comparison(result)


def test_the_verb_loads_no_framework(make_run):
    run = make_run(test=draw(0.7))
    code = (
        "import sys\nfrom dlfer.cli import main\n"
        f"try:\n    main(['compare', {str(run.path)!r}, {str(run.path)!r}])\n"
        "except SystemExit as end:\n    print(end.code, *sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    code, *modules = done.stderr.split()
    assert code in ("0", "None")
    assert {"tensorflow", "keras", "torch", "jax", "pandas", "sklearn", "matplotlib"}.isdisjoint(modules)


class Oracle:
    """A model that answers by the brightness of an image; it knows one label more than the data."""

    labels = ("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Contempt")
    aspect, image_size, about = "crop", 48, About()

    def predict(self, images):
        answers = np.zeros((len(images), len(self.labels)), np.float32)
        answers[np.arange(len(images)), images.mean(axis=(1, 2, 3)).astype(int) % len(self.labels)] = 1
        return answers


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A shipped model named mine, a run of drawn faces with predictions, and the images of its test split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.predict.engines.load_engine", lambda name, engine=None: Oracle())
    (tmp_path / "saved_models" / "mine").mkdir(parents=True)
    (tmp_path / "saved_models" / "mine" / "artifact.json").write_text("{}")
    data = "{source: synthetic_faces, num_images: {train: 14, validation: 14, test: 28}}"
    (tmp_path / "a.yaml").write_text(f"experiment: {{name: drawn}}\nfinetune: {{data: {data}}}\n")
    config = load_experiment(tmp_path / "a.yaml")
    bundle = load_data(config.finetune.data, image_size=config.finetune.native_size)
    run = create_run(tmp_path / "saved_models" / "runs", config, argv=[])
    right = np.eye(len(bundle.labels))[bundle.test.targets]
    own = Predictions(bundle.test.ids, bundle.labels, bundle.test.targets, right)
    write_predictions(own, run.path / "predictions" / "test.npz")
    (run.path / "metrics.json").write_text(
        json.dumps({"protocol": "official", "banner": None, "selected_on": "PublicTest"})
    )
    run.finish()
    return run, bundle.test


def test_a_run_is_compared_with_a_model_by_its_name(shipped):
    run, images = shipped
    said = []
    found = compare_runs(["drawn", "mine"], say=said.append)
    assert [one.name for one in found.runs] == [f"drawn/{run.path.name}", "mine"]
    assert (found.part, found.n_common) == ("test", len(images))
    expected = np.array([Oracle.labels.index(FACE_LABELS[target]) for target in images.targets])
    accuracy = (Oracle().predict(images.images).argmax(axis=1) == expected).mean()
    assert found.runs[1].accuracy.value == pytest.approx(accuracy)
    assert found.pairs[0].difference.value == pytest.approx(1 - accuracy)
    assert any(
        f"mine predicted the {len(images)} images of" in note and "matched by id" in note for note in found.notes
    )
    assert any("has no output for Contempt" in note for note in found.notes)
    assert f"mine: predicting {len(images)} images" in said
    assert "mine predicted" in format_comparison(found)


def test_images_that_trained_the_model_are_counted(shipped):
    _, images = shipped
    assert not any("Warning" in note for note in compare_runs(["drawn", "mine"]).notes)
    write_npz(Path("saved_models/mine/images.npz"), {"train_digests": shorten_digests(hash_images(images.images[:7]))})
    found = compare_runs(["drawn", "mine"])
    assert any(note.startswith(f"Warning: 7 of the {len(images)} images trained mine") for note in found.notes)


def test_the_order_decides_the_sign(shipped):
    forth, back = compare_runs(["drawn", "mine"]), compare_runs(["mine", "drawn"])
    assert back.pairs[0].difference.value == -forth.pairs[0].difference.value


def test_models_alone_predict_given_data(shipped, tmp_path):
    with pytest.raises(UserError, match="name a run, whose images they are, or give --data DATA"):
        compare_runs(["mine", "mine"])
    found = compare_runs(["mine", "mine"], data=tmp_path / "a.yaml", split="PublicTest")
    assert (found.part, found.n_common) == ("validation", 14)
    assert [one.name for one in found.runs] == ["mine", "mine (2)"]
    with pytest.raises(MissingDataError, match="none: there is no such file or folder"):
        compare_runs(["drawn", "mine"], data=tmp_path / "none")


def test_an_unknown_name_lists_runs_and_models(shipped):
    with pytest.raises(ModelError, match=r"The runs there: drawn/.*The models: .*mine"):
        compare_runs(["drawn", "mni"])


@pytest.mark.parametrize("name", ["drawn", "dra", "mine"])
def test_a_run_or_model_after_json_is_not_taken_for_the_file(shipped, capsys, name):
    with pytest.raises(SystemExit) as done:
        main(["compare", "--json", name, "drawn", "mine"])
    assert done.value.code == 2
    assert f"--json {name}: found a run or model; expected a file to write" in capsys.readouterr().err
    assert not Path(name).is_file()


def test_a_comparison_is_written_as_a_page_and_printed_as_json(shipped, capsys):
    for words in (["--html", "c.html"], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main(["compare", "drawn", "mine", *words])
        assert done.value.code == 0
    assert "mine predicted" in Path("c.html").read_text()
    out = capsys.readouterr().out
    written = json.loads(out[out.index('{\n  "schema"') :])
    assert (written["n_common"], written["pairs"][0]["unit"]) == (28, "fraction")
