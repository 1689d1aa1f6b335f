"""What a stage will do, in words, before it trains; what of it does not apply to a start from random weights; and what
its network is made of, block by block."""

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
    """Return the stage with nothing frozen, and a note about what is not applied; None where nothing was frozen.

    For a stage that starts from random weights: frozen, they would stay random. A head that is trained on them alone
    learns nothing that lasts, and BatchNorm would keep the statistics 0 and 1 of no data.

    Args:
        name: of the stage, for the note.
        config: whose epochs of the head, if any, become epochs of the whole network.
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
    """Set `trainable` of every layer of `backbone`; takes effect at the next compile.

    In a hybrid the fraction is taken of each branch, so that all branches keep their last layers free;
    what fuses the branches is always trained.

    Args:
        backbone: its layers in the order from the input.
        config: fraction of layers that never move, and whether BatchNorm is frozen.
        head_only: nothing of the backbone moves.
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
    """Return lines for the terminal and the run's log: what one stage is going to do.

    Args:
        name: of the stage.
        job, network, bundle: what it trains, and on what.
        precision: of the experiment.
        starts_at_random: whether no weights were loaded into the backbone.
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
    """Return what limits the gradient: "gradients clipped to norm 1"."""
    if config.clip is None:
        return "no clipping"
    each = "each variable's gradient" if config.clip_scope == "variable" else "gradients"
    return f"{each} clipped to norm {config.clip:g}"


def describe_rates(config: StageConfig, steps_per_epoch: int) -> str:
    """Return the rate of the head's epochs, where there are any, and the peak and the last rate of the others."""
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
    """Return the training steps of one epoch of a stage."""
    steps = count_steps(bundle.train, job.config, Share(0, job.device.workers))
    return steps if job.max_steps is None else min(steps, job.max_steps)


def estimate_memory(network: TransferNetwork, config: StageConfig, *, precision: str = "float32") -> float:
    """Estimate the peak memory of training in bytes: parameters, and what each layer keeps for the way back.

    Every layer's output is counted once; BatchNorm and activations keep copies of their own, the
    factor 1.5 stands for them (measured on EfficientNet-B3 at 224, batch 32: 7.7 GB).
    """
    size = config.image_size
    bytes_per_value = 2 if precision == "mixed_bfloat16" else 4
    values = _count_activations(network.backbone, (1, size, size, 3))
    return BYTES_PER_PARAMETER * network.model.count_params() + 1.5 * bytes_per_value * values * config.batch_size


def _count_activations(backbone: keras.Model, given_shape: tuple[int, ...]) -> float:
    """Return how many numbers the layers of `backbone`, and of networks in it, put out for an input of that shape."""
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
    """Return the blocks of a network with their sizes, and how much of each is trainable as its layers stand now.

    Args:
        network: the whole.
        config: how it was built.
        has_head: whether its head answers; that of a boosted model is not used.
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
    """Return a block for each feature level; layers belong to the next level that ends after them."""
    prefix = f"{branch}_" if branch else ""
    ends = [prefix + end for end in levels]
    shapes = keras.Model(network.inputs[0], [network.get_layer(end).output for end in ends]).compute_output_shape(
        (1, size, size, 3)
    )
    layers = [layer for layer in network.layers if not isinstance(layer, keras.layers.InputLayer)]
    places = [[layer.name for layer in layers].index(end) + 1 for end in ends]
    # Whatever follows the last level in the order of the layers lies beside it.
    starts, stops = [0, *places[:-1]], [*places[:-1], len(layers)]
    return [
        _make_block(f"feature level {number}", end, shape[1:], layers[start:stop], branch=branch)
        for number, (end, shape, start, stop) in enumerate(zip(ends, shapes, starts, stops, strict=True), 1)
    ]


def _describe_fusion(backbone: keras.Model, branches: set[str], size: int) -> Block:
    """Return the block of what lies around the branches of a hybrid: their inputs, their pooling and the fusion."""
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
    # A layer that occurs twice has its weights once.
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
