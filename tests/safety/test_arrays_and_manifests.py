"""Files that somebody else may have written: arrays, JSON, manifests and exports that are to be refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from dlfer.config.sections import DataConfig
from dlfer.data.sources import load_arrays
from dlfer.errors import ConfigError, DataError, ModelError
from dlfer.metrics.predictions import read_predictions
from dlfer.report.page import read_experiment
from dlfer.runs import files as npz_file
from dlfer.runs.files import check_manifest, hash_file, read_npz
from dlfer.runs.find import find_default_model, find_model
from dlfer.runs.run import Run

DEEP = "[" * 100_000


class Mine:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def write_npy(shape, *, descr: str = "<f4", values: bytes = b"\0" * 16) -> bytes:
    """Return an .npy whose header says what it likes."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + values


def write_zip(path: Path, members: dict[str, bytes], *, times: int = 1) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members.items():
            for _ in range(times):
                archive.writestr(name, contents)
    return path


def write_objects(path: Path, marker: Path) -> Path:
    np.savez(path, images=np.array([Mine(marker)], dtype=object))
    return path


def write_pickle(path: Path, marker: Path) -> Path:
    path.write_bytes(pickle.dumps(Mine(marker)))
    return path


def overlap(path: Path) -> Path:
    """Write an archive whose many members are all the same bytes of the file."""
    write_zip(path, {"a.npy": write_npy((100_000,), values=bytes(400_000))})
    contents = path.read_bytes()
    start = contents.index(b"PK\1\2")
    entry, end = contents[start : contents.index(b"PK\5\6")], bytearray(contents[contents.index(b"PK\5\6") :])
    entries = b"".join(entry[:46] + b"%05d" % n + entry[51:] for n in range(200))
    struct.pack_into("<HHI", end, 8, 200, 200, len(entries))
    path.write_bytes(contents[:start] + entries + end)
    return path


HOSTILE = {
    "giant": (lambda p, m: write_zip(p, {"images.npy": write_npy((10**6, 10**6))}), "says that it is float32"),
    "overflow": (lambda p, m: write_zip(p, {"images.npy": write_npy((2**62, 8))}), "says that it is float32"),
    "negative": (lambda p, m: write_zip(p, {"images.npy": write_npy((-1, -4))}), "says that it is float32"),
    "objects": (write_objects, "pickle, which is a program"),
    "record": (lambda p, m: write_zip(p, {"images.npy": write_npy((4,), descr="V4")}), "expected numbers or text"),
    "pickle": (write_pickle, "begins like a pickle"),
    "array": (lambda p, m: p.write_bytes(write_npy((4,))), "begins like a single array"),
    "text": (lambda p, m: p.write_text("hello"), "no .npz of numpy"),
    "empty": (lambda p, m: p.write_bytes(b""), "no .npz of numpy"),
    "stranger": (lambda p, m: write_zip(p, {"../../evil.sh": b"rm"}), r"expected arrays \(.npy\) alone"),
    "header": (
        lambda p, m: write_zip(p, {"a.npy": b"\x93NUMPY\1\0\xff\xff{'shape':" + b"(" * 65000}),
        "cut|read|parse|header",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_refused_before_they_take_memory(name, tmp_path):
    make, message = HOSTILE[name]
    path, marker = tmp_path / "a.npz", tmp_path / "marker"
    make(path, marker)
    with pytest.raises(ValueError, match=message):
        read_npz(path)
    with pytest.raises(DataError, match=r"a\.npz"):
        load_arrays(DataConfig(source="arrays", path=str(path)))
    with pytest.raises(DataError, match=r"a\.npz"):
        read_predictions(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_arrays_that_are_there_twice_are_refused(tmp_path):
    write_zip(tmp_path / "a.npz", {"a.npy": write_npy((4,))}, times=2)
    with pytest.raises(ValueError, match="twice"):
        read_npz(tmp_path / "a.npz")


def test_members_that_are_all_the_same_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="packed into more bytes than it has"):
        read_npz(overlap(tmp_path / "a.npz"))


def test_a_compressed_bomb_is_refused_and_ordinary_compression_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_file, "FEW_BYTES", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(2**24, np.uint8))
    with pytest.raises(ValueError, match="can fill the memory"):
        read_npz(tmp_path / "bomb.npz")
    values = np.random.default_rng(0).integers(0, 4, 2**22).astype(np.uint8)
    np.savez_compressed(tmp_path / "a.npz", a=values, b=values[:1])
    assert np.array_equal(read_npz(tmp_path / "a.npz")["a"], values)


def test_headers_are_shown_before_arrays_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros((3, 4)), b=np.array(["x"]), c=np.zeros(0), d=np.float32(2))
    seen = {}
    assert list(read_npz(tmp_path / "a.npz", names=["b"], check=seen.update)) == ["b"]
    assert {name: (header.shape, header.dtype.kind) for name, header in seen.items()} == {
        "a": ((3, 4), "f"),
        "b": ((1,), "U"),
        "c": ((0,), "f"),
        "d": ((), "f"),
    }
    with pytest.raises(ValueError, match="e missing"):
        read_npz(tmp_path / "a.npz", names=["a", "e"])


@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 50_000, "\ufeff{", '"\\ud800', "9" * 5000], ids=range(5))
def test_json_of_a_stranger_is_refused_in_words(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "saved_models" / "lite"
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text(text)
    with pytest.raises(ModelError, match=r"artifact\.json"):
        Run(folder).read_json("artifact.json")
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: None)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    with pytest.raises(ModelError, match="there is no default model"):
        find_default_model()


def test_a_config_of_a_run_is_read_as_strictly_as_an_experiment(tmp_path):
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    (tmp_path / "config.yaml").write_text(laughs)
    with pytest.raises(ConfigError, match="aliases counted in full"):
        read_experiment(tmp_path)
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.system [echo]\n")
    with pytest.raises(ConfigError, match="tag"):
        read_experiment(tmp_path)


def make_manifest(folder: Path) -> dict[str, str]:
    (folder / "a.bin").write_bytes(b"weights")
    return {"a.bin": hash_file(folder / "a.bin")}


def check(folder: Path, sha256, needed=("a.bin",)) -> None:
    check_manifest(folder, sha256, file=folder / "artifact.json", needed=needed, mend="Copy it again")


def test_a_manifest_holds_its_files(tmp_path):
    sha256 = make_manifest(tmp_path)
    check(tmp_path, sha256)
    (tmp_path / "a.bin").write_bytes(b"weightz")
    with pytest.raises(ModelError, match=r"a\.bin: sha256 is .* damaged or was changed\. Copy it again\."):
        check(tmp_path, sha256)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ModelError, match=r"a\.bin: expected a file"):
        check(tmp_path, sha256)


@pytest.mark.parametrize("sha256", [None, [], {"a.bin": "short"}, {"a.bin": None}, {"a.bin": "G" * 64}])
def test_what_is_no_table_of_digests_is_refused(tmp_path, sha256):
    with pytest.raises(ModelError, match="64 hex digits"):
        check(tmp_path, sha256)


def test_what_is_read_must_be_named(tmp_path):
    make_manifest(tmp_path)
    with pytest.raises(ModelError, match=r"does not name a\.bin"):
        check(tmp_path, {})


@pytest.mark.parametrize("name", ["../b.bin", "x/../../b.bin", "/etc/passwd", "..\\b.bin", "C:b.bin", "", ".", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "b.bin").write_bytes(b"outside")
    sha256 = make_manifest(folder) | {name: hash_file(tmp_path / "b.bin")}
    with pytest.raises(ModelError, match="outside of its folder"):
        check(folder, sha256)


def test_links_that_leave_the_folder_and_what_is_no_file_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "b.bin").write_bytes(b"outside")
    digest = hash_file(tmp_path / "b.bin")
    (folder / "link.bin").symlink_to(tmp_path / "b.bin")
    (folder / "up").symlink_to(tmp_path)
    (folder / "round").symlink_to(folder / "round")
    for name in ("link.bin", "up/b.bin", "round"):
        with pytest.raises(ModelError, match="outside of its folder"):
            check(folder, {name: digest}, needed=())
    os.mkfifo(folder / "pipe")
    (folder / "below").mkdir()
    for name in ("pipe", "below"):
        with pytest.raises(ModelError, match="expected a file of a model"):
            check(folder, {name: digest}, needed=())


def make_export(
    folder: Path, contents: bytes = b"not a model", *, form: str = "onnx", file: str = "model.onnx"
) -> dict:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    record = {
        "version": 1,
        "format": form,
        "file": file.split("/")[0],
        "labels": ["a", "b"],
        "input": {"shape": [None, None, None, 1], "network_size": 48},
        "sha256": {file: hash_file(path)},
    }
    write_export(folder, record)
    return record


def write_export(folder: Path, record) -> None:
    (folder / "export.json").write_text(json.dumps(record))


def test_an_export_is_held_against_its_manifest(tmp_path):
    from dlfer.predict.runtimes import read_export

    record = make_export(tmp_path)
    assert read_export(tmp_path).as_json() == record
    write_export(tmp_path, record | {"sha256": {}})
    with pytest.raises(ModelError, match=r"does not name model\.onnx"):
        read_export(tmp_path)
    for name in ("../model.onnx", "/etc/passwd", 3, None):
        write_export(tmp_path, record | {"file": name})
        with pytest.raises(ModelError, match="outside of its folder"):
            read_export(tmp_path)
    for key, value in (("labels", [1]), ("labels", None), ("input", []), ("about", 3)):
        write_export(tmp_path, record | {key: value})
        with pytest.raises(ModelError, match="expected labels and an input"):
            read_export(tmp_path)
    write_export(tmp_path, record | {"input": record["input"] | {"shape": [None, 10**9, 10**9, 1]}})
    with pytest.raises(ModelError, match="expected labels and an input"):
        read_export(tmp_path)
    (tmp_path / "export.json").write_text(DEEP)
    with pytest.raises(ModelError, match="nested too deeply"):
        read_export(tmp_path)


def test_every_file_of_a_saved_model_must_be_named(tmp_path):
    from dlfer.predict.runtimes import read_export

    make_export(tmp_path, form="savedmodel", file="model/variables/variables.index")
    assert read_export(tmp_path).file == "model"
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"code of a stranger")
    with pytest.raises(ModelError, match=r"does not name model/saved_model\.pb"):
        read_export(tmp_path)


@pytest.mark.parametrize(
    ("form", "file", "runtime", "package"),
    [
        ("onnx", "model.onnx", None, "onnxruntime"),
        ("onnx", "model.onnx", "openvino", "openvino"),
        ("litert", "model.tflite", None, "ai_edge_litert"),
    ],
)
def test_a_runtime_that_does_not_take_the_file_says_so(tmp_path, form, file, runtime, package):
    from dlfer.predict.runtimes import open_export

    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    make_export(tmp_path, form=form, file=file)
    with pytest.raises(ModelError, match=rf"{file}: the runtime cannot open it"):
        open_export(tmp_path, runtime=runtime)


def test_openvino_reports_nothing_to_its_maker(tmp_path):
    """By itself its import sends an event, and leaves the number by which it knows this user in the home folder."""
    if find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 2])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result])), tmp_path / "a.onnx")
    code = (
        "import sys; from pathlib import Path; from dlfer.predict.runtimes import open_openvino\n"
        f"try: open_openvino(Path({str(tmp_path / 'a.onnx')!r}))\n"
        "except Exception: pass\n"
        "print([name for name in sys.modules if name.startswith('openvino')])"
    )
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HOME": str(home)}
    )
    assert done.returncode == 0, done.stderr
    assert "'openvino'" in done.stdout
    assert "openvino_telemetry." not in done.stdout
    assert not list(home.iterdir())


def test_an_onnx_that_keeps_weights_in_another_file_is_refused(tmp_path):
    from dlfer.predict.runtimes import open_export

    onnx = pytest.importorskip("onnx")
    weights = onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (64, 64)) for name in ("images", "y")]
    node = onnx.helper.make_node("Add", ["images", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:], [weights])
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)])
    make_export(tmp_path, model.SerializeToString())
    open_export(tmp_path)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    make_export(tmp_path, (tmp_path / "model.onnx").read_bytes())
    for runtime in (None, "openvino"):
        with pytest.raises(ModelError, match="its weights are in another file"):
            open_export(tmp_path, runtime=runtime)


@pytest.mark.parametrize("name", ["a.keras", "a.pkl", "a.pt"])
def test_a_file_is_no_model(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    with pytest.raises(ModelError, match=r"is a file; a model is a folder with artifact\.json.*pretrain\.weights"):
        find_model(tmp_path / name)


def test_pickles_of_this_file_work_where_they_are_let(tmp_path):
    """Else the tests above would pass with a broken pickle."""
    pickle.load(io.BytesIO(pickle.dumps(Mine(tmp_path / "marker")))).close()
    assert (tmp_path / "marker").exists()
