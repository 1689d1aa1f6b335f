"""The parts of a report that show the data and trees."""

import pytest

from dlfer.config.schema import StageConfig
from dlfer.config.sections import BoostingConfig, DataConfig
from dlfer.report.sections import describe_data, describe_levels, describe_setting, describe_trees, draw_levels
from dlfer.runs.records import DataRecord, LeftOut, ReadingRecord
from dlfer.runs.run_records import BoostedLevel, BoostingRecord

LEVELS = [
    BoostedLevel(name="first", features=10, used=4, splits=30, gain=0.25),
    BoostedLevel(name="last", features=30, used=28, splits=90, gain=0.75),
]
RECORD = BoostingRecord(
    rounds=20,
    rounds_an_epoch=5,
    trees=140,
    levels=LEVELS,
    row_weights={"Angry": 1.0277, "Disgust": 9.5238},
    features_seconds=61.0,
    features_were_cached=True,
    trees_seconds=5.0,
)


def test_facts_and_levels():
    trees = describe_trees(RECORD)
    facts = dict(trees.facts)
    assert facts["kept"] == "20 rounds, 140 trees; an epoch is 5 rounds"
    assert facts["features"] == "computed in 1 min 01 s, taken from the cache here"
    assert facts["weight of an image"] == "Angry 1.03, Disgust 9.52"
    assert (trees.levels, trees.num_features) == (LEVELS, 40)
    assert "does not measure the value of a level" in trees.notes[0]
    unweighted = describe_trees(RECORD.model_copy(update={"row_weights": None}))
    assert "weight of an image" not in dict(unweighted.facts)


def test_a_run_without_trees_has_none():
    assert describe_trees(None) is None


def test_the_figure_shows_both_shares_of_each_level():
    axes = draw_levels(LEVELS).axes[0]
    assert [bar.get_width() for container in axes.containers for bar in container] == pytest.approx([25, 75, 25, 75])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "last"]
    assert "last, 30 features: 75.0 %" in describe_levels(LEVELS)


def test_the_setting_in_words():
    data = DataConfig(source="synthetic_faces")
    words = describe_setting(BoostingConfig(), StageConfig(data=data, epochs=30, image_size=64, monitor="loss"))
    for part in ("30 epochs of 10 rounds", "64 px", "rate 0.1", "rows weighted", "best epoch kept by loss"):
        assert part in words


def test_what_a_reader_left_out_stands_with_the_data():
    lost = LeftOut(reason="videos", n=7, first=["a.mp4", "b.mp4"])
    data = DataRecord(
        labels=["x"], notes=["More."], reading=ReadingRecord(what="rows", seen=1020, used=1013, left_out=[lost])
    )
    assert describe_data(data).notes == [
        "1,020 rows seen, 1,013 used, 7 left out.", "Left out, videos: 7 (a.mp4, b.mp4, ...).", "More."
    ]  # fmt: skip
