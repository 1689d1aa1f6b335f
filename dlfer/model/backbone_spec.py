"""Specifications of backbones, their preprocessing, and backbones built from keras.applications.

A network of keras.applications is changed in three ways to become a backbone. Its input stage: Keras' EfficientNets
start with a rescaling that depends on the *name* of the weights (an extra division by sqrt(std) for "imagenet"), so
networks of equal shapes can be different functions; it is removed. Its padding: EfficientNet and MobileNetV2 pad
before strided convolutions for the size at build time, and wrongly for odd sizes if that was None (B3 at its own 300
pixels then ends at 9x9, not at 10x10), as MobileNet always does; it is replaced by "same", the padding that these
networks were published with. Its names: InceptionV3, InceptionResNetV2, Xception and ConvNeXt leave layers unnamed, so
that Keras numbers them by the networks built before (conv2d, then conv2d_94); they get the names of a new process,
since weights are loaded by name.

Keras is imported only where a network is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import ModelError, TransferError, shorten
from dlfer.model.weights_file import load_weights

if TYPE_CHECKING:
    import keras


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

IMAGENET_VARIANT = "lite2"
PACKAGED_WEIGHTS = f"With dlfer come the ImageNet weights of efficientnet_{IMAGENET_VARIANT} alone; only these need no network and no file."


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a backbone expects of its pixels: ((x * scale) - mean) / std for each channel.

    Attributes:
        scale: factor of the pixels (0..255).
        mean, std: of the scaled pixels, in the order of `channels`.
        channels: channel order, "rgb" or "bgr".
    """

    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: str = "rgb"

    def compute_scale_and_offset(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the equivalent factor and offset of each channel, both float32 [3]."""
        std = np.asarray(self.std, np.float64)
        return (self.scale / std).astype(np.float32), (-np.asarray(self.mean) / std).astype(np.float32)

    def as_dict(self) -> dict:
        """Return the fields as JSON-serialisable values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# For torchvision, DenseNet, ConvNeXt and most EfficientNets: 0..1, then ImageNet's mean and standard deviation.
TORCH_INPUT = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)
EFFICIENTNET_INPUT = TORCH_INPUT
# For EfficientNet-Lite.
LITE_INPUT = Preprocessing(scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3)
# For VGG, Keras' ResNets and MobileNet from VGGFace2, as in Caffe: BGR in 0..255 minus the mean pixel of ImageNet.
CAFFE_INPUT = Preprocessing(scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr")
# For the Inception networks, Xception and the MobileNets: -1..1.
SIGNED_INPUT = Preprocessing(scale=1 / 127.5, mean=(1.0,) * 3)
# For EfficientNetV2-S in Keras: not quite -1..1.
EFFICIENTNET_V2_S_INPUT = Preprocessing(scale=1 / 128, mean=(1.0,) * 3)

# For any backbone, under `pixel_scaling: divide_by_255`: 0..1.
UNIT_INPUT = Preprocessing()


def choose_preprocessing(own: Preprocessing, pixel_scaling: str) -> Preprocessing:
    """Return the preprocessing for `model.pixel_scaling`: the backbone's own, x / 255, or Caffe's."""
    return {"backbone": own, "divide_by_255": UNIT_INPUT, "caffe": CAFFE_INPUT}[pixel_scaling]


@dataclass(frozen=True)
class BackboneSpec:
    """The specification of a backbone: an entry of the table of backbones.

    Attributes:
        name: a name in `dlfer.config.names.BACKBONES`.
        image_size: side in pixels of the images that its authors trained it on.
        num_parameters_without_top: number of parameters of the built network, including BatchNorm's moving statistics.
        build: function that takes the name of the stem and builds the network with random weights.
        preprocessing: the preprocessing that its published weights expect.
        stages: names of the layers whose outputs are the last feature maps of each resolution, ordered from the
            input; the last one is the network's output.
        min_image_size: smallest side in pixels with a feature map of at least 1x1 for every stem.
        load: function (backbone, weights_file or None) that loads published weights or a file; None: files only.
        weights: names of its published weights; all but imagenet need a file.
        is_packaged: whether the published weights come with dlfer.
        stems: variants of its first layers: "imagenet" as published, "small" for small images.
        auxiliary: names of the layers whose outputs auxiliary heads classify in training.
        note: one line for `dlfer show backbones`.
    """

    name: str
    image_size: int
    num_parameters_without_top: int
    build: Callable[[str], keras.Model]
    preprocessing: Preprocessing
    stages: tuple[str, ...]
    min_image_size: int = 1
    load: Callable[[keras.Model, str | None], None] | None = None
    weights: tuple[str, ...] = ()
    is_packaged: bool = False
    stems: tuple[str, ...] = ("imagenet",)
    auxiliary: tuple[str, ...] = ()
    note: str = ""


def name_blocks(last_blocks: str) -> tuple[str, ...]:
    """Return the last layers of blocks like "1a 2b 3b 5c", and of the network; "a" blocks have no residual addition."""
    ends = [f"block{block}_{'project_bn' if block.endswith('a') else 'add'}" for block in last_blocks.split()]
    return (*ends, "top_activation")


def name_residual_blocks(repeats: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the last layers of a ResNet's stem and stages, which have `repeats` blocks."""
    ends = (f"conv{stage}_block{num_blocks}_out" for stage, num_blocks in enumerate(repeats, start=2))
    return ("conv1_relu", *ends)


COUNTED_NAME = re.compile(
    r"(activation|add|average_pooling2d|batch_normalization|concatenate|conv2d|custom_scale_layer"
    r"|layer_normalization|max_pooling2d)(_\d+)?"
)


def describe_keras(
    name: str,
    application: str,
    stages: tuple[str, ...],
    *,
    preprocessing: Preprocessing,
    weights: tuple[str, ...] = ("imagenet",),
    **others,
) -> BackboneSpec:
    """Return the specification of a network of keras.applications.

    Args:
        name, stages: see `BackboneSpec`.
        application: its name in keras.applications.
        preprocessing: the preprocessing with which its published ImageNet weights were trained.
        weights: names of its published weights, including imagenet.
        others: other fields of `BackboneSpec`.
    """
    return BackboneSpec(
        name=name,
        build=lambda stem: build_application(application),
        preprocessing=preprocessing,
        stages=stages,
        load=partial(load_application_weights, application, preprocessing=preprocessing),
        weights=weights,
        **others,
    )


def describe_efficientnet(variant: str, image_size: int, num_parameters: int, last_blocks: str) -> BackboneSpec:
    """Return the specification of an EfficientNet; `last_blocks` are the last of each resolution: "1a 2b 3b 5c"."""
    return describe_keras(
        f"efficientnet_{variant}",
        f"EfficientNet{variant.upper()}",
        name_blocks(last_blocks),
        image_size=image_size,
        num_parameters_without_top=num_parameters,
        preprocessing=EFFICIENTNET_INPUT,
        note="Tan and Le 2019",
    )


def describe_efficientnet_v2(
    variant: str, image_size: int, num_parameters: int, last_blocks: str, *, preprocessing: Preprocessing
) -> BackboneSpec:
    """Return the specification of an EfficientNetV2; `last_blocks` are the last of each resolution: "1a 2b 3b 5e"."""
    stages = name_blocks(last_blocks)
    # Its first block has no expansion; its only convolution is named a projection and has an activation.
    stages = tuple("block1a_project_activation" if name == "block1a_project_bn" else name for name in stages)
    return describe_keras(
        f"efficientnet_v2_{variant}",
        f"EfficientNetV2{variant.upper()}",
        stages,
        image_size=image_size,
        num_parameters_without_top=num_parameters,
        preprocessing=preprocessing,
        note="Tan and Le 2021",
    )


def describe_resnet(name: str, num_parameters: int, repeats: tuple[int, ...]) -> BackboneSpec:
    """Return the specification of a ResNet with `repeats` bottleneck blocks in its stages."""
    return describe_keras(
        name,
        name.replace("resnet", "ResNet"),
        name_residual_blocks(repeats),
        image_size=224,
        num_parameters_without_top=num_parameters,
        preprocessing=CAFFE_INPUT,
        note="He et al. 2016, bottleneck blocks",
    )


def build_application(application: str) -> keras.Model:
    """Build a network of keras.applications for any image size, without top and input stage, with random weights.

    Args:
        application: its name in keras.applications, for example "ResNet50".

    Returns:
        A model named "backbone" from preprocessed images float [B, S, S, 3] to the feature map [B, s, s, F].
    """
    import keras

    network = _make_application(application, weights=None)
    if has_input_stage(application):
        network = keras.Model(network.get_layer("stem_conv_pad").input, network.outputs[0])
    pads = has_input_stage(application) or application in ("MobileNet", "MobileNetV2")
    if pads or _name_counted_layers(network):
        network = _clone(network, same_padding=pads)
    return keras.Model(network.inputs[0], network.outputs[0], name="backbone")


def load_application_weights(
    application: str, backbone: keras.Model, weights_file: str | None = None, *, preprocessing: Preprocessing
) -> None:
    """Load the ImageNet weights that Keras publishes into every layer of a backbone.

    Args:
        application: its name in keras.applications.
        backbone: a backbone from `build_application`.
        preprocessing: the preprocessing of its pixels; compared with the input stage in the file, if it has one.
        weights_file: a local copy of Keras' file without top; None downloads it.

    Raises:
        ModelError: the file cannot be obtained or does not hold the weights of this network.
        TransferError: the file's input stage is not `preprocessing`, or its layers are not those of the backbone.
    """
    where = weights_file or "the downloaded file"
    if weights_file is None:
        network = _download_application(application)
    else:
        network = _make_application(application, weights=None)
        try:
            load_weights(network, weights_file, older_names=True)
        except ModelError as error:
            raise ModelError(
                f"pretrain.weights_file {error} Expected the weights of {application} without top: Keras' published "
                "file (its name ends with notop.h5 or no_top.h5), a .weights.h5, or a .keras."
            ) from error
    if has_input_stage(application):
        _check_input_stage(network, preprocessing, where)
    _copy_weights(network, backbone, where)


def has_input_stage(application: str) -> bool:
    """Return whether Keras builds a rescaling into this network that no argument disables."""
    return re.fullmatch(r"EfficientNetB\d", application) is not None


def _make_application(application: str, *, weights: str | None) -> keras.Model:
    import keras

    make: Callable = getattr(keras.applications, application)
    # Only these have an argument that omits the input stage.
    options = {"include_preprocessing": False} if application.startswith(("EfficientNetV2", "ConvNeXt")) else {}
    return make(weights=weights, include_top=False, input_shape=(None, None, 3), **options)


def _download_application(application: str) -> keras.Model:
    # Keras raises a plain Exception if a download fails.
    try:
        return _make_application(application, weights="imagenet")
    except Exception as error:
        raise ModelError(
            f"pretrain.weights: the ImageNet weights of {application} could not be downloaded ({shorten(error)}); where there is "
            "no network, name a local copy of Keras' file without top: pretrain.weights_file (of a branch of a hybrid: "
            f"pretrain.weights, as this branch's source). {PACKAGED_WEIGHTS}"
        ) from error


def _name_counted_layers(network: keras.Model) -> dict[str, str]:
    """Map the names of automatically numbered layers to their names in a new process: conv2d, conv2d_1, ..."""
    counted = sorted(
        (match[1], int((match[2] or "_0")[1:]), layer.name)
        for layer in network.operations
        if (match := COUNTED_NAME.fullmatch(layer.name))
    )
    names: dict[str, str] = {}
    for _, group in groupby(counted, key=lambda entry: entry[0]):
        names |= {name: f"{kind}_{index}" if index else kind for index, (kind, _, name) in enumerate(group)}
    return names


def _clone(network: keras.Model, *, same_padding: bool) -> keras.Model:
    """Return a copy of the network with the layer names of a new process, independent of layers that were cut off.

    Args:
        network: the network to copy; its weights are not copied.
        same_padding: whether convolutions get the padding "same" in place of separate padding layers.
    """
    import keras
    from keras import layers

    names = _name_counted_layers(network)

    def make_anew(layer: keras.Operation) -> layers.Layer:
        name = names.get(layer.name, layer.name)
        if not isinstance(layer, layers.Layer):
            # ConvNeXt adds residuals with a plain operation, which cannot be found by name like a layer.
            return layers.Add(name=name)
        if same_padding and isinstance(layer, layers.ZeroPadding2D):
            return layers.Identity(name=name, dtype=layer.dtype_policy.name)
        config = {**layer.get_config(), "name": name}
        if same_padding and isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D):
            config["padding"] = "same"
        return type(layer).from_config(config)

    def call(layer: layers.Layer, *args, **kwargs):
        return layer(list(args)) if isinstance(layer, layers.Add) and len(args) == 2 else layer(*args, **kwargs)

    return keras.models.clone_model(network, clone_function=make_anew, call_function=call)


def _copy_weights(network: keras.Model, backbone: keras.Model, where: str) -> None:
    """Copy the weights of each layer by name; raise TransferError before the first copy if any layer does not match."""
    import keras

    names = _name_counted_layers(network)
    source = {
        names.get(layer.name, layer.name): layer
        for layer in network.layers
        if layer.weights and not isinstance(layer, keras.layers.Normalization)
    }
    target = {layer.name: layer for layer in backbone.layers if layer.weights}
    missing, unexpected = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    reshaped = [
        name
        for name in target.keys() & source.keys()
        if [weight.shape for weight in target[name].weights] != [weight.shape for weight in source[name].weights]
    ]
    if missing or unexpected or reshaped:
        raise TransferError(
            f"{where}: {len(missing)} layers missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(reshaped)} of another shape {reshaped[:3]}; expected the published file of the same network."
        )
    for name, layer in target.items():
        layer.set_weights(source[name].get_weights())


def _check_input_stage(network: keras.Model, preprocessing: Preprocessing, where: str) -> None:
    """Raise TransferError unless the file's normalisation layer has the mean and std of `preprocessing`.

    The file stores standard deviations as variances, a mistake that Keras corrects by the extra rescaling by
    1/sqrt(std) for "imagenet"; so its "variance" is compared with `std`.
    """
    import keras

    # Found by its class, since Keras numbers its name by the networks built in the process.
    normalization = next(layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    mean, variance = normalization.get_weights()[:2]
    mean, variance = np.ravel(mean), np.ravel(variance)
    if not (np.allclose(mean, preprocessing.mean, atol=1e-3) and np.allclose(variance, preprocessing.std, atol=1e-3)):
        raise TransferError(
            f"{where}: its normalisation has mean {mean.round(3).tolist()} and variance {variance.round(3).tolist()}, "
            f"expected {list(preprocessing.mean)} and {list(preprocessing.std)}; "
            "the network would be another function. Is this Keras' published ImageNet file?"
        )
