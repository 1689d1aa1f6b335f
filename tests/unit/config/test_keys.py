"""The description of the keys for readers and editors."""

from __future__ import annotations

from dlfer.config.keys import build_schema, describe_keys, find_default, format_keys, list_keys, suggest_key


def test_every_key_is_described():
    rows = {row["key"]: row for row in describe_keys()}
    assert list(rows) == list(list_keys())
    assert rows["experiment.name"]["default"] == "required"
    assert rows["finetune.epochs"] == {"key": "finetune.epochs", "values": "integer", "default": "30", "meaning": ""}
    assert rows["experiment.jit"]["values"] == "auto | true/false"
    assert rows["finetune.augment.rotation"]["meaning"].startswith("Degrees")
    assert "finetune.augment.rotation: number   = 0.0\n    Degrees" in format_keys()


def test_the_schema_for_editors_knows_extends_descriptions_and_null():
    schema = build_schema()
    assert schema["properties"]["extends"]["type"] == "string"
    assert "required" not in schema
    stage = schema["$defs"]["StageConfig"]
    assert {"type": "null"} in stage["properties"]["augment"]["anyOf"]
    assert stage["additionalProperties"] is False
    rotation = schema["$defs"]["AugmentConfig"]["properties"]["rotation"]
    assert rotation["description"].startswith("Degrees")
    assert rotation["maximum"] == 180


def test_suggestions_prefer_siblings_then_the_same_stage():
    assert suggest_key(("finetune", "epoch")) == "finetune.epochs"
    assert suggest_key(("pretrain", "learning_rate")) == "pretrain.optimizer.learning_rate"
    assert suggest_key(("finetune", "rotation")) == "finetune.augment.rotation"
    assert suggest_key(("finetune", "qqqqqq")) is None


def test_defaults():
    assert find_default(("finetune", "optimizer", "name")) == "adamw"
    assert find_default(("finetune", "optimizer"))["learning_rate"] == 0.001
    assert find_default(("experiment", "name")) is None
