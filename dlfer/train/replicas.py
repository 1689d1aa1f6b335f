"""Several devices of TensorFlow, on one host or on many: a loop of our own around `strategy.run`.

`fit` divides a batch where mixup's partners are then parted, clips gradients before they are summed, and does not
work over several hosts in Keras 3.15. Here a batch is divided so that partners stay together, each device computes
its share of the loss of the whole batch, and the summed gradient is clipped: the step is that of one device, but
for BatchNorm, whose statistics are those of each device's part. Their moving averages are averaged over the
devices before anything is evaluated or saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import keras

from dlfer.data.pipeline import Batch, divide_rows
from dlfer.model.stage_network import TrainingNetwork, TransferNetwork
from dlfer.train.loop import AfterStep, FitLoop, clone_network
from dlfer.train.objective import take_own_logits
from dlfer.train.state import StageState

if TYPE_CHECKING:
    import tensorflow as tf


class ReplicaLoop(FitLoop):
    """Steps on the devices of a tf.distribute strategy, in this process.

    Args:
        network: the caller's; a twin of it is trained.
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
        self._part_seeds()

    def _part_seeds(self) -> None:
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
