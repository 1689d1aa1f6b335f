"""The verdict of an ablation from the files of its members: no training happens here."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from dlfer.config.load import dump_experiment, load_experiment
from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.report.comparison import read_comparison, write_comparison_report
from dlfer.runs.comparison_record import ArmKey, ComparisonRecord
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.run import create_run
from dlfer.study.ablation import WITH, WITHOUT, _conclude, _plan, show_comparison
from dlfer.study.comparison import Comparison
from dlfer.study.runner import StudyConsole

pytestmark = pytest.mark.usefixtures("blank_figures")

EXPERIMENT = """\
experiment: {name: faces}
pretrain: {weights: imagenet}
finetune:
  data: {source: synthetic_faces}
ablation: %s
"""
LABELS = ("Angry", "Happy", "Sad")


def make_predictions(part: str, n: int, accuracy: float, generator: np.random.Generator, majority: bool) -> Predictions:
    targets = np.arange(n) % 4 % 3  # the first class has half of the images
    hit = targets == 0 if majority else generator.random(n) < accuracy
    predicted = np.where(hit, targets, 0 if majority else (targets + 1) % 3)
    probabilities = np.full((n, 3), 0.1)
    probabilities[np.arange(n), predicted] = 0.8
    return Predictions(np.array([f"{part}/{i}" for i in range(n)]), LABELS, targets, probabilities)


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Return a function that makes the files of an ablation and concludes: (arm -> accuracies per seed) -> path, record."""
    monkeypatch.chdir(tmp_path)

    def compare(
        accuracies: dict[str, list[float]],
        *,
        stuck: str = "",
        ablation: str = "{}",
        n: int = 600,
        failed: tuple[str, ...] = (),
    ):
        (tmp_path / "faces.yaml").write_text(EXPERIMENT % ablation)
        config = load_experiment("faces.yaml", {"ablation.seeds": list(range(len(accuracies[WITH])))})
        run = create_run(tmp_path / "runs", config, argv=["ablate", "faces.yaml"], kind="ablation")
        comparison = Comparison(run, config, _plan(config, "small.yaml", smoke=False))
        for number, member in enumerate(comparison.members):
            member_config = member.make_config(config)
            path = tmp_path / "runs" / "faces" / f"member-{number}"
            path.mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng(number)
            parts = {
                part: make_predictions(part, n, accuracies[member.arm][member.seed], generator, stuck == member.title)
                for part in ("train", "validation", "test")
            }
            for part, predictions in parts.items():
                write_predictions(predictions, path / "predictions" / f"{part}.npz")
            (path / "config.yaml").write_text(dump_experiment(member_config))
            cost = {"finetune_seconds": 60.0, "pretrain_seconds": None}
            (path / "run.json").write_text(json.dumps({"cost": cost, "config_digest": "0" * 64, "warnings": []}))
            metrics = compute_metrics_file(
                parts, Metrics(protocol="official", banner=None, selected_on="val", test_opened=0)
            )
            metrics.write(path)
            member.path, member.status = str(path), "finished"
            if member.title in failed:
                member.fail("the loss became nan.")
        comparison.save()
        found = _conclude(comparison)
        found.write(run.path)
        return run.path, found

    return compare


def show(found: ComparisonRecord) -> str:
    text = io.StringIO()
    show_comparison(
        found,
        StudyConsole(Console(file=text, force_terminal=True, color_system="standard", width=400, soft_wrap=True)),
    )
    return text.getvalue()


def test_one_seed_makes_a_statement_about_two_trained_models(compare):
    path, found = compare({WITH: [0.8], WITHOUT: [0.7]})
    (pair,) = found.paired
    assert (pair.scope, pair.num_seeds, pair.not_learned) == ("models", 1, [])
    assert pair.is_significant
    page = write_comparison_report(path).read_text()
    for text in (pair.sentence, page, show(found)):
        assert "The two trained models, with EF-FER1 minus without EF-FER1" in text
        assert "One seed each does not show whether with EF-FER1 is better or worse" in text
    assert any("One seed in each arm" in note for note in found.notes)


def test_several_seeds_make_a_statement_about_the_recipes(compare):
    path, found = compare({WITH: [0.8, 0.81, 0.8], WITHOUT: [0.7, 0.71, 0.7]})
    (pair,) = found.paired
    assert (pair.scope, pair.num_seeds) == ("recipes", 3)
    assert pair.is_significant
    assert "trained models" not in pair.sentence
    row = found.table[0].test
    assert row.low < row.value < row.high
    # Three seeds: wider than the interval over images of 3 x 600 independent answers.
    assert row.high - row.low > 2 * 1.96 * np.sqrt(0.8 * 0.2 / 1800)
    assert pair.sentence.replace("'", "&#39;") in write_comparison_report(path).read_text()


def test_members_that_did_not_finish_are_named_and_the_means_are_over_other_seeds(compare):
    _, found = compare({WITH: [0.8, 0.81, 0.8], WITHOUT: [0.7, 0.71, 0.7]}, failed=("without EF-FER1, seed 1",))
    (left,) = found.unfinished
    assert (left.arm, left.seed, left.status, left.error) == (WITHOUT, 1, "failed", "the loss became nan.")
    assert "Not in the table: 1 failed of 6 members." in found.notes
    assert any(note.startswith("The arms differ in which of their seeds finished") for note in found.notes)
    assert not any("One seed" in note for note in found.notes)


def test_one_common_seed_beside_several_of_an_arm_is_a_statement_about_two_trained_models(compare):
    failed = ("without EF-FER1, seed 1", "without EF-FER1, seed 2")
    _, found = compare({WITH: [0.8, 0.81, 0.8], WITHOUT: [0.7, 0.71, 0.7]}, failed=failed)
    assert found.paired[0].num_seeds == 1
    assert any(note.startswith("One seed only of without EF-FER1: the interval is over images") for note in found.notes)
    assert any(
        note.startswith(
            "One seed in common of with EF-FER1 and without EF-FER1: the difference is that of two trained models"
        )
        for note in found.notes
    )


def test_an_ablation_of_which_nothing_finished_lists_its_members(compare):
    titles = (f"{WITH}, seed 0", f"{WITHOUT}, seed 0")
    _, found = compare({WITH: [0.8], WITHOUT: [0.7]}, failed=titles)
    assert (found.notes, len(found.unfinished)) == (["No member finished."], 2)


def test_an_arm_that_did_not_learn_supports_no_conclusion(compare):
    path, found = compare({WITH: [0.8, 0.8], WITHOUT: [0.7, 0.7]}, stuck="without EF-FER1, seed 1")
    (pair,) = found.paired
    assert not pair.is_significant
    assert len(pair.not_learned) == 1
    assert pair.not_learned[0].startswith("without EF-FER1, seed 1: its accuracy on 600 training images is 50.0 %")
    assert pair.sentence.startswith("No conclusion about with EF-FER1 and without EF-FER1")
    for hint in ("learning_rate", "epochs", "initialisation"):
        assert hint in pair.sentence
    page = write_comparison_report(path).read_text()
    assert 'class="verdict failed" role="alert">No conclusion' in page
    assert "significant difference" not in page
    printed = show(found)
    assert "\x1b[1;31mNo conclusion" in printed
    assert "significant difference" not in printed


def test_the_arm_with_ef_fer1_is_judged_alike(compare):
    _, found = compare({WITH: [0.8], WITHOUT: [0.7]}, stuck="with EF-FER1, seed 0")
    assert found.paired[0].not_learned[0].startswith("with EF-FER1, seed 0: ")


def test_arms_may_have_keys_of_their_own_and_the_report_lists_them(compare):
    ablation = "{with: {finetune.epochs: 7}, without: {finetune.optimizer.learning_rate: 4e-3}}"
    path, found = compare({WITH: [0.8], WITHOUT: [0.7]}, ablation=ablation)
    assert found.arm_keys == [
        ArmKey(key="pretrain", values={WITH: "imagenet", WITHOUT: None}),
        ArmKey(key="finetune.epochs", values={WITH: 7, WITHOUT: 30}),
        ArmKey(key="finetune.optimizer.learning_rate", values={WITH: 1e-3, WITHOUT: 4e-3}),
    ]
    assert any("finetune.optimizer.learning_rate" in note for note in found.notes)
    page = write_comparison_report(path).read_text()
    assert "How the arms differ" in page
    assert "<code>finetune.optimizer.learning_rate</code>" in page
    assert "0.004" in page
    assert '<td class="text">null</td>' in page
    assert "None" not in page


def test_a_shared_recipe_names_the_fair_form(compare):
    _, found = compare({WITH: [0.8], WITHOUT: [0.7]})
    assert found.arm_keys == [ArmKey(key="pretrain", values={WITH: "imagenet", WITHOUT: None})]
    (note,) = [note for note in found.notes if "share one recipe" in note]
    assert "dlfer search FILE --ablation" in note


def test_a_record_of_an_earlier_version_says_what_it_can(compare):
    path, found = compare({WITH: [0.8], WITHOUT: [0.7]})
    old = found.as_json()
    del old["arm_keys"], old["paired"][0]["scope"], old["paired"][0]["not_learned"]
    old["paired"][0] |= {"sentence": "told apart at n = 600", "is_larger_than_chance": True}
    del old["paired"][0]["is_significant"]
    (path / "comparison.json").write_text(json.dumps(old))
    page = write_comparison_report(path).read_text()
    assert "The two trained models" in page
    assert "told apart" not in page
    assert read_comparison(path).paired[0].is_significant
    old["paired"][0] |= {"num_seeds": 3, "sentence": "old words"}
    (path / "comparison.json").write_text(json.dumps(old))
    page = write_comparison_report(path).read_text()
    assert "old words" in page
    assert "earlier version of dlfer, and too narrow" in page


def test_seeds_default_to_three(tmp_path):
    (tmp_path / "faces.yaml").write_text(EXPERIMENT.replace("ablation: %s\n", ""))
    assert load_experiment(tmp_path / "faces.yaml").ablation.seeds == (0, 1, 2)
