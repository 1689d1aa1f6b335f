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
from dlfer.errors import ModelError, TransferError
from dlfer.model.backbone_spec import Preprocessing, choose_preprocessing
from dlfer.model.backbones import build_backbone, find_backbone, load_published_weights
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
    branches = name_branches(config.branches)
    for branch, name in branches.items():
        network = _prefix_layers(build_backbone(name, stem=config.stem), branch)
        preprocessing = choose_preprocessing(find_backbone(name).preprocessing, config.pixel_scaling)
        prepared = BranchInput(preprocessing.as_dict(), name=f"{branch}_input")(pixels)
        features.append(pooling(keepdims=True, name=f"{branch}_pooling")(network(prepared)))
    fused = _fuse(features, tuple(branches), config.fusion)
    return keras.Model(pixels, fused, name="backbone"), PLAIN_PIXELS


def name_branches(backbones: tuple[str, ...]) -> dict[str, str]:
    """Return the backbone of each branch by the branch's name, "branch1_resnet50".

    Numbered, so that a backbone may occur twice, and so that weights of [a, b] do not pass for those of [b, a].
    """
    return {f"branch{number}_{name}": name for number, name in enumerate(backbones, 1)}


def load_branch_weights(branches: tuple[str, ...], backbone: keras.Model, weights_folder: str | None = None) -> str:
    """Set the published ImageNet weights of every branch of a hybrid backbone.

    Args:
        branches: names of backbones, as in model.branches.
        backbone: as `build_hybrid_backbone` gave it, with the published stem.
        weights_folder: holds `<backbone>.h5`, `.weights.h5` or `.keras` for each branch, local copies of the published
            files or one's own; a branch whose weights come with dlfer needs none. null downloads the others.

    Returns:
        Where the weights came from, in words.

    Raises:
        ModelError: a branch has no such weights, or a file does not fit.
        TransferError: the network in a file is another function.
    """
    specs = {name: find_backbone(name) for name in branches}
    without = [name for name, spec in specs.items() if not (spec.weights or (weights_folder and spec.load))]
    if without:
        raise ModelError(
            f"pretrain.weights: found imagenet, but of the branches {', '.join(branches)} dlfer has no ImageNet weights "
            f"for {', '.join(without)}; nothing was loaded, since half a pretrained network would pass for "
            "a whole one. Leave weights null and train EF-FER1 of all branches on pretrain.data, or choose other "
            "branches (dlfer show backbones)."
        )
    sources = []
    for branch, name in name_branches(branches).items():
        published = build_backbone(name)
        file = None if weights_folder is None else _find_branch_file(weights_folder, name)
        sources.append(load_published_weights(name, published, file))
        target = backbone.get_layer(branch)
        if [weight.shape for weight in target.weights] != [weight.shape for weight in published.weights]:
            raise TransferError(
                f"branch {branch}: its weights are not of the published form; set model.stem: imagenet."
            )
        target.set_weights(published.get_weights())
    return "; ".join(dict.fromkeys(sources))


def _find_branch_file(weights_folder: str, name: str) -> str | None:
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
    """Return the network made anew, named as its branch, with layers "<branch>_<layer>"."""

    def rename(layer: keras.layers.Layer) -> keras.layers.Layer:
        return type(layer).from_config({**layer.get_config(), "name": f"{branch}_{layer.name}"})

    anew = keras.models.clone_model(network, clone_function=rename)
    return keras.Model(anew.inputs[0], anew.outputs[0], name=branch)
