"""Which device, which compiler, which determinism: decided once, before the first network is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import keras

from dlfer.config.schema import ExperimentSection
from dlfer.errors import EnvironmentProblem


@dataclass(frozen=True)
class Device:
    """What the networks of a run compute on.

    Attributes:
        kind: "cpu" or "gpu".
        name: as the backend calls it.
        jit: whether training steps are compiled by XLA.
        backend: "tensorflow", "jax" or "torch".
    """

    kind: str
    name: str
    jit: bool
    backend: str

    def as_dict(self) -> dict:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def choose_device(config: ExperimentSection, *, require_gpu: bool = False) -> Device:
    """Return the device of the experiment, hiding GPUs where it asks for the CPU.

    XLA on a CPU trains an EfficientNet at several times the time of plain TensorFlow, on a GPU it is
    what one wants; so `jit: auto` goes by the device. JAX has nothing but XLA, PyTorch runs eagerly.

    Raises:
        EnvironmentProblem: a GPU is required and none is found.
    """
    backend = keras.backend.backend()
    gpus = [] if config.device == "cpu" else list_gpus()
    if (require_gpu or config.device == "gpu") and not gpus:
        raise EnvironmentProblem(
            f"No GPU is visible to {backend}, but one is required (--require-gpu or experiment.device: gpu). "
            "Check nvidia-smi, the driver, and that tensorflow[and-cuda] is installed (dlfer doctor); "
            "or leave the requirement out to train on the CPU."
        )
    if config.device == "cpu" and backend == "tensorflow":
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    kind = "gpu" if gpus else "cpu"
    jit = {"tensorflow": kind == "gpu", "jax": True, "torch": False}[backend]
    if config.jit != "auto":
        jit = config.jit
    return Device(kind, gpus[0] if gpus else "CPU", jit, backend)


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
