"""Every shipped experiment: it has the head that a reader needs, is valid, and runs with --smoke."""

import json
import re

import pytest

from dlfer.config.keys import build_schema
from dlfer.config.load import load_experiment, parse_override
from dlfer.experiment import limits
from tests.integration.conftest import ROOT, dlfer

FILES = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_file_says_purpose_command_cost_and_what_to_expect(file):
    head = file.read_text().partition("\nexperiment:")[0]
    for word in ("# Purpose", "# Command", "# Cost", "# Expect"):
        assert word in head, word
    config = load_experiment(file)
    assert config.experiment.name == file.stem
    assert config.expected.result
    assert config.expected.cost


def test_the_variant_of_the_hybrid_with_weights_of_its_branches_can_be_checked(monkeypatch):
    monkeypatch.setattr(limits, "find_network_problem", lambda: "no network")
    monkeypatch.setattr(limits, "_is_downloaded", lambda name: False)
    file = ROOT / "experiments" / "hybrid.yaml"
    override = re.search(r"--set '(pretrain=[^']*)'", file.read_text())[1]
    found = limits.find_obstacles(load_experiment(file, dict([parse_override(override)])))
    assert any("the ImageNet weights of resnet50 cannot be downloaded" in line for line in found)
    assert any(line.startswith("pretrain.weights of branch2_resnet34: ") for line in found)


@pytest.mark.parametrize("name", ["dlfer_paper", "backbones", "backbones_cv", "hybrid", "ensemble"])
def test_files_of_papers_that_name_no_clipping_have_none(name):
    config = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    trained = [stage for stage in (config.pretrain, config.finetune) if stage is not None and stage.data is not None]
    assert [stage.clip for stage in trained] == [None] * len(trained)


def test_files_of_papers_that_divide_pixels_by_255_do_nothing_else_to_them():
    for name in ("dlfer_paper", "ensemble"):
        assert load_experiment(ROOT / "experiments" / f"{name}.yaml").model.pixel_scaling == "divide_by_255"


def test_the_ensemble_decays_weights_as_its_source_does():
    optimizer = load_experiment(ROOT / "experiments" / "ensemble.yaml").finetune.optimizer
    found = (optimizer.weight_decay, optimizer.weight_decay_kind, optimizer.weight_decay_scope)
    assert found == (5e-4, "l2", "all")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_smoke_needs_no_data_and_says_what_it_replaced(file, tmp_path):
    is_folded = load_experiment(file).finetune.data.protocol == "cross_validation"
    fold = ("--set", "finetune.data.fold=1") if is_folded else ()
    done = dlfer("run", file, "--smoke", *fold, "--out", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = next((tmp_path / "runs").glob("*/*/run.json")).parent
    record = json.loads((run / "run.json").read_text())
    assert record["smoke"] is True
    metrics = json.loads((run / "metrics.json").read_text())
    assert "Smoke run" in metrics["banner"]
    page = (run / "report.html").read_text()
    assert "Smoke run" in page
    config = load_experiment(file)
    pretrain = config.pretrain
    replaced = [data for data in (config.finetune.data, pretrain and pretrain.data) if data and data.path]
    for warning in record["warnings"]:
        assert warning.split(":")[0] in page
    assert len([w for w in record["warnings"] if "was replaced" in w]) == len(replaced)
    assert ("random weights" in " ".join(record["warnings"])) == bool(pretrain and pretrain.weights)


def test_the_demo_has_seeds_and_test_images_enough_for_a_statement():
    """Of two seeds Student's t asks for 12.7 standard errors; at n = 1,000 half an interval is 3 percentage points."""
    config = load_experiment(ROOT / "experiments" / "quickstart.yaml")
    assert len(config.ablation.seeds) >= 3
    assert config.finetune.data.num_images.test >= 1000


def test_the_schema_for_editors_is_the_one_of_the_code():
    """Written by: dlfer show schema --json > experiments/schema.json"""
    assert json.loads((ROOT / "experiments" / "schema.json").read_text()) == build_schema()
    assert all("$schema=schema.json" in file.read_text().splitlines()[0] for file in FILES)


@pytest.mark.slow
def test_dry_run_prints_derived_numbers_and_leaves_nothing(tmp_path):
    done = dlfer("run", ROOT / "experiments" / "quickstart.yaml", "--smoke", "--dry-run", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    for word in ("steps an epoch", "parameters", "rate", "expected memory"):
        assert word in done.stderr + done.stdout
    assert not (tmp_path / "runs").exists()
