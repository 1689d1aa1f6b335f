"""A small experiment and a way to call the command line as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SMALL = """
experiment: {name: small, seed: 1, deterministic: true, checkpoint_minutes: 0}
model: {backbone: resnet_nano, dropout: 0.3}
pretrain:
  data: {source: synthetic_scenes, num_images: {train: 64, validation: 32}}
  epochs: 1
  batch_size: 16
  image_size: 32
finetune:
  data: {source: synthetic_faces, num_images: {train: 160, validation: 48, test: 64}}
  epochs: 2
  batch_size: 16
  image_size: 32
  augment: {rotation: 15, zoom: 0.1, shift: 0.1, mirror: 0.5, mixup: 0.2, erasing: 0.2}
  schedule: {name: cosine, warmup_epochs: 0.5}
  ema: 0.9
  clip: 1.0
evaluate: {bootstrap: 100, num_train: 32}
"""


@pytest.fixture
def small(tmp_path) -> Path:
    """An experiment file that trains in seconds, with everything random switched on."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def command(*arguments: object) -> list[str]:
    """Return the command line of `dlfer` with these arguments."""
    return [sys.executable, "-m", "dlfer", *map(str, arguments)]


def environment(**given: str) -> dict[str, str]:
    """Return the environment of a subprocess that finds this checkout, with no level of logging and no data of the machine's."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TF_CPP_MIN_LOG_LEVEL", "DLFER_DATA")}
    return {**kept, "PYTHONPATH": str(ROOT), **given}


def dlfer(*arguments: object, **given: object) -> subprocess.CompletedProcess:
    """Run `dlfer` to its end and return what it said."""
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=600, check=False, **given
    )
