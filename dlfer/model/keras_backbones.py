"""Backbones from keras.applications, and the ImageNet weights that Keras publishes for them.

Three things stand between an application and a backbone. Its input stage: Keras' EfficientNets start with a
rescaling that depends on the *name* of the weights (an extra division by sqrt(std) for "imagenet"), so two
networks of equal shapes can be different functions; that part is cut off. Its padding: EfficientNet and
MobileNetV2 pad before a strided convolution as the size was when they were built, and wrongly for odd sizes
if it was left open (B3 at its own 300 pixels then ends at 9x9, not at 10x10), as MobileNet always does; "same"
is the same padding, at every size, and the one that these networks were published with. Its names: InceptionV3, InceptionResNetV2, Xception and ConvNeXt leave layers unnamed, so that
Keras counts them up from one network to the next (conv2d, then conv2d_94); they get the names of a fresh
process, since weights are carried over by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import ModelError, TransferError, shorten
from dlfer.model.backbone_spec import (
    CAFFE_INPUT,
    EFFICIENTNET_INPUT,
    BackboneSpec,
    Preprocessing,
    name_blocks,
    name_residual_blocks,
)
from dlfer.model.efficientnet_lite import PACKAGED_WEIGHTS
from dlfer.model.weights_file import load_weights

if TYPE_CHECKING:
    import keras

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
            return layers.Identity(name=name, dtype=layer.dtype_policy)
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
