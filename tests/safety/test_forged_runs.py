"""Whatever the files of a run or a study say: it is reported, shown and compared, or refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlfer.cli.show import describe_run, list_model_rows, list_run_rows
from dlfer.report import figures
from dlfer.report.card import write_card
from dlfer.report.comparison import write_comparison_report
from dlfer.report.html import write_report
from dlfer.report.search import write_search_report
from dlfer.report.terminal import format_comparison, format_rows, format_values
from dlfer.runs.comparison_record import (
    ArmPair,
    ArmRow,
    ComparisonRecord,
    CrossValidated,
    FoldResult,
    SeedEstimate,
)
from dlfer.runs.member_rows import MemberRow, write_member_rows
from dlfer.runs.metrics_record import Estimate
from dlfer.runs.run_records import ExtraMetrics
from dlfer.study.compare import compare_runs
from tests.safety.test_forged_records import SOMETHING_ELSE, change, list_places, try_to_use
from tests.unit.report.conftest import make_extras, make_run, write_model

JSON = (
    "run.json",
    "metrics.json",
    "extra_metrics.json",
    "data.json",
    "audit.json",
    "transfer.json",
    "model/artifact.json",
)
TEXTS = ("config.yaml", "log.jsonl", "finetune/history.csv")
NOTHING = [
    b"",
    b"[",
    b"[]",
    b"null",
    b"\xff",
    b"{}",
    b'{"schema": 99}',
    b"[" * 10**5,
    b"\x00" * 1000,
    b'"',
    b"a,b\n1\n" * 3,
]
ARMS = ("a", "b")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Let figures be made and not be saved, which takes most of the time."""
    monkeypatch.setattr(figures, "write_figure", lambda figure, path, **named: path)


def make_member(folder: Path, name: str, **given: object) -> Path:
    run = write_model(make_run(folder / name, **given))
    ExtraMetrics(**{key: value for key, value in make_extras().items() if key != "headline"}).write(run)
    return run


def make_study(path: Path, runs: list[Path], kind: str) -> Path:
    """Write what a study leaves: two arms, a pair, and a cross-validation's folds where it is one."""
    path.mkdir()
    value = SeedEstimate(value=0.7, low=0.65, high=0.75, n=60)
    fold = FoldResult(fold=0, arm="a", seed=0, n=30, accuracy=value, validation=0.7)
    estimates = dict.fromkeys(("trained", "recipe", "macro_f1", "macro_precision", "macro_recall"), Estimate(value=0.7))
    folds = CrossValidated(num_folds=2, n=60, num_groups=50, folds=[fold, fold], **estimates)
    of_kind = {
        "sweep": {"rank": 1, "ranked_by": 0.7, "settings": {"model.dropout": "0.1"}, "seconds": 5.0},
        "cross_validation": {"cross_validated": folds, "ranked_by": 0.7},
    }.get(kind, {})
    rows = [ArmRow(arm=arm, seeds=[0], train=value, validation=value, test=value, **of_kind) for arm in ARMS]
    pair = ArmPair(
        a="a", b="b", names=["a", "b"], part="test", scope="models", n=60, test="McNemar", p_value=0.5, sentence="a minus b.",
        difference=Estimate(value=1.0, low=-1.0, high=3.0),
    )  # fmt: skip
    ComparisonRecord(
        table=rows, paired=[pair], notes=["Judged on test."], judged_on="test", rank_by="accuracy", axes=["model.dropout"],
        reference="a", chosen=folds if kind == "cross_validation" else None,
    ).write(path)  # fmt: skip
    record = json.loads((runs[0] / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"kind": kind}))
    space = "search: {space: {model.dropout: {between: [0.0, 0.5]}}}\n" if kind == "search" else ""
    (path / "config.yaml").write_text((runs[0] / "config.yaml").read_text() + space)
    of_trial = {"trial": "1", "score": 0.7, "low": 0.65, "high": 0.75, "epochs": 3} if kind == "search" else {}
    members = [
        MemberRow(arm=arm, seed=0, path=str(run), status="finished", settings={"model.dropout": 0.1}, **of_trial)
        for arm, run in zip(ARMS, runs, strict=True)
    ]
    write_member_rows(path, members)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two finished runs, and beside them the studies of each kind that trained them."""
    folder = tmp_path_factory.mktemp("runs") / "faces"
    made = [make_member(folder, "20260102T030405Z-aaa"), make_member(folder, "20260102T030406Z-bbb", gain=1.5)]
    for kind in ("ablation", "sweep", "cross_validation", "search"):
        make_study(folder / f"20260102T030400Z-ccc-{kind}", made, kind)
    return made


def use_run(path: Path) -> None:
    """Do with a run what report, show and compare do."""
    other = path.with_name("20260102T030406Z-bbb")
    list_run_rows(path.parents[1])
    format_rows(list_model_rows())
    format_values(describe_run(str(path), path.parents[1]))
    format_comparison(compare_runs([str(path), str(other)]))
    write_report(path)
    write_card(path)


def use_study(path: Path) -> None:
    list_run_rows(path.parents[1])
    format_values(describe_run(str(path), path.parents[1]))
    (write_search_report if path.name.endswith("-search") else write_comparison_report)(path)


def forge(file: Path, contents: bytes, what: object, use: Callable[[Path], None], folder: Path) -> None:
    """Let a file say something else, and what is beside it be used or refused."""
    whole = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(contents)
        try_to_use(folder, what, use)
    finally:
        file.write_bytes(whole) if whole is not None else file.unlink()


def list_studies(runs: list[Path]) -> list[Path]:
    return sorted(runs[0].parent.glob("*-ccc-*"))


def mark_slow(names, but):
    return [pytest.param(name, marks=() if name == but else pytest.mark.slow) for name in names]


def test_what_is_forged_here_is_used_when_it_is_whole(runs):
    use_run(runs[0])
    for study in list_studies(runs):
        use_study(study)


@pytest.mark.parametrize("name", mark_slow([*JSON, *TEXTS, "predictions/test.npz"], but="metrics.json"))
def test_a_file_of_a_run_may_hold_anything(runs, name):
    for contents in NOTHING:
        forge(runs[0] / name, contents, (name, contents[:20]), use_run, runs[0])


@pytest.mark.parametrize(
    "name", mark_slow(["run.json", "comparison.json", "members.csv", "config.yaml"], but="run.json")
)
def test_a_file_of_a_study_may_hold_anything(runs, name):
    for study in list_studies(runs):
        for contents in NOTHING:
            forge(study / name, contents, (study.name, name, contents[:20]), use_study, study)


ANYTHING = st.sampled_from([..., *SOMETHING_ELSE]) | st.integers() | st.floats() | st.text(max_size=20)
FORGING = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FORGING
@given(st.data())
def test_a_value_of_a_record_of_a_run_may_be_anything(runs, data):
    file = runs[0] / data.draw(st.sampled_from(JSON))
    record = json.loads(file.read_text())
    place, value = data.draw(st.sampled_from(list(list_places(record)))), data.draw(ANYTHING)
    forge(file, json.dumps(change(record, place, value)).encode(), (file.name, place, value), use_run, runs[0])


@FORGING
@given(st.data())
def test_a_value_of_a_record_of_a_study_may_be_anything(runs, data):
    study = data.draw(st.sampled_from(list_studies(runs)))
    file = study / data.draw(st.sampled_from(["comparison.json", "comparison.json", "run.json"]))
    record = json.loads(file.read_text())
    place, value = data.draw(st.sampled_from(list(list_places(record)))), data.draw(ANYTHING)
    what = (study.name, file.name, place, value)
    forge(file, json.dumps(change(record, place, value)).encode(), what, use_study, study)


@FORGING
@given(st.data())
def test_a_cell_of_members_csv_and_a_key_of_the_experiment_may_be_anything(runs, data):
    study = data.draw(st.sampled_from(list_studies(runs)))
    if data.draw(st.booleans()):
        file = study / "members.csv"
        cells = [line.split(",") for line in file.read_text().splitlines()]
        row = data.draw(st.integers(0, len(cells) - 1))
        cells[row][data.draw(st.integers(0, len(cells[row]) - 1))] = data.draw(
            st.sampled_from(["", "x", "-1", "1e99", "nan", '"', "\x00", "../..", "é" * 300, "=1+1", '"a\nb"'])
        )
        text = "\n".join(map(",".join, cells))
    else:
        file = study / "config.yaml"
        tree = yaml.safe_load(file.read_text())
        place = data.draw(st.sampled_from(list(list_places(tree))))
        value = data.draw(ANYTHING.filter(lambda value: not isinstance(value, str) or value.isprintable()))
        text = yaml.safe_dump(change(tree, place, value))
    forge(file, text.encode("utf-8", "surrogatepass"), (study.name, file.name, text[:300]), use_study, study)


MISSING = [
    ("table", 0, "validation", "low"), ("table", 0, "test", "value"), ("table", 0, "validation"), ("table", 1, "test"),
    ("paired", 0, "difference", "low"), ("paired", 0, "difference", "value"), ("paired", 0, "p_value"), ("rank_by",),
    ("reference",), ("judged_on",), ("table",), ("paired",), ("table", 0, "ranked_by"), ("table", 0, "seconds"),
    ("table", 0, "cross_validated"), ("table", 0, "cross_validated", "trained", "value"),
    ("table", 0, "cross_validated", "folds", 0, "accuracy", "value"), ("table", 0, "cross_validated", "folds"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("value", [-5.0, None, ..., "x", []])
def test_what_a_verdict_is_drawn_from_may_be_missing(runs, value):
    for study in list_studies(runs):
        file = study / "comparison.json"
        record = json.loads(file.read_text())
        places = set(list_places(record))
        for place in [place for place in MISSING if place in places]:
            forge(file, json.dumps(change(record, place, value)).encode(), (study.name, place, value), use_study, study)


def test_an_accuracy_outside_its_own_interval_is_drawn(runs):
    file = runs[0] / "metrics.json"
    record = json.loads(file.read_text())
    for split in ("raw", "scaled"):
        place = ("test", "calibration", split, "reliability", 0, "accuracy")
        if place in set(list_places(record)):
            forge(file, json.dumps(change(record, place, -5)).encode(), place, use_run, runs[0])
