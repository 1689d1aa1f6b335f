"""The space as engines need it."""

from __future__ import annotations

import pytest

from dlfer.study.search.engine import is_active, list_dimensions


def test_parents_stand_before_what_hangs_on_them(make_config):
    keys = [dimension.key.rsplit(".", 1)[-1] for dimension in list_dimensions(make_config().search)]
    assert keys == ["learning_rate", "name", "momentum", "early_stopping", "batch_size"]


def test_whole_numbers_are_known_by_the_schema(make_config):
    dimensions = {d.key: d for d in list_dimensions(make_config().search)}
    assert dimensions["finetune.batch_size"].is_int
    assert not dimensions["finetune.optimizer.learning_rate"].is_int


@pytest.mark.parametrize(
    ("spec", "key", "points"),
    [
        ({"between": [8, 32], "step": 8}, "finetune.batch_size", [8, 16, 24, 32]),
        ({"between": [1, 3]}, "finetune.epochs", [1, 2, 3]),
        ({"between": [0, 0.6], "step": 0.2}, "model.dropout", [0.0, 0.2, 0.4, 0.6]),
        ({"choice": [0.1, 0.5]}, "model.dropout", [0.1, 0.5]),
    ],
)
def test_points_of_a_grid(make_config, spec, key, points):
    (dimension,) = list_dimensions(make_config(space={key: spec}).search)
    assert dimension.list_points() == points


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"log": [1e-4, 5e-3]}, "finetune.optimizer.learning_rate: 0.0001 to 0.005, log"),
        ({"between": [0.001, 0.005], "step": 0.001}, "finetune.optimizer.learning_rate: 0.001 to 0.005, step 0.001"),
        ({"choice": [0.1, 1]}, "finetune.optimizer.learning_rate: 0.1, 1"),
        (
            {"choice": [0.1], "when": {"finetune.optimizer.name": ["sgd", "adam"]}},
            "finetune.optimizer.learning_rate: 0.1 (where finetune.optimizer.name is sgd or adam)",
        ),
    ],
)
def test_a_dimension_in_words(make_config, spec, words):
    space = {"finetune.optimizer.name": {"choice": ["sgd", "adam", "adamw"]}, "finetune.optimizer.learning_rate": spec}
    assert str(list_dimensions(make_config(space=space).search)[-1]) == words


def test_a_condition_may_write_a_choice_as_another_number(make_config):
    """KerasTuner compares texts."""
    space = {
        "model.dropout": {"choice": [0.0, 0.5]},
        "finetune.optimizer.learning_rate": {"choice": [1e-3, 1e-2], "when": {"model.dropout": [0]}},
    }
    dimension = list_dimensions(make_config(space=space).search)[-1]
    assert [str(value) for value in dimension.when["model.dropout"]] == ["0.0"]


def test_ten_points_from_end_to_end_of_a_continuous_range(make_config):
    (dimension,) = list_dimensions(
        make_config(space={"finetune.optimizer.learning_rate": {"log": [1e-4, 1e-1]}}).search
    )
    points = dimension.list_points()
    assert (len(points), points[0], points[3], points[-1]) == (10, 1e-4, 1e-3, 1e-1)


def test_numbers_are_tidy_and_stay_within_the_ends(make_config):
    (dimension,) = list_dimensions(make_config(space={"model.dropout": {"between": [0.1234564, 0.6]}}).search)
    assert dimension.tidy(0.1234564) == 0.1234564
    assert dimension.tidy(0.30000000000000004) == 0.3


def test_a_condition_holds_by_the_value_of_its_parent(make_config):
    momentum = list_dimensions(make_config().search)[2]
    assert is_active(momentum, {"finetune.optimizer.name": "sgd"})
    assert not is_active(momentum, {"finetune.optimizer.name": "adam"})
    assert not is_active(momentum, {})
