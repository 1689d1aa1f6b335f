"""What scores a trial, and which trial is the best."""

from __future__ import annotations

import pytest

from dlfer.config.schema import StageConfig
from dlfer.config.sections import DataConfig
from dlfer.runs.member_rows import MemberRow
from dlfer.study.search.engine import compute_scores_so_far, find_best, get_direction

HISTORY = [
    {"validation_loss": 1.0, "validation_accuracy": 0.2, "validation_macro_f1": 0.10},
    {"validation_loss": 0.5, "validation_accuracy": 0.4, "validation_macro_f1": 0.05},
    {"validation_loss": 0.9, "validation_accuracy": 0.4, "validation_macro_f1": 0.30},
    {"validation_loss": 0.4, "validation_accuracy": 0.3, "validation_macro_f1": 0.20},
]


def make_stage(**given):
    return StageConfig(data=DataConfig(source="synthetic_faces"), **given)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # The kept epoch is the best by accuracy (of equals the first), whatever the score says of it.
        ({"monitor": "accuracy"}, [0.10, 0.05, 0.05, 0.05]),
        ({"monitor": "macro_f1"}, [0.10, 0.10, 0.30, 0.30]),
        ({"monitor": "loss"}, [0.10, 0.05, 0.05, 0.20]),
        ({"monitor": "accuracy", "keep": "last"}, [0.10, 0.05, 0.30, 0.20]),
    ],
)
def test_the_score_is_that_of_the_model_that_is_kept(stage, expected):
    assert compute_scores_so_far(HISTORY, "macro_f1", make_stage(**stage)) == expected


def test_no_epoch_no_score():
    assert compute_scores_so_far([], "loss", make_stage()) == []


def test_directions():
    assert [get_direction(name) for name in ("accuracy", "macro_f1", "loss")] == ["max", "max", "min"]


def make_record(status, score):
    return MemberRow(arm="search", trial="0", status=status, score=score)


def test_the_best_is_one_that_was_run_to_the_end():
    records = [make_record("rung", 0.9), make_record("finished", 0.5), make_record("failed", None)]
    records.append(make_record("finished", 0.7))
    assert find_best(records, "accuracy") is records[3]
    assert find_best(records, "loss") is records[1]
    assert find_best(records[:1], "accuracy") is records[0]
    assert find_best(records[2:3], "accuracy") is None
