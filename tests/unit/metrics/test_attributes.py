from __future__ import annotations

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.metrics.attributes import compute_group_scores, read_attributes
from dlfer.metrics.predictions import Predictions

LABELS = ("no", "yes")


def make(correct) -> Predictions:
    """Predictions with ids i0.. over two labels in turn that are right where `correct` says so."""
    correct = np.asarray(correct, dtype=bool)
    targets = np.arange(len(correct)) % 2
    probabilities = np.where((np.arange(2) == targets[:, None]) == correct[:, None], 0.9, 0.1)
    return Predictions([f"i{number}" for number in range(len(correct))], LABELS, targets, probabilities)


def write(path, text: str):
    path.write_text(text)
    return path


def test_a_csv_is_read_by_column(tmp_path):
    file = write(tmp_path / "a.csv", "\ufeffid, age ,gender\ni0,young,f\n\ni1,old,\n")
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
    ],
)
def test_what_is_wrong_with_a_csv_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_attributes(write(tmp_path / "a.csv", text))


def test_no_file_and_no_text_are_told(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_attributes(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00id")
    with pytest.raises(DataError, match="not a csv in UTF-8"):
        read_attributes(tmp_path / "b.csv")


def test_groups_have_accuracy_recall_and_intervals():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    generator = np.random.default_rng(0)
    correct = np.concatenate([generator.random(60) < 0.9, generator.random(40) < 0.6])
    values = {f"i{number}": "light" if number < 60 else "dark" for number in range(100)}
    scores = compute_group_scores(make(correct), {"skin": values}, file="a.csv").as_json()
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
        make(correct), {"x": dict(zip([f"i{i}" for i in range(70)], names, strict=True))}
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
    found = compute_group_scores(make(np.ones(5)), {"x": {"i0": "g", "i1": "h", "elsewhere": "g"}, "y": {}}).as_json()
    assert (found["attributes"]["x"]["num_missing"], found["attributes"]["x"]["num_unknown"]) == (3, 1)
    assert (found["attributes"]["y"]["num_missing"], found["attributes"]["y"]["groups"]) == (5, {})


def test_a_csv_of_other_images_is_refused():
    with pytest.raises(
        DataError, match=r"a\.csv: names none of the 5 images \(there e\.g\. 'z', expected ids like 'i0'"
    ):
        compute_group_scores(make(np.ones(5)), {"x": {"z": "g"}}, file="a.csv").as_json()


def test_the_interval_of_a_gap_between_groups_that_do_not_differ_begins_at_0():
    """The gap of the two groups that look most different exceeds 0 in a quarter of such data by Newcombe's interval."""
    generator, begins_above = np.random.default_rng(7), 0
    for _ in range(200):
        names = generator.integers(0, 6, 400).astype(str)
        values = dict(zip([f"i{number}" for number in range(400)], names.tolist(), strict=True))
        scores = compute_group_scores(make(generator.random(400) < 0.7), {"x": values}).as_json()
        gap = scores["attributes"]["x"]["gaps"]["accuracy"]
        assert gap["low"] <= gap["value"] <= gap["high"]
        begins_above += gap["low"] > 0
    assert begins_above <= 10
