"""What an ablation plans; tests/integration/test_ablation.py runs one."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest

from dlfer.errors import ConfigError
from dlfer.runs.listeners import RunOptions
from dlfer.runs.records import Cost
from dlfer.study import ablation
from dlfer.study.members import average_seconds

EXPERIMENT = """
experiment: {name: tiny}
pretrain: {data: {source: synthetic_scenes}}
finetune: {data: {source: synthetic_faces}}
"""


@pytest.fixture
def list_members(tmp_path, monkeypatch, capsys):
    """Return the members of a dry run, as (arm, seed); no network is built for it."""
    monkeypatch.setattr("dlfer.experiment.run.explain_experiment", lambda config, session: None)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)

    def run(seeds=None, **given) -> list[tuple[str, str]]:
        ablation.ABLATION.start(tmp_path / "tiny.yaml", RunOptions(dry_run=True, **given), seeds=seeds)
        lines = re.findall(r"^member \d+: (.*)$", capsys.readouterr().err, flags=re.MULTILINE)
        return [tuple(line.rsplit(", seed ", 1)) for line in lines]

    return run


def test_equal_compute_of_an_ensemble_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "a.yaml").write_text(EXPERIMENT)
    keys = {
        "model.family": "ensemble",
        "ablation.equal_compute": True,
        "ensemble": {"members": [{"name": "a", "set": {}}, {"name": "b", "set": {"model.dropout": 0.1}}]},
    }
    with pytest.raises(ConfigError, match="what EF-FER1 cost the members of an ensemble is not added up"):
        ablation.ABLATION.start(tmp_path / "a.yaml", RunOptions(dry_run=True, overrides=keys))


@pytest.mark.parametrize(
    ("member", "seeds", "message"),
    [
        (
            {"set": {"experiment.seed": 1}},
            [0, 1],
            "sets experiment.seed, so that it would be the same with each of the 2 seeds",
        ),
        (
            {"set": {"pretrain.epochs": 3}},
            [0],
            "sets pretrain.epochs, so that it would have EF-FER1 in the arm without",
        ),
        ({"model": "lite2_96"}, [0, 1], "which is trained already, so that it would be the same"),
        ({"model": "lite2_96"}, [0], "is lite2_96, so that it would have EF-FER1 in the arm without"),
    ],
)
def test_members_of_an_ensemble_may_not_keep_what_the_study_varies(tmp_path, member, seeds, message):
    (tmp_path / "a.yaml").write_text(EXPERIMENT)
    keys = {"model.family": "ensemble", "ensemble": {"members": [{"name": "a", "set": {}}, {"name": "b", **member}]}}
    with pytest.raises(ConfigError, match=message):
        ablation.ABLATION.start(tmp_path / "a.yaml", RunOptions(dry_run=True, overrides=keys), seeds=seeds)


def test_seconds_are_averaged_where_members_know_them():
    members = [SimpleNamespace(cost=Cost(finetune_seconds=seconds)) for seconds in (2.0, None, 4.0)]
    assert average_seconds(members) == 3.0
    assert average_seconds(members[1:2]) is None


def test_by_default_each_arm_has_seeds_enough_for_a_statement_about_the_recipe(list_members):
    """Student's t of two seeds has one degree of freedom: 12.7 standard errors; of three 4.3."""
    members = list_members()
    assert Counter(arm for arm, _ in members) == {ablation.WITH: 3, ablation.WITHOUT: 3}
    assert len(set(members)) == 6


def test_a_smoke_run_and_the_command_line_have_seeds_of_their_own(list_members):
    assert list_members(smoke=True) == [(ablation.WITH, "0"), (ablation.WITHOUT, "0")]
    assert {seed for _, seed in list_members(seeds=[4, 7])} == {"4", "7"}
