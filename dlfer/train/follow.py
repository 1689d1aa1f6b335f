"""What the processes of a distributed training do that are not its chief."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras

from dlfer.config.schema import PretrainConfig, StageConfig
from dlfer.data.bundle import DataBundle
from dlfer.errors import DataError, DlferError, NonFiniteError, TrainingStopped
from dlfer.model.stage_network import TransferNetwork, attach_auxiliary
from dlfer.train.cluster import Cluster
from dlfer.train.control import StopControl
from dlfer.train.device import Device
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob
from dlfer.train.watch import TrainingListener


def follow_chief(
    cluster: Cluster,
    device: Device,
    *,
    load_bundle: Callable[[StageConfig], DataBundle],
    control: StopControl,
    listener: TrainingListener,
) -> None:
    """Do this host's share of every stage that the chief begins, until it says that all is done.

    Raises:
        TrainingStopped: the training stopped at a checkpoint.
        DlferError: the chief ended with an error, or is gone; or this host's data is not the chief's.
    """
    stopped: TrainingStopped | None = None
    while True:
        message = cluster.tell({})
        if message["stage"] is None:
            break
        stopped = None
        try:
            _join_stage(message, device, load_bundle=load_bundle, control=control, listener=listener)
        except TrainingStopped as stop:
            stopped = stop
        except NonFiniteError as error:
            # The chief has the same error, and tells whether it goes on with another run.
            listener.say(str(error))
    if stopped is not None:
        raise stopped
    if message["problem"] is not None:
        raise DlferError(f"The chief ended with: {message['problem']}")


def _join_stage(
    message: dict, device: Device, *, load_bundle: Callable[[StageConfig], DataBundle], control, listener
) -> None:
    schema = PretrainConfig if message["stage"] == "pretrain" else StageConfig
    config = schema.model_validate(message["config"], strict=False)
    bundle = load_bundle(config)
    found = [list(bundle.labels), [len(bundle.train), len(bundle.validation)]]
    if found != [message["labels"], message["num_images"]]:
        raise DataError(
            f"{message['stage']}.data: found {found[1]} images of {len(found[0])} labels on this host, the chief has "
            f"{message['num_images']} of {len(message['labels'])}. Give every host the same data."
        )
    model = read_network(message["network"])
    layers = {part: model.get_layer(name) for part, name in message["parts"].items()}
    job = StageJob(
        name=message["stage"],
        config=config,
        # Nothing is written: the chief alone does.
        folder=Path(),
        seed=message["seed"],
        device=replace(device, jit=message["jit"]),
        checkpoint_minutes=float("inf"),
        control=control,
        listener=listener,
        max_steps=message["max_steps"],
    )
    heads = [(place, read_network(head)) for place, head in message["auxiliary"]]
    auxiliary = attach_auxiliary(layers["backbone"], heads)
    network = TransferNetwork(model, activation=message["activation"], auxiliary=auxiliary, **layers)
    train_stage(job, network, bundle)


def read_network(text: str) -> keras.Model:
    """Return the network, with new weights, whose JSON the chief sent."""
    # Keras finds layers of ours once their modules are imported, which `build_backbone` does for those that it puts in.
    from dlfer.model import training_kernels  # noqa: F401

    return keras.models.model_from_json(text)
