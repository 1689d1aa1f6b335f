"""EfficientNet-Lite backbones, and the ImageNet weights of Lite2 that come with dlfer (weights/README.md).

EfficientNet-Lite is EfficientNet without squeeze-and-excitation and with ReLU6 instead of swish. Scaling does not
change the width of its stem and head and the depth of its first and last stages.

Source: Tan and Le, EfficientNet, ICML 2019; tensorflow/tpu, models/official/efficientnet/lite.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import ModelError
from dlfer.model.backbone_spec import IMAGENET_VARIANT, LITE_INPUT, BackboneSpec, name_blocks
from dlfer.model.weights_file import load_weights

if TYPE_CHECKING:
    import keras


KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)


@dataclass(frozen=True)
class LiteSpec:
    """The sizes and initialisation of one variant.

    Attributes:
        stem: number of filters of the first convolution.
        widths: numbers of filters of the seven stages.
        repeats: numbers of blocks of the seven stages.
        head: number of filters of the last convolution, which is the number of features.
        num_parameters: number of parameters without top, including moving statistics.
        norm_momentum: momentum of BatchNorm's moving statistics; with 0.99 they need some hundred steps to settle,
            more than a test has.
        variance_by: fan of the kernel initialiser: "average" of inputs and outputs (Glorot), or "outputs" (published).
    """

    stem: int
    widths: tuple[int, ...]
    repeats: tuple[int, ...]
    head: int
    num_parameters: int
    norm_momentum: float = 0.99
    variance_by: str = "average"


VARIANTS = {
    "lite0": LiteSpec(
        stem=32,
        widths=(16, 24, 40, 80, 112, 192, 320),
        repeats=(1, 2, 2, 3, 3, 4, 1),
        head=1280,
        num_parameters=3_413_024,
    ),
    "lite1": LiteSpec(
        stem=32,
        widths=(16, 24, 40, 80, 112, 192, 320),
        repeats=(1, 3, 3, 4, 4, 5, 1),
        head=1280,
        num_parameters=4_189_344,
    ),
    "lite2": LiteSpec(
        stem=32,
        widths=(16, 24, 48, 88, 120, 208, 352),
        repeats=(1, 3, 3, 4, 4, 5, 1),
        head=1280,
        num_parameters=4_869_168,
    ),
    # Not a published network: our own, for tests and the demo, which learns in seconds.
    "nano": LiteSpec(
        stem=8,
        widths=(8, 12, 16, 24, 32, 48, 64),
        repeats=(1, 1, 1, 2, 1, 1, 1),
        head=128,
        num_parameters=102_696,
        norm_momentum=0.9,
        variance_by="outputs",
    ),
}


def describe_lite(variant: str, image_size: int, last_blocks: str, **others) -> BackboneSpec:
    """Return the specification of a Lite variant; `last_blocks` are the last ones of each resolution: "1a 2b 3b 5c"."""
    return BackboneSpec(
        name=f"efficientnet_{variant}",
        image_size=image_size,
        num_parameters_without_top=VARIANTS[variant].num_parameters,
        build=lambda stem: build_efficientnet_lite(variant, image_size=None, name="backbone"),
        preprocessing=LITE_INPUT,
        stages=name_blocks(last_blocks),
        load=None if variant == "nano" else partial(load_lite_weights, variant),
        **{"note": "no squeeze-excite, ReLU6", **others},
    )


def build_efficientnet_lite(
    variant: str, *, image_size: int | None, name: str, drop_connect_rate: float = 0.2
) -> keras.Model:
    """Build an EfficientNet-Lite without its top, with random weights.

    Layers are named as in keras.applications' EfficientNet. Kernels of all variants but "nano" have Glorot's
    initialisation: with the published one, whose variance depends on the fan-out only, short trainings with Adam from
    random weights learn more slowly (results/random_start.md).

    Args:
        variant: a key of VARIANTS.
        image_size: side of the square input in pixels, or None for any; padding is "same" at every size.
        drop_connect_rate: block i (from 0) of n is skipped in training with the probability drop_connect_rate * i / n.

    Returns:
        A model from float [N, S, S, 3], preprocessed by (x - 127) / 128, to the feature map
        [N, s, s, head] after ReLU6 (values 0..6), with s = S / 32, rounded up at each halving.

    Raises:
        ModelError: there is no such variant.
    """
    import keras

    from dlfer.model.training_kernels import set_norm_momentum

    if variant not in VARIANTS:
        raise ModelError(f"No EfficientNet-Lite is called {variant!r}; expected one of {', '.join(VARIANTS)}.")
    spec = VARIANTS[variant]
    num_blocks = sum(spec.repeats)
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = _convolve(inputs, spec.stem, kernel=3, strides=2, by=spec.variance_by, name="stem_conv")
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
                by=spec.variance_by,
                name=f"block{stage + 1}{chr(ord('a') + repeat)}_",
            )
            index += 1
    x = _convolve(x, spec.head, kernel=1, strides=1, by=spec.variance_by, name="top_conv")
    x = _normalise(x, name="top_bn", activation="top_activation")
    model = keras.Model(inputs, x, name=name)
    set_norm_momentum(model, spec.norm_momentum)
    return model


def _add_block(
    inputs: keras.KerasTensor, width: int, *, stage: int, strides: int, drop_rate: float, by: str, name: str
) -> keras.KerasTensor:
    """Add an inverted bottleneck: expansion, depthwise convolution, projection, and a shortcut where shapes allow."""
    from keras import layers

    x = inputs
    if EXPANSIONS[stage] != 1:
        filters = inputs.shape[-1] * EXPANSIONS[stage]
        x = _convolve(x, filters, kernel=1, strides=1, by=by, name=f"{name}expand_conv")
        x = _normalise(x, name=f"{name}expand_bn", activation=f"{name}expand_activation")
    x = layers.DepthwiseConv2D(
        KERNELS[stage],
        strides=strides,
        padding="same",
        use_bias=False,
        depthwise_initializer=_make_initializer(by),
        name=f"{name}dwconv",
    )(x)
    x = _normalise(x, name=f"{name}bn", activation=f"{name}activation")
    x = _convolve(x, width, kernel=1, strides=1, by=by, name=f"{name}project_conv")
    x = _normalise(x, name=f"{name}project_bn")
    if strides == 1 and inputs.shape[-1] == width:
        if drop_rate > 0:
            x = layers.Dropout(drop_rate, noise_shape=(None, 1, 1, 1), name=f"{name}drop")(x)
        x = layers.Add(name=f"{name}add")([x, inputs])
    return x


def _convolve(
    x: keras.KerasTensor, filters: int, *, kernel: int, strides: int, by: str, name: str
) -> keras.KerasTensor:
    from keras import layers

    return layers.Conv2D(
        filters,
        kernel,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer=_make_initializer(by),
        name=name,
    )(x)


def _normalise(x: keras.KerasTensor, *, name: str, activation: str | None = None) -> keras.KerasTensor:
    from keras import layers

    x = layers.BatchNormalization(epsilon=1e-3, name=name)(x)
    return x if activation is None else layers.ReLU(max_value=6.0, name=activation)(x)


def _make_initializer(by: str) -> keras.initializers.Initializer:
    """Return the kernel initialiser: Glorot's for "average", else a normal distribution of variance 2 / fan-out."""
    import keras

    if by == "average":
        return keras.initializers.GlorotUniform()
    return keras.initializers.VarianceScaling(scale=2.0, mode="fan_out", distribution="truncated_normal")


IMAGENET_FILE = Path(__file__).parent / "weights" / f"efficientnet_{IMAGENET_VARIANT}.weights.h5"
FILE_SHA256 = "1f102629125dada1f156575eac3c2da3d77f197c18c404c1dc9ca33572753228"
WEIGHTS_SHA256 = "ffc8eed3ea058a8cc30dd8ff8751eafbc408702955e0f917ef283116ae2a71da"
"""`compute_digest` of the network with the released weights: of their names, shapes and float32 values."""


def load_lite_weights(variant: str, backbone: keras.Model, weights_file: str | None = None) -> None:
    """Load the weights of an EfficientNet-Lite: the ImageNet weights that come with dlfer, or those of a file.

    Args:
        variant: a key of VARIANTS; ImageNet weights exist for lite2 only.
        weights_file: a .weights.h5, .h5 or .keras of the backbone alone; None loads the ImageNet weights.

    Raises:
        ModelError: the variant has no ImageNet weights, or the file is missing, damaged or of another network.
    """
    if weights_file is not None:
        _load_file(variant, backbone, weights_file)
    elif variant != IMAGENET_VARIANT:
        raise ModelError(
            f"pretrain.weights: found imagenet, but of EfficientNet-Lite the ImageNet weights of {IMAGENET_VARIANT} alone come "
            f"with dlfer, not those of {variant}. Set model.backbone: efficientnet_{IMAGENET_VARIANT}; or name a .weights.h5 of "
            f"efficientnet_{variant} as pretrain.weights_file; or leave pretrain.weights null to train EF-FER1."
        )
    else:
        load_imagenet_weights(backbone)


def load_imagenet_weights(backbone: keras.Model, file: Path = IMAGENET_FILE) -> None:
    """Load the ImageNet weights of EfficientNet-Lite2 and verify all names, shapes and values by their hash.

    Args:
        backbone: a network from `build_efficientnet_lite("lite2", ...)`; unchanged if the file is not the released one.

    Raises:
        ModelError: the file is missing, damaged or altered, or its weights were not loaded into the right layers.
    """
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(
            f"{file}: expected the ImageNet weights that come with dlfer: {error}. Install dlfer again."
        ) from error
    if found != FILE_SHA256:
        raise ModelError(
            f"{file}: found the sha256 {found}, expected {FILE_SHA256}. The ImageNet weights that come with dlfer are damaged "
            "or were altered; install dlfer again."
        )
    load_weights(backbone, file)
    digest = compute_digest(backbone)
    if digest != WEIGHTS_SHA256:
        raise ModelError(
            f"{file}: its weights did not reach the layers of their names (sha256 {digest}, expected {WEIGHTS_SHA256}). This "
            "version of Keras reads the file in another order; install the versions of requirements.txt."
        )


def compute_digest(backbone: keras.Model) -> str:
    """Return the SHA-256 (hex) of all weights, sorted by name: "layer/weight", shape, little-endian float32 values."""
    weights = {f"{layer.name}/{weight.name}": weight for layer in backbone.layers for weight in layer.weights}
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(map(int, weights[name].shape))}".encode())
        digest.update(np.ascontiguousarray(weights[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def _load_file(variant: str, backbone: keras.Model, weights_file: str) -> None:
    try:
        load_weights(backbone, weights_file)
    except ModelError as error:
        raise ModelError(
            f"pretrain.weights_file {error} Expected the weights of efficientnet_{variant} without top, e.g. the "
            "backbone.weights.h5 of a run. PyTorch's .pth is not read; the ImageNet weights of "
            f"efficientnet_{IMAGENET_VARIANT} come with dlfer and need no file."
        ) from error
