"""The table of backbones, each built in the same way for all of its weights.

A backbone is a Keras model from preprocessed images [B, S, S, 3] (any S) to a feature map, without top and without
preprocessing, which is defined only in its specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlfer.errors import ModelError
from dlfer.model.backbone_spec import (
    CAFFE_INPUT,
    EFFICIENTNET_INPUT,
    EFFICIENTNET_V2_S_INPUT,
    PACKAGED_WEIGHTS,
    SIGNED_INPUT,
    TORCH_INPUT,
    BackboneSpec,
    describe_efficientnet,
    describe_efficientnet_v2,
    describe_keras,
    describe_resnet,
    name_residual_blocks,
)
from dlfer.model.efficientnet_lite import describe_lite
from dlfer.model.weights_file import load_weights

if TYPE_CHECKING:
    import keras

_BASIC_NOTE = "He et al. 2016, basic blocks; also with the small stem"
_VGG_NOTE = "Simonyan and Zisserman 2015, configuration {}"


def _build_vgg_bn(stem: str) -> keras.Model:
    from dlfer.model.paper_backbones import build_vgg_bn

    return build_vgg_bn()


def _build_googlenet(stem: str) -> keras.Model:
    from dlfer.model.paper_backbones import build_googlenet

    return build_googlenet()


def _describe_basic_resnet(
    name: str, num_parameters: int, repeats: tuple[int, ...], *, widths=(64, 128, 256, 512), note: str
) -> BackboneSpec:
    """Return the specification of a ResNet with `repeats` basic blocks in its stages."""

    def build(stem: str) -> keras.Model:
        from dlfer.model.paper_backbones import build_basic_resnet

        return build_basic_resnet(repeats, widths=widths, stem=stem)

    return BackboneSpec(
        name=name,
        image_size=224,
        num_parameters_without_top=num_parameters,
        build=build,
        preprocessing=TORCH_INPUT,
        stages=name_residual_blocks(repeats),
        stems=("imagenet", "small"),
        note=note,
    )


BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        describe_efficientnet("b0", 224, 4_049_564, "1a 2b 3b 5c"),
        describe_efficientnet("b1", 240, 6_575_232, "1b 2c 3c 5d"),
        describe_efficientnet("b2", 260, 7_768_562, "1b 2c 3c 5d"),
        describe_efficientnet("b3", 300, 10_783_528, "1b 2c 3c 5e"),
        describe_efficientnet("b4", 380, 17_673_816, "1b 2d 3d 5f"),
        describe_efficientnet("b5", 456, 28_513_520, "1c 2e 3e 5g"),
        describe_efficientnet("b6", 528, 40_960_136, "1c 2f 3f 5h"),
        describe_efficientnet("b7", 600, 64_097_680, "1d 2g 3g 5j"),
        describe_lite("lite0", 224, "1a 2b 3b 5c"),
        describe_lite("lite1", 240, "1a 2c 3c 5d"),
        describe_lite(
            "lite2",
            260,
            "1a 2c 3c 5d",
            weights=("imagenet",),
            is_packaged=True,
            note="no squeeze-excite, ReLU6; its ImageNet weights come with dlfer",
        ),
        describe_lite("nano", 48, "1a 2a 3a 5a", note="for tests and the demo only"),
        describe_efficientnet_v2("b0", 224, 5_919_312, "1a 2b 3b 5e", preprocessing=EFFICIENTNET_INPUT),
        describe_efficientnet_v2("b1", 240, 6_931_124, "1b 2c 3c 5f", preprocessing=EFFICIENTNET_INPUT),
        describe_efficientnet_v2("b2", 260, 8_769_374, "1b 2c 3c 5f", preprocessing=EFFICIENTNET_INPUT),
        describe_efficientnet_v2("b3", 300, 12_930_622, "1b 2c 3c 5g", preprocessing=EFFICIENTNET_INPUT),
        describe_efficientnet_v2("s", 384, 20_331_360, "1b 2d 3d 5i", preprocessing=EFFICIENTNET_V2_S_INPUT),
        _describe_basic_resnet("resnet18", 11_186_112, (2, 2, 2, 2), note=_BASIC_NOTE),
        _describe_basic_resnet("resnet34", 21_301_696, (3, 4, 6, 3), note=_BASIC_NOTE),
        describe_resnet("resnet50", 23_587_712, (3, 4, 6, 3)),
        describe_resnet("resnet101", 42_658_176, (3, 4, 23, 3)),
        describe_resnet("resnet152", 58_370_944, (3, 8, 36, 3)),
        # At least 16 channels: with fewer, oneDNN's gradient of a strided 1x1 filter writes past its buffer.
        _describe_basic_resnet(
            "resnet_nano",
            85_040,
            (1, 1, 1, 1),
            widths=(16, 16, 32, 64),
            note="for tests only; also with the small stem",
        ),
        describe_keras(
            "vgg16",
            "VGG16",
            ("block1_conv2", "block2_conv2", "block3_conv3", "block4_conv3", "block5_conv3", "block5_pool"),
            image_size=224,
            num_parameters_without_top=14_714_688,
            preprocessing=CAFFE_INPUT,
            min_image_size=32,
            note=_VGG_NOTE.format("D"),
        ),
        describe_keras(
            "vgg19",
            "VGG19",
            ("block1_conv2", "block2_conv2", "block3_conv4", "block4_conv4", "block5_conv4", "block5_pool"),
            image_size=224,
            num_parameters_without_top=20_024_384,
            preprocessing=CAFFE_INPUT,
            min_image_size=32,
            note=_VGG_NOTE.format("E"),
        ),
        BackboneSpec(
            name="vgg19_bn",
            image_size=224,
            min_image_size=32,
            num_parameters_without_top=20_046_400,
            build=_build_vgg_bn,
            preprocessing=TORCH_INPUT,
            stages=(
                *(f"block{block}_conv{index}_relu" for block, index in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 4))),
                "block5_pool",
            ),
            note=_VGG_NOTE.format("E, with BatchNorm"),
        ),
        BackboneSpec(
            name="googlenet",
            image_size=224,
            num_parameters_without_top=5_973_552,
            build=_build_googlenet,
            preprocessing=TORCH_INPUT,
            stages=("conv1", "conv2", "inception_3b", "inception_4e", "inception_5b"),
            auxiliary=("inception_4a", "inception_4d"),
            note="Szegedy et al. 2014 (Inception v1), without BatchNorm and without response normalisation",
        ),
        describe_keras(
            "inception_v3",
            "InceptionV3",
            ("activation_2", "activation_4", "mixed2", "mixed7", "mixed10"),
            image_size=299,
            num_parameters_without_top=21_802_784,
            preprocessing=SIGNED_INPUT,
            min_image_size=75,
            note="Szegedy et al. 2016",
        ),
        describe_keras(
            "inception_resnet_v2",
            "InceptionResNetV2",
            ("activation_2", "activation_4", "block35_10_ac", "block17_20_ac", "conv_7b_ac"),
            image_size=299,
            num_parameters_without_top=54_336_736,
            preprocessing=SIGNED_INPUT,
            min_image_size=75,
            note="Szegedy et al. 2017",
        ),
        describe_keras(
            "xception",
            "Xception",
            ("block1_conv2_act", "add", "add_1", "add_10", "block14_sepconv2_act"),
            image_size=299,
            num_parameters_without_top=20_861_480,
            preprocessing=SIGNED_INPUT,
            min_image_size=7,
            note="Chollet 2017; Keras refuses images below 71 pixels, its layers do not: 48 give a map of 2x2",
        ),
        describe_keras(
            "mobilenet",
            "MobileNet",
            ("conv_pw_1_relu", "conv_pw_3_relu", "conv_pw_5_relu", "conv_pw_11_relu", "conv_pw_13_relu"),
            image_size=224,
            num_parameters_without_top=3_228_864,
            preprocessing=SIGNED_INPUT,
            weights=("imagenet", "vggface2"),
            note="Howard et al. 2017; vggface2: from face recognition, with pixel_scaling: caffe, for research only",
        ),
        describe_keras(
            "mobilenet_v2",
            "MobileNetV2",
            ("expanded_conv_project_BN", "block_2_add", "block_5_add", "block_12_add", "out_relu"),
            image_size=224,
            num_parameters_without_top=2_257_984,
            preprocessing=SIGNED_INPUT,
            note="Sandler et al. 2018",
        ),
        describe_keras(
            "densenet121",
            "DenseNet121",
            ("conv1_relu", "conv2_block6_concat", "conv3_block12_concat", "conv4_block24_concat", "relu"),
            image_size=224,
            num_parameters_without_top=7_037_504,
            preprocessing=TORCH_INPUT,
            min_image_size=29,
            note="Huang et al. 2017",
        ),
        describe_keras(
            "convnext_tiny",
            "ConvNeXtTiny",
            ("add_2", "add_5", "add_14", "layer_normalization"),
            image_size=224,
            num_parameters_without_top=27_820_128,
            preprocessing=TORCH_INPUT,
            min_image_size=32,
            note="Liu et al. 2022; LayerNorm, no BatchNorm",
        ),
    )
}


def find_backbone(name: str) -> BackboneSpec:
    """Return the specification of the named backbone.

    Raises:
        ModelError: the name is not in the table of backbones.
    """
    if name not in BACKBONES:
        raise ModelError(f"model.backbone: found {name!r}, expected one of {', '.join(BACKBONES)}.")
    return BACKBONES[name]


def list_levels(name: str, feature_level: int | None = None) -> tuple[str, ...]:
    """Return the last layers of a backbone's feature levels, ordered from the input.

    Args:
        name: name of the backbone.
        feature_level: number of the last level to return, from 1; None returns all.

    Raises:
        ModelError: the name is not in the table, or the backbone has no such level.

    Example:
        >>> list_levels("mobilenet", 2)
        ('conv_pw_1_relu', 'conv_pw_3_relu')
    """
    levels = find_backbone(name).stages
    if feature_level is not None and not 1 <= feature_level <= len(levels):
        raise ModelError(
            f"model.feature_level: found {feature_level}, expected 1 to {len(levels)} for {name} ({', '.join(levels)}), or null "
            "for the whole backbone."
        )
    return levels[:feature_level]


def build_backbone(name: str, *, stem: str = "imagenet", feature_level: int | None = None) -> keras.Model:
    """Build the named backbone with random weights, for images of any size.

    Args:
        stem: "imagenet", as published, or "small", if the backbone has one.
        feature_level: feature level at which it ends, from 1; None builds the whole backbone.

    Returns:
        A Keras model named "backbone": float [B, S, S, 3], preprocessed -> float [B, s, s, F].

    Raises:
        ModelError: the name is not in the table, or the backbone has no such stem or level.
    """
    spec, last = find_backbone(name), list_levels(name, feature_level)[-1]
    if stem not in spec.stems:
        able = ", ".join(other.name for other in BACKBONES.values() if stem in other.stems)
        raise ModelError(
            f"model.stem: found {stem!r}, but {name} has {' and '.join(spec.stems)} alone; "
            f"set model.stem: imagenet, or take one of {able or 'no other backbone either'}."
        )
    from dlfer.model.training_kernels import use_training_kernels

    backbone = spec.build(stem)
    if last != spec.stages[-1]:
        import keras

        backbone = keras.Model(backbone.inputs[0], backbone.get_layer(last).output, name="backbone")
    return use_training_kernels(backbone)


def load_published_weights(name: str, backbone: keras.Model, weights_file: str | None = None) -> str:
    """Load the published ImageNet weights of a backbone, or those of a file; return a description of their source.

    Args:
        backbone: the backbone from `build_backbone(name)`, with the published stem.
        weights_file: a local copy of the published file, or one's own; None downloads the published one
            (keras.applications) or loads the one that comes with dlfer (Lite2).

    Raises:
        ModelError: the backbone has no published weights, or the file does not match it.
        TransferError: the layers or the input stage in the file are not those of the backbone.
    """
    spec = find_backbone(name)
    if spec.load is not None:
        spec.load(backbone, weights_file)
    elif weights_file is not None:
        load_weights(backbone, weights_file)
    else:
        raise ModelError(
            f"pretrain.weights: found imagenet, but no ImageNet weights of {name} are published. {PACKAGED_WEIGHTS} Name a "
            f"file or a run with weights of {name}, leave it null to train EF-FER1, or choose another backbone (dlfer show "
            "backbones)."
        )
    if weights_file:
        return f"weights of {name} from {weights_file}"
    return f"ImageNet weights of {name}, {'as they come with dlfer' if 'lite' in name else 'downloaded by Keras'}"
