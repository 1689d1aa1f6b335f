"""The table of names that other tools have: everything that it names exists, and nothing is taken for what it may mean."""

from __future__ import annotations

import pytest

from dlfer.config.aliases import KEYS, OPTIONS, VERBS, find_keys
from dlfer.config.keys import describe_unknown_key, list_keys
from dlfer.config.load import load_experiment
from dlfer.errors import ConfigError

SMALL = "experiment: {name: small}\nfinetune: {data: {source: synthetic_faces}}\n"


@pytest.fixture
def load(tmp_path):
    def load(text="", overrides=None):
        path = tmp_path / "a.yaml"
        path.write_text(SMALL + text)
        return load_experiment(path, overrides)

    return load


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_key_of_the_table_exists_in_each_stage(stage):
    known = set(list_keys())
    for word in KEYS:
        for found in find_keys((stage, word)):
            assert found.partition("=")[0] in known, word


def test_words_are_as_they_are_looked_up():
    for word in (*VERBS, *OPTIONS, *KEYS):
        assert word == word.casefold().replace("-", "_").lstrip("_")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epochs", "finetune.epochs"),
        ("lr", "finetune.optimizer.learning_rate"),
        ("finetune.lr", "finetune.optimizer.learning_rate"),
        ("pretrain.lr", "pretrain.optimizer.learning_rate"),
        ("finetune.optimizer.lr", "finetune.optimizer.learning_rate"),
        ("batch", "finetune.batch_size"),
        ("bs", "finetune.batch_size"),
        ("batch-size", "finetune.batch_size"),
        ("pretrain.bs", "pretrain.batch_size"),
        ("size", "finetune.image_size or finetune.data.size"),
        ("imgsz", "finetune.image_size"),
        ("optimizer", "finetune.optimizer.name"),
        ("backbone", "model.backbone"),
        ("seed", "experiment.seed"),
        ("gpu", "experiment.device=gpu"),
        ("device", "experiment.device"),
        ("dropout", "model.dropout"),
        ("data", "finetune.data.path"),
        # Not in the table: the same name within the nearer stage, that of finetune first.
        ("learning_rat", "finetune.optimizer.learning_rate"),
        ("ema", "finetune.ema"),
    ],
)
def test_set_names_the_key_that_was_meant(load, key, meant):
    with pytest.raises(ConfigError) as caught:
        load(overrides={key: 3})
    assert f"there is no such key. Did you mean {meant}?" in str(caught.value)


def test_files_get_the_same_hints_with_their_lines(load):
    with pytest.raises(ConfigError) as caught:
        load("epochs: 3\nmodel: {arch: efficientnet_b0}\npretrain: {weights: imagenet, lr: 0.1}\n")
    text = str(caught.value)
    assert "a.yaml line 3: epochs: there is no such key. Did you mean finetune.epochs?" in text
    assert "model.arch: there is no such key. Did you mean model.backbone?" in text
    assert "pretrain.lr: there is no such key. Did you mean pretrain.optimizer.learning_rate?" in text


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("model", "efficientnet_b0", "model.backbone"),
        ("finetune.optimizer", "adam", "finetune.optimizer.name"),
        ("finetune.schedule", "cosine", "finetune.schedule.name"),
        ("finetune.data", "my_faces", "finetune.data.path"),
    ],
)
def test_a_value_for_a_section_names_the_key_in_it(load, key, value, meant):
    with pytest.raises(ConfigError) as caught:
        load(overrides={key: value})
    assert f'{key}: found "{value}", expected a section of keys and values (did you mean {meant}?)' in str(caught.value)


def test_unknown_words_have_no_hint():
    assert describe_unknown_key(("finetune", "xyzzy_plugh")) is None
