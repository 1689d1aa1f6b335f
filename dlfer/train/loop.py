"""Training loops of a stage, and the moving average of its weights with BatchNorm statistics of its own.

On one device, and on several under JAX, training steps are those of Keras' `fit`; on several devices under TensorFlow,
on one or more hosts, those of our own loop around `strategy.run`. A loop trains `network` and can `publish` its weights
to `plain`, the caller's network, which predicts on one device; on one device the two are the same.

With several devices, Keras 3.15's `fit` separates the partners of mixup when it divides a batch, clips gradients before
they are summed, and does not support several hosts. Our loop keeps partners together, computes on each device its part
of the loss of the whole batch, and clips the summed gradient. Thus a step is the same as on one device except for
BatchNorm, which uses the statistics of each device's part of the batch. The moving statistics are averaged over the
devices before evaluating or saving.

The optimiser averages the trained weights. BatchNorm's moving mean and variance belong to the raw weights and describe
feature maps that the averaged weights do not produce. After the first epoch of `experiments/mobilenet_faces.yaml`, the
averaged weights with these statistics had an accuracy of 20.8 % on 1,200 images of PublicTest, the raw weights 57.9 %,
and the averaged weights with statistics computed on 1,024 training images 60.3 %. Source: Izmailov et al., "Averaging
Weights Leads to Wider Optima and Better Generalization", UAI 2018, section 3.2.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from dlfer.data.bundle import WHOLE, DataBundle
from dlfer.data.pipeline import Batch, disable_autotuning, divide_rows
from dlfer.errors import ConfigError, NonFiniteError, TrainingStopped
from dlfer.model.stage_network import TrainingNetwork, TransferNetwork, assemble_network
from dlfer.model.training_kernels import list_batch_norms
from dlfer.train.cluster import Cluster, join_cluster
from dlfer.train.objective import compute_hits, take_own_logits
from dlfer.train.state import StageJob, StageState

if TYPE_CHECKING:
    import tensorflow as tf


AfterStep = Callable[[float, float], None]


class StepWatcher(keras.callbacks.Callback):
    """A Keras callback that updates the stage's state after each step of an epoch and calls `after_step`.

    Keras reports running means since `fit` began; when an epoch is resumed, the sums of its earlier steps are added.
    """

    def __init__(self, state: StageState, after_step: AfterStep) -> None:
        super().__init__()
        self.stage_state = state
        self.before = dict(state.sums)
        self.after_step = after_step

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        state, before = self.stage_state, self.before
        state.step += 1
        steps = state.step - before["steps"]
        state.sums = {"steps": state.step} | {
            name: before[name] + float(logs[name]) * steps for name in ("loss", "accuracy")
        }
        self.after_step(state.sums["loss"] / state.step, state.sums["accuracy"] / state.step)


class FitLoop:
    """A training loop that uses Keras' `fit`.

    Attributes:
        network: the network that is trained.
        plain: the network to which the weights are published.
        replicas: number of devices that share a batch.
        share: index of this process' host and number of hosts; here always that of a single host.
    """

    share = WHOLE

    def __init__(self, network: TransferNetwork, *, fill: str, jit: bool) -> None:
        self.network = self.plain = network
        self.replicas = 1
        self.jit = jit
        self.training = TrainingNetwork(network, fill=fill)

    def scope(self) -> contextlib.AbstractContextManager:
        """Return the context in which variables are created and steps are run."""
        return contextlib.nullcontext()

    def compile(self, build: Callable[[], keras.optimizers.Optimizer], loss: keras.losses.Loss):
        """Compile the training of the variables that are now trainable; return the optimiser that `build` returns."""
        with self.scope():
            optimizer = build()
            self.training.compile(
                optimizer=optimizer,
                loss=loss,
                metrics=[keras.metrics.MeanMetricWrapper(compute_hits, name="accuracy")],
                jit_compile=self.jit,
            )
            self.plain.model.jit_compile = self.jit
            optimizer.build(self.training.trainable_variables)
        return optimizer

    def train(self, batches: Iterator[Batch], steps: int, state: StageState, after_step: AfterStep) -> None:
        """Run `steps` steps; after each, update `state` and call `after_step` with the running loss and accuracy."""
        with self.scope():
            self.training.fit(
                _make_dataset(batches) if keras.backend.backend() == "tensorflow" else batches,
                steps_per_epoch=steps,
                initial_epoch=state.epoch,
                epochs=state.epoch + 1,
                verbose=0,
                shuffle=False,
                callbacks=[StepWatcher(state, after_step)],
            )

    def fetch(self) -> None:
        """Update the values of all variables, which under JAX are not written back to them during `fit`."""
        if hasattr(self.training, "jax_state_sync"):
            self.training.jax_state_sync()

    def publish(self) -> None:
        """Copy the weights to the plain network if that is another one."""
        if self.plain is not self.network:
            copy_values(self.network.model, self.plain.model)

    @property
    def is_chief(self) -> bool:
        """Whether this process is the chief, which writes files."""
        return self.share.index == 0

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Return, for each of the flags, whether it is set in any process."""
        return wishes

    def tell(self, value: dict) -> dict:
        """Broadcast the chief's JSON-serialisable `value`; return it in every process."""
        return value

    def add(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 `values` over all processes."""
        return values

    def spread(self, variables: list[keras.Variable]) -> None:
        """Broadcast the chief's values of `variables` to every process; called once, before the first step."""


def _make_dataset(batches: Iterator[Batch]) -> tf.data.Dataset:
    """Return the batches as a data set, as Keras makes of a generator, but without tf.data's autotuning."""
    import tensorflow as tf

    first = next(batches)
    spec = keras.tree.map_structure(lambda values: tf.TensorSpec((None, *values.shape[1:]), values.dtype), first)
    dataset = tf.data.Dataset.from_generator(lambda: itertools.chain([first], batches), output_signature=spec)
    return disable_autotuning(dataset.prefetch(2))


def copy_values(source: keras.Model, target: keras.Model) -> None:
    """Copy the values of all variables, including dropout seeds, from `source` to `target`, in order."""
    for variable, other in zip(source.variables, target.variables, strict=True):
        other.assign(keras.ops.convert_to_numpy(variable.value))


def clone_network(network: TransferNetwork) -> TransferNetwork:
    """Return a copy of the network with the same values in new variables."""
    model = keras.Model.from_config(network.model.get_config())
    heads = [(place, type(head).from_config(head.get_config())) for place, head in network.auxiliary]
    copy = assemble_network(model, network.name_parts(), activation=network.activation, heads=heads)
    copy_values(network.model, copy.model)
    for (_, head), (_, other) in zip(network.auxiliary, copy.auxiliary, strict=True):
        copy_values(head, other)
    return copy


class ShardedFitLoop(FitLoop):
    """A loop that uses `fit` under keras.distribution.DataParallel, where JAX divides each batch over its devices.

    The arithmetic is that of one device; BatchNorm, too, uses the statistics of the whole batch.
    """

    def __init__(self, network: TransferNetwork, *, fill: str, jit: bool, replicas: int) -> None:
        devices = keras.distribution.list_devices()[:replicas]
        self.distribution = keras.distribution.DataParallel(devices=devices)
        with self.scope():
            super().__init__(clone_network(network), fill=fill, jit=jit)
        self.plain = network
        self.replicas = replicas

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        keras.distribution.set_distribution(self.distribution)
        try:
            yield
        finally:
            keras.distribution.set_distribution(None)


class WeightAverage:
    """The moving average of the weights of the network that a loop trains.

    Args:
        loop: the loop that trains the network.
        optimizer: the optimiser of the loop, which computes the averages of the weights.
        fill: how warped images are filled outside their edges, as in training.
    """

    def __init__(self, loop: FitLoop, optimizer: keras.optimizers.Optimizer, *, fill: str) -> None:
        self._loop, self._optimizer = loop, optimizer
        # The plain network has the same layers, but only those of the trained network are marked as frozen.
        norms = list_batch_norms(loop.plain.model)
        is_frozen = [not norm.trainable for norm in list_batch_norms(loop.network.model)]
        self._frozen = [norm for norm, frozen in zip(norms, is_frozen, strict=True) if frozen]
        self._norms = [norm for norm, frozen in zip(norms, is_frozen, strict=True) if not frozen]
        self._forward = _compile_forward(TrainingNetwork(loop.plain, fill=fill))
        self._values: list[tuple[keras.Variable, np.ndarray]] = []

    def update(self, batches: Iterator[Batch] | None, *, num_images: int) -> None:
        """Store the current averages of the weights.

        Args:
            batches: this process' share of training batches from `iterate_epoch`. BatchNorm's statistics are computed
                on the first ones, as the means of the batches' means and variances, weighted by batch size. None
                keeps the statistics of the raw weights.
            num_images: number of images for the statistics over all processes, rounded up to whole batches.
        """
        trained, averages = self._optimizer._trainable_variables, self._optimizer._model_variables_moving_average
        self._values = [(variable, _read(average)) for variable, average in zip(trained, averages, strict=True)]
        if batches is not None and self._norms:
            with self.applied():
                self._loop.publish()
                statistics = self._compute_statistics(batches, num_images)
            self._values += statistics

    def apply(self) -> None:
        """Set the network's variables to the stored averages."""
        for variable, values in self._values:
            variable.assign(values)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the network's weights to the stored averages inside the block, and restore the raw weights afterwards."""
        raw = [(variable, _read(variable)) for variable, _ in self._values]
        self.apply()
        try:
            yield
        finally:
            for variable, values in raw:
                variable.assign(values)

    def _compute_statistics(self, batches: Iterator[Batch], num_images: int) -> list[tuple[keras.Variable, np.ndarray]]:
        """Return BatchNorm's moving means and variances in the trained network with new values, which are not set."""
        loop, plain = self._loop, self._loop.plain.model
        kept = [(variable, _read(variable)) for variable in plain.non_trainable_variables]
        moving = [variable for norm in self._norms for variable in (norm.moving_mean, norm.moving_variance)]
        sums, count = [np.zeros(variable.shape) for variable in moving], 0
        momentum, trainable = [norm.momentum for norm in self._norms], [norm.trainable for norm in self._frozen]
        for norm in self._norms:
            norm.momentum = 0.0  # so that after each batch the moving statistics are those of the batch
        for norm in self._frozen:
            norm.trainable = False
        try:
            for inputs, targets in batches:
                self._forward(inputs)
                count += len(targets)
                for total, variable in zip(sums, moving, strict=True):
                    total += len(targets) * _read(variable)
                if count * loop.share.count >= num_images:
                    break
        finally:
            for norm, value in zip(self._norms, momentum, strict=True):
                norm.momentum = value
            for norm, value in zip(self._frozen, trainable, strict=True):
                norm.trainable = value
            for variable, values in kept:  # including dropout seeds
                variable.assign(values)
        if loop.share.count > 1:
            sums, count = [loop.add(total) for total in sums], loop.add(np.array([float(count)]))[0]
        places = {id(variable): index for index, variable in enumerate(plain.variables)}
        variables = loop.network.model.variables
        return [
            (variables[places[id(variable)]], (total / count).astype(np.float32))
            for variable, total in zip(moving, sums, strict=True)
        ]


def _read(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable.value)


def _compile_forward(network: TrainingNetwork) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that runs a network's forward pass in training mode, compiled to a graph under TensorFlow."""

    def forward(inputs: Mapping[str, Any]) -> None:
        network(inputs, training=True)

    if keras.backend.backend() != "tensorflow":
        return forward
    import tensorflow as tf

    return tf.function(forward)


class ReplicaLoop(FitLoop):
    """A training loop over the devices of a tf.distribute strategy.

    Args:
        network: the caller's network; a copy of it is trained.
        strategy: the strategy whose devices share a batch.
        batch_images: number of images of a whole batch, over all processes.
        fill: how warped images are filled outside their edges.
        jit: whether XLA compiles each device's computation.
    """

    def __init__(
        self, network: TransferNetwork, *, strategy: tf.distribute.Strategy, batch_images: int, fill: str, jit: bool
    ) -> None:
        self.plain, self.strategy, self.batch_images, self.jit = network, strategy, batch_images, jit
        with self.scope():
            self.network = clone_network(network)
            self.training = TrainingNetwork(self.network, fill=fill)
        self.replicas = strategy.num_replicas_in_sync

    def scope(self):
        return self.strategy.scope()

    def compile(self, build: Callable[[], keras.optimizers.Optimizer], loss: keras.losses.Loss):
        with self.scope():
            self.optimizer = build()
            self.optimizer.build(self.training.trainable_variables)
        self.plain.model.jit_compile = self.jit
        self._step = self._make_step(loss)
        return self.optimizer

    def _make_step(self, loss: keras.losses.Loss) -> Callable:
        """Return a function that does a training step on a divided batch and returns its [loss, accuracy], float32."""
        import tensorflow as tf

        training, optimizer, batch_images = self.training, self.optimizer, self.batch_images
        variables = [variable.value for variable in training.trainable_variables]

        # XLA compiles only each device's own computation, not the sums over devices and the update.
        @tf.function(jit_compile=self.jit)
        def compute(inputs, targets):
            with tf.GradientTape() as tape:
                logits = training(inputs, training=True)
                # `loss(...)` would divide the sum by this device's number of images and by the number of devices.
                value = tf.reduce_sum(loss.call(targets, logits)) / batch_images
            hits = tf.equal(tf.argmax(targets, axis=1), tf.argmax(take_own_logits(logits), axis=1))
            return tape.gradient(value, variables), value, tf.reduce_sum(tf.cast(hits, tf.float32)) / batch_images

        def step(inputs, targets):
            gradients, value, accuracy = compute(inputs, targets)
            context = tf.distribute.get_replica_context()
            known = [(g, v) for g, v in zip(gradients, training.trainable_variables, strict=True) if g is not None]
            summed = context.all_reduce(tf.distribute.ReduceOp.SUM, [gradient for gradient, _ in known])
            optimizer.apply_gradients(zip(summed, [variable for _, variable in known], strict=True))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack([value, accuracy]))

        @tf.function
        def run(inputs, targets):
            return self.strategy.run(step, args=(inputs, targets))

        return run

    def train(self, batches: Iterator[Batch], steps: int, state: StageState, after_step: AfterStep) -> None:
        for batch, _ in zip(batches, range(steps), strict=False):
            figures = self.strategy.experimental_local_results(self._step(*self._divide(batch)))[0]
            loss, accuracy = figures.numpy().tolist()
            sums = state.sums
            state.step += 1
            state.sums = {"steps": state.step, "loss": sums["loss"] + loss, "accuracy": sums["accuracy"] + accuracy}
            after_step(state.sums["loss"] / state.step, state.sums["accuracy"] / state.step)

    def _divide(self, batch: Batch) -> tuple:
        """Divide this process' rows of a batch over its devices."""
        import tensorflow as tf

        inputs, targets = batch
        parts = iter(divide_rows(len(targets), len(self.strategy.extended.worker_devices)))

        def take(_) -> tuple:
            rows = next(parts)
            return tf.nest.map_structure(lambda a: tf.constant(a[rows]), (inputs, targets))

        return self.strategy.experimental_distribute_values_from_function(take)

    def fetch(self) -> None:
        """Average BatchNorm's moving statistics over the devices.

        They are linear in the batch statistics of each step, so the result does not depend on how often this is done.
        """
        import tensorflow as tf

        moving = [
            variable.value
            for variable in self.network.model.non_trainable_variables
            if variable.path.endswith(("moving_mean", "moving_variance"))
        ]

        @tf.function
        def average():
            context = tf.distribute.get_replica_context()
            means = context.all_reduce(tf.distribute.ReduceOp.MEAN, [tf.identity(variable) for variable in moving])
            for variable, mean in zip(moving, means, strict=True):
                variable.assign(mean)

        if moving:
            self.strategy.run(average)

    def spread(self, variables: list[keras.Variable]) -> None:
        """Add the number of each device to its dropout seeds, so that devices draw different masks."""
        import tensorflow as tf

        states = [v.value for v in self.network.variables if v.path.endswith("seed_generator_state")]

        @tf.function
        def add_number():
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            for state in states:
                state.assign_add(tf.cast(tf.stack([number, 0]), state.dtype))

        self.strategy.run(add_number)


@functools.cache
def mirror_devices(kind: str, replicas: int) -> tf.distribute.Strategy:
    """Return the strategy over this host's first `replicas` GPUs or logical CPU devices, created once per process."""
    import tensorflow as tf

    names = [f"{kind.upper()}:{index}" for index in range(replicas)]
    return tf.distribute.MirroredStrategy(names)


# Per device: BatchNorm's statistics need more than one image, and mixup's partners stay together.
MIN_IMAGES = 2


def build_loop(job: StageJob, network: TransferNetwork, *, batch_images: int) -> FitLoop:
    """Build the training loop of a stage for its devices and backend.

    Args:
        job: the job of the stage, whose device holds the number of devices.
        network: the caller's network.
        batch_images: number of images of a batch.

    Raises:
        ConfigError: there are several hosts, and the batch does not divide evenly over their devices.
    """
    device, cluster = job.device, join_cluster()
    given = {"fill": job.config.augment.fill, "jit": device.jit}
    if cluster is not None:
        _check_divides(job, batch_images)
        return HostLoop(network, cluster=cluster, batch_images=batch_images, **given)
    replicas = choose_replicas(device.replicas, batch_images)
    if replicas == 1:
        return FitLoop(network, **given)
    if device.backend == "jax":
        return ShardedFitLoop(network, replicas=replicas, **given)
    return ReplicaLoop(network, strategy=mirror_devices(device.kind, replicas), batch_images=batch_images, **given)


def choose_replicas(available: int, batch_images: int) -> int:
    """Return the largest number of devices that divide a batch evenly into parts of at least two images."""
    fitting = [n for n in range(1, available + 1) if batch_images % n == 0 and batch_images // n >= MIN_IMAGES]
    return max(fitting, default=1)


def describe_replicas(job: StageJob, batch_images: int) -> str | None:
    """Return a description of how a batch is divided over devices, for the terminal and the log; None on one device."""
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
    """Begin a stage together with the other hosts, if any, and record whether all processes ended it together."""
    cluster = join_cluster()
    if cluster is None:
        yield
        return
    if cluster.is_chief:
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


class HostLoop(ReplicaLoop):
    """A training loop over all devices of all hosts, whose processes run the same steps at the same time.

    Args:
        cluster: the cluster that this process has joined.
        network, batch_images, fill, jit: see `ReplicaLoop`.
    """

    def __init__(self, network: TransferNetwork, *, cluster: Cluster, batch_images: int, fill: str, jit: bool) -> None:
        self.cluster, self.share = cluster, cluster.share
        with cluster.raising_worker_lost():
            super().__init__(network, strategy=cluster.strategy, batch_images=batch_images, fill=fill, jit=jit)

    def compile(self, build, loss: keras.losses.Loss):
        with self.cluster.raising_worker_lost():
            return super().compile(build, loss)

    def train(self, batches: Iterator[Batch], steps: int, state: StageState, after_step: AfterStep) -> None:
        with self.cluster.raising_worker_lost():
            super().train(batches, steps, state, after_step)

    def fetch(self) -> None:
        with self.cluster.raising_worker_lost():
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
    """Broadcast the settings, the network without weights, and the labels and sizes of the data to the followers."""
    cluster.tell(
        {
            "stage": job.name,
            "config": job.config.model_dump(mode="json"),
            "seed": job.seed,
            "jit": job.device.jit,
            "max_steps": job.max_steps,
            "network": network.model.to_json(),
            "parts": network.name_parts(),
            "activation": network.activation,
            "auxiliary": [[place, head.to_json()] for place, head in network.auxiliary],
            "labels": list(bundle.labels),
            "num_images": [len(bundle.train), len(bundle.validation)],
        }
    )
