"""The parts of a report that show data, trees and architecture, from the records alone."""

import xml.etree.ElementTree as ElementTree

import pytest

from dlfer.config.load import load_recorded_experiment
from dlfer.config.schema import StageConfig
from dlfer.config.sections import BoostingConfig, DataConfig
from dlfer.report.html import write_report
from dlfer.report.sections import (
    describe_blocks,
    describe_cascade,
    describe_data,
    describe_levels,
    describe_setting,
    describe_trees,
    draw_diagram,
    draw_levels,
)
from dlfer.runs.records import Cost, DataRecord, LeftOut, ReadingRecord
from dlfer.runs.run_records import Block, BoostedLevel, BoostingRecord, NetworkRecord, TransferLists, TransferRecord

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


NETWORK = NetworkRecord(
    image_size=96,
    channels=1,
    blocks=[
        Block(
            name="feature level 1", layer="stem", shape=[48, 48, 16], layers=3, parameters=500, statistics=32, trained=0
        ),
        Block(
            name="feature level 2",
            layer="x<y",
            shape=[24, 24, 24],
            layers=9,
            parameters=900,
            statistics=48,
            trained=400,
        ),
        Block(name="head", layer="head", shape=[3], layers=3, parameters=75, trained=75),
    ],
)
FULL = "pretrain: {data: {source: synthetic_scenes}, epochs: 4, image_size: 64}\n"
FINETUNE = "experiment: {name: faces}\nfinetune: {data: {source: fer2013, path: f.csv}, image_size: 96, epochs: 7}\n"


def describe(tmp_path, text, **given):
    (tmp_path / "config.yaml").write_text(text)
    config = load_recorded_experiment(tmp_path / "config.yaml")
    known = {"data": None, "transfer": None, "network": None, "cost": None, "trees": None}
    return describe_cascade(config, **known | given)


def read_texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_the_table_says_what_is_frozen():
    table = describe_blocks(NETWORK)
    assert [row.state for row in table.rows] == ["frozen", "partly trained", "trained"]
    assert [row.shape for row in table.rows] == ["48 x 48 x 16", "24 x 24 x 24", "3"]
    assert (table.parameters, table.trained) == (1475, 475)
    assert "96 x 96" in table.note
    assert describe_blocks(None) is None


def test_the_cascade_has_data_sizes_and_counts(tmp_path):
    data = DataRecord.build({"labels": ["a", "<b>"], "splits": {"train": {"name": "Training", "n": 28709}}})
    transfer = TransferRecord(loaded=["k"] * 497, newly_initialised=["h", "b"])
    given = {"data": data, "transfer": transfer, "network": NETWORK, "cost": Cost(pretrain_images=40000)}
    diagram = describe(tmp_path, FULL + FINETUNE, **given)
    for is_column in (False, True):
        texts = " ".join(read_texts(draw_diagram(diagram, is_column=is_column)))
        for words in (
            *("EF-FER1", "synthetic_scenes", "64 x 64 px, 4 epochs", "40,000 images seen"),
            *("497 loaded", "2 newly initialised", "EF-FER2", "28,709 images", "96 x 96 px"),
            *("1,475 parameters", "475", "2 labels", "a, <b>"),
        ):
            assert words in texts
    assert "497 loaded" in ElementTree.fromstring(draw_diagram(diagram)).get("aria-label")
    assert ElementTree.fromstring(draw_diagram(diagram, is_column=True)).get("aria-hidden") == "true"


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        (f"pretrain: null\n{FINETUNE}", {}, "left out: random weights"),
        (
            f"pretrain: {{weights: imagenet}}\nmodel: {{backbone: efficientnet_lite2}}\n{FINETUNE}",
            {},
            "not trained here",
        ),
        (
            f"pretrain: null\nmodel: {{family: hybrid, branches: [resnet_nano, resnet_nano]}}\n{FINETUNE}",
            {"transfer": TransferRecord(branches={"branch1_resnet_nano": TransferLists(loaded=["k"] * 9)})},
            "branch1_resnet_nano: 9 loaded",
        ),
        (
            f"pretrain: null\nmodel: {{family: boosted, backbone: resnet_nano}}\nboosting: {{}}\n{FINETUNE}",
            {
                "trees": BoostingRecord(
                    rounds=5, rounds_an_epoch=5, trees=35, levels=[BoostedLevel(name="a", features=8, used=3, splits=4)]
                )
            },
            "35 trees on 8 features",
        ),
        (
            f"model: {{family: ensemble}}\nensemble: {{members: [{{name: one, model: a}}, {{name: two, model: b}}]}}\n{FINETUNE}",
            {},
            "2 members: one, two",
        ),
    ],
    ids=["random", "published", "hybrid", "boosted", "ensemble"],
)
def test_every_family_has_a_diagram(tmp_path, text, given, words):
    diagram = describe(tmp_path, text, **given)
    assert words in diagram.description
    assert len(read_texts(draw_diagram(diagram))) >= 5


@pytest.mark.slow
def test_a_report_shows_it_and_one_of_an_earlier_version_leaves_the_table_out(run_maker, tmp_path):
    run = run_maker(tmp_path / "run")
    page = write_report(run).read_text()
    assert page.count("<svg") == 2
    assert "its last layer" not in page
    NETWORK.write(run)
    page = write_report(run).read_text()
    for words in ("its last layer", "x&lt;y", "partly trained", "1,475"):
        assert words in page
