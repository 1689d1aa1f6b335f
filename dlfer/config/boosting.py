"""The section `boosting` of an experiment file: gradient-boosted trees on the features of a backbone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dlfer.config.section import Count, Fraction, Positive, Section


class BoostingConfig(Section):
    """How the trees are grown (family boosted)."""

    rounds: Count = 1000
    """At most so many rounds; a round is one tree a class."""
    learning_rate: Positive = 0.1
    """Factor of each new tree; 1 adds it whole."""
    max_depth: Count = 6
    early_stopping_rounds: Count | None = 50
    """Stop when validation has not improved for so many rounds; null: all rounds, the best of them kept."""
    subsample: Annotated[Fraction, Field(gt=0)] = 1.0
    """Fraction of the rows that a tree sees."""
    colsample: Annotated[Fraction, Field(gt=0)] = 1.0
    """Fraction of the features that a tree sees."""
    lambda_: Annotated[float, Field(ge=0, alias="lambda")] = 1.0
    levels: Literal["all", "last"] = "all"
