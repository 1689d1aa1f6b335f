"""What travels between chief and workers: KerasTuner's messages, in which proposals and records are JSON text."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dlfer.study.search.engine import Answer, Proposal

_CARRIED = "dlfer"
"""The key of KerasTuner's messages under which the text travels."""
BEATS = 5
"""A worker is heard from so many times within search.lost_after_seconds."""


def carry(text: str) -> Any:
    """Return hyperparameters of KerasTuner that hold nothing but a text."""
    import keras_tuner

    hyperparameters = keras_tuner.HyperParameters()
    hyperparameters.values[_CARRIED] = text
    return hyperparameters


def uncarry(message: Any) -> str:
    """Return the text that a message of hyperparameters holds."""
    return message.values.values[_CARRIED].string_value


def make_trial(trial: str, status: str, text: str = "") -> Any:
    """Return the message of a trial with a status and a text."""
    from keras_tuner.src.engine.trial import Trial

    return Trial(carry(text), trial_id=trial, status=status).to_proto()


def write_answer(answer: Answer) -> Any:
    """Return the message of a trial that says what an engine answered."""
    if answer.proposal is None:
        return make_trial("-", "STOPPED" if answer.exhausted else "IDLE")
    return make_trial(answer.proposal.trial, "RUNNING", json.dumps(asdict(answer.proposal)))


def read_answer(message: Any) -> Answer:
    """Return what `write_answer` wrote."""
    from keras_tuner.src.engine.trial import TrialStatus

    status = TrialStatus.from_proto(message.status)
    if status == "RUNNING":
        return Answer(Proposal(**json.loads(uncarry(message.hyperparameters))))
    return Answer(exhausted=status == "STOPPED")
