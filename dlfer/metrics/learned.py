"""Detection of trainings that learned nothing, since no conclusion can be drawn from comparisons with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlfer.metrics.classification import compute_item_losses
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.runs.comparison_record import ArmPair
from dlfer.runs.files import read_rows

ODDS_RATIO = 1.5
"""The odds of a correct prediction must be at least this many times those of always predicting the largest class."""

LOSS_FRACTION = 0.98
"""A loss above this fraction of ln(C), the loss of predicting 1/C for every class, counts as not having decreased."""

DID_NOT_LEARN = "The training did not learn"
"""The first words of a run's warning."""

_MAX_REASONS = 6

_HINT = (
    "Try another finetune.optimizer.learning_rate, finetune.clip: 1.0, a warm-up (finetune.schedule.warmup_epochs), more "
    "epochs, or a backbone whose initialisation suits a start from random weights; in an ablation, ablation.without sets "
    "keys of that arm alone."
)


def describe_no_conclusion(names: Sequence[str], reasons: Sequence[str]) -> str:
    """Return the sentence that replaces a verdict, e.g. "No conclusion about a and b, since ...".

    Args:
        names: the recipes or models that were to be compared.
        reasons: "<training>: <clause of find_learning_failure>" for each training that did not learn.
    """
    return f"No conclusion about {' and '.join(names)}, since training did not learn: {'; '.join(reasons)}. {_HINT}"


def list_verdicts(pairs: Sequence[ArmPair]) -> list[tuple[str, bool]]:
    """Return the sentence of each compared pair, and whether it states that no conclusion is possible.

    Two or more pairs without a conclusion share one sentence, which comes first and names each failed training once.
    """
    failed = [pair for pair in pairs if pair.not_learned]
    if len(failed) < 2:
        return [(pair.sentence, bool(pair.not_learned)) for pair in pairs]
    reasons = list(dict.fromkeys(reason for pair in failed for reason in pair.not_learned))
    more = [f"and {len(reasons) - _MAX_REASONS} more"] if len(reasons) > _MAX_REASONS else []
    text = (
        f"No conclusion from {len(failed)} of {len(pairs)} comparisons, since training did not learn: "
        f"{'; '.join([*reasons[:_MAX_REASONS], *more])}. {_HINT}"
    )
    return [(text, True), *((pair.sentence, False) for pair in pairs if not pair.not_learned)]


def find_learning_failure(
    train: Predictions | None, history: Sequence[Mapping[str, str]] = (), *, num_classes: int | None = None
) -> str | None:
    """Return why a training is considered not to have learned, as a clause about it; None if it learned.

    Two criteria are applied to predictions on training images: the accuracy is not clearly above the share of the
    largest class (the lower end of its 95 % interval has less than 1.5 times the odds of that class; if its share is 25
    %, this is below 33 %), or the mean of -ln p(target) is above 98 % of ln(C). Without such predictions, the last
    training loss in the history is used instead.

    Args:
        train: predictions of the finished model on training images with C classes, or None.
        history: rows of history.csv with "epoch" and "train_loss" of a categorical cross-entropy; used without `train`.
        num_classes: C, needed with `history`.

    Example:
        >>> find_learning_failure(read_predictions(run / "predictions" / "train.npz"))
        'its accuracy on 2,000 training images is 25.4 % (95 % interval 23.5 to 27.4), and always answering Happy is
        right on 25.1 %'
    """
    if train is not None and len(train):
        return _judge_predictions(train)
    rows = [row for row in history if row.get("train_loss")]
    if not rows or num_classes is None:
        return None
    loss, chance = float(rows[-1]["train_loss"]), math.log(num_classes)
    if loss <= LOSS_FRACTION * chance:
        return None
    return f"its training loss after epoch {rows[-1]['epoch']} is {loss:.3f}, {_describe_chance(num_classes)}"


def find_run_failure(run: Path) -> str | None:
    """Return why the training of a run is considered not to have learned; None if it learned or cannot be judged.

    Args:
        run: a finished run with predictions/train.npz, or else finetune/history.csv and predictions on another split.
    """
    folder = run / "predictions"
    if (folder / "train.npz").is_file():
        return find_learning_failure(read_predictions(folder / "train.npz"))
    others = [path for path in (folder / "validation.npz", folder / "test.npz") if path.is_file()]
    if not others:
        return None
    rows = read_rows(run / "finetune" / "history.csv")
    return find_learning_failure(None, rows, num_classes=len(read_predictions(others[0]).labels))


def _judge_predictions(train: Predictions) -> str | None:
    n, hits = len(train), int(train.correct.sum())
    counts = np.bincount(train.targets, minlength=len(train.labels))
    largest = int(counts.argmax())
    share = counts[largest] / n
    low, high = compute_wilson_interval(hits, n)
    # The odds are compared as products, since the odds of a share of 1 are infinite.
    if low * (1 - share) < ODDS_RATIO * share * (1 - low):
        return (
            f"its accuracy on {n:,} training images is {100 * hits / n:.1f} % (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}), and always answering {train.labels[largest]} is right on {100 * share:.1f} %"
        )
    loss = float(compute_item_losses(train.targets, train.probabilities).mean())
    chance = math.log(len(train.labels))
    if loss > LOSS_FRACTION * chance:
        return f"its loss on {n:,} training images is {loss:.3f}, {_describe_chance(len(train.labels))}"
    return None


def _describe_chance(num_classes: int) -> str:
    chance = math.log(num_classes)
    return f"and answering 1/{num_classes} for each class has ln({num_classes}) = {chance:.3f}"
