"""--smoke never needs data, whatever stands at its place."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dlfer.config.load import load_experiment, with_overrides
from dlfer.data.sources import load_data
from dlfer.experiment.fit_ensemble import make_member_config
from dlfer.experiment.session import _find_data_problem, make_smoke_config

EXPERIMENT = """
experiment: {name: a}
finetune: {data: {source: folder, path: faces, protocol: resplit}, epochs: 2, image_size: 32}
"""


def write_nothing(folder):
    pass


def write_an_empty_folder(folder):
    folder.mkdir()


def write_empty_classes(folder):
    (folder / "happy").mkdir(parents=True)
    (folder / "sad").mkdir()


def write_one_class(folder):
    write_classes(folder, ["happy"])


def write_damaged_pictures(folder):
    write_classes(folder, ["happy", "sad"])
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not a picture")


def write_a_file(folder):
    folder.write_text("faces")


def write_classes(folder, labels=("happy", "sad")):
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (32, 32), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


@pytest.fixture(autouse=True)
def forget():
    _find_data_problem.cache_clear()


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(EXPERIMENT)
    return load_experiment("a.yaml")


@pytest.mark.parametrize(
    "write",
    [write_nothing, write_an_empty_folder, write_empty_classes, write_one_class, write_damaged_pictures, write_a_file],
)
def test_data_that_cannot_be_used_is_drawn_and_that_is_said(config, tmp_path, write):
    write(tmp_path / "faces")
    small, warnings = make_smoke_config(config)
    assert small.finetune.data.source.startswith("synthetic")
    assert any("was replaced by synthetic" in warning for warning in warnings)


PARTIAL = [
    "cifar100/3.0.2/dataset_info.json",
    "cifar100/1.0.0/dataset_info.json",
    "cifar100/3.0.2.incompleteABC/dataset_info.json",
    "cifar100/incomplete.3/x",
    "downloads/x",
]


@pytest.mark.parametrize("partial", PARTIAL)
def test_a_prepared_data_set_that_is_not_whole_is_drawn_with_its_labels_and_nothing_is_downloaded(
    config, tmp_path, monkeypatch, partial
):
    import tensorflow_datasets as tfds

    asked = []

    def refuse(*given, **options):
        asked.append(given)
        raise AssertionError("it downloads")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    (tmp_path / "sets" / partial).parent.mkdir(parents=True)
    (tmp_path / "sets" / partial).write_text("{}")
    data = {"source": "tfds", "name": "cifar100", "path": str(tmp_path / "sets")}
    small, warnings = make_smoke_config(with_overrides(config, {"finetune.data": data}))
    assert (small.finetune.data.source, small.finetune.data.num_labels) == ("synthetic_scenes", 100)
    assert any("was replaced by synthetic scenes, with 100 labels" in warning for warning in warnings)
    assert asked == []


@pytest.mark.parametrize(
    "partial", ["5.1.0/features.json", "5.1.0.incompleteABC/dataset_info.json", "5.0.0/dataset_info.json"]
)
def test_imagenet_that_is_not_whole_is_drawn_with_a_thousand_labels(config, tmp_path, partial):
    (tmp_path / "sets" / "imagenet2012" / partial).parent.mkdir(parents=True)
    (tmp_path / "sets" / "imagenet2012" / partial).write_text("{}")
    stage = {"data": {"source": "tfds", "name": "imagenet2012", "path": "sets"}, "epochs": 1, "image_size": 32}
    small, _ = make_smoke_config(with_overrides(config, {"pretrain": stage}))
    assert (small.pretrain.data.source, small.pretrain.data.num_labels) == ("synthetic_scenes", 1000)


@pytest.mark.parametrize(
    ("crop", "damaged"),
    [({}, "validation"), ({"train": "random_resized"}, "train"), ({"train": "random_resized"}, "validation")],
)
def test_a_damaged_picture_of_streamed_folders_is_found_before(config, tmp_path, crop, damaged):
    for part in ("train", "validation"):
        write_classes(tmp_path / "faces" / part)
    data = {"source": "tfds", "name": "image_folder", "path": "faces", "protocol": "official", "crop": crop}
    whole = with_overrides(config, {"finetune.data": data})
    assert make_smoke_config(whole)[0].finetune.data.source == "tfds"
    for path in (tmp_path / "faces" / damaged).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])  # the head alone, by which its size is known
    _find_data_problem.cache_clear()
    small, _ = make_smoke_config(with_overrides(config, {"finetune.data": data}))
    assert (small.finetune.data.source, small.finetune.data.num_labels) == ("synthetic_scenes", 2)


def test_what_members_set_of_the_epochs_does_not_stand_in_the_way(config):
    members = [
        {"name": "a", "set": {"finetune.freeze.head_epochs": 1, "finetune.epochs": 5, "model.dropout": 0.1}},
        {"name": "b", "set": {"finetune.milestones": [2]}},
    ]
    whole = with_overrides(config, {"model.family": "ensemble", "ensemble": {"members": members}})
    small, _ = make_smoke_config(whole)
    assert [member.set for member in small.ensemble.members] == [{"model.dropout": 0.1}, {}]
    assert [make_member_config(small, member).finetune.epochs for member in small.ensemble.members] == [1, 1]


def test_data_that_can_be_used_is_used(config, tmp_path):
    write_classes(tmp_path / "faces")
    small, warnings = make_smoke_config(config)
    assert small.finetune.data.source == "folder"
    assert len(warnings) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "data",
    [
        {"source": "folder", "path": "faces", "folders": {"holdout": "test"}},
        {"source": "tfds", "name": "image_folder", "path": "faces", "folders": {"holdout": "test"}},
        {"source": "fer2013", "path": "x", "protocol": "cross_validation", "folds": 3, "fold": 0},
        {"source": "synthetic_faces", "protocol": "cross_validation", "folds": 3, "fold": 0},
        {"source": "fer2013", "path": "x", "votes": "v.csv", "soft_targets": "ferplus", "soft_share": 0.5},
        {"source": "folder", "path": "faces", "subjects": {"file": "s.csv"}, "protocol": "resplit"},
    ],
)
def test_keys_that_belong_to_absent_data_do_not_stand_in_the_way(config, data, seed):
    before = {"data": {"source": "folder", "path": "other_faces"}, "epochs": 1, "image_size": 32}
    small, _ = make_smoke_config(with_overrides(config, {"finetune.data": {**data, "seed": seed}, "pretrain": before}))
    bundles = [load_data(stage.data, image_size=32) for stage in (small.pretrain, small.finetune)]
    pixels = [{image.tobytes() for image in bundle.train.images} for bundle in bundles]
    assert not pixels[0] & pixels[1]
