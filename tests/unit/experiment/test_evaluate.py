"""`dlfer evaluate FILE`: labels matched by name, classes that are missing or too many, duplicates, and the command."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from dlfer.cli import app
from dlfer.config.load import load_experiment
from dlfer.config.names import FER2013_LABELS
from dlfer.data.bundle import Split
from dlfer.errors import UserError
from dlfer.experiment.evaluate import (
    FileModel,
    align_labels,
    choose_columns,
    evaluate_file,
    evaluate_model,
    read_labels,
)
from dlfer.experiment.extras import Extras
from dlfer.metrics.predictions import read_predictions
from dlfer.runs.find import default_runs_folder
from dlfer.runs.run import create_run
from dlfer.runs.run_records import count_openings

FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    """40 rows of Training and 20 of PublicTest, whose first is a row of Training; the brightness of an image is its class."""
    path = tmp_path_factory.mktemp("csv") / "fer.csv"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 20, (60, 48, 48)) + 30 * (np.arange(60) % 7)[:, None, None]
    images[42] = images[0]
    lines = [
        f"{index % 7},{' '.join(map(str, image.ravel()))},{'Training' if index < 40 else 'PublicTest'}"
        for index, image in enumerate(images)
    ]
    path.write_text("\n".join(["emotion,pixels,Usage", *lines]) + "\n")
    return path


def write_model(path: Path, labels: tuple[str, ...], known: dict[str, int]) -> Path:
    """Write a network that answers the label whose brightness (30 times its number in FER2013) is nearest."""
    images = keras.Input((48, 48, 1))
    pooled = keras.layers.GlobalAveragePooling2D()(images)
    head = keras.layers.Dense(len(labels), activation="softmax")
    network = keras.Model(images, head(pooled))
    # -(x - c)^2 is, but for x^2, which all share, 2 c x - c^2.
    centres = np.array([30 * known[label] + 9.5 if label in known else -1000.0 for label in labels])
    head.set_weights([2 * centres[None] / 100, -(centres**2) / 100])
    network.save(path)
    return path


ORDER = {"anger": 0, "disgust": 1, "fear": 2, "happiness": 3, "sadness": 4, "surprise": 5, "neutral": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.h5", FERPLUS, ORDER)


def test_a_model_of_others_is_judged_under_the_names_of_the_data(model, csv):
    metrics, found = evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS), data=csv)
    assert found.labels == (*FER2013_LABELS, "contempt")
    assert metrics.test.n == 20
    assert metrics.test.accuracy.value == 1.0
    assert metrics.test.not_judged == ["contempt"]
    assert metrics.duplicates.in_train.any == 1
    assert metrics.test_without_duplicates.n == 19
    assert (metrics.judged_on.split, metrics.judged_on.used_for) == ("PublicTest", None)
    assert metrics.foreign.runtime.startswith("Keras on")
    assert len(metrics.foreign.sha256) == 64
    assert "is not known to dlfer" in metrics.banner


def test_the_order_of_the_labels_is_the_models(model, csv):
    wrong = (*FERPLUS[1:7], FERPLUS[0], FERPLUS[7])
    metrics, _ = evaluate_file(FileModel(model, "48x48 gray 0..255", wrong), data=csv)
    assert metrics.test.accuracy.value < 0.3


def test_classes_that_the_model_does_not_know_count_as_wrong_and_are_named(tmp_path, csv):
    known = {name: number for name, number in ORDER.items() if name != "disgust"}
    path = write_model(tmp_path / "six.keras", tuple(known), known)
    metrics, found = evaluate_file(FileModel(path, "48x48 gray 0..255", tuple(known)), data=csv)
    share = float((found.targets == 1).mean())
    assert metrics.test.accuracy.value == pytest.approx(1 - share)
    assert metrics.foreign.unknown == ["Disgust"]
    assert any("no output for Disgust" in line for line in metrics.foreign.describe())


def test_an_ignored_output_is_left_out_before_the_probabilities_are_divided():
    split = Split("s", np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), np.array(["a", "b"]))
    outputs = np.array([[0.2, 0.1, 0.7], [0.0, 0.0, 1.0]])
    own, labels = ("sad", "joy", "contempt"), ("Happy", "Sad")
    whole = align_labels(split, labels, own, choose_columns(own))
    assert whole.labels == ("Happy", "Sad", "contempt")
    assert whole.arrange(outputs).argmax(axis=1).tolist() == [2, 2]
    found = align_labels(split, labels, own, choose_columns(own, ("Contempt",)))
    assert found.labels == ("Happy", "Sad")
    assert np.allclose(found.arrange(outputs), [[1 / 3, 2 / 3], [0.5, 0.5]])
    assert found.unknown == ()


def test_an_output_fills_one_label_of_the_data():
    """Among other classes, data may have two names of one expression."""
    labels = ("joy", "happy", "awe", "sad")
    split = Split("s", np.zeros((4, 4, 4, 1), np.uint8), np.arange(4), np.array(list("abcd")))
    own = ("happy", "joy", "sadness")
    found = align_labels(split, labels, own, choose_columns(own))
    assert (found.columns, found.unknown) == ((1, 0, None, 2), ("awe",))
    own = ("happy", "sadness")
    found = align_labels(split, labels, own, choose_columns(own))
    assert (found.columns, found.unknown) == ((None, 0, None, 1), ("joy", "awe"))
    own = ("happiness", "sadness", "Awe")
    found = align_labels(split, labels, own, choose_columns(own))
    assert found.columns == (None, None, 2, 1, 0)
    assert choose_columns(("happy", "joy", "sad"), ["happy"]) == [1, 2]


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("labels.txt", "angry\n happy \n\nsad\n", ("angry", "happy", "sad")),
        ("LABELS.TXT", "\ufeffangry\r\nhappy\r\n", ("angry", "happy")),  # as Windows' Notepad writes it
        ("labels.json", '\ufeff["angry", "happy"]', ("angry", "happy")),
        ("labels.json", '["angry", "happy"]', ("angry", "happy")),
        ("labels.json", '{"1": "happy", "0": "angry"}', ("angry", "happy")),
        ("config.json", '{"id2label": {"0": "angry", "1": "happy"}, "hidden": 7}', ("angry", "happy")),
        (None, "angry, happy,", ("angry", "happy", "")),
    ],
)
def test_labels_are_read_from_a_list_or_a_file(tmp_path, name, contents, expected):
    if name is None:
        assert read_labels(contents) == expected
        return
    (tmp_path / name).write_text(contents, encoding="utf-8", newline="")
    assert read_labels(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("missing.txt", None, "cannot be read"),
        ("broken.json", "[", "cannot be read"),
        ("deep.json", "[" * 100_000, "cannot be read"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read"),
        ("other.json", "7", "found something else"),
        ("gap.json", '{"0": "angry", "2": "happy"}', "found something else"),
        ("numbers.json", "[1, 2]", "found something else"),
    ],
)
def test_a_file_that_lists_no_labels_is_refused_with_the_form(tmp_path, name, contents, message):
    if contents is not None:
        (tmp_path / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(UserError, match=f"{message}.*expected a .txt with one label per line"):
        read_labels(str(tmp_path / name))


def test_corruptions_views_and_groups_are_those_of_our_own_models(model, csv, tmp_path):
    groups = tmp_path / "groups.csv"
    _, found = evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS), data=csv)
    groups.write_text("id,half\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(found.ids)))
    asked = Extras(corrupt=True, views=("mirror",), headline="mirror", attributes=groups)
    metrics, _ = evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS), data=csv, extras=asked)
    # The model answers by brightness, which flips and blur keep, and which 0.1 of 255 added moves to the next class.
    assert metrics.views["mirror"]["test"].accuracy.value == 1.0
    assert metrics.headline == "mirror"
    blurred, brighter = (metrics.corruptions.corruptions[name] for name in ("blur", "brightness"))
    assert [level.accuracy.value for level in blurred] == [1.0] * 5
    assert brighter[0].accuracy.value < 0.5
    assert brighter[0].difference.value == pytest.approx(brighter[0].accuracy.value - 1)
    assert metrics.groups.attributes["half"].groups["1"].n == 10
    with pytest.raises(UserError, match="views: found turned"):
        evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS), data=csv, extras=Extras(views=("turned",)))


def test_a_temperature_gives_the_calibration_after_it_and_leaves_the_predictions_raw(model, csv):
    plain, found = evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS), data=csv)
    given, again = evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS, temperature=3.0), data=csv)
    assert plain.test.calibration.scaled is None
    assert given.temperature.value == 3.0
    assert given.test.calibration.scaled.log_loss.value != pytest.approx(given.test.calibration.raw.log_loss.value)
    assert np.array_equal(found.probabilities, again.probabilities)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"--temperature: found .*, expected a number above 0"):
            evaluate_file(FileModel(model, "48x48 gray 0..255", FERPLUS, temperature=wrong), data=csv)


@pytest.mark.parametrize(
    ("labels", "ignore", "message"),
    [
        (("happy", "Happy "), (), "found happy, Happy , expected a different name for each output"),
        (("happy", ""), (), "an empty name"),
        (("happy", "sad"), ("contempt",), "--ignore: found contempt, expected some of --labels happy,sad"),
        (("happy", "sad"), ("sad",), "found 1 that are not ignored"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(labels, ignore, message):
    with pytest.raises(UserError, match=message):
        choose_columns(labels, ignore)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "needs --input, what it takes"),
        ({"input": ""}, "needs --input, what it takes"),
        ({"output": "margins"}, "--output: found 'margins', expected one of softmax, logits, sigmoid"),
        ({"labels": tuple("abcdefgh")}, "have less than two"),
        ({"labels": FERPLUS[:7]}, r"expected one of \[N, 7\]"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(model, csv, changes, message):
    given = {"path": model, "input": "48x48 gray 0..255", "labels": FERPLUS, **changes}
    with pytest.raises(UserError, match=message):
        evaluate_file(FileModel(**given), data=csv)


def test_the_command_prints_writes_and_refuses_options_of_the_other_kind(model, csv, tmp_path):
    words = ["--input", "48x48 gray 0..255", "--labels", ",".join(FERPLUS)]
    out, kept = tmp_path / "m.json", tmp_path / "p.npz"
    asked = ["evaluate", str(model), *words, "--data", str(csv), "--json", str(out), "--predictions", str(kept)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "accuracy 100.00 %" in result.stdout
    assert "ms per image" in result.stdout
    described = json.loads(out.read_text())["foreign"]
    assert described["input"] == "48x48 gray 0..255"
    assert described["size_bytes"] == model.stat().st_size
    assert len(read_predictions(kept)) == 20
    result = CliRunner().invoke(app, ["evaluate", str(model), *words, "--data", str(csv), "--against", str(kept)])
    assert "classify exactly the same images correctly" in result.stdout, result.output
    for more, message in (
        ([str(model), *words, "--data", str(csv), "--against", str(tmp_path / "none.npz")], "none.npz"),
        ([str(model), *words, "--data", str(csv), "--against", "lite2_96"], "is a model without predictions"),
        ([str(model), *words, "--data", str(csv), "--predictions", str(tmp_path / "p.csv")], "ends in .npz"),
        (["lite2", "--labels", "a,b"], "--labels needs an external model"),
        ([str(model)], "needs --data DATA"),
    ):
        result = CliRunner().invoke(app, ["evaluate", *more])
        assert result.exit_code != 0
        assert message in str(result.exception)


def test_a_shipped_model_is_not_taken_for_the_run_whose_experiment_has_its_name(tmp_path, monkeypatch):
    experiment = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    config = load_experiment(experiment, {"experiment.name": "lite2_96"})
    run = create_run(default_runs_folder(), config, argv=[])
    images = np.random.default_rng(0).integers(0, 255, (2, 48, 48), np.uint8)
    found = evaluate_model("lite2_96", data=(images, ["Happy", "Sad"]))
    assert (found.test.n, found.test_opened) == (2, None)
    assert count_openings(run.path) == 0
    with pytest.raises(UserError, match="lite2_96 is not a run with its own data"):
        evaluate_model("lite2_96")
