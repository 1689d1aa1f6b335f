"""Where the models and the experiments that come with dlfer are."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def find_checkout() -> Path | None:
    """Return the root of the checkout that dlfer is imported from, or None for an ordinary installation."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def list_places(name: str) -> list[Path]:
    """Return the folders of this name that dlfer searches besides the working directory, in order.

    They are that of `$DLFER_HOME`, that of the installed package, and that of the checkout of an editable installation; each may
    be absent.

    Args:
        name: "saved_models" or "experiments".
    """
    home = os.environ.get("DLFER_HOME")
    roots = [Path(home).expanduser() if home else None, PACKAGE, find_checkout()]
    return [root / name for root in roots if root is not None]
