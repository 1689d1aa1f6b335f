"""Experiment files: one message for all problems, extends, overrides, the dump and the digest."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlfer.config.keys import rename_key, rename_keys
from dlfer.config.load import (
    compute_digest,
    dump_experiment,
    find_experiment,
    find_override,
    load_experiment,
    load_recorded_experiment,
    parse_override,
    parse_recorded_experiment,
    resolve_path,
    with_overrides,
)
from dlfer.config.names import expand_home
from dlfer.errors import ConfigError

EXPERIMENTS = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))
SMALL = """\
experiment: {name: small}
finetune:
  data: {source: synthetic_faces}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the working directory; a relative name keeps messages short."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    return write


def problems_of(*args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(*args, **kwargs)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_shipped_experiments_are_found_by_name_at_home_then_in_the_package_then_in_the_checkout(tmp_path, monkeypatch):
    home, package, checkout = (tmp_path / name for name in ("home", "package", "checkout"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DLFER_HOME", str(home))
    monkeypatch.setattr("dlfer.config.names.PACKAGE", package)
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: checkout)
    for place in (checkout, package, home):
        file = place / "experiments" / "first.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(SMALL)
        assert find_experiment("first") == find_experiment("experiments/first.yaml") == file
    assert load_experiment("first").experiment.name == "small"
    (checkout / "experiments" / "second.yaml").write_text("extends: first.yaml\nexperiment: {name: second}\n")
    assert load_experiment(Path("second"), {"finetune.epochs": 3}).experiment.name == "second"
    for name in ("first.yaml", "./experiments/other/first.yaml", str(home / "first.yaml")):
        assert find_experiment(name) == Path(name)
    Path("experiments").mkdir()
    Path("experiments/first.yaml").write_text(SMALL.replace("small", "own"))
    assert load_experiment("experiments/first.yaml").experiment.name == "own"
    assert load_experiment("first").experiment.name == "small"


@pytest.mark.parametrize("name", ["thirst", "experiments/thirst.yaml", "a\0b", "t" * 300])
def test_a_name_that_no_shipped_experiment_has_is_refused_with_those_there_are(name, write):
    with pytest.raises(ConfigError, match=r"there is no such file.*come with dlfer: .*lite2, .*quickstart"):
        load_experiment(name)


@pytest.mark.parametrize("name", ["none.yaml", "folder", "a/b", "t" * 300 + ".yaml"])
def test_what_is_no_name_of_a_shipped_experiment_is_read_as_a_path(name, write, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ConfigError, match=r"there is no such file\. Expected an experiment file|is a folder|cannot be read"
    ):
        load_experiment(name)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("1_0", " (without quotes or underscores)"),
        ('"1_0"', " (without quotes or underscores)"),
        ("'3'", " (without quotes)"),
        ("infinity", ""),
        ("three", ""),
    ],
)
def test_what_is_no_number_for_its_form_is_told_by_the_form(write, text, advice):
    lines = problems_of(
        write(f"experiment: {{name: x}}\nfinetune: {{data: {{source: synthetic_faces}}, epochs: {text}}}\n")
    )
    assert lines[1].endswith(f"expected a whole number{advice}.")


def test_all_problems_come_in_one_message_with_line_and_nearest_key(write):
    name = write("""\
        experiment: {name: Not Good, seed: 1.0, jit: maybe}
        model:
          backbone: efficientnet_b33
          dropuot: 0.3
        finetune:
          data: {source: tfds, protocol: paper, nmae: imagenet2012}
          epochs: "3"
          learning_rate: 1e-3
          optimizer: {name: sgd, beta_1: 0.9}
          clip: .nan
          augment: 3
        ablation: {seeds: [0, -1]}
        expected: {test_accuracy: [0.1, 0.2, 0.3]}
    """)
    lines = problems_of(name)
    assert lines[0] == f"a.yaml: {len(lines) - 1} problems:"
    for expected in (
        'a.yaml line 1: experiment.name: found "Not Good", expected lower-case letters, digits, - and _',
        "a.yaml line 1: experiment.seed: found 1.0, expected a whole number.",
        'a.yaml line 1: experiment.jit: found "maybe", expected auto or true or false.',
        "a.yaml line 3: model.backbone: found",
        "a.yaml line 4: model.dropuot: there is no such key. Did you mean model.dropout?",
        "a.yaml line 6: finetune.data.nmae: there is no such key. Did you mean finetune.data.name?",
        # A rule of the section that the unknown key above would have hidden:
        "a.yaml line 6: finetune.data.name: source tfds needs the name of a data set",
        'a.yaml line 7: finetune.epochs: found "3", expected a whole number (without quotes).',
        "a.yaml line 8: finetune.learning_rate: there is no such key. Did you mean finetune.optimizer.learning_rate?",
        "a.yaml line 9: finetune.optimizer.beta_1: sgd has none; it takes momentum, nesterov, weight_decay.",
        "a.yaml line 10: finetune.clip: found NaN, expected",
        "a.yaml line 11: finetune.augment: found 3, expected a section of keys and values: rotation, zoom, shift, mirror, "
        "fill, brightness, contrast, mixup, cutmix, erasing.",
        "a.yaml line 12: ablation.seeds.1: found -1, expected greater than or equal to 0.",
        "a.yaml line 13: expected.test_accuracy: found [0.1, 0.2, 0.3], expected a list of at most 2 items.",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    assert any(line.endswith("(did you mean efficientnet_b3?).") for line in lines)


def test_what_is_missing_points_to_the_section_it_is_missing_from(write):
    lines = problems_of(write("experiment: {seed: 1}\n\nfinetune:\n  epochs: 3\n"))
    assert "a.yaml line 1: experiment.name: is missing; expected text." in lines
    assert "a.yaml line 3: finetune.data: is missing; expected a section with source." in lines


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_a_file_without_sections_is_refused(write, text):
    assert "expected an experiment file with sections" in problems_of(write(text))[0]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_numbers_are_finite(write, value):
    name = write(SMALL)
    with pytest.raises(ConfigError, match=r"finetune\.clip: found"):
        load_experiment(name, {"finetune.clip": float(value)})


def test_a_file_extends_another(write):
    write(
        """\
        experiment: {name: base, seed: 3}
        pretrain: {weights: imagenet}
        finetune:
          data: {source: fer2013, path: fer.csv, select_on: 0.1}
          epochs: 7
          augment: {rotation: 10, zoom: 0.1}
        """,
        "folder/base.yaml",
    )
    write("extends: base.yaml\nfinetune: {epochs: 9, augment: {zoom: 0.2}}\n", "folder/middle.yaml")
    child = load_experiment(write("extends: folder/middle.yaml\nexperiment: {name: child}\n"))
    assert (child.experiment.name, child.experiment.seed, child.finetune.epochs) == ("child", 3, 9)
    assert (child.finetune.augment.rotation, child.finetune.augment.zoom) == (10, 0.2)
    assert child.pretrain.weights == "imagenet"


def test_null_removes_a_section(write):
    write(
        "experiment: {name: base}\npretrain: {weights: imagenet}\n"
        "finetune: {data: {source: synthetic_faces, labels: {aliases: {a: b, c: d}}}, augment: {rotation: 10}}\n",
        "base.yaml",
    )
    child = load_experiment(
        write("extends: base.yaml\npretrain: null\nfinetune: {augment: null, data: {labels: {aliases: {a: null}}}}\n")
    )
    assert child.pretrain is None
    assert child.finetune.augment.rotation == 0
    assert child.finetune.data.labels.aliases == {"c": "d"}
    grandchild = load_experiment(
        write("extends: a.yaml\npretrain: {data: {source: synthetic_scenes}}\n", "grandchild.yaml")
    )
    assert grandchild.pretrain.weights is None


def test_another_source_replaces_the_whole_data_section(write):
    write(
        "experiment: {name: base}\nfinetune: {data: {source: fer2013, path: fer.csv, select_on: 0.1}, epochs: 3}\n",
        "base.yaml",
    )
    child = load_experiment(write("extends: base.yaml\nfinetune: {data: {source: synthetic_faces}}\n"))
    assert (child.finetune.data.path, child.finetune.data.select_on, child.finetune.epochs) == (None, None, 3)
    same = load_experiment(write("extends: base.yaml\nfinetune: {data: {source: fer2013, path: other.csv}}\n"))
    assert (same.finetune.data.path, same.finetune.data.select_on) == ("other.csv", 0.1)


def test_a_problem_is_told_where_it_stands_in_parent_or_child(write):
    write("experiment: {name: base}\nfinetune:\n  epochs: 0\n  data: {source: fer2013, path: a.csv}\n", "base.yaml")
    lines = problems_of(write("extends: base.yaml\n\nfinetune: {data: {source: folder}}\n"))
    assert "base.yaml line 3: finetune.epochs: found 0, expected greater than or equal to 1." in lines
    # The parent's path is gone with the parent's section, and so is its line.
    assert any(line.startswith("a.yaml line 3: finetune.data.path: source folder needs one") for line in lines)


def test_extends_refuses_circles_and_absent_or_several_parents(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: ./a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"b.yaml line 1: extends: the files extend each other in a circle"):
        load_experiment("a.yaml")
    with pytest.raises(ConfigError, match=r"c.yaml line 2: extends: there is no file none.yaml"):
        load_experiment(write("# x\nextends: none.yaml\n", "c.yaml"))
    with pytest.raises(ConfigError, match="expected the name of one experiment file"):
        load_experiment(write("extends: [a.yaml, b.yaml]\n", "d.yaml"))


def test_overrides_set_keys_start_sections_and_leave_the_callers_values_alone(write):
    name = write(SMALL + "pretrain: null\n")
    data = {"source": "synthetic_scenes"}
    overrides = {"pretrain.data": data, "pretrain.optimizer.learning_rate": 1e-2, "ablation.seeds": (1, 2)}
    config = load_experiment(name, overrides)
    assert config.pretrain.data.source == "synthetic_scenes"
    assert config.pretrain.optimizer.learning_rate == 0.01
    assert config.ablation.seeds == (1, 2)
    load_experiment(name, {"finetune.data": data, "finetune.data.seed": 5})
    assert data == {"source": "synthetic_scenes"}
    assert load_experiment(name, {"pretrain": None}).pretrain is None
    assert load_experiment(name, {"finetune.augment": None}).finetune.augment.mirror == 0


def test_overrides_are_checked_like_the_file(write):
    name = write(SMALL)
    lines = problems_of(name, {"finetune.epochz": 3, "finetune.clip": "x", "modle.dropout": 0.1, "extends": "b.yaml"})
    assert "--set finetune.epochz: finetune.epochz: there is no such key. Did you mean finetune.epochs?" in lines
    assert '--set finetune.clip: finetune.clip: found "x", expected a number.' in lines
    assert "--set modle.dropout: modle: there is no such key. Did you mean model?" in lines
    assert any("extends: cannot be set" in line for line in lines)
    with pytest.raises(ConfigError, match="YAML cannot contain"):
        load_experiment(name, {"finetune.data.path": object()})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.b=1e-3", ("a.b", 0.001)),
        ("pretrain=null", ("pretrain", None)),
        ("a=x=y", ("a", "x=y")),
        ("a={b: [1, no]}", ("a", {"b": [1, "no"]})),
        ("a='1'", ("a", "1")),
        ("a=${DLFER_DATA}/x", ("a", "${DLFER_DATA}/x")),
    ],
)
def test_parse_override(text, parsed):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("path", ["h/faces #2", "faces # 1 #2", "a#b", "faces #", "1 face #2"])
def test_a_value_on_the_command_line_keeps_what_would_be_a_comment_in_a_file(path):
    assert parse_override(f"finetune.data.path={path}") == ("finetune.data.path", path)
    assert parse_override(f'finetune.data.path="{path}"') == ("finetune.data.path", path)


@pytest.mark.parametrize("value", ["3 #x", "null #x", "#2", " #2", "[1, 2] # two", '"h/faces" #2', "a: h/faces #2"])
def test_a_comment_behind_what_is_no_text_is_refused(value):
    with pytest.raises(ConfigError, match=r"^--set a\.b: found #.*, which begins a comment in YAML.*quotes") as caught:
        parse_override(f"a.b={value}")
    assert value.strip().replace('"', '\\"') in str(caught.value)


def test_a_value_of_several_lines_may_have_comments():
    assert parse_override("a={b: 1, # one\n c: 2}") == ("a", {"b": 1, "c": 2})


@pytest.mark.parametrize("text", ["a", "=3", "a..b=3", ".a=3", "a=[1"])
def test_parse_override_refuses(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_override(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mod\udce9el", 7, "YAML cannot contain"),
        ("model.dropout", "\udce9", "YAML cannot contain"),
        (".".join("a" * 400), 1, "nested too deeply"),
        (".".join("a" * 5000), 1, "YAML cannot contain"),
    ],
    ids=["key", "value", "deep", "deeper"],
)
def test_overrides_that_no_file_could_hold_are_refused(write, key, value, message):
    """Half a character is what a byte of the command line becomes that is no UTF-8."""
    with pytest.raises(ConfigError, match=rf"1 problem:\n.*{message}"):
        load_experiment(write(SMALL), {key: value})


def test_messages_do_not_repeat_whole_values_and_end(write):
    name = write(SMALL)
    with pytest.raises(ConfigError) as caught:
        load_experiment(name, {"search": {"space": {"model.dropout": {"between": list(range(5000))}}}})
    assert "expected two numbers, [low, high]" in str(caught.value)
    assert len(str(caught.value)) < 3000
    with pytest.raises(ConfigError, match=r"and \d+ more") as caught:
        load_experiment(name, {f"finetune.k{number}": 1 for number in range(200)})
    assert len(str(caught.value).splitlines()) < 60
    with pytest.raises(ConfigError, match="and 450 more"):
        load_experiment(write("".join(f"{number}: 1\n" for number in range(500))))


def test_with_overrides_validates_again(write):
    config = load_experiment(write(SMALL))
    changed = with_overrides(config, {"experiment.seed": 4, "finetune.early_stopping.patience": 2})
    assert (changed.experiment.seed, changed.finetune.early_stopping.patience) == (4, 2)
    assert config.experiment.seed == 0
    with pytest.raises(ConfigError, match=r"experiment small with overrides: 1 problem:\n  --set finetune.epochs: "):
        with_overrides(config, {"finetune.epochs": 0})


def test_resolve_path(monkeypatch):
    monkeypatch.delenv("DLFER_DATA", raising=False)
    assert resolve_path("${DLFER_DATA}/fer2013") == Path("data/fer2013")
    monkeypatch.setenv("DLFER_DATA", "/somewhere")
    assert resolve_path("${DLFER_DATA}/fer2013") == Path("/somewhere/fer2013")
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("~/x") == Path("/home/me/x")
    assert resolve_path("$HOME/x") == Path("/home/me/x")
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match="the environment variable NOT_SET is not set"):
        resolve_path("/a/${NOT_SET}/b")


def test_a_folder_that_is_named_like_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("~") == Path("/home/me")
    for text in ("./~", "././~", str(tmp_path / "~")):
        found = resolve_path(text)
        assert found == resolve_path(str(found)) == expand_home(found) == tmp_path / "~"
    assert resolve_path("./~/x") == tmp_path / "~/x"
    assert resolve_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")  # as a shell leaves it
    assert resolve_path("./a~") == Path("a~")


def test_the_config_keeps_the_path_as_written(write):
    name = write(SMALL.replace("source: synthetic_faces", "source: arrays, path: '${DLFER_DATA}/a.npz'"))
    assert load_experiment(name).finetune.data.path == "${DLFER_DATA}/a.npz"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_and_its_dump_is_complete_and_equal(path, tmp_path):
    config = load_experiment(path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_experiment(config))
    again = load_experiment(dumped)
    assert again == config
    assert dump_experiment(again) == dumped.read_text()
    assert "checkpoint_minutes: 5.0" in dumped.read_text()


_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    aliases=st.dictionaries(_names, _names, max_size=3),
    drop=st.lists(_names, max_size=3),
    rate=st.floats(min_value=1e-12, max_value=10),
    path=_names,
)
def test_any_text_and_number_survives_dump_and_load(tmp_path, aliases, drop, rate, path):
    base = tmp_path / "base.yaml"
    base.write_text(SMALL)
    data = {"source": "arrays", "path": path, "labels": {"aliases": aliases, "drop": drop}}
    config = load_experiment(base, {"finetune.data": data, "finetune.optimizer.learning_rate": rate})
    dumped = tmp_path / "dump.yaml"
    dumped.write_text(dump_experiment(config), encoding="utf-8")
    assert load_experiment(dumped) == config


def test_the_digest_is_that_of_the_result(write):
    config = load_experiment(write(SMALL))
    digest = compute_digest(config)
    assert len(digest) == 64
    same = {
        "experiment.name": "other",
        "experiment.checkpoint_minutes": 1.0,
        "experiment.track": ["mlflow", "wandb"],
        "experiment.track_model": True,
        "expected.result": "good",
        "ablation.seeds": [5],
        "search": {"space": {"finetune.epochs": {"choice": [1, 2]}}},
        "model.dropout": config.model.dropout,
        "finetune.augment.rotation": 0,
    }
    assert compute_digest(with_overrides(config, same)) == digest
    for key, value in {"experiment.seed": 1, "model.dropout": 0.31, "evaluate.bootstrap": 200}.items():
        assert compute_digest(with_overrides(config, {key: value})) != digest


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"protocol": "official", "split": "after_balance"}, "puts copies of one image into training and into test"),
        ({"soft_targets": "ferplus"}, "without a file of votes"),
        ({"soft_share": 0.5}, "belongs to soft_targets"),
        ({"protocol": "paper", "split": "after_balance", "drop_duplicates": True}, "puts duplicates on both sides"),
        ({"protocol": "paper"}, "needs one of after_balance, official_80_20"),
        ({"protocol": "paper", "split": "official_80_20", "select_on": 0.1}, "selects on a fifth of training"),
        ({"protocol": "paper", "split": "after_balance"}, "Set balance: augment"),
    ],
)
def test_protocols_that_do_not_go_together_are_refused_when_the_file_is_read(keys, words, tmp_path):
    file = tmp_path / "e.yaml"
    data = {"source": "synthetic_faces", **keys}
    file.write_text(yaml.safe_dump({"experiment": {"name": "e"}, "finetune": {"data": data}}))
    with pytest.raises(ConfigError, match=words):
        load_experiment(file)


def test_a_sigmoid_head_is_trained_by_binary_crossentropy_alone(write):
    path = write(SMALL)
    sigmoid = {"model.head.activation": "sigmoid"}
    binary = {"finetune.loss.name": "binary_crossentropy"}
    load_experiment(path, {**sigmoid, **binary, "pretrain.weights": "imagenet"})
    with pytest.raises(ConfigError, match=r"finetune\.loss\.name: found categorical_crossentropy with model\.head"):
        load_experiment(path, sigmoid)
    with pytest.raises(ConfigError, match=r"pretrain\.loss\.name: found focal with model\.head"):
        load_experiment(
            path, {**sigmoid, **binary, "pretrain.data.source": "synthetic_scenes", "pretrain.loss.name": "focal"}
        )
    # What was trained before this rule stays readable.
    record = write(
        dump_experiment(load_experiment(path)).replace("activation: softmax", "activation: sigmoid"), "run.yaml"
    )
    assert load_recorded_experiment(record).model.head.activation == "sigmoid"


@pytest.mark.parametrize("key", ["ablation.seeds", "sweep.seeds"])
def test_seeds_that_stand_twice_are_refused(write, key):
    # One training would pass for two, and the interval over seeds be too narrow.
    path = write(SMALL)
    load_experiment(path, {"sweep.grid": {"finetune.epochs": [2, 3]}, key: [0, 1]})
    with pytest.raises(ConfigError, match=rf"--set {key}: {key}: found \[0, 1, 0\], expected different seeds"):
        load_experiment(path, {"sweep.grid": {"finetune.epochs": [2, 3]}, key: [0, 1, 0]})


def test_gradients_are_clipped_unless_the_file_says_otherwise(write):
    """Also where a parent sets it: null is a value here, and does not bring the default back."""
    assert load_experiment(write(SMALL)).finetune.clip == 1.0
    write(SMALL.replace("synthetic_faces}", "synthetic_faces}\n  clip: 0.5"), "parent.yaml")
    child = "extends: parent.yaml\nexperiment: {name: child}\nfinetune: {clip: null}\n"
    assert load_experiment(write(child, "child.yaml")).finetune.clip is None
    assert load_experiment("a.yaml", {"finetune.clip": None}).finetune.clip is None
    assert load_experiment(write(dump_experiment(load_experiment("child.yaml")), "b.yaml")).finetune.clip is None


BALANCED = """\
experiment: {name: small}
model: {family: %s, backbone: efficientnet_nano}
pretrain: {data: {source: synthetic_scenes}, balance: augment%s}
finetune: {data: {source: synthetic_faces}, balance: augment%s}
%s"""


@pytest.mark.parametrize(
    ("family", "pretrain", "finetune", "refused"),
    [
        ("transfer", "", ", augment: {mirror: 0.5}", "pretrain.balance"),
        ("transfer", ", augment: {erasing: 0.1}", "", "finetune.balance"),
        ("transfer", ", augment: {rotation: 5}", ", augment: {fill: reflect}", "finetune.balance"),
        ("transfer", ", augment: {mixup: 0.2}", ", crop: 0.8", None),
        # Its copies are augmented in a way of their own.
        ("boosted", ", augment: {mirror: 0.5}", "", None),
        ("boosted", "", "", "pretrain.balance"),
    ],
)
def test_balance_by_copies_that_are_all_the_same_is_refused(write, family, pretrain, finetune, refused):
    text = BALANCED % (family, pretrain, finetune, "boosting: {}\n" if family == "boosted" else "")
    if refused is None:
        assert load_experiment(write(text)).finetune.balance == "augment"
        return
    lines = problems_of(write(text))
    assert any(f"{refused}: found augment, but {refused[:8]}" in line and "changes nothing" in line for line in lines)


def test_copies_that_were_made_before_the_split_need_no_augmentation(write):
    text = SMALL.replace(
        "{source: synthetic_faces}", "{source: synthetic_faces, protocol: paper, split: after_balance}"
    )
    assert load_experiment(write(text + "  balance: augment\n")).finetune.augment.changes_images is False


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"optimizer": {"name": "adamw", "weight_decay": 0.1, "weight_decay_kind": "l2"}},
            "weight_decay_kind: found l2",
        ),
        ({"schedule": {"name": "plateau", "patience": 0}}, "schedule.patience: found 0, expected"),
    ],
)
def test_keys_of_a_training_that_would_mean_nothing_are_refused(write, keys, words):
    text = yaml.safe_dump({"experiment": {"name": "e"}, "finetune": {"data": {"source": "synthetic_faces"}, **keys}})
    assert any(words in line for line in problems_of(write(text)))


@pytest.mark.parametrize(
    ("text", "overrides", "key"),
    [
        ("  data: {source: synthetic_faces, drop_twins: true}", {}, "a.yaml line 3: finetune.data.drop_twins"),
        (
            "  data: {source: synthetic_faces}",
            {"finetune.data.drop_twins": True},
            "--set finetune.data.drop_twins: finetune.data.drop_twins",
        ),
        (
            "  data: {source: synthetic_faces}\nsweep: {cells: {a: {finetune.data.drop_twins: true}}}",
            {},
            "finetune.data.drop_twins",
        ),
        (
            "  data: {source: synthetic_faces}\nsearch: {space: {finetune.data.drop_twins: {choice: [true, false]}}}",
            {},
            "finetune.data.drop_twins",
        ),
    ],
)
def test_a_key_that_was_renamed_is_refused_with_its_present_name(write, text, overrides, key):
    file = write(f"experiment: {{name: small}}\nfinetune:\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, overrides)
    message = "this key was renamed to finetune.data.drop_duplicates."
    assert f"{key}: {message}" in str(caught.value)


def test_the_record_of_an_earlier_version_is_read_with_the_present_names(write):
    former = dump_experiment(load_experiment(write(SMALL), {"finetune.data.drop_duplicates": True}))
    former = former.replace("drop_duplicates", "drop_twins")
    assert "sweep: null" in former
    file = write(
        former.replace("sweep: null", "sweep: {cells: {no twins: {finetune.data.drop_twins: false}}}"), "old.yaml"
    )
    found = load_recorded_experiment(file)
    assert found.finetune.data.drop_duplicates is True
    assert found.sweep.cells == {"no twins": {"finetune.data.drop_duplicates": False}}
    with pytest.raises(ConfigError, match=r"renamed to finetune\.data\.drop_duplicates"):
        load_experiment(file)


def test_keys_in_lists_have_their_present_names_too():
    members = [{"name": "a", "set": {"finetune.data.drop_twins": True}}, {"name": "b", "model": "lite2"}]
    assert rename_keys({"ensemble": {"members": members}, "model": {"data": 3}, "data": {"drop_twins": [1]}}) == {
        "ensemble": {"members": [{"name": "a", "set": {"finetune.data.drop_duplicates": True}}, members[1]]},
        "model": {"data": 3},
        "data": {"drop_duplicates": [1]},
    }
    assert rename_key("data.drop_twins_of") == "data.drop_twins_of"


def test_an_override_of_a_loaded_experiment_is_checked_as_one_of_a_file(write):
    path = write(SMALL)
    binary = {f"{stage}.loss.name": "binary_crossentropy" for stage in ("pretrain", "finetune")}
    config = load_experiment(path, {"model.head.activation": "sigmoid", **binary, "pretrain.weights": "imagenet"})
    with pytest.raises(ConfigError, match=r"finetune\.loss\.name: found categorical_crossentropy with .*sigmoid"):
        load_experiment(config, {"finetune.loss.name": "categorical_crossentropy"})
    assert load_experiment(config, {"finetune.epochs": 3}).finetune.epochs == 3


@pytest.mark.parametrize("text", ["[]", "", "3", "text"])
def test_a_record_that_is_no_mapping_is_refused(text):
    with pytest.raises(ConfigError, match=r"run\.yaml: found .*, expected an experiment file"):
        parse_recorded_experiment(text, "run.yaml")


def test_a_section_that_was_loaded_counts_as_an_override_of_its_keys(write):
    config = load_experiment("experiments/lite2_search.yaml")
    assert find_override({"search": config.search}, "search.trials") == "search"
    assert find_override({"search": {"seed": 1}}, "search.trials") is None
