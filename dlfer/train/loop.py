"""How the steps of a stage are done, and the moving average of its weights with BatchNorm statistics of its own.

Steps are done on one device, or on several under JAX, by Keras' own `fit`. Loops for several devices of TensorFlow stand in
`dlfer.train.distribute`, which decides what a stage gets. A loop trains `network` and can `publish` its weights into
`plain`, the network that the caller knows and that predicts on one device; on one device the two are the same.

The optimiser averages the trained weights. BatchNorm's moving mean and variance belong to the raw weights: they describe
feature maps that the averaged weights do not produce. After the first epoch of `experiments/mobilenet_faces.yaml` the averaged
weights with these statistics had an accuracy of 20.8 % on 1,200 images of PublicTest, the raw weights 57.9 %, and the averaged
weights with statistics computed on 1,024 training images 60.3 %. Source: Izmailov et al., "Averaging Weights Leads to Wider
Optima and Better Generalization", UAI 2018, section 3.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from dlfer.data.bundle import WHOLE
from dlfer.data.pipeline import Batch
from dlfer.model.stage_network import TrainingNetwork, TransferNetwork, assemble_network
from dlfer.model.training_kernels import list_batch_norms
from dlfer.train.objective import compute_hits
from dlfer.train.state import StageState

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
