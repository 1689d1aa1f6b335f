"""The families transfer and hybrid: a backbone, or several side by side, pooled, with dropout and one dense layer.

EF-FER1 and EF-FER2 are both of this form; they share the backbone's weights and nothing else.

Each branch of a hybrid is a row of the table of backbones with a preprocessing of its own, which therefore stands inside the
network: a hybrid takes plain pixels, and to everything around it (loading weights, freezing, saving) it is one backbone whose
feature map is 1x1.
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
"""RGB in 0..255, as they are."""


@keras.saving.register_keras_serializable(package="dlfer")
class BranchInput(keras.layers.Layer):
    """Turn RGB pixels float [B, S, S, 3] in 0..255 into what one branch expects.

    Args:
        preprocessing: the branch's scale, mean, standard deviation and order of channels.
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
    """Sum the features of K branches, weighted for each image by a softmax over the branches.

    With p_k [D] the pooled features of branch k and [p_1; ...; p_K] their concatenation,
        a = softmax(W [p_1; ...; p_K] + b),  W [K, K D], b [K],
        f = a_1 p_1 + ... + a_K p_K.
    W and b start at zero, so that every branch counts 1/K before anything is learned.
    """

    def build(self, input_shape) -> None:
        """Make W and b for K shapes [B, 1, 1, D]."""
        num_branches = len(input_shape)
        self.kernel = self.add_weight(
            shape=(sum(shape[-1] for shape in input_shape), num_branches), initializer="zeros", name="kernel"
        )
        self.bias = self.add_weight(shape=(num_branches,), initializer="zeros", name="bias")

    def call(self, features):
        """Return [B, 1, 1, D] of K feature maps [B, 1, 1, D]."""
        stacked = ops.stack(features, axis=-1)
        return ops.sum(stacked * self.compute_weights(features)[..., None, :], axis=-1)

    def compute_weights(self, features):
        """Return the weight of each branch, [B, 1, 1, K], which sum to one."""
        logits = ops.matmul(ops.concatenate(features, axis=-1), self.kernel) + self.bias
        return ops.softmax(logits, axis=-1)

    def compute_output_shape(self, input_shape):
        return input_shape[0]


def build_hybrid_backbone(config: ModelConfig) -> tuple[keras.Model, Preprocessing]:
    """Build the branches and their fusion, with random weights.

    `fusion` joins the pooled features of the branches: concat sets them side by side (F is the sum of their
    widths), add and attention sum them (F is the greatest width; a narrower branch is first brought to it by
    a dense layer, `<branch>_projection`), attention by weights that depend on the image (`BranchAttention`).

    Args:
        config: its branches, fusion, stem and pixel_scaling (the same for all) and head.pooling.

    Returns:
        A Keras model named "backbone", float [B, S, S, 3] RGB in 0..255 -> float [B, 1, 1, F], and the
        preprocessing that leaves such pixels as they are. Names of layers begin with their branch's, so that
        no two variables have the same path.

    Raises:
        ModelError: a branch is not in the table, or has no such stem.
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
    """Return the networks of a hybrid's branches; none of another backbone, whatever networks it has within it."""
    inputs = {layer.name for layer in backbone.layers if isinstance(layer, BranchInput)}
    return [layer for layer in backbone.layers if f"{layer.name}_input" in inputs]


def set_branch_weights(hybrid: keras.Model, branch: str, backbone: keras.Model) -> list[str]:
    """Give one branch of a hybrid backbone the weights of a backbone of its own, variable by variable.

    Args:
        hybrid: as `build_hybrid_backbone` gave it.
        branch: as `ModelConfig.name_branches` names it.
        backbone: as `build_backbone` gave it, with the branch's stem.

    Returns:
        The paths of the variables that were set.

    Raises:
        TransferError: a variable is missing, unexpected or of another shape; nothing was set.
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
    """Return the weights file of a backbone in a folder, whether it is there or not; None for one that dlfer brings."""
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
"""Of EfficientNet, Lite and V2: what the rate of the last block is just below."""


def list_drop_connects(network: keras.Model) -> list[keras.layers.Dropout]:
    """Return the layers of `network`, and of networks in it, that drop whole feature maps of an image."""
    found = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += list_drop_connects(layer)
        elif isinstance(layer, keras.layers.Dropout) and layer.noise_shape is not None:
            found.append(layer)
    return found


def set_drop_connect(network: keras.Model, rate: float) -> None:
    """Set the rate of drop-connect: the last block's is just below it; those of the blocks before fall linearly to 0.

    In training the branch of a residual block is left out for some images. EfficientNet is published with a rate of 0.2,
    for hundreds of epochs. In short trainings from random weights it slows the start: EfficientNet-Lite2 on FER2013 at 48
    pixels had a loss of 1.87 after one epoch with it, and 1.78 without (one seed; results/random_start.md).

    Args:
        network: with layers made for the published rate, before it is compiled.
        rate: probability in 0..1 (exclusive) that the branch of a block is left out; 0 switches it off.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016); Tan & Le, "EfficientNet" (ICML 2019).
    """
    for layer in list_drop_connects(network):
        layer.rate = layer.rate * rate / PUBLISHED_RATE


@dataclass(frozen=True)
class TransferNetwork:
    """A classifier network and the parts that it is made of; all share the same variables.

    Attributes:
        model: uint8 [B, H, W, channels] of any size -> float32 [B, C], the head's activation applied.
        face_input, backbone, pooling, dropout, head: its layers; `head` gives float32 logits [B, C].
        activation: "softmax" or "sigmoid".
        auxiliary: (name of a layer of the backbone, what classifies its output in training alone).
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
        """Return the name of the layer that each part is; see `assemble_network`."""
        return {part: getattr(self, part).name for part in ("face_input", "backbone", "pooling", "dropout", "head")}

    @property
    def variables(self) -> list[keras.Variable]:
        """All that training changes: the model's variables, then those of the auxiliary heads."""
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
    """Build the network with random weights.

    Args:
        config: backbone, dropout and head.
        image_size: side in pixels that the backbone sees.
        channels: of the images that come in, 1 (grey) or 3 (RGB).
        crop: side of the part of an image that becomes this square, in 0..1; None is the whole image.
        aspect: how images that are not square become squares: "crop" or "pad", see `FaceInput`.
        precision: "float32" or "mixed_bfloat16"; the head computes in float32 in either.
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
    """Build the network of one stage for its data, with random weights."""
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
    """Build the part that EF-FER1 hands to EF-FER2, with random weights, and say what its pixels must look like.

    Returns:
        A Keras model named "backbone", float [B, S, S, 3] -> float [B, s, s, F], and its preprocessing.
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
    """Build what turns pooled features into logits: one dense layer, after the hidden ones if there are any."""
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
    """Build the classifiers that branch off in training; they come last, so that the rest has the same initial weights."""
    from dlfer.model.paper_backbones import build_auxiliary_head

    places = BACKBONES[config.backbone].auxiliary
    with dtype_policy(precision):
        heads = [build_auxiliary_head(num_labels, name=f"auxiliary_{number}") for number, _ in enumerate(places, 1)]
    return attach_auxiliary(backbone, list(zip(places, heads, strict=True)))


def attach_auxiliary(
    backbone: keras.Model, heads: Sequence[tuple[str, keras.Model]]
) -> tuple[tuple[str, keras.Model], ...]:
    """Give each head its weights, as the output of its layer of the backbone needs them; return the heads."""
    for place, head in heads:
        head(backbone.get_layer(place).output)
    return tuple(heads)


def assemble_network(
    model: keras.Model, parts: Mapping[str, str], *, activation: str, heads: Sequence[tuple[str, keras.Model]]
) -> TransferNetwork:
    """Return the re-initialised network of a model, with the parts that `TransferNetwork.name_parts` named."""
    layers = {part: model.get_layer(name) for part, name in parts.items()}
    auxiliary = attach_auxiliary(layers["backbone"], heads)
    return TransferNetwork(model, activation=activation, auxiliary=auxiliary, **layers)


@keras.saving.register_keras_serializable(package="dlfer")
class TrainingNetwork(keras.Model):
    """What is compiled and fitted: the same layers, from drawn augmentation to logits.

    Its input is a dict with "image" (uint8 [B, H, W, C]) and the arrays that
    `dlfer.data.augment.draw_augmentation` drew; its output is float32 logits [B, C], so that losses
    are computed from logits; or [B, 1 + A, C], the network's own first, where A auxiliary heads are trained.

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
        self.auxiliary = [head for _, head in network.auxiliary]
        self.trunk = None
        if network.auxiliary:
            maps = [network.backbone.get_layer(place).output for place, _ in network.auxiliary]
            self.trunk = keras.Model(network.backbone.inputs, [network.backbone.output, *maps], name="trunk")

    def call(self, inputs: dict, training: bool = False):
        """Return logits [B, C], or [B, 1 + A, C]."""
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
    """Layers that are made inside compute by the policy `name`; the one before is put back."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
