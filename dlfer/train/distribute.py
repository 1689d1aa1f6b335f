"""Which loop a stage gets: one device, several of one host, or several hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dlfer.data.bundle import DataBundle
from dlfer.errors import ConfigError, NonFiniteError, TrainingStopped
from dlfer.model.stage_network import TransferNetwork
from dlfer.train.cluster import join_cluster
from dlfer.train.loop import FitLoop, ShardedFitLoop

if TYPE_CHECKING:
    from dlfer.train.state import StageJob

# BatchNorm's statistics of a part need more than one image, and mixup's partners stay together.
MIN_IMAGES = 2


def build_loop(job: StageJob, network: TransferNetwork, *, batch_images: int) -> FitLoop:
    """Return what does the steps of a stage.

    Args:
        job: of the stage; its device says how many devices there are.
        network: the caller's.
        batch_images: images of a batch.

    Raises:
        ConfigError: over several hosts, a batch that does not divide.
    """
    device, cluster = job.device, join_cluster()
    given = {"fill": job.config.augment.fill, "jit": device.jit}
    if cluster is not None:
        from dlfer.train.hosts import HostLoop

        _check_divides(job, batch_images)
        return HostLoop(network, cluster=cluster, batch_images=batch_images, **given)
    replicas = choose_replicas(device.replicas, batch_images)
    if replicas == 1:
        return FitLoop(network, **given)
    if device.backend == "jax":
        return ShardedFitLoop(network, replicas=replicas, **given)
    from dlfer.train.replicas import ReplicaLoop, mirror_devices

    return ReplicaLoop(network, strategy=mirror_devices(device.kind, replicas), batch_images=batch_images, **given)


def choose_replicas(available: int, batch_images: int) -> int:
    """Return how many devices share a batch: the most that divide it into parts of at least two images."""
    fitting = [n for n in range(1, available + 1) if batch_images % n == 0 and batch_images // n >= MIN_IMAGES]
    return max(fitting, default=1)


def describe_replicas(job: StageJob, batch_images: int) -> str | None:
    """Return how a batch is divided, for the terminal and the log; None on one device."""
    available = job.device.replicas
    if available == 1:
        return None
    used = available if job.device.workers > 1 else choose_replicas(available, batch_images)
    hosts = f" on {job.device.workers} hosts" if job.device.workers > 1 else ""
    rates = "rates of the schedule belong to the whole batch"
    text = f"{used} devices{hosts}, {batch_images // used} images each of a batch of {batch_images}; {rates}"
    if used == available:
        return text
    return (
        f"{text}. {available - used} of {available} devices stay idle: batch_size {batch_images} does not divide by "
        f"{available} into parts of at least {MIN_IMAGES}; a multiple of {available} from {MIN_IMAGES * available} on does"
    )


@contextmanager
def lead_stage(job: StageJob, network: TransferNetwork, bundle: DataBundle) -> Iterator[None]:
    """Begin a stage with the other hosts, if there are any, and note whether all have left it together."""
    cluster = join_cluster()
    if cluster is None:
        yield
        return
    if cluster.is_chief:
        from dlfer.train.hosts import announce_stage

        announce_stage(cluster, job, network, bundle)
    cluster.is_busy = True
    try:
        yield
    except (TrainingStopped, NonFiniteError):
        # Every process raises these at the same step.
        cluster.is_busy = False
        raise
    cluster.is_busy = False


def _check_divides(job: StageJob, batch_images: int) -> None:
    device = job.device
    if batch_images % device.replicas or batch_images // device.replicas < MIN_IMAGES:
        raise ConfigError(
            f"{job.name}.batch_size: found batches of {batch_images} images for {device.replicas} devices on "
            f"{device.workers} hosts, expected a multiple of {device.replicas}, from {MIN_IMAGES * device.replicas} on."
        )
