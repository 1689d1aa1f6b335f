"""The record of one backbone in the table, and how the records of one kind are written.

Keras and what builds with it are imported when a network is built: the table itself is shown without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dlfer.model.preprocessing import CAFFE_INPUT, EFFICIENTNET_INPUT, LITE_INPUT, TORCH_INPUT, Preprocessing

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the table.

    Attributes:
        name: as in `dlfer.config.names.BACKBONES`.
        image_size: side in pixels that its authors trained it at.
        min_image_size: the smallest side that leaves a feature map of 1x1 or more, by any stem.
        num_parameters_without_top: of the network that `build` gives, BatchNorm's moving statistics included.
        build: makes the network with random weights; takes the name of the stem.
        preprocessing: what its pixels must look like.
        stages: names of the layers whose outputs are the last feature maps of each resolution, from the
            image on; the last one is the network's output.
        load: sets published weights or those of a file: (backbone, weights_file or None); None if neither can be had.
        weights: names of published weights that can be asked for without a file.
        stems: what the first layers may be: "imagenet" as published, "small" for small images.
        auxiliary: names of the layers behind which auxiliary classifiers branch off in training.
        note: one line for `dlfer show backbones`.
    """

    name: str
    image_size: int
    min_image_size: int
    num_parameters_without_top: int
    build: Callable[[str], keras.Model]
    preprocessing: Preprocessing
    stages: tuple[str, ...]
    load: Callable[[keras.Model, str | None], None] | None = None
    weights: tuple[str, ...] = ()
    stems: tuple[str, ...] = ("imagenet",)
    auxiliary: tuple[str, ...] = ()
    note: str = ""


def _build_application(application: str, stem: str) -> keras.Model:
    from dlfer.model.keras_backbones import build_application

    return build_application(application)


def _load_application(
    application: str, preprocessing: Preprocessing, backbone: keras.Model, weights_file: str | None
) -> None:
    from dlfer.model.keras_backbones import load_application_weights

    load_application_weights(application, backbone, preprocessing=preprocessing, weights_file=weights_file)


def _build_lite(variant: str, stem: str) -> keras.Model:
    from dlfer.model.efficientnet_lite import build_efficientnet_lite

    return build_efficientnet_lite(variant, image_size=None, name="backbone")


def _load_lite(variant: str, backbone: keras.Model, weights_file: str | None) -> None:
    from dlfer.model.efficientnet_lite import load_lite_weights

    load_lite_weights(variant, backbone, weights_file)


def _build_basic_resnet(repeats: tuple[int, ...], widths: tuple[int, ...], stem: str) -> keras.Model:
    from dlfer.model.paper_backbones import build_basic_resnet

    return build_basic_resnet(repeats, widths=widths, stem=stem)


def build_vgg_bn(stem: str) -> keras.Model:
    """Build VGG19 with BatchNorm; it has one stem."""
    from dlfer.model import paper_backbones

    return paper_backbones.build_vgg_bn()


def build_googlenet(stem: str) -> keras.Model:
    """Build GoogLeNet; it has one stem."""
    from dlfer.model import paper_backbones

    return paper_backbones.build_googlenet()


def describe_keras(
    name: str,
    image_size: int,
    num_parameters: int,
    stages: str,
    *,
    application: str,
    preprocessing: Preprocessing,
    minimum: int = 1,
    note: str,
) -> BackboneSpec:
    """Return the record of a network of keras.applications.

    Args:
        name, image_size, num_parameters: see `BackboneSpec`.
        stages: names of layers, with spaces between them.
        application: its name in keras.applications.
        preprocessing: what its published weights were trained with.
        minimum: see `BackboneSpec.min_image_size`.
        note: one line.
    """
    return BackboneSpec(
        name=name,
        image_size=image_size,
        min_image_size=minimum,
        num_parameters_without_top=num_parameters,
        build=partial(_build_application, application),
        preprocessing=preprocessing,
        stages=tuple(stages.split()),
        load=partial(_load_application, application, preprocessing),
        weights=("imagenet",),
        note=note,
    )


def describe_efficientnet(variant: str, image_size: int, num_parameters: int, last_blocks: str) -> BackboneSpec:
    """Return the record of an EfficientNet; `last_blocks` are those that end a resolution: "1a 2b 3b 5c"."""
    return describe_keras(
        f"efficientnet_{variant}",
        image_size,
        num_parameters,
        _name_blocks(last_blocks),
        application=f"EfficientNet{variant.upper()}",
        preprocessing=EFFICIENTNET_INPUT,
        note="Tan and Le 2019",
    )


def describe_efficientnet_v2(
    variant: str, image_size: int, num_parameters: int, last_blocks: str, *, preprocessing: Preprocessing
) -> BackboneSpec:
    """Return the record of an EfficientNetV2; `last_blocks` are those that end a resolution: "1a 2b 3b 5e"."""
    return describe_keras(
        f"efficientnet_v2_{variant}",
        image_size,
        num_parameters,
        # Its first block has no expansion, and its only convolution is called a projection with an activation.
        _name_blocks(last_blocks).replace("block1a_project_bn", "block1a_project_activation"),
        application=f"EfficientNetV2{variant.upper()}",
        preprocessing=preprocessing,
        note="Tan and Le 2021",
    )


def describe_resnet(name: str, num_parameters: int, repeats: tuple[int, ...]) -> BackboneSpec:
    """Return the record of a ResNet of bottleneck blocks, `repeats` in each stage."""
    return describe_keras(
        name,
        224,
        num_parameters,
        " ".join(["conv1_relu", *_name_residual_blocks(repeats)]),
        application=name.replace("resnet", "ResNet"),
        preprocessing=CAFFE_INPUT,
        note="He et al. 2016, bottleneck blocks",
    )


def _name_residual_blocks(repeats: tuple[int, ...]) -> list[str]:
    return [f"conv{stage}_block{num_blocks}_out" for stage, num_blocks in enumerate(repeats, start=2)]


def describe_lite(
    variant: str,
    image_size: int,
    num_parameters: int,
    last_blocks: str,
    *,
    weights: tuple[str, ...] = (),
    note: str = "no squeeze-excite, ReLU6",
) -> BackboneSpec:
    """Return the record of an EfficientNet-Lite; `last_blocks` are those that end a resolution: "1a 2b 3b 5c"."""
    return BackboneSpec(
        name=f"efficientnet_{variant}",
        image_size=image_size,
        min_image_size=1,
        num_parameters_without_top=num_parameters,
        build=partial(_build_lite, variant),
        preprocessing=LITE_INPUT,
        stages=tuple(_name_blocks(last_blocks).split()),
        load=None if variant == "nano" else partial(_load_lite, variant),
        weights=weights,
        note=note,
    )


def _name_blocks(last_blocks: str) -> str:
    """Return the layers that end blocks "1a 2b 3b 5c" and the last one; a block that stands alone has no addition."""
    ends = [f"block{block}_{'project_bn' if block.endswith('a') else 'add'}" for block in last_blocks.split()]
    return " ".join([*ends, "top_activation"])


def describe_basic_resnet(
    name: str, num_parameters: int, repeats: tuple[int, ...], *, widths=(64, 128, 256, 512), note: str
) -> BackboneSpec:
    """Return the record of a ResNet of basic blocks, `repeats` in each stage."""
    return BackboneSpec(
        name=name,
        image_size=224,
        min_image_size=1,
        num_parameters_without_top=num_parameters,
        build=partial(_build_basic_resnet, repeats, widths),
        preprocessing=TORCH_INPUT,
        stages=("conv1_relu", *_name_residual_blocks(repeats)),
        stems=("imagenet", "small"),
        note=note,
    )
