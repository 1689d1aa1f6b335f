"""The pages of `dlfer evaluate --html` and `dlfer compare --html`, and one sign of a difference wherever it is shown."""

from __future__ import annotations

import html
import json
import re

import pytest

from dlfer.metrics.paired import compare_paired, describe_difference, format_points
from dlfer.metrics.scores import compute_metrics_file
from dlfer.metrics.several import compare_several
from dlfer.report.comparison import write_comparison_report, write_models_page
from dlfer.report.html import write_metrics_page
from dlfer.report.terminal import format_comparison, format_metrics
from dlfer.runs.comparison_record import ArmPair, ArmRow, ComparisonRecord, SeedEstimate
from dlfer.runs.metrics_record import JudgedOn, Metrics
from dlfer.runs.records import DuplicateCounts, DuplicatesRecord

pytestmark = pytest.mark.usefixtures("blank_figures")

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def metrics(predictions_maker):
    def make(used_for=None, split="PrivateTest", **fields):
        known = {"protocol": "official", "banner": None, "selected_on": "PublicTest"} | fields
        judged_on = JudgedOn(split=split, file="my <faces>", used_for=used_for)
        return compute_metrics_file({"test": predictions_maker("test")}, Metrics(**known)).model_copy(
            update={"judged_on": judged_on}
        )

    return make


def check_page(page: str) -> None:
    """The page is whole in itself, follows the browser's light or dark, and runs nothing."""
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_an_evaluation_is_a_page(tmp_path, metrics):
    found = metrics(banner=f"Smoke run {HOSTILE}")
    page = write_metrics_page(tmp_path / "a.html", found, f"mine {HOSTILE}").read_text()
    check_page(page)
    assert "evaluated on PrivateTest of my &lt;faces&gt;" in page
    assert "Accuracy, test (PrivateTest)" in page
    accuracy = found.test.accuracy
    assert f"{100 * accuracy.value:.1f} %" in page
    assert f"95 % interval {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %, n = 60" in page
    assert "data:image/png;base64," in page
    assert "How to reproduce it" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "a.html"]


@pytest.mark.parametrize(("used_for", "kind"), [("selection", "validation"), ("training", "training")])
def test_images_that_made_the_model_are_no_test(tmp_path, metrics, used_for, kind):
    found = metrics(used_for, split="PublicTest")
    title = f"{kind} (PublicTest, used for {used_for})"
    counts = DuplicateCounts(any=6, exact=2)
    found = found.model_copy(update={"duplicates": DuplicatesRecord(split="test", n=60, in_train=counts)})
    page, text = write_metrics_page(tmp_path / "a.html", found, "mine").read_text(), format_metrics(found)
    assert f"Accuracy, {title}" in page
    assert f"{title} (n = 60)" in text
    for shown in (page, text):
        assert "6 of 60 PublicTest images (10.0 %) have a duplicate in training" in shown
        assert "test images" not in shown


def test_a_comparison_of_models_is_a_page_with_the_terminals_numbers(tmp_path, predictions_maker):
    several = [predictions_maker("test", gain=gain, seed=seed) for gain, seed in ((0.5, 0), (2.5, 1), (1.0, 2))]
    found = compare_several(several, [f"poor {HOSTILE}", "good", "middle"]).model_copy(update={"part": "test"})
    page, text = write_models_page(tmp_path / "a.html", found).read_text(), format_comparison(found)
    check_page(page)
    for pair in found.pairs:
        value, low, high = (
            format_points(100 * end) for end in (pair.difference.value, pair.difference.low, pair.difference.high)
        )
        title = f"{pair.a} minus {pair.b}".replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")
        assert f'<th scope="row">{title}</th><td>{value}<small>{low} to {high}</small></td>' in page
        assert f"{pair.a} minus {pair.b}: {value} percentage points of accuracy (95 % interval {low} to {high}" in text
    assert found.pairs[0].difference.value < 0  # the first is the worse one


def make_pair(predictions_maker, names, gains) -> ArmPair:
    a, b = (predictions_maker("test", gain=gain, seed=seed) for seed, gain in enumerate(gains))
    result = compare_paired(a, b, names=names)
    return ArmPair.of(result, part="test", sentence=describe_difference(result))


@pytest.mark.parametrize("kind", ["ablation", "sweep"])
@pytest.mark.parametrize("gains", [(0.2, 3.0), (3.0, 0.2)])
def test_a_report_has_the_sign_of_the_sentence_that_the_terminal_prints(tmp_path, predictions_maker, kind, gains):
    first, second = ("with EF-FER1", "without EF-FER1") if kind == "ablation" else ("a=1", "a=2")
    pair = make_pair(predictions_maker, (first, second), gains)
    accuracy = SeedEstimate(value=0.5, low=0.4, high=0.6, n=60)
    rows = [ArmRow(arm=arm, seeds=[0], validation=accuracy, test=accuracy, rank=1) for arm in (first, second)]
    fields = {"rank_by": "accuracy", "reference": first} if kind == "sweep" else {}
    folder = tmp_path / "faces" / "x"
    folder.mkdir(parents=True)
    ComparisonRecord(table=rows, paired=[pair], notes=[], judged_on="test", **fields).write(folder)
    (folder / "run.json").write_text(json.dumps({"kind": kind, "status": "finished"}))
    (folder / "members.csv").write_text("arm,seed,path,status\n")
    page = write_comparison_report(folder).read_text()
    value, low, high = (format_points(getattr(pair.difference, end)) for end in ("value", "low", "high"))
    assert (pair.difference.value < 0) == (gains[0] < gains[1])
    assert (
        f"{first} minus {second}: {value} percentage points of accuracy (95 % interval {low} to {high}" in pair.sentence
    )
    if kind == "sweep":
        assert f"“{first}” minus each cell" in page
        assert f"<td>{value}<small>{low} to {high}</small></td>" in page
    else:
        assert html.escape(pair.sentence).replace("&#x27;", "&#39;") in page


def test_sections_without_metrics_are_left_out(tmp_path, metrics):
    """A page of metrics without calibration or curves leaves these sections out."""
    found = metrics()
    bare = found.model_copy(update={"test": found.test.model_copy(update={"calibration": None, "selective": None})})
    page = write_metrics_page(tmp_path / "a.html", bare, "mine").read_text()
    assert '<h2 id="calibration">' not in page
