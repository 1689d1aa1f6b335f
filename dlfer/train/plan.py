"""Descriptions of a stage's plan before it trains and of the blocks of its network; freezing of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras
import numpy as np

from dlfer.config.schema import FreezeConfig, StageConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.bundle import DataBundle, Share
from dlfer.data.pipeline import count_batch_images, count_steps
from dlfer.model.backbones import list_levels
from dlfer.model.stage_network import TransferNetwork, list_branches
from dlfer.model.training_kernels import count_steps_to_settle, list_batch_norms
from dlfer.runs.run_records import Block, NetworkRecord
from dlfer.runs.text import count_noun
from dlfer.train.loop import describe_replicas
from dlfer.train.objective import build_schedule, compute_rates, describe_optimizer
from dlfer.train.state import StageJob


def unfreeze_random_start(name: str, config: StageConfig) -> tuple[StageConfig, str | None]:
    """Return the section of a stage without freezing, and a note about the ignored settings; None if there are none.

    This is for stages that start from random weights. Frozen layers would stay random, a head trained on a random
    backbone learns nothing that lasts, and frozen BatchNorm would keep its initial statistics 0 and 1.

    Args:
        name: name of the stage, for the note.
        config: the section; its epochs of the head alone, if any, become epochs of the whole network.
    """
    freeze = config.freeze
    asked = [
        *([f"head_epochs: {freeze.head_epochs}"] if freeze.head_epochs else []),
        *([f"layers: {freeze.layers:g}"] if freeze.layers else []),
        *([f"batch_norm: {freeze.batch_norm}"] if freeze.batch_norm == "frozen" else []),
    ]
    if not asked:
        return config, None
    note = (
        f"{name} starts from random weights, so that freeze ({', '.join(asked)}) is not applied: all "
        f"{count_noun(config.epochs, 'epoch')} train the whole network."
    )
    return config.model_copy(update={"freeze": FreezeConfig()}), note


def set_trainable(backbone: keras.Model, config: FreezeConfig, *, head_only: bool) -> None:
    """Set `trainable` of every layer of `backbone`; this takes effect at the next compile.

    In a hybrid, the fraction of frozen layers applies to each branch, so that the last layers of every branch are
    trained. The layers that fuse the branches are trained unless `head_only` is set.

    Args:
        backbone: the backbone, whose layers are ordered from the input.
        config: the fraction of frozen layers, and whether BatchNorm is frozen.
        head_only: whether the whole backbone is frozen.
    """
    backbone.trainable = not head_only
    if head_only:
        return
    for branch in list_branches(backbone) or [backbone]:
        layers = [layer for layer in branch.layers if layer.weights]
        num_frozen = round(config.layers * len(layers))
        for index, layer in enumerate(layers):
            layer.trainable = index >= num_frozen
    if config.batch_norm == "frozen":
        for norm in list_batch_norms(backbone):
            norm.trainable = False


# Weights, gradients and two optimiser slots, in float32.
BYTES_PER_PARAMETER = 16


def describe_plan(
    name: str, job: StageJob, network: TransferNetwork, bundle: DataBundle, *, precision: str, starts_at_random: bool
) -> list[str]:
    """Return lines that describe what a stage is going to do, for the terminal and the run's log.

    Args:
        name: name of the stage.
        job, network, bundle: the stage's job, network and data.
        precision: `experiment.precision`.
        starts_at_random: whether the backbone starts from random weights.
    """
    config = job.config
    num_images, steps_per_epoch = len(bundle.train), compute_steps(job, bundle)
    total = network.model.count_params()
    memory = estimate_memory(network, config, precision=precision)
    replicas = describe_replicas(job, count_batch_images(bundle.train, config))
    return [
        f"{name}: {count_noun(num_images, 'image')} of {config.image_size}x{config.image_size}, batch {config.batch_size}, "
        f"{count_noun(steps_per_epoch, 'step')} an epoch, {count_noun(config.epochs, 'epoch')}, "
        f"{count_noun(steps_per_epoch * config.epochs, 'step')}",
        f"{name}: {total:,} parameters; {describe_optimizer(config.optimizer)}; {describe_rates(config, steps_per_epoch)}; "
        f"{config.loss.name}; balance {config.balance}; "
        f"{describe_clipping(config)}",
        f"{name}: expected memory about {memory / 2**30:.1f} GiB" + (", over all devices" if replicas else ""),
        *([f"{name}: {replicas}"] if replicas else []),
        *([f"{name}: without effect: {', '.join(unused)}"] if (unused := config.list_unused_keys()) else []),
        *([f"{name}: {long}"] if (long := config.describe_long_warmup()) else []),
        *(
            _warn_of_slow_statistics(name, config, network, steps_per_epoch)
            if starts_at_random and job.max_steps is None
            else []
        ),
    ]


def describe_clipping(config: StageConfig) -> str:
    """Return a description of the gradient clipping, like "gradients clipped to norm 1"."""
    if config.clip is None:
        return "no clipping"
    each = "each variable's gradient" if config.clip_scope == "variable" else "gradients"
    return f"{each} clipped to norm {config.clip:g}"


def describe_rates(config: StageConfig, steps_per_epoch: int) -> str:
    """Return a description of the learning rates: that of head-only epochs, if any, then the peak and the last rate."""
    head, rate = config.num_head_epochs, config.optimizer.learning_rate
    epochs = config.epochs - head
    schedule = build_schedule(config.schedule, rate, steps_per_epoch=steps_per_epoch, epochs=epochs)
    peak, last = compute_rates(schedule, steps_per_epoch * epochs)
    warmup = config.schedule.warmup_epochs
    kind = f"{config.schedule.name}{'; the warm-up does not end' if warmup > epochs else ''}"
    text = f"rate {peak:.3g} at its peak, {last:.3g} in the last step ({kind})"
    if config.schedule.name == "plateau":
        text = f"rate {peak:.3g}, lowered on plateaus"
    elif peak == last and warmup >= epochs:
        text = f"rate rising to {peak:.3g}{f' of {rate:.3g}' if warmup > epochs else ''} ({kind})"
    elif peak == last:
        text = f"rate {peak:.3g} ({kind})"
    if not head:
        return text
    return f"head alone for {count_noun(head, 'epoch')} at rate {config.freeze.head_learning_rate or rate:.3g}, then {text}"


def _warn_of_slow_statistics(
    name: str, config: StageConfig, network: TransferNetwork, steps_per_epoch: int
) -> list[str]:
    num_steps, needed = steps_per_epoch * config.epochs, count_steps_to_settle(network.backbone)
    if config.freeze.batch_norm == "frozen" or needed <= num_steps:
        return []
    return [
        f"{name}: the statistics of this backbone's BatchNorm settle after about {needed:,} steps, and {num_steps:,} are "
        "planned: from random weights its validation stays at chance meanwhile. Set model.norm_momentum, e.g. to 0.9"
    ]


def compute_steps(job: StageJob, bundle: DataBundle) -> int:
    """Return the number of training steps per epoch of a stage."""
    steps = count_steps(bundle.train, job.config, Share(0, job.device.workers))
    return steps if job.max_steps is None else min(steps, job.max_steps)


def estimate_memory(network: TransferNetwork, config: StageConfig, *, precision: str = "float32") -> float:
    """Estimate the peak memory of training in bytes: parameters, and what each layer keeps for backpropagation.

    Every layer's output is counted once. A factor of 1.5 accounts for the additional copies that BatchNorm and
    activations keep (measured on EfficientNet-B3 at 224 pixels with batches of 32: 7.7 GB).
    """
    size = config.image_size
    bytes_per_value = 2 if precision == "mixed_bfloat16" else 4
    values = _count_activations(network.backbone, (1, size, size, 3))
    return BYTES_PER_PARAMETER * network.model.count_params() + 1.5 * bytes_per_value * values * config.batch_size


def _count_activations(backbone: keras.Model, given_shape: tuple[int, ...]) -> float:
    """Return the number of output values of all layers of `backbone`, nested models included, for an input shape."""
    shapes: dict[int, tuple] = {id(backbone.inputs[0]): given_shape}
    count = 0.0
    for layer in backbone.layers:
        for node in layer._inbound_nodes:
            inputs = [shapes.get(id(tensor)) for tensor in node.input_tensors]
            if not inputs or any(shape is None for shape in inputs):
                continue
            given = [keras.KerasTensor(shape) for shape in inputs]
            shape = layer.compute_output_spec(given[0] if len(given) == 1 else given).shape
            shapes[id(node.output_tensors[0])] = shape
            if isinstance(layer, keras.Model):
                count += _count_activations(layer, inputs[0])
            else:
                count += float(np.prod([n for n in shape if n is not None]))
    return count


def describe_network(network: TransferNetwork, config: ModelConfig, *, has_head: bool = True) -> NetworkRecord:
    """Return a record of a network's blocks, with their sizes and numbers of currently trainable parameters.

    Args:
        network: the network.
        config: the section `model` from which it was built.
        has_head: whether to include the head, which a boosted model does not use.
    """
    backbone, size = network.backbone, network.face_input.image_size
    if config.branches:
        blocks = []
        for branch, name in config.name_branches().items():
            blocks += _describe_backbone(backbone.get_layer(branch), list_levels(name), size, branch=branch)
        blocks.append(_describe_fusion(backbone, set(config.name_branches()), size))
    else:
        blocks = _describe_backbone(backbone, list_levels(config.backbone, config.feature_level), size)
    if has_head:
        layers = (network.pooling, network.dropout, network.head)
        blocks.append(_make_block("head", network.head.name, (network.model.output_shape[-1],), layers))
    return NetworkRecord(image_size=size, channels=network.model.input_shape[-1], blocks=blocks)


def _describe_backbone(network: keras.Model, levels: Sequence[str], size: int, *, branch: str = "") -> list[Block]:
    """Return a block for each feature level; a layer belongs to the first level that ends at or after it."""
    prefix = f"{branch}_" if branch else ""
    ends = [prefix + end for end in levels]
    shapes = keras.Model(network.inputs[0], [network.get_layer(end).output for end in ends]).compute_output_shape(
        (1, size, size, 3)
    )
    layers = [layer for layer in network.layers if not isinstance(layer, keras.layers.InputLayer)]
    places = [[layer.name for layer in layers].index(end) + 1 for end in ends]
    # Layers listed after the end of the last level are on parallel branches and belong to it, too.
    starts, stops = [0, *places[:-1]], [*places[:-1], len(layers)]
    return [
        _make_block(f"feature level {number}", end, shape[1:], layers[start:stop], branch=branch)
        for number, (end, shape, start, stop) in enumerate(zip(ends, shapes, starts, stops, strict=True), 1)
    ]


def _describe_fusion(backbone: keras.Model, branches: set[str], size: int) -> Block:
    """Return the block of a hybrid's layers outside its branches: their preprocessing, pooling and fusion."""
    layers = [
        layer
        for layer in backbone.layers
        if layer.name not in branches and not isinstance(layer, keras.layers.InputLayer)
    ]
    shape = backbone.compute_output_shape((1, size, size, 3))
    return _make_block("fusion", layers[-1].name, shape[1:], layers)


def _make_block(
    name: str, layer: str, shape: Sequence[int | None], layers: Sequence[keras.layers.Layer], *, branch: str = ""
) -> Block:
    # By identity, so that the weights of a layer that occurs twice are counted once.
    weights = {id(weight): weight for one in layers for weight in one.weights}
    trainable = {id(weight): weight for one in layers for weight in one.trainable_weights}
    return Block(
        name=name,
        branch=branch,
        layer=layer,
        shape=[int(length) for length in shape if length is not None],
        layers=len(layers),
        parameters=_count(weights.values()),
        statistics=_count(
            weight
            for one in layers
            if isinstance(one, keras.layers.BatchNormalization)
            for weight in (one.moving_mean, one.moving_variance)
        ),
        trained=_count(trainable.values()),
    )


def _count(weights: Iterable[keras.Variable]) -> int:
    return sum(int(np.prod(weight.shape)) for weight in weights)
