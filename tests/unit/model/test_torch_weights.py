"""The reader of PyTorch weight files, on files written by hand and on hostile ones."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlfer.errors import ModelError
from dlfer.model import torch_weights
from dlfer.model.torch_weights import MAGIC_NUMBER, read_torch_tensors


class Named:
    """Something that a pickle refers to by a module and a name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Stored:
    """A storage: a one-dimensional array under a key, and the marker of its type."""

    def __init__(self, key: str, numbers: np.ndarray, marker: str = "FloatStorage") -> None:
        self.key, self.numbers, self.marker = key, numbers, marker
        self.num_elements = len(numbers)


class Call:
    """A call that the pickle makes when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


class Built:
    """An object whose attributes the pickle sets."""

    def __init__(self, obj: Any, attributes: dict) -> None:
        self.obj, self.attributes = obj, attributes


class Writer(pickle._Pickler):
    """Writes the pickles that PyTorch writes, without PyTorch; `Named` becomes a GLOBAL."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Stored):
            return ("storage", Named("torch", obj.marker), obj.key, "cpu", obj.num_elements, None)
        return None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Named):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Built):
            self.save(obj.obj)
            self.save(obj.attributes)
            self.write(pickle.BUILD)
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


REBUILD = Named("torch._utils", "_rebuild_tensor_v2")


def tensor(storage: Stored, shape: tuple, strides: tuple, *, offset: int = 0, hooks: Any = None) -> Call:
    return Call(REBUILD, storage, offset, shape, strides, False, OrderedDict() if hooks is None else hooks)


def pickled(obj: Any, tmp_path: Path) -> bytes:
    file = tmp_path / "pickle"
    with file.open("wb") as stream:
        Writer(stream, protocol=2).dump(obj)
    return file.read_bytes()


def write(
    tmp_path: Path,
    state: Any,
    storages: list[Stored],
    *,
    magic: int = MAGIC_NUMBER,
    version: int = 1001,
    little_endian: bool = True,
    tail: bytes = b"",
) -> Path:
    machine = {"protocol_version": version, "little_endian": little_endian, "type_sizes": {"int": 4}}
    parts = [pickled(part, tmp_path) for part in (magic, version, machine, state, [s.key for s in storages])]
    raw = [struct.pack("<q", len(s.numbers)) + s.numbers.tobytes() for s in storages]
    file = tmp_path / "weights.pth"
    file.write_bytes(b"".join(parts + raw) + tail)
    return file


@pytest.fixture
def numbers() -> Stored:
    return Stored("17", np.arange(24, dtype="<f4"))


def test_tensors_of_all_kinds_are_read(tmp_path, numbers):
    counts = Stored("23", np.array([123456789012], "<i8"), "LongStorage")
    state = OrderedDict(
        contiguous=tensor(numbers, (2, 3, 4), (12, 4, 1)),
        transposed=tensor(numbers, (4, 3), (1, 4), offset=12),
        scalar=tensor(counts, (), ()),
        empty=tensor(numbers, (0, 3), (3, 1)),
    )
    state._metadata = OrderedDict({"": {"version": 1}})

    found = read_torch_tensors(write(tmp_path, state, [counts, numbers]))

    assert list(found) == ["contiguous", "transposed", "scalar", "empty"]
    np.testing.assert_array_equal(found["contiguous"], np.arange(24).reshape(2, 3, 4))
    np.testing.assert_array_equal(found["transposed"], np.arange(12, 24).reshape(3, 4).T)
    assert found["scalar"].shape == ()
    assert found["scalar"] == 123456789012
    assert found["empty"].shape == (0, 3)
    assert [array.dtype.name for array in found.values()] == ["float32", "float32", "int64", "float32"]
    assert all(array.flags.c_contiguous and array.flags.writeable for array in found.values())


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((25,), (1,), 0),
        ((24,), (1,), 1),
        ((5, 5), (5, 1), 0),
        ((4,), (8,), 0),
        ((2,), (-1,), 5),
        ((-2,), (1,), 0),
        ((2,), (1,), -1),
        ((1000, 1000), (0, 0), 0),
        ((2, 2), (1,), 0),
        ((2.0,), (1,), 0),
        ((True,), (1,), 0),
        ([2], (1,), 0),
        ((2**40, 2**40), (1, 1), 0),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, numbers, shape, strides, offset):
    file = write(tmp_path, {"w": tensor(numbers, shape, strides, offset=offset)}, [numbers])
    with pytest.raises(ModelError, match=r"weights\.pth"):
        read_torch_tensors(file)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "DoubleStorage"),
        ("torch", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("dlfer.model.torch_weights", "Path"),
    ],
)
def test_any_other_name_is_refused_and_nothing_is_called(tmp_path, numbers, module, name):
    witness = tmp_path / "witness"
    state = {"w": Call(Named(module, name), f"touch {witness}")}
    with pytest.raises(ModelError, match=rf"found {module}\.{name}"):
        read_torch_tensors(write(tmp_path, state, [numbers]))
    assert not witness.exists()


def test_the_witness_of_the_hostile_file_works(tmp_path):
    witness = tmp_path / "witness"
    pickle.loads(pickled({"w": Call(Named(os.system.__module__, "system"), f"touch {witness}")}, tmp_path))
    assert witness.exists()


@pytest.mark.parametrize(
    ("program", "opcode"),
    [
        (b"\x80\x02(i" + b"os\nsystem\n.", "INST"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "SHORT_BINUNICODE"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "memo index"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02]", "no complete pickle"),
        (b"\x80\x02\x85.", "no complete pickle"),
        (b"no pickle", "opcode|no complete pickle"),
        (b"", "no complete pickle"),
    ],
)
def test_foreign_opcodes_are_refused(tmp_path, program, opcode):
    file = tmp_path / "weights.pth"
    file.write_bytes(program)
    with pytest.raises(ModelError, match=opcode):
        read_torch_tensors(file)


def test_a_name_cannot_be_altered_by_the_pickle(tmp_path):
    slots = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    file = tmp_path / "weights.pth"
    file.write_bytes(slots)
    with pytest.raises(ModelError, match="AttributeError"):
        read_torch_tensors(file)


def test_attributes_on_the_dict_do_not_hide_its_items(tmp_path, numbers):
    state = Built(OrderedDict(w=tensor(numbers, (24,), (1,))), {"items": 5, "keys": 5, "__iter__": 5})
    assert list(read_torch_tensors(write(tmp_path, state, [numbers]))) == ["w"]


def test_every_truncation_is_refused(tmp_path, numbers):
    file = write(tmp_path, {"w": tensor(numbers, (24,), (1,))}, [numbers])
    content = file.read_bytes()
    assert read_torch_tensors(file)
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"weights\.pth"):
            read_torch_tensors(file)


def test_trailing_bytes_are_refused(tmp_path, numbers):
    file = write(tmp_path, {"w": tensor(numbers, (24,), (1,))}, [numbers], tail=b"\0")
    with pytest.raises(ModelError, match="1 bytes follow the last storage"):
        read_torch_tensors(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": 5}, "magic number"),
        ({"version": 1002}, "format version 1002"),
        ({"little_endian": False}, "little-endian"),
    ],
)
def test_another_format_is_refused(tmp_path, numbers, change, message):
    file = write(tmp_path, {"w": tensor(numbers, (24,), (1,))}, [numbers], **change)
    with pytest.raises(ModelError, match=message):
        read_torch_tensors(file)


def test_a_zip_archive_is_named(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(ModelError, match="zip archive"):
        read_torch_tensors(file)


@pytest.mark.parametrize("state", [5, [1], {"w": 5}, {1: None}, {"a": {"b": 1}}, None])
def test_anything_but_a_dict_of_tensors_is_refused(tmp_path, state):
    with pytest.raises(ModelError, match="expected a"):
        read_torch_tensors(write(tmp_path, state, []))


def test_a_tensor_with_hooks_is_refused(tmp_path, numbers):
    state = {"w": tensor(numbers, (24,), (1,), hooks=OrderedDict(a=1))}
    with pytest.raises(ModelError, match="hooks"):
        read_torch_tensors(write(tmp_path, state, [numbers]))


def test_storages_and_their_list_must_agree(tmp_path, numbers):
    other = Stored("99", np.zeros(3, "<f4"))
    state = {"w": tensor(numbers, (24,), (1,))}
    for storages in ([], [other], [numbers, other], [numbers, numbers]):
        with pytest.raises(ModelError, match="storages"):
            read_torch_tensors(write(tmp_path, state, storages))


def test_a_storage_has_one_type_and_size(tmp_path, numbers):
    alias = Stored("17", np.arange(24, dtype="<i8"), "LongStorage")
    state = {"a": tensor(numbers, (24,), (1,)), "b": tensor(alias, (24,), (1,))}
    with pytest.raises(ModelError, match="another type or size"):
        read_torch_tensors(write(tmp_path, state, [numbers]))


@pytest.mark.parametrize("claimed", [23, 25, 2**40, -1])
def test_a_storage_must_have_the_size_it_claims(tmp_path, numbers, claimed):
    numbers.num_elements = claimed
    with pytest.raises(ModelError, match="storage"):
        read_torch_tensors(write(tmp_path, {"w": tensor(numbers, (2,), (1,))}, [numbers]))


def test_the_size_before_a_storage_must_be_the_one_its_tensors_name(tmp_path, numbers):
    file = write(tmp_path, {"w": tensor(numbers, (24,), (1,))}, [numbers])
    content = bytearray(file.read_bytes())
    content[-(24 * 4 + 8)] = 23
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"storage 17 says 23 elements .* expected 24"):
        read_torch_tensors(file)


def test_a_missing_and_an_oversize_file_are_refused(tmp_path, numbers, monkeypatch):
    with pytest.raises(ModelError, match="Name an existing"):
        read_torch_tensors(tmp_path / "absent.pth")
    file = write(tmp_path, {"w": tensor(numbers, (24,), (1,))}, [numbers])
    monkeypatch.setattr(torch_weights, "MAX_FILE_BYTES", file.stat().st_size - 1)
    with pytest.raises(ModelError, match="expected at most"):
        read_torch_tensors(file)


def test_many_views_of_one_storage_cannot_fill_the_memory(tmp_path, monkeypatch):
    storage = Stored("17", np.zeros(1000, "<f4"))
    file = write(tmp_path, {f"w{index}": tensor(storage, (1000,), (1,)) for index in range(10)}, [storage])
    monkeypatch.setattr(torch_weights, "MAX_FILE_BYTES", 39_999)
    with pytest.raises(ModelError, match="the tensors take 40000 bytes"):
        read_torch_tensors(file)
