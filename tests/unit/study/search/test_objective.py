"""The seam between engines and trials."""

from __future__ import annotations

import pytest

from dlfer.config.sections import DataConfig
from dlfer.config.stage_section import StageConfig
from dlfer.study.search.objective import compute_scores_so_far, compute_trial_digest, get_direction

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


def test_a_digest_stands_for_keys_and_values_not_their_order():
    a = {"model.dropout": 0.1, "finetune.epochs": 3}
    assert compute_trial_digest(a) == compute_trial_digest(dict(reversed(a.items())))
    assert compute_trial_digest(a) != compute_trial_digest({**a, "finetune.epochs": 4})
