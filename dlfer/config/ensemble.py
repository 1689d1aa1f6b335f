"""The section `ensemble` of an experiment file: who its members are and how they are combined."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dlfer.config import names
from dlfer.config.section import Section


class MemberConfig(Section):
    """A member: the experiment with some keys set, or a model that is trained already."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    set: dict[str, Any] | None = None
    """Dotted key -> value; the member is this experiment with them, a run of its own."""
    model: str | None = None
    """Instead: a run, an artifact folder or the name of a model."""

    @model_validator(mode="after")
    def _check(self) -> MemberConfig:
        if (self.set is None) == (self.model is None):
            raise ValueError(f"member {self.name}: expected one of set (keys of this experiment) and model (trained).")
        return self


class EnsembleConfig(Section):
    """Several classifiers as one (family ensemble)."""

    members: Annotated[tuple[MemberConfig, ...], Field(min_length=2)]
    combine: Literal[names.COMBINATIONS] = "average"
    """average of the probabilities, vote (the average decides between equal counts), or trained: a
    multinomial logistic regression on the members' log-probabilities, fitted on validation."""

    @model_validator(mode="after")
    def _check(self) -> EnsembleConfig:
        found = [member.name for member in self.members]
        if len(set(found)) < len(found):
            raise ValueError(f"members: found the names {', '.join(found)}; expected each once.")
        return self
