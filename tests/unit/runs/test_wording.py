from __future__ import annotations

import pytest

from dlfer.runs.wording import format_duration


@pytest.mark.parametrize(
    ("seconds", "text", "estimate"),
    [
        (None, "–", "–"),
        (4.25, "4.2 s", "4 s"),
        (59.94, "59.9 s", "60 s"),
        (60, "1 min 00 s", "1 min"),
        (1085, "18 min 05 s", "18 min"),
        (11220, "3 h 07 min", "3 h 07 min"),
    ],
)
def test_durations(seconds, text, estimate):
    assert format_duration(seconds) == text
    assert format_duration(seconds, is_estimate=True) == estimate
