"""What search.space may say."""

from __future__ import annotations

import pytest

from dlfer.config.load import load_experiment, with_overrides
from dlfer.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("experiment: {name: a}\nfinetune: {data: {source: synthetic_faces}, epochs: 5}\npretrain: null\n")
    return lambda space: load_experiment(path, {"search": {"space": space}})


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("finetune.optimizer.learning_rate", {"log": [1e-5, 1e-2]}),
        ("finetune.epochs", {"between": [1, 9], "step": 2}),
        ("finetune.augment.rotation", {"between": [0, 20]}),
        ("finetune.optimizer.name", {"choice": ["adam", "sgd"]}),
        ("finetune.early_stopping", {"choice": [None, {"patience": 3}]}),
        ("finetune.early_stopping.patience", {"choice": [1, 2]}),
        # EF-FER1 is left out here: looked up only.
        ("pretrain.optimizer.learning_rate", {"log": [1e-5, 1e-2]}),
    ],
)
def test_ranges_that_fit(load, key, spec):
    assert load({key: spec}).search.space == {key: spec}


@pytest.mark.parametrize(
    ("key", "spec", "message"),
    [
        ("finetune.optimizer.learing_rate", {"log": [1, 2]}, "Did you mean finetune.optimizer.learning_rate?"),
        ("pretrain.epochz", {"choice": [1]}, "Did you mean pretrain.epochs?"),
        ("experiment.name", {"choice": ["a", "b"]}, "does not change the result"),
        ("search.trials", {"choice": [1]}, "does not change the result"),
        ("finetune.epochs", {}, "found nothing; expected exactly one of"),
        ("finetune.epochs", {"log": [1, 2], "choice": [1]}, "expected exactly one of"),
        ("finetune.epochs", {"log": [1, 2], "step": 1}, "expected exactly one of"),
        ("finetune.epochs", {"uniform": [1, 2]}, "found uniform; expected exactly one of"),
        ("finetune.epochs", {"choice": []}, "expected a list of values"),
        ("finetune.epochs", {"between": [1, 2, 3]}, "expected two numbers"),
        ("finetune.epochs", {"between": [3, "4"]}, "expected two numbers"),
        ("finetune.epochs", {"between": [3, 3]}, "expected low < high"),
        ("finetune.epochs", {"between": [1, 3], "step": 0}, "step: found 0"),
        ("finetune.epochs", {"between": [1, 3], "step": 5}, "step: found 5"),
        ("finetune.augment.rotation", {"log": [0, 20]}, "expected more than 0"),
        ("finetune.epochs", {"between": [0, 3]}, "the value 0 does not fit: finetune.epochs: found 0"),
        ("model.dropout", {"between": [0.1, 1.0]}, "the value 1.0 does not fit: model.dropout: found 1.0"),
        ("model.backbone", {"choice": ["efficientnet_b0", "vgg"]}, "the value 'vgg' does not fit"),
        # A rule over two keys: all of the stage's five epochs cannot be the head's.
        ("finetune.freeze.head_epochs", {"between": [0, 5]}, "the value 5 does not fit: finetune.freeze.head_epochs"),
        ("finetune.epochs", 3, "found 3, expected a section"),
    ],
)
def test_ranges_that_do_not_fit(load, key, spec, message):
    with pytest.raises(ConfigError) as caught:
        load({key: spec})
    assert f"search.space.{key}: " in str(caught.value)
    assert message in str(caught.value)


def test_an_empty_space_is_refused(load):
    with pytest.raises(ConfigError, match=r"search\.space: is empty"):
        load({})


def test_space_and_file_are_told_together_and_only_what_is_new_counts(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "experiment: {name: a}\n"
        "finetune: {data: {source: synthetic_faces}, clip: -1}\n"
        "search:\n  space:\n    finetune.epochs: {between: [1, 4]}\n    model.dropout: {choice: [2]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "line 2: finetune.clip" in lines[1]
    assert "line 6: search.space.model.dropout: the value 2 does not fit" in lines[2]


def test_a_key_of_the_space_is_set_and_removed_by_its_dotted_name(load):
    config = load({"finetune.epochs": {"choice": [1, 2]}, "model.dropout": {"choice": [0.1]}})
    changed = with_overrides(
        config, {"search.space.finetune.epochs": {"choice": [3]}, "search.space.model.dropout": None}
    )
    assert changed.search.space == {"finetune.epochs": {"choice": [3]}}


def test_a_member_of_a_search_need_not_fit_the_space(load):
    config = load({"finetune.freeze.head_epochs": {"choice": [0, 4]}})
    assert with_overrides(config, {"finetune.epochs": 2}).finetune.epochs == 2


CONDITIONAL = {
    "finetune.optimizer.name": {"choice": ["adam", "sgd"]},
    "finetune.optimizer.momentum": {"between": [0.8, 0.99], "when": {"finetune.optimizer.name": ["sgd"]}},
}


def test_a_range_that_hangs_on_a_choice_is_tried_under_it(load):
    """Momentum does not fit adamw, the experiment's own optimiser, nor adam; under sgd it does."""
    assert load(CONDITIONAL).search.space == CONDITIONAL
    with pytest.raises(ConfigError, match=r"the value 0\.8 does not fit"):
        load({**CONDITIONAL, "finetune.optimizer.momentum": {"between": [0.8, 0.99]}})


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"finetune.optimizer.name": ["adam"]}, "does not fit where finetune.optimizer.name is 'adam': finetune.optim"),
        ({"finetune.optimizer.name": ["rmsprop"]}, "finetune.optimizer.name never is 'rmsprop'"),
        ({"finetune.epochs": [5]}, "finetune.epochs is no choice of this space; those are finetune.optimizer.name"),
        ({"finetune.optimizer.name": "sgd"}, "expected {KEY: [values]}"),
        ([], "expected {KEY: [values]}"),
    ],
)
def test_a_condition_that_cannot_be(load, when, message):
    space = {**CONDITIONAL, "finetune.optimizer.momentum": {"between": [0.8, 0.99], "when": when}}
    with pytest.raises(ConfigError) as caught:
        load(space)
    assert "search.space.finetune.optimizer.momentum: " in str(caught.value)
    assert message in str(caught.value)


def test_numbers_that_are_no_floats_are_refused(load):
    for high in (10**400, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="expected two numbers"):
            load({"model.dropout": {"between": [0, high]}})


def test_conditions_in_a_circle_are_refused(load):
    space = {
        "finetune.optimizer.name": {"choice": ["adam", "sgd"], "when": {"finetune.balance": ["none"]}},
        "finetune.balance": {"choice": ["none", "sampler"], "when": {"finetune.optimizer.name": ["adam"]}},
    }
    with pytest.raises(ConfigError, match="form a circle"):
        load(space)
