"""KerasTuner's four engines and Optuna behind the same questions."""

from __future__ import annotations

import json

import pytest

from dlfer.config.load import with_overrides
from dlfer.errors import ConfigError

GRID = {
    "finetune.optimizer.name": {"choice": ["adam", "sgd"]},
    "finetune.optimizer.momentum": {"choice": [0.8, 0.9], "when": {"finetune.optimizer.name": ["sgd"]}},
    "finetune.optimizer.learning_rate": {"choice": [1e-4, 1e-3, 1e-2]},
}


def as_text(proposals):
    return [json.dumps([p.settings, p.epochs], sort_keys=True) for p in proposals]


@pytest.mark.parametrize("engine", ["random", "bayesian", "hyperband", "grid", "optuna"])
def test_a_search_that_is_opened_again_each_time_goes_on(engine, make_config, play, tmp_path):
    """As if the process were killed after every trial; a failure in between changes nothing."""
    space = {"space": GRID} if engine == "grid" else {}
    proposals, last = play(tmp_path / "e", make_config(engine, **space), reopen=True, failing=(2,))
    assert len(proposals) == last.count_trials() == {"hyperband": 23, "grid": 9}.get(engine, 10)
    assert len(set(as_text(proposals))) == len(proposals)
    records = last.list_records()
    assert [record.settings for record in records] == [p.settings for p in proposals]
    assert [record.status for record in records][1] == "failed"
    assert records[2].score is not None


@pytest.mark.parametrize("engine", ["random", "hyperband", "optuna"])
def test_opening_again_does_not_change_what_is_proposed(engine, make_config, play, tmp_path):
    whole, _ = play(tmp_path / "a", make_config(engine))
    parts, _ = play(tmp_path / "b", make_config(engine), reopen=True)
    assert as_text(parts) == as_text(whole)


@pytest.mark.parametrize("engine", ["random", "grid", "optuna"])
def test_a_trial_that_was_interrupted_comes_first(engine, make_config, tmp_path, open_engine):
    config = make_config(engine)
    first = open_engine(tmp_path, config, trials=4).ask("w.0").proposal
    again = open_engine(tmp_path, config, trials=4)
    assert [record.status for record in again.list_records()] == ["waiting"]
    assert again.ask("other.0").proposal.settings == first.settings
    assert [record.status for record in again.list_records()] == ["running"]


def test_a_trial_that_ended_just_before_a_kill_is_not_run_again(make_config, tmp_path, open_engine, make_row):
    """KerasTuner itself stores it as going on until the next one begins."""
    config = make_config()
    engine = open_engine(tmp_path, config, trials=4)
    first = engine.ask("w.0").proposal
    engine.tell(make_row(first, "finished", 0.5))
    assert open_engine(tmp_path, config, trials=4).ask("w.1").proposal.trial != first.trial


@pytest.mark.parametrize("engine", ["random", "optuna"])
def test_seeds_decide_and_zero_is_one_of_them(engine, make_config, play, tmp_path):
    runs = {
        name: as_text(play(tmp_path / name, make_config(engine, seed=seed), trials=3)[0])
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert runs["a"] == runs["b"] != runs["c"]


@pytest.mark.parametrize("engine", ["random", "bayesian", "hyperband", "optuna"])
def test_values_fit_the_space(engine, make_config, play, tmp_path):
    proposals, _ = play(tmp_path, make_config(engine))
    for proposal in proposals:
        keys = proposal.settings
        assert 1e-4 <= keys["finetune.optimizer.learning_rate"] <= 1e-2
        assert keys["finetune.batch_size"] in (8, 16, 24, 32)
        assert keys["finetune.early_stopping"] in (None, {"patience": 3})
        assert ("finetune.optimizer.momentum" in keys) == (keys["finetune.optimizer.name"] == "sgd")
    assert {p.settings["finetune.optimizer.name"] for p in proposals} == {"adam", "sgd"}


def test_a_grid_has_every_cell_once(make_config, play, tmp_path):
    proposals, _ = play(tmp_path, make_config("grid", space=GRID))
    cells = {tuple(p.settings.get(key) for key in GRID) for p in proposals}
    rates = (1e-4, 1e-3, 1e-2)
    assert cells == {("adam", None, rate) for rate in rates} | {
        ("sgd", momentum, rate) for momentum in (0.8, 0.9) for rate in rates
    }
    assert len(proposals) == 9


def test_the_longer_rungs_of_hyperband_take_the_best_of_the_shorter(make_config, play, score, tmp_path):
    proposals, _ = play(tmp_path, make_config("hyperband"))
    rungs = [p for p in proposals if p.epochs == 1]
    promoted = [p for p in proposals[len(rungs) :] if p.epochs == 3][:3]
    best = sorted(rungs, key=lambda p: -score(p.settings))[:3]
    assert sorted(as_text(promoted)) == sorted(t.replace(", 1]", ", 3]") for t in as_text(best))
    # The last rung is a whole run.
    assert proposals[12].epochs is None
    assert proposals[12].settings == best[0].settings


def test_the_epochs_of_a_search_are_those_that_its_rungs_train(make_config, play, tmp_path, open_engine):
    proposals, engine = play(tmp_path, make_config("hyperband"))
    longest = {}
    for proposal in proposals:
        key = json.dumps(proposal.settings)
        longest[key] = max(longest.get(key, 0), proposal.epochs or 9)
    assert engine.count_epochs() == sum(longest.values())
    for other in ("random", "optuna"):
        assert open_engine(tmp_path / other, make_config(other)).count_epochs() is None
    assert open_engine(tmp_path / "few", make_config("hyperband"), trials=5).count_epochs() is None


def test_hyperband_ends_a_trial_after_its_rung_and_not_before(make_config, tmp_path, open_engine):
    engine = open_engine(tmp_path, make_config("hyperband"))
    proposal = engine.ask("w").proposal
    assert proposal.epochs == 1
    assert not engine.report(proposal, 1, 0.5)


def test_a_failure_takes_no_promotion_away_from_its_bracket(make_config, play, tmp_path):
    proposals, _ = play(tmp_path, make_config("hyperband"), failing=(1, 2, 3, 4))
    assert sum(p.epochs == 3 for p in proposals[:12]) == 3


@pytest.mark.slow
def test_bayes_goes_where_the_score_is_high(make_config, play, tmp_path):
    space = {"finetune.optimizer.learning_rate": {"log": [1e-5, 1e-1]}}
    proposals, _ = play(tmp_path, make_config("bayesian", space=space), trials=9)
    late = [p.settings["finetune.optimizer.learning_rate"] for p in proposals[5:]]
    assert any(2e-4 < rate < 5e-3 for rate in late)


def test_a_loss_is_minimised(make_config, tmp_path, open_engine, make_row):
    """KerasTuner promotes the smallest."""
    engine = open_engine(tmp_path, with_overrides(make_config("hyperband", objective="loss"), {"finetune.epochs": 3}))
    told = {}
    while True:
        proposal = engine.ask(f"w.{len(told)}").proposal
        if proposal.epochs is None:
            break
        told[json.dumps(proposal.settings)] = len(told)
        engine.tell(make_row(proposal, "rung", float(len(told))))
    assert told[json.dumps(proposal.settings)] == 0


def test_the_median_pruner_ends_what_is_worse(make_config, tmp_path, open_engine, make_row):
    engine = open_engine(tmp_path, make_config("optuna"), trials=8)
    for number in range(6):
        proposal = engine.ask(f"w.{number}").proposal
        assert engine.report(proposal, 1, 0.5 + number / 100)
        engine.tell(make_row(proposal, "finished", 0.5))
    proposal = engine.ask("w.6").proposal
    assert not engine.report(proposal, 1, 0.1)
    engine.tell(make_row(proposal, "pruned", 0.1))
    assert engine.list_records()[-1].status == "pruned"
    # Told again after a resume, an epoch is no error, and the last one is never cut.
    proposal = engine.ask("w.7").proposal
    assert engine.report(proposal, 1, 0.9)
    assert engine.report(proposal, 1, 0.9)
    assert engine.report(proposal, 9, 0.0)


def test_hyperband_refuses_to_search_the_epochs(make_config, tmp_path, open_engine):
    config = make_config("hyperband", space={"finetune.epochs": {"between": [1, 9]}})
    with pytest.raises(ConfigError, match="hyperband chooses the epochs"):
        open_engine(tmp_path, config)
