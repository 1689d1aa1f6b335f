"""Several hosts as one: who belongs to the cluster, and what its processes tell each other.

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
from typing import TYPE_CHECKING

import keras
import numpy as np

from dlfer.data.bundle import Share
from dlfer.errors import EnvironmentProblem, WorkerLost
from dlfer.train.launch import CLUSTER_VARIABLE, describes_cluster

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
                f"({lines[-1].strip()[:200]}). Its own log says why. Start all of them again; the chief with "
                "--resume RUN goes on from the last checkpoint."
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
