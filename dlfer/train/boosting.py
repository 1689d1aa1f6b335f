"""Training of boosted trees: cached extraction of image features, and growing of trees in boosting rounds.

Features are cached in `<runs folder>/.cache/features/<digest>.npy`. While they are computed, they are written to
`<digest>.partial.npy`, from which any run can continue; a file lock keeps two processes from computing the same ones.

Trees are evaluated on the validation split after each epoch of rounds. The folder of the stage holds `trees.json` (all
trees so far), `state.json` and `history.csv`, from which `grow_trees` resumes. Each epoch starts from the saved trees
with a new booster, since XGBoost does not save its internal state (the features that the next tree draws, sums of
scores); thus a resumed run grows the same trees. An epoch that is stopped in the middle is repeated from its start.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np

from dlfer.config.sections import BoostingConfig
from dlfer.data.bundle import Split, compute_fingerprint
from dlfer.errors import ModelError, NonFiniteError, TrainingStopped, shorten
from dlfer.metrics.classification import compute_confusion, compute_item_losses
from dlfer.model.families import LevelFeatures
from dlfer.model.stage_network import TransferNetwork
from dlfer.model.transfer import compute_weights_digest
from dlfer.model.trees import count_threads, import_xgboost, make_parameters, read_booster
from dlfer.runs.files import read_json, write_atomically, write_rows
from dlfer.train.progress import StopControl, TrainingListener, hold_lock
from dlfer.train.state import (
    COLUMNS,
    ScalarLog,
    StageJob,
    StageResult,
    StageState,
    compute_epoch_metrics,
    count_epoch,
    find_reference,
    require_resume_file,
)

if TYPE_CHECKING:
    import xgboost


SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Extraction:
    """The settings of a feature extraction.

    Attributes:
        features: the feature extractor.
        network: the network of the extractor, whose weights determine the features.
        batch_size: number of images per batch.
        cache: `<runs folder>/.cache/features`; None keeps the features in memory only.
        control: stop requests, checked after each batch.
        listener: receives the progress for display.
    """

    features: LevelFeatures
    network: TransferNetwork
    batch_size: int
    cache: Path | None
    control: StopControl
    listener: TrainingListener


@dataclass(frozen=True)
class Features:
    """The features of a split.

    Attributes:
        values: float16 [N, F], in the order of the split; memory-mapped from the cache's file if there is one.
        seconds: time that it took to compute them.
        was_cached: whether they were found in the cache.
    """

    values: np.ndarray
    seconds: float
    was_cached: bool


def extract_features(extraction: Extraction, split: Split, *, split_name: str) -> Features:
    """Return the features of a split, from the cache if it has them.

    Args:
        extraction: the settings.
        split: the images.
        split_name: "train" or "validation", for messages.

    Raises:
        TrainingStopped: a stop was requested; with a cache, the finished rows are kept there.
        ModelError: the cached features cannot be read or have another shape.
    """
    if extraction.cache is None:
        start = time.monotonic()
        values = np.empty((len(split), extraction.features.num_features), np.float16)
        _fill(extraction, split, values, split_name=split_name)
        return Features(values, time.monotonic() - start, was_cached=False)
    folder, digest = extraction.cache, compute_features_digest(extraction, split)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{digest}.npy"
    with hold_lock(folder / f"{digest}.lock", "features", extraction.control, extraction.listener):
        was_cached = final.exists()
        if was_cached:
            extraction.listener.say(f"features of {split_name}: taken from the cache, {final}")
        else:
            _compute_file(extraction, split, final, split_name=split_name)
    shape = (len(split), extraction.features.num_features)
    try:
        values = np.load(final, mmap_mode="r", allow_pickle=False)
        seconds = float(read_json(final.with_suffix(".json"))["seconds"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{final}: the cached features cannot be read ({shorten(error, final)}); delete it, and its .json."
        ) from error
    if values.shape != shape or values.dtype != np.float16:
        raise ModelError(
            f"{final}: found {values.dtype} {values.shape}, expected float16 {shape}; delete it, and its .json."
        )
    return Features(values, seconds, was_cached)


def compute_features_digest(extraction: Extraction, split: Split) -> str:
    """Return a digest, 16 hex digits, of what determines the features: weights, levels, input, images and order."""
    face_input, features = extraction.network.face_input, extraction.features
    determines = {
        "weights": compute_weights_digest(extraction.network.backbone),
        "levels": [[level.name, level.size] for level in features.levels],
        "pooling": [type(layer).__name__ for layer in features.pooling],
        "input": face_input.get_config(),
        "backend": keras.backend.backend(),
        "images": compute_fingerprint(split),
        "order": hashlib.sha256("\n".join(split.ids.tolist()).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(determines, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _compute_file(extraction: Extraction, split: Split, final: Path, *, split_name: str) -> None:
    """Write the features to a partial file, continuing after its last finished row, and rename it when complete."""
    partial, record = final.with_suffix(".partial.npy"), final.with_suffix(".json")
    shape = (len(split), extraction.features.num_features)
    done, seconds = 0, 0.0
    if partial.exists() and record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        # With the same batch size, a resumed extraction has the same batches and thus the same features.
        if found["batch_size"] == extraction.batch_size:
            done, seconds = found["done"], found["seconds"]
    if not done:
        # The old record counts rows of a file that is overwritten now; a new one is written with the first rows.
        record.unlink(missing_ok=True)
    mode = "r+" if done else "w+"
    values = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=None if done else shape)
    start = time.monotonic()

    def save(count: int) -> None:
        values.flush()
        spent = seconds + time.monotonic() - start
        written = {"done": count, "seconds": spent, "batch_size": extraction.batch_size}
        write_atomically(record, json.dumps(written) + "\n")

    _fill(extraction, split, values, split_name=split_name, start=done, save=save)
    save(len(split))
    partial.rename(final)


def _fill(
    extraction: Extraction,
    split: Split,
    values: np.ndarray,
    *,
    split_name: str,
    start: int = 0,
    save: Callable[[int], None] | None = None,
) -> None:
    """Write the features of the images from `start` on to `values`; periodically `save` the number of finished rows."""
    done, saved = start, time.monotonic()
    listener = extraction.listener
    try:
        for batch in extraction.features.iterate(split.images, batch_size=extraction.batch_size, start=start):
            values[done : done + len(batch)] = batch
            done += len(batch)
            listener.report_progress(f"features of {split_name}", done, len(split))
            reason = extraction.control.get_reason()
            if save is not None and (reason is not None or time.monotonic() - saved >= SAVE_SECONDS):
                save(done)
                saved = time.monotonic()
            if reason is not None and done < len(split):
                raise TrainingStopped(
                    f"features of {split_name} stopped by {reason} after {done:,} of {len(split):,} images"
                    + (", which are kept." if save is not None else "; without a cache they begin again."),
                    reason=reason,
                )
    finally:
        listener.close()


TREES, STATE, HISTORY = "trees.json", "state.json", "history.csv"


@dataclass(frozen=True)
class TreeData:
    """The features and targets on which trees are grown or evaluated.

    Attributes:
        features: normalised features, float32 [N, F].
        targets: int64 [N].
        weights: sample weights, float32 [N], or None for ones.
    """

    features: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None


def grow_trees(
    job: StageJob, config: BoostingConfig, train: TreeData, validation: TreeData, *, num_labels: int
) -> tuple[xgboost.Booster, StageResult]:
    """Grow trees from the start, or resume from the job's folder; return the kept trees and the result of the stage.

    Args:
        job: the job of the stage; its epochs, monitor, keep and early_stopping are used, and its max_steps limits the
            rounds of an epoch.
        config: the settings of the trees.
        train, validation: the rows for growing and for selection.

    Raises:
        TrainingStopped: a stop was requested; the folder holds the trees of all finished epochs.
        NonFiniteError: the loss became NaN or infinite.
    """
    try:
        return _TreeTraining(job, config, train, validation, num_labels=num_labels).run()
    finally:
        job.listener.close()


class _TreeTraining:
    def __init__(
        self, job: StageJob, config: BoostingConfig, train: TreeData, validation: TreeData, *, num_labels: int
    ) -> None:
        self.job, self.stage, self.num_labels = job, job.config, num_labels
        self.xgb = import_xgboost()
        self.rounds = min(config.rounds_per_epoch, job.max_steps or config.rounds_per_epoch)
        self.rate = config.learning_rate
        threads = count_threads(train.features.size)
        self.parameters = make_parameters(config, num_labels=num_labels, seed=job.seed, threads=threads)
        self.splits = {"train": train, "validation": validation}
        matrix = self.xgb.QuantileDMatrix(
            train.features, label=train.targets, weight=train.weights, max_bin=config.max_bin, nthread=threads
        )
        self.matrices = {"train": matrix, "validation": self.xgb.DMatrix(validation.features, nthread=threads)}
        self.state = StageState(phase="trees")
        self.trees: bytes | None = None
        self.log_writer = ScalarLog(job.folder / "tensorboard")

    def run(self) -> tuple[xgboost.Booster, StageResult]:
        self._begin()
        state = self.state
        while state.epoch < self.stage.epochs and not state.stopped_early:
            self._grow_epoch()
            reason = self.job.control.get_reason()
            if reason is not None and state.epoch < self.stage.epochs and not state.stopped_early:
                raise self._stop(reason, f"after epoch {state.epoch}")
        kept = state.epoch - 1 if self.stage.keep == "last" else state.best_epoch
        booster = self._make_booster(self.trees)[: (kept + 1) * self.rounds]
        images = len(self.splits["train"].targets) * state.epoch * self.rounds
        return booster, StageResult(state.history, kept, state.best, state.seconds, images, state.stopped_early)

    def _begin(self) -> None:
        """Resume from the folder, if it has a state; remove trees beyond the last recorded epoch."""
        folder = self.job.folder
        folder.mkdir(parents=True, exist_ok=True)
        require_resume_file(folder / STATE, [folder / HISTORY])
        if not (folder / STATE).exists():
            return
        num_features = self.splits["train"].features.shape[1]
        try:
            self.state = self._read_state(folder / STATE)
            booster = read_booster(folder / TREES, num_features=num_features, num_labels=self.num_labels)
            self.trees = bytes(booster[: self.state.epoch * self.rounds].save_raw("json"))
            # A process that was killed after writing its state may not have written the last row of the history.
            write_rows(folder / HISTORY, COLUMNS, self.state.history)
        except (ModelError, OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelError(
                f"{folder}: the interrupted growing cannot be continued ({error}). Delete {STATE} and {HISTORY} there to grow it again."
            ) from error

    def _read_state(self, path: Path) -> StageState:
        """Return the saved state; `reference`, which files of earlier versions lack, is computed from the history."""
        found = json.loads(path.read_text(encoding="utf-8"))
        values = [row[f"validation_{self.stage.monitor}"] for row in found["history"]]
        return StageState(**{"reference": find_reference(values, self.stage), **found, "phase": "trees"})

    def _make_booster(self, trees: bytes | None) -> xgboost.Booster:
        booster = self.xgb.Booster(self.parameters, list(self.matrices.values()))
        if trees is not None:
            booster.load_model(bytearray(trees))
            # Loading overwrites the parameters with those of the file.
            booster.set_param(self.parameters)
        return booster

    def _grow_epoch(self) -> None:
        job, state = self.job, self.state
        start = time.monotonic()
        job.listener.start_epoch(job.name, state.epoch, self.stage.epochs, 0, self.rounds)
        booster = self._make_booster(self.trees)
        for step in range(self.rounds):
            booster.update(self.matrices["train"], state.epoch * self.rounds + step)
            figures = self._evaluate(booster, "train")
            self._check_finite(figures["loss"], f"loss became {figures['loss']}", f"round {step + 1} of {self.rounds}")
            loss, accuracy = figures["loss"], figures["accuracy"]
            job.report_step(state.epoch + 1, step + 1, self.rounds, loss=loss, accuracy=accuracy)
            reason = job.control.get_reason()
            if reason is not None and step + 1 < self.rounds:
                raise self._stop(reason, f"in epoch {state.epoch + 1}, which is begun again")
        validation = self._evaluate(booster, "validation")
        self._check_finite(validation["loss"], f"validation loss became {validation['loss']}", "at its end")
        state.epoch_seconds = time.monotonic() - start
        self._finish_epoch(booster, figures, validation)

    def _check_finite(self, loss: float, what: str, where: str) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self.job.name}: the {what} in epoch {self.state.epoch + 1}, {where} (learning rate {self.rate:g}). Lower "
                "boosting.learning_rate, raise boosting.reg_lambda, or set boosting.normalize.leaves: true."
            )

    def _evaluate(self, booster: xgboost.Booster, split: str) -> dict[str, float]:
        """Return the unweighted loss, accuracy and macro F1 on a split, or NaN if a prediction is not finite."""
        targets = self.splits[split].targets
        predicted = booster.predict(self.matrices[split])
        if not np.isfinite(predicted).all():
            return dict.fromkeys(("loss", "accuracy", "macro_f1"), math.nan)
        confusion = compute_confusion(targets, predicted.argmax(axis=1), self.num_labels)
        return compute_epoch_metrics(compute_item_losses(targets, predicted).mean(), confusion)

    def _finish_epoch(self, booster: xgboost.Booster, train: dict[str, float], validation: dict[str, float]) -> None:
        state = self.state
        images = len(self.splits["train"].targets) * self.rounds
        row = state.add_row(train, validation, rate=self.rate, images=images)
        self.log_writer.write(row)
        self._select(validation[self.stage.monitor])
        state.epoch, state.seconds = state.epoch + 1, state.seconds + state.epoch_seconds
        self.trees = bytes(booster.save_raw("json"))
        # The trees are written first: a state without its trees could not be resumed from.
        write_atomically(self.job.folder / TREES, self.trees)
        write_atomically(self.job.folder / STATE, json.dumps(asdict(state)) + "\n")
        write_rows(self.job.folder / HISTORY, COLUMNS, state.history)
        self.job.report_epoch(row, is_best=state.best_epoch == state.epoch - 1)

    def _select(self, value: float) -> None:
        """Update the best epoch and the counter of early stopping."""
        state, stopping = self.state, self.stage.early_stopping
        count_epoch(state, value, self.stage)
        state.stopped_early = stopping is not None and state.waited >= stopping.patience

    def _stop(self, reason: str, where: str) -> TrainingStopped:
        return TrainingStopped(
            f"{self.job.name} stopped by {reason} {where}; trees: {self.job.folder / TREES}.", reason=reason
        )


def compute_importance(booster: xgboost.Booster, sizes: list[int]) -> list[dict[str, float]]:
    """Return how much each feature level contributes to the trees; `sizes` are the levels' numbers of features.

    Returns:
        For each level: its number of "features", how many of them are "used", the number of "splits" on them, and the
        "gain" of these splits as a share of the total gain of all levels.
    """
    gains, counts = (booster.get_score(importance_type=kind) for kind in ("total_gain", "weight"))
    total = sum(gains.values())
    levels, start = [], 0
    for size in sizes:
        names = [f"f{index}" for index in range(start, start + size)]
        gain = sum(gains.get(name, 0.0) for name in names)
        levels.append(
            {
                "features": size,
                "used": sum(name in gains for name in names),
                "splits": int(sum(counts.get(name, 0) for name in names)),
                "gain": gain / total if total else 0.0,
            }
        )
        start += size
    return levels
