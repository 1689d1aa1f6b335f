"""How the keys of a trial and their values are written for a person."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def format_overrides(overrides: Mapping[str, Any]) -> str:
    """Return the keys of a trial on a line, by the last part of each where that tells them apart.

    Example:
        >>> format_overrides({"finetune.optimizer.learning_rate": 0.001, "model.dropout": 0.2})
        'learning_rate 0.001, dropout 0.2'
    """
    return ", ".join(f"{shorten_key(key, overrides)} {format_value(value)}" for key, value in overrides.items())


def shorten_key(key: str, others: Collection[str]) -> str:
    """Return the last part of a dotted key, or as many as tell it from the others."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        short = ".".join(parts[-count:])
        if not any(other != key and other.endswith(f".{short}") for other in others):
            # "name" alone says nothing.
            return short if short != "name" else ".".join(parts[-2:])
    return key


def format_value(value: Any) -> str:
    """Return a value of a key as a person writes it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
