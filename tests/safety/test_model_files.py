"""Trained models that somebody else may have written: a changed byte, a Lambda, a pickle, a shape, a path."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from dlfer.config.sections import BoostingConfig, ModelConfig
from dlfer.errors import ModelError, TransferError
from dlfer.model.backbones import build_backbone, load_published_weights
from dlfer.model.classifier import WEIGHTS_FILE, TransferClassifier
from dlfer.model.families import EnsembleClassifier, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.transfer import RECORD_FILE, read_backbone_record, transfer_backbone, write_backbone
from dlfer.model.trees import import_xgboost, make_parameters, read_booster
from dlfer.model.weights_file import load_weights
from dlfer.runs.files import hash_file
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.train.state import read_state, restore_checkpoint, write_checkpoint

LABELS = ("a", "b", "c")
CONFIG = ModelConfig(backbone="efficientnet_nano")


class Mine:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An artifact of the smallest network."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    network = build_transfer_network(CONFIG, num_labels=3, image_size=32, channels=1)
    TransferClassifier(network, LABELS, config=CONFIG, channels=1).save(folder)
    return folder


@pytest.fixture
def artifact(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def read_record(folder: Path) -> dict:
    return json.loads((folder / ARTIFACT_FILE).read_text())


def write_record(folder: Path, record) -> None:
    (folder / ARTIFACT_FILE).write_text(json.dumps(record))


def forge(folder: Path) -> None:
    """Make the manifest agree with what the files are now, as whoever changed them would."""
    record = read_record(folder)
    write_record(folder, record | {"sha256": {name: hash_file(folder / name) for name in record["sha256"]}})


def test_a_changed_byte_is_refused(artifact):
    load_artifact(artifact)
    contents = bytearray((artifact / WEIGHTS_FILE).read_bytes())
    contents[-100] ^= 1
    (artifact / WEIGHTS_FILE).write_bytes(contents)
    with pytest.raises(ModelError, match=r"network\.weights\.h5: sha256 is .* damaged or was changed"):
        load_artifact(artifact)


@pytest.mark.parametrize("name", ["../stolen.h5", "/etc/passwd", "link.h5"])
def test_a_path_that_leaves_the_folder_is_refused(artifact, name):
    outside = artifact.parent / "stolen.h5"
    outside.write_bytes(b"secret")
    (artifact / "link.h5").symlink_to(outside)
    record = read_record(artifact)
    write_record(artifact, record | {"sha256": record["sha256"] | {name: hash_file(outside)}})
    with pytest.raises(ModelError, match="outside of its folder"):
        load_artifact(artifact)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sha256", {}),
        ("sha256", None),
        ("labels", []),
        ("labels", ["a", "a", "b"]),
        ("labels", [str(n) for n in range(20_000)]),
        ("input", None),
        ("input", {"channels": 1, "image_size": 10**9}),
        ("input", {"channels": 10**6, "image_size": 32}),
        ("input", {"channels": 1, "image_size": 32, "crop": -1}),
        ("model", {"backbone": "os.system"}),
        ("model", None),
        ("about", "all"),
        ("family", ["transfer"]),
        ("format", {}),
    ],
)
def test_a_forged_description_is_refused(artifact, key, value):
    write_record(artifact, read_record(artifact) | {key: value})
    with pytest.raises(ModelError, match=r"artifact\.json: "):
        load_artifact(artifact)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, "{", "\0"])
def test_a_description_that_is_none_is_refused(artifact, text):
    (artifact / ARTIFACT_FILE).write_text(text)
    with pytest.raises(ModelError, match=r"artifact\.json: (expected|found)"):
        load_artifact(artifact)


def test_a_pickle_with_the_name_and_the_digest_of_weights_is_never_opened(artifact, tmp_path):
    (artifact / WEIGHTS_FILE).write_bytes(pickle.dumps(Mine(tmp_path / "marker")))
    forge(artifact)
    with pytest.raises(ModelError, match="begins like a pickle, which is a program and is never opened"):
        load_artifact(artifact)
    assert not (tmp_path / "marker").exists()


def test_members_of_an_ensemble_stay_in_its_folder(saved, tmp_path):
    members = {"m1": load_artifact(saved)}
    EnsembleClassifier(members, LABELS, config=ModelConfig(family="ensemble")).save(tmp_path / "model")
    load_artifact(tmp_path / "model")
    record = read_record(tmp_path / "model")
    shutil.copytree(saved, tmp_path / "stranger")
    for name in ("../../stranger", "..", "", 3):
        forged = record | {"ensemble": record["ensemble"] | {"members": [name]}}
        write_record(tmp_path / "model", forged)
        with pytest.raises(ModelError, match=r"expected at most 1000|does not name"):
            load_artifact(tmp_path / "model")
    for changed in ({"combine": "eval"}, {"members": []}, {"trained": 3}, {"members": ["m1"] * 2000}):
        write_record(tmp_path / "model", record | {"ensemble": record["ensemble"] | changed})
        with pytest.raises(ModelError, match="ensemble"):
            load_artifact(tmp_path / "model")


# ---- weights: what stands in an HDF5 file ----


def make_network(units: int = 3, *extra) -> keras.Model:
    layers = [keras.layers.Dense(units), *extra, keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((4,)), *layers])


def find_kernel(file: h5py.File) -> h5py.Dataset:
    return file["layers/dense/vars/0"]


def link_outside(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.ExternalLink("other.weights.h5", "/layers/dense/vars/0")


def link_softly(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.SoftLink("/layers/dense_1/vars/0")


def keep_outside(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (4, 3), "f4", external=[("/etc/hostname", 0, 48)])


def make_virtual(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (4, 3))
    file.create_virtual_dataset("layers/dense/vars/0", layout)


def make_giant(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (2**31, 2**31), "f4", chunks=(64, 64), compression="gzip")


def make_resizable(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (4, 3), "f4", maxshape=(None, None), chunks=(2**14, 2**12))


def make_strings(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (4, 3), h5py.string_dtype())


def make_record(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (4, 3), [("a", "f4"), ("b", "f4")])


def add_another(file: h5py.File) -> None:
    file.create_dataset("layers/evil/vars/0", data=np.zeros(7))


def make_circle(file: h5py.File) -> None:
    file["layers/dense/round"] = file["layers"]


def nest_deeply(file: h5py.File) -> None:
    file.create_group("/".join("a" * 60))


def leave_one_out(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]


HOSTILE = {
    link_outside: r"a link '0' \(ExternalLink\)",
    link_softly: r"a link '0' \(SoftLink\)",
    keep_outside: "has its values in another file",
    make_virtual: "has its values in another file",
    make_giant: r"shapes \(2147483648, 2147483648\) that the network does not have, and missed \(4, 3\)",
    make_resizable: "expected numbers of one shape",
    make_strings: "expected numbers",
    make_record: "expected numbers",
    add_another: r"shapes \(7,\) that the network does not have",
    make_circle: "stands in it twice",
    nest_deeply: "nested deeper than 32",
    leave_one_out: r"missed \(4, 3\)",
}


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_hostile_weights_are_refused_and_the_network_stays_as_it_was(change, tmp_path):
    network = make_network()
    before = network.get_weights()
    path = tmp_path / "a.weights.h5"
    make_network().save_weights(path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ModelError, match=rf"a\.weights\.h5: .*{HOSTILE[change]}"):
        load_weights(network, path)
    assert all(np.array_equal(old, new) for old, new in zip(before, network.get_weights(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".keras"])
def test_weights_are_read_as_they_were_written(tmp_path, suffix):
    path, source, network = tmp_path / f"a{suffix}", make_network(), make_network()
    source.compile("adam", "mse")
    source.fit(np.zeros((2, 4)), np.zeros((2, 2)), verbose=0)  # a .keras then holds the optimiser's variables, too
    (source.save_weights if suffix == ".weights.h5" else source.save)(path)
    load_weights(network, path)
    assert all(np.array_equal(a, b) for a, b in zip(source.get_weights(), network.get_weights(), strict=True))
    with pytest.raises(ModelError, match=rf"a{suffix}: "):
        load_weights(make_network(5), path)


def change_names(group: h5py.Group, key: str, changes: dict[str, str]) -> None:
    names = np.asarray(group.attrs[key]).astype("U")
    group.attrs[key] = np.array([changes.get(name, name) for name in names], "S")


def swap_layers(group: h5py.Group) -> None:
    change_names(group, "layer_names", {"one": "two", "two": "one"})


def rename_layer(group: h5py.Group) -> None:
    group.move("two", "three")
    change_names(group, "layer_names", {"two": "three"})


def swap_weights(group: h5py.Group) -> None:
    change_names(group["bn"], "weight_names", {"bn/gamma": "bn/beta", "bn/beta": "bn/gamma"})


def transpose(group: h5py.Group) -> None:
    del group["two/two/kernel"]
    group["two/two/kernel"] = np.zeros((2, 4), np.float32)


def add_layer(group: h5py.Group) -> None:
    group["more/weight"] = np.zeros(3)
    group["more"].attrs["weight_names"] = np.array(["weight"], "S")
    group.attrs["layer_names"] = np.array([*np.asarray(group.attrs["layer_names"]).astype("U"), "more"], "S")


def leave_out_layer(group: h5py.Group) -> None:
    group.attrs["layer_names"] = group.attrs["layer_names"][:-1]


OTHER_WEIGHTS = {
    swap_layers: r"as weight 1, found two/kernel of layer two [4, 4] (of 8), expected one/kernel of layer one [4, 4] (of 8)",
    rename_layer: "as weight 3, found two/kernel of layer three [4, 4] (of 8), expected two/kernel of layer two [4, 4]",
    swap_weights: "as weight 5, found bn/beta of layer bn [4] (of 8), expected bn/gamma of layer bn [4]",
    transpose: "as weight 3, found two/kernel of layer two [2, 4] (of 8), expected two/kernel of layer two [4, 4]",
    add_layer: "as weight 9, found weight of layer more [3] (of 9), expected none (of 8)",
    leave_out_layer: "as weight 5, found none (of 4), expected bn/gamma of layer bn [4] (of 8)",
}


def make_named_network() -> keras.Model:
    given = keras.Input((4,))
    inner = keras.layers.Dense(4, name="two")(keras.layers.Dense(4, name="one")(given))
    return keras.Model(given, keras.layers.BatchNormalization(name="bn")(inner))


@pytest.mark.parametrize("change", OTHER_WEIGHTS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("older_names", [False, True])
def test_an_older_h5_is_compared_by_name_and_shape_before_a_weight_is_set(change, older_names, tmp_path):
    network, source, path = make_named_network(), make_named_network(), tmp_path / "a.h5"
    before = network.get_weights()
    source.save(path)
    with h5py.File(path, "r+") as file:
        change(file["model_weights"])
    if (
        older_names and change is rename_layer
    ):  # the network has no layer of this name, it may be that of an earlier release
        load_weights(network, path, older_names=True)
        before = source.get_weights()
    else:
        message = f"a.h5: does not hold the weights of this network, in its order: {OTHER_WEIGHTS[change]}"
        with pytest.raises(ModelError, match=re.escape(message)):
            load_weights(network, path, older_names=older_names)
    assert all(np.array_equal(old, new) for old, new in zip(before, network.get_weights(), strict=True))


def test_layers_without_a_name_may_be_numbered_from_anywhere(tmp_path):
    source, network = make_network(), make_network()
    assert source.layers[0].name != network.layers[0].name
    source.save(tmp_path / "a.h5")
    load_weights(network, tmp_path / "a.h5")
    assert all(np.array_equal(a, b) for a, b in zip(source.get_weights(), network.get_weights(), strict=True))


@pytest.mark.parametrize("name", ["a.pkl", "a.joblib", "a.pt", "a.npz", "a"])
def test_other_kinds_of_files_are_refused_by_their_names(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Mine(tmp_path / "marker")))
    with pytest.raises(ModelError, match="nothing else is read"):
        load_weights(make_network(), tmp_path / name)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".keras"])
@pytest.mark.parametrize("contents", [b"", b"\x89HDF\r\n\x1a\n", b"PK\3\4", b"\x80\x04K\x01."])
def test_what_is_not_what_its_name_says_is_refused(tmp_path, suffix, contents):
    (tmp_path / f"a{suffix}").write_bytes(contents)
    with pytest.raises(ModelError, match=rf"a{suffix}: "):
        load_weights(make_network(), tmp_path / f"a{suffix}")


# ---- .keras: what its config asks for ----


def rewrite(path: Path, changes: dict[str, bytes], *, names: dict[str, str] | None = None) -> None:
    """Change the members of a zip archive, or add some."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members.items():
            archive.writestr((names or {}).get(name, name), contents)


@keras.saving.register_keras_serializable(package="stranger")
class Foreign(keras.layers.Layer):
    def call(self, inputs):
        return inputs


def test_a_lambda_is_refused_and_never_run(tmp_path):
    path, marker = tmp_path / "a.keras", str(tmp_path / "marker")
    make_network(3, keras.layers.Lambda(lambda x, marker=marker: (os.mkdir(marker), x)[1])).save(path)
    shutil.rmtree(marker, ignore_errors=True)
    with pytest.raises(ModelError, match=r"a\.keras: holds a Lambda, .*never run .*save_weights"):
        load_weights(make_network(), path)
    assert not Path(marker).exists()


def test_classes_that_are_not_keras_own_are_refused(tmp_path):
    make_network(3, Foreign()).save(tmp_path / "a.keras")
    with pytest.raises(ModelError, match=r"describes '(tests\.)?.*stranger>Foreign', a class that is not Keras' own"):
        load_weights(make_network(), tmp_path / "a.keras")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_name": "__lambda__", "config": {"value": ["4wAA"]}}, "holds a Lambda"),
        ({"layers": [{"a": [{"class_name": "Lambda"}]}]}, "holds a Lambda"),
        ({"class_name": "function", "module": "os", "config": "system"}, "not Keras' own"),
        ({"class_name": "A", "module": "subprocess.Popen"}, "not Keras' own"),
    ],
)
def test_code_anywhere_in_a_config_is_refused(tmp_path, config, message):
    make_network().save(tmp_path / "a.keras")
    rewrite(tmp_path / "a.keras", {"config.json": json.dumps(config).encode()})
    with pytest.raises(ModelError, match=message):
        load_weights(make_network(), tmp_path / "a.keras")


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"../../evil.py": b"x"}, {}, "which leaves its folder"),
        ({"/evil.py": b"x"}, {}, "which leaves its folder"),
        ({"assets\\..\\..\\evil.py": b"x"}, {}, "which leaves its folder"),
        ({"model.weights.h5": bytes(100 * 2**20)}, {}, "made to fill the memory"),
        ({"config.json": b" " * (65 * 2**20)}, {}, "made to fill the memory"),
        ({"config.json": b"[" * 100_000}, {}, "nested too deeply"),
        ({"config.json": b"{"}, {}, "cannot be read as Keras"),
        ({}, {"model.weights.h5": "weights.npz"}, "expected config.json and model.weights.h5"),
        ({"model.weights.h5": pickle.dumps(1)}, {}, "does not hold the weights"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, changes, names, message):
    make_network().save(tmp_path / "a.keras")
    rewrite(tmp_path / "a.keras", changes, names=names)
    with pytest.raises(ModelError, match=message):
        load_weights(make_network(), tmp_path / "a.keras")
    assert not list(tmp_path.parent.glob("evil*"))


@pytest.mark.slow
def test_a_backbone_takes_its_weights_from_a_keras_file(tmp_path):
    """As somebody with a network saves it: keras.applications.MobileNetV2(include_top=False).save(...)."""
    network = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(None, None, 3))
    network.save(tmp_path / "mobilenet.keras")
    backbone = build_backbone("mobilenet_v2")
    load_published_weights("mobilenet_v2", backbone, str(tmp_path / "mobilenet.keras"))
    assert all(np.array_equal(a, b) for a, b in zip(network.get_weights(), backbone.get_weights(), strict=True))
    make_network().save(tmp_path / "other.keras")
    with pytest.raises(
        ModelError, match=r"pretrain\.weights_file .*other\.keras: .*Expected the weights of MobileNetV2"
    ):
        load_published_weights("mobilenet_v2", backbone, str(tmp_path / "other.keras"))


# ---- what trainings hand on ----


def test_a_backbone_of_a_stranger_is_refused(tmp_path):
    network = build_transfer_network(CONFIG, num_labels=3, image_size=32, channels=1)
    write_backbone(network, tmp_path / "b", source="here")
    record = read_backbone_record(tmp_path / "b")
    path = next(iter(record["variables"]))
    for changed in (
        {"image_size": 10**9},
        {"features": "no"},
        {"variables": None},
        {"variables": {path: {"shape": 3}}},
        {"largest_feature": None},
    ):
        (tmp_path / "b" / RECORD_FILE).write_text(json.dumps(record | changed))
        with pytest.raises(ModelError, match="expected a backbone written by dlfer"):
            transfer_backbone(tmp_path / "b", network)
    (tmp_path / "b" / RECORD_FILE).write_text(json.dumps(record))
    weights = tmp_path / "b" / "backbone.weights.h5"
    with h5py.File(weights, "r+") as file:
        file["more"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises((ModelError, TransferError), match="ExternalLink"):
        transfer_backbone(tmp_path / "b", network)


def test_a_checkpoint_of_a_stranger_is_refused(tmp_path):
    network = make_network()
    path = tmp_path / "checkpoint.npz"
    write_checkpoint(path, network.weights, {"epoch": 2})
    assert restore_checkpoint(path, network.weights) == read_state(path) == {"epoch": 2}
    with np.load(path) as file:
        arrays = dict(file)
    before = network.get_weights()
    for changed, message in (
        ({"00001": np.zeros(10**6)}, r"has shape \(1000000,\), expected \(3,\)"),
        ({"00001": np.array([Mine(tmp_path / "marker")] * 3, dtype=object)}, "pickle, which is a program"),
        ({"record": np.frombuffer(b"[" * 100_000, np.uint8)}, "nested too deeply"),
        ({"record": np.frombuffer(b"{}", np.uint8)}, "is no checkpoint"),
    ):
        np.savez(path, **(arrays | changed))
        with pytest.raises(ModelError, match=message):
            restore_checkpoint(path, network.weights)
    path.write_bytes(pickle.dumps(Mine(tmp_path / "marker")))
    with pytest.raises(ModelError, match="begins like a pickle"):
        read_state(path)
    assert not (tmp_path / "marker").exists()
    assert all(np.array_equal(old, new) for old, new in zip(before, network.get_weights(), strict=True))


@pytest.fixture(scope="module")
def booster():
    """Trees of three rounds on 5 features and 3 labels."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5)).astype(np.float32)
    parameters = make_parameters(BoostingConfig(max_depth=3, colsample=1.0), num_labels=3, seed=0)
    xgb = import_xgboost()
    return xgb.train(parameters, xgb.DMatrix(features, label=np.arange(200) % 3), 3)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b"\x80\x04\x95", "can't decode|Expecting value"),
        (b"", "Expecting value"),
        (b"{}", "there is no 'learner'"),
        (b"[]", "list indices"),
        (
            b'{"learner": {"gradient_booster": 1, "learner_model_param": {"num_feature": "' + b"9" * 5000 + b'"}}}',
            "digits",
        ),
        (b'{"learner": {"learner_model_param": {"num_feature": "5", "num_class": "999999999999"}', "delimiter"),
    ],
    ids=["deep", "pickle", "empty", "object", "list", "giant", "cut"],
)
def test_trees_of_a_stranger_are_refused(tmp_path, contents, message):
    (tmp_path / "trees.json").write_bytes(contents)
    with pytest.raises(ModelError, match=rf"trees\.json: .*({message})"):
        read_booster(tmp_path / "trees.json", num_features=5, num_labels=3)


def test_trees_larger_than_the_limit_are_refused(tmp_path, booster, monkeypatch):
    booster.save_model(tmp_path / "trees.json")
    monkeypatch.setattr("dlfer.model.trees.MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="found more than 1,000 bytes"):
        read_booster(tmp_path / "trees.json", num_features=5, num_labels=3)


TREE = ("learner", "gradient_booster", "model", "trees", 4)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("learner", "learner_model_param", "num_class"), "999999999999", "belongs to another model"),
        (("learner", "learner_model_param", "num_feature"), "4", "belongs to another model"),
        (("learner", "learner_model_param", "base_score"), "[0E0,0E0]", "first scores"),
        (("learner", "learner_model_param", "base_score"), "[5E-1]", "first scores"),
        (("learner", "learner_model_param", "base_score"), "[0E0,0E0,NaN]", "first scores"),
        (("learner", "objective", "name"), "reg:squarederror", "objective"),
        (("learner", "gradient_booster", "name"), "dart", "booster"),
        (("learner", "gradient_booster", "model", "gbtree_model_param", "num_trees"), "10", "number of trees"),
        (("learner", "gradient_booster", "model", "tree_info", 2), 7, "classes of the trees"),
        (("learner", "gradient_booster", "model", "iteration_indptr", 2), 2**31, "ends of the rounds"),
        (("learner", "gradient_booster", "model", "cats", "sorted_idx"), [9], "categories"),
        # Both trees would be stored in one place, and the other place would be a null pointer.
        ((*TREE, "id"), 3, "tree 4: its id is 3"),
        ((*TREE, "tree_param", "num_nodes"), "99", "not of 99 nodes"),
        ((*TREE, "tree_param", "num_feature"), "6", "other features or leaves"),
        ((*TREE, "tree_param", "num_deleted"), "-1", "other features or leaves"),
        ((*TREE, "left_children", 0), 2**32 + 1, "not numbered by integers"),
        ((*TREE, "left_children", 0), -(2**63), "not numbered by integers"),
        ((*TREE, "left_children", 0), 1.0, "not numbered by integers"),
        ((*TREE, "left_children", 0), 10**6, "not those of a tree"),
        ((*TREE, "left_children", 1), 0, "not those of a tree"),
        ((*TREE, "right_children", 0), -1, "not those of a tree"),
        ((*TREE, "parents", 1), 2, "other parents"),
        ((*TREE, "split_indices", 0), 5, "a feature beyond 5"),
        ((*TREE, "split_indices", 0), -1, "a feature beyond 5"),
        ((*TREE, "split_type", 0), 1, "splits on categories"),
        ((*TREE, "categories_segments"), [0], "splits on categories"),
        ((*TREE, "split_conditions", 0), float("nan"), "not finite"),
        ((*TREE, "split_conditions", 0), 1e39, "not finite"),
        ((*TREE, "base_weights", 0), float("inf"), "not finite"),
        ((*TREE, "split_conditions"), ["1"], "not of .* nodes"),
        ((*TREE, "default_left", 0), None, "not numbered by integers"),
        (("learner", "attributes"), {"a": float("nan")}, "not JSON compliant"),
    ],
)
def test_trees_that_xgboost_would_follow_out_of_bounds_are_refused(tmp_path, booster, keys, value, message):
    model = place = json.loads(booster.save_raw("json"))
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "trees.json").write_text(json.dumps(model))
    with pytest.raises(ModelError, match=f"trees\\.json: .*{message}"):
        read_booster(tmp_path / "trees.json", num_features=5, num_labels=3)


def test_xgboost_reads_what_was_checked_and_not_the_text(tmp_path, booster):
    """A key is written in two ways: the same to Python's parser, which keeps the last, and different to XGBoost's."""
    text = booster.save_raw("json").decode()
    odd, count = re.subn(r'"split_indices":(\[[^]]*\])', r'"split_indices":\1,"split\\u005findices":\1', text)
    assert count == 9
    odd = re.sub(r'"split_indices":\[\d', '"split_indices":[9', odd)
    (tmp_path / "trees.json").write_text(odd)
    read = read_booster(tmp_path / "trees.json", num_features=5, num_labels=3)
    assert read.save_raw("json") == booster.save_raw("json")
