"""What is advised where a training did not learn."""

from __future__ import annotations

import pytest

from dlfer.config.load import load_experiment
from dlfer.experiment.run import advise_training

CLIP, WARM_UP, RANDOM = "finetune.clip", "finetune.schedule.warmup_epochs", "start from random weights"


@pytest.mark.parametrize(
    ("overrides", "advised"),
    [
        ({}, set()),
        ({"pretrain": None}, {RANDOM}),
        ({"finetune.clip": None}, {CLIP}),
        ({"finetune.schedule.warmup_epochs": 0}, {WARM_UP}),
        ({"pretrain": None, "finetune.clip": None, "finetune.schedule.warmup_epochs": 0}, {CLIP, WARM_UP, RANDOM}),
    ],
)
def test_what_an_experiment_has_already_is_not_advised(overrides, advised):
    text = advise_training(load_experiment("quickstart", overrides))
    assert text.startswith("Try more epochs")
    assert {word for word in (CLIP, WARM_UP, RANDOM) if word in text} == advised
    assert "ablation" not in text
