"""The transfer family: a backbone, pooled, with dropout and one dense layer.

EF-FER1 and EF-FER2 are both of this form; they share the backbone's weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
from keras import ops

from dlfer.config.schema import ModelConfig
from dlfer.model.backbones import BACKBONES, Preprocessing, build_backbone
from dlfer.model.face_input import FaceInput
from dlfer.model.hybrid import build_hybrid_backbone


@dataclass(frozen=True)
class TransferNetwork:
    """A classifier network and the parts that it is made of; all share the same variables.

    Attributes:
        model: uint8 [B, H, W, channels] of any size -> float32 [B, C], the head's activation applied.
        face_input, backbone, pooling, dropout, head: its layers; `head` gives float32 logits [B, C].
        activation: "softmax" or "sigmoid".
    """

    model: keras.Model
    face_input: FaceInput
    backbone: keras.Model
    pooling: keras.layers.Layer
    dropout: keras.layers.Layer
    head: keras.layers.Layer
    activation: str


def build_transfer_network(
    config: ModelConfig,
    *,
    num_labels: int,
    image_size: int,
    channels: int,
    crop: float | None = None,
    precision: str = "float32",
) -> TransferNetwork:
    """Build the network with random weights.

    Args:
        config: backbone, dropout and head.
        num_labels: C.
        image_size: side in pixels that the backbone sees.
        channels: of the images that come in, 1 (grey) or 3 (RGB).
        crop: side of the part of an image that becomes this square, in 0..1; None is the whole image.
        precision: "float32" or "mixed_bfloat16"; the head computes in float32 in either.
    """
    with dtype_policy(precision):
        backbone, preprocessing = build_feature_extractor(config)
        pooling_of = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}
        pooling = pooling_of[config.head.pooling](name="pooling")
        dropout = keras.layers.Dropout(config.dropout, name="dropout")
    face_input = FaceInput(image_size, preprocessing.as_dict(), crop, name="face_input")
    head = _build_head(config, num_labels)
    images = keras.Input((None, None, channels), dtype="uint8", name="images")
    logits = head(dropout(pooling(backbone(face_input(images)))))
    activation = keras.layers.Activation(config.head.activation, name="activation", dtype="float32")
    model = keras.Model(images, activation(logits), name="network")
    return TransferNetwork(model, face_input, backbone, pooling, dropout, head, config.head.activation)


def build_feature_extractor(config: ModelConfig) -> tuple[keras.Model, Preprocessing]:
    """Build the part that EF-FER1 hands to EF-FER2, with random weights, and say what its pixels must look like.

    Returns:
        A Keras model named "backbone", float [B, S, S, 3] -> float [B, s, s, F], and its preprocessing.
    """
    if config.family == "hybrid":
        return build_hybrid_backbone(config)
    return build_backbone(config.backbone, stem=config.stem), BACKBONES[config.backbone].preprocessing


def _build_head(config: ModelConfig, num_labels: int) -> keras.layers.Layer:
    """Build what turns pooled features into logits: one dense layer, after the hidden ones if there are any."""
    last = keras.layers.Dense(num_labels, name="head", dtype="float32")
    if not config.head.hidden:
        return last
    layers: list[keras.layers.Layer] = []
    for number, units in enumerate(config.head.hidden, 1):
        layers.append(keras.layers.Dense(units, "relu", kernel_initializer="he_normal", name=f"hidden_{number}"))
        layers.append(keras.layers.Dropout(config.dropout, name=f"hidden_dropout_{number}"))
    return keras.Sequential([*layers, last], name="head")


@keras.saving.register_keras_serializable(package="dlfer")
class TrainingNetwork(keras.Model):
    """What is compiled and fitted: the same layers, from drawn augmentation to logits.

    Its input is a dict with "image" (uint8 [B, H, W, C]) and the arrays that
    `dlfer.data.augment.draw_augmentation` drew; its output is float32 logits [B, C], so that losses
    are computed from logits.

    Args:
        network: whose variables are trained.
        fill: what stands outside a warped image.
    """

    def __init__(self, network: TransferNetwork, *, fill: str = "nearest") -> None:
        super().__init__(name="training_network")
        self.face_input = network.face_input
        self.backbone = network.backbone
        self.pooling = network.pooling
        self.dropout = network.dropout
        self.head = network.head
        self.fill = fill

    def call(self, inputs: dict, training: bool = False):
        """Return logits [B, C]."""
        images = self.face_input.augment(inputs["image"], inputs, fill=self.fill)
        features = self.backbone(self.face_input.preprocess(images), training=training)
        return self.head(self.dropout(self.pooling(features), training=training))


def compute_features(network: TransferNetwork, images):
    """Return the pooled features float32 [N, F] of uint8 images [N, H, W, C], in inference mode."""
    features = network.pooling(network.backbone(network.face_input(images), training=False))
    return ops.convert_to_numpy(ops.cast(features, "float32"))


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Layers that are made inside compute by the policy `name`; the one before is put back."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
