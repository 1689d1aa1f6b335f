"""Which device, which compiler, which determinism: decided once, before the first network is built."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

import keras

from dlfer.config.schema import ExperimentSection
from dlfer.errors import EnvironmentProblem
from dlfer.train.cluster import join_cluster


@dataclass(frozen=True)
class Device:
    """What the networks of a run compute on.

    Attributes:
        kind: "cpu" or "gpu".
        name: as the backend calls it.
        jit: whether training steps are compiled by XLA.
        backend: "tensorflow", "jax" or "torch".
        replicas: number of devices that share a batch, on all hosts together.
        workers: number of hosts.
    """

    kind: str
    name: str
    jit: bool
    backend: str
    replicas: int = 1
    workers: int = 1

    def as_dict(self) -> dict:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def choose_device(config: ExperimentSection, *, require_gpu: bool = False) -> Device:
    """Return the device of the experiment, hiding GPUs where it asks for the CPU; join the other hosts, if any.

    XLA on a CPU trains an EfficientNet at several times the time of plain TensorFlow, on a GPU it is
    what one wants; so `jit: auto` goes by the device. JAX has nothing but XLA, PyTorch runs eagerly.

    Raises:
        EnvironmentProblem: a GPU is required and none is found, or fewer devices than asked for.
    """
    backend = keras.backend.backend()
    if config.device == "cpu" and backend == "tensorflow":
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    if config.devices != "auto" and backend == "jax":
        # JAX counts its devices when it is first asked for any, GPUs included.
        _divide_cpu(backend, config.devices)
    gpus = [] if config.device == "cpu" else list_gpus()
    if (require_gpu or config.device == "gpu") and not gpus:
        raise EnvironmentProblem(
            f"No GPU is visible to {backend}, but one is required (--require-gpu or experiment.device: gpu). "
            "Check nvidia-smi, the driver, and that tensorflow[and-cuda] is installed (dlfer doctor); "
            "or leave the requirement out to train on the CPU."
        )
    kind = "gpu" if gpus else "cpu"
    jit = {"tensorflow": kind == "gpu", "jax": True, "torch": False}[backend]
    if config.jit != "auto":
        jit = config.jit
    name = gpus[0] if gpus else "CPU"
    cluster = join_cluster()
    if cluster is not None:
        replicas, workers = cluster.strategy.num_replicas_in_sync, cluster.share.count
        return Device(kind, name, jit, backend, replicas, workers)
    return Device(kind, name, jit, backend, _count_replicas(config, backend, len(gpus)))


def _count_replicas(config: ExperimentSection, backend: str, num_gpus: int) -> int:
    """Return how many devices share a batch; make as many of the CPU where they are asked for."""
    if config.devices == "auto":
        return max(1, num_gpus) if backend != "torch" else 1
    if config.devices == 1:
        return 1
    if backend == "torch":
        raise EnvironmentProblem(
            f"experiment.devices: found {config.devices}, but with the backend torch dlfer uses one. Set it to 1, or "
            "KERAS_BACKEND to tensorflow or jax."
        )
    found = num_gpus or _divide_cpu(backend, config.devices)
    if found < config.devices:
        raise EnvironmentProblem(
            f"experiment.devices: found {config.devices}, but {backend} sees {found} "
            f"{'GPUs' if num_gpus else 'CPU devices in this process'}. Ask for at most as many."
        )
    return config.devices


def _divide_cpu(backend: str, wanted: int) -> int:
    """Make the CPU look like several devices, if this process has not computed yet; return how many there are."""
    if backend == "jax":
        import jax

        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
        return len(jax.devices("cpu"))
    import tensorflow as tf

    # Too late once TensorFlow has computed; what was made then still counts.
    with contextlib.suppress(RuntimeError):
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    return len(tf.config.list_logical_devices("CPU"))


def list_gpus() -> list[str]:
    """Return the names of the GPUs that the backend of Keras sees."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return [device.name for device in tf.config.list_physical_devices("GPU")]
    if backend == "jax":
        import jax

        return [str(device) for device in jax.devices() if device.platform == "gpu"]
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def set_determinism(config: ExperimentSection) -> None:
    """Make the operations of this process repeatable bit by bit, if the experiment asks for it."""
    if not config.deterministic:
        return
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    elif backend == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
