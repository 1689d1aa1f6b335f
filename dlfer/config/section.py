"""The base of every section of an experiment file, and the ranges of numbers that they share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen, nothing is converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )


def get_fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by their names in a file; an alias is for a name that Python reserves."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
