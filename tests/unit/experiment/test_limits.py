"""What would certainly fail here is found before anything is loaded, all of it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dlfer
from dlfer.config.load import load_experiment
from dlfer.errors import UserError
from dlfer.experiment import limits
from dlfer.experiment.limits import find_obstacles, refuse_obstacles

PLAIN = "experiment: {name: a}\nfinetune: {data: {source: synthetic_faces}, epochs: 2, image_size: 96}\n"


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Return a function: overrides -> the obstacles of a small experiment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(limits, "find_network_problem", lambda: "storage.googleapis.com: no route")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "a.yaml").write_text(PLAIN)

    def find(overrides=None, **given):
        return find_obstacles(load_experiment(tmp_path / "a.yaml", overrides or {}), **given)

    return find


def test_nothing_stands_in_the_way_of_drawn_data(find):
    assert find() == []


@pytest.mark.parametrize(
    ("backbone", "size", "least"),
    [
        ("inception_v3", 48, 75),
        ("inception_v3", 74, 75),
        ("inception_v3", 75, None),
        ("inception_resnet_v2", 64, 75),
        ("vgg16", 24, 32),
        ("convnext_tiny", 16, 32),
        ("densenet121", 28, 29),
        ("efficientnet_b0", 16, None),
        ("resnet50", 32, None),
    ],
)
def test_images_smaller_than_a_backbone_sees_are_refused(find, backbone, size, least):
    found = find({"model.backbone": backbone, "finetune.image_size": size})
    if least is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"finetune.image_size: found {size}, expected at least {least}")


def test_every_stage_and_branch_is_looked_at(find):
    found = find(
        {
            "model": {"family": "hybrid", "branches": ["resnet50", "vgg16", "inception_v3"]},
            "finetune.image_size": 24,
            "pretrain": {"data": {"source": "synthetic_scenes"}, "image_size": 64},
        }
    )
    assert [line.split(":")[0] for line in found] == ["pretrain.image_size", *["finetune.image_size"] * 2]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"source": "folder", "path": "nowhere"}, "finetune.data.path: nowhere is not there"),
        ({"source": "fer2013", "path": "fer2013.csv"}, "finetune.data.path: fer2013.csv is not there"),
        ({"source": "arrays", "path": "empty"}, "finetune.data.path: empty is a folder, expected a file"),
        ({"source": "folder", "path": "empty"}, "finetune.data.path: empty is an empty folder"),
        ({"source": "folder", "path": "${NOT_SET}/x"}, "NOT_SET is not set"),
        ({"source": "tfds", "name": "cifar10"}, "is not prepared in"),
        ({"source": "tfds", "name": "imagenet2012"}, "ImageNet cannot be prepared"),
        ({"source": "tfds", "name": "image_folder", "path": "nowhere"}, "nowhere is not there"),
        ({"source": "synthetic_faces", "num_images": {"train": 10**9}}, "take 2,304 GB of memory"),
    ],
)
def test_data_that_is_not_there_is_named(find, tmp_path, monkeypatch, data, expected):
    monkeypatch.delenv("NOT_SET", raising=False)
    (tmp_path / "empty").mkdir()
    assert [expected in line for line in find({"finetune.data": data})] == [True]
    assert find({"finetune.data": data}, smoke=True) == []


def test_a_prepared_data_set_is_found(find, tmp_path):
    folder = tmp_path / "tfds" / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    assert find({"finetune.data": {"source": "tfds", "name": "cifar10"}}) == []


@pytest.mark.parametrize(
    ("backbone", "pretrain", "expected"),
    [
        ("resnet50", {"weights": "imagenet"}, "weights of resnet50 cannot be downloaded"),
        ("resnet18", {"weights": "imagenet"}, "no ImageNet weights of resnet18"),
        ("efficientnet_lite0", {"weights": "imagenet"}, "no ImageNet weights of efficientnet_lite0"),
        ("efficientnet_lite2", {"weights": "imagenet"}, None),
        ("resnet50", {"weights": "imagenet", "weights_file": "none.h5"}, "pretrain.weights_file: none.h5 is not there"),
        ("resnet50", {"weights": "none.weights.h5"}, "pretrain.weights: none.weights.h5 is not there"),
        ("resnet50", {"weights": "no-such-model"}, "pretrain.weights: no-such-model: there is no such model"),
    ],
)
def test_weights_that_cannot_be_obtained_are_named_with_what_is_packaged(find, backbone, pretrain, expected):
    keys = {"model.backbone": backbone, "pretrain": pretrain}
    found = find(keys)
    assert found == [] if expected is None else [expected in line for line in found] == [True]
    assert "imagenet" not in str(pretrain) or all("efficientnet_lite2" in line or "none.h5" in line for line in found)
    assert find(keys, smoke=True) == []


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (None, "is not there. Expected faceres-deep.json"),
        ("<html>", "cannot be read as JSON"),
        (
            '{"format": "graph-model", "weightsManifest": [{"paths": ["a.bin"], "weights": []}]}',
            "128 missing, first age_pred",
        ),
    ],
)
def test_weights_from_vggface2_are_looked_through(find, tmp_path, contents, expected):
    if contents is not None:
        (tmp_path / "faceres-deep.json").write_text(contents)
    pretrain = {"weights": "vggface2", "weights_file": "faceres-deep.json"}
    keys = {"model.backbone": "mobilenet", "model.pixel_scaling": "caffe", "pretrain": pretrain}
    found = find(keys)
    assert [expected in line for line in found] == [True]
    assert found[0].startswith("pretrain.weights_file: faceres-deep.json: ")
    assert find(keys, smoke=True) == []


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("imagenet", ["weights of resnet50 cannot be downloaded", "no ImageNet weights of resnet34"]),
        ({"resnet50": "imagenet", "resnet34": "imagenet"}, ["resnet50 cannot", "no ImageNet weights of resnet34"]),
        (
            {"resnet50": "a.weights.h5", "branch2_resnet34": "gone"},
            ["of branch1_resnet50: a.weights.h5 is not there", "of branch2_resnet34: gone: there is no such model"],
        ),
        (
            {"resnet50": "b.keras", "resnet34": "empty"},
            ["of branch2_resnet34: empty: empty is a folder without artifact.json"],
        ),
        ({"resnet50": "b.keras", "resnet34": "backbone"}, []),
    ],
)
def test_weights_of_each_branch_are_looked_for(find, tmp_path, weights, expected):
    (tmp_path / "b.keras").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "backbone.json").touch()
    hybrid = {"model.family": "hybrid", "model.branches": ["resnet50", "resnet34"], "pretrain": {"weights": weights}}
    found = find(hybrid)
    assert len(found) == len(expected)
    for line, text in zip(found, expected, strict=True):
        assert text in line


def test_an_ensemble_has_no_weights_to_start_from(find, tmp_path):
    record = json.loads((Path(dlfer.__file__).parents[1] / "saved_models" / "lite2_96" / "artifact.json").read_text())
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "artifact.json").write_text(json.dumps({**record, "family": "ensemble"}))
    (line,) = find({"pretrain": {"weights": str(tmp_path / "both")}})
    assert "both: found an ensemble, expected a model of one network" in line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetune.epoch": 5}, "Did you mean finetune.epochs"),
        ({"model.dropout": 2}, "found 2"),
        ({"modle.backbone": "x"}, "modle"),
    ],
)
def test_keys_of_the_members_of_an_ensemble_are_looked_at(find, keys, words):
    members = [{"name": "a", "set": {}}, {"name": "b", "set": keys}]
    found = find({"model.family": "ensemble", "ensemble": {"members": members}})
    assert [line for line in found if line.startswith("ensemble.members b: ") and words in line]
    assert not [line for line in found if "members a" in line]


def test_a_folder_of_weights_is_looked_through_for_each_branch(find, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "resnet34.h5").touch()
    hybrid = {"model.family": "hybrid", "model.branches": ["resnet50", "resnet34"]}
    found = find({**hybrid, "pretrain": {"weights": "imagenet", "weights_file": "w"}})
    assert len(found) == 1
    assert "weights of resnet50 cannot be downloaded" in found[0]
    (tmp_path / "w" / "resnet50.weights.h5").touch()
    assert find({**hybrid, "pretrain": {"weights": "imagenet", "weights_file": "w"}}) == []


def test_kept_weights_of_another_version_are_not_taken_for_these(find, tmp_path):
    (tmp_path / "keras" / "models").mkdir(parents=True)
    (tmp_path / "keras" / "models" / "resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5").touch()
    assert len(find({"model.backbone": "resnet50", "pretrain": {"weights": "imagenet"}})) == 1


def test_weights_that_keras_has_kept_need_no_network(find, tmp_path):
    (tmp_path / "keras" / "models").mkdir(parents=True)
    (tmp_path / "keras" / "models" / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5").touch()
    assert find({"model.backbone": "resnet50", "pretrain": {"weights": "imagenet"}}) == []


@pytest.mark.parametrize(
    ("file", "has"),
    [
        ("mobilenet_1_0_224_tf_no_top.h5", {"mobilenet"}),
        ("mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5", {"mobilenet_v2"}),
        ("resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5", set()),
        ("mobilenet_1_0_224_tf.h5", set()),
    ],
)
def test_a_kept_file_is_that_of_one_backbone(find, tmp_path, file, has):
    (tmp_path / "keras" / "models").mkdir(parents=True)
    (tmp_path / "keras" / "models" / file).touch()
    for name in ("mobilenet", "mobilenet_v2", "resnet50"):
        found = find({"model.backbone": name, "pretrain": {"weights": "imagenet"}})
        assert (found == []) == (name in has), name


@pytest.mark.parametrize(
    ("keys", "module"),
    [
        ({"finetune.data.faces": {"detect": "mtcnn"}}, "mtcnn"),
        ({"finetune.data.faces": {"detect": "opencv"}}, "cv2"),
        ({"finetune.data.faces": {"detect": "centerface"}}, "onnxruntime"),
        ({"finetune.data.faces": {"equalize": "clahe"}}, "cv2"),
        ({"model.family": "boosted", "boosting": {}}, "xgboost"),
    ],
)
def test_absent_packages_are_named(find, monkeypatch, keys, module):
    monkeypatch.setattr(limits, "find_spec", lambda name: None if name == module else SimpleNamespace(origin="x"))
    assert ["pip install" in line for line in find(keys)] == [True]


@pytest.mark.parametrize("names", [["mlflow"], ["wandb"], ["mlflow", "wandb"]])
def test_absent_trackers_are_named_with_their_extras(find, monkeypatch, tmp_path, names):
    found = find_spec_of_folders(monkeypatch, names)
    lines = find({"experiment.track": names})
    assert lines == [
        f"experiment.track: {name}: needs a package that is not installed: pip install 'dlfer[{name}]'."
        for name in names
    ]
    assert found == names
    monkeypatch.setattr(limits, "find_spec", lambda name: SimpleNamespace(origin="x"))
    assert find({"experiment.track": names}) == []


def find_spec_of_folders(monkeypatch, names) -> list[str]:
    """Let Python find folders of these names, as W&B and MLflow write them, instead of packages; return who asked."""
    asked = []

    def find_spec(name):
        asked.append(name)
        return SimpleNamespace(origin=None if name in names else "x")

    monkeypatch.setattr(limits, "find_spec", find_spec)
    return asked


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"finetune.epochs": 10**9}, "finetune.epochs: found 1,000,000,000"),
        ({"finetune.batch_size": 10**9}, "finetune.batch_size: found 1,000,000,000"),
    ],
)
def test_absurd_numbers_are_refused(find, keys, expected):
    assert [line.startswith(expected) for line in find(keys)] == [True]


def test_little_memory_and_little_disk_are_told(find, monkeypatch):
    monkeypatch.setattr(limits, "get_memory_bytes", lambda: 10**8)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**8}))
    assert [line.split(":")[0] for line in find({"model.backbone": "vgg19"})] == ["model", "--out"]


def test_folders_that_cannot_be_written_or_read_are_named(find, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert ["is a file" in line for line in find(out=tmp_path / "file" / "runs")] == [True]
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    assert ["nothing can be written" in line for line in find(out=tmp_path / "locked" / "runs")] == [True]
    assert ["cannot be read" in line for line in find({"finetune.data": {"source": "folder", "path": "locked"}})] == [
        True
    ]


def test_the_cells_of_a_sweep_are_looked_at_by_name(find):
    keys = {"sweep": {"grid": {"model.backbone": ["inception_v3", "resnet50"]}}, "finetune.image_size": 48}
    [line] = find(keys, kind="sweep")
    assert "inception_v3" in line.split(": ")[0]


def test_what_is_wrong_in_many_cells_is_told_once(find):
    grid = {"finetune.batch_size": [8, 16, 32, 64], "model.backbone": ["resnet_nano", "resnet50"]}
    keys = {"sweep": {"grid": grid}, "finetune.data": {"source": "folder", "path": "nowhere"}}
    [everywhere, some] = find(
        {**keys, "pretrain": {"weights": "imagenet"}, "model.backbone": "resnet50"}, kind="sweep"
    )[:2]
    assert everywhere.startswith("finetune.data.path: nowhere is not there")
    assert some.startswith("sweep cell ")
    assert " and 1 more: pretrain.weights" in some


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("fer2013", "downloads/manual/fer2013.csv", None),
        ("fer2013", "downloads/manual/fer2013.zip", "fer2013.csv, from which it is prepared, is not there"),
        ("fer2013", None, "fer2013.csv, from which it is prepared, is not there"),
        ("cifar10", "downloads/cs.toronto.edu_cifar-10.tar.gz", None),
        ("resisc45", "downloads/manual/NWPU-RESISC45.rar", None),
        ("cifar10", None, "nothing can be downloaded from here"),
    ],
)
def test_without_a_network_what_was_fetched_before_may_suffice(find, tmp_path, name, file, expected):
    if file is not None:
        (tmp_path / "tfds" / file).parent.mkdir(parents=True)
        (tmp_path / "tfds" / file).touch()
    found = find({"finetune.data": {"source": "tfds", "name": name}})
    assert found == [] if expected is None else [expected in line for line in found] == [True]


def test_a_data_set_whose_folder_cannot_be_written_cannot_be_prepared(find, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "find_network_problem", lambda: None)
    (tmp_path / "tfds").mkdir()
    data = {"finetune.data": {"source": "tfds", "name": "cifar10"}}
    assert find(data) == []
    monkeypatch.setattr(os, "access", lambda path, mode: "tfds" not in str(path))
    [line] = find(data)
    assert f"{tmp_path / 'tfds'} cannot be written" in line


def test_all_obstacles_stand_in_one_message(find, tmp_path):
    keys = {"model.backbone": "inception_v3", "finetune.image_size": 48, "finetune.epochs": 10**9}
    keys |= {"finetune.data": {"source": "folder", "path": "nowhere"}, "pretrain": {"weights": "imagenet"}}
    find(keys)
    with pytest.raises(UserError, match=r"(?s)4 things.*pretrain.weights|4 things.*image_size") as caught:
        refuse_obstacles(load_experiment(tmp_path / "a.yaml", keys), "a.yaml")
    assert all(
        text in str(caught.value) for text in ("a.yaml", "image_size", "epochs", "nowhere", "efficientnet_lite2")
    )


@pytest.mark.parametrize("keys", ["", "pretrain: {weights: imagenet, image_size: 48}\n", "balance"])
def test_nothing_heavy_is_loaded_to_find_them(tmp_path, keys):
    text = PLAIN.replace("image_size: 96", "image_size: 48, balance: sampler") if keys == "balance" else PLAIN + keys
    (tmp_path / "a.yaml").write_text(f"{text}model: {{backbone: efficientnet_lite2}}\n")
    code = (
        "import sys; from dlfer.cli import main\n"
        "try:\n    main(['check', sys.argv[1]])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'tensorflow', 'keras', 'scipy', 'sklearn', 'pandas', 'matplotlib', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.yaml")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_cells_and_members_are_named_with_what_they_lack(find, monkeypatch):
    monkeypatch.setattr(limits, "find_spec", lambda name: None if name == "mtcnn" else SimpleNamespace(origin="x"))
    cells = {"plain": {}, "found": {"finetune.data.faces": {"detect": "mtcnn"}}}
    [line] = find({"sweep": {"cells": cells}}, kind="sweep")
    assert line.startswith("sweep cell found: finetune.data.faces")
    members = [{"name": "a", "set": {}}, {"name": "b", "set": {"model.backbone": "inception_v3"}}]
    ensemble = {"model.family": "ensemble", "ensemble": {"members": members}, "finetune.image_size": 48}
    grid = {"grid": {"finetune.batch_size": [8, 16]}}
    [line] = [line for line in find({**ensemble, "sweep": grid}, kind="sweep") if "inception_v3" in line]
    assert line.startswith("sweep cell batch_size=8, ensemble.members b, sweep cell")
    [line] = find({"ablation": {"with": {"finetune.data.faces": {"detect": "mtcnn"}}}}, kind="ablation")
    assert line.startswith("ablation.with: ")
