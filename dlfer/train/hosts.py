"""The loop of a stage over several hosts, and how the chief begins a stage with the others."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np

from dlfer.data.bundle import DataBundle
from dlfer.data.pipeline import Batch
from dlfer.model.stage_network import TransferNetwork
from dlfer.train.cluster import Cluster
from dlfer.train.loop import AfterStep
from dlfer.train.replicas import ReplicaLoop
from dlfer.train.state import StageJob, StageState

PARTS = ("face_input", "backbone", "pooling", "dropout", "head")


class HostLoop(ReplicaLoop):
    """Steps on all devices of all hosts; every process does the same ones at the same time.

    Args:
        cluster: that this process has joined.
        network, batch_images, fill, jit: as of a ReplicaLoop.
    """

    def __init__(self, network: TransferNetwork, *, cluster: Cluster, batch_images: int, fill: str, jit: bool) -> None:
        self.cluster, self.share = cluster, cluster.share
        with cluster.explain_loss():
            super().__init__(network, strategy=cluster.strategy, batch_images=batch_images, fill=fill, jit=jit)

    def compile(self, build, loss: keras.losses.Loss):
        with self.cluster.explain_loss():
            return super().compile(build, loss)

    def train(self, batches: Iterator[Batch], steps: int, state: StageState, after_step: AfterStep) -> None:
        with self.cluster.explain_loss():
            super().train(batches, steps, state, after_step)

    def fetch(self) -> None:
        with self.cluster.explain_loss():
            super().fetch()

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        return tuple((self.cluster.add(np.array(wishes, np.float64)) > 0).tolist())

    def add(self, values: np.ndarray) -> np.ndarray:
        return self.cluster.add(values)

    def tell(self, value: dict) -> dict:
        return self.cluster.tell(value)

    def spread(self, variables: list[keras.Variable]) -> None:
        self.cluster.spread(variables)
        super().spread(variables)


def announce_stage(cluster: Cluster, job: StageJob, network: TransferNetwork, bundle: DataBundle) -> None:
    """Tell the processes that follow what is going to be trained: network, data and recipe, without weights."""
    cluster.tell(
        {
            "stage": job.name,
            "config": job.config.model_dump(mode="json"),
            "seed": job.seed,
            "jit": job.device.jit,
            "max_steps": job.max_steps,
            "network": network.model.to_json(),
            "parts": {part: getattr(network, part).name for part in PARTS},
            "activation": network.activation,
            "auxiliary": [[place, head.to_json()] for place, head in network.auxiliary],
            "labels": list(bundle.labels),
            "num_images": [len(bundle.train), len(bundle.validation)],
        }
    )
