"""The moving average of a stage's weights, with BatchNorm statistics of its own.

The optimiser averages the trained weights. BatchNorm's moving mean and variance belong to the raw weights: they describe
feature maps that the averaged weights do not produce. After the first epoch of `experiments/mobilenet_faces.yaml` the averaged
weights with these statistics had an accuracy of 20.8 % on 1,200 images of PublicTest, the raw weights 57.9 %, and the averaged
weights with statistics computed on 1,024 training images 60.3 %. Source: Izmailov et al., "Averaging Weights Leads to Wider
Optima and Better Generalization", UAI 2018, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from dlfer.data.pipeline import Batch
from dlfer.model.stage_network import TrainingNetwork
from dlfer.model.training_kernels import list_batch_norms
from dlfer.train.loop import FitLoop


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
