"""Learning curves from random weights: dlfer's training compared with a plain Keras script.

    python benchmarks/random_start.py --csv fer2013.csv --out build/random_start
    python benchmarks/random_start.py --csv fer2013.csv --out build/random_start --backbones mobilenet_v2 --size 48

For each backbone, two epochs are trained on FER2013's Training by

- dlfer: the finetune section of experiments/lite2.yaml without EF-FER1, as in `dlfer run`;
- plain: the network of keras.applications with weights=None and its preprocess_input, one dense layer, `model.fit` on a
  tf.data pipeline with the same ranges of the warp, AdamW, cosine schedule, label smoothing and clipping by Keras
  alone.

A control arm is fair only if both curves fall alike. Every training writes one file to --out, and is not repeated if
its file exists; the figure and the table are made from these files. A training of one of the three backbones takes 10
to 25 minutes on two cores at 64 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from dlfer.config.load import load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle
from dlfer.data.sources import load_data
from dlfer.model.stage_network import build_stage_network
from dlfer.train.cluster import choose_device
from dlfer.train.progress import StopControl, TrainingListener
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob

APPLICATIONS = {
    "efficientnet_b3": (keras.applications.EfficientNetB3, keras.applications.efficientnet.preprocess_input),
    "resnet50": (keras.applications.ResNet50, keras.applications.resnet50.preprocess_input),
    "mobilenet_v2": (keras.applications.MobileNetV2, keras.applications.mobilenet_v2.preprocess_input),
}
EVERY = 50
"""Number of steps over which one point of a curve is averaged."""
NATIVE = 48


class Curve(TrainingListener):
    """A listener that computes the mean loss and accuracy of every 50 steps from the running means of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, float, float]] = []
        self.last, self.done = (0, 0.0, 0.0), 0

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.last, self.done = (0, 0.0, 0.0), epoch * steps

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        super().finish_step(step, loss, accuracy)
        before, loss_before, accuracy_before = self.last
        if step - before >= EVERY:
            count = step - before
            mean = [
                (step * now - before * then) / count for now, then in ((loss, loss_before), (accuracy, accuracy_before))
            ]
            self.points.append((self.done + step, *mean))
            self.last = (step, loss, accuracy)


class KerasCurve(keras.callbacks.Callback):
    """A Keras callback that does the same for `fit`, whose logs are running means as well."""

    def __init__(self) -> None:
        super().__init__()
        self.curve = Curve()

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.curve.start_epoch("plain", epoch, 0, 0, self.params["steps"])

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.curve.finish_step(batch + 1, logs["loss"], logs["accuracy"])


def train_dlfer(config: ExperimentConfig, bundle: DataBundle) -> list[tuple[int, float, float]]:
    """Train like `dlfer run`, and return the curve: (step, mean loss, mean accuracy)."""
    keras.utils.set_random_seed(config.experiment.seed)
    network, curve = build_stage_network(config, config.finetune, bundle), Curve()
    with tempfile.TemporaryDirectory() as folder:
        device = choose_device(config.experiment, require_gpu=False)
        job = StageJob(
            name="finetune",
            config=config.finetune,
            folder=Path(folder),
            seed=config.experiment.seed,
            device=device,
            checkpoint_minutes=60.0,
            control=StopControl(),
            listener=curve,
        )
        train_stage(job, network, bundle)
    return curve.points


def train_plain(config: ExperimentConfig, bundle: DataBundle) -> list[tuple[int, float, float]]:
    """Train the network of keras.applications with `fit`, and return the curve."""
    keras.utils.set_random_seed(config.experiment.seed)
    stage, num_labels = config.finetune, len(bundle.labels)
    build, preprocess = APPLICATIONS[config.model.backbone]
    size, batch = stage.image_size, stage.batch_size
    inputs = keras.Input((size, size, 3))
    features = build(include_top=False, weights=None, input_shape=(size, size, 3))(preprocess(inputs))
    pooled = keras.layers.Dropout(config.model.dropout)(keras.layers.GlobalAveragePooling2D()(features))
    model = keras.Model(inputs, keras.layers.Dense(num_labels)(pooled))
    steps = len(bundle.train) // batch
    warmup = round(stage.schedule.warmup_epochs * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps * stage.epochs - warmup, warmup_target=stage.optimizer.learning_rate, warmup_steps=warmup
    )
    decay = stage.optimizer.weight_decay or 0.004
    clip = {"clipnorm" if stage.clip_scope == "variable" else "global_clipnorm": stage.clip}
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=decay, **clip)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=stage.loss.label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices((bundle.train.images, bundle.train.targets.astype(np.int32)))
    data = data.shuffle(len(bundle.train), seed=0).batch(batch, drop_remainder=True)
    data = data.map(make_warp(config, num_labels), 2).prefetch(4)
    curve = KerasCurve()
    model.fit(data, epochs=stage.epochs, verbose=0, callbacks=[curve])
    return curve.curve.points


def make_warp(config: ExperimentConfig, num_labels: int):
    """Return a random warp of batches with the ranges of the experiment, implemented independently of dlfer."""
    augment, size = config.finetune.augment, config.finetune.image_size

    def warp(images, targets):
        n = tf.shape(images)[0]

        def draw(half: float):
            return tf.random.uniform((n,), -half, half)

        angle, zoom = draw(augment.rotation) * np.pi / 180, 1 + draw(augment.zoom)
        shift_x, shift_y = draw(augment.shift) * NATIVE, draw(augment.shift) * NATIVE
        flip = tf.where(tf.random.uniform((n,)) < augment.mirror, -1.0, 1.0)
        scale, centre, middle = NATIVE / size, (NATIVE - 1) / 2, (size - 1) / 2
        a0, a1 = tf.cos(angle) * zoom * scale * flip, -tf.sin(angle) * zoom * scale
        b0, b1 = tf.sin(angle) * zoom * scale * flip, tf.cos(angle) * zoom * scale
        a2, b2 = centre - (a0 + a1) * middle + shift_x, centre - (b0 + b1) * middle + shift_y
        zero = tf.zeros_like(a0)
        warped = tf.raw_ops.ImageProjectiveTransformV3(
            images=tf.cast(images, tf.float32),
            transforms=tf.stack([a0, a1, a2, b0, b1, b2, zero, zero], 1),
            output_shape=[size, size],
            fill_value=0.0,
            interpolation="BILINEAR",
            fill_mode="NEAREST",
        )
        return tf.repeat(warped, 3, -1), tf.one_hot(targets, num_labels)

    return warp


def draw_figure(curves: dict[str, dict[str, list]], path: Path) -> None:
    """Plot the loss curves of both sides, with one panel per backbone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.4), layout="constrained")
    for axes, (backbone, sides) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for side, style in (("dlfer", "-"), ("plain", "--")):
            if side in sides:
                steps, losses, _ = zip(*sides[side], strict=True)
                axes.plot(steps, losses, style, label=side)
        axes.axhline(np.log(7), color="grey", linewidth=0.8)
        axes.set_title(backbone)
        axes.set_xlabel("step")
        axes.legend()
    figure.axes[0].set_ylabel(f"training loss, mean of {EVERY} steps (grey: ln 7)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbones", nargs="+", default=list(APPLICATIONS))
    parser.add_argument("--sides", nargs="+", default=["plain", "dlfer"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    from dlfer.config.load import parse_override

    overrides = {
        "pretrain": None,
        "finetune.image_size": given.size,
        "finetune.epochs": given.epochs,
        "finetune.data.path": given.csv,
        **dict(parse_override(text) for text in given.set),
    }
    recipe = Path(__file__).parents[1] / "experiments" / "lite2.yaml"
    curves: dict[str, dict[str, list]] = {}
    for backbone in given.backbones:
        # Only EfficientNets allow the recipe's drop_connect.
        own = {} if backbone.startswith("efficientnet_") else {"model.drop_connect": None}
        config = load_experiment(recipe, {**overrides, **own, "model.backbone": backbone})
        for side in given.sides:
            file = given.out / f"{backbone}_{side}.json"
            if not file.exists():
                bundle, start = (
                    load_data(config.finetune.data, image_size=given.size, balance="none", say=print),
                    time.monotonic(),
                )
                points = {"plain": train_plain, "dlfer": train_dlfer}[side](config, bundle)
                seconds = time.monotonic() - start
                file.write_text(json.dumps({"size": given.size, "seconds": seconds, "points": points}) + "\n")
            points = json.loads(file.read_text())["points"]
            curves.setdefault(backbone, {})[side] = points
            shown = ", ".join(f"{step}: {loss:.3f} ({accuracy:.1%})" for step, loss, accuracy in points[1::4])
            print(f"{backbone} {side}: {shown}", flush=True)
    draw_figure(curves, given.out / "random_start.png")


if __name__ == "__main__":
    main()
