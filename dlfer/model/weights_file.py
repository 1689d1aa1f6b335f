"""Loading of weights from .weights.h5, .keras and Keras' older .h5 files, which are validated before they are read.

Keras reads such files layer by layer, trusts their shapes, and may raise after it has set most of the weights; the
weights of an older .h5 it assigns by their order, without comparing names. Here groups, links, sizes and shapes are
checked first, and in an older .h5 the names, too. Only the weights of a .keras file are read: nothing that its config
describes is built, so none of its code can run, and a config that needs code (a Lambda, custom classes) is refused.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlfer.errors import ModelError, shorten
from dlfer.runs.files import describe_start, parse_json, replace_when_done
from dlfer.runs.text import describe_damage

if TYPE_CHECKING:
    import h5py
    import keras

SUFFIXES = (".weights.h5", ".h5", ".keras")
KERAS_WEIGHTS, KERAS_CONFIG = "model.weights.h5", "config.json"
MAX_DEPTH = 32
MAX_OBJECTS = 200_000
MAX_CONFIG = 64 * 2**20
MAX_EXPANSION = 8
"""Largest size of the weights in a .keras or .h5 relative to the network; with an optimiser's they are three times."""

_H5_SIGNATURE, _ZIP_SIGNATURE = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
_FILTERS = {"gzip", "lzf", None}


def load_weights(network: keras.Model, path: Path | str, *, older_names: bool = False) -> None:
    """Load all weights of a built network from a file.

    Args:
        network: the network whose weights were saved; unchanged if shapes in the file, or names in an older .h5, differ.
        path: a .weights.h5, an older .h5 or a .keras, according to its suffix.
        older_names: see `check_layers`.

    Raises:
        ModelError: the file is of another kind, damaged or of another network, contains links to other files, code or
            too much data, or has values that are not finite.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ModelError(
            f"{path}: expected a file of weights that ends in {', '.join(SUFFIXES)}; nothing else is read."
        )
    signature = _ZIP_SIGNATURE if path.suffix == ".keras" else _H5_SIGNATURE
    try:
        with open(path, "rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise ModelError(f"{path}: expected a file of weights: {error}.") from error
    if not start.startswith(signature):
        kind = "zip archive that Keras writes" if path.suffix == ".keras" else "HDF5 file"
        raise ModelError(f"{path}: expected the {kind}, its first bytes are {start[:8]!r}{describe_start(start)}.")
    if path.suffix != ".keras":
        _load_h5(network, path, where=path, older_names=older_names)
    else:
        with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
            weights = Path(folder) / KERAS_WEIGHTS
            _unpack_keras(path, weights, num_bytes=_count_bytes(network))
            _load_h5(network, weights, where=path)
    _check_finite(network, path)


def _check_finite(network: keras.Model, path: Path) -> None:
    """Raise ModelError if a weight that was loaded from `path` is NaN or infinite."""
    import keras
    import numpy as np

    wrong = {}
    for weight in network.weights:
        values = np.asarray(keras.ops.convert_to_numpy(weight.value))
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            wrong[weight.path] = int((~np.isfinite(values)).sum())
    if wrong:
        name, count = next(iter(wrong.items()))
        raise ModelError(
            f"{path}: found values that are NaN or infinite in {len(wrong)} of {len(network.weights)} arrays, first {count:,} in "
            f"{name}; expected finite numbers. The training diverged or the file was changed: get the model again, or train it "
            "again."
        )


def save_weights(network: keras.Model, path: Path) -> None:
    """Write the weights of a network as .weights.h5, atomically."""
    with replace_when_done(path, suffix=".weights.h5") as temporary:
        network.save_weights(temporary)


def _load_h5(network: keras.Model, path: Path, *, where: Path, older_names: bool = False) -> None:
    try:
        if path.name.endswith(".weights.h5"):
            check_h5(path, list_stored_shapes(network))
        else:
            check_h5(path, None, most_bytes=MAX_EXPANSION * _count_bytes(network) + 2**20)
            check_layers(path, network, older_names=older_names)
        network.load_weights(path)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        reason = shorten(error, path)
        raise ModelError(
            f"{where}: does not hold the weights of this network: {type(error).__name__}: {reason}"
        ) from error


def check_h5(path: Path, shapes: Counter[tuple[int, ...]] | None, *, most_bytes: int | None = None) -> None:
    """Raise ModelError unless an HDF5 file is a tree of plain arrays with the expected shapes or total size.

    Links, external and virtual arrays are refused, since they may lead out of the file or form cycles. The arrays of
    the optimiser are not compared, since they are not loaded. No array is read.

    Args:
        shapes: counts of the expected shapes; None does not compare shapes.
        most_bytes: largest total size of all arrays in bytes; None sets no limit.
    """
    import h5py

    found: Counter[tuple[int, ...]] = Counter()
    total = 0
    with h5py.File(path, "r") as file:
        for dataset in _walk(file, set()):
            total += math.prod(dataset.shape) * dataset.dtype.itemsize
            if not dataset.name.startswith("/optimizer/"):
                found[tuple(dataset.shape)] += 1
    if most_bytes is not None and total > most_bytes:
        raise ModelError(
            f"its arrays say that they take {total:,} bytes, expected at most {most_bytes:,}; it belongs to another network."
        )
    if shapes is None or found == shapes:
        return
    unexpected, missing = _list_shapes(found - shapes), _list_shapes(shapes - found)
    raise ModelError(
        f"found arrays of the shapes {unexpected} that the network does not have, and missed {missing}; it belongs to "
        "another network, or was changed."
    )


def check_layers(path: Path, network: keras.Model, *, older_names: bool = False) -> None:
    """Raise ModelError unless an older .h5 has the layers and weights of a network in its order, by name and shape.

    Keras assigns them by their order alone. The numbers of layers without a name of their own (`conv2d_7`) may begin
    anywhere. No array is read.

    Args:
        older_names: accept names that the network does not have in any place, since Keras' published files have those of
            earlier releases (`block1_conv1_W_1:0`, `mobl0_conv_0_depthwise`).
    """
    import h5py

    layers = [layer for layer in network.layers if layer.weights]
    expected = [
        _StoredWeight(place, layer.name, weight.path, tuple(weight.shape))
        for place, layer in enumerate(layers)
        for weight in (*layer.trainable_weights, *layer.non_trainable_weights)  # the order in which Keras stores them
    ]
    with h5py.File(path, "r") as file:
        found = _read_weights(
            file if "layer_names" in file.attrs or "model_weights" not in file else file["model_weights"]
        )
    kinds = {_to_snake_case(type(layer).__name__) for layer in layers}
    wrong = _find_difference(found, expected, kinds, older_names)
    if wrong is not None:
        told = [f"{weights[wrong]}" if wrong < len(weights) else "none" for weights in (found, expected)]
        raise ModelError(
            f"does not hold the weights of this network, in its order: as weight {wrong + 1}, found {told[0]} (of {len(found)}), "
            f"expected {told[1]} (of {len(expected)}). Save them from this network: network.save_weights('x.weights.h5')."
        )


class _StoredWeight(NamedTuple):
    """A weight with its layer, whose place is its number among the layers with weights; `name` is a path ("bn/gamma:0")."""

    place: int
    layer: str
    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{shorten(self.name)} of layer {shorten(self.layer)} {list(self.shape)}"


def _read_weights(group: h5py.Group) -> list[_StoredWeight]:
    """Return the weights that Keras would read from an older .h5, in its order."""
    names = [
        *_read_names(group, "layer_names"),
        *(["top_level_model_weights"] if "top_level_model_weights" in group else []),
    ]
    stored = [(name, weights) for name in names if (weights := _read_names(group[name], "weight_names"))]
    return [
        _StoredWeight(place, layer, name, tuple(group[layer][name].shape))
        for place, (layer, weights) in enumerate(stored)
        for name in weights
    ]


def _read_names(group: h5py.Group, key: str) -> list[str]:
    """Return the names in an attribute; Keras splits long ones into `key`0, `key`1, ..."""
    keys = [key] if key in group.attrs else takewhile(group.attrs.__contains__, (f"{key}{part}" for part in count()))
    names = [name for each in keys for name in group.attrs[each]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _find_difference(
    found: Sequence[_StoredWeight], expected: Sequence[_StoredWeight], kinds: set[str], older_names: bool
) -> int | None:
    """Return the index of the first weight that is not the expected one, None if all are; see `check_layers`."""
    layers, wanted = (_number_layers(weights, kinds, is_ranked=not older_names) for weights in (found, expected))
    for index, (one, other) in enumerate(zip(found, expected, strict=False)):
        of_layer = [_split(weight.name) for weight in expected if weight.place == other.place]
        (owner, role), (wanted_owner, wanted_role) = _split(one.name), _split(other.name)
        names = [
            (layers[index], wanted[index], older_names and layers[index] not in wanted),
            (role, wanted_role, older_names and role not in [each for _, each in of_layer]),
            # Keras has had several ways to name a layer inside of another one.
            (owner, wanted_owner, owner not in [each for each, _ in of_layer]),
        ]
        is_named = all(name == want or is_older for name, want, is_older in names)
        if not is_named or (one.place, one.shape) != (other.place, other.shape):
            return index
    return None if len(found) == len(expected) else min(len(found), len(expected))


def _number_layers(weights: Sequence[_StoredWeight], kinds: set[str], *, is_ranked: bool) -> list[str]:
    """Return the names of the layers, of those that Keras numbers the kind and, if `is_ranked`, their rank."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, sorted(kinds)))})(?:_(\d{{1,9}}))?")
    counted = {w.layer: (match[1], int(match[2] or 0)) for w in weights if (match := pattern.fullmatch(w.layer))}
    names, last = {}, {}
    for layer, (kind, _) in sorted(counted.items(), key=lambda item: item[1]):
        last[kind] = last.get(kind, -1) + 1
        names[layer] = f"{kind} {last[kind]}" if is_ranked else kind
    return [names.get(weight.layer, weight.layer) for weight in weights]


def _split(name: str) -> tuple[str, str]:
    """Split a weight's path, "stem/conv_2/kernel:0", into its layer without number and its name: "conv", "kernel"."""
    *_, owner, role = ["", *re.sub(r":\d+$", "", name).split("/")]
    role = re.sub(r"_\d+$", "", role)
    # DepthwiseConv2D named its kernel so until Keras 3.
    return re.sub(r"_?\d+$", "", owner), "kernel" if role == "depthwise_kernel" else role


def _to_snake_case(name: str) -> str:
    """Return the name that Keras gives to the first layer of a class without a name: Conv2D -> conv2d."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def list_stored_shapes(network: keras.Model) -> Counter[tuple[int, ...]]:
    """Return the counts of the shapes of the arrays that Keras saves for a network; dropout seeds are not saved."""
    return Counter(tuple(variable.shape) for variable in network.weights)


def _walk(group: h5py.Group, seen: set, depth: int = 0) -> Iterator[h5py.Dataset]:
    """Yield the arrays of a group and of the groups nested in it."""
    import h5py

    if depth > MAX_DEPTH:
        raise ModelError(f"its groups are nested deeper than {MAX_DEPTH}; expected those of a network.")
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ModelError(f"{group.name} holds a link {name!r} ({type(link).__name__}), expected arrays and groups.")
        item = group[name]
        token = (h5py.h5o.get_info(item.id).fileno, h5py.h5o.get_info(item.id).addr)
        if token in seen or len(seen) >= MAX_OBJECTS:
            raise ModelError(f"{item.name} stands in it twice, or it holds more than {MAX_OBJECTS:,} arrays.")
        seen.add(token)
        if isinstance(item, h5py.Group):
            yield from _walk(item, seen, depth + 1)
        elif isinstance(item, h5py.Dataset):
            _check_dataset(item)
            yield item
        else:
            raise ModelError(f"{group.name} holds {name!r}, a {type(item).__name__}; expected arrays and groups.")


def _check_dataset(dataset: h5py.Dataset) -> None:
    if dataset.external or dataset.is_virtual:
        raise ModelError(f"{dataset.name} has its values in another file; expected them in this one.")
    if dataset.shape is None or dataset.dtype.kind not in "biufSO" or dataset.maxshape != dataset.shape:
        raise ModelError(f"{dataset.name} is {dataset.dtype} {dataset.shape}, expected numbers of one shape.")
    # The only object arrays are strings (Keras' 0-d strings); h5py creates no other objects by default.
    if dataset.dtype.kind in "SO" and dataset.shape != ():
        raise ModelError(f"{dataset.name} holds {dataset.dtype}, expected numbers.")
    if dataset.compression not in _FILTERS:
        raise ModelError(f"{dataset.name} is packed by {dataset.compression!r}, expected gzip or none.")
    if dataset.chunks is not None and any(c > max(s, 1) for c, s in zip(dataset.chunks, dataset.shape, strict=True)):
        raise ModelError(
            f"{dataset.name} is kept in pieces of {dataset.chunks}, larger than its shape {dataset.shape}."
        )


def _unpack_keras(path: Path, weights: Path, *, num_bytes: int) -> None:
    """Extract the weights of a .keras to the file `weights`, after checking that its config needs no code."""
    most = {KERAS_CONFIG: MAX_CONFIG, KERAS_WEIGHTS: MAX_EXPANSION * num_bytes + 16 * 2**20}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            for name in members:
                if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                    raise ModelError(
                        f"{path}: holds a file named {name[:200]!r}, which leaves its folder; it is not opened."
                    )
            missing = [name for name in most if name not in members]
            if missing or len(members) < len(archive.infolist()):
                raise ModelError(
                    f"{path}: found {', '.join(sorted(members))[:300]}, expected {' and '.join(most)}, each once; "
                    "save the model again by model.save(...)."
                )
            for name, limit in most.items():
                if members[name].file_size > limit:
                    raise ModelError(
                        f"{path}: {name} says that it takes {members[name].file_size:,} bytes unpacked, expected at most "
                        f"{limit:,}; it belongs to another network, or was made to fill the memory."
                    )
            with archive.open(KERAS_CONFIG) as stream:
                check_keras_config(parse_json(stream.read(MAX_CONFIG)), where=path)
            with archive.open(KERAS_WEIGHTS) as source, open(weights, "wb") as target:
                # zipfile returns no more bytes than the declared size of the member, which was checked above.
                shutil.copyfileobj(source, target)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelError(
            f"{path}: cannot be read as Keras' .keras file ({type(error).__name__}: {shorten(error, path)}). {describe_damage(path)}"
        ) from error


def check_keras_config(config: Any, *, where: Path) -> None:
    """Raise ModelError if the config of a .keras contains a Lambda layer or any class that is not part of Keras."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        name, module = value.get("class_name"), value.get("module")
        if name in ("Lambda", "__lambda__"):
            raise ModelError(
                f"{where}: holds a Lambda, which is Python code, and code from a file is never run (Keras' safe mode). "
                "Save a model of layers without Lambda, or its weights alone: model.save_weights('x.weights.h5')."
            )
        foreign = isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins")
        registered = value.get("registered_name")
        own = isinstance(registered, str) and ">" in registered and not registered.startswith("keras")
        if name is not None and (foreign or own):
            raise ModelError(
                f"{where}: describes {str(registered or f'{module}.{name}')[:200]!r}, a class that is not Keras' own; "
                "expected a model of Keras' layers. Save its weights alone: model.save_weights('x.weights.h5')."
            )


def check_keras_file(path: Path) -> None:
    """Raise ModelError unless a whole Keras model, .keras or older .h5, needs no code and no other file.

    The model is not built. The size of the network that it describes is not limited, since the user chose the file.
    """
    import h5py

    try:
        if path.suffix == ".keras":
            with tempfile.TemporaryDirectory(prefix="dlfer-") as folder:
                weights = Path(folder) / KERAS_WEIGHTS
                _unpack_keras(path, weights, num_bytes=path.stat().st_size)
                check_h5(weights, None)
            return
        check_h5(path, None)
        with h5py.File(path, "r") as file:
            config = file.attrs.get("model_config")
        if config is None:
            raise ModelError(
                "holds weights without the network that they belong to, expected a whole model: model.save(...)."
            )
        check_keras_config(parse_json(config), where=path)
    except ModelError as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{path}: cannot be read as a model of Keras ({type(error).__name__}: {shorten(error, path)}). {describe_damage(path)}"
        ) from error


def _count_bytes(network: keras.Model) -> int:
    return sum(math.prod(variable.shape) * 4 for variable in network.weights)


def _list_shapes(shapes: Counter[tuple[int, ...]]) -> str:
    listed = [f"{shape}" + (f" ({count} times)" if count > 1 else "") for shape, count in shapes.most_common(4)]
    return ", ".join(listed) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else "") if listed else "none"
