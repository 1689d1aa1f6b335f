"""How the steps of a stage are done on one device, or on several under JAX: by Keras' own `fit`.

Loops for several devices of TensorFlow stand in `dlfer.train.distribute`, which decides what a stage gets. A loop trains `network` and can `publish` its weights into `plain`, the network that the
caller knows and that predicts on one device; on one device the two are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import keras
import numpy as np

from dlfer.data.bundle import WHOLE
from dlfer.data.pipeline import Batch
from dlfer.model.stage_network import TrainingNetwork, TransferNetwork, assemble_network
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
