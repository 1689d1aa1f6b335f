from __future__ import annotations

import json

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.metrics.confidence import apply_temperature
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_group_scores, compute_metrics_file, compute_scores, read_attributes
from dlfer.report.headline import build_headline
from dlfer.report.terminal import format_metrics
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.records import DuplicatesRecord

FIGURES = [
    *("accuracy", "macro_f1", "macro_precision", "macro_recall", "macro_specificity"),
    *("macro_auc", "weighted_f1", "weighted_precision", "weighted_recall", "log_loss"),
    *("balanced_accuracy", "mcc", "cohen_kappa", "one_vs_rest_accuracy", "macro_average_precision"),
]

PER_CLASS = ("precision", "recall", "f1", "specificity", "auc", "average_precision", "one_vs_rest_accuracy")


def make(n=120, seed=0, prefix="test", num_classes=3, targets=None) -> Predictions:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, num_classes, n) if targets is None else np.asarray(targets)
    logits = generator.normal(size=(len(targets), num_classes))
    logits[np.arange(len(targets)), targets] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = [f"{prefix}/{i}" for i in range(len(targets))]
    return Predictions(ids, tuple("abcdefg"[:num_classes]), targets, probabilities)


def test_every_figure_lies_in_its_interval():
    scores = compute_scores(make()).as_json()
    assert scores["n"] == 120
    assert scores["labels"] == ["a", "b", "c"]
    for name in FIGURES:
        figure = scores[name]
        assert figure["low"] < figure["value"] < figure["high"], name
    assert scores["weighted_recall"]["value"] == pytest.approx(scores["accuracy"]["value"])
    for label, figures in scores["per_class"].items():
        assert set(figures) == {"n", *PER_CLASS, "intervals"}, label
        for name, (low, high) in figures["intervals"].items():
            assert low < figures[name] < high
    assert np.array(scores["confusion"]).sum() == 120
    assert [sum(row) for row in scores["confusion"]] == [figures["n"] for figures in scores["per_class"].values()]


def test_the_figures_are_those_of_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    p = make(seed=4)
    scores = compute_scores(p).as_json()
    assert scores["macro_auc"]["value"] == pytest.approx(
        sklearn_metrics.roc_auc_score(p.targets, p.probabilities.astype(float), multi_class="ovr"), abs=1e-6
    )
    report = sklearn_metrics.classification_report(p.targets, p.predicted, output_dict=True, zero_division=0)
    assert scores["accuracy"]["value"] == pytest.approx(report["accuracy"])
    for kind in ("macro", "weighted"):
        for own, other in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert scores[f"{kind}_{own}"]["value"] == pytest.approx(report[f"{kind} avg"][other])


@pytest.mark.parametrize(
    "predictions",
    [make(targets=[2]), make(targets=[1] * 9), make(targets=[0, 0, 1, 1])],
    ids=["one row", "one class only", "one class missing"],
)
def test_undefined_figures_are_null_in_strict_json(predictions):
    scores = compute_scores(predictions).as_json()
    text = json.dumps(scores, allow_nan=False)
    assert json.loads(text) == scores
    assert scores["per_class"]["a" if predictions.targets[0] else "c"]["recall"] is None
    assert scores["accuracy"]["high"] is not None


DUPLICATES = {
    "split": "test",
    "n": 120,
    "in_train": {"exact": 20, "augmented": 0, "any": 30},
    "in_selection": None,
    "in_either": {"exact": 20, "augmented": 0, "any": 30},
}


def test_the_metrics_file_has_all_parts():
    test, validation = make(), make(seed=1, prefix="validation")
    file = compute_metrics_file(
        {"test": test, "validation": validation},
        Metrics(
            protocol="official",
            banner=None,
            selected_on="PublicTest",
            duplicates=DuplicatesRecord.build(DUPLICATES),
            test_opened=0,
        ),
        without_duplicates_ids=test.ids[30:].tolist(),
    ).as_json()
    assert list(file) == [
        *("protocol", "banner", "selected_on", "is_selected", "test", "test_without_duplicates", "duplicates"),
        *("validation", "validation_without_duplicates", "train"),
        *("temperature", "abstain", "test_opened", "headline", "views", "groups"),
    ]
    assert file["test"]["n"] == 120
    found = {"temperature": file["temperature"]["value"], "threshold": file["abstain"]["threshold"]}
    assert file["test_without_duplicates"] == compute_scores(test.take(np.arange(30, 120)), **found).as_json()
    assert file["duplicates"] == DUPLICATES
    assert file["validation_without_duplicates"] is None
    assert file["train"] is None


def test_without_a_test_split_its_metrics_are_null_and_validation_is_scored_without_duplicates():
    validation = make()
    file = compute_metrics_file(
        {"test": None, "validation": validation},
        Metrics(protocol="official", banner="b", selected_on="PublicTest", test_opened=0),
        without_duplicates_ids=validation.ids[30:].tolist(),
    ).as_json()
    assert file["test"] is None
    assert file["test_without_duplicates"] is None
    found = {"temperature": file["temperature"]["value"], "threshold": file["abstain"]["threshold"]}
    expected = compute_scores(validation.take(np.arange(30, 120)), **found).as_json()
    assert file["validation_without_duplicates"] == expected
    assert file["banner"] == "b"
    assert file["validation"]["n"] == 120


def test_the_threshold_is_one_of_calibrated_confidences():
    """Those are what `dlfer predict --abstain` and `dlfer serve` compare with it."""
    validation = make(400, seed=5)
    file = compute_metrics_file({"validation": validation}, Metrics(selected_on="PublicTest"), target_accuracy=0.8)
    temperature, abstain = file.temperature.value, file.abstain
    assert abs(temperature - 1) > 0.02
    calibrated = apply_temperature(validation.probabilities, temperature)
    answered = calibrated.max(axis=1).astype(np.float32) >= abstain.threshold
    at = file.validation.selective.at_threshold
    assert at.n == answered.sum()
    assert at.accuracy.value == pytest.approx(validation.correct[answered].mean())
    assert at.accuracy.value >= 0.8
    assert abstain.temperature == temperature
    # A threshold of before 0.2 is one of uncalibrated confidences, and evaluated with these.
    old = abstain.model_copy(update={"temperature": None, "threshold": 0.5})
    again = compute_metrics_file({"test": validation}, Metrics(temperature=file.temperature, abstain=old))
    assert again.test.selective.at_threshold.n == (validation.probabilities.max(axis=1) >= 0.5).sum()


def test_no_metric_has_two_intervals():
    predictions = make(150, seed=3, num_classes=5)
    scores = compute_scores(predictions, temperature=1.2, threshold=0.0).as_json()

    def get(*path):
        figure = scores
        for key in path:
            figure = figure[key]
        return pytest.approx([figure["value"], figure["low"], figure["high"]])

    assert get("accuracy") == [scores["weighted_recall"][key] for key in ("value", "low", "high")]
    assert get("balanced_accuracy") == [scores["macro_recall"][key] for key in ("value", "low", "high")]
    assert get("log_loss") == [scores["calibration"]["raw"]["log_loss"][key] for key in ("value", "low", "high")]
    all_answered, at = scores["selective"]["curve"][0], scores["selective"]["at_threshold"]["accuracy"]
    assert get("accuracy") == [1 - all_answered[key] for key in ("risk", "high", "low")]
    assert get("accuracy") == [at[key] for key in ("value", "low", "high")]
    of_classes = [1 - 2 * (1 - scores["accuracy"][key]) / 5 for key in ("value", "low", "high")]
    assert get("one_vs_rest_accuracy") == of_classes


def test_the_averages_of_one_class_are_its_own_figures():
    # A class alone has no error but in its recall, precision and F1.
    predictions = make(targets=[1] * 40, seed=2)
    scores = compute_scores(predictions).as_json()
    own = scores["per_class"]["b"]
    for name in ("recall", "f1", "precision"):
        assert [scores[f"macro_{name}"][key] for key in ("low", "high")] == pytest.approx(own["intervals"][name])


def test_a_value_without_an_interval_has_the_reason():
    targets = np.repeat([0, 1, 2], [30, 30, 4])
    answers = np.tile([0.5, 0.4, 0.1], (64, 1))
    answers[targets == 1] = [0.3, 0.6, 0.1]
    predictions = Predictions(np.arange(64).astype(str), ("a", "b", "c"), targets, answers)
    scores = compute_scores(predictions).as_json()
    assert scores["per_class"]["c"]["precision"] == 0
    assert scores["per_class"]["c"]["intervals"]["precision"] == [None, None]
    assert scores["per_class"]["c"]["reasons"]["precision"].startswith("the class was never predicted")
    assert "reasons" not in scores["per_class"]["a"]
    # The average counts it as 0 and lets it be anything.
    low, value, high = (scores["macro_precision"][key] for key in ("low", "value", "high"))
    assert low < value < high
    assert high - value > 0.3
    alike = compute_scores(
        Predictions(np.arange(9).astype(str), ("a", "b"), np.arange(9) % 2, np.tile([0.6, 0.4], (9, 1)))
    ).as_json()
    assert alike["mcc"]["value"] == 0
    assert alike["mcc"]["low"] is None
    assert "one class" in alike["mcc"]["reason"]


LABELS = ("no", "yes")


def make_of_attributes(correct) -> Predictions:
    """Predictions with ids i0.. over two labels in turn that are right where `correct` says so."""
    correct = np.asarray(correct, dtype=bool)
    targets = np.arange(len(correct)) % 2
    probabilities = np.where((np.arange(2) == targets[:, None]) == correct[:, None], 0.9, 0.1)
    return Predictions([f"i{number}" for number in range(len(correct))], LABELS, targets, probabilities)


def write(path, text: str):
    path.write_text(text)
    return path


def test_a_csv_is_read_by_column(tmp_path):
    file = write(tmp_path / "a.csv", "\ufeffID, age ,gender\ni0,young,f\n\ni1,old,\n")
    assert read_attributes(file) == {"age": {"i0": "young", "i1": "old"}, "gender": {"i0": "f"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: found the columns ''"),
        ("name,age\ni0,3\n", "line 1: found the columns 'name,age', expected id"),
        ("id\ni0\n", "expected id and then one or more attributes"),
        ("id,age,age\ni0,1,2\n", "with different names"),
        ("id,age\ni0,1,2\n", "line 2: found 3 cells, expected 2"),
        ("id,age\ni0,1\ni1,2\ni0,1\n", "line 4: the id 'i0' stands in line 2 already"),
        ('id,age\n"i\n0",1\ni1,2\ni1,1\n', "line 5: the id 'i1' stands in line 4 already"),
        (
            'id,age\ni0,1\n"i1,2\ni2,3\n"i3",4\n',
            r"a\.csv line 3: found a field that begins with a quotation mark and goes on to line 5",
        ),
        ('id,age\ni0,"1\n' + "i1,2\n" * 50_000, r"a\.csv line 2: not a csv .*a quotation mark that is not closed"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_attributes(write(tmp_path / "a.csv", text))


def test_no_file_and_no_text_are_told(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_attributes(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00id")
    with pytest.raises(DataError, match="not a csv"):
        read_attributes(tmp_path / "b.csv")


def test_groups_have_accuracy_recall_and_intervals():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    generator = np.random.default_rng(0)
    correct = np.concatenate([generator.random(60) < 0.9, generator.random(40) < 0.6])
    values = {f"i{number}": "light" if number < 60 else "dark" for number in range(100)}
    scores = compute_group_scores(make_of_attributes(correct), {"skin": values}, file="a.csv").as_json()
    assert scores["file"] == "a.csv"
    light, dark = (scores["attributes"]["skin"]["groups"][name] for name in ("light", "dark"))
    assert (light["n"], dark["n"], light["small"]) == (60, 40, False)
    assert light["accuracy"]["value"] == pytest.approx(correct[:60].mean())
    expected = proportion.proportion_confint(int(correct[60:].sum()), 40, method="wilson")
    assert (dark["accuracy"]["low"], dark["accuracy"]["high"]) == pytest.approx(expected)
    assert dark["recall"]["yes"]["value"] == pytest.approx(correct[61::2].mean())
    assert dark["recall"]["yes"]["n"] == 20
    gaps = scores["attributes"]["skin"]["gaps"]
    assert gaps["recall"]["no"]["value"] == pytest.approx(abs(correct[0:60:2].mean() - correct[60::2].mean()))
    assert gaps["accuracy"]["value"] == pytest.approx(light["accuracy"]["value"] - dark["accuracy"]["value"])
    newcombe = proportion.confint_proportions_2indep(
        int(correct[:60].sum()), 60, int(correct[60:].sum()), 40, method="newcomb"
    )
    assert (gaps["accuracy"]["low"], gaps["accuracy"]["high"]) == pytest.approx(newcombe, abs=1e-6)


def test_small_groups_are_flagged_and_take_no_part_in_gaps():
    correct = np.ones(70, bool)
    correct[:10] = False
    names = np.repeat(["few", "many", "more"], [10, 30, 30])
    scores = compute_group_scores(
        make_of_attributes(correct), {"x": dict(zip([f"i{i}" for i in range(70)], names, strict=True))}
    ).as_json()
    found = scores["attributes"]["x"]
    assert [group["small"] for group in found["groups"].values()] == [True, False, False]
    assert found["gaps"]["accuracy"]["value"] == 0
    assert found["gaps"]["accuracy"]["high"] > 0.05
    assert found["gaps"]["recall"] == {"no": None, "yes": None}


def test_one_group_or_an_absent_class_has_no_gap():
    predictions = Predictions(["a", "b"], LABELS, [0, 0], [[0.9, 0.1], [0.2, 0.8]])
    found = compute_group_scores(predictions, {"x": {"a": "g", "b": "g"}}).as_json()["attributes"]["x"]
    assert found["groups"]["g"]["recall"]["yes"] is None
    assert found["gaps"] == {"accuracy": None, "recall": {"no": None, "yes": None}}


def test_missing_and_unknown_ids_are_counted():
    found = compute_group_scores(
        make_of_attributes(np.ones(5)), {"x": {"i0": "g", "i1": "h", "elsewhere": "g"}, "y": {}}
    ).as_json()
    assert (found["attributes"]["x"]["num_missing"], found["attributes"]["x"]["num_unknown"]) == (3, 1)
    assert (found["attributes"]["y"]["num_missing"], found["attributes"]["y"]["groups"]) == (5, {})


def test_a_csv_of_other_images_is_refused():
    with pytest.raises(
        DataError, match=r"a\.csv: names none of the 5 images \(there e\.g\. 'z', expected ids like 'i0'"
    ):
        compute_group_scores(make_of_attributes(np.ones(5)), {"x": {"z": "g"}}, file="a.csv").as_json()


def test_the_interval_of_a_gap_between_groups_that_do_not_differ_begins_at_0():
    """The gap of the two groups that look most different exceeds 0 in a quarter of such data by Newcombe's interval."""
    generator, begins_above = np.random.default_rng(7), 0
    for _ in range(200):
        names = generator.integers(0, 6, 400).astype(str)
        values = dict(zip([f"i{number}" for number in range(400)], names.tolist(), strict=True))
        scores = compute_group_scores(make_of_attributes(generator.random(400) < 0.7), {"x": values}).as_json()
        gap = scores["attributes"]["x"]["gaps"]["accuracy"]
        assert gap["low"] <= gap["value"] <= gap["high"]
        begins_above += gap["low"] > 0
    assert begins_above <= 10


@pytest.mark.parametrize(("targets", "absent"), [([0, 2] * 30, ["b"]), ([1] * 40, ["a", "c"]), ([0, 1, 2] * 20, None)])
def test_labels_without_images_are_stated_and_averages_are_over_the_others(targets, absent):
    predictions = make(targets=targets, seed=3)
    scores = compute_scores(predictions)
    assert scores.as_json().get("not_judged") == absent
    recalls = [row.recall for row in scores.per_class.values() if row.n]
    assert scores.macro_recall.value == pytest.approx(np.mean(recalls))
    text = format_metrics(compute_metrics_file({"test": predictions}, Metrics()))
    assert (f"not evaluated: {', '.join(absent or [])}" in text) == bool(absent)
    headline = build_headline(Metrics(test=scores), None, openings=0, expected=None)
    assert dict(headline.facts)["macro F1"].endswith(f"over {3 - len(absent or [])} classes")
    assert ("not evaluated" in dict(headline.facts)) == bool(absent)
