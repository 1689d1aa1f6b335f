"""What an ablation plans; tests/integration/test_ablation.py runs one."""

import re
from collections import Counter

import pytest

from dlfer.runs.listeners import RunOptions
from dlfer.study import ablation

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


def test_by_default_each_arm_has_seeds_enough_for_a_statement_about_the_recipe(list_members):
    """Student's t of two seeds has one degree of freedom: 12.7 standard errors; of three 4.3."""
    members = list_members()
    assert Counter(arm for arm, _ in members) == {ablation.WITH: 3, ablation.WITHOUT: 3}
    assert len(set(members)) == 6


def test_a_smoke_run_and_the_command_line_have_seeds_of_their_own(list_members):
    assert list_members(smoke=True) == [(ablation.WITH, "0"), (ablation.WITHOUT, "0")]
    assert {seed for _, seed in list_members(seeds=[4, 7])} == {"4", "7"}
