"""Choice of device, compilation and determinism; and training over several hosts with communication between them.

The cluster is described only by environment variables that schedulers set: TF_CONFIG, or those of Slurm. Each host runs
one process. The first is the chief, which does everything that a single process does and writes all files. The others
are followers: they wait for the chief to begin a stage, do their share of each of its steps, and write nothing.
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


# Sizes of the chunks that are summed over processes; only two, so that TensorFlow traces only two functions.
_FEW, _MANY = 16, 2**18


class Cluster:
    """The processes of a distributed training, and their communication.

    Attributes:
        strategy: MultiWorkerMirroredStrategy over all devices of all hosts.
        share: index of this process' host and number of hosts; host 0 is the chief.
        is_busy: whether a stage is running; a process that fails in a stage cannot notify the others.
    """

    def __init__(self, resolver: tf.distribute.cluster_resolver.ClusterResolver) -> None:
        import tensorflow as tf

        num_hosts = len(resolver.cluster_spec().job_tasks("worker"))
        self.share = Share(resolver.task_id, num_hosts)
        with self.raising_worker_lost():
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        self.is_busy = False
        self._sum = self._make_sum()

    @property
    def is_chief(self) -> bool:
        """Whether this process is the chief, which leads the training and writes files."""
        return self.share.index == 0

    @contextlib.contextmanager
    def raising_worker_lost(self) -> Iterator[None]:
        """Raise WorkerLost in place of TensorFlow's error when another process has ended during an operation."""
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
        """Return the sum over all processes of float64 `values`, whose shape is the same in each of them."""
        flat = np.asarray(values, np.float64).ravel()
        size = _FEW if len(flat) <= _FEW else _MANY
        sums = []
        for start in range(0, max(1, len(flat)), size):
            padded = np.zeros(size)
            part = flat[start : start + size]
            padded[: len(part)] = part
            with self.raising_worker_lost():
                sums.append(self._sum(self._place(padded)).numpy()[: len(part)])
        return np.concatenate(sums).reshape(np.shape(values))

    def tell(self, value: dict) -> dict:
        """Broadcast the chief's JSON-serialisable `value`; return it in every process."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8) if self.is_chief else np.zeros(0)
        size = int(self.add(np.array([float(len(text))]))[0])
        sent = text.astype(np.float64) if self.is_chief else np.zeros(size)
        return json.loads(self.add(sent).astype(np.uint8).tobytes())

    def spread(self, variables: list[keras.Variable]) -> None:
        """Broadcast the chief's values of `variables` to every process, as float64, which represents them exactly."""
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
        """Return a distributed value: `values` on the first device of this process, zeros on the others."""
        import tensorflow as tf

        given = iter([values])
        return self.strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(next(given, np.zeros_like(values)))
        )


@functools.cache
def join_cluster() -> Cluster | None:
    """Return the cluster that the environment describes, after waiting for its other processes; None for one host.

    TF_CONFIG with more than one worker suffices. Slurm's tasks may also be independent runs, so they form a cluster
    only with DLFER_CLUSTER=slurm. The first call must come before the process' first TensorFlow operation.

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
        # Slurm already assigns GPUs to each task; the resolver would count them with nvidia-smi and divide them again.
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
    """Tell the followers to end, with a description of the chief's problem, if any.

    During a stage, or after the loss of a process, they cannot receive it; they end when this process does.
    """
    cluster = join_cluster() if join_cluster.cache_info().currsize else None
    if cluster is not None and not cluster.is_busy:
        cluster.tell({"stage": None, "problem": problem})


@dataclass(frozen=True)
class Device:
    """The device or devices on which a run computes its networks.

    Attributes:
        kind: "cpu" or "gpu".
        name: name of the first device in the backend.
        jit: whether training steps are compiled by XLA.
        backend: "tensorflow", "jax" or "torch".
        replicas: number of devices that can share a batch, on all hosts together.
        workers: number of hosts.
    """

    kind: str
    name: str
    jit: bool
    backend: str
    replicas: int = 1
    workers: int = 1

    def as_dict(self) -> dict:
        """Return the fields as JSON-serialisable values."""
        return asdict(self)


def _use_cpu(backend: str) -> None:
    """Make JAX compute on the CPU; for PyTorch, whose device Keras chooses at import, only check that it is the CPU.

    Raises:
        EnvironmentProblem: PyTorch, or JAX that has been used before, computes on a GPU.
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
    """Return the device of the experiment, hiding GPUs if it asks for the CPU; join the other hosts, if any.

    On a CPU, training an EfficientNet with XLA takes several times as long as with plain TensorFlow; on a GPU, XLA is
    faster. So `jit: auto` depends on the device. JAX always uses XLA, and PyTorch runs eagerly.

    Raises:
        EnvironmentProblem: a GPU is required and none is found, there are fewer devices than requested, or the CPU is
            requested in a process that has used a GPU.
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
        # JAX fixes its devices at the first query, even one for GPUs, so the CPU is divided before.
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
    """Return the number of devices that can share a batch, dividing the CPU into logical devices if requested."""
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
    """Divide the CPU into `wanted` logical devices, unless devices are initialised; return the number of devices."""
    if backend == "jax":
        import jax

        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
        return len(jax.devices("cpu"))
    import tensorflow as tf

    # Raises once TensorFlow has initialised its devices; those created by an earlier call are still counted.
    with contextlib.suppress(RuntimeError):
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    return len(tf.config.list_logical_devices("CPU"))


def list_gpus() -> list[str]:
    """Return the names of the GPUs that are visible to Keras' backend."""
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
    """Make the operations of this process bitwise reproducible if `experiment.deterministic` is set."""
    if not config.deterministic:
        return
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    elif backend == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
