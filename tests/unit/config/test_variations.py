"""The cells of a sweep and what search.space may say: combinations, names, keys that fall away, and what the schema refuses."""

from __future__ import annotations

import pytest

from dlfer.config.load import compute_digest, load_experiment, with_overrides
from dlfer.config.variations import list_cells
from dlfer.errors import ConfigError

SMALL = """\
experiment: {name: a}
pretrain: {weights: imagenet}
finetune:
  data: {source: synthetic_faces}
"""
BACKBONES = """\
sweep:
  grid:
    backbone:
      b0: {model.backbone: efficientnet_b0, finetune.image_size: 224, pretrain.image_size: 224}
      b3: {model.backbone: efficientnet_b3, finetune.image_size: 300, pretrain.image_size: 300}
    optimizer:
      adam: {finetune.optimizer.name: adam, finetune.optimizer.learning_rate: 0.001}
      sgd: {finetune.optimizer.name: sgd, finetune.optimizer.learning_rate: 0.01}
    finetune.batch_size: [16, 32]
    finetune.balance: [none, sampler]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "a.yaml").write_text(SMALL + text)
        return "a.yaml"

    return write


def list_names(file: str, **overrides) -> list[str]:
    return [cell.name for cell in list_cells(load_experiment(file, overrides))]


def find_problems(file: str, overrides: dict | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_bundles_and_lists_are_combined_with_what_belongs_together(write):
    config = load_experiment(write(BACKBONES))
    cells = list_cells(config)
    assert len(cells) == 2 * 2 * 2 * 2
    assert cells[0].name == "b0, adam, batch_size=16, balance=none"
    assert cells[-1].name == "b3, sgd, batch_size=32, balance=sampler"
    assert cells[-1].settings == {
        "backbone": "b3",
        "optimizer": "sgd",
        "finetune.batch_size": "32",
        "finetune.balance": "sampler",
    }
    rates = {}
    for cell in cells:
        made = with_overrides(config, cell.overrides)
        rates.setdefault(made.finetune.optimizer.name, set()).add(made.finetune.optimizer.learning_rate)
        assert made.finetune.image_size == {"efficientnet_b0": 224, "efficientnet_b3": 300}[made.model.backbone]
    assert rates == {"adam": {0.001}, "sgd": {0.01}}
    assert len({compute_digest(with_overrides(config, cell.overrides)) for cell in cells}) == 16


def test_an_ablation_is_a_sweep_of_two(write):
    file = write("sweep: {grid: {ef_fer1: {with EF-FER1: {}, without EF-FER1: {pretrain: null}}}}\n")
    config = load_experiment(file)
    assert list_names(file) == ["with EF-FER1", "without EF-FER1"]
    assert [with_overrides(config, c.overrides).pretrain is None for c in list_cells(config)] == [False, True]


def test_keys_below_a_section_that_a_cell_removes_fall_away_and_equal_cells_are_one(write):
    text = "sweep: {grid: {pretrain.epochs: [1, 2], ef_fer1: {with: {}, without: {pretrain: null}}}}\n"
    assert list_names(write(text)) == ["epochs=1, with", "without", "epochs=2, with"]


def test_without_ef_fer1_its_keys_fall_away(write):
    config = load_experiment(write(BACKBONES), {"pretrain": None})
    assert all(not key.startswith("pretrain") for cell in list_cells(config) for key in cell.overrides)
    assert len(list_cells(config)) == 16
    assert with_overrides(config, list_cells(config)[0].overrides).pretrain is None


def test_a_section_is_set_before_what_stands_in_it(write):
    text = "sweep: {grid: {finetune.optimizer.learning_rate: [0.1, 0.2], finetune.optimizer: [{name: sgd}]}}\n"
    config = load_experiment(write(text))
    made = [with_overrides(config, cell.overrides).finetune.optimizer for cell in list_cells(config)]
    assert [(optimizer.name, optimizer.learning_rate) for optimizer in made] == [("sgd", 0.1), ("sgd", 0.2)]


def test_names_are_as_short_as_they_can_be(write):
    text = "sweep: {grid: {finetune.epochs: [1, 2], pretrain.epochs: [1], model.dropout: [0.5]}}\n"
    assert list_names(write(text))[0] == "finetune.epochs=1, pretrain.epochs=1, dropout=0.5"


def test_named_cells_stand_beside_the_grid_and_keys_can_be_set_from_the_command(write):
    file = write("sweep: {cells: {long: {finetune.epochs: 60}, short: {finetune.epochs: 6}}}\n")
    assert list_names(file) == ["long", "short"]
    assert list_names(file, **{"sweep.grid.model.dropout": [0.1]}) == ["dropout=0.1", "long", "short"]
    assert list_cells(load_experiment(write(""))) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "{grid: {finetune.batch_sise: [1, 2]}}",
            "finetune.batch_sise: there is no such key. Did you mean finetune.batch",
        ),
        (
            "{grid: {o: {a: {finetune.optimizer.nam: sgd}}}}",
            "o.a.finetune.optimizer.nam: there is no such key. Did you",
        ),
        (
            "{cells: {a: {model.dropuot: 0.1}}}",
            "cells.a.model.dropuot: there is no such key. Did you mean model.dropout?",
        ),
        (
            "{grid: {finetune.balance: [none, smapler]}}",
            'the value smapler does not fit: finetune.balance: found "smapler"',
        ),
        ("{grid: {model.dropout: 0.3}}", "model.dropout: found 0.3, expected a list of values, or named bundles"),
        ("{grid: {o: {a: 3}}}", "expected a list of values, or named bundles"),
        ("{grid: {model.dropout: []}}", "found an empty list"),
        ("{grid: {model.dropout: [0.1, 0.1]}}", "found 0.1 twice"),
        ("{grid: {model.dropout: [0.1]}}", "found one cell, dropout=0.1; expected two or more"),
        ("{}", "found no cell; expected two or more"),
        ("{grid: {experiment.seed: [1, 2]}}", "list the seeds in sweep.seeds"),
        ("{grid: {experiment.name: [a, b]}}", "does not change the result of a run"),
        ("{grid: {a: {x: {model.dropout: 0.1}}, model.dropout: [0.2]}}", "sets model.dropout, as a does"),
        (
            "{grid: {model.dropout: [0.1, 0.2]}, reference: c}",
            "there is no cell 'c'; the cells: dropout=0.1; dropout=0.2.",
        ),
        ("{cells: {a: {}, b: {model.dropout: 0.3}}}", "the cells 'a' and 'b' are the same experiment"),
        ("{grid: {model.dropout: [0.1, 0.2]}, cells: {dropout=0.1: {}}}", "two cells are called 'dropout=0.1'"),
        ("{grid: {model.dropout: [0.1, 0.2]}, seeds: []}", "sweep.seeds: found [], expected a list of at least 1 item"),
        ("{grid: {model.dropout: [0.1, 0.2]}, rank_by: test}", "sweep.rank_by: found"),
        (
            "{grid: {model.dropout: [0.1, 0.2], finetune.batch_size: [1, 2]}, best_of: [model.dropuot]}",
            "best_of: sweep.grid has no axis 'model.dropuot'; the axes: model.dropout, finetune.batch_size. "
            "Did you mean model.dropout?",
        ),
        (
            "{grid: {finetune.batch_size: [1, 2], backbone: {b0: {}}}, best_of: [batch_sizes]}",
            "Did you mean finetune.batch_size?",
        ),
        ("{grid: {model.dropout: [0.1, 0.2]}, best_of: [xyz]}", "no axis 'xyz'; the axes: model.dropout."),
        ("{cells: {a: {}, b: {model.dropout: 0.3}}, best_of: [b]}", "sweep.grid has no axis 'b'; it is empty."),
        ("{grid: {model.dropout: [0.1, 0.2]}, best_of: [model.dropout, model.dropout]}", "model.dropout twice"),
        ("{grid: {model.dropout: [0.1, 0.2]}, best_of: model.dropout}", "sweep.best_of: found"),
        (
            "{grid: {o: {a: {finetune.optimizer.name: sgd, finetune.optimizer.beta_1: 0.1}, b: {}}}}",
            "o.a.finetune.optimizer.beta_1: does not fit: finetune.optimizer.beta_1: sgd has none",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(write, text, expected):
    problems = find_problems(write(f"sweep: {text}\n"))
    assert len(problems) == 1
    assert problems[0].startswith("a.yaml line 5: sweep")
    assert expected in problems[0]


def test_a_grid_that_would_never_end_is_refused(write):
    grid = {"model.dropout": [i / 100 for i in range(90)], "finetune.epochs": list(range(1, 13))}
    assert "gives 1,080 cells, expected at most 1,000" in find_problems(write(""), {"sweep.grid": grid})[0]


def test_a_run_reads_its_file_back_whatever_the_sweep_says_of_other_cells(write):
    """A member's own value need not fit every other cell: its file is not checked again as a sweep."""
    config = load_experiment(write("sweep: {grid: {finetune.freeze.head_epochs: [0, 3]}}\n"))
    made = with_overrides(config, {"finetune.epochs": 2})
    assert made.sweep == config.sweep
    assert compute_digest(made) == compute_digest(with_overrides(made, {"sweep": None}))


def test_arms_of_an_ablation_may_have_keys_of_their_own(write):
    config = load_experiment(write("ablation: {with: {finetune.epochs: 7}, without: {finetune.clip: 2.0}}\n"))
    assert config.ablation.with_keys == {"finetune.epochs": 7}
    assert config.ablation.without == {"finetune.clip": 2.0}
    assert config.model_dump(mode="json")["ablation"]["with"] == {"finetune.epochs": 7}
    # They change no single run.
    assert compute_digest(config) == compute_digest(load_experiment(write("")))


def test_a_key_of_one_arm_can_be_set_on_the_way(write):
    config = load_experiment(write(""), {"ablation.without.finetune.optimizer.learning_rate": 4e-3})
    assert config.ablation.without == {"finetune.optimizer.learning_rate": 4e-3}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("without: {finetune.optimizer.learning_rat: 1}", "Did you mean finetune.optimizer.learning_rate?"),
        ("without: {pretrain.epochs: 3}", "ablation.without.pretrain.epochs: the arms differ by EF-FER1"),
        ("without: {pretrain: null}", "ablation.without.pretrain: the arms differ by EF-FER1"),
        ("with: {experiment.seed: 3}", "ablation.with.experiment.seed: list the seeds in ablation.seeds"),
        ("with: {experiment.name: b}", "does not change the result of a run"),
        ("with: {finetune.batch_size: 0}", "ablation.with.finetune.batch_size: does not fit: finetune.batch_size"),
        ("without: {model.family: boosted}", "ablation.without: does not fit: boosting"),
        ("with: {pretrain.epochs: 0}", "ablation.with.pretrain.epochs: does not fit"),
    ],
)
def test_a_wrong_key_of_an_arm_is_named_where_it_is(write, keys, text):
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(f"ablation: {{{keys}}}\n"))
    assert text in str(caught.value)


def test_all_wrong_keys_of_both_arms_come_together(write):
    with pytest.raises(ConfigError) as caught:
        load_experiment(write("ablation: {with: {a.b: 1, finetune.epochs: 0}, without: {c: 2}}\n"))
    assert "3 problems" in str(caught.value)


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
        ("finetune.batch_size", {"choice": [16, 32, 16]}, "found 16 twice, expected different values"),
        ("finetune.optimizer", {"choice": [{"name": "sgd"}, {"name": "sgd"}]}, "twice, expected different values"),
        ("experiment.seed", {"choice": [0, 1]}, "a search over seeds finds the luckiest one"),
        ("finetune.data.seed", {"choice": [0, 1]}, "ranked on different validation images"),
        ("finetune.data", {"choice": [{"source": "synthetic_faces"}]}, "ranked on different validation images"),
        ("finetune.data.labels.drop", {"choice": [[], ["Sad"]]}, "ranked on different validation images"),
        ("finetune.epochs", {"between": [1, 2, 3]}, "expected two numbers"),
        ("finetune.epochs", {"between": [3, "4"]}, "expected two numbers"),
        ("finetune.epochs", {"between": [3, 3]}, "expected low < high"),
        ("finetune.epochs", {"between": [1, 3], "step": 0}, "step: found 0"),
        ("finetune.epochs", {"between": [1, 3], "step": 5}, "step: found 5"),
        ("finetune.epochs", {"between": [1, 3], "step": 0.5}, "step: found 0.5, expected a whole number"),
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
