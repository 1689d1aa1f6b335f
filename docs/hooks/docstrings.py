"""A griffe extension for mkdocstrings, which renames the section `Example:` of docstrings to griffe's `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """A griffe extension that makes examples in docstrings appear as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section `Example:` in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
