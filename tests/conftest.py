"""What holds for every test."""

from __future__ import annotations

import sys

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("dlfer", deadline=None)
settings.load_profile("dlfer")


@pytest.fixture(autouse=True)
def seed_random_weights():
    """Let each test draw the same weights whatever ran before it in its process; Keras is not loaded for it."""
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def forget_determinism():
    """Undo what a test's deterministic training switched on for its whole process: Keras compiles nothing by XLA under it."""
    yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework.config import disable_op_determinism

        disable_op_determinism()
