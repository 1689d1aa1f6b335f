"""Networks of the families transfer and hybrid: one backbone or several in parallel, pooling, dropout and a dense head.

EF-FER1 and EF-FER2 both have this architecture; they share only the weights of the backbone.

Each branch of a hybrid is an entry of the table of backbones with its own preprocessing, which is therefore part of the
network. A hybrid takes unscaled pixels, and the code around it (loading weights, freezing, saving) treats it as one
backbone with a 1x1 feature map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import keras
from keras import ops

from dlfer.config.schema import ExperimentConfig, StageConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.bundle import DataBundle
from dlfer.errors import TransferError
from dlfer.model.backbone_spec import IMAGENET_VARIANT, Preprocessing, choose_preprocessing
from dlfer.model.backbones import BACKBONES, build_backbone, find_backbone
from dlfer.model.face_input import FaceInput
from dlfer.model.training_kernels import set_norm_momentum
from dlfer.model.weights_file import SUFFIXES

PLAIN_PIXELS = Preprocessing(scale=1.0)
"""Preprocessing that leaves RGB pixels in 0..255 unchanged."""


@keras.saving.register_keras_serializable(package="dlfer")
class BranchInput(keras.layers.Layer):
    """A layer that applies the preprocessing of one branch to RGB pixels, float [B, S, S, 3] in 0..255.

    Args:
        preprocessing: the branch's scale, mean, standard deviation and channel order.
    """

    def __init__(self, preprocessing: dict, **kwargs) -> None:
        super().__init__(**kwargs)
        self.preprocessing = Preprocessing(**preprocessing)

    def call(self, pixels):
        """Return the preprocessed pixels."""
        if self.preprocessing.channels == "bgr":
            pixels = ops.flip(pixels, axis=-1)
        scale, offset = self.preprocessing.compute_scale_and_offset()
        return pixels * ops.convert_to_tensor(scale, pixels.dtype) + ops.convert_to_tensor(offset, pixels.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "preprocessing": self.preprocessing.as_dict()}


@keras.saving.register_keras_serializable(package="dlfer")
class BranchAttention(keras.layers.Layer):
    """A layer that sums the features of K branches, weighted for each image by a softmax over the branches.

    With p_k [D] the pooled features of branch k and [p_1; ...; p_K] their concatenation,
        a = softmax(W [p_1; ...; p_K] + b),  W [K, K D], b [K],
        f = a_1 p_1 + ... + a_K p_K.
    W and b are initialised to zero, so that before training every branch has the weight 1/K.
    """

    def build(self, input_shape) -> None:
        """Create W and b for K inputs of shape [B, 1, 1, D]."""
        num_branches = len(input_shape)
        self.kernel = self.add_weight(
            shape=(sum(shape[-1] for shape in input_shape), num_branches), initializer="zeros", name="kernel"
        )
        self.bias = self.add_weight(shape=(num_branches,), initializer="zeros", name="bias")

    def call(self, features):
        """Return the weighted sum, [B, 1, 1, D], of K feature maps [B, 1, 1, D]."""
        stacked = ops.stack(features, axis=-1)
        return ops.sum(stacked * self.compute_weights(features)[..., None, :], axis=-1)

    def compute_weights(self, features):
        """Return the weights of the branches, [B, 1, 1, K], which sum to one."""
        logits = ops.matmul(ops.concatenate(features, axis=-1), self.kernel) + self.bias
        return ops.softmax(logits, axis=-1)

    def compute_output_shape(self, input_shape):
        return input_shape[0]


def build_hybrid_backbone(config: ModelConfig) -> tuple[keras.Model, Preprocessing]:
    """Build the branches of a hybrid and their fusion, with random weights.

    `fusion` combines the pooled features of the branches: "concat" concatenates them (F is the sum of their widths);
    "add" and "attention" sum them (F is the largest width, to which a dense layer, `<branch>_projection`, first
    projects narrower branches), "attention" with weights that depend on the image (`BranchAttention`).

    Args:
        config: its branches, fusion and head.pooling are used, and its stem and pixel_scaling for every branch.

    Returns:
        A Keras model named "backbone", float [B, S, S, 3] RGB in 0..255 -> float [B, 1, 1, F], and the
        preprocessing that leaves such pixels unchanged. Layer names begin with the name of their branch, so that
        the paths of all variables are unique.

    Raises:
        ModelError: a branch is not in the table of backbones, or does not have the stem.
    """
    pooling = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}[config.head.pooling]
    pixels = keras.Input((None, None, 3), name="pixels")
    features = []
    branches = config.name_branches()
    for branch, name in branches.items():
        network = _prefix_layers(build_backbone(name, stem=config.stem), branch)
        preprocessing = choose_preprocessing(find_backbone(name).preprocessing, config.pixel_scaling)
        prepared = BranchInput(preprocessing.as_dict(), name=f"{branch}_input")(pixels)
        features.append(pooling(keepdims=True, name=f"{branch}_pooling")(network(prepared)))
    fused = _fuse(features, tuple(branches), config.fusion)
    return keras.Model(pixels, fused, name="backbone"), PLAIN_PIXELS


def list_branches(backbone: keras.Model) -> list[keras.Model]:
    """Return the networks of a hybrid's branches; an empty list for any other backbone, even one with nested models."""
    inputs = {layer.name for layer in backbone.layers if isinstance(layer, BranchInput)}
    return [layer for layer in backbone.layers if f"{layer.name}_input" in inputs]


def set_branch_weights(hybrid: keras.Model, branch: str, backbone: keras.Model) -> list[str]:
    """Copy the weights of a single backbone into one branch of a hybrid, variable by variable.

    Args:
        hybrid: a backbone from `build_hybrid_backbone`.
        branch: a name from `ModelConfig.name_branches`.
        backbone: a backbone from `build_backbone`, with the stem of the branch.

    Returns:
        The paths of the variables that were set.

    Raises:
        TransferError: a variable is missing, unexpected or of another shape; no variable has been changed.
    """
    given = {f"{branch}_{variable.path}": variable for variable in backbone.variables}
    wanted = {variable.path: variable for variable in hybrid.get_layer(branch).variables}
    seeds = {path for path in (*given, *wanted) if path.endswith("seed_generator_state")}
    missing, unexpected = sorted(wanted.keys() - given.keys() - seeds), sorted(given.keys() - wanted.keys() - seeds)
    loaded = [path for path in wanted if path in given and path not in seeds]
    reshaped = [path for path in loaded if given[path].shape != wanted[path].shape]
    if missing or unexpected or reshaped:
        raise TransferError(
            f"branch {branch}: its weights do not carry over. Missing: {', '.join(missing[:4]) or 'none'}. Unexpected: "
            f"{', '.join(unexpected[:4]) or 'none'}. Of another shape: {', '.join(reshaped[:4]) or 'none'}."
        )
    for path in loaded:
        wanted[path].assign(given[path].value)
    return loaded


def find_branch_file(weights_folder: str, name: str) -> str | None:
    """Return the path of a backbone's weights file; without one, `<name>.h5`, or None if dlfer ships the weights."""
    files = [f"{weights_folder}/{name}{suffix}" for suffix in SUFFIXES]
    found = [file for file in files if Path(file).is_file()]
    if not found and name == f"efficientnet_{IMAGENET_VARIANT}":
        return None
    return found[0] if found else f"{weights_folder}/{name}.h5"


def _fuse(features: list[keras.KerasTensor], branches: tuple[str, ...], fusion: str) -> keras.KerasTensor:
    if fusion == "concat":
        return keras.layers.Concatenate(name="fusion")(features)
    width = max(tensor.shape[-1] for tensor in features)
    features = [
        tensor if tensor.shape[-1] == width else keras.layers.Dense(width, name=f"{branch}_projection")(tensor)
        for branch, tensor in zip(branches, features, strict=True)
    ]
    return keras.layers.Add(name="fusion")(features) if fusion == "add" else BranchAttention(name="fusion")(features)


def _prefix_layers(network: keras.Model, branch: str) -> keras.Model:
    """Return a copy of the network, named as its branch, with layers "<branch>_<layer>"."""

    def rename(layer: keras.layers.Layer) -> keras.layers.Layer:
        return type(layer).from_config({**layer.get_config(), "name": f"{branch}_{layer.name}"})

    anew = keras.models.clone_model(network, clone_function=rename)
    return keras.Model(anew.inputs[0], anew.outputs[0], name=branch)


PUBLISHED_RATE = 0.2
"""Drop-connect rate with which EfficientNet, Lite and V2 are built; the rate of the last block is just below it."""


def list_drop_connects(network: keras.Model) -> list[keras.layers.Dropout]:
    """Return the drop-connect layers (Dropout of all maps of an image) of `network` and of models nested in it."""
    found = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += list_drop_connects(layer)
        elif isinstance(layer, keras.layers.Dropout) and layer.noise_shape is not None:
            found.append(layer)
    return found


def set_drop_connect(network: keras.Model, rate: float) -> None:
    """Set the drop-connect rate of the last block to just below `rate`; the rates of earlier blocks fall linearly to 0.

    In training, drop-connect skips the branch of a residual block for random images. EfficientNet's published rate is
    0.2, for hundreds of epochs. It slows the start of short trainings from random weights: Lite2 on FER2013 at 48
    pixels had a loss of 1.87 after one epoch with it, and 1.78 without (one seed; results/random_start.md).

    Args:
        network: a network built with the published rate and not yet compiled.
        rate: probability in 0..1 (exclusive) that a branch is skipped; 0 disables drop-connect.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016); Tan & Le, "EfficientNet" (ICML 2019).
    """
    for layer in list_drop_connects(network):
        layer.rate = layer.rate * rate / PUBLISHED_RATE


@dataclass(frozen=True)
class TransferNetwork:
    """A classifier network and its parts, which share their variables with it.

    Attributes:
        model: uint8 [B, H, W, channels] of any size -> float32 [B, C], after the head's activation.
        face_input, backbone, pooling, dropout, head: layers of the model; `head` returns float32 logits [B, C].
        activation: "softmax" or "sigmoid".
        auxiliary: pairs of a layer name of the backbone and the head that classifies its output, in training only.
    """

    model: keras.Model
    face_input: FaceInput
    backbone: keras.Model
    pooling: keras.layers.Layer
    dropout: keras.layers.Layer
    head: keras.layers.Layer
    activation: str
    auxiliary: tuple[tuple[str, keras.Model], ...] = ()

    def name_parts(self) -> dict[str, str]:
        """Return the layer name of each part, for `assemble_network`."""
        return {part: getattr(self, part).name for part in ("face_input", "backbone", "pooling", "dropout", "head")}

    @property
    def variables(self) -> list[keras.Variable]:
        """The model's variables, followed by those of the auxiliary heads."""
        return [*self.model.variables, *(variable for _, head in self.auxiliary for variable in head.variables)]


def build_transfer_network(
    config: ModelConfig,
    *,
    num_labels: int,
    image_size: int,
    channels: int,
    crop: float | None = None,
    aspect: str = "crop",
    precision: str = "float32",
) -> TransferNetwork:
    """Build a classifier network with random weights.

    Args:
        config: backbone, dropout and head.
        num_labels: number of classes, C.
        image_size: side in pixels of the backbone's input.
        channels: channels of the input images, 1 (grey) or 3 (RGB).
        crop: side of the crop that is resized to `image_size`, as a fraction in 0..1; None uses the whole image.
        aspect: how images that are not square are made square: "crop" or "pad", see `FaceInput`.
        precision: "float32" or "mixed_bfloat16"; the head computes in float32 in both cases.
    """
    with dtype_policy(precision):
        backbone, preprocessing = build_feature_extractor(config)
        pooling_of = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}
        pooling = pooling_of[config.head.pooling](name="pooling")
        dropout = keras.layers.Dropout(config.dropout, name="dropout")
    face_input = FaceInput(image_size, preprocessing.as_dict(), crop, aspect, name="face_input")
    head = _build_head(config, num_labels)
    images = keras.Input((None, None, channels), dtype="uint8", name="images")
    logits = head(dropout(pooling(backbone(face_input(images)))))
    activation = keras.layers.Activation(config.head.activation, name="activation", dtype="float32")
    model = keras.Model(images, activation(logits), name="network")
    auxiliary = _build_auxiliary(config, backbone, num_labels, precision) if config.auxiliary_heads else ()
    return TransferNetwork(model, face_input, backbone, pooling, dropout, head, config.head.activation, auxiliary)


def build_stage_network(config: ExperimentConfig, stage: StageConfig, bundle: DataBundle) -> TransferNetwork:
    """Build the network of a stage for the labels and channels of its data, with random weights."""
    return build_transfer_network(
        config.model,
        num_labels=len(bundle.labels),
        image_size=stage.image_size,
        crop=stage.crop,
        aspect=stage.data.aspect,
        channels=bundle.channels,
        precision=config.experiment.precision,
    )


def build_feature_extractor(config: ModelConfig) -> tuple[keras.Model, Preprocessing]:
    """Build the backbone, the part of EF-FER1 whose weights EF-FER2 starts from, with random weights.

    Returns:
        A Keras model named "backbone", float [B, S, S, 3] -> float [B, s, s, F], and the preprocessing of its input.
    """
    if config.family == "hybrid":
        backbone, preprocessing = build_hybrid_backbone(config)
    else:
        backbone = build_backbone(config.backbone, stem=config.stem, feature_level=config.feature_level)
        preprocessing = choose_preprocessing(BACKBONES[config.backbone].preprocessing, config.pixel_scaling)
    if config.norm_momentum is not None:
        set_norm_momentum(backbone, config.norm_momentum)
    if config.drop_connect is not None:
        set_drop_connect(backbone, config.drop_connect)
    return backbone, preprocessing


def _build_head(config: ModelConfig, num_labels: int) -> keras.layers.Layer:
    """Build the layers from pooled features to logits: the hidden layers, if any, and a dense output layer."""
    last = keras.layers.Dense(num_labels, name="head", dtype="float32")
    if not config.head.hidden:
        return last
    layers: list[keras.layers.Layer] = []
    for number, units in enumerate(config.head.hidden, 1):
        layers.append(keras.layers.Dense(units, "relu", kernel_initializer="he_normal", name=f"hidden_{number}"))
        layers.append(keras.layers.Dropout(config.dropout, name=f"hidden_dropout_{number}"))
    return keras.Sequential([*layers, last], name="head")


def _build_auxiliary(
    config: ModelConfig, backbone: keras.Model, num_labels: int, precision: str
) -> tuple[tuple[str, keras.Model], ...]:
    """Build the auxiliary heads; they are built last, so that they do not change the other layers' initial weights."""
    from dlfer.model.paper_backbones import build_auxiliary_head

    places = BACKBONES[config.backbone].auxiliary
    with dtype_policy(precision):
        heads = [build_auxiliary_head(num_labels, name=f"auxiliary_{number}") for number, _ in enumerate(places, 1)]
    return attach_auxiliary(backbone, list(zip(places, heads, strict=True)))


def attach_auxiliary(
    backbone: keras.Model, heads: Sequence[tuple[str, keras.Model]]
) -> tuple[tuple[str, keras.Model], ...]:
    """Build each head for the output shape of its backbone layer, which creates its weights; return the heads."""
    for place, head in heads:
        head(backbone.get_layer(place).output)
    return tuple(heads)


def assemble_network(
    model: keras.Model, parts: Mapping[str, str], *, activation: str, heads: Sequence[tuple[str, keras.Model]]
) -> TransferNetwork:
    """Return the `TransferNetwork` of a model, whose parts are found by the names of `TransferNetwork.name_parts`."""
    layers = {part: model.get_layer(name) for part, name in parts.items()}
    auxiliary = attach_auxiliary(layers["backbone"], heads)
    return TransferNetwork(model, activation=activation, auxiliary=auxiliary, **layers)


@keras.saving.register_keras_serializable(package="dlfer")
class TrainingNetwork(keras.Model):
    """The model that is compiled and fitted: the layers of a `TransferNetwork`, with augmentation and logits as output.

    Its input is a dict with "image" (uint8 [B, H, W, C]) and the arrays from `dlfer.data.augment.draw_augmentation`.
    Its output is float32 logits [B, C], since losses are computed from logits; with A auxiliary heads it is
    [B, 1 + A, C], the logits of the main head first.

    Args:
        network: the network whose variables are trained.
        fill: how warped images are filled outside their edges, see `warp_images`.
    """

    def __init__(self, network: TransferNetwork, *, fill: str = "nearest") -> None:
        super().__init__(name="training_network")
        self.face_input = network.face_input
        self.backbone = network.backbone
        self.pooling = network.pooling
        self.dropout = network.dropout
        self.head = network.head
        self.fill = fill
        self.auxiliary = [head for _, head in network.auxiliary]
        self.trunk = None
        if network.auxiliary:
            maps = [network.backbone.get_layer(place).output for place, _ in network.auxiliary]
            self.trunk = keras.Model(network.backbone.inputs, [network.backbone.output, *maps], name="trunk")

    def call(self, inputs: dict, training: bool = False):
        """Return logits [B, C], or [B, 1 + A, C] with A auxiliary heads."""
        images = self.face_input.prepare(inputs["image"], inputs, fill=self.fill)
        if self.trunk is None:
            features, maps = self.backbone(images, training=training), []
        else:
            features, *maps = self.trunk(images, training=training)
        logits = self.head(self.dropout(self.pooling(features), training=training), training=training)
        if not maps:
            return logits
        others = [head(values, training=training) for head, values in zip(self.auxiliary, maps, strict=True)]
        return ops.stack([logits, *others], axis=1)


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Set Keras' dtype policy to `name` for the layers created inside the block, then restore the previous policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
