from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from dlfer.errors import DataError, ModelError
from dlfer.report.html import write_report


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


def read_page(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_headline_has_n_interval_protocol_and_what_selected(tmp_path, run_maker):
    run = run_maker(tmp_path / "faces" / "20260102T030405Z-abc")
    page = read_page(write_report(run))
    figure = json.loads((run / "metrics.json").read_text())["test"]["accuracy"]
    assert "Accuracy, test (PrivateTest)" in page.text
    assert f"{100 * figure['value']:.1f} %" in page.text
    assert f"95 % interval {100 * figure['low']:.1f} to {100 * figure['high']:.1f} %, n = 60" in page.text
    assert "protocol official" in page.text
    assert "selected on PublicTest" in page.text
    assert "test opened once" in page.text
    assert "expected 10.0 % to 90.0 %: within" in page.text
    assert "without twins" in page.text
    assert "n = 54" in page.text


def test_every_section_is_there(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    page = read_page(write_report(run))
    for text in (
        "faces",
        "4 test images have an exact copy in training, 6 an exact, nearly equal or mirrored one.",
        "EF-FER1 3 min 20 s 40,000 200 64 px taken from the cache",
        "EF-FER2 1 min 40 s 5,000 50 48 px",
        "2 carried, 1 fresh, 0 missing, 0 unexpected",
        "2.5e-07",
        "3 rows were skipped & counted.",
        "180 images (Training 60, PublicTest 60, PrivateTest 60) with 3 labels.",
        "6 of 60 images of PrivateTest (10.0 %) have a twin in Training: 4 an exact copy, 2 a near or mirrored one only.",
        "170 images are distinct; 8 of them occur more than once, 2 under different labels.",
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


def test_without_a_test_part_every_heading_says_validation(tmp_path, run_maker):
    page = read_page(write_report(run_maker(tmp_path / "run", parts=("train", "validation"))))
    assert "Accuracy, validation figure (PublicTest, used for selection)" in page.text
    assert "Each class, validation figure (PublicTest, used for selection)" in page.text
    assert "none: the run was not judged on a test part" in page.text
    assert "test opened" not in page.text
    assert "within" not in page.text


def test_banner_and_warnings_stand_in_a_box_and_are_escaped(tmp_path, run_maker):
    run = run_maker(tmp_path / "run", banner="No clean test: <b>6 twins</b>", warnings=["Faces stand in for fer2013."])
    source = write_report(run).read_text()
    box = source.split('<div class="banner"')[1].split("</div>")[0]
    assert "No clean test: &lt;b&gt;6 twins&lt;/b&gt;" in box
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
    assert "To repeat it" in page.text
    assert ("This run has no figures yet" in page.text) == ("metrics.json" in absent)


def test_a_failed_run_shows_its_error(tmp_path, run_maker):
    run = run_maker(tmp_path / "run", status="failed", error="NonFiniteError: loss is NaN at step 12 <x>")
    (run / "metrics.json").unlink()
    page = read_page(write_report(run))
    assert "it is failed" in page.text
    assert "NonFiniteError: loss is NaN at step 12 <x>" in page.text


def test_writing_twice_gives_the_same_page(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_figures_of_undefined_classes_are_dashes(tmp_path, run_maker):
    run = run_maker(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    angry = metrics["test"]["per_class"]["Angry"]
    for key in ("precision", "recall", "f1", "auc"):
        angry[key], angry["intervals"][key] = None, [None, None]
    metrics["test"]["macro_auc"] = {"value": None, "low": None, "high": None}
    (run / "metrics.json").write_text(json.dumps(metrics))
    source = write_report(run).read_text()
    row = source.split('<th scope="row">Angry</th>')[1].split("</tr>")[0]
    assert row.count("–") == 4
    assert "None" not in html.unescape(Page(source).text)


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
        "import sys, dlfer.report.html, dlfer.report.comparison, dlfer.evaluate.scores, dlfer.evaluate.paired;"
        "heavy = {'tensorflow', 'keras', 'matplotlib', 'scipy', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
