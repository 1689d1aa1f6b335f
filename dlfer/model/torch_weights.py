"""Tensors of a PyTorch weight file in the format before 1.6, read without PyTorch.

Such a file is a row of pickles (magic number, version, machine, the object, the storage keys)
followed by the raw storages. A pickle is a program: it may call whatever it names. So only the
opcodes that PyTorch writes are admitted, only four names, and every size is held against the file.

Source: torch/serialization.py, `_legacy_save`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlfer.errors import ModelError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
MAX_FILE_BYTES = 512 * 2**20
MAX_MEMO = 2**20
STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8"}
# fmt: off
OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
})
# fmt: on
"""The pickle opcodes (protocol 2) that PyTorch's files hold."""
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Storage(NamedTuple):
    """A run of numbers at the end of the file: numpy dtype, key, number of elements."""

    dtype: str
    key: str
    num_elements: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_tensors(file: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a PyTorch state dict saved before version 1.6, by their names.

    Args:
        file: a `.pth` file of at most 512 MiB that holds one dict of float32 and int64 tensors.

    Returns:
        name -> float32 or int64 array of its own, C-contiguous.

    Raises:
        ModelError: the file is missing, damaged, too large, of another format, or names anything
            but tensors.
    """
    path = Path(file)
    content = _read_bytes(path)
    try:
        position, tensors, keys = _read_header(content)
        storages = _read_storages(content, position, tensors, keys)
        return {name: _view(name, tensor, storages) for name, tensor in tensors.items()}
    except ModelError as error:
        raise ModelError(f"{path}: {error} The file is not read; download it again from a source you trust.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ModelError(
                f"{path}: {size} bytes, expected at most {MAX_FILE_BYTES}. This is not a backbone's weights."
            )
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Name an existing .pth file.") from error


def _read_header(content: bytes) -> tuple[int, dict[str, Tensor], list[str]]:
    """Read the five pickles; return where the storages begin, the tensors, and the storage keys."""
    if content[:2] == b"PK":
        raise ModelError("found a zip archive (PyTorch 1.6 or later), expected the older format.")
    magic, position = _unpickle(content, 0)
    if magic != MAGIC_NUMBER:
        raise ModelError("the file does not begin with PyTorch's magic number.")
    version, position = _unpickle(content, position)
    if version != PROTOCOL_VERSION:
        raise ModelError(f"found format version {version!r:.40}, expected {PROTOCOL_VERSION}.")
    machine, position = _unpickle(content, position)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ModelError("the file does not say that it was written on a little-endian machine.")
    state, position = _unpickle(content, position)
    keys, position = _unpickle(content, position)
    return position, _check_state(state), _check_keys(keys)


def _check_state(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise ModelError(f"found a {type(state).__name__}, expected a dict of tensors.")
    # By the class, because the pickle may have hung attributes on the instance.
    items = list(OrderedDict.items(state) if isinstance(state, OrderedDict) else dict.items(state))
    for name, value in items:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(f"found a {type(value).__name__} under {name!r:.80}, expected a name and a tensor.")
    return dict(items)


def _check_keys(keys: Any) -> list[str]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise ModelError("the list of storages is not a list of different strings.")
    return keys


def _unpickle(content: bytes, start: int) -> tuple[Any, int]:
    """Return the object of the pickle at `start`, and where that pickle ends."""
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if opcode.name not in OPCODES:
                raise ModelError(f"byte {position}: found pickle opcode {opcode.name}, which PyTorch does not write.")
            # The unpickler allocates its memo up to the largest index.
            if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > MAX_MEMO:
                raise ModelError(f"byte {position}: found memo index {argument}, expected at most {MAX_MEMO}.")
        end = stream.tell()
        return _TensorUnpickler(io.BytesIO(content[start:end])).load(), end
    except UNPICKLING_ERRORS as error:
        raise ModelError(f"byte {start}: no complete pickle ({type(error).__name__}: {error}).") from error


class _Rebuild:
    """Stand-in for torch._utils._rebuild_tensor_v2; without attributes, so that a pickle cannot alter it."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, *rest: Any
    ) -> Tensor:
        if not isinstance(storage, Storage) or rest or hooks:
            raise ModelError("found a tensor with hooks or without a storage.")
        numbers_fit = _is_count(offset) and isinstance(shape, tuple) and isinstance(strides, tuple)
        if not numbers_fit or len(shape) != len(strides) or not all(map(_is_count, shape + strides)):
            raise ModelError(
                f"found a tensor with offset {offset!r:.40}, shape {shape!r:.80}, strides {strides!r:.80}; "
                f"expected integers of at least 0, as many strides as dimensions."
            )
        return Tensor(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows four names: the ordered dict, the tensor and two storages."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ModelError(f"found {module}.{name}, expected only tensors of {' and '.join(STORAGES)}.")

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 6 or pid[0] != "storage":
            raise ModelError(f"found the reference {pid!r:.80}, expected a storage.")
        _, dtype, key, _, num_elements, view = pid
        known = isinstance(dtype, str) and dtype in STORAGES.values()
        if not known or not isinstance(key, str) or not _is_count(num_elements) or view is not None:
            raise ModelError(f"found the storage {pid!r:.120}, expected a whole one with a key and a size.")
        return Storage(dtype, key, num_elements)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_storages(content: bytes, position: int, tensors: dict[str, Tensor], keys: list[str]) -> dict[str, np.ndarray]:
    """Return the storages (views of `content`) by key; the file must end with the last of them."""
    wanted: dict[str, Storage] = {}
    for name, tensor in tensors.items():
        if wanted.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise ModelError(f"tensor {name} gives storage {tensor.storage.key} another type or size.")
    num_bytes = sum(math.prod(tensor.shape) * np.dtype(tensor.storage.dtype).itemsize for tensor in tensors.values())
    if num_bytes > MAX_FILE_BYTES:
        raise ModelError(f"the tensors take {num_bytes} bytes, expected at most {MAX_FILE_BYTES}.")
    if set(wanted) != set(keys):
        raise ModelError(f"found {len(keys)} storages of which tensors use {len(set(wanted) & set(keys))}.")
    storages = {}
    for key in keys:
        storage = wanted[key]
        found = int.from_bytes(content[position : position + 8], "little")
        num_bytes = storage.num_elements * np.dtype(storage.dtype).itemsize
        position += 8
        if found != storage.num_elements or position + num_bytes > len(content):
            raise ModelError(
                f"byte {position - 8}: storage {key} says {found} elements and has at most "
                f"{max(len(content) - position, 0)} bytes, expected {storage.num_elements} elements."
            )
        storages[key] = np.frombuffer(content, storage.dtype, storage.num_elements, position)
        position += num_bytes
    if position != len(content):
        raise ModelError(f"byte {position}: {len(content) - position} bytes follow the last storage, expected none.")
    return storages


def _view(name: str, tensor: Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    """Return a copy of the numbers that `tensor` shows; it may show none of its storage twice."""
    numbers = storages[tensor.storage.key]
    size = math.prod(tensor.shape)
    last = tensor.offset + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.strides, strict=True))
    if size > len(numbers) or (size and last >= len(numbers)):
        raise ModelError(
            f"tensor {name} of shape {tensor.shape}, strides {tensor.strides}, offset {tensor.offset} "
            f"reaches beyond its storage of {len(numbers)} elements."
        )
    if size == 0:
        return np.zeros(tensor.shape, numbers.dtype)
    strides = [step * numbers.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides).copy(order="C")
