"""What counts as an improvement of the monitored metric, and how many epochs have passed without one.

Early stopping and the schedule plateau count alike, as Keras' EarlyStopping and ReduceLROnPlateau do: an epoch is an
improvement if it beats the value at the last improvement, not the best value, by more than min_delta. So many small
gains in a row count once their sum exceeds min_delta. Patience p is used up at the end of the p-th epoch in a row
without an improvement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dlfer.config.schema import StageConfig

if TYPE_CHECKING:
    from dlfer.train.state import StageState


class Counts(Protocol):
    """The fields of a stage's state that are counted here; see `StageState`."""

    epoch: int
    best: float | None
    best_epoch: int | None
    reference: float | None
    waited: int


def count_epoch(state: Counts, value: float, config: StageConfig) -> bool:
    """Count an epoch whose monitored metric is `value`; return whether it is the best so far.

    Args:
        state: best, best_epoch, reference and waited are changed.
        value: of the epoch `state.epoch`; NaN is never an improvement on a number.
        config: its monitor and early_stopping.min_delta apply.
    """
    is_best = beats(value, state.best, config.monitor)
    if is_best:
        state.best, state.best_epoch = value, state.epoch
    if beats(value, state.reference, config.monitor, min_delta=get_min_delta(config)):
        state.reference, state.waited = value, 0
    else:
        state.waited += 1
    return is_best


def count_plateau(state: StageState, patience: int) -> bool:
    """Count the epoch towards the schedule plateau, after `count_epoch`; return whether the rate falls now."""
    state.plateau_waited = 0 if state.waited == 0 else state.plateau_waited + 1
    if state.plateau_waited < patience:
        return False
    state.plateau_waited = 0
    return True


def beats(value: float, reference: float | None, monitor: str, *, min_delta: float = 0.0) -> bool:
    """Return whether `value` is better than `reference` by more than `min_delta`: lower for a loss, else higher."""
    if reference is None or math.isnan(reference):
        return True
    return value + min_delta < reference if monitor == "loss" else value - min_delta > reference


def find_reference(values: Sequence[float], config: StageConfig) -> float | None:
    """Return the value at the last improvement among the monitored values of the epochs so far; None for no epochs."""
    reference = None
    for value in values:
        if beats(value, reference, config.monitor, min_delta=get_min_delta(config)):
            reference = value
    return reference


def get_min_delta(config: StageConfig) -> float:
    """Return what an improvement must exceed."""
    return config.early_stopping.min_delta if config.early_stopping else 0.0
