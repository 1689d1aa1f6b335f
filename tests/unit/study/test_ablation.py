"""What an ablation plans; tests/integration/test_ablation.py runs one."""

import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import ConfigError, DlferError
from dlfer.runs.listeners import RunOptions
from dlfer.runs.records import Cost
from dlfer.study import ablation
from dlfer.study.members import Member, average_seconds

COLUMNS = "epoch,train_loss,train_accuracy,validation_loss,validation_accuracy"

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


@pytest.fixture
def make_equal(tmp_path):
    """Return a function that prepares a member with equal compute, with arms of the given status, and returns it.

    EF-FER1 saw 6,000 images of 64 px. An epoch has 1,000 images of 48 px with EF-FER1, and 250 without it.
    """
    (tmp_path / "a.yaml").write_text(EXPERIMENT)

    def make(without: dict, status: dict[str, str]) -> tuple[bool, Member]:
        keys = {"ablation.equal_compute": True, "finetune.epochs": 4, "ablation.without": without}
        config = load_experiment(tmp_path / "a.yaml", {**keys, "finetune.image_size": 48})
        members = [Member(arm, 0, {}, str(tmp_path / arm), status[arm]) for arm in (ablation.WITH, ablation.WITHOUT)]
        for member, epochs, images in zip(members, (3, 2), (3000, 500), strict=True):
            member.cost = Cost(
                finetune_images=images, pretrain_images=6000 if epochs == 3 else None, pretrain_image_size=64
            )
            history = tmp_path / member.arm / "finetune" / "history.csv"
            history.parent.mkdir(parents=True, exist_ok=True)
            rows = [f"{epoch},0.5,0.5,0.5,0.5" for epoch in range(1, epochs + 1)]
            history.write_text("\n".join([COLUMNS, *rows]) + "\n")
        equal = Member(ablation.EQUAL_COMPUTE, 0, {})
        return ablation._prepare(SimpleNamespace(config=config, members=[*members, equal]), equal), equal

    return make


BOTH_FINISHED = dict.fromkeys((ablation.WITH, ablation.WITHOUT), "finished")


@pytest.mark.parametrize(
    ("without", "images_an_epoch"),
    [({}, 1000), ({"finetune.optimizer.learning_rate": 0.1}, 1000), ({"finetune.data.num_images.train": 250}, 250)],
)
def test_equal_compute_counts_the_images_of_its_own_epochs(make_equal, without, images_an_epoch):
    is_ready, member = make_equal(without, BOTH_FINISHED)
    assert is_ready
    more = math.ceil(6000 * 64**2 / (images_an_epoch * 48**2))
    assert member.overrides == {"pretrain": None, **without, "finetune.epochs": 4 + more}


def test_equal_compute_waits_for_the_arm_without_only_if_that_is_fine_tuned_otherwise(make_equal):
    fewer = {"finetune.data.num_images.train": 250}
    assert make_equal({}, {**BOTH_FINISHED, ablation.WITHOUT: "running"})[0]
    assert not make_equal(fewer, {**BOTH_FINISHED, ablation.WITHOUT: "running"})[0]
    assert not make_equal(fewer, {**BOTH_FINISHED, ablation.WITH: "pending"})[0]
    with pytest.raises(DlferError, match="needs a finished arm 'without EF-FER1', which shows the number of images"):
        make_equal(fewer, {**BOTH_FINISHED, ablation.WITHOUT: "failed"})


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
