from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dlfer.cli.show import describe_run
from dlfer.errors import ConfigError, DataError, ModelError
from dlfer.report.card import write_card
from dlfer.report.html import _describe_confusion, write_report
from dlfer.report.judgement import describe_abstention, describe_calibration, list_views
from dlfer.report.pictures import write_augmented_page
from dlfer.report.sections import PUBLISHED
from dlfer.report.terminal import format_estimate, format_metrics
from dlfer.runs.metrics_record import (
    EnsembleGrowth,
    EnsembleMetrics,
    Estimate,
    FinalLabel,
    FinalLabels,
    JudgedOn,
    MemberMetrics,
    Metrics,
    SplitSummary,
)
from dlfer.runs.records import DataRecord, DuplicateCounts, DuplicatesRecord, Temperature

pytestmark = pytest.mark.usefixtures("blank_figures")


class Page(HTMLParser):
    """The text, images and addresses of a page; raises where a tag is not closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words, self.images, self.addresses, self.open = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            self.images.append(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def format_ends(estimate, digits: int = 1) -> list[str]:
    return [f"{100 * end:.{digits}f}" for end in (estimate.value, estimate.low, estimate.high)]


def read_page(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_headline_has_n_interval_protocol_and_what_selected(tmp_path, run_maker):
    run = run_maker(tmp_path / "faces" / "20260102T030405Z-abc")
    page = read_page(write_report(run))
    metrics = Metrics.require(run)
    accuracy = metrics.test.accuracy
    assert "Accuracy, test (PrivateTest)" in page.text
    assert f"{100 * accuracy.value:.1f} %" in page.text
    assert f"95 % interval {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %, n = 60" in page.text
    assert "protocol official" in page.text
    assert "selected on PublicTest" in page.text
    assert "test opened once" in page.text
    assert "expected 10.0 % to 90.0 %: within" in page.text
    value, low, high = format_ends(metrics.test_without_duplicates.accuracy)
    assert f"without duplicates {value} % (95 % {low} to {high}, n = 53)" in page.text


def test_every_section_is_there(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    page = read_page(write_report(run))
    for text in (
        "faces",
        "6 of 60 test images (10.0 %) have a duplicate in training (4 an exact copy); 2 have one in validation, which "
        "selected the model, and 7 in either.",
        "EF-FER1 3 min 20 s 40,000 200 64 px taken from the cache",
        "EF-FER2 1 min 40 s 5,000 50 48 px",
        "2 loaded, 1 newly initialised, 0 missing, 0 unexpected",
        "2.5e-07",
        "3 rows were skipped & counted.",
        "180 images (Training 60, PublicTest 60, PrivateTest 60) with 3 labels.",
        "6 of 60 images of PrivateTest (10.0 %) have a duplicate in Training (4 an exact copy).",
        "Distinct images: 170; of these, 8 occur more than once, 2 under different labels.",
        "dlfer run 'experiments/my file.yaml' --set model.dropout=0.1",
        "0123abcd with uncommitted changes",
        "dlfer 0.1.0, Python 3.11.9, keras 3.15.0",
        "macro average",
        "weighted average",
    ):
        assert text in page.text, text
    assert len(page.images) == 6
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)


def test_the_page_loads_nothing_from_elsewhere(tmp_path, run_maker):
    source = write_report(run_maker(tmp_path / "run")).read_text()
    assert all(address.startswith(("data:", "#")) for address in Page(source).addresses)
    assert "url(" not in source
    assert "@import" not in source
    assert "<script" not in source


def change_metrics(run, **changes):
    Metrics.require(run).model_copy(update=changes).write(run)
    return run


def test_the_metrics_of_the_page_are_those_of_the_record(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    page, test = read_page(write_report(run)), Metrics.require(run).test
    raw = test.calibration.raw
    for name, estimate, remark in (
        ("accuracy", test.accuracy, ""),
        ("balanced accuracy", test.balanced_accuracy, "the mean recall of the classes "),
        ("macro F1", test.macro_f1, ""),
        ("ECE", raw.ece_equal_mass, "lower is better "),
        ("one-vs-rest accuracy", test.one_vs_rest_accuracy, "not the accuracy, see below "),
    ):
        value, low, high = format_ends(estimate)
        assert f"{name} {remark}{value} % {low} to {high}" in page.text, name
    for name, estimate, remark in (
        ("MCC", test.mcc, "0 is chance "),
        ("Cohen's kappa", test.cohen_kappa, "0 is chance "),
        ("macro AUC", test.macro_auc, "0.5 is chance "),
        ("macro average precision", test.macro_average_precision, ""),
        ("log-loss", test.log_loss, "lower is better "),
        ("Brier score", raw.brier, "0 to 2, lower is better "),
    ):
        assert f"{name} {remark}{estimate.value:.3f} {estimate.low:.3f} to {estimate.high:.3f}" in page.text, name
    detected = test.emotion_detection_rate.num_detected
    assert f"classes mostly predicted as themselves {100 * detected / 3:.1f} % {detected} of 3" in page.text
    assert "It is not the accuracy: with 3 classes an accuracy of 70 % gives 80.0 % when counted so." in page.text


def test_calibration_and_abstaining_are_told_in_numbers(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    page, metrics = read_page(write_report(run)), Metrics.require(run)
    temperature, at = metrics.temperature.value, metrics.test.selective.at_threshold
    assert f"The temperature {temperature:.3f} was fitted on validation (PublicTest, n = 60)" in page.text
    assert f"at least {at.threshold:.3f}, it answers {100 * at.coverage.value:.1f} % of the images" in page.text
    assert f"{100 * at.accuracy.value:.1f} % of these answers are right" in page.text
    scaled = metrics.test.calibration.scaled.log_loss
    assert f"{scaled.value:.3f} {scaled.low:.3f} to {scaled.high:.3f}" in page.text


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("paper, split: after_balance", "protocol paper (after_balance)"),
        ("resplit, select_on: 0.1", "protocol resplit, validation is 10 % of training"),
    ],
)
def test_what_was_asked_is_told_from_the_config(tmp_path, run_maker, protocol, words):
    run = run_maker(tmp_path / "run")
    config = """
experiment: {name: faces}
model: {backbone: efficientnet_b0, dropout: 0.3}
pretrain: {weights: imagenet}
finetune:
  data: {source: fer2013, path: f.csv, protocol: PROTOCOL, fraction: 0.25}
  epochs: 6
  image_size: 64
  optimizer: {name: adamw, learning_rate: 0.001}
  schedule: {name: cosine}
  balance: augment
  augment: {rotation: 12.0, mirror: 0.5, zoom: 0.0, fill: nearest}
  keep: best
  monitor: accuracy
expected: {result: about 65 %, test_accuracy: null}
"""
    (run / "config.yaml").write_text(config.replace("PROTOCOL", protocol))
    text = read_page(write_report(run)).text
    assert "which of 3 labels would annotators give: Angry, Happy, Sad?" in text
    assert f"fer2013, f.csv, {words}, 25 % of the images" in text
    assert "efficientnet_b0, dropout 0.3" in text
    assert "not trained here: weights imagenet" in text
    assert (
        "6 epochs, 64 px, batches of 64, adamw at 0.001 (cosine), categorical crossentropy, classes balanced by augment, "
        "best epoch kept by accuracy on validation" in text
    )
    assert "rotation 12, mirror 0.5" in text
    assert "expected result about 65 %" in text


def test_a_config_that_cannot_be_read_is_said_and_shown(tmp_path, run_maker, model_writer):
    run = run_maker(tmp_path / "run")
    (run / "config.yaml").write_text("experiment: {name: faces}\nof_another_version: 3\n")
    text = read_page(write_report(run)).text
    assert "The experiment is not shown, because config.yaml cannot be read." in text
    assert "of_another_version: 3" in text
    assert "Accuracy, test (PrivateTest)" in text
    with pytest.raises(ConfigError, match="of_another_version"):
        write_card(model_writer(run))


def test_views_groups_and_corruptions_have_their_tables(tmp_path, run_maker, extras):
    run = change_metrics(run_maker(tmp_path / "run"), **extras)
    page, metrics = read_page(write_report(run)), Metrics.require(run)
    mirror, single = metrics.views["mirror"]["test"], metrics.test
    assert "Accuracy, test (PrivateTest), averaged over the image and its horizontal flip" in page.text
    assert f"{100 * mirror.accuracy.value:.1f} % 95 % interval" in page.text
    assert f"of single images {100 * single.accuracy.value:.1f} %; so are all values below" in page.text
    assert mirror.paired.sentence in page.text
    young = metrics.groups.attributes["age"].groups["young"]
    assert f"young 25 {100 * young.accuracy.value:.1f} %" in page.text
    assert "10 images have no value for it." in page.text
    assert "Largest gap in accuracy between two groups" in page.text
    assert "nothing is known about differences" not in page.text
    assert "noise standard deviation 50.0 % 45.0 to 55.0 at 2 40.0 % 35.0 to 45.0 at 4 30.0 %" in page.text
    assert "low resolution 50.0 % 45.0 to 55.0 at 2 40.0 % 35.0 to 45.0 at 4 –" in page.text
    assert any("low resolution 40.0 %" in image["alt"] for image in page.images)


def test_views_are_not_the_headline_unless_asked(tmp_path, run_maker, extras):
    run = change_metrics(run_maker(tmp_path / "run"), views=extras["views"])
    page, accuracy = read_page(write_report(run)), Metrics.require(run).test.accuracy.value
    assert "averaged over the" not in page.text.split("95 % interval")[0]
    assert f"Accuracy, test (PrivateTest) {100 * accuracy:.1f} % 95 % interval" in page.text
    assert "the headline, as set in the experiment" not in page.text
    assert "the image and its horizontal flip" in page.text


def test_without_attributes_the_page_says_that_no_claim_is_made(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    assert (
        "skin tone exist for FER2013, so nothing is known about differences between groups of people"
        in read_page(write_report(run)).text
    )
    DataRecord.require(run).model_copy(update={"source": "folder"}).write(run)
    assert (
        "skin tone were given, so nothing is known about differences between groups of people"
        in read_page(write_report(run)).text
    )


NEW_IN_PARTS = (
    "balanced_accuracy",
    "mcc",
    "cohen_kappa",
    "macro_average_precision",
    "one_vs_rest_accuracy",
    "emotion_detection_rate",
    "calibration",
    "selective",
)
NEW_AT_THE_TOP = ("temperature", "abstain", "views", "headline", "groups", "corruptions", "test_opened")


@pytest.mark.parametrize(
    "absent", ["all", *(pytest.param(key, marks=pytest.mark.slow) for key in (*NEW_IN_PARTS, *NEW_AT_THE_TOP))]
)
def test_metrics_of_earlier_versions_are_reported(tmp_path, run_maker, extras, absent):
    run = change_metrics(run_maker(tmp_path / "run"), **extras)
    metrics = json.loads((run / "metrics.json").read_text())
    for key in NEW_AT_THE_TOP:
        if absent in (key, "all"):
            metrics.pop(key, None)
    for part in ("test", "test_without_duplicates", "validation", "train"):
        for key in NEW_IN_PARTS:
            if absent in (key, "all"):
                del metrics[part][key]
        for scores in metrics[part]["per_class"].values():
            if absent in ("macro_average_precision", "all"):
                del scores["average_precision"], scores["intervals"]["average_precision"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = read_page(write_report(run))
    assert f"n = {metrics['test']['n']}" in page.text
    assert "None" not in page.text
    targets = [address for address in page.addresses if address.startswith("#")]
    assert all(f'id="{target[1:]}"' in (run / "report.html").read_text() for target in targets)
    assert ("Calibration, test" in page.text) == (absent not in ("calibration", "all"))
    assert ("Abstaining, test" in page.text) == (absent not in ("selective", "all"))


@pytest.mark.slow
def test_metrics_and_audit_with_the_keys_of_an_earlier_version_are_reported(tmp_path, run_maker, model_writer):
    run = model_writer(run_maker(tmp_path / "run"))
    metrics, audit = (json.loads((run / name).read_text()) for name in ("metrics.json", "audit.json"))
    transfer = {"carried": ["a", "b", "c"], "fresh": ["d"], "missing": [], "unexpected": []}
    (run / "transfer.json").write_text(json.dumps(transfer))
    del metrics["schema"], audit["schema"]
    metrics["test_without_twins"] = metrics.pop("test_without_duplicates")
    metrics["twins"] = {"exact": 4, "near_or_mirrored": 6}
    del metrics["duplicates"], metrics["validation_without_duplicates"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "audit.json").write_text(
        json.dumps(audit | {"leaks": {"Training->PrivateTest": {"exact": 4, "near_or_mirrored": 6}}})
    )
    page, card = read_page(write_report(run)).text, write_card(run).read_text()
    for text in (page, card):
        assert "6 of 60 test images (10.0 %) have a duplicate in training (4 an exact copy)." in text
        assert "have one in validation" not in text
    assert "6 of 60 images of PrivateTest (10.0 %) have a duplicate in Training (4 an exact copy)." in page
    assert "3 loaded, 1 newly initialised, 0 missing, 0 unexpected" in page
    without = metrics["test_without_twins"]["accuracy"]
    assert f"without duplicates {100 * without['value']:.1f} % (95 % {100 * without['low']:.1f} to" in page
    assert "test without duplicates, n = 53" in card
    shown = describe_run(str(run), tmp_path)
    assert shown["test_without_duplicates_accuracy"].n == 53


def test_validation_that_judges_has_a_value_without_duplicates_with_its_interval(tmp_path, run_maker):
    run = run_maker(tmp_path / "run", parts=("train", "validation"))
    page, metrics = read_page(write_report(run)).text, Metrics.require(run)
    without = metrics.validation_without_duplicates.accuracy
    value, low, high = format_ends(without)
    assert f"without duplicates {value} % (95 % {low} to {high}, n = 55)" in page
    assert '"Without duplicates" leaves out those with one in training.' in page
    value, low, high = format_ends(without, digits=2)
    assert f"validation without duplicates (n = 55): accuracy {value} % [{low}, {high}]" in format_metrics(metrics)


def test_without_any_duplicate_there_is_no_second_headline(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    metrics = Metrics.require(run)
    none = DuplicateCounts(exact=0, augmented=0, any=0)
    metrics.duplicates = DuplicatesRecord(split="test", n=60, in_train=none, in_selection=none, in_either=none)
    metrics.test_without_duplicates = metrics.test
    metrics.write(run)
    page = read_page(write_report(run)).text
    assert "0 of 60 test images (0.0 %) have a duplicate in training;" in page
    assert not re.search(r"without duplicates \d", page)


def test_images_that_selected_the_model_are_not_called_test_images(tmp_path, run_maker, extras):
    """`dlfer evaluate` keeps what it judged under "test", whatever the model used it for."""
    used = JudgedOn(split="PublicTest", file="a.csv", used_for="selection")
    run = change_metrics(run_maker(tmp_path / "run"), judged_on=used, **extras)
    metrics = Metrics.require(run)
    assert "test" not in {row.split for row in list_views(metrics)}
    assert any("so the values with temperature are optimistic" in line for line in describe_calibration(metrics).notes)
    assert any("so the value is optimistic" in line for line in describe_abstention(metrics))
    given = Temperature(value=1.5, fitted_on="not known", note="given by --temperature")
    metrics = metrics.model_copy(update={"temperature": given, "abstain": None, "validation": None})
    assert "The temperature is 1.500; given by --temperature." in describe_calibration(metrics).notes
    assert "No threshold was chosen, because there were no validation predictions." in describe_abstention(metrics)


def test_a_confusion_matrix_without_errors_is_described_so():
    recall = {name: SimpleNamespace(recall=1.0) for name in "ab"}
    right = SimpleNamespace(confusion=[[3, 0], [0, 2]], labels=["a", "b"], per_class=recall)
    assert _describe_confusion(right, "test").endswith("No image was predicted wrongly.")


def test_unreached_thresholds_and_unfitted_temperatures_are_said(tmp_path, run_maker):
    run = change_metrics(run_maker(tmp_path / "run"), temperature=None, abstain=None)
    metrics = Metrics.require(run)
    metrics.test.calibration.scaled = metrics.test.selective.at_threshold = None
    metrics.write(run)
    text = read_page(write_report(run)).text
    assert "No temperature was fitted" in text
    assert "No threshold was chosen" in text
    assert "after the temperature" not in text


@pytest.mark.usefixtures("drawn_figures")
def test_every_figure_has_a_text_alternative_and_the_banner(tmp_path, run_maker, extras):
    run = change_metrics(run_maker(tmp_path / "run", banner="Not a clean test – 6 duplicates."), **extras)
    augmented = np.zeros((2, 8, 8, 1), np.uint8)
    write_augmented_page(run / "figures", augmented, ["Happy", "Sad"])
    page = read_page(write_report(run))
    drawn = sorted(path.stem for path in (run / "figures").glob("*.png"))
    assert len(drawn) == len(page.images) == 8
    assert all(len(image["alt"]) > 40 for image in page.images)
    for name in drawn:
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert image.text["Banner"] == "Not a clean test – 6 duplicates.", name
    assert "Not a clean test – 6 duplicates." in page.text.split("Accuracy, test")[0]


def test_the_comparison_that_a_run_belongs_to_is_linked(tmp_path, run_maker):
    run = run_maker(tmp_path / "faces" / "one")
    for name, member in (("two-ablation", run), ("three-sweep", tmp_path / "faces" / "another")):
        (tmp_path / "faces" / name).mkdir()
        (tmp_path / "faces" / name / "members.csv").write_text(f"arm,seed,path\nwith,0,{member}\nwith,1,\n")
    page = read_page(write_report(run))
    assert [address for address in page.addresses if address.startswith("..")] == ["../two-ablation/report.html"]


@pytest.mark.slow
def test_a_digest_in_a_note_does_not_make_a_phone_scroll_the_page(tmp_path, run_maker, list_scrolled):
    run = run_maker(tmp_path / "run", warnings=["a" * 64])
    data = DataRecord.read(run)
    data.model_copy(update={"notes": ["the teacher network.onnx, sha256 " + "b" * 64]}).write(run)
    assert "html" not in list_scrolled(write_report(run))


def test_without_a_test_split_every_heading_says_validation(tmp_path, run_maker):
    page = read_page(write_report(run_maker(tmp_path / "run", parts=("train", "validation"))))
    assert "Accuracy, validation (PublicTest, used for selection)" in page.text
    assert "Each class, validation (PublicTest, used for selection)" in page.text
    assert "none: the run has no test split" in page.text
    assert "test opened" not in page.text
    assert "within" not in page.text


def test_banner_and_warnings_stand_in_a_box_and_are_escaped(tmp_path, run_maker):
    run = run_maker(
        tmp_path / "run", banner="No clean test: <b>6 duplicates</b>", warnings=["Faces stand in for fer2013."]
    )
    source = write_report(run).read_text()
    box = source.split('<div class="banner"')[1].split("</div>")[0]
    assert "No clean test: &lt;b&gt;6 duplicates&lt;/b&gt;" in box
    assert "Faces stand in for fer2013." in box
    assert '<div class="banner"' not in write_report(run_maker(tmp_path / "other")).read_text()


@pytest.mark.parametrize(
    "absent",
    [
        ["pretrain", "transfer.json"],
        ["audit.json", "data.json", "log.jsonl", "config.yaml"],
        ["metrics.json", "predictions"],
        [
            "finetune",
            "pretrain",
            "transfer.json",
            "audit.json",
            "data.json",
            "metrics.json",
            "predictions",
            "log.jsonl",
        ],
    ],
)
def test_files_that_a_run_does_not_have_are_left_out(tmp_path, run_maker, absent):
    run = run_maker(tmp_path / "run")
    for name in absent:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    page = read_page(write_report(run))
    assert "How to reproduce it" in page.text
    assert ("This run has no metrics yet" in page.text) == ("metrics.json" in absent)


def test_a_failed_run_shows_its_error(tmp_path, run_maker):
    run = run_maker(tmp_path / "run", status="failed", error="NonFiniteError: loss is NaN at step 12 <x>")
    (run / "metrics.json").unlink()
    page = read_page(write_report(run))
    assert "it is failed" in page.text
    assert "NonFiniteError: loss is NaN at step 12 <x>" in page.text


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path, run_maker):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run = run_maker(tmp_path / "run", status="running", host=socket.gethostname(), pid=process.pid)
    (run / "metrics.json").unlink()
    page = read_page(write_report(run))
    assert "This run has no metrics yet: it is interrupted." in page.text
    assert "running" not in page.text.split("This run has no metrics")[0]


@pytest.mark.parametrize("contents", [b"junk", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_a_damaged_figure_is_named(tmp_path, run_maker, contents):
    run = run_maker(tmp_path / "run")
    (run / "figures").mkdir(exist_ok=True)
    (run / "figures" / "errors.png").write_bytes(contents)
    with pytest.raises(ModelError, match=r"errors\.png: this figure cannot be read; delete it"):
        write_report(run)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_figures")
def test_writing_twice_gives_the_same_page(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_metrics_of_undefined_classes_are_dashes(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    metrics = Metrics.require(run)
    angry = metrics.test.per_class["Angry"]
    angry.precision = angry.recall = angry.f1 = angry.auc = None
    angry.intervals |= {name: [None, None] for name in ("precision", "recall", "f1", "auc")}
    metrics.test.macro_auc = Estimate(value=None, low=None, high=None)
    metrics.write(run)
    source = write_report(run).read_text()
    row = source.split('<th scope="row">Angry</th>')[1].split("</tr>")[0]
    assert row.count("–") == 4
    assert '<th scope="row">macro AUC' in source
    assert "None" not in html.unescape(Page(source).text)


def withhold(metrics: Metrics) -> str:
    """Take the intervals of several metrics away, as `compute_scores` does where none covers; return the reason."""
    test, reason = metrics.test, "too few images for any"
    raw = test.calibration.raw
    for estimate in (
        test.mcc,
        test.macro_f1,
        test.log_loss,
        test.macro_average_precision,
        test.selective.aurc,
        raw.ece_equal_mass,
        raw.brier,
    ):
        estimate.low, estimate.high, estimate.reason = None, None, reason
    sad = test.per_class["Sad"]
    sad.intervals["precision"], sad.reasons = [None, None], {"precision": reason}
    return reason


def test_values_without_an_interval_are_shown_with_the_reason(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    metrics = Metrics.require(run)
    reason = withhold(metrics)
    metrics.write(run)
    text = html.unescape(read_page(write_report(run)).text)
    assert f"Sad, precision: no 95 % interval, because {reason}." in text
    assert f"{metrics.test.mcc.value:.3f} no 95 % interval: {reason}" in text
    aurc = metrics.test.selective.aurc.value
    assert f"Area under the risk-coverage curve: {aurc:.3f} (no 95 % interval: {reason}; lower is better)." in text
    assert "None" not in text
    assert "nan" not in text.lower().replace("finance", "").split()


def test_the_terminal_shows_values_without_an_interval_with_the_reason(tmp_path, run_maker):
    metrics = Metrics.require(run_maker(tmp_path / "run"))
    reason = withhold(metrics)
    text = format_metrics(metrics)
    assert f"macro F1 {100 * metrics.test.macro_f1.value:.2f} % [–]" in text
    assert f"[–] Sad, precision: no 95 % interval, because {reason}" in text
    assert "None" not in text


def test_the_terminal_shows_views_groups_and_corruptions(tmp_path, run_maker, extras):
    metrics = Metrics.require(change_metrics(run_maker(tmp_path / "run"), **extras))
    text = format_metrics(metrics)
    assert (
        f"test by mirror, the headline (n = 60): accuracy {format_estimate(metrics.views['mirror']['test'].accuracy)}"
        in text
    )
    assert "groups by age (10 images without)" in text
    assert "low resolution  50.0 [45.0, 55.0]  40.0 [35.0, 45.0]  -\n" in f"{text}\n"


def test_what_is_no_run_or_damaged_is_told(tmp_path, run_maker):
    with pytest.raises(ModelError, match=r"found no run.json"):
        write_report(tmp_path)
    run = run_maker(tmp_path / "run")
    (run / "data.json").write_text("{")
    with pytest.raises(ModelError, match=r"data.json: not JSON"):
        write_report(run)
    run = run_maker(tmp_path / "other")
    (run / "predictions" / "test.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"test.npz: not a predictions file"):
        write_report(run)


def test_evaluate_and_report_load_no_heavy_package():
    code = (
        "import sys, dlfer.report.html, dlfer.report.comparison, dlfer.metrics.scores, dlfer.metrics.paired;"
        "heavy = {'tensorflow', 'keras', 'matplotlib', 'scipy', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_published_values_stand_beside_those_of_a_run_on_fer2013(run_maker, tmp_path):
    run = run_maker(tmp_path / "run")
    page = write_report(run).read_text()
    assert page.count("protocol not checked") == len(PUBLISHED)
    for words in ("82.1 %", "66.2 %", "ResEmoteNet", "ResMaskNet", "EmoNeXt", "VGGNet", "this run: faces"):
        assert words in page
    (run / "config.yaml").write_text("experiment: {name: faces}\nfinetune: {data: {source: synthetic_faces}}\n")
    assert "protocol not checked" not in write_report(run).read_text()


def test_an_ensemble_shows_its_growth_and_final_labels(run_maker, tmp_path):
    run = run_maker(tmp_path / "run")
    metrics = Metrics.require(run)
    summary = SplitSummary(n=60, accuracy=metrics.test.accuracy, macro_f1=metrics.test.macro_f1)
    members = [MemberMetrics(name=name, validation=summary, test=summary) for name in ("one", "two")]
    ensemble = EnsembleMetrics(
        combine="average",
        view="single",
        growth=[EnsembleGrowth(added=name, validation=summary, test=summary) for name in ("two", "one")],
        final_labels=[
            FinalLabels(name="one", labels={"Angry": FinalLabel(label="Sad", share=0.55, n=20)}),
            FinalLabels(name="ensemble", labels={"Angry": FinalLabel(label="Angry", share=0.6, n=20)}),
        ],
    )
    metrics.model_copy(update={"members": members, "ensemble": ensemble}).write(run)
    page = write_report(run).read_text()
    assert "Final emotion" in page
    assert "0 of 1" in page
    assert "1 of 1" in page
    assert "55 % of n = 20" in page
    assert "Added one after another: two" in page
    older = EnsembleMetrics(combine="average", view="single")
    metrics.model_copy(update={"members": members, "ensemble": older}).write(run)
    assert "Final emotion" not in write_report(run).read_text()


def walk(values, path=()):
    """Yield the path of every value in nested ones."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from walk(value, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_damaged_metrics_end_a_report_in_words(run_maker, model_writer, tmp_path, seed):
    """Whatever stands in place of one value: there is a report, or the file is named."""
    run = model_writer(run_maker(tmp_path / "run"))
    values, rng = json.loads((run / "metrics.json").read_text()), np.random.default_rng(seed)
    paths = [path for path in walk(values) if path[0] != "schema"]
    for depth in (3, 4, 5, 6):
        path = paths[rng.choice([number for number, path in enumerate(paths) if len(path) <= depth])]
        damaged = json.loads(json.dumps(values))
        place = damaged
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = [None, 0, -1, "x", [], {}, [1], True][rng.integers(8)]
        (run / "metrics.json").write_text(json.dumps(damaged))
        for write in (write_report, write_card):
            told = "metrics.json"
            try:
                write(run)
            except ModelError as error:
                told = str(error)
            assert "metrics.json" in told, path
