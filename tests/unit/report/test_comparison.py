from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dlfer.errors import ModelError
from dlfer.metrics.paired import compare_paired, describe_difference
from dlfer.report.comparison import (
    describe_required_sample_size,
    format_comparison_table,
    read_comparison,
    read_members,
    write_comparison_report,
)
from dlfer.runs.comparison_record import (
    FORMER_SEEDS,
    ArmPair,
    ArmRow,
    ComparisonRecord,
    More,
    SeedEstimate,
    SeedsAndImages,
)
from dlfer.runs.metrics_record import Estimate

WITH, WITHOUT = "with EF-FER1", "without EF-FER1"
COLUMNS = [
    "arm",
    "seed",
    "digest",
    "path",
    "status",
    "train_accuracy",
    "validation_accuracy",
    "test_accuracy",
    "macro_f1",
    "seconds",
    "pretrain_seconds",
]


def make_comparison(split: str = "test", **fields) -> ComparisonRecord:
    splits = ("train", "validation", "test") if split == "test" else ("train", "validation")
    rows = []
    for arm, value in ((WITH, 0.70), (WITHOUT, 0.66)):
        accuracy = SeedEstimate(value=value, low=value - 0.02, high=value + 0.02, n=3589)
        rows.append(ArmRow(arm=arm, seeds=[0], **dict.fromkeys(splits, accuracy)))
    judged_on = "test" if split == "test" else "validation (PublicTest, used for selection)"
    return ComparisonRecord(table=rows, notes=[f"Judged on {judged_on}."], judged_on=judged_on, **fields)


@pytest.fixture
def ablation(tmp_path, run_maker, predictions_maker) -> Path:
    """A finished ablation of two arms, one of whose members did not begin."""
    folder = tmp_path / "faces"
    runs = {
        WITH: run_maker(folder / "20260102T030405Z-aaa", gain=1.5, banner="Smoke run: <nothing> is meant."),
        WITHOUT: run_maker(folder / "20260102T030406Z-bbb"),
    }
    path = folder / "20260102T030400Z-ccc-ablation"
    path.mkdir()
    result = compare_paired(predictions_maker("test", gain=1.5), predictions_maker("test"), names=(WITH, WITHOUT))
    comparison = make_comparison(paired=[ArmPair.of(result, part="test", sentence=describe_difference(result))])
    comparison.notes.append("EF-FER1 took 3.3 min besides.")
    comparison.write(path)
    run = json.loads((runs[WITH] / "run.json").read_text()) | {"kind": "ablation", "argv": ["ablate", "faces.yaml"]}
    (path / "run.json").write_text(json.dumps(run))
    (path / "config.yaml").write_text("experiment:\n  name: faces\n")
    with open(path / "members.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for arm, member in runs.items():
            writer.writerow({"arm": arm, "seed": 0, "path": member, "status": "finished", "test_accuracy": 0.7})
        writer.writerow({"arm": WITH, "seed": 1, "status": "pending"})
    return path


def test_the_page_has_table_sentence_figures_and_members(ablation):
    sentence = ComparisonRecord.require(ablation).paired[0].sentence
    source = write_comparison_report(ablation).read_text()
    assert "<title>faces: ablation</title>" in source
    assert sentence.replace("'", "&#39;") in source
    assert source.count("data:image/png;base64,") == 3
    assert "70.0 %<small>68.0 to 72.0</small><small>n = 3,589</small>" in source
    assert "EF-FER1 took 3.3 min besides." in source
    assert "dlfer ablate faces.yaml" in source
    assert "pending" in source
    assert "<p>Smoke run: &lt;nothing&gt; is meant.</p>" in source


def test_members_are_found_where_they_are_or_beside_a_moved_comparison(ablation, tmp_path):
    shutil.copy(ablation / "run.json", ablation.parent / "20260102T030405Z-aaa" / "report.html")
    links = [member.link for member in read_members(ablation)]
    assert links == ["../20260102T030405Z-aaa/report.html", None, None]
    moved = tmp_path / "elsewhere"
    ablation.parent.rename(moved)
    assert [member.link for member in read_members(moved / ablation.name)] == links
    assert (moved / "20260102T030406Z-bbb").exists()
    source = write_comparison_report(moved / ablation.name).read_text()
    assert source.count("data:image/png;base64,") == 3


def test_members_that_are_gone_leave_only_their_row(ablation):
    for folder in ablation.parent.glob("*Z-???"):
        shutil.rmtree(folder)
    source = write_comparison_report(ablation).read_text()
    assert source.count("data:image/png;base64,") == 2
    assert "20260102T030405Z-aaa" in source


def test_a_comparison_without_a_finished_member_says_so(ablation):
    ComparisonRecord(table=[], paired=[], notes=["No member finished."], judged_on=None).write(ablation)
    assert "No member has finished yet." in write_comparison_report(ablation).read_text()


def test_what_is_no_comparison_is_told(tmp_path):
    with pytest.raises(ModelError, match=r"found no run.json"):
        write_comparison_report(tmp_path)


def print_table(comparison: ComparisonRecord) -> str:
    console = Console(width=110, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(format_comparison_table(comparison))
    return capture.get()


def test_the_table_for_the_terminal():
    text = print_table(make_comparison())
    header = next(line for line in text.splitlines() if "arm" in line)
    assert [word for word in header.replace("┃", " ").split()] == ["arm", "train", "validation", "test"]
    assert "70.0 %" in text
    assert "68.0 to 72.0" in text
    assert "n = 3,589" in text
    assert np.char.count(text, "66.0 %") == 3


def test_the_table_says_when_validation_both_selected_and_judged():
    text = print_table(make_comparison("validation"))
    assert "validation (PublicTest, used for selection)" in text
    header = next(line for line in text.splitlines() if "arm" in line)
    assert "test" not in header.replace("PublicTest", "")


def test_every_figure_carries_the_banners_of_the_members(ablation):
    write_comparison_report(ablation)
    drawn = sorted((ablation / "figures").glob("*.png"))
    assert len(drawn) == 3
    for path in drawn:
        with Image.open(path) as image:
            assert image.text["Banner"] == "Smoke run: <nothing> is meant."


def make_pair(**fields) -> ArmPair:
    values = {"n": 600, "difference": Estimate(value=1.0, low=-1.0, high=3.0), "scope": "recipes"}
    return ArmPair(a=WITH, b=WITHOUT, **{**values, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"more": More(seeds=5, images=12000)}, "5 seeds or 12,000 images"),
        ({"more": More(both=SeedsAndImages(seeds=9, images=8000))}, "9 seeds and 8,000 images"),
        ({"more": More()}, ""),
        ({"more": None}, ""),
        ({"scope": "models", "required_n": 9000}, "9,000 images"),
        ({"scope": "models", "required_n": None}, ""),
        # Holm's correction alone made it not significant.
        ({"scope": "models", "required_n": 590}, ""),
        ({"scope": "models", "required_n": 9000, "is_significant": True}, ""),
        ({"scope": "models", "required_n": 9000, "not_learned": ["x: its loss"]}, ""),
    ],
)
def test_what_is_needed_is_told_in_a_few_words(fields, words):
    assert describe_required_sample_size(make_pair(**fields)) == words


OLD_PAIR = {
    "a": WITH,
    "b": WITHOUT,
    "part": "validation",
    "sentence": "With EF-FER1 against without EF-FER1: told apart.",
    "names": [WITH, WITHOUT],
    "n": 3589,
    "accuracy_a": 0.649,
    "accuracy_b": 0.326,
    "difference": {"value": 32.3, "low": 30.4, "high": 34.2},
    "test": "McNemar's mid-p test",
    "p_value": 3.8e-214,
    "is_larger_than_chance": True,
    "n_needed": 30,
    "level": 0.95,
    "num_seeds": 1,
}


def test_a_comparison_of_the_first_version_is_read_with_a_sentence_of_this_one(tmp_path):
    row = {"arm": WITH, "seeds": [0], "validation": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 9}, "test": None}
    old = {"table": [row], "paired": [OLD_PAIR], "notes": ["One seed."], "judged_on": "validation"}
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    found = read_comparison(tmp_path)
    (pair,) = found.paired
    assert (pair.is_significant, pair.required_n, pair.scope) == (True, 30, "models")
    assert pair.sentence.startswith(
        "The two trained models, with EF-FER1 minus without EF-FER1: 32.3 percentage points"
    )
    assert found.notes == ["One seed."]
    several = {**OLD_PAIR, "num_seeds": 3}
    (tmp_path / "comparison.json").write_text(json.dumps({**old, "paired": [several, several]}))
    found = read_comparison(tmp_path)
    assert [pair.sentence for pair in found.paired] == [OLD_PAIR["sentence"]] * 2
    assert found.notes == ["One seed.", FORMER_SEEDS]
    found.write(tmp_path)
    assert read_comparison(tmp_path) == found


def test_a_damaged_comparison_is_refused(tmp_path):
    (tmp_path / "comparison.json").write_text('{"table": [], "paired": [3], "notes": []}')
    with pytest.raises(ModelError, match=r"comparison\.json: paired\.0: found '3', expected an object"):
        read_comparison(tmp_path)
