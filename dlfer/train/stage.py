"""Training of one stage: a network is fitted to the train split of a bundle and selected on its validation split.

EF-FER1 and EF-FER2 are both such stages. A stage's folder holds `checkpoint.npz` (replaced atomically), `best.npz`,
`history.csv`, `milestones/<epoch>.npz` if requested, and TensorBoard logs; `train_stage` resumes from a checkpoint in
it. In a training over several hosts, the chief begins the stages and the others follow it (`follow_chief`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np

from dlfer.config.schema import PretrainConfig, StageConfig
from dlfer.data.bundle import DataBundle
from dlfer.data.pipeline import Batch, count_batch_images, find_class_weights, iterate_epoch, take_share
from dlfer.errors import DataError, DlferError, ModelError, NonFiniteError, TrainingStopped
from dlfer.metrics.classification import compute_confusion, compute_item_losses
from dlfer.model.predict import predict_probabilities, predict_split
from dlfer.model.stage_network import TransferNetwork, assemble_network
from dlfer.runs.files import sync_folder, write_rows
from dlfer.runs.machine import keep_freed_memory
from dlfer.train.cluster import Cluster, Device
from dlfer.train.loop import WeightAverage, build_loop, lead_stage
from dlfer.train.objective import build_loss, build_optimizer, build_schedule
from dlfer.train.plan import compute_steps, set_trainable
from dlfer.train.progress import StopControl, TrainingListener
from dlfer.train.state import (
    COLUMNS,
    ScalarLog,
    StageJob,
    StageResult,
    StageState,
    compute_epoch_metrics,
    count_epoch,
    count_plateau,
    find_reference,
    read_state,
    require_resume_file,
    restore_checkpoint,
    write_checkpoint,
)

CHECKPOINT, BEST, HISTORY = "checkpoint.npz", "best.npz", "history.csv"
NEXT_BEST = "best.next.npz"
"""File of the best epoch's weights, which is renamed to `BEST` once a checkpoint records that epoch."""
MILESTONES = "milestones"
ANOTHER_HOST = "another host"
"""Reason for a stop that was requested from another process of the cluster."""


def train_stage(job: StageJob, network: TransferNetwork, bundle: DataBundle) -> StageResult:
    """Fit `network` to `bundle`, from the start or from the checkpoint in the job's folder.

    Raises:
        TrainingStopped: a stop was requested; the folder holds a checkpoint.
        NonFiniteError: the loss or a validation prediction became NaN or infinite; the last checkpoint is kept.
    """
    on_cpu = job.device.kind == "cpu"
    try:
        with lead_stage(job, network, bundle), keep_freed_memory() if on_cpu else contextlib.nullcontext():
            return _Stage(job, network, bundle).run()
    finally:
        job.listener.close()


class _Stage:
    def __init__(self, job: StageJob, network: TransferNetwork, bundle: DataBundle) -> None:
        self.job, self.config, self.bundle = job, job.config, bundle
        self.num_labels = len(bundle.labels)
        self.batch_images = count_batch_images(bundle.train, job.config)
        self.loop = build_loop(job, network, batch_images=self.batch_images)
        self.network = self.loop.network
        self.steps = compute_steps(job, bundle)
        self.state = StageState()
        self.average: WeightAverage | None = None
        self.checkpoint = job.folder / CHECKPOINT
        self.log_writer = ScalarLog(job.folder / "tensorboard")

    def run(self) -> StageResult:
        self._begin()
        while self.state.epoch < self.config.epochs and not self.state.stopped_early:
            if self.state.phase != self._due_phase():
                self._enter_phase(self._due_phase())
                self.state.waited = self.state.plateau_waited = 0
            self._train_epoch()
            self._finish_epoch(self._validate())
            self._keep_milestone()
            self.save()
            self._stop_if_requested()
        return self._end()

    def _stop_if_requested(self) -> None:
        """Raise TrainingStopped after an epoch if a stop was requested; the checkpoint is that of an unstopped run."""
        state, reason = self.state, self.job.control.get_reason()
        (is_stopping,) = self.loop.agree(reason is not None)
        if is_stopping and state.epoch < self.config.epochs and not state.stopped_early:
            reason = reason or ANOTHER_HOST
            raise TrainingStopped(
                f"{self.job.name} stopped by {reason} after epoch {state.epoch}; checkpoint: {self.checkpoint}.",
                reason=reason,
            )

    def _begin(self) -> None:
        """Resume from the checkpoint, if there is one, and set the same values in every process."""
        is_chief = self.loop.is_chief
        if is_chief:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            self._recover_best()
            require_resume_file(self.checkpoint, [self.job.folder / HISTORY, self.job.folder / BEST])
        found = is_chief and self.checkpoint.exists()
        self.state = StageState(**self.loop.tell(self._read_state() if found else asdict(self.state)))
        if is_chief and self.state.best_epoch is not None and self.config.keep != "last":
            require_resume_file(self.job.folder / BEST, [self.checkpoint, self.job.folder / HISTORY])
        if self.state.phase:
            self._enter_phase(self.state.phase)
            if is_chief:
                restore_checkpoint(self.checkpoint, self._variables())
                # A process that was killed after its last checkpoint may not have written the last row of the history.
                write_rows(self.job.folder / HISTORY, COLUMNS, self.state.history)
        self.loop.spread(self._variables() if self.state.phase else self.network.variables)

    def _recover_best(self) -> None:
        """Complete the work of a killed process: keep NEXT_BEST if the checkpoint records its epoch, else delete it."""
        new = self.job.folder / NEXT_BEST
        if not new.exists():
            return
        recorded = read_state(self.checkpoint)["best_epoch"] if self.checkpoint.exists() else None
        if recorded == read_state(new)["epoch"]:
            self._keep_next_best()
        else:
            new.unlink()

    def _keep_next_best(self) -> None:
        new = self.job.folder / NEXT_BEST
        if new.exists():
            new.replace(self.job.folder / BEST)
            sync_folder(self.job.folder)

    def _read_state(self) -> dict:
        """Return the checkpoint's state; `reference`, which earlier versions lack, is computed from the history."""
        state = read_state(self.checkpoint)
        try:
            values = [row[f"validation_{self.config.monitor}"] for row in state["history"]]
            return asdict(StageState(**{"reference": find_reference(values, self.config), **state}))
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{self.checkpoint}: the checkpoint was written by another version of dlfer, or is damaged ({error}). Continue with "
                "that version, or start a new run."
            ) from error

    def save(self) -> None:
        """Write the checkpoint and the history."""
        self.loop.fetch()
        if self.loop.is_chief:
            write_checkpoint(self.checkpoint, self._variables(), asdict(self.state))
            self._keep_next_best()
            write_rows(self.job.folder / HISTORY, COLUMNS, self.state.history)

    def _due_phase(self) -> str:
        return "head" if self.state.epoch < self.config.num_head_epochs else "all"

    def _variables(self) -> list[keras.Variable]:
        """Return the variables of a checkpoint: those of the network, including dropout seeds, and of the optimiser."""
        return [*self.network.variables, *self.optimizer.variables]

    def _enter_phase(self, phase: str) -> None:
        """Set the trainable layers and compile; each phase has a new optimiser, since its slots fit one phase only."""
        config, freeze = self.config, self.config.freeze
        self.state.phase = phase
        set_trainable(self.network.backbone, freeze, head_only=phase == "head")
        if phase == "head":
            rate = freeze.head_learning_rate or config.optimizer.learning_rate
        else:
            rate = build_schedule(
                config.schedule,
                config.optimizer.learning_rate,
                steps_per_epoch=self.steps,
                epochs=config.epochs - config.num_head_epochs,
            )
        self.average = None
        self.optimizer = self.loop.compile(
            lambda: build_optimizer(
                config.optimizer, rate, clip=config.clip, ema=config.ema, clip_scope=config.clip_scope
            ),
            build_loss(
                config.loss,
                auxiliary=len(self.network.auxiliary),
                class_weights=find_class_weights(self.bundle.train, config, self.num_labels),
            ),
        )

    def _train_epoch(self) -> None:
        job, state = self.job, self.state
        if state.step >= self.steps:
            return
        job.listener.start_epoch(job.name, state.epoch, self.config.epochs, state.step, self.steps)
        self.clock = time.monotonic()
        self.last_checkpoint = self.clock
        batches = iterate_epoch(
            self.bundle.train,
            self.config,
            num_labels=self.num_labels,
            seed=job.seed,
            epoch=state.epoch,
            start_step=state.step,
            share=self.loop.share,
        )
        failures: list[DlferError] = []
        try:
            self.loop.train(_relay_errors(batches, failures), self.steps - state.step, state, self._after_step)
        except Exception as error:
            # tf.data replaces an error of the generator by its own; the original one names the damaged image.
            if failures:
                raise failures[0] from error
            raise
        self._count_time()

    def _after_step(self, loss: float, accuracy: float) -> None:
        """Check that the loss is finite, report the step, write a checkpoint if one is due, and stop if requested."""
        job, state = self.job, self.state
        if not math.isfinite(loss):
            self.loop.fetch()
            raise NonFiniteError(self._describe_failure(loss))
        state.images += self.batch_images
        job.report_step(state.epoch + 1, state.step, self.steps, loss=loss, accuracy=accuracy)
        reason = job.control.get_reason()
        minutes = (time.monotonic() - self.last_checkpoint) / 60
        is_stopping, is_due = self.loop.agree(reason is not None, minutes >= job.checkpoint_minutes)
        if is_stopping or is_due:
            self._count_time()
            self.save()
            self.last_checkpoint = time.monotonic()
        if is_stopping:
            reason = reason or ANOTHER_HOST
            raise TrainingStopped(
                f"{job.name} stopped by {reason} at epoch {state.epoch + 1}, step {state.step} of {self.steps}; "
                f"checkpoint: {self.checkpoint}.",
                reason=reason,
            )

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.state.epoch_seconds += now - self.clock
        self.clock = now

    def _validate(self) -> dict[str, float]:
        """Return loss, accuracy and macro F1 on the validation split, with the averaged weights if `ema` is set."""
        start = time.monotonic()
        self.loop.fetch()
        self._update_average(self.state.epoch)
        split = take_share(self.bundle.validation, self.loop.share)
        with self._averaged():
            self.loop.publish()
            batch_size = self.config.batch_size
            predict = partial(predict_probabilities, self.loop.plain.model, batch_size=batch_size)
            predicted, targets, _ = predict_split(predict, split, batch_size=batch_size)
        confusion = compute_confusion(targets, predicted.argmax(axis=1), self.num_labels)
        loss = np.array([compute_item_losses(targets, predicted).sum(), len(targets)])
        if self.loop.share.count > 1:
            confusion, loss = self.loop.add(confusion), self.loop.add(loss)
        self.state.seconds += time.monotonic() - start
        if not np.isfinite(loss).all():
            raise NonFiniteError(
                f"{self.job.name}: after epoch {self.state.epoch + 1} the network's answers on validation are NaN or infinite. "
                "Set a lower optimizer.learning_rate, or a lower clip."
            )
        return compute_epoch_metrics(loss[0] / loss[1], confusion)

    def _finish_epoch(self, validation: dict[str, float]) -> None:
        state, sums = self.state, self.state.sums
        train = {name: sums[name] / max(1, sums["steps"]) for name in ("loss", "accuracy")}
        row = state.add_row(train, validation, rate=self._get_rate(), images=sums["steps"] * self.batch_images)
        if self.loop.is_chief:
            self.log_writer.write(row)
        self._select(validation[self.config.monitor])
        self.job.report_epoch(row, is_best=state.best_epoch == state.epoch)
        state.epoch, state.step, state.epoch_seconds = state.epoch + 1, 0, 0.0
        state.sums = {"steps": 0, "loss": 0.0, "accuracy": 0.0}

    def _select(self, value: float) -> None:
        """Write the weights if they are the best so far, and update the counters of plateau and early stopping."""
        state, config = self.state, self.config
        if count_epoch(state, value, config) and self.loop.is_chief:
            with self._averaged():
                write_checkpoint(
                    self.job.folder / NEXT_BEST, self.network.model.weights, {"epoch": state.epoch, "value": value}
                )
        # Not in the phase "head": if the head stops improving, the backbone has not been trained yet.
        is_whole, stopping = state.phase == "all", config.early_stopping
        is_plateau = config.schedule.name == "plateau" and is_whole
        if is_plateau and count_plateau(state, config.schedule.patience):
            self.optimizer.learning_rate = self._get_rate() * config.schedule.factor
        state.stopped_early = is_whole and stopping is not None and state.waited >= stopping.patience

    def _keep_milestone(self) -> None:
        """Write the weights, averaged if `ema` is set, if the epoch that just ended is one of `milestones`.

        This precedes the checkpoint, so that a process killed in between repeats the epoch with the same result.
        """
        epoch = self.state.epoch
        if epoch in self.config.milestones and self.loop.is_chief:
            with self._averaged():
                path = self.job.folder / MILESTONES / f"{epoch}.npz"
                write_checkpoint(path, self.network.model.weights, {"epoch": epoch})

    def _get_rate(self) -> float:
        """Return the learning rate of the last step; `optimizer.learning_rate` is that of the next one."""
        schedule, steps = self.optimizer._learning_rate, int(keras.ops.convert_to_numpy(self.optimizer.iterations))
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return float(keras.ops.convert_to_numpy(schedule(max(0, steps - 1))))
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    def _end(self) -> StageResult:
        """Copy the kept weights to the caller's network (in followers, which have no files, the last ones)."""
        state = self.state
        last = self.config.keep == "last"
        if not last and self.loop.is_chief:
            restore_checkpoint(self.job.folder / BEST, self.network.model.weights)
        elif last and self.config.ema is not None:
            if self.average is None:  # resumed after the last epoch
                self._update_average(state.epoch - 1)
            self.average.apply()
        self.loop.publish()
        kept = state.epoch - 1 if last else state.best_epoch
        return StageResult(state.history, kept, state.best, state.seconds, state.images, state.stopped_early)

    def _update_average(self, epoch: int) -> None:
        """Update the averaged weights at the end of an epoch, with BatchNorm's statistics on images of that epoch."""
        config, batches = self.config, None
        if config.ema is None:
            return
        if self.average is None:
            self.average = WeightAverage(self.loop, self.optimizer, fill=config.augment.fill)
        if config.ema_norm_images is not None:
            batches = iterate_epoch(
                self.bundle.train,
                config,
                num_labels=self.num_labels,
                seed=self.job.seed,
                epoch=epoch,
                share=self.loop.share,
            )
        self.average.update(batches, num_images=config.ema_norm_images or 0)

    def _averaged(self) -> contextlib.AbstractContextManager:
        """Return a context in which the network has the averaged weights, if there are any, and then the raw ones."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _describe_failure(self, loss: float) -> str:
        state = self.state
        recent = ", ".join(f"{value:.4g}" for value in list(self.job.listener.recent_losses)[-5:]) or "none"
        return (
            f"{self.job.name}: the loss became {loss} at epoch {state.epoch + 1}, step {state.step} of {self.steps} "
            f"(learning rate {self._get_rate():.3g}; running losses before: {recent}). "
            f"{self._advise()}"
        )

    def _advise(self) -> str:
        """Return advice against a loss that is not finite, according to the current settings."""
        config = self.config
        advice = ["lower optimizer.learning_rate"]
        advice.append("set clip: 1.0" if config.clip is None else f"lower clip (now {config.clip:g})")
        if config.schedule.name != "plateau":
            is_warm = config.schedule.warmup_epochs > 0
            advice.append("raise schedule.warmup_epochs" if is_warm else "set schedule.warmup_epochs: 1")
        text = f"{', '.join(advice[:-1])} or {advice[-1]}."
        return text[0].upper() + text[1:]


def _relay_errors(batches: Iterator[Batch], failures: list[DlferError]) -> Iterator[Batch]:
    """Yield the batches, and append an error to `failures` before the consumer replaces it by its own."""
    try:
        yield from batches
    except DlferError as error:
        failures.append(error)
        raise


def follow_chief(
    cluster: Cluster,
    device: Device,
    *,
    load_bundle: Callable[[StageConfig], DataBundle],
    control: StopControl,
    listener: TrainingListener,
) -> None:
    """Do this host's share of every stage that the chief begins, until the chief announces the end.

    Raises:
        TrainingStopped: the training was stopped at a checkpoint.
        DlferError: the chief ended with an error or was lost, or this host's data differs from the chief's.
    """
    stopped: TrainingStopped | None = None
    while True:
        message = cluster.tell({})
        if message["stage"] is None:
            break
        stopped = None
        try:
            _join_stage(message, device, load_bundle=load_bundle, control=control, listener=listener)
        except TrainingStopped as stop:
            stopped = stop
        except NonFiniteError as error:
            # The chief has the same error and announces whether it continues with another run.
            listener.say(str(error))
    if stopped is not None:
        raise stopped
    if message["problem"] is not None:
        raise DlferError(f"The chief ended with: {message['problem']}")


def _join_stage(
    message: dict, device: Device, *, load_bundle: Callable[[StageConfig], DataBundle], control, listener
) -> None:
    schema = PretrainConfig if message["stage"] == "pretrain" else StageConfig
    config = schema.model_validate(message["config"], strict=False)
    bundle = load_bundle(config)
    found = [list(bundle.labels), [len(bundle.train), len(bundle.validation)]]
    if found != [message["labels"], message["num_images"]]:
        raise DataError(
            f"{message['stage']}.data: found {found[1]} images of {len(found[0])} labels on this host, the chief has "
            f"{message['num_images']} of {len(message['labels'])}. Give every host the same data."
        )
    job = StageJob(
        name=message["stage"],
        config=config,
        # Not used, since only the chief writes files.
        folder=Path(),
        seed=message["seed"],
        device=replace(device, jit=message["jit"]),
        checkpoint_minutes=float("inf"),
        control=control,
        listener=listener,
        max_steps=message["max_steps"],
    )
    heads = [(place, read_network(head)) for place, head in message["auxiliary"]]
    network = assemble_network(
        read_network(message["network"]), message["parts"], activation=message["activation"], heads=heads
    )
    train_stage(job, network, bundle)


def read_network(text: str) -> keras.Model:
    """Build a network, with new weights, from the JSON that the chief sent."""
    # Importing the module registers its layers with Keras; `build_backbone`, which otherwise does so, is not called.
    from dlfer.model import training_kernels  # noqa: F401

    return keras.models.model_from_json(text)
