"""Which device, which compiler, which determinism; and several hosts as one: who belongs to the cluster, and what its
processes tell each other.

The cluster is described by the environment alone, as schedulers set it: TF_CONFIG, or Slurm's variables. One
process a host; the first is the chief, which does everything a single process does and writes every file. The
others follow: they wait for the chief to begin a stage, do their share of each of its steps, and write nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import keras
import numpy as np

from dlfer.config.schema import ExperimentSection
from dlfer.data.bundle import Share
from dlfer.errors import EnvironmentProblem, WorkerLost
from dlfer.train.progress import CLUSTER_VARIABLE, describes_cluster

if TYPE_CHECKING:
    import tensorflow as tf


# Numbers that are added up at a time; two sizes, so that TensorFlow traces two functions only.
_FEW, _MANY = 16, 2**18


class Cluster:
    """The processes of one distributed training, and sums over them.

    Attributes:
        strategy: MultiWorkerMirroredStrategy over all devices of all hosts.
        share: which host this process is; host 0 is the chief.
        is_busy: whether a stage is on; a process that fails there leaves the others to find it gone.
    """

    def __init__(self, resolver: tf.distribute.cluster_resolver.ClusterResolver) -> None:
        import tensorflow as tf

        num_hosts = len(resolver.cluster_spec().job_tasks("worker"))
        self.share = Share(resolver.task_id, num_hosts)
        with self.explain_loss():
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        self.is_busy = False
        self._sum = self._make_sum()

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and leads."""
        return self.share.index == 0

    @contextlib.contextmanager
    def explain_loss(self) -> Iterator[None]:
        """Turn the error of an operation whose peers are gone into one that says so."""
        import tensorflow as tf

        lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)
        try:
            yield
        except lost as error:
            lines = [line for line in str(error).splitlines() if "/task:" in line] or [str(error).splitlines()[0]]
            raise WorkerLost(
                f"host {self.share.index} of {self.share.count}: another process of the training is gone "
                f"({lines[-1].strip()[:200]}). Its own log says why. Start all of them again, with --continue "
                "or --resume RUN: they continue from the last checkpoint."
            ) from error

    def add(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 `values` (any shape, the same everywhere) over all processes."""
        flat = np.asarray(values, np.float64).ravel()
        size = _FEW if len(flat) <= _FEW else _MANY
        sums = []
        for start in range(0, max(1, len(flat)), size):
            padded = np.zeros(size)
            part = flat[start : start + size]
            padded[: len(part)] = part
            with self.explain_loss():
                sums.append(self._sum(self._place(padded)).numpy()[: len(part)])
        return np.concatenate(sums).reshape(np.shape(values))

    def tell(self, value: dict) -> dict:
        """Return the chief's JSON-ready `value` in every process."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8) if self.is_chief else np.zeros(0)
        size = int(self.add(np.array([float(len(text))]))[0])
        sent = text.astype(np.float64) if self.is_chief else np.zeros(size)
        return json.loads(self.add(sent).astype(np.uint8).tobytes())

    def spread(self, variables: list[keras.Variable]) -> None:
        """Set `variables` to the chief's values in every process; float64 holds each of them exactly."""
        own = [np.asarray(keras.ops.convert_to_numpy(variable.value), np.float64) for variable in variables]
        flat = np.concatenate([values.ravel() for values in own]) if own else np.zeros(0)
        flat = self.add(flat if self.is_chief else np.zeros_like(flat))
        start = 0
        for variable, values in zip(variables, own, strict=True):
            variable.assign(flat[start : start + values.size].reshape(values.shape).astype(variable.dtype))
            start += values.size

    def _make_sum(self) -> Callable:
        import tensorflow as tf

        def add(values):
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

        @tf.function
        def run(values):
            return self.strategy.experimental_local_results(self.strategy.run(add, args=(values,)))[0]

        return run

    def _place(self, values: np.ndarray):
        """Put `values` on the first device of this process and zeros on the others."""
        import tensorflow as tf

        given = iter([values])
        return self.strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(next(given, np.zeros_like(values)))
        )


@functools.cache
def join_cluster() -> Cluster | None:
    """Return the cluster that the environment describes, waiting for its other processes; None for one host.

    TF_CONFIG with more than one worker is enough. Under Slurm, whose tasks may also be runs of their own,
    DLFER_CLUSTER=slurm says that they are one. To be called before the first operation of the process.

    Raises:
        EnvironmentProblem: the variables are incomplete or contradict each other, or the backend is not TensorFlow.
    """
    resolver = _find_resolver()
    if resolver is None:
        return None
    if keras.backend.backend() != "tensorflow":
        raise EnvironmentProblem(
            f"Several hosts need the backend tensorflow, found {keras.backend.backend()}. Set KERAS_BACKEND=tensorflow."
        )
    return Cluster(resolver)


def _find_resolver() -> tf.distribute.cluster_resolver.ClusterResolver | None:
    if not describes_cluster():
        return None
    import tensorflow as tf

    if os.environ.get(CLUSTER_VARIABLE) != "slurm":
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        # Slurm itself shows each task its GPUs; the resolver would count them with nvidia-smi and divide again.
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
        )
        resolver.cluster_spec()
        return resolver
    except (KeyError, RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"{CLUSTER_VARIABLE}=slurm: Slurm's variables do not describe a step of several tasks: {error}. "
            "Start the processes with srun, one task a node."
        ) from error


def dismiss_followers(problem: str | None) -> None:
    """Let the other processes go, with what went wrong here, if anything did.

    In the middle of a stage, or with a process gone, they cannot listen; then they notice that this one ends.
    """
    cluster = join_cluster() if join_cluster.cache_info().currsize else None
    if cluster is not None and not cluster.is_busy:
        cluster.tell({"stage": None, "problem": problem})


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


def _use_cpu(backend: str) -> None:
    """Let JAX compute on the CPU; refuse where PyTorch would take a GPU, which Keras chooses when it is imported.

    Raises:
        EnvironmentProblem: it, or JAX that is in use already, computes on a GPU.
    """
    if backend == "jax":
        import jax

        jax.config.update("jax_platforms", "cpu")
        is_gpu = jax.default_backend() != "cpu"
    else:
        import torch

        is_gpu = torch.cuda.is_available() and os.environ.get("KERAS_TORCH_DEVICE", "cuda").casefold() != "cpu"
    if is_gpu:
        raise EnvironmentProblem(
            f"experiment.device: found cpu, but {backend} computes on a GPU in this process. Start it again with "
            "CUDA_VISIBLE_DEVICES=-1."
        )


def choose_device(config: ExperimentSection, *, require_gpu: bool = False) -> Device:
    """Return the device of the experiment, hiding GPUs where it asks for the CPU; join the other hosts, if any.

    XLA on a CPU trains an EfficientNet at several times the time of plain TensorFlow, on a GPU it is
    what one wants; so `jit: auto` goes by the device. JAX has nothing but XLA, PyTorch runs eagerly.

    Raises:
        EnvironmentProblem: a GPU is required and none is found, there are fewer devices than asked for, or the CPU is asked
            for in a process that has used a GPU.
    """
    backend = keras.backend.backend()
    if config.device == "cpu" and backend == "tensorflow":
        import tensorflow as tf

        try:
            tf.config.set_visible_devices([], "GPU")
        except RuntimeError as error:
            raise EnvironmentProblem(
                "experiment.device: found cpu, but this process has used a GPU already, which TensorFlow cannot undo. Restart "
                "the notebook's kernel or the script, and run this experiment first or with CUDA_VISIBLE_DEVICES=-1."
            ) from error
    if config.device == "cpu" and backend != "tensorflow":
        _use_cpu(backend)
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
