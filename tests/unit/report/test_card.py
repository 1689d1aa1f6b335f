from __future__ import annotations

import json
import socket

import pytest

from dlfer.config.load import dump_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.errors import ModelError
from dlfer.report.card import find_terms, write_card
from dlfer.report.html import write_report
from dlfer.runs.metrics_record import SUBJECTS_BANNER, Metrics
from dlfer.runs.records import ArtifactRecord, WeightsOrigin

pytestmark = pytest.mark.usefixtures("blank_figures")

FER2013 = {"finetune": {"data": {"source": "fer2013", "path": "f.csv"}}}


def build_config(sections: dict) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"experiment": {"name": "faces"}, **sections})


def read_card(path):
    from huggingface_hub import ModelCard

    return ModelCard.load(path)


def check_metadata(card) -> None:
    """Assert what the hub asks of a card's metadata (hub-docs: modelcard.md)."""
    values = card.data.to_dict()
    assert values["library_name"] == "dlfer"
    assert values["pipeline_tag"] == "image-classification"
    assert values["license"] in ("other", "unknown")
    assert ("license_name" in values) == (values["license"] == "other")
    assert all(isinstance(tag, str) and tag for tag in values["tags"])
    assert len(set(values["tags"])) == len(values["tags"])
    for model in values.get("model-index", []):
        assert model["name"]
        for result in model["results"]:
            assert result["task"]["type"] == "image-classification"
            assert result["dataset"]["type"]
            assert result["dataset"]["name"]
            assert result["metrics"]
            for metric in result["metrics"]:
                assert isinstance(metric["type"], str)
                assert isinstance(metric["value"], float)


@pytest.fixture
def run(tmp_path, run_maker, model_writer):
    path = model_writer(run_maker(tmp_path / "faces" / "one"))
    (path / "config.yaml").write_text(dump_experiment(build_config(FER2013)))
    return path


def test_the_metadata_loads_and_holds_the_values_of_the_metrics(run):
    path = write_card(run)
    assert path == run / "model" / "MODEL_CARD.md"
    card, metrics = read_card(path), Metrics.require(run)
    check_metadata(card)
    assert card.data.model_name == "faces"
    whole = [result for result in card.data.eval_results if result.dataset_config == "official"]
    without = [result for result in card.data.eval_results if result.dataset_config == "official-without-duplicates"]
    for results, split in ((whole, metrics.test), (without, metrics.test_without_duplicates)):
        values = {result.metric_type: result.metric_value for result in results}
        assert values["accuracy"] == pytest.approx(split.accuracy.value, abs=1e-6)
        assert values["f1"] == pytest.approx(split.macro_f1.value, abs=1e-6)
        assert values["brier_score"] == pytest.approx(split.calibration.raw.brier.value, abs=1e-6)
        names = [result.metric_name for result in results if result.metric_type == "accuracy"]
        assert names == [f"accuracy (95 % {split.accuracy.low:.3f} to {split.accuracy.high:.3f}, n = {split.n})"]
    assert {result.dataset_name for result in whole} == {"fer2013 PrivateTest"}
    assert {result.dataset_name for result in without} == {
        "fer2013 PrivateTest, images without a duplicate in training or validation"
    }


def test_the_card_tells_use_terms_protocol_metrics_and_limits(run):
    text, metrics = write_card(run).read_text(), Metrics.require(run)
    accuracies = (metrics.test.accuracy, metrics.test_without_duplicates.accuracy)
    cells = [f"{100 * found.value:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})" for found in accuracies]
    for sentence in (
        "which of 3 expression labels annotators would give: Angry, Happy, Sad.",
        "It never detects what a person feels",
        "Art. 5(1)(f)",
        "Art. 50(3)",
        "Annex III",
        "check EUR-Lex",
        "do not redistribute",
        "Protocol `official`, selected on PublicTest",
        "6 of 60 test images (10.0 %) have a duplicate in training (4 an exact copy); 2 have one in validation",
        f"| accuracy | {cells[0]} | {cells[1]} |",
        "| metric | test, n = 60 | test without duplicates, n = 53 | validation (PublicTest, used for selection), n = 60 |",
        "The temperature",
        "Its lowest recall is that of",
        "nothing is known about differences between groups of people",
        "config digest: abc123",
        "For research only",
    ):
        assert sentence in text, sentence


def test_tables_and_headings_stand_apart(run):
    lines = write_card(run).read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#") and not lines[number - 1].startswith("```"):
            assert lines[number - 1] == "" == lines[number + 1], line
    rows = [number for number, line in enumerate(lines) if line.startswith("|")]
    assert rows == list(range(rows[0], rows[-1] + 1))
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "\n\n\n" not in "\n".join(lines)


def test_a_banner_stands_in_text_and_metadata(tmp_path, run_maker, model_writer):
    run = model_writer(run_maker(tmp_path / "run", banner="Not a clean test: 6 duplicates."))
    card = read_card(write_card(run))
    check_metadata(card)
    assert "> **Not a clean test: 6 duplicates.**" in card.text.split("##")[0]
    assert "not-a-clean-test" in card.data.tags
    whole = [result for result in card.data.eval_results if result.dataset_config == "official"]
    assert all("not a clean test" in result.dataset_name for result in whole)


def test_intervals_that_ignore_subjects_are_told_but_the_test_is_clean(tmp_path, run_maker, model_writer):
    card = read_card(write_card(model_writer(run_maker(tmp_path / "run", banner=SUBJECTS_BANNER))))
    assert f"> **{SUBJECTS_BANNER}**" in card.text.split("##")[0]
    assert "not-a-clean-test" not in card.data.tags
    assert not any("not a clean test" in result.dataset_name for result in card.data.eval_results)


def test_a_value_on_validation_is_called_so(tmp_path, run_maker, model_writer):
    run = model_writer(run_maker(tmp_path / "run", parts=("train", "validation")))
    card = read_card(write_card(run))
    check_metadata(card)
    assert {result.dataset_name for result in card.data.eval_results} == {
        "fer2013 PublicTest (validation, used for selection)",
        "fer2013 PublicTest (validation, used for selection), images without a duplicate in training",
    }
    assert "There is no test split." in card.text
    assert (
        "| validation (PublicTest, used for selection), n = 60 | validation without duplicates, n = 55 |" in card.text
    )
    assert "5 of 60 validation images (8.3 %) have a duplicate in training (3 an exact copy)." in card.text


def test_where_the_last_epoch_was_kept_validation_is_not_said_to_have_selected(tmp_path, run_maker, model_writer):
    run = model_writer(run_maker(tmp_path / "run", parts=("train", "validation"), is_selected=False))
    card = read_card(write_card(run))
    assert {result.dataset_name.split(", images")[0] for result in card.data.eval_results} == {
        "fer2013 PublicTest (validation, used for calibration)"
    }
    assert "Protocol `official`, selected on nothing (the last epoch was kept)" in card.text
    assert "validation (PublicTest, used for calibration only: the last epoch was kept), n = 60" in card.text
    for text in ("used for selection", "selected the model", "used to select"):
        assert text not in card.text
    page = write_report(run).read_text()
    assert "used for calibration only" in page
    for text in ("used for selection", "selected the model", "used to select", "selected on PublicTest"):
        assert text not in page


@pytest.mark.parametrize("absent", ["metrics.json", "data.json", "config.yaml", "run.json"])
def test_files_that_a_run_does_not_have_are_left_out(run, absent):
    (run / absent).unlink()
    card = read_card(write_card(run))
    check_metadata(card)
    assert ("the model was not evaluated" in card.text) == (absent == "metrics.json")
    assert ("does not record what the model was trained on" in card.text) == (absent == "config.yaml")
    assert bool(card.data.eval_results) == (absent != "metrics.json")


def test_metrics_of_earlier_versions_are_enough(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for part in ("test", "test_without_duplicates", "validation", "train"):
        for key in ("mcc", "calibration", "selective", "emotion_detection_rate", "balanced_accuracy"):
            del metrics[part][key]
    for key in ("schema", "temperature", "abstain", "views", "headline", "groups", "test_opened"):
        metrics.pop(key, None)
    (run / "metrics.json").write_text(json.dumps(metrics))
    card = read_card(write_card(run))
    check_metadata(card)
    assert "Not known: the run has no such metrics." in card.text
    assert "MCC" not in card.text


def test_groups_and_views_are_told(run, extras):
    Metrics.require(run).model_copy(update=extras).write(run)
    text = write_card(run).read_text()
    assert "- By age: Largest gap in accuracy between two groups" in text
    assert "The run's headline averages over the image and its horizontal flip; the values below are for single" in text


def test_the_temperature_is_used_only_where_there_is_one(tmp_path, run_maker, model_writer, run):
    assert "calibrated=True" not in write_card(run).read_text()
    other = model_writer(run_maker(tmp_path / "other"), temperature={"value": 1.2})
    assert "calibrated=True" in write_card(other).read_text()


def test_a_run_without_a_model_has_no_card(tmp_path, run_maker):
    with pytest.raises(ModelError, match=r"found no model/artifact.json"):
        write_card(run_maker(tmp_path / "run"))


def test_no_address_is_asked_and_writing_twice_gives_the_same(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert write_card(run).read_bytes() == write_card(run).read_bytes()


@pytest.mark.parametrize(
    ("config", "names", "research_only"),
    [
        (FER2013, ["FER2013 (EF-FER2)"], [True]),
        (
            {"pretrain": {"weights": "imagenet"}, "finetune": {"data": {"source": "synthetic_faces"}}},
            ["ImageNet (published weights, EF-FER1)", "synthetic_faces (EF-FER2)"],
            [True, False],
        ),
        (
            {
                "pretrain": {"data": {"source": "tfds", "name": "imagenet2012"}},
                "finetune": {"data": {"source": "arrays", "path": "mine.npz"}},
            },
            ["tfds imagenet2012 (EF-FER1)", "arrays mine.npz (EF-FER2)"],
            [True, False],
        ),
        ({"finetune": {"data": {"source": "folder", "path": "x/FER-2013/"}}}, ["folder x/FER-2013/ (EF-FER2)"], [True]),
        ({"finetune": {"data": {"source": "folder", "path": "mine"}}}, ["folder mine (EF-FER2)"], [False]),
        (
            {"pretrain": {"weights": "runs/old"}, "finetune": {"data": {"source": "folder", "path": "mine"}}},
            ["runs/old (EF-FER1)", "folder mine (EF-FER2)"],
            [False, False],
        ),
        (
            {
                "model": {"backbone": "mobilenet", "pixel_scaling": "caffe"},
                "pretrain": {"weights": "vggface2", "weights_file": "x.json"},
                "finetune": {"data": {"source": "folder", "path": "mine"}},
            },
            ["VGGFace2 (published weights, EF-FER1)", "folder mine (EF-FER2)"],
            [True, False],
        ),
        (None, [], []),
    ],
)
def test_terms(config, names, research_only):
    terms = find_terms(None if config is None else build_config(config))
    assert [term.data for term in terms] == names
    assert [term.research_only for term in terms] == research_only


@pytest.mark.parametrize("weights", ["runs/old", "vggface2"])
def test_the_origin_of_published_weights_is_told_once_and_marks_the_model_whoever_trained_from_them(run, weights):
    model = {"backbone": "mobilenet", "pixel_scaling": "caffe"}
    file = {"weights_file": "x.json"} if weights == "vggface2" else {}
    finetune = {"data": {"source": "folder", "path": "mine"}}
    config = build_config({"model": model, "pretrain": {"weights": weights, **file}, "finetune": finetune})
    (run / "config.yaml").write_text(dump_experiment(config))
    origin = WeightsOrigin(name="vggface2", source="MobileNet, VGGFace2", terms="For research.", sha256={"x.bin": "0a"})
    record = ArtifactRecord.require(run / "model")
    record.model_copy(update={"about": record.about.model_copy(update={"origins": [origin]})}).write(run / "model")
    card = read_card(write_card(run))
    assert card.data.license_name == "research-only"
    assert card.text.count("VGGFace2") == 1
    assert "For research. Files: x.bin (sha256 0a)." in card.text


def test_own_data_is_not_marked_research_only(run):
    config = build_config({"finetune": {"data": {"source": "folder", "path": "mine"}}})
    (run / "config.yaml").write_text(dump_experiment(config))
    card = read_card(write_card(run))
    check_metadata(card)
    assert card.data.license == "unknown"
    assert "For research only" not in card.text
    assert "dlfer does not know its terms" in card.text


HOSTILE = ("<script>alert(1)</script>", "a\x1b[2J\u202eb|c\nd", "$\\frac{$ [x](http://evil)")


def test_hostile_labels_are_shown_in_card_and_report_and_do_nothing(tmp_path, run_maker, model_writer, monkeypatch):
    from dlfer.report.html import write_report

    monkeypatch.setitem(run_maker.__globals__, "LABELS", HOSTILE)
    run = model_writer(run_maker(tmp_path / "faces" / "one", warnings=["a folder <img src=x> \x1b[31m"]))
    card = write_card(run).read_bytes().decode()
    body = card.split("---\n", 2)[2]
    page = write_report(run).read_bytes().decode()
    for text in (card, page):
        assert not [c for c in text if c in "\x1b\u202e"]
        assert r"\u202e" in text
        assert "<script>alert" not in text
        assert "<img src=x>" not in text
    assert r"\[x\](http" in body
    assert r"a\\x1b" in body
    assert (run / "confusion_test.png").is_file() or list(run.rglob("confusion*.png"))
