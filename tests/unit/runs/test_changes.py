"""What has changed since a run began: described, refused, or recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dlfer.config.load import dump_experiment, load_experiment, with_overrides
from dlfer.errors import ResumeError
from dlfer.runs import changes
from dlfer.runs.changes import (
    PRETRAIN_IMAGES_FILE,
    check_changed_images,
    check_changes_since_start,
    compare_images,
    find_changes,
    find_sibling,
)
from dlfer.runs.run import Run, create_run


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("experiment: {name: a}\nfinetune: {data: {source: folder, path: faces}, epochs: 9}\n")
    return load_experiment(file)


@pytest.fixture
def run(tmp_path, config) -> Run:
    return create_run(tmp_path / "runs", config, argv=[])


def edit(run, **keys):
    """Write other values into the run's config.yaml."""
    config = with_overrides(run.config(), {key.replace("__", "."): value for key, value in keys.items()})
    (run.path / "config.yaml").write_text(dump_experiment(config))


def index(labels=("Happy", "Sad"), **splits):
    """Return a list of images: of each split {id: (target, digest)}."""
    found = {"labels": np.array(labels)}
    for split, images in splits.items():
        found[f"{split}_ids"] = np.array(list(images))
        found[f"{split}_targets"] = np.array([target for target, _ in images.values()])
        found[f"{split}_digests"] = np.array([digest for _, digest in images.values()], "S1")
    return found


START = {"train": {"a": (0, "1"), "b": (1, "2"), "c": (0, "3")}, "test": {"d": (1, "4")}}


def test_nothing_has_changed_in_a_run_as_it_began(run):
    assert find_changes(run) == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"finetune__epochs": 4}, ["config.yaml: finetune.epochs: 9 -> 4"]),
        (
            {"finetune__optimizer__learning_rate": 0.04},
            ["config.yaml: finetune.optimizer.learning_rate: 0.001 -> 0.04"],
        ),
        ({"finetune__data__seed": 3, "experiment__seed": 5}, ["experiment.seed", "finetune.data.seed"]),
        ({"finetune__data__path": "/elsewhere/faces"}, []),
        ({"experiment__checkpoint_minutes": 1.0, "experiment__name": "other", "experiment__track": ["mlflow"]}, []),
        ({"ablation__seeds": [4]}, []),
    ],
)
def test_keys_that_change_the_result_are_named_with_both_values(run, keys, expected):
    edit(run, **keys)
    found = find_changes(run)
    assert len(found) == len(expected)
    assert all(text in line for text, line in zip(expected, found, strict=True))


def test_the_plan_of_a_comparison_is_compared(tmp_path, config):
    run = create_run(tmp_path / "runs", config, argv=[], kind="ablation")
    edit(run, ablation__seeds=[4])
    assert ["ablation.seeds" in line for line in find_changes(run)] == [True]


@pytest.mark.parametrize(
    ("packages", "dlfer", "expected"),
    [
        ({"tensorflow-cpu": "2.1.0"}, None, "tensorflow was 2.1.0"),
        ({"keras": "2.15.0"}, None, "keras was 2.15.0"),
        ({}, "0.0.9", "dlfer was 0.0.9"),
        ({"numpy": "1.0"}, None, None),
        ({"keras": None}, None, None),
    ],
)
def test_software_is_compared_by_its_first_two_numbers(run, monkeypatch, packages, dlfer, expected):
    here = {"tensorflow": "2.20.0", "keras": "3.15.1"}
    monkeypatch.setattr(changes, "list_packages", lambda: here)
    began = {name: version for name, version in {**here, **packages}.items() if version and name.split("-")[0]}
    if "tensorflow-cpu" in packages:
        del began["tensorflow"]
    run.update(packages=began, **({"dlfer": dlfer} if dlfer else {}))
    found = find_changes(run)
    assert found == [] if expected is None else len(found) == 1 and expected in found[0]


def test_a_last_number_of_a_version_may_differ(run, monkeypatch):
    run.update(packages={"tensorflow-cpu": "2.20.0", "keras": "3.15.9"})
    monkeypatch.setattr(changes, "list_packages", lambda: {"tensorflow": "2.20.3", "keras": "3.15.1"})
    assert find_changes(run) == []


def test_another_backend_is_a_change_where_something_is_trained(run):
    run.update(device={"kind": "gpu", "name": "x", "jit": True, "backend": "jax"})
    expected = ["software: the backend of Keras was jax, and is tensorflow"]
    assert find_changes(run, backend="tensorflow") == expected
    assert find_changes(run, backend="jax") == find_changes(run) == []


def test_a_change_is_refused_with_the_way_to_accept_it_and_then_recorded_once(run):
    edit(run, finetune__epochs=4)
    with pytest.raises(ResumeError, match=r"(?s)finetune.epochs: 9 -> 4.*--accept-changes"):
        check_changes_since_start(run, accept=False)
    assert run.record.changes == []
    check_changes_since_start(run, accept=True)
    check_changes_since_start(run, accept=False)
    record = json.loads((run.path / "run.json").read_text())
    assert record["changes"][0]["differences"] == ["config.yaml: finetune.epochs: 9 -> 4"]
    assert record["settings"]["finetune"]["epochs"] == 4
    assert "--accept-changes" in record["warnings"][0]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (START, []),
        ({**START, "train": {**START["train"], "new": (0, "9")}}, ["train had 3 images, and has 4: 1 added (new)"]),
        ({**START, "train": {"a": (0, "1"), "b": (1, "2")}}, ["train had 3 images, and has 2: 1 removed (c)"]),
        (
            {"train": {**START["train"], "d": (1, "4")}, "test": {"e": (0, "5")}},
            ["train had 3 images, and has 4: 1 moved here from test (d)", "test had 1 images, and has 1: 1 added (e)"],
        ),
        ({**START, "test": {"d": (1, "0")}}, ["test had 1 images, and has 1: 1 with other pixels (d)"]),
        ({**START, "test": {"d": (0, "4")}}, ["test had 1 images, and has 1: 1 with another label (d)"]),
        ({"train": dict(reversed(START["train"].items())), "test": START["test"]}, []),
    ],
)
def test_images_are_compared_by_split_id_pixels_and_label(splits, expected):
    assert compare_images(index(**START), index(**splits)) == expected


def test_other_soft_targets_are_not_called_other_labels():
    soft = [index(**START) | {"train_soft": np.array(digests)} for digests in (["x", "y", "z"], ["x", "n", "z"])]
    assert compare_images(*soft) == [
        "train had 3 images, and has 3: 1 with another soft target (data.votes, data.soft_targets) (b)"
    ]


def test_labels_and_streamed_parts_are_compared():
    old = {**index(("Happy", "Sad", "Fear")), "train_stream": np.array(["train", "with 10 images"])}
    new = {**index(("Happy", "Sad")), "train_stream": np.array(["train", "with 11 images"])}
    assert compare_images(old, new) == [
        "the labels were Happy, Sad, Fear, and are Happy, Sad",
        "train was train with 10 images, and is train with 11 images",
    ]


def test_only_the_first_ids_are_listed():
    many = {f"n{number}": (0, "1") for number in range(20)}
    line = compare_images(index(**START), index(train={**START["train"], **many}, test=START["test"]))[0]
    assert line.endswith("20 added (n0, n1, n2, ...)")


def test_other_images_are_refused_and_the_first_list_stays(run):
    check_changed_images(run, index(**START), accept=False)
    for _ in range(2):
        with pytest.raises(ResumeError, match=r"finetune.data: train had 3 images, and has 4: 1 added \(new\)"):
            check_changed_images(
                run, index(train={**START["train"], "new": (0, "9")}, test=START["test"]), accept=False
            )
    check_changed_images(run, index(**START), accept=False)


def test_a_member_is_compared_with_one_before_it_of_the_same_data(tmp_path, config, run):
    check_changed_images(run, index(**START), accept=False)
    other = with_overrides(config, {"finetune.data.seed": 7}).model_dump(mode="json")
    assert find_sibling(other, [run.path]) is None
    second = create_run(tmp_path / "runs", with_overrides(config, {"experiment.seed": 1}), argv=[])
    second.update(data_like=find_sibling(second.record.settings, [tmp_path, run.path]))
    with pytest.raises(ResumeError, match=rf"since {run.path.name}, a member before it, began"):
        check_changed_images(second, index(train=START["train"]), accept=False)
    check_changed_images(second, index(train=START["train"]), accept=True)
    # From then on it is compared with its own start.
    check_changed_images(second, index(train=START["train"]), accept=False)


def test_the_images_of_ef_fer1_are_compared_with_those_of_a_member_before_it(tmp_path, config):
    """data.json is there by then: EF-FER1's data are loaded after those of fine-tuning."""
    keys = {"pretrain": {"data": {"source": "synthetic_scenes"}}}
    first = create_run(tmp_path / "runs", with_overrides(config, keys), argv=[])
    check_changed_images(first, index(**START), accept=False)
    check_changed_images(first, index(**START), file=PRETRAIN_IMAGES_FILE, accept=False)
    for seed, more in enumerate(({}, {"pretrain.data.seed": 3})):
        second = create_run(
            tmp_path / "runs", with_overrides(config, {**keys, **more, "experiment.seed": seed + 1}), argv=[]
        )
        second.update(data_like=find_sibling(second.record.settings, [first.path]))
        (second.path / "data.json").write_text("{}")
        changed = index(train=START["train"])
        if more:
            check_changed_images(second, changed, file=PRETRAIN_IMAGES_FILE, accept=False)
        else:
            with pytest.raises(ResumeError, match=f"since {first.path.name}, a member before it, began"):
                check_changed_images(second, changed, file=PRETRAIN_IMAGES_FILE, accept=False)


def test_a_fold_is_compared_with_another_fold_whatever_part_an_image_is_in(tmp_path, config):
    keys = {"finetune.data.protocol": "cross_validation", "finetune.data.folds": 2}
    first, second = (
        create_run(tmp_path / "runs", with_overrides(config, {**keys, "finetune.data.fold": fold}), argv=[])
        for fold in (0, 1)
    )
    check_changed_images(first, index(**START), accept=False)
    second.update(data_like=find_sibling(second.record.settings, [first.path]))
    with pytest.raises(ResumeError, match=r"the data had 4 images, and has 4: 1 with other pixels \(d\)"):
        check_changed_images(
            second, index(train={"b": (1, "2"), "d": (1, "0")}, test={"a": (0, "1"), "c": (0, "3")}), accept=False
        )
    turned = index(
        train={name: START["train"][name] for name in ("b", "c")} | START["test"], test={"a": START["train"]["a"]}
    )
    check_changed_images(second, turned, accept=False)
    # With its own start the splits are compared as well.
    with pytest.raises(ResumeError, match=r"moved here from"):
        check_changed_images(second, index(**START), accept=False)
