"""Several backbones side by side, their pooled features fused: the backbone of family hybrid.

Each branch is a row of the table of backbones with a preprocessing of its own, which therefore stands inside
the network: a hybrid takes plain pixels, and to everything around it (carrying over, freezing, saving) it is
one backbone whose feature map is 1x1.
"""

from __future__ import annotations

from pathlib import Path

import keras
from keras import ops

from dlfer.config.sections import ModelConfig
from dlfer.errors import TransferError
from dlfer.model.backbone_spec import Preprocessing, choose_preprocessing
from dlfer.model.backbones import build_backbone, find_backbone
from dlfer.model.efficientnet_lite import IMAGENET_VARIANT
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
