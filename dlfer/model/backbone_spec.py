"""The record of one backbone in the table, what a backbone expects of its pixels, and the backbones from keras.applications.

Three things stand between an application of Keras and a backbone. Its input stage: Keras' EfficientNets start with a
rescaling that depends on the *name* of the weights (an extra division by sqrt(std) for "imagenet"), so two
networks of equal shapes can be different functions; that part is cut off. Its padding: EfficientNet and
MobileNetV2 pad before a strided convolution as the size was when they were built, and wrongly for odd sizes
if it was left open (B3 at its own 300 pixels then ends at 9x9, not at 10x10), as MobileNet always does; "same"
is the same padding, at every size, and the one that these networks were published with. Its names: InceptionV3,
InceptionResNetV2, Xception and ConvNeXt leave layers unnamed, so that Keras counts them up from one network to the next
(conv2d, then conv2d_94); they get the names of a new process, since weights are loaded by name.

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
    """What a backbone expects of its pixels: ((x * scale) - mean) / std, channel by channel.

    Attributes:
        scale: factor of the pixels (0..255).
        mean, std: in units of the scaled pixels, in the order of `channels`.
        channels: "rgb" or "bgr".
    """

    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: str = "rgb"

    def compute_scale_and_offset(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 [3] factor and summand that do the same in one step."""
        std = np.asarray(self.std, np.float64)
        return (self.scale / std).astype(np.float32), (-np.asarray(self.mean) / std).astype(np.float32)

    def as_dict(self) -> dict:
        """Return the fields as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# torchvision's, DenseNet's, ConvNeXt's and most EfficientNets': 0..1, then ImageNet's mean and deviation.
TORCH_INPUT = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)
EFFICIENTNET_INPUT = TORCH_INPUT
# EfficientNet-Lite's.
LITE_INPUT = Preprocessing(scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3)
# Caffe's, of VGG, Keras' ResNets and MobileNet from VGGFace2: BGR in 0..255 less the mean pixel of ImageNet.
CAFFE_INPUT = Preprocessing(scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr")
# The Inceptions', Xception's and the MobileNets': -1..1.
SIGNED_INPUT = Preprocessing(scale=1 / 127.5, mean=(1.0,) * 3)
# EfficientNetV2-S's, as Keras has it: not quite -1..1.
EFFICIENTNET_V2_S_INPUT = Preprocessing(scale=1 / 128, mean=(1.0,) * 3)

# 0..1, whatever the backbone.
UNIT_INPUT = Preprocessing()


def choose_preprocessing(own: Preprocessing, pixel_scaling: str) -> Preprocessing:
    """Return what `model.pixel_scaling` says: a backbone's own preprocessing, x / 255, or Caffe's."""
    return {"backbone": own, "divide_by_255": UNIT_INPUT, "caffe": CAFFE_INPUT}[pixel_scaling]


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the table.

    Attributes:
        name: as in `dlfer.config.names.BACKBONES`.
        image_size: side in pixels that its authors trained it at.
        num_parameters_without_top: of the network that `build` gives, BatchNorm's moving statistics included.
        build: makes the network with random weights; takes the name of the stem.
        preprocessing: what its pixels must look like.
        stages: names of the layers whose outputs are the last feature maps of each resolution, from the
            image on; the last one is the network's output.
        min_image_size: the smallest side that leaves a feature map of 1x1 or more, by any stem.
        load: sets published weights or those of a file: (backbone, weights_file or None); None if neither can be had.
        weights: names of published weights that can be asked for; those beside imagenet need a file.
        is_packaged: whether the published weights come with dlfer.
        stems: what the first layers may be: "imagenet" as published, "small" for small images.
        auxiliary: names of the layers behind which auxiliary classifiers branch off in training.
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
    """Return the layers that end blocks "1a 2b 3b 5c" and the last one; a block that stands alone has no addition."""
    ends = [f"block{block}_{'project_bn' if block.endswith('a') else 'add'}" for block in last_blocks.split()]
    return (*ends, "top_activation")


def name_residual_blocks(repeats: tuple[int, ...]) -> tuple[str, ...]:
    """Return the layers that end the stages of a ResNet with so many blocks in each."""
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
    """Return the record of a network of keras.applications.

    Args:
        name, stages: see `BackboneSpec`.
        application: its name in keras.applications.
        preprocessing: what its published ImageNet weights were trained with.
        weights: names of its published weights, imagenet among them.
        others: fields of `BackboneSpec`.
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
    """Return the record of an EfficientNet; `last_blocks` are those that end a resolution: "1a 2b 3b 5c"."""
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
    """Return the record of an EfficientNetV2; `last_blocks` are those that end a resolution: "1a 2b 3b 5e"."""
    stages = name_blocks(last_blocks)
    # Its first block has no expansion, and its only convolution is called a projection with an activation.
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
    """Return the record of a ResNet of bottleneck blocks, `repeats` in each stage."""
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
    """Build a network of keras.applications with random weights, without top and input stage, for any size.

    Args:
        application: its name there, "ResNet50" for example.

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
    """Set the ImageNet weights that Keras publishes, layer by layer; every weight gets its value or this raises.

    Args:
        application: its name in keras.applications.
        backbone: as `build_application` gave it.
        preprocessing: what is done to the pixels before; held against the input stage in the file, if it has one.
        weights_file: a local copy of Keras' file without top; null downloads it.

    Raises:
        ModelError: the file cannot be had or does not hold the weights of this network.
        TransferError: the file's input stage is not `preprocessing`, or its layers are not the backbone's.
    """
    where = weights_file or "the downloaded file"
    if weights_file is None:
        network = _download_application(application)
    else:
        network = _make_application(application, weights=None)
        try:
            load_weights(network, weights_file)
        except ModelError as error:
            raise ModelError(
                f"pretrain.weights_file {error} Expected the weights of {application} without top: Keras' published "
                "file (its name ends with notop.h5 or no_top.h5), a .weights.h5, or a .keras."
            ) from error
    if has_input_stage(application):
        _check_input_stage(network, preprocessing, where)
    _copy_weights(network, backbone, where)


def has_input_stage(application: str) -> bool:
    """Tell whether Keras builds a rescaling into this network that no argument leaves out."""
    return re.fullmatch(r"EfficientNetB\d", application) is not None


def _make_application(application: str, *, weights: str | None) -> keras.Model:
    import keras

    make: Callable = getattr(keras.applications, application)
    # These two take an argument that leaves their input stage out.
    options = {"include_preprocessing": False} if application.startswith(("EfficientNetV2", "ConvNeXt")) else {}
    return make(weights=weights, include_top=False, input_shape=(None, None, 3), **options)


def _download_application(application: str) -> keras.Model:
    # Keras raises a bare Exception where a download fails.
    try:
        return _make_application(application, weights="imagenet")
    except Exception as error:
        raise ModelError(
            f"pretrain.weights: the ImageNet weights of {application} could not be downloaded ({shorten(error)}); where there is "
            "no network, name a local copy of Keras' file without top: pretrain.weights_file (of a branch of a hybrid: "
            f"pretrain.weights, as this branch's source). {PACKAGED_WEIGHTS}"
        ) from error


def _name_counted_layers(network: keras.Model) -> dict[str, str]:
    """Return the names that counted layers have in a fresh process: conv2d, conv2d_1, ..."""
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
    """Return a copy of the network, named as in a fresh process, that does not depend on what was cut off.

    Args:
        network: its weights are not copied.
        same_padding: let strided convolutions pad by themselves, "same", instead of the layer before them.
    """
    import keras
    from keras import layers

    names = _name_counted_layers(network)

    def make_anew(layer: keras.Operation) -> layers.Layer:
        name = names.get(layer.name, layer.name)
        if not isinstance(layer, layers.Layer):
            # ConvNeXt adds its residuals by a bare operation, whose output no name finds.
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
    """Set each layer of the backbone to the weights of the layer of its name; raise before the first, or not at all."""
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
    """Raise TransferError unless the file's normalisation is the one that `preprocessing` applies.

    The file's variances hold standard deviations (a slip that Keras fixes by the extra rescaling by
    1/sqrt(std) that it adds for "imagenet"), so mean and these two numbers are all there is to check.
    """
    import keras

    # By its class: its name counts up with every network of the process.
    normalization = next(layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    mean, variance = normalization.get_weights()[:2]
    mean, variance = np.ravel(mean), np.ravel(variance)
    if not (np.allclose(mean, preprocessing.mean, atol=1e-3) and np.allclose(variance, preprocessing.std, atol=1e-3)):
        raise TransferError(
            f"{where}: its normalisation has mean {mean.round(3).tolist()} and variance {variance.round(3).tolist()}, "
            f"expected {list(preprocessing.mean)} and {list(preprocessing.std)}; "
            "the network would be another function. Is this Keras' published ImageNet file?"
        )
