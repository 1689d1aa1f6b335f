"""How the steps of a stage are done, and the moving average of its weights with BatchNorm statistics of its own.

Steps are done on one device, or on several under JAX, by Keras' own `fit`; on several devices of TensorFlow, on one host or on
many, by a loop of our own around `strategy.run`. A loop trains `network` and can `publish` its weights into `plain`, the network
that the caller knows and that predicts on one device; on one device the two are the same.

`fit` divides a batch where mixup's partners are then parted, clips gradients before they are summed, and does not
work over several hosts in Keras 3.15. In our loop a batch is divided so that partners stay together, each device computes
its share of the loss of the whole batch, and the summed gradient is clipped: the step is that of one device, but
for BatchNorm, whose statistics are those of each device's part. Their moving averages are averaged over the
devices before anything is evaluated or saved.

The optimiser averages the trained weights. BatchNorm's moving mean and variance belong to the raw weights: they describe
feature maps that the averaged weights do not produce. After the first epoch of `experiments/mobilenet_faces.yaml` the averaged
weights with these statistics had an accuracy of 20.8 % on 1,200 images of PublicTest, the raw weights 57.9 %, and the averaged
weights with statistics computed on 1,024 training images 60.3 %. Source: Izmailov et al., "Averaging Weights Leads to Wider
Optima and Better Generalization", UAI 2018, section 3.2.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from dlfer.data.bundle import WHOLE, DataBundle
from dlfer.data.pipeline import Batch, divide_rows
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
    """Counts the steps of one epoch in the stage's state and hands each on.

    Keras gives running means since `fit` began; an epoch that goes on in the middle adds the sums that
    were done before.
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
    """Steps by `fit`.

    Attributes:
        network: what is trained.
        plain: what the weights are published into.
        replicas: number of devices that share a batch.
        share: which host this process is; here always the only one.
    """

    share = WHOLE

    def __init__(self, network: TransferNetwork, *, fill: str, jit: bool) -> None:
        self.network = self.plain = network
        self.replicas = 1
        self.jit = jit
        self.training = TrainingNetwork(network, fill=fill)

    def scope(self) -> contextlib.AbstractContextManager:
        """What variables are made and steps are done in."""
        return contextlib.nullcontext()

    def compile(self, build: Callable[[], keras.optimizers.Optimizer], loss: keras.losses.Loss):
        """Make ready for steps on what is trainable now; return the optimiser that `build` makes."""
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
        """Do `steps` steps; after each count it in `state` and call `after_step` with the running means."""
        with self.scope():
            self.training.fit(
                batches,
                steps_per_epoch=steps,
                initial_epoch=state.epoch,
                epochs=state.epoch + 1,
                verbose=0,
                shuffle=False,
                callbacks=[StepWatcher(state, after_step)],
            )

    def fetch(self) -> None:
        """Bring every variable up to date: JAX keeps their values to itself while it fits."""
        if hasattr(self.training, "jax_state_sync"):
            self.training.jax_state_sync()

    def publish(self) -> None:
        """Copy the weights into the plain network, where that is another one."""
        if self.plain is not self.network:
            copy_values(self.network.model, self.plain.model)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files."""
        return self.share.index == 0

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Return which of the wishes any process has."""
        return wishes

    def tell(self, value: dict) -> dict:
        """Return the first process' JSON-ready `value`."""
        return value

    def add(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 `values` over all processes."""
        return values

    def spread(self, variables: list[keras.Variable]) -> None:
        """Give every process the first one's values of `variables`, once, before the first step."""


def copy_values(source: keras.Model, target: keras.Model) -> None:
    """Set the variables of `target` to those of `source`, in order, dropout seeds included."""
    for variable, other in zip(source.variables, target.variables, strict=True):
        other.assign(keras.ops.convert_to_numpy(variable.value))


def clone_network(network: TransferNetwork) -> TransferNetwork:
    """Return a network of the same form and the same values with variables of its own."""
    model = keras.Model.from_config(network.model.get_config())
    heads = [(place, type(head).from_config(head.get_config())) for place, head in network.auxiliary]
    copy = assemble_network(model, network.name_parts(), activation=network.activation, heads=heads)
    copy_values(network.model, copy.model)
    for (_, head), (_, other) in zip(network.auxiliary, copy.auxiliary, strict=True):
        copy_values(head, other)
    return copy


class ShardedFitLoop(FitLoop):
    """Steps by `fit` under keras.distribution.DataParallel: JAX divides each batch over its devices.

    The arithmetic is that of one device, BatchNorm's statistics over the whole batch included.
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
    """The averaged weights of the network that a loop trains.

    Args:
        loop: that trains the network.
        optimizer: of the loop; it keeps the averages of the weights.
        fill: what is outside of a warped image, as in training.
    """

    def __init__(self, loop: FitLoop, optimizer: keras.optimizers.Optimizer, *, fill: str) -> None:
        self._loop, self._optimizer = loop, optimizer
        # The plain network has the same layers; what is frozen is known by the trained one alone.
        norms = list_batch_norms(loop.plain.model)
        is_frozen = [not norm.trainable for norm in list_batch_norms(loop.network.model)]
        self._frozen = [norm for norm, frozen in zip(norms, is_frozen, strict=True) if frozen]
        self._norms = [norm for norm, frozen in zip(norms, is_frozen, strict=True) if not frozen]
        self._forward = _compile_forward(TrainingNetwork(loop.plain, fill=fill))
        self._values: list[tuple[keras.Variable, np.ndarray]] = []

    def update(self, batches: Iterator[Batch] | None, *, num_images: int) -> None:
        """Take the averages as they are now.

        Args:
            batches: this process' share of training batches, as `iterate_epoch` yields them. BatchNorm's statistics are
                computed on the first ones: the mean over the batches of their means and variances. None: the
                statistics of the raw weights are kept.
            num_images: on how many images of all processes together, rounded up to whole batches.
        """
        trained, averages = self._optimizer._trainable_variables, self._optimizer._model_variables_moving_average
        self._values = [(variable, _read(average)) for variable, average in zip(trained, averages, strict=True)]
        if batches is not None and self._norms:
            with self.applied():
                self._loop.publish()
                statistics = self._compute_statistics(batches, num_images)
            self._values += statistics

    def apply(self) -> None:
        """Set the network's variables to the averages."""
        for variable, values in self._values:
            variable.assign(values)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averaged weights; afterwards the raw ones."""
        raw = [(variable, _read(variable)) for variable, _ in self._values]
        self.apply()
        try:
            yield
        finally:
            for variable, values in raw:
                variable.assign(values)

    def _compute_statistics(self, batches: Iterator[Batch], num_images: int) -> list[tuple[keras.Variable, np.ndarray]]:
        """Return the trained network's variables for means and variances with their new values; nothing is changed."""
        loop, plain = self._loop, self._loop.plain.model
        kept = [(variable, _read(variable)) for variable in plain.non_trainable_variables]
        moving = [variable for norm in self._norms for variable in (norm.moving_mean, norm.moving_variance)]
        sums, count = [np.zeros(variable.shape) for variable in moving], 0
        momentum, trainable = [norm.momentum for norm in self._norms], [norm.trainable for norm in self._frozen]
        for norm in self._norms:
            norm.momentum = 0.0  # after each batch the moving statistics are those of the batch
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
            for variable, values in kept:  # with the seeds of dropout
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
    """Return a function that passes inputs through a network as a training step does; TensorFlow traces it once."""

    def forward(inputs: Mapping[str, Any]) -> None:
        network(inputs, training=True)

    if keras.backend.backend() != "tensorflow":
        return forward
    import tensorflow as tf

    return tf.function(forward)


class ReplicaLoop(FitLoop):
    """Steps on the devices of a tf.distribute strategy, in this process.

    Args:
        network: the caller's; a copy of it is trained.
        strategy: whose devices share a batch.
        batch_images: images of a whole batch, over all processes.
        fill, jit: as of the stage.
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
        """Return (parts of a batch) -> (loss, accuracy) of the whole batch, float32 scalars; it trains one step."""
        import tensorflow as tf

        training, optimizer, batch_images = self.training, self.optimizer, self.batch_images
        variables = [variable.value for variable in training.trainable_variables]

        # XLA compiles each device's own work; sums over devices and the update stay outside of it.
        @tf.function(jit_compile=self.jit)
        def compute(inputs, targets):
            with tf.GradientTape() as tape:
                logits = training(inputs, training=True)
                # Called as a whole, the loss would divide by the number of images on this device, and of devices.
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
        """Give each device of this process its rows of this process' batch."""
        import tensorflow as tf

        inputs, targets = batch
        parts = iter(divide_rows(len(targets), len(self.strategy.extended.worker_devices)))

        def take(_) -> tuple:
            rows = next(parts)
            return tf.nest.map_structure(lambda a: tf.constant(a[rows]), (inputs, targets))

        return self.strategy.experimental_distribute_values_from_function(take)

    def fetch(self) -> None:
        """Average BatchNorm's moving statistics over the devices.

        They are linear in what each step gives, so averaging them now and then changes nothing of the outcome.
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
        """Let each device draw dropout of its own, from the first device's seed and its number."""
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
    """Return the strategy over the first `replicas` GPUs or logical CPU devices of this host; one per process."""
    import tensorflow as tf

    names = [f"{kind.upper()}:{index}" for index in range(replicas)]
    return tf.distribute.MirroredStrategy(names)


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
        _check_divides(job, batch_images)
        return HostLoop(network, cluster=cluster, batch_images=batch_images, **given)
    replicas = choose_replicas(device.replicas, batch_images)
    if replicas == 1:
        return FitLoop(network, **given)
    if device.backend == "jax":
        return ShardedFitLoop(network, replicas=replicas, **given)
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
            "parts": network.name_parts(),
            "activation": network.activation,
            "auxiliary": [[place, head.to_json()] for place, head in network.auxiliary],
            "labels": list(bundle.labels),
            "num_images": [len(bundle.train), len(bundle.validation)],
        }
    )
