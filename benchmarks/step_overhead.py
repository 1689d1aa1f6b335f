"""Overhead of a training beyond the arithmetic of its network: a complete stage compared with bare training steps.

    python benchmarks/step_overhead.py                                      # the table of results/
    python benchmarks/step_overhead.py resnet_nano:32:16 --steps 4 --rounds 2   # NAME:SIZE:BATCH

`train_stage` trains the stage, with shuffling, augmentation, mixing, metrics, callbacks, history, logs, and a progress
bar that is rendered to the null device. After each of its epochs, the same number of bare steps is run in the same
process: one compiled function from prepared float images to updated weights, of a second network with the same
architecture, loss and optimiser. Such a pair is a round. The first epoch of both is not counted; the time before it
(build, trace, first step) and between epochs (validation, checkpoint) is reported separately.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from timing import Timing, add_options, describe_ratio, tell_row, write_figures

from dlfer.config.schema import ExperimentSection, StageConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.model.stage_network import TransferNetwork, build_transfer_network
from dlfer.train.cluster import Device, choose_device
from dlfer.train.objective import build_loss, build_optimizer
from dlfer.train.progress import ConsoleListener, StopControl
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob

CASES = ("efficientnet_lite2:64:64", "efficientnet_b3:224:32")
LABELS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")
STAGE = {
    "data": {"source": "synthetic_faces"},
    "augment": {"rotation": 15.0, "zoom": 0.1, "shift": 0.1, "mirror": 0.5, "mixup": 0.2, "erasing": 0.25},
    "optimizer": {"name": "adam", "learning_rate": 1e-4},
    "loss": {"label_smoothing": 0.1},
    "keep": "last",
}


class BareSteps:
    """Training steps with the network's arithmetic alone: forward pass, loss, backward pass and optimiser.

    Args:
        network: a network that is trained here only.
        config: the stage with the loss and the optimiser.
        device: the device, which determines whether XLA compiles the step.
        num_steps: number of steps per call.

    Attributes:
        start_up: seconds of tracing and of the first two steps; set by the first call.
        seconds_per_step: time per step in the last call, without its first step, as for an epoch.
    """

    def __init__(self, network: TransferNetwork, config: StageConfig, device: Device, num_steps: int) -> None:
        self.num_steps = num_steps
        self.start_up: dict[str, float] = {}
        rng, side = np.random.default_rng(0), config.image_size
        pixels = rng.normal(size=(config.batch_size, side, side, 3)).astype(np.float32)
        self.batch = (
            tf.constant(pixels),
            tf.constant(rng.dirichlet(np.ones(len(LABELS)), config.batch_size), tf.float32),
        )
        layers = keras.Sequential([network.backbone, network.pooling, network.dropout, network.head])
        optimizer = build_optimizer(config.optimizer, config.optimizer.learning_rate, clip=config.clip, ema=config.ema)
        loss, variables = build_loss(config.loss), network.model.trainable_variables
        optimizer.build(variables)

        def step(images, targets):
            with tf.GradientTape() as tape:
                value = loss(targets, layers(images, training=True))
            optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))
            return value

        self.step = tf.function(step, jit_compile=device.jit, autograph=False)

    def __call__(self) -> None:
        if not self.start_up:
            self._start()
        float(self.step(*self.batch))
        start = time.perf_counter()
        for _ in range(self.num_steps - 1):
            loss = self.step(*self.batch)
        float(loss)
        self.seconds_per_step = (time.perf_counter() - start) / (self.num_steps - 1)

    def _start(self) -> None:
        for name, call in (
            ("trace", lambda: self.step.get_concrete_function(*self.batch)),
            ("first_step", lambda: float(self.step(*self.batch))),
            ("second_step", lambda: float(self.step(*self.batch))),
        ):
            start = time.perf_counter()
            call()
            self.start_up[name] = round(time.perf_counter() - start, 2)


@dataclass
class Epoch:
    """Times of one epoch and of the bare steps after it, in seconds.

    Attributes:
        begin: start of the epoch.
        begin_cpu: CPU time of the process at its start.
        steps: end of each step.
        cpu: CPU time from the start to the end of the last step.
        end: end of the epoch, including validation.
        bare: time per bare step.
        bare_cpu: CPU time of all bare steps.
    """

    begin: float
    begin_cpu: float
    steps: list[float] = field(default_factory=list)
    cpu: float = 0.0
    end: float = 0.0
    bare: float = 0.0
    bare_cpu: float = 0.0


class Watcher(ConsoleListener):
    """A listener with the usual progress bar, which records times and runs the bare steps after each epoch.

    Args:
        bare: the bare steps.
        sink: the file to which the progress bar is rendered.
    """

    def __init__(self, bare: BareSteps, sink: TextIO) -> None:
        super().__init__()
        self.console = Console(file=sink, force_terminal=True, width=120)
        self.bare = bare
        self.epochs: list[Epoch] = []

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        super().start_epoch(stage, epoch, epochs, step, steps)
        self.epochs.append(Epoch(time.perf_counter(), time.process_time()))

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        super().finish_step(step, loss, accuracy)
        epoch = self.epochs[-1]
        epoch.steps.append(time.perf_counter())
        epoch.cpu = time.process_time() - epoch.begin_cpu

    def finish_epoch(self, stage: str, row: dict, *, is_best: bool) -> None:
        super().finish_epoch(stage, row, is_best=is_best)
        epoch = self.epochs[-1]
        epoch.end, cpu = time.perf_counter(), time.process_time()
        self.bare()
        epoch.bare, epoch.bare_cpu = self.bare.seconds_per_step, time.process_time() - cpu


def make_bundle(num_train: int, num_validation: int) -> DataBundle:
    """Return data of random images with the size of FER2013's."""
    rng = np.random.default_rng(0)

    def make(name: str, count: int) -> Split:
        images = rng.integers(0, 256, (count, 48, 48, 1), dtype=np.uint8)
        return Split(name, images, np.arange(count) % len(LABELS), np.array([f"{name}/{row}" for row in range(count)]))

    return DataBundle("arrays", LABELS, make("train", num_train), make("validation", num_validation), None)


def measure(case: str, steps: int, rounds: int) -> dict:
    """Return the results for a case NAME:SIZE:BATCH."""
    name, size, batch = case.split(":")[0], *map(int, case.split(":")[1:])
    config = StageConfig.model_validate({**STAGE, "epochs": rounds + 1, "image_size": size, "batch_size": batch})
    device = choose_device(ExperimentSection(name="step_overhead"))
    # TensorFlow's own initialisation in this process is not to be counted.
    float(tf.matmul(tf.ones((8, 8)), tf.ones((8, 8)))[0, 0])
    networks, build = [], []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        start = time.perf_counter()
        networks.append(
            build_transfer_network(ModelConfig(backbone=name), num_labels=len(LABELS), image_size=size, channels=1)
        )
        build.append(time.perf_counter() - start)
    bare = BareSteps(networks[1], config, device, steps)
    bundle = make_bundle(steps * batch, batch)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as sink:
        watcher = Watcher(bare, sink)
        job = StageJob("finetune", config, Path(folder), 0, device, 60.0, StopControl(), watcher)
        start = time.perf_counter()
        train_stage(job, networks[0], bundle)
    return {
        "case": case,
        **summarise(watcher.epochs, steps, batch),
        "start_up_seconds": {
            "build_network": round(build[0], 2),
            "build_it_again": round(build[1], 2),
            "to_first_epoch": round(watcher.epochs[0].begin - start, 2),
            "first_step": round(watcher.epochs[0].steps[0] - watcher.epochs[0].begin, 2),
            "second_step": round(watcher.epochs[0].steps[1] - watcher.epochs[0].steps[0], 2),
            **{f"bare_{what}": seconds for what, seconds in bare.start_up.items()},
        },
        "rounds": rounds,
        "steps": steps,
    }


def summarise(epochs: list[Epoch], steps: int, batch: int) -> dict:
    """Return the results over all epochs after the first."""
    counted = epochs[1:]
    bare = Timing(np.array([e.bare for e in counted]), np.array([e.bare_cpu / steps for e in counted]))
    # The first step of an epoch is excluded: it waits for the input pipeline, which is negligible in a long epoch.
    steady = Timing(np.array([(e.steps[-1] - e.steps[0]) / (steps - 1) for e in counted]))
    whole = Timing(np.array([e.cpu / steps for e in counted]))
    return {
        **describe_ratio(bare, steady),
        "cpu_ratio": describe_ratio(Timing(bare.cpu_seconds), whole)["ratio"],
        "images_per_second": round(batch / steady.median, 1),
        "bare_images_per_second": round(batch / bare.median, 1),
        "seconds_per_step": round(steady.median, 4),
        "bare_seconds_per_step": round(bare.median, 4),
        "seconds_to_the_first_step_of_an_epoch": round(float(np.median([e.steps[0] - e.begin for e in counted])), 3),
        "seconds_of_validation": round(float(np.median([e.end - e.steps[-1] for e in counted])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="NAME:SIZE:BATCH")
    parser.add_argument("--steps", type=int, default=12, help="of an epoch, at least 2 (default: 12)")
    add_options(parser, rounds=5)
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"--steps {given.steps}: expected at least 2, since the first of each epoch is left out.")
    rows: list[dict] = []
    for case in given.cases:
        tell_row(measure(case, given.steps, given.rounds), rows)
        keras.backend.clear_session()
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy")


if __name__ == "__main__":
    main()
