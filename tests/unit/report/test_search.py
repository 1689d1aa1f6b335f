"""The page of a search, and what each key told about the score."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from dlfer.errors import ModelError
from dlfer.report.page import format_overrides, shorten_key
from dlfer.report.search import compute_importance, draw_coordinates, draw_history, rank_trials, write_search_report
from dlfer.runs.member_rows import MemberRow

KEYS = ["finetune.optimizer.learning_rate", "finetune.optimizer.name", "finetune.optimizer.momentum"]


def make_record(number, score, status="finished", **given):
    overrides = {KEYS[0]: 10.0 ** -(number + 2), KEYS[1]: "sgd" if number % 2 else "adam"}
    if number % 2:
        overrides[KEYS[2]] = 0.9
    record = {
        "trial": str(number),
        "overrides": overrides,
        "status": status,
        "score": score,
        "low": None if score is None else score - 0.05,
        "high": None if score is None else score + 0.05,
        "epochs": 3,
        "run": f"2026-{number}",
        "seconds": 60.0,
        "error": "the <loss> became nan" if status == "failed" else None,
    }
    return {**record, **given}


@pytest.fixture
def write_search(tmp_path):
    def write(records, figure="macro_f1", direction="max"):
        folder = tmp_path / "x" / "20261121T000000Z-abc-search"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"status": "finished", "argv": ["dlfer", "search", "a.yaml"]}))
        trials = {
            "figure": figure,
            "direction": direction,
            "keys": KEYS,
            "arms": [{"name": "search", "records": records}],
        }
        (folder / "trials.json").write_text(json.dumps(trials))
        return folder

    return write


def test_the_page_says_what_is_best_what_failed_and_what_may_be_chance(write_search):
    records = [make_record(0, 0.5), make_record(1, 0.61), make_record(2, 0.58), make_record(3, None, "failed")]
    page = write_search_report(write_search([*records, make_record(4, 0.9, "rung", low=None, high=None)])).read_text()
    assert "<b>0.6100</b> (95 % 0.5600 to 0.6600 over the images), trial 2 of 5" in page
    assert "best of 4 trials on the images that selected it" in page
    assert "1 other finished trial has a score within its interval" in page
    assert "the &lt;loss&gt; became nan" in page
    assert "ended with its rung" in page
    assert page.count("<img") == 3
    assert "http" not in page.replace("http://www.w3.org", "")


def test_fewer_than_four_scores_say_that_nothing_is_told_of_the_keys(write_search):
    records = [make_record(0, 0.5), make_record(1, 0.61), make_record(2, 0.58)]
    assert "is shown from 4 trials with different scores on" in write_search_report(write_search(records)).read_text()
    records.append(make_record(3, 0.4))
    assert "is shown from 4 trials" not in write_search_report(write_search(records)).read_text()


def test_many_keys_stand_in_rows_that_each_end_with_the_score():
    keys = [f"finetune.augment.k{number}" for number in range(10)]
    records = [MemberRow(arm="a", settings=dict.fromkeys(keys, value), score=value) for value in (0.1, 0.2, 0.3)]
    rows = [
        [label.get_text() for label in axes.get_xticklabels()]
        for axes in draw_coordinates(records, keys, "accuracy", "max").axes
    ]
    assert [row[:-1] for row in rows] == [
        [f"k{number}" for number in range(5)],
        [f"k{number}" for number in range(5, 10)],
    ]
    assert {row[-1] for row in rows} == {"accuracy\n(more is better)"}
    assert len(draw_coordinates(records, keys[:6], "loss", "min").axes) == 1


def test_the_winners_of_an_ablation_stand_in_a_table_with_their_keys_and_runs(write_search):
    def make_figure(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 1234}

    arms = {"with EF-FER1": 0.7, "without EF-FER1": 0.6}
    table = [
        {
            "arm": arm,
            "seeds": [0, 1],
            "train": None,
            "validation": make_figure(value),
            "test": make_figure(value - 0.05),
        }
        for arm, value in arms.items()
    ]
    folder = write_search([make_record(0, 0.5)])
    (folder.parent / "own").mkdir()
    (folder.parent / "own" / "report.html").write_text("")
    comparison = {
        "table": table,
        "paired": [],
        "notes": [],
        "winners": {
            "with EF-FER1": {"model.dropout": 0.2},
            "without EF-FER1": {"pretrain": None, "model.dropout": 0.3},
        },
        "runs": [{"arm": arm, "seed": seed, "run": "own" if seed else "gone"} for arm in arms for seed in (0, 1)],
    }
    (folder / "comparison.json").write_text(json.dumps(comparison))
    page = write_search_report(folder).read_text()
    assert "Accuracy of the best trials" in page
    assert "<th>validation</th><th>test</th>" in page
    assert "65.0 %<small>55.0 to 75.0</small><small>n = 1,234</small>" in page
    assert 'without EF-FER1: dropout 0.3. Runs: seed 0, <a href="../own/report.html">seed 1</a>.' in page


def test_a_search_without_a_score_has_a_page(write_search):
    assert "No trial has a score yet" in write_search_report(write_search([make_record(0, None, "failed")])).read_text()
    assert "No trial has a score yet" in write_search_report(write_search([])).read_text()


def test_what_went_on_with_changes_is_said_first(write_search):
    folder = write_search([make_record(0, 0.5)])
    warning = "Continued with --accept-changes (2026-11-28): software: keras was 3.1.0, and is 3.15.1."
    (folder / "run.json").write_text(json.dumps({"status": "finished", "argv": ["dlfer"], "warnings": [warning]}))
    change = {
        "time": "2026-11-28T10:00:00Z",
        "differences": ["finetune.data: train had 3 images, and has 4: 1 added (a)"],
    }
    (folder.parent / "2026-0").mkdir()
    (folder.parent / "2026-0" / "run.json").write_text(json.dumps({"status": "finished", "changes": [change]}))
    page = write_search_report(folder).read_text()
    first = page[: page.index("<h2")]
    assert warning in first
    assert "2026-0 went on by --accept-changes" in first
    assert "train had 3 images, and has 4: 1 added (a)" in first


def test_the_order_of_the_leaderboard():
    given = [(0.9, "rung"), (0.3, "finished"), (None, "failed"), (0.7, "finished")]
    rows = [MemberRow(arm="search", score=score, status=status) for score, status in given]
    assert [trial.number for trial in rank_trials(rows, "max")] == [4, 2, 1, 3]
    assert [trial.number for trial in rank_trials(rows, "min")] == [2, 4, 1, 3]


def test_a_folder_that_is_no_search_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"found no run\.json"):
        write_search_report(tmp_path)


def test_keys_are_as_short_as_they_can_be():
    assert shorten_key("finetune.epochs", ["finetune.epochs", "model.dropout"]) == "epochs"
    assert shorten_key("finetune.epochs", ["finetune.epochs", "pretrain.epochs"]) == "finetune.epochs"
    assert shorten_key("finetune.optimizer.name", ["finetune.optimizer.name"]) == "optimizer.name"
    assert format_overrides({"finetune.optimizer.learning_rate": 0.00123456, "finetune.balance": "none"}) == (
        "learning_rate 0.001235, balance none"
    )


def test_groups_against_scipys_analysis_of_variance():
    rng = np.random.default_rng(0)
    names = ["adam", "sgd", "rmsprop"] * 5
    y = rng.normal(size=15) + np.array([0.0, 1.0, 0.3] * 5)
    found = compute_importance([{"k": name} for name in names], y, "k")
    groups = [y[np.array(names) == name] for name in ("adam", "sgd", "rmsprop")]
    f = stats.f_oneway(*groups).statistic
    assert found.share == pytest.approx(2 * f / (2 * f + 12))
    assert found.chance == pytest.approx(2 / 14)


def test_numbers_against_numpys_fit_of_a_parabola():
    rng = np.random.default_rng(1)
    x = 10 ** rng.uniform(-5, -1, 20)
    ranks = stats.rankdata(x)
    y = -((ranks - 12) ** 2) / 50 + rng.normal(scale=0.5, size=20)
    found = compute_importance([{"k": value} for value in x.tolist()], y, "k")
    residual = y - np.polyval(np.polyfit(ranks, y, 2), ranks)
    assert found.share == pytest.approx(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum())
    assert found.share > 0.5


def test_chance_is_what_noise_gives_on_average():
    rng = np.random.default_rng(2)
    found = [
        compute_importance([{"k": value} for value in rng.normal(size=12).tolist()], rng.normal(size=12), "k")
        for _ in range(400)
    ]
    assert np.mean([f.share for f in found]) == pytest.approx(found[0].chance, abs=0.02)


def test_a_conditional_key_is_judged_among_the_trials_in_which_it_was_searched():
    settings = [{"k": 0.8}, {}, {"k": 0.9}, {}, {"k": 0.8}, {}, {"k": 0.9}]
    found = compute_importance(settings, [1, 7, 0, 9, 1, 8, 0], "k")
    assert found == (pytest.approx(1), pytest.approx(1 / 3), pytest.approx(1), 4)
    assert compute_importance(settings[:5], [1, 7, 0, 9, 1], "k") is None


@pytest.mark.parametrize(
    ("values", "scores"), [([1, 2, 3], [1, 2, 3]), ([1] * 5, [1, 2, 3, 4, 5]), ([1, 2, 3, 4, 5], [2] * 5)]
)
def test_nothing_is_said_where_nothing_can_be_known(values, scores):
    assert compute_importance([{"k": value} for value in values], scores, "k") is None


def test_a_trial_that_ended_early_is_not_drawn_as_the_best():
    given = [(0.9, "rung"), (0.3, "finished"), (0.7, "finished"), (None, "failed")]
    rows = [
        MemberRow(arm="search", score=score, status=status, settings={KEYS[0]: 0.1 * number})
        for number, (score, status) in enumerate(given)
    ]
    lines = draw_coordinates(rows[:3], KEYS[:1], "macro F1", "max").axes[0].lines
    [best] = [line for line in lines if line.get_linewidth() == 2.6]
    assert best.get_ydata()[-1] == pytest.approx(0.5)  # 0.7 of the scores 0.3, 0.7 and 0.9
    for direction, value, worst in (("max", 0.7, 0.3), ("min", 0.3, 0.9)):
        found = {line.get_label(): line.get_ydata() for line in draw_history(rows, "macro F1", direction).axes[0].lines}
        assert found["best so far"][-1] == value
        assert list(found["failed"]) == [worst]
